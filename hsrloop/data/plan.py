"""Draw the augmentation of one training image ahead of its pixels, and compute its labels.

Lengths are in units of imgsz: the output is the unit square, and an image whose long side is 1 is
put into it by one affine map that composes mosaic offset, rotation, zoom, shear, shift and flips.

Source: distributions and filters of ultralytics@8.4.190, data/augment.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsrloop.config import TrainConfig
from hsrloop.data.dataset import ImageRef
from hsrloop.data.polygon import polygon_extent
from hsrloop.data.sampler import sample_rng

MIXUP_BETA = 32.0  # both parameters: weights near one half. Source: as above, MixUp
SMALLEST_PX = 2.0  # boxes no larger than this are dropped. Source: as above, box_candidates
LONGEST_ASPECT = 100.0
KEPT_AREA = 0.1  # of a box's area must stay in view
KEPT_AREA_POLYGON = 0.01

Affine = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentSettings:
    """How strongly to augment; fields as in `TrainConfig`."""

    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0

    @classmethod
    def from_config(cls, config: TrainConfig) -> AugmentSettings:
        """Take the augmentation fields of a configuration."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Layer:
    """One source image under one map; `visible` is the part of it that is drawn, xyxy."""

    source: int
    affine: Affine  # row-major 2 x 3: source units to output units
    visible: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class AugmentPlan:
    """Everything random about one training image; no pixels."""

    layers: tuple[Layer, ...]  # later ones lie on top; in a mosaic they only touch
    zoom: float
    hsv_gains: tuple[float, float, float] | None = None  # hue shift, saturation and value change
    mix: AugmentPlan | None = None
    mix_weight: float = 1.0  # of this plan; the partner has the rest


def draw_plan(
    seed: int,
    epoch: int,
    index: int,
    refs: Sequence[ImageRef],
    settings: AugmentSettings,
    *,
    mosaic: bool = True,
) -> AugmentPlan:
    """Draw the plan of image `index` in an epoch; a pure function of its arguments.

    Args:
        mosaic: False closes mosaic and mixup, as for the last epochs.
    """
    flips = _draw_flips(sample_rng(seed, epoch, index, "flip"), settings)
    layers, zoom = _draw_layers((seed, epoch, index, ""), index, refs, settings, flips, mosaic)
    gains, mix, weight = None, None, 1.0
    if settings.hsv_h or settings.hsv_s or settings.hsv_v:
        h, s, v = sample_rng(seed, epoch, index, "hsv").uniform(-1, 1, 3).tolist()
        gains = (h * settings.hsv_h, s * settings.hsv_s, v * settings.hsv_v)
    if mosaic and settings.mixup:
        rng = sample_rng(seed, epoch, index, "mixup")
        if rng.random() < settings.mixup:
            partner = int(rng.integers(len(refs)))
            weight = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
            place = (seed, epoch, index, "mixup.")
            mix = AugmentPlan(*_draw_layers(place, partner, refs, settings, flips, mosaic))
    return AugmentPlan(layers, zoom, gains, mix, weight)


def _draw_layers(
    place: tuple[int, int, int, str],
    first: int,
    refs: Sequence[ImageRef],
    settings: AugmentSettings,
    flips: np.ndarray,
    mosaic: bool,
) -> tuple[tuple[Layer, ...], float]:
    """Draw a mosaic or a single image under a random map; `place` ends in a prefix of names."""
    seed, epoch, index, prefix = place
    sources, offsets, canvas = [first], [(0.0, 0.0)], _extent(refs[first])
    limit = canvas
    if mosaic and settings.mosaic:
        rng = sample_rng(seed, epoch, index, prefix + "mosaic")
        if rng.random() < settings.mosaic:
            cx, cy = rng.uniform(0.5, 1.5, 2).tolist()
            sources += rng.integers(len(refs), size=3).tolist()
            extents = [_extent(refs[source]) for source in sources]
            offsets = [
                (cx - w if column == 0 else cx, cy - h if row == 0 else cy)
                for (w, h), (row, column) in zip(
                    extents, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True
                )
            ]
            canvas = limit = (2.0, 2.0)
    matrix, zoom = _draw_affine(sample_rng(seed, epoch, index, prefix + "affine"), settings, canvas)
    matrix = flips @ matrix
    layers = []
    for source, (x, y) in zip(sources, offsets, strict=True):
        w, h = _extent(refs[source])
        visible = (max(0.0, -x), max(0.0, -y), min(w, limit[0] - x), min(h, limit[1] - y))
        a, b, c, d, e, f = matrix[:2].ravel().tolist()
        layers.append(Layer(source, (a, b, a * x + b * y + c, d, e, d * x + e * y + f), visible))
    return tuple(layers), zoom


def _extent(ref: ImageRef) -> tuple[float, float]:
    """Return (width, height) with the long side at 1."""
    longest = max(ref.height, ref.width)
    return ref.width / longest, ref.height / longest


