"""Colour of packed pixels on any device, quantised as OpenCV quantises 8-bit HSV.

Source: opencv@5.0, modules/imgproc, RGB2HSV_b and HSV2RGB_b; gains as `render` applies them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

FRACTION_BITS = 12  # of OpenCV's reciprocals
HUES = 180
LOWEST_HUE = -30  # of red towards blue, before it is put at the circle's end
TRUNCATED = 0.499  # subtracted before rounding: rounds down, as the peer's tables do


class Recolour:
    """Turn hues and scale saturations and values; holds the tables on its device."""

    def __init__(self, device: torch.device) -> None:
        self._levels = torch.arange(256, dtype=torch.float32, device=device)
        self._per_value = _reciprocals(255).to(device)
        self._per_spread = _reciprocals(HUES / 6).to(device)
        # How far each channel of a saturated colour lies below its value, by hue; two rounds and a
        # bit, so that a turned hue needs no wrapping.
        hue = np.arange(2 * HUES - LOWEST_HUE) + LOWEST_HUE
        around = [(n + hue / 30.0) % 6 for n in (5, 3, 1)]
        below = [np.clip(np.minimum(k, 4 - k), 0, 1) for k in around]
        self._below = torch.from_numpy(np.array(below, np.float32)).to(device)  # (3, 390)

    def __call__(self, packed: Tensor, gains: Tensor, out: Tensor) -> None:
        """Recolour images.

        Args:
            packed: (n, S, S) int32, see `bank`.
            gains: (n, 3) float32: steps of hue in [0, 180), factors of saturation and value.
            out: (n, S, S, 3) uint8 RGB, filled.
        """
        turn, saturation_factor, value_factor = gains.unbind(1)  # each (n,)
        hue, saturation, value = self._hsv(packed)
        hue += turn.int()[:, None, None] - LOWEST_HUE
        value = _looked_up(_scaled(self._levels, value_factor[:, None]), value)
        fall = _looked_up(_scaled(self._levels, saturation_factor[:, None]) / 255, saturation)
        fall *= value
        # OpenCV cuts fractions off here, and so does the conversion to uint8.
        for channel, below in enumerate(self._below):
            share = below.index_select(0, hue.view(-1)).view_as(fall)
            out[..., channel] = torch.addcmul(value, share, fall, value=-1)

    def _hsv(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hue in [-30, 150], saturation and value in [0, 255], each int32."""
        r, g, b = packed & 255, packed >> 8 & 255, packed >> 16 & 255
        value = torch.maximum(torch.maximum(r, g), b)
        spread = value - torch.minimum(torch.minimum(r, g), b)
        half = 1 << (FRACTION_BITS - 1)
        reciprocal = self._per_value.index_select(0, value.view(-1)).view_as(value)
        saturation = (reciprocal * spread + half) >> FRACTION_BITS
        hue = torch.where(
            value == r,
            g - b,
            torch.where(value == g, b - r + 2 * spread, r - g + 4 * spread),
        )
        reciprocal = self._per_spread.index_select(0, spread.view(-1)).view_as(value)
        hue = (reciprocal * hue + half) >> FRACTION_BITS
        return hue, saturation, value


def _reciprocals(of: float) -> Tensor:
    """Return `of` / level in units of 2**-FRACTION_BITS for each level; (256,) int32, 0 for 0."""
    levels = np.arange(256)
    parts = np.rint(of * (1 << FRACTION_BITS) / np.maximum(levels, 1)) * (levels > 0)
    return torch.from_numpy(parts.astype(np.int32))


def colour_gains(gains: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return a plan's HSV gains as `Recolour` takes them."""
    hue, saturation, value = gains
    return float(math.floor(hue * HUES) % HUES), 1 + saturation, 1 + value


def _looked_up(tables: Tensor, levels: Tensor) -> Tensor:
    """Return what (n, 256) tables say of (n, S, S) int32 levels in [0, 255], each of its own."""
    count = len(tables)
    offsets = torch.arange(0, 256 * count, 256, dtype=torch.int32, device=levels.device)
    places = levels + offsets[:, None, None]
    return tables.view(-1).index_select(0, places.view(-1)).view_as(levels)


def _scaled(levels: Tensor, factor: Tensor) -> Tensor:
    """Return levels times a factor, rounded down, at most 255; float32."""
    return (levels * factor).sub_(TRUNCATED).abs_().round_().clamp_(max=255)
