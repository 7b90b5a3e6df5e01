"""Synthetic images: exact labels, a pure stream, and what it is made of."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hsrloop.config import TrainConfig
from hsrloop.data.loader import TrainLoader
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.plan import AugmentPlan, Paste
from hsrloop.data.scenes.cover import labels_of, uncovered
from hsrloop.data.scenes.cutouts import CutoutStore
from hsrloop.data.scenes.palette import GAINS, gains_towards
from hsrloop.data.scenes.paste import draw_paste
from hsrloop.data.scenes.scene import Scenes, odds_of
from hsrloop.data.scenes.synthesis import Synthesis, find_folders, load_synthesis
from hsrloop.data.sets.dataset import DatasetSpec, load_dataset
from hsrloop.data.stream import TrainStream
from hsrloop.errors import DatasetError
from hsrloop.records import Position
from tests.conftest import write_material, write_object

SIDE = 160
PURE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))  # RGB of the three cut-outs that are painted


def config(**changes: object) -> TrainConfig:
    return TrainConfig.from_json({"imgsz": 96, "batch": 4, **changes})


def synthesis(yaml: Path, **changes: object) -> tuple[DatasetSpec, Synthesis]:
    settings = config(**changes)
    folders = find_folders(settings, yaml)
    spec = load_dataset(yaml, train_optional=folders.suffice)
    return spec, load_synthesis(settings, folders, spec)


def stream(yaml: Path, **changes: object) -> TrainStream:
    spec, made = synthesis(yaml, **changes)
    return TrainStream.of(spec.train, config(**changes), made.scenes)


@pytest.fixture
def yaml(tiny_dataset: Path) -> Path:
    """A set with cut-outs and backgrounds beside data.yaml."""
    write_material(tiny_dataset.parent)
    return tiny_dataset


@pytest.fixture
def painted(yaml: Path) -> tuple[TrainStream, CutoutStore]:
    """Three classes whose cut-outs are one pure colour each."""
    annotated = yaml.parent / "annotated"
    write_object(annotated / "bar/images/o0.png", annotated / "bar/masks/o0_mask.png", seed=77)
    (annotated / "square/images/o1.png").unlink()
    (annotated / "disc/images/o1.png").unlink()
    for name, colour in zip(("square", "disc", "bar"), PURE, strict=True):
        image = cv2.imread(str(annotated / name / "images/o0.png"))
        image[:] = colour[::-1]
        cv2.imwrite(str(annotated / name / "images/o0.png"), image)
    made = stream(yaml, imgsz=SIDE, object_scale_min=0.2, negative_share=0)
    return made, CutoutStore(made.cutouts, imgsz=SIDE)


def paint(pastes: tuple[Paste, ...], cutouts: CutoutStore) -> np.ndarray:
    """Draw on black; return (3, S, S): where each cut-out shows to a third, tips are faint."""
    canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
    for paste in pastes:
        draw_paste(canvas, paste, cutouts)
    return canvas[..., :3].transpose(2, 0, 1) > 85


def extent_of(shows: np.ndarray) -> list[int]:
    ys, xs = np.where(shows)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def plain(pastes: list[Paste]) -> tuple[Paste, ...]:
    """The first paste of each cut-out, hard-edged, in its own colour."""
    first = {paste.cutout: paste for paste in reversed(pastes)}
    kept = [paste for paste in pastes if first[paste.cutout] is paste]
    return tuple(
        dataclasses.replace(p, alpha=0, gains=(1.0, 1.0, 1.0), shadow=(0.0, 0.0, 0.0)) for p in kept
    )


def test_labels_equal_painted_masks(painted: tuple[TrainStream, CutoutStore]) -> None:
    made, cutouts = painted
    checked = hidden = 0
    for index in range(60):
        plan = made.plan(0, 8 + index, mosaic=True)
        plan = AugmentPlan(plan.layers, plan.zoom, pastes=plain(list(plan.pastes)))
        shows = paint(plan.pastes, cutouts)
        boxes, labels, _ = made.labels(plan, SIDE)
        for paste in plan.pastes:
            rows = np.flatnonzero(labels == paste.label)
            if not len(rows):
                hidden += 1
                continue
            np.testing.assert_allclose(boxes[rows[0]], extent_of(shows[paste.label]), atol=1.0)
            checked += 1
    assert checked > 60 and hidden < checked / 10


def square(cutout: int, made: TrainStream, *, x: float, y: float, size: float) -> Paste:
    """A paste whose image has its corner at (x, y)."""
    affine = (size, 0.0, x, 0.0, size, y)
    label = made.cutouts[cutout].label
    return Paste(cutout, affine, label, 0, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def test_later_objects_hide_earlier_ones(painted: tuple[TrainStream, CutoutStore]) -> None:
    made, cutouts = painted
    base = made.plan(0, 8, mosaic=True)
    lower = square(0, made, x=0.3, y=0.3, size=0.4)
    alone = AugmentPlan(base.layers, base.zoom, pastes=(lower,))
    ((x0, y0, x1, y1),) = made.labels(alone, SIDE)[0]
    for shift, kept in ((0.2, True), (0.02, False), (0.0, False)):
        upper = square(1, made, x=0.3 + shift, y=0.22, size=0.6)
        plan = dataclasses.replace(alone, pastes=(lower, upper))
        boxes, labels, sources = made.labels(plan, SIDE)
        assert list(labels) == ([0, 1] if kept else [1]) and set(sources) == {-1}
        if kept:
            assert x0 <= boxes[0, 0] and boxes[0, 2] < x1 - 1
            shows = paint(plan.pastes, cutouts)[0]
            np.testing.assert_allclose(boxes[0], extent_of(shows), atol=1.0)
    under = dataclasses.replace(alone, pastes=(upper, lower))
    np.testing.assert_allclose(made.labels(under, SIDE)[0][1], [x0, y0, x1, y1])


def test_a_distractor_hides_and_has_no_label(painted: tuple[TrainStream, CutoutStore]) -> None:
    made, _ = painted
    base = made.plan(0, 8, mosaic=True)
    lower, upper = (square(i, made, x=0.3, y=0.3, size=0.4 + 0.2 * i) for i in (0, 1))
    upper = dataclasses.replace(upper, label=-1, affine=(0.6, 0, 0.2, 0, 0.6, 0.2))
    plan = AugmentPlan(base.layers, base.zoom, pastes=(lower, upper))
    assert len(made.labels(plan, SIDE)[1]) == 0


def test_objects_of_the_image_below_are_tightened_or_dropped() -> None:
    owners = np.zeros((100, 100), np.uint8)
    owners[:, 50:] = 1
    boxes = np.float32([[10.5, 10, 40, 40], [30, 20, 70, 60.5], [46, 10, 90, 60], [60, 1, 80, 9]])
    left, labels, sources = uncovered(boxes, np.arange(4), np.arange(4) + 7, owners)
    np.testing.assert_allclose(left, [[10.5, 10, 40, 40], [30, 20, 50, 60.5]])
    assert labels.tolist() == [0, 1] and sources.tolist() == [7, 8]


def test_an_epoch_is_the_real_images_and_a_ratio_of_synthetic_ones(yaml: Path) -> None:
    for ratio, extra in ((2.0, 16), (0.3, 2), (0.0, 0)):
        made = stream(yaml, synthetic_ratio=ratio)
        assert made.n_samples == 8 + extra
        assert sorted(made.order(0)) == list(range(8 + extra))
        plans = [made.plan(0, i, mosaic=True) for i in range(made.n_samples)]
        assert not any(plan.pastes for plan in plans[:8])
        assert all(len(plan.layers) == 1 and plan.layers[0].source >= 8 for plan in plans[8:])
        assert all(layer.source < 8 for plan in plans[:8] for layer in plan.layers)


def test_real_images_are_those_of_a_run_without_synthesis(yaml: Path) -> None:
    with_, without = stream(yaml), stream(yaml, dynamic_synthetic=False)
    assert without.scenes is None and without.n_samples == 8
    for index in range(8):
        for mosaic in (True, False):
            assert with_.plan(3, index, mosaic=mosaic) == without.plan(3, index, mosaic=mosaic)


def test_scenes_are_pure_and_fresh_in_every_epoch(yaml: Path) -> None:
    first, again = stream(yaml), stream(yaml)
    other = stream(yaml, seed=1)
    for index in range(8, 24):
        plan = first.plan(0, index, mosaic=True)
        assert plan == again.plan(0, index, mosaic=False)
        assert plan.layers != first.plan(1, index, mosaic=True).layers
        assert plan.layers != other.plan(0, index, mosaic=True).layers


def test_more_objects_allowed_do_not_move_the_first_ones_draws(yaml: Path) -> None:
    few, many = stream(yaml, max_objects=2), stream(yaml, max_objects=9)
    for index in range(8, 24):
        a, b = few.plan(0, index, mosaic=True), many.plan(0, index, mosaic=True)
        assert a.layers == b.layers and a.hsv_gains == b.hsv_gains and a.pastes[:1] == b.pastes[:1]


@pytest.mark.parametrize("name", ["backgrounds", "on training images"])
def test_the_stream_is_one_for_any_workers_batch_and_cache(yaml: Path, name: str) -> None:
    if name != "backgrounds":
        for path in (yaml.parent / "backgrounds").iterdir():
            path.unlink()
    spec, made = synthesis(yaml)
    assert isinstance(made.scenes, Scenes)
    images = (*spec.train, *made.scenes.backgrounds)
    cutouts = CutoutStore(made.scenes.cutouts, imgsz=96)
    results = []
    for workers, micro, cache in ((0, 1, False), (1, 3, "ram"), (2, 16, "ram"), (0, 16, False)):
        loader = TrainLoader(
            spec.train, ImageStore(images, imgsz=96, cache=cache),
            config(batch=16, micro_batch=micro),
            workers=workers, scenes=made.scenes, cutouts=cutouts,
        )  # fmt: skip
        with loader:
            batches = list(loader.batches(Position(1, 0)))
        results.append(
            [torch.cat([getattr(b, key) for b in batches]) for key in ("images", "boxes_cxcywh")]
        )
        assert len(results[-1][0]) == 24
    for images_, boxes in results[1:]:
        assert torch.equal(images_, results[0][0]) and torch.equal(boxes, results[0][1])
    assert boxes.min() >= 0 and boxes.max() <= 1 and len(boxes) > 24


def test_rare_classes_are_pasted_more_often(yaml: Path) -> None:
    made = stream(yaml)
    odds = odds_of(made.cutouts, np.array([100, 4, 0]))
    shares = np.diff(odds, prepend=0.0)
    assert shares[2:].sum() / shares[:2].sum() == pytest.approx(5.0)
    assert odds[-1] == pytest.approx(1.0) and shares[0] == shares[1]
    assert made.scenes is not None
    scenes = dataclasses.replace(made.scenes, odds=odds)
    drawn = Counter(
        paste.label
        for index in range(8, 208)
        for paste in dataclasses.replace(made, scenes=scenes).plan(0, index, mosaic=True).pastes
    )
    assert drawn[1] > 3 * drawn[0] > 0


def test_negatives_are_backgrounds_alone(yaml: Path) -> None:
    made = stream(yaml, negative_share=1)
    assert not any(made.plan(0, i, mosaic=True).pastes for i in range(8, 24))
    for path in (yaml.parent / "backgrounds").iterdir():
        path.unlink()
    made = stream(yaml, negative_share=1)  # a training image alone is no negative
    assert all(made.plan(0, i, mosaic=True).pastes for i in range(8, 24))


def test_limits_hold(yaml: Path) -> None:
    rules = {"max_objects": 5, "object_scale_max": 0.4, "object_degrees": 0.0, "fliplr": 0.0}
    made = stream(yaml, **rules)
    for index in range(8, 24):
        plan = made.plan(0, index, mosaic=True)
        assert len(plan.pastes) <= 5
        for paste in plan.pastes:
            a, b, _, d, e, _ = paste.affine
            assert b == 0 == d and a == pytest.approx(e) and 0 < a <= 0.4 * 1.24 + 1e-9
            assert all(GAINS[0] <= gain <= GAINS[1] for gain in paste.gains)
            assert 0 <= paste.shadow[2] <= 1 and paste.alpha in (0, 1, 2)


def test_colours_move_towards_the_place() -> None:
    assert gains_towards((200, 40, 40), (40, 40, 200), (0, 0)) == pytest.approx((1, 1, 1), abs=0.01)
    r, g, b = gains_towards((180, 180, 180), (60, 60, 60), (1, 0))
    assert r == pytest.approx(g, abs=0.01) and g == pytest.approx(b, abs=0.01) and 0.6 < r < 0.7


def test_what_validation_holds_stays_out(yaml: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = sorted((yaml.parent / "images/val").iterdir())
    copy = cv2.resize(cv2.imread(str(held[0])), None, fx=2, fy=2)
    cv2.imwrite(str(yaml.parent / "backgrounds/copy.jpg"), copy)
    place = yaml.parent / "annotated/disc"
    (place / "images/twin.png").write_bytes(held[1].read_bytes())
    mask = np.zeros(cv2.imread(str(held[1])).shape[:2], np.uint8)
    mask[20:60, 20:60] = 255
    cv2.imwrite(str(place / "masks/twin.png"), mask)
    with caplog.at_level(logging.WARNING):
        _, made = synthesis(yaml)
    assert "2 pictures left out of synthesis: validation holds them too" in caplog.text
    assert f"copy.jpg is {held[0]}" in caplog.text and f"twin.png is {held[1]}" in caplog.text
    assert made.scenes is not None and len(made.scenes.backgrounds) == 3
    assert len(made.scenes.cutouts) == 4 and "none from validation" in made.text


def test_bad_backgrounds_are_counted_and_located(
    yaml: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (yaml.parent / "backgrounds/empty.jpg").touch()
    (yaml.parent / "backgrounds/text.png").write_text("no image")
    with caplog.at_level(logging.WARNING):
        _, made = synthesis(yaml)
    assert made.scenes is not None and len(made.scenes.backgrounds) == 3
    assert "2 bad backgrounds left out" in caplog.text
    assert "empty.jpg: the file is empty" in caplog.text and "text.png: not an" in caplog.text


def test_why_it_is_off_is_said(tiny_dataset: Path) -> None:
    _, made = synthesis(tiny_dataset)
    assert made.scenes is None and made.digest == ""
    assert made.text.startswith("no synthetic images: no cut-outs (no annotated/ beside data.yaml")
    (tiny_dataset.parent / "annotated").mkdir()
    assert "/annotated can be used" in synthesis(tiny_dataset)[1].text
    write_object(tiny_dataset.parent / "annotated/disc/a.jpg", None, seed=0)
    assert "/annotated can be used" in synthesis(tiny_dataset)[1].text
    write_material(tiny_dataset.parent)
    assert "synthetic_ratio is 0" in synthesis(tiny_dataset, synthetic_ratio=0)[1].text
    assert "--no-dynamic" in synthesis(tiny_dataset, dynamic_synthetic=False)[1].text
    with pytest.raises(DatasetError, match=r"--backgrounds-dir /nowhere is no folder"):
        synthesis(tiny_dataset, backgrounds_dir="/nowhere")


def test_the_digest_follows_the_files(yaml: Path) -> None:
    before = synthesis(yaml)[1].digest
    assert before == synthesis(yaml)[1].digest != ""
    background = yaml.parent / "backgrounds/b0.jpg"
    background.write_bytes(background.read_bytes() + b"\0")
    after = synthesis(yaml)[1].digest
    mask = yaml.parent / "annotated/disc/masks/o0_mask.png"
    mask.rename(mask.with_name("o0.png"))
    assert len({before, after, synthesis(yaml)[1].digest}) == 3


def test_without_real_images_there_is_a_stream(yaml: Path) -> None:
    yaml.write_text("val: images/val\nnames: [square, disc, bar]\n")
    spec, made = synthesis(yaml, synthetic_images=7)
    assert spec.train == () and len(spec.val) == 4 and "beside 0 real ones" in made.text
    assert stream(yaml, synthetic_images=7).n_samples == 7
    with pytest.raises(DatasetError, match="no 'train'"):
        synthesis(yaml, dynamic_synthetic=False)
    empty = yaml.parent / "empty"
    empty.mkdir()
    yaml.write_text("train: empty\nval: images/val\nnames: [square, disc, bar]\n")
    assert synthesis(yaml)[0].train == ()
    for path in (yaml.parent / "annotated").rglob("*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match="no training images, and no synthetic ones"):
        synthesis(yaml)


def test_labels_do_not_hang_on_a_background_that_breaks(
    yaml: Path, painted: tuple[TrainStream, CutoutStore]
) -> None:
    made, _ = painted
    plan = made.plan(0, 8, mosaic=True)
    assert set(labels_of(plan, made.images, made.cutouts, SIDE)[2]) == {-1}
