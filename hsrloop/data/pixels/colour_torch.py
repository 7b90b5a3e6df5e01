"""Turn hues and scale saturations and values of packed pixels on any device, as `colour` does."""

from __future__ import annotations

import torch
from torch import Tensor

from hsrloop.data.pixels.colour import PLACES, SEXTANTS


def recolour(packed: Tensor, factors: Tensor, out: Tensor) -> None:
    """Recolour images.

    Args:
        packed: (n, S, S) int32, see `bank`.
        factors: (n, 3) float32, as `colour.colour_factors` returns them.
        out: (n, S, S, 3) uint8 RGB, filled.
    """
    turn, more, lighter = factors[:, :, None, None].unbind(1)  # each (n, 1, 1)
    r, g, b = ((packed >> shift & 255).float() for shift in (0, 8, 16))
    value = torch.maximum(torch.maximum(r, g), b)
    spread = value - torch.minimum(torch.minimum(r, g), b)
    hue = torch.where(
        value == r,
        g - b,
        torch.where(value == g, b - r + 2 * spread, r - g + 4 * spread),
    )
    hue = (hue / spread.clamp(min=1)).add_(turn)
    bright = (value * lighter).clamp_(max=255)
    fall = torch.minimum(spread.mul_(more), value).mul_(bright / value.clamp(min=1))
    bright += 0.5  # the conversion to uint8 cuts fractions off
    for channel, place in enumerate(PLACES):
        away = (hue - place).abs_()
        away = torch.minimum(away, (away - SEXTANTS).abs_())
        out[..., channel] = bright - away.sub_(1).clamp_(0, 1).mul_(fall)