def _draw_affine(
    rng: np.random.Generator, settings: AugmentSettings, canvas: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """Draw a (3, 3) map of the canvas, its centre to about the output's centre, and its zoom."""
    turn, zoom, shear_x, shear_y, shift_x, shift_y = rng.uniform(-1, 1, 6).tolist()
    angle = math.radians(turn * settings.degrees)
    factor = 1 + zoom * settings.scale
    cos, sin = factor * math.cos(angle), factor * math.sin(angle)
    kx = math.tan(math.radians(shear_x * settings.shear))
    ky = math.tan(math.radians(shear_y * settings.shear))
    linear = np.array([[1, kx], [ky, 1]]) @ np.array([[cos, sin], [-sin, cos]])
    target = np.array([0.5 + shift_x * settings.translate, 0.5 + shift_y * settings.translate])
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = target - linear @ np.array([canvas[0] / 2, canvas[1] / 2])
    return matrix, factor


def _draw_flips(rng: np.random.Generator, settings: AugmentSettings) -> np.ndarray:
    """Draw a (3, 3) map that mirrors the output."""
    up, left = rng.random(2).tolist()
    matrix = np.eye(3)
    if left < settings.fliplr:
        matrix[0] = (-1, 0, 1)
    if up < settings.flipud:
        matrix[1] = (0, -1, 1)
    return matrix


def plan_labels(
    plan: AugmentPlan, refs: Sequence[ImageRef], imgsz: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the labels of a plan from geometry alone.

    Returns:
        boxes_xyxy_px (n, 4) float32 inside the image, labels (n,) int64, source image (n,) int64.
    """
    found = [_plan_labels(part, refs, imgsz) for part in (plan, plan.mix) if part is not None]
    if len(found) == 1:
        return found[0]
    boxes, labels, sources = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return boxes, labels, sources


def _plan_labels(
    plan: AugmentPlan, refs: Sequence[ImageRef], imgsz: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    layers = plan.layers
    counts = [len(refs[layer.source].labels) for layer in layers]
    which = np.repeat(np.arange(len(layers)), counts)  # (n,) layer of each row
    rows = np.concatenate([refs[layer.source].boxes_cxcywh for layer in layers]).astype(np.float64)
    labels = np.concatenate([refs[layer.source].labels for layer in layers])
    sources = np.array([layer.source for layer in layers])[which]
    extents = np.array([_extent(refs[layer.source]) for layer in layers])[which]  # (n, 2)
    visible = np.array([layer.visible for layer in layers])[which]  # (n, 4)
    maps = np.array([layer.affine for layer in layers])[which].reshape(-1, 2, 3)
    centre, half = rows[:, :2] * extents, rows[:, 2:] * extents / 2
    before = _boxes_within(centre - half, centre + half, visible[:, :2], visible[:, 2:])
    centre, half = (before[:, :2] + before[:, 2:]) / 2, (before[:, 2:] - before[:, :2]) / 2
    centre = (maps[:, :, :2] @ centre[..., None])[..., 0] + maps[:, :, 2]
    reach = (np.abs(maps[:, :, :2]) @ half[..., None])[..., 0]  # of the four corners
    after = _boxes_within(centre - reach, centre + reach, np.zeros(2), np.ones(2))
    kept_area = np.full(len(rows), KEPT_AREA)
    polygons = [polygon for layer in layers for polygon in refs[layer.source].polygons]
    for i, polygon in enumerate(polygons):
        if polygon is not None:
            after[i] = polygon_extent(polygon * extents[i], visible[i], maps[i])
            kept_area[i] = KEPT_AREA_POLYGON
    keep = _candidates(before * imgsz * plan.zoom, after * imgsz, kept_area)
    return (after[keep] * imgsz).astype(np.float32), labels[keep], sources[keep]


def _boxes_within(
    low: np.ndarray, high: np.ndarray, floor: np.ndarray, ceiling: np.ndarray
) -> np.ndarray:
    """Return (n, 4) boxes from their corners (n, 2), clipped to a rectangle each."""
    return np.concatenate((np.clip(low, floor, ceiling), np.clip(high, floor, ceiling)), axis=1)


def _candidates(before: np.ndarray, after: np.ndarray, kept_area: np.ndarray) -> np.ndarray:
    """Return which boxes are still worth learning; (n, 4) xyxy px before and after the map."""
    w1, h1 = before[:, 2] - before[:, 0], before[:, 3] - before[:, 1]
    w2, h2 = after[:, 2] - after[:, 0], after[:, 3] - after[:, 1]
    aspect = np.maximum(w2 / (h2 + 1e-16), h2 / (w2 + 1e-16))
    large = (w2 > SMALLEST_PX) & (h2 > SMALLEST_PX) & (w1 * h1 > 0)
    kept: np.ndarray = large & (w2 * h2 > kept_area * w1 * h1) & (aspect < LONGEST_ASPECT)
    return kept
