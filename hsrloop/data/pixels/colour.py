"""Hues turned, saturations and values scaled: what is meant, and in which terms.

Hue is a position on a circle of six sextants: red at 0, green at 2, blue at 4. A channel equals the
pixel's value within one sextant of its own place, lies below it by all of the pixel's spread from
two sextants on, and in between by a share of it. So no pixel is ever written as hue, saturation
and value, and nothing is rounded but the result.

`colour_cpu`, `colour_torch` and `render.cu` compute the same, operation by operation.
"""

from __future__ import annotations

SEXTANTS = 6
PLACES = (0.0, 2.0, 4.0)  # of red, green and blue


def colour_factors(gains: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return sextants to turn by and factors of saturation and value, from a plan's HSV gains.

    Source of what gains mean: ultralytics@8.4.190, data/augment.py RandomHSV.
    """
    hue, saturation, value = gains
    return hue * SEXTANTS, 1 + saturation, 1 + value
