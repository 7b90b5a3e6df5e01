"""Match the colour of an object to where it is put, from very small versions of photographs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from hsrloop.data.plan import Layer
from hsrloop.data.threads import in_threads

CELLS = 16
LIGHTNESS = 0.5  # largest share of the difference in lightness that is made up; a guess
COLOUR = 0.3  # and of that in colour
GAINS = (0.5, 1.7)  # bounds of a channel's factor; a guess


def small_versions(paths: Sequence[Path], *, threads: int = 4) -> np.ndarray:
    """Return (n, 16, 16, 3) uint8 RGB, decoded at an eighth of the size; grey where unreadable."""
    found = list(in_threads(_small, paths, threads=threads))
    return np.array(found, np.uint8).reshape(-1, CELLS, CELLS, 3)


def place_mean(
    palette: np.ndarray, layer: Layer, centre: tuple[float, float], reach: float
) -> tuple[float, float, float]:
    """Return the mean RGB of a photograph around a point of the output.

    Args:
        palette: (16, 16, 3) of the photograph.
        layer: how it lies: upright, whole.
        reach: half the side of the square to look at, in output units.
    """
    a, _, c, _, e, f = layer.affine
    w, h = layer.visible[2:]
    columns = sorted((centre[0] + side * reach - c) / a / w for side in (-1, 1))
    rows = sorted((centre[1] + side * reach - f) / e / h for side in (-1, 1))
    (x0, x1), (y0, y1) = (_cells(ends) for ends in (columns, rows))
    r, g, b, _ = cv2.mean(palette[y0:y1, x0:x1])
    return r, g, b


def gains_towards(
    own: tuple[float, float, float],
    target: tuple[float, float, float],
    strengths: Sequence[float],
) -> tuple[float, float, float]:
    """Return RGB factors that move a mean colour part of the way to another, in Lab.

    Args:
        strengths: for lightness and for colour, each in [0, 1], of the largest allowed.
    """
    pair = np.array([[own, target]], np.float32) / 255
    lab = cv2.cvtColor(pair, cv2.COLOR_RGB2LAB)[0]
    share = np.array([LIGHTNESS * strengths[0], *[COLOUR * strengths[1]] * 2], np.float32)
    mixed = lab[:1] + share * (lab[1:] - lab[:1])
    rgb = cv2.cvtColor(mixed[None], cv2.COLOR_LAB2RGB)[0, 0]
    factors = ((rgb + 1 / 255) / (pair[0, 0] + 1 / 255)).tolist()
    r, g, b = (min(max(factor, GAINS[0]), GAINS[1]) for factor in factors)
    return r, g, b


def _cells(ends: Sequence[float]) -> tuple[int, int]:
    first = min(max(math.floor(ends[0] * CELLS), 0), CELLS - 1)
    return first, min(max(math.ceil(ends[1] * CELLS), first + 1), CELLS)


def _small(path: Path) -> np.ndarray:
    try:
        data = np.fromfile(path, np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_REDUCED_COLOR_8) if data.size else None
    except (OSError, cv2.error):
        pixels = None
    if pixels is None:
        return np.full((CELLS, CELLS, 3), 114, np.uint8)
    small = cv2.resize(pixels, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
