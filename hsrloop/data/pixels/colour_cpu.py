"""Recolour 8-bit pixels, for the CPU: in one pass over planes. See `colour`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from hsrloop.ops.native import compiled

_ZERO, _HALF, _ONE, _TWO, _FOUR, _SIX, _TOP = (
    np.float32(number) for number in (0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 255.0)
)
_SIGNATURE = "void(u1[::1], u1[::1], u1[::1], f4, f4, f4)"


def recolour(planes: Sequence[np.ndarray], factors: tuple[float, float, float]) -> None:
    """Recolour pixels in place.

    Args:
        planes: red, green and blue, each uint8, contiguous and of one shape.
        factors: as `colour_factors` returns them; at most three sextants either way. Saturation
            and value stay at their largest where a factor takes them beyond.
    """
    turn, saturation, value = factors
    red, green, blue = (plane.reshape(-1) for plane in planes)
    _recolour(red, green, blue, turn, saturation, value)


def _recolour_planes(
    red: np.ndarray, green: np.ndarray, blue: np.ndarray, turn: Any, more: Any, lighter: Any
) -> None:
    for i in range(red.shape[0]):
        r, g, b = np.float32(red[i]), np.float32(green[i]), np.float32(blue[i])
        value = max(max(r, g), b)
        spread = value - min(min(r, g), b)
        if value == r:
            hue = g - b
        elif value == g:
            hue = b - r + _TWO * spread
        else:
            hue = r - g + _FOUR * spread
        hue = hue / max(spread, _ONE) + turn
        bright = min(value * lighter, _TOP)
        fall = min(spread * more, value) * (bright / max(value, _ONE))
        bright += _HALF
        red[i] = np.uint8(np.int32(bright - fall * _share(hue, _ZERO)))
        green[i] = np.uint8(np.int32(bright - fall * _share(hue, _TWO)))
        blue[i] = np.uint8(np.int32(bright - fall * _share(hue, _FOUR)))


def _share_below(hue: Any, place: Any) -> Any:
    """Return how far a channel lies below the value, in spreads."""
    away = abs(hue - place)
    away = min(away, abs(away - _SIX))
    return min(max(away - _ONE, _ZERO), _ONE)


_share = numba.njit(inline="always")(_share_below)
_recolour = compiled(_recolour_planes, _SIGNATURE)
