"""Painted household objects: small RGBA pictures, each a little different from the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]
Generator = np.random.Generator

SIDE_PX = 160  # of a sprite, square
_MID = SIDE_PX // 2


def paint_sprite(name: str, rng: Generator) -> Image:
    """Paint one object of class `name`.

    Returns:
        (SIDE_PX, SIDE_PX, 4) uint8 RGBA, upright, centred; alpha 0 around it.
    """
    colour = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
    alpha = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    _PAINTERS[name](colour, alpha, rng)
    lit = colour.astype(np.float32) * _light(rng)[..., None]
    return np.dstack([np.clip(lit, 0, 255).astype(np.uint8), alpha])


def paint_clutter(rng: Generator) -> Image:
    """Paint something that is no class: a paper, a stick, a pebble; as `paint_sprite`."""
    colour = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
    alpha = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    grey = int(rng.integers(60, 220))
    tint = tuple(int(v) for v in np.clip(grey + rng.integers(-25, 26, 3), 0, 255))
    kind = rng.integers(3)
    if kind == 0:
        _rectangle(colour, alpha, (25, 35, 135, 125), (tint[0], tint[1], tint[2]))
        for y in range(50, 115, 12):
            cv2.line(colour, (35, y), (125, y), (grey // 2,) * 3, 1, cv2.LINE_AA)
    elif kind == 1:
        _rectangle(colour, alpha, (72, 10, 88, 150), (tint[0], tint[1], tint[2]))
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(25, 55, 9)
        points = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1) + _MID
        _polygon(colour, alpha, points, (tint[0], tint[1], tint[2]))
    return np.dstack([colour, alpha])


def _apple(colour: Image, alpha: Image, rng: Generator) -> None:
    red = _vary((200, 30, 35), rng)
    for dx in (-16, 16):
        _ellipse(colour, alpha, (_MID + dx, 88), (44, 50), red)
    cv2.ellipse(colour, (60, 70), (10, 16), 20, 0, 360, (250, 190, 180), -1, cv2.LINE_AA)
    _line(colour, alpha, (80, 46), (86, 18), (95, 60, 25), 6)
    _ellipse(colour, alpha, (104, 26), (18, 8), (60, 150, 50))


def _banana(colour: Image, alpha: Image, rng: Generator) -> None:
    yellow = _vary((245, 205, 40), rng)
    angles = np.linspace(0.15 * np.pi, 0.85 * np.pi, 24)
    outer = np.stack([_MID + 72 * np.cos(angles), 40 + 84 * np.sin(angles)], 1)
    inner = np.stack([_MID + 62 * np.cos(angles[::-1]), 40 + 44 * np.sin(angles[::-1])], 1)
    _polygon(colour, alpha, np.concatenate([outer, inner]), yellow)
    for tip in (outer[0], outer[-1]):
        _ellipse(colour, alpha, (int(tip[0]), int(tip[1]) - 8), (7, 7), (80, 60, 20))


def _mug(colour: Image, alpha: Image, rng: Generator) -> None:
    blue = _vary((35, 85, 190), rng)
    for canvas, value in ((colour, blue), (alpha, 255)):
        cv2.ellipse(canvas, (116, 86), (26, 30), 0, -90, 90, value, 13, cv2.LINE_AA)
    _rectangle(colour, alpha, (30, 42, 114, 134), blue)
    _ellipse(colour, alpha, (72, 42), (42, 14), (215, 225, 240))
    cv2.ellipse(colour, (72, 44), (34, 9), 0, 0, 360, (60, 40, 25), -1, cv2.LINE_AA)
    cv2.rectangle(colour, (30, 84), (114, 98), (240, 240, 240), -1)


def _carton(colour: Image, alpha: Image, rng: Generator) -> None:
    green = _vary((40, 150, 70), rng)
    _rectangle(colour, alpha, (44, 52, 116, 152), (240, 242, 238))
    _polygon(colour, alpha, np.array([(44, 52), (116, 52), (100, 22), (60, 22)]), green)
    _rectangle(colour, alpha, (60, 10, 100, 22), (225, 230, 225))
    cv2.rectangle(colour, (44, 96), (116, 134), green, -1)
    cv2.circle(colour, (80, 76), 11, green, -1, cv2.LINE_AA)


def _can(colour: Image, alpha: Image, rng: Generator) -> None:
    purple = _vary((125, 45, 150), rng)
    _ellipse(colour, alpha, (_MID, 132), (36, 12), (150, 150, 155))
    _rectangle(colour, alpha, (44, 32, 116, 132), purple)
    _ellipse(colour, alpha, (_MID, 30), (36, 12), (200, 200, 205))
    band = np.array([(44, 104), (116, 62), (116, 84), (44, 126)])
    cv2.fillPoly(colour, [band], (245, 215, 245), cv2.LINE_AA)
    cv2.ellipse(colour, (_MID, 30), (14, 4), 0, 0, 360, (120, 120, 125), -1, cv2.LINE_AA)


def _bowl(colour: Image, alpha: Image, rng: Generator) -> None:
    orange = _vary((230, 120, 30), rng)
    for canvas, value in ((colour, orange), (alpha, 255)):
        cv2.ellipse(canvas, (_MID, 64), (70, 66), 0, 0, 180, value, -1, cv2.LINE_AA)
    _rectangle(colour, alpha, (56, 122, 104, 136), orange)
    _ellipse(colour, alpha, (_MID, 64), (70, 20), (250, 225, 195))
    cv2.ellipse(colour, (_MID, 66), (58, 13), 0, 0, 360, (150, 75, 20), -1, cv2.LINE_AA)


def _sponge(colour: Image, alpha: Image, rng: Generator) -> None:
    pink = _vary((240, 120, 165), rng)
    _rectangle(colour, alpha, (14, 52, 146, 112), pink)
    cv2.rectangle(colour, (14, 94), (146, 112), (45, 110, 90), -1)
    for _ in range(26):
        place = (int(rng.integers(20, 140)), int(rng.integers(58, 88)))
        cv2.circle(colour, place, int(rng.integers(2, 5)), (185, 70, 115), -1, cv2.LINE_AA)


def _bottle(colour: Image, alpha: Image, rng: Generator) -> None:
    teal = _vary((20, 150, 160), rng)
    body = [(58, 152), (58, 74), (70, 50), (70, 24), (90, 24), (90, 50), (102, 74), (102, 152)]
    _polygon(colour, alpha, np.array(body), teal)
    _rectangle(colour, alpha, (67, 8, 93, 24), (30, 35, 60))
    cv2.rectangle(colour, (58, 92), (102, 128), (250, 250, 215), -1)
    cv2.line(colour, (66, 60), (66, 146), (190, 235, 240), 4, cv2.LINE_AA)


_PAINTERS: Mapping[str, Callable[[Image, Image, Generator], None]] = {
    "apple": _apple,
    "banana": _banana,
    "mug": _mug,
    "milk_carton": _carton,
    "soda_can": _can,
    "bowl": _bowl,
    "sponge": _sponge,
    "bottle": _bottle,
}
NAMES = tuple(_PAINTERS)


def _vary(colour: Colour, rng: Generator) -> Colour:
    """Return a colour near `colour`: no two apples are alike."""
    r, g, b = (int(v) for v in np.clip(np.array(colour) + rng.integers(-22, 23, 3), 0, 255))
    return r, g, b


def _light(rng: Generator) -> NDArray[np.float32]:
    """Return the light on an upright object: brighter towards one side, (SIDE_PX, SIDE_PX)."""
    side = rng.uniform(-0.22, 0.22)
    ramp = np.linspace(1 - side, 1 + side, SIDE_PX, dtype=np.float32)
    fall = np.linspace(1.08, 0.86, SIDE_PX, dtype=np.float32)
    return np.asarray(fall[:, None] * ramp[None, :], np.float32)


def _ellipse(
    colour: Image, alpha: Image, centre: tuple[int, int], axes: tuple[int, int], fill: Colour
) -> None:
    cv2.ellipse(colour, centre, axes, 0, 0, 360, fill, -1, cv2.LINE_AA)
    cv2.ellipse(alpha, centre, axes, 0, 0, 360, 255, -1, cv2.LINE_AA)


def _rectangle(colour: Image, alpha: Image, box: tuple[int, int, int, int], fill: Colour) -> None:
    cv2.rectangle(colour, box[:2], box[2:], fill, -1)
    cv2.rectangle(alpha, box[:2], box[2:], 255, -1)


def _polygon(colour: Image, alpha: Image, points: NDArray[np.generic], fill: Colour) -> None:
    rounded = [np.round(points.astype(np.float64)).astype(np.int32)]
    cv2.fillPoly(colour, rounded, fill, cv2.LINE_AA)
    cv2.fillPoly(alpha, rounded, 255, cv2.LINE_AA)


def _line(
    colour: Image,
    alpha: Image,
    start: tuple[int, int],
    end: tuple[int, int],
    fill: Colour,
    width: int,
) -> None:
    cv2.line(colour, start, end, fill, width, cv2.LINE_AA)
    cv2.line(alpha, start, end, 255, width, cv2.LINE_AA)
