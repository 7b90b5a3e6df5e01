"""A tabletop data set that needs no photographs: painted objects, clutter, occlusion.

Training and validation scenes come from other seeds and stand on other kinds of tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hsrloop.cli.sprites import NAMES, SIDE_PX, Generator, Image, paint_clutter, paint_sprite

SIZE_PX = (288, 216)  # width, height
_SHADOW_PX = 16
_LEAST_VISIBLE = 0.35  # of an object's pixels; what shows less is painted but not labelled


@dataclass(frozen=True, slots=True)
class Scene:
    """One painted picture with the visible extent of each object in it."""

    image: Image  # (H, W, 3) uint8 RGB
    boxes_xyxy_px: NDArray[np.float32]  # (n, 4)
    labels: NDArray[np.int64]  # (n,)


def write_data_set(folder: Path, *, train: int, val: int, seed: int) -> Path:
    """Write images, labels and data.yaml below `folder`, replacing what bears the same names.

    Returns:
        The path of data.yaml.
    """
    for split in _TABLES:
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
    jobs = [("train", index) for index in range(train)] + [("val", index) for index in range(val)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _write_scene(folder, *job, seed=seed), jobs))
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
    yaml = folder / "data.yaml"
    yaml.write_text(f"train: images/train\nval: images/val\nnames:\n{names}", encoding="utf-8")
    return yaml


def paint_scene(rng: Generator, *, tables: Sequence[Callable[[Generator], Image]]) -> Scene:
    """Paint three to six objects and some clutter on one of `tables`, far ones first."""
    canvas = tables[int(rng.integers(len(tables)))](rng).astype(np.float32)
    width, height = SIZE_PX
    labels = [*rng.integers(len(NAMES), size=rng.integers(3, 7)), *[-1] * rng.integers(0, 4)]
    depth = np.sort(rng.uniform(0.3, 0.85, len(labels)))  # of the middle, fraction of the height
    owner = np.full((height, width), -1, np.int64)
    areas: list[int] = []
    for place, label in enumerate(rng.permutation(labels)):
        sprite = paint_clutter(rng) if label < 0 else paint_sprite(NAMES[label], rng)
        centre = (rng.uniform(0.12, 0.88) * width, depth[place] * height)
        size_px = rng.uniform(56, 86) * (0.75 + 0.5 * depth[place])
        area = _stamp(canvas, owner, place, sprite, centre=centre, size_px=size_px, rng=rng)
        areas.append(area)
        labels[place] = int(label)
    boxes, kept = _visible(owner, areas, labels)
    return Scene(_photograph(canvas, rng), boxes, kept)


def _stamp(
    canvas: NDArray[np.float32],
    owner: NDArray[np.int64],
    place: int,
    sprite: Image,
    *,
    centre: tuple[float, float],
    size_px: float,
    rng: Generator,
) -> int:
    """Lay a sprite on the canvas, with its shadow, and claim its pixels for `place`.

    Returns:
        How many pixels of the canvas it covers.
    """
    half = int(0.82 * size_px) + _SHADOW_PX  # holds the sprite at any turn
    x0, y0 = int(centre[0]) - half, int(centre[1]) - half
    matrix = cv2.getRotationMatrix2D(
        (SIDE_PX / 2, SIDE_PX / 2), rng.uniform(-25, 25), size_px / SIDE_PX
    )
    matrix[0] *= rng.choice((-1.0, 1.0)) * rng.uniform(0.85, 1.15)
    middle = matrix @ np.array([SIDE_PX / 2, SIDE_PX / 2, 1])
    matrix[:, 2] += half - middle
    laid = cv2.warpAffine(sprite, matrix, (2 * half, 2 * half), flags=cv2.INTER_AREA)
    height, width = owner.shape
    there = np.s_[max(y0, 0) : min(y0 + 2 * half, height), max(x0, 0) : min(x0 + 2 * half, width)]
    here = np.s_[there[0].start - y0 : there[0].stop - y0, there[1].start - x0 : there[1].stop - x0]
    alpha = laid[..., 3].astype(np.float32) / 255
    shadow = cv2.blur(np.roll(alpha, (6, 5), (0, 1)), (11, 11))[here][..., None]
    colour, alpha = laid[here][..., :3], alpha[here]
    canvas[there] *= (1 - 0.45 * shadow) * (1 - alpha[..., None])
    canvas[there] += colour * alpha[..., None]
    inside = alpha > 0.5
    owner[there][inside] = place
    return int(inside.sum())


def _visible(
    owner: NDArray[np.int64], areas: Sequence[int], labels: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return boxes around the visible pixels of each object of which enough shows."""
    boxes: list[tuple[int, int, int, int]] = []
    kept: list[int] = []
    for place, (area, label) in enumerate(zip(areas, labels, strict=True)):
        if label < 0:
            continue
        ys, xs = np.nonzero(owner == place)
        if len(xs) == 0 or len(xs) < _LEAST_VISIBLE * area:
            continue
        boxes.append((int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))
        kept.append(label)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(kept, np.int64)


