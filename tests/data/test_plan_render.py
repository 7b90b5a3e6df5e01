"""Boxes follow pixels, plans are pure, and each visible source is interpolated once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import cv2
import numba
import numpy as np
import pytest

from hsrloop.data.pixels import render as render_module
from hsrloop.data.pixels.render import Renderer, render
from hsrloop.data.pixels.store import GREY
from hsrloop.data.plan import AugmentPlan, AugmentSettings, Layer, draw_plan, plan_labels
from hsrloop.data.polygon import polygon_extent
from hsrloop.data.sampler import epoch_order, sample_rng
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.ops.native import compiled

SIDE = 160
SIZES = ((120, 160), (160, 100), (160, 160), (40, 160))  # as stored: long side == SIDE
ALL = AugmentSettings(
    hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, degrees=10, translate=0.1, scale=0.5, shear=5,
    flipud=0.3, fliplr=0.5, mosaic=1.0, mixup=0.5,
)  # fmt: skip
ALONE = {
    "nothing": {},
    "degrees": {"degrees": 30.0},
    "translate": {"translate": 0.3},
    "scale": {"scale": 0.5},
    "shear": {"shear": 15.0},
    "flipud": {"flipud": 1.0},
    "fliplr": {"fliplr": 1.0},
    "mosaic": {"mosaic": 1.0},
    "all but mixup": {**dataclasses.asdict(ALL), "mixup": 0.0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0},
}


class PaintedStore:
    """Images with one rectangle each, white on black, as an image store gives them."""

    def __init__(self, *, value: int = 255) -> None:
        self.imgsz, self.broken, self.images = SIDE, set[int](), []
        refs = []
        for i, (height, width) in enumerate(SIZES):
            image = np.zeros((height, width, 3), np.uint8)
            x, y, w, h = width // 5 + i, height // 4, width // 2, height // 3
            image[y : y + h, x : x + w] = value
            box = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            labels = np.array([i])
            refs.append(
                ImageRef(Path(f"{i}.png"), height, width, np.float32([box]), labels, (None,))
            )
            self.images.append(image)
        self.refs = tuple(refs)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


def painted_box(image: np.ndarray, share: float) -> tuple[float, ...] | None:
    """Return the box of the pixels that are white to at least a share; turned corners are faint."""
    bright = np.clip(image[..., 0].astype(float) - GREY, 0, None) / (255 - GREY)
    ys, xs = np.where(bright > share)
    if not len(xs):
        return None
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize("name", ALONE)
def test_computed_boxes_equal_painted_ones(name: str) -> None:
    settings = AugmentSettings(**ALONE[name])
    turned = "degrees" in ALONE[name] or "shear" in ALONE[name]
    checked = 0
    for index in range(60):
        store = PaintedStore()
        plan = draw_plan(3, 0, index % len(SIZES), store.refs, settings, mosaic=True)
        plan = draw_plan(3, index, index % len(SIZES), store.refs, settings)
        for layer in plan.layers:  # one source at a time, so that equal ones are told apart
            single = AugmentPlan((layer,), plan.zoom)
            sample = render(single, store, store.refs)
            found = painted_box(sample.image, 0.15 if turned else 0.5)
            if not len(sample.labels):
                area = 0 if found is None else (found[2] - found[0]) * (found[3] - found[1])
                assert area < 0.2 * SIDE**2
                continue
            assert found is not None
            if "degrees" in ALONE[name] or "shear" in ALONE[name]:
                inner = sample.boxes_xyxy_px[0]  # a clipped, turned rectangle may be smaller
                cut = (inner <= 0.01).any() or (inner >= SIDE - 0.01).any()
                if cut or layer.visible != single_visible(store, layer.source):
                    assert found[0] >= inner[0] - 1 and found[1] >= inner[1] - 1
                    assert found[2] <= inner[2] + 1 and found[3] <= inner[3] + 1
                    continue
            np.testing.assert_allclose(found, sample.boxes_xyxy_px[0], atol=1.0)
            checked += 1
    assert checked >= 20


def single_visible(store: PaintedStore, source: int) -> tuple[float, ...]:
    height, width = SIZES[source]
    return (0.0, 0.0, width / SIDE, height / SIDE)


def test_polygon_rows_give_the_tight_box_of_the_turned_shape() -> None:
    """A disc keeps its box under rotation when it is a polygon, and gets a larger one as a box."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    disc = np.float32(np.stack((0.5 + 0.2 * np.cos(turn), 0.5 + 0.2 * np.sin(turn)), 1))
    rows, labels = np.float32([[0.5, 0.5, 0.4, 0.4]] * 2), np.array([0, 1])
    ref = ImageRef(Path("a.png"), 100, 100, rows, labels, (disc, None))
    settings = AugmentSettings(degrees=45.0)
    for epoch in range(10):
        plan = draw_plan(0, epoch, 0, (ref,), settings)
        boxes, _, _ = plan_labels(plan, (ref,), 100)
        np.testing.assert_allclose(boxes[0], [30, 30, 70, 70], atol=0.2)
        assert (boxes[1, 2:] - boxes[1, :2] >= 40 - 1e-3).all()


