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
    place = (seed, epoch, index)
    up, left = sample_rng(*place, "flip").random(2).tolist()
    flips = (left < settings.fliplr, up < settings.flipud)
    layers, zoom = _draw_layers(place, "", index, refs, settings, flips, mosaic)
    gains, mix, weight = None, None, 1.0
    if settings.hsv_h or settings.hsv_s or settings.hsv_v:
        h, s, v = sample_rng(*place, "hsv").random(3).tolist()
        gains = (
            (2 * h - 1) * settings.hsv_h,
            (2 * s - 1) * settings.hsv_s,
            (2 * v - 1) * settings.hsv_v,
        )
    if mosaic and settings.mixup:
        rng = sample_rng(*place, "mixup")
        if rng.random() < settings.mixup:
            partner = int(rng.integers(len(refs)))
            weight = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
            mix = AugmentPlan(
                *_draw_layers(place, "mixup.", partner, refs, settings, flips, mosaic)
            )
    return AugmentPlan(layers, zoom, gains, mix, weight)


def _draw_layers(
    place: tuple[int, int, int],
    prefix: str,
    first: int,
    refs: Sequence[ImageRef],
    settings: AugmentSettings,
    flips: tuple[bool, bool],
    mosaic: bool,
) -> tuple[tuple[Layer, ...], float]:
    """Draw a mosaic or a single image under a random map, and its zoom."""
    sources, offsets, canvas = [first], [(0.0, 0.0)], _extent(refs[first])
    limit = canvas
    if mosaic and settings.mosaic:
        chance, x, y, *others = sample_rng(*place, prefix + "mosaic").random(6).tolist()
        if chance < settings.mosaic:
            cx, cy = 0.5 + x, 0.5 + y
            sources += [int(other * len(refs)) for other in others]
            extents = [_extent(refs[source]) for source in sources]
            corners = ((0, 0), (0, 1), (1, 0), (1, 1))
            offsets = [
                (cx if right else cx - w, cy if low else cy - h)
                for (w, h), (low, right) in zip(extents, corners, strict=True)
            ]
            canvas = limit = (2.0, 2.0)
    draws = sample_rng(*place, prefix + "affine").random(6).tolist()
    (a, b, c, d, e, f), zoom = _affine(draws, settings, canvas, flips)
    layers = []
    for source, (x, y) in zip(sources, offsets, strict=True):
        w, h = _extent(refs[source])
        visible = (max(0.0, -x), max(0.0, -y), min(w, limit[0] - x), min(h, limit[1] - y))
        layers.append(Layer(source, (a, b, a * x + b * y + c, d, e, d * x + e * y + f), visible))
    return tuple(layers), zoom


def _extent(ref: ImageRef) -> tuple[float, float]:
    """Return (width, height) with the long side at 1."""
    longest = max(ref.height, ref.width)
    return ref.width / longest, ref.height / longest


def _affine(
    draws: Sequence[float],
    settings: AugmentSettings,
    canvas: tuple[float, float],
    flips: tuple[bool, bool],
) -> tuple[Affine, float]:
    """Return the map of a canvas whose centre goes to about the output's centre, and its zoom.

    Args:
        draws: six numbers in [0, 1): turn, zoom, shear x and y, shift x and y.
        flips: left-right, upside-down; the last thing to be done.
    """
    turn, zoom, shear_x, shear_y, shift_x, shift_y = (2 * draw - 1 for draw in draws)
    angle, factor = math.radians(turn * settings.degrees), 1 + zoom * settings.scale
    cos, sin = factor * math.cos(angle), factor * math.sin(angle)
    kx = math.tan(math.radians(shear_x * settings.shear))
    ky = math.tan(math.radians(shear_y * settings.shear))
    a, b = cos - kx * sin, sin + kx * cos
    d, e = ky * cos - sin, ky * sin + cos
    c = 0.5 + shift_x * settings.translate - (a * canvas[0] + b * canvas[1]) / 2
    f = 0.5 + shift_y * settings.translate - (d * canvas[0] + e * canvas[1]) / 2
    if flips[0]:
        a, b, c = -a, -b, 1 - c
    if flips[1]:
        d, e, f = -d, -e, 1 - f
    return (a, b, c, d, e, f), factor


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
    numbers = [(*_extent(refs[x.source]), *x.visible, *x.affine, x.source) for x in layers]
    table = np.array(numbers)[which]  # (n, 13)
    extents, visible, maps = table[:, :2], table[:, 2:6], table[:, 6:12].reshape(-1, 2, 3)
    sources = table[:, 12].astype(np.int64)
    centre, half = rows[:, :2] * extents, rows[:, 2:] * extents / 2
    before = _boxes_within(centre - half, centre + half, visible[:, :2], visible[:, 2:])
    centre, half = (before[:, :2] + before[:, 2:]) / 2, (before[:, 2:] - before[:, :2]) / 2
    centre = (maps[:, :, :2] * centre[:, None]).sum(-1) + maps[:, :, 2]
    reach = (np.abs(maps[:, :, :2]) * half[:, None]).sum(-1)  # of the four corners
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
