"""Affine maps between windows of pixels, as both images and cut-outs are warped by them."""

from __future__ import annotations

import math

import numpy as np

Matrix = tuple[float, float, float, float, float, float]
Box = tuple[int, int, int, int]


def bounds(matrix: Matrix, box: Box, limit: Box, *, margin: int) -> Box | None:
    """Return the pixels that a mapped box can touch, within `limit`; None without any."""
    a, b, c, d, e, f = matrix
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        return None
    cx, cy, hw, hh = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    x, y = a * cx + b * cy + c, d * cx + e * cy + f
    rx, ry = abs(a) * hw + abs(b) * hh + margin, abs(d) * hw + abs(e) * hh + margin
    found = (
        max(limit[0], math.floor(x - rx)),
        max(limit[1], math.floor(y - ry)),
        min(limit[2], math.ceil(x + rx)),
        min(limit[3], math.ceil(y + ry)),
    )
    return found if found[0] < found[2] and found[1] < found[3] else None


def inverse(matrix: Matrix) -> Matrix:
    """Return the map back."""
    a, b, c, d, e, f = matrix
    determinant = a * e - b * d
    a, b, d, e = e / determinant, -b / determinant, -d / determinant, a / determinant
    return a, b, -(a * c + b * f), d, e, -(d * c + e * f)


def between_pixels(matrix: Matrix, source: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Return the (2, 3) map between pixel indices of two windows, whose corners are given.

    OpenCV puts pixel i at i, geometry at i + 0.5.
    """
    a, b, c, d, e, f = matrix
    x, y = source[0] + 0.5, source[1] + 0.5
    return np.array(
        [
            [a, b, a * x + b * y + c - target[0] - 0.5],
            [d, e, d * x + e * y + f - target[1] - 0.5],
        ]
    )
