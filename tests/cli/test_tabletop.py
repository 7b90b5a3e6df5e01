"""The painted data set of the demo."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from hsrloop.cli.sprites import NAMES, SIDE_PX, paint_clutter, paint_sprite
from hsrloop.cli.tabletop import _TABLES, SIZE_PX, paint_scene, write_data_set


@pytest.mark.parametrize("name", NAMES)
def test_a_sprite_is_on_its_canvas_and_varies(name: str) -> None:
    first = paint_sprite(name, np.random.default_rng(0))
    second = paint_sprite(name, np.random.default_rng(1))
    assert first.shape == (SIDE_PX, SIDE_PX, 4)
    assert 0.1 < (first[..., 3] > 127).mean() < 0.8
    assert not (first == second).all()


def test_clutter_is_no_object() -> None:
    assert (paint_clutter(np.random.default_rng(0))[..., 3] > 127).any()


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_hold_clutter_occlusion_and_boxes_inside(split: str) -> None:
    scenes = [paint_scene(np.random.default_rng(seed), tables=_TABLES[split]) for seed in range(12)]
    for scene in scenes:
        boxes = scene.boxes_xyxy_px
        assert scene.image.shape == (SIZE_PX[1], SIZE_PX[0], 3)
        assert len(boxes) == len(scene.labels)
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= SIZE_PX).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert any(_overlap(scene.boxes_xyxy_px) for scene in scenes)
    assert {int(label) for scene in scenes for label in scene.labels} == set(range(len(NAMES)))


def test_training_and_validation_share_no_table() -> None:
    assert not set(_TABLES["train"]) & set(_TABLES["val"])


def test_the_set_is_a_function_of_its_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_data_set(tmp_path / folder, train=3, val=2, seed=seed)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 2 * 5 + 1
    same = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files]
    assert all(same)
    first = "images/train/0000.jpg"
    assert (tmp_path / "a" / first).read_bytes() != (tmp_path / "c" / first).read_bytes()
    assert (tmp_path / "a" / first).read_bytes() != (
        tmp_path / "a/images/val/0000.jpg"
    ).read_bytes()


def test_labels_are_rows_that_any_trainer_reads(tmp_path: Path) -> None:
    path = write_data_set(tmp_path, train=2, val=1, seed=0)
    spec = yaml.safe_load(path.read_text())
    assert list(spec["names"].values()) == list(NAMES)
    for image in (tmp_path / "images" / "train").iterdir():
        assert cv2.imread(str(image)) is not None
        label = tmp_path / "labels" / "train" / f"{image.stem}.txt"
        rows = np.loadtxt(label, ndmin=2)
        assert rows.shape[1] == 5
        assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()


def _overlap(boxes: np.ndarray) -> bool:
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if (np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all():
                return True
    return False