def _photograph(canvas: NDArray[np.float32], rng: Generator) -> Image:
    """Return the scene as a camera would give it: exposure, white balance, blur, noise."""
    gains = rng.uniform(0.75, 1.15) * rng.uniform(0.95, 1.05, 3).astype(np.float32)
    image = canvas * gains.astype(np.float32)
    if rng.random() < 0.3:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9)), np.float32)
    image = image + rng.uniform(1, 6) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _write_scene(folder: Path, split: str, index: int, *, seed: int) -> None:
    rng = np.random.default_rng((seed, list(_TABLES).index(split), index))
    scene = paint_scene(rng, tables=_TABLES[split])
    bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(folder / "images" / split / f"{index:04}.jpg"), bgr)
    rows = "".join(_row(scene, n) for n in range(len(scene.labels)))
    (folder / "labels" / split / f"{index:04}.txt").write_text(rows, encoding="utf-8")


def _row(scene: Scene, index: int) -> str:
    x1, y1, x2, y2 = scene.boxes_xyxy_px[index]
    width, height = SIZE_PX
    numbers = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
    return " ".join([str(scene.labels[index]), *(f"{number:.6f}" for number in numbers)]) + "\n"


def _cloud(rng: Generator, coarse: tuple[int, int]) -> NDArray[np.float32]:
    """Return smooth noise over the picture, (H, W) in [-1, 1]; `coarse` is its grid (w, h)."""
    grid = rng.uniform(-1, 1, coarse[::-1]).astype(np.float32)
    return np.asarray(cv2.resize(grid, SIZE_PX, interpolation=cv2.INTER_CUBIC), np.float32)


def _tone(rng: Generator, low: int, high: int) -> NDArray[np.float32]:
    return rng.integers(low, high, 3).astype(np.float32)


def _shade(base: NDArray[np.float32], pattern: NDArray[np.float32], strength: float) -> Image:
    image = base * (1 + strength * pattern[..., None])
    return np.clip(image, 0, 255).astype(np.uint8)


def _wood(rng: Generator) -> Image:
    base = np.array([150, 105, 65], np.float32) * rng.uniform(0.7, 1.3)
    return _shade(base, _cloud(rng, (4, 60)) + 0.5 * _cloud(rng, (3, 5)), 0.22)


def _plain(rng: Generator) -> Image:
    return _shade(_tone(rng, 90, 235), _cloud(rng, (3, 3)), 0.12)


def _speckled(rng: Generator) -> Image:
    return _shade(_tone(rng, 70, 200), _cloud(rng, (120, 90)), 0.25)


def _checked(rng: Generator) -> Image:
    period = int(rng.integers(18, 40))
    y, x = np.mgrid[: SIZE_PX[1], : SIZE_PX[0]]
    squares = ((x // period + y // period) % 2).astype(np.float32) * 2 - 1
    return _shade(_tone(rng, 110, 220), squares + 0.3 * _cloud(rng, (4, 3)), 0.18)


def _marble(rng: Generator) -> Image:
    veins = 1 - 2 * np.abs(_cloud(rng, (7, 5)) + 0.5 * _cloud(rng, (20, 15)))
    return _shade(_tone(rng, 150, 225), veins, 0.16)


def _striped(rng: Generator) -> Image:
    x = np.arange(SIZE_PX[0], dtype=np.float32)
    wave = np.sin(2 * np.pi * x / rng.uniform(14, 40)).astype(np.float32)
    stripes = np.repeat(wave[None], SIZE_PX[1], 0)
    return _shade(_tone(rng, 100, 220), stripes + 0.3 * _cloud(rng, (4, 3)), 0.18)


_TABLES: Mapping[str, Sequence[Callable[[Generator], Image]]] = {
    "train": (_wood, _plain, _speckled, _checked),
    "val": (_marble, _striped),
}