def labelled(
    box: list[float],
    affine: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    *,
    zoom: float = 1.0,
    outlined: bool = False,
) -> int:
    """Return how many labels are left of one box, xyxy, in a square image at 1000 px."""
    x1, y1, x2, y2 = box
    row = np.float32([[(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]])
    outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]) if outlined else None
    refs = [ImageRef(Path("a.png"), 50, 50, row, np.array([0]), (outline,))]
    plan = AugmentPlan((Layer(0, affine, (0.0, 0.0, 1.0, 1.0)),), zoom)
    return len(plan_labels(plan, refs, 1000)[0])


@pytest.mark.parametrize("share, outlined", [(0.1, False), (0.01, True)])
def test_boxes_are_dropped_just_beyond_the_peers_thresholds(share: float, outlined: bool) -> None:
    """Source: ultralytics@8.4.190, data/augment.py, box_candidates and its two callers."""
    assert labelled([0.5, 0.5, 0.5021, 0.6]) and not labelled([0.5, 0.5, 0.5019, 0.6])
    assert labelled([0, 0.5, 0.99, 0.5 + 0.00995]) and not labelled([0, 0.5, 0.99, 0.5 + 0.00985])
    for left, kept in ((1.1 * share, 1), (0.9 * share, 0)):
        moved = (1, 0, -0.5 * (1 - left), 0, 1, 0)  # so much of the box stays in view
        assert labelled([0, 0.2, 0.5, 0.7], moved, outlined=outlined) == kept
    # What a zoom makes smaller is all there; a share of what it would be without is not meant.
    zoom = 0.5 * math.sqrt(share)
    small = (zoom, 0, 0, 0, zoom, 0)
    assert labelled([0, 0.2, 0.5, 0.7], small, zoom=zoom, outlined=outlined)


def test_a_drawn_plan_is_what_it_was() -> None:
    """Whatever changes it makes other images of every seed, and of every run that is resumed."""
    refs = PaintedStore().refs
    plan = draw_plan(7, 1, 2, refs, dataclasses.replace(ALL, mixup=1.0, fliplr=1.0))
    assert plan.mix is not None
    numbers = [plan.zoom, plan.mix.zoom, plan.mix_weight, *(plan.hsv_gains or ())]
    for layer in (plan.layers[1], plan.mix.layers[0]):
        numbers += [*layer.affine, *layer.visible]
    assert [x.source for x in (*plan.layers, *plan.mix.layers)] == [2, 1, 3, 3, 1, 0, 2, 3]
    expected = [
        1.317618531712, 1.426063168095, 0.452929573119,
        0.002108548644, -0.698094154348, 0.315052917277,
        -1.309353665177, -0.149643639949, 0.542438079016,
        -0.095917671521, 1.314417871452, -0.299197912891,
        0.0, 0.0, 0.625, 1.0,
        -1.414212826422, 0.185484353228, 1.290619202237,
        0.099021089776, 1.423872612603, -1.699967955058,
        0.0, 0.448211838883, 0.625, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(numbers, expected, atol=1e-9)


def test_a_concave_polygon_is_cut_into_pieces() -> None:
    """One arm of a horseshoe is left of the image, the other in it; the corner is in neither."""
    arms = [[-0.3, -0.6], [0.6, -0.6], [0.6, -0.5], [-0.2, -0.5], [-0.2, 0.5], [0.6, 0.5]]
    horseshoe = np.array([*arms, [0.6, 0.6], [-0.3, 0.6]])
    unit, identity = np.array([0.0, 0, 1, 1]), np.eye(2, 3)
    np.testing.assert_allclose(polygon_extent(horseshoe, unit, identity), [0, 0.5, 0.6, 0.6])
    mirrored = np.array([[-1.0, 0, 1], [0, 1, 0]])
    np.testing.assert_allclose(polygon_extent(horseshoe, unit, mirrored), [0.4, 0.5, 1, 0.6])
    around = np.array([[-1.0, -1], [2, -1], [2, 2], [-1, 2]])
    np.testing.assert_allclose(polygon_extent(around, unit, identity), unit)


def test_a_polygon_is_cut_at_the_edge_not_clamped() -> None:
    triangle = np.array([[0.5, 0.2], [1.5, 0.5], [0.5, 0.8]])
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    whole = np.array([0.0, 0, 2, 2])
    extent = polygon_extent(triangle, whole, identity)
    np.testing.assert_allclose(extent, [0.5, 0.2, 1.0, 0.8])
    low = polygon_extent(triangle, np.array([1.0, 0, 2, 2]), identity - [[0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(low, [0, 0.35, 0.5, 0.65])
    assert not polygon_extent(triangle, np.array([1.6, 0, 2, 2]), identity).any()


def test_a_mosaic_leaves_no_gap_and_no_seam() -> None:
    """Equal white sources, turned, show one white area: nothing darker inside it."""
    store = PaintedStore()
    for image in store.images:
        image[:] = 255
    settings = AugmentSettings(mosaic=1.0, degrees=20.0)
    for index in range(20):
        image = render(draw_plan(1, index, 2, store.refs, settings), store, store.refs).image
        grey = (image[..., 0] < 250).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(grey)
        thin = [s for s in stats[1:] if s[cv2.CC_STAT_AREA] > 3 and min(s[2], s[3]) <= 2]
        assert not thin or all(_touches_edge(s) for s in thin)


def _touches_edge(s: np.ndarray) -> bool:
    return s[0] == 0 or s[1] == 0 or s[0] + s[2] == SIDE or s[1] + s[3] == SIDE


def test_one_interpolation_for_each_visible_source(monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls = PaintedStore(), []
    warp = cv2.warpAffine

    def counting(*args: object, **named: object) -> object:
        calls.append(args[2])
        return warp(*args, **named)

    monkeypatch.setattr(render_module.cv2, "warpAffine", counting)
    for index in range(30):
        plan = draw_plan(0, index, 0, store.refs, ALL)
        calls.clear()
        render(plan, store, store.refs)
        layers = plan.layers + (plan.mix.layers if plan.mix else ())
        assert 0 < len(calls) <= len(layers)
        assert all(width <= SIDE and height <= SIDE for width, height in calls)
        done = len(calls)
        white = PaintedStore()
        for image in white.images:
            image[:] = 255
        seen = [layer for layer in layers if _shows(layer, white)]
        assert len(seen) <= done <= len(seen) + 2  # bounding boxes may graze a corner


def _shows(layer: object, store: PaintedStore) -> bool:
    image = render(AugmentPlan((layer,), 1.0), store, store.refs).image  # type: ignore[arg-type]
    return bool((image > 200).any())


@pytest.mark.parametrize("off", ["mosaic", "mixup", "degrees", "hsv_h", "fliplr", "scale", "shear"])
def test_switching_one_off_leaves_the_others_draws(off: str) -> None:
    store = PaintedStore()
    fewer = dataclasses.replace(ALL, **{off: 0.0})
    for index in range(10):
        a = draw_plan(0, index, 1, store.refs, ALL)
        b = draw_plan(0, index, 1, store.refs, fewer)
        if off == "hsv_h":
            assert a.hsv_gains and b.hsv_gains and a.hsv_gains[1:] == b.hsv_gains[1:]
        else:
            assert a.hsv_gains == b.hsv_gains
        if off not in ("mixup", "fliplr", "degrees", "scale", "shear", "mosaic"):
            assert a.layers == b.layers
        if off == "mixup":
            assert a.layers == b.layers and b.mix is None
        if off != "mosaic":
            assert [x.source for x in a.layers] == [x.source for x in b.layers]
        if off != "scale":
            assert a.zoom == b.zoom
        if off != "mixup":
            assert a.mix_weight == b.mix_weight


def test_closing_mosaic_closes_mixup_too_and_keeps_the_rest() -> None:
    store = PaintedStore()
    for index in range(20):
        opened = draw_plan(0, index, 0, store.refs, ALL)
        closed = draw_plan(0, index, 0, store.refs, ALL, mosaic=False)
        assert len(closed.layers) == 1 and closed.mix is None
        assert closed.hsv_gains == opened.hsv_gains and closed.zoom == opened.zoom


def test_a_plan_is_a_pure_function_of_its_place() -> None:
    store = PaintedStore()
    assert draw_plan(1, 2, 3, store.refs, ALL) == draw_plan(1, 2, 3, store.refs, ALL)
    assert draw_plan(1, 2, 3, store.refs, ALL) != draw_plan(1, 3, 3, store.refs, ALL)
    assert "Layer(source=3" in str(draw_plan(1, 2, 3, store.refs, ALL))


def test_generators_differ_by_each_part_of_their_key() -> None:
    places = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")]
    draws = [tuple(sample_rng(*place).random(4)) for place in places]
    assert len(set(draws)) == len(places)
    assert draws[0] == tuple(sample_rng(*places[0]).random(4))
    top = 2**32 - 1
    assert 0 <= sample_rng(top, top, top, "x").random() < 1


def test_an_epoch_visits_every_image_once_in_its_own_order() -> None:
    first, second = epoch_order(0, 0, 50), epoch_order(0, 1, 50)
    assert sorted(first) == list(range(50)) and list(first) != list(second)
    assert list(first) == list(epoch_order(0, 0, 50)) and first.dtype == np.int64


def test_the_order_and_the_draws_are_frozen() -> None:
    """Golden values: a changed stream would make old checkpoints resume into another run."""
    assert epoch_order(0, 0, 8).tolist() == GOLDEN_ORDER
    np.testing.assert_allclose(sample_rng(0, 0, 0, "hsv").random(2), GOLDEN_HSV, rtol=1e-12)


GOLDEN_ORDER = [5, 4, 0, 1, 7, 6, 3, 2]
GOLDEN_HSV = [0.38338730646055064, 0.17591089776667235]


GAINS = [(0.01, 0.6, -0.3), (-0.015, -0.7, 0.4), (0.5, 1.0, 1.0), (-0.5, -1.0, -1.0), (0.3, 0, 0)]


def recoloured(image: np.ndarray, gains: tuple[float, float, float]) -> np.ndarray:
    """Return (S, S, 3) of a (S, S, 4) canvas, by the renderer's own path."""
    side = image.shape[0]
    renderer, out = Renderer(side), np.empty((side, side, 3), np.uint8)
    renderer._canvas[:] = image
    renderer._recolour(out, gains)
    return out


@pytest.mark.parametrize("gains", GAINS)
def test_colours_are_those_of_hsv_in_floating_point(gains: tuple[float, float, float]) -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (200, 200, 4), dtype=np.uint8)
    canvas[:2], canvas[2] = 0, 255
    canvas[3:5, :, 1] = canvas[3:5, :, 0]  # greys and other ties
    canvas[4, :, 2] = canvas[4, :, 0]
    h, s, v = cv2.split(cv2.cvtColor(canvas[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2HSV))
    turned = (h + 360 * gains[0]) % 360
    s, v = (np.clip(x * (1 + gain), 0, 1) for x, gain in ((s, gains[1]), (v, gains[2])))
    expected = 255 * cv2.cvtColor(cv2.merge((turned, s, v)), cv2.COLOR_HSV2RGB)
    assert np.abs(recoloured(canvas, gains) - expected).max() < 0.51


def test_no_gain_changes_no_pixel() -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (200, 200, 4), dtype=np.uint8)
    assert np.array_equal(recoloured(canvas, (0.0, 0.0, 0.0)), canvas[..., :3])


@pytest.mark.parametrize("gains", GAINS[:2])
def test_colours_are_the_peers_but_for_its_rounding(gains: tuple[float, float, float]) -> None:
    """Its 8-bit hues are two degrees apart, and its tables round down."""
    canvas = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    hue, saturation, value = gains
    levels = np.arange(256.0)
    tables = [(levels + hue * 180) % 180, levels * (1 + saturation), levels * (1 + value)]
    lut = np.stack(tables, -1).clip(0, 255).astype(np.uint8).reshape(1, 256, 3)
    hsv = cv2.cvtColor(canvas, cv2.COLOR_RGB2HSV)
    expected = cv2.cvtColor(cv2.LUT(hsv, lut), cv2.COLOR_HSV2RGB)
    difference = np.abs(recoloured(canvas, gains).astype(int) - expected)
    assert difference.mean() < 2 and difference.max() <= 16  # measured: 0.6 to 1.5, and 14


def test_where_machine_code_cannot_be_kept_it_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = numba.njit, []

    def no_place(*args: Any, cache: bool, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(numba, "njit", no_place)
    double = compiled(double_all, "void(u1[::1])")
    values = np.arange(5, dtype=np.uint8)
    double(values)
    assert asked == [True, False] and values.tolist() == [0, 2, 4, 6, 8]


def double_all(values: np.ndarray) -> None:
    for i in range(len(values)):
        values[i] *= 2


def test_a_background_and_a_single_pixel_pass_through() -> None:
    empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), ())
    refs = (ImageRef(Path("a"), 1, 1, *empty), ImageRef(Path("b"), 7, 3000, *empty))
    store = PaintedStore()
    store.images = [np.full((SIDE, SIDE, 3), 9, np.uint8), np.full((1, SIDE, 3), 200, np.uint8)]
    for index in range(20):
        sample = render(draw_plan(0, index, index % 2, refs, ALL), store, refs)
        assert sample.image.shape == (SIDE, SIDE, 3)
        assert sample.boxes_xyxy_px.shape == (0, 4) and sample.labels.shape == (0,)


def test_labels_of_a_broken_image_are_dropped() -> None:
    store = PaintedStore()
    plan = draw_plan(0, 0, 0, store.refs, AugmentSettings())
    assert len(render(plan, store, store.refs).labels) == 1
    store.broken.add(0)
    assert len(render(plan, store, store.refs).labels) == 0
