"""Against Ultralytics itself, on real data: metrics, and files that its YOLO loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from hsrloop.config import Resolved, resolve
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.val_loader import ValLoader
from hsrloop.model.base import load_base
from hsrloop.model.yolo import import_ultralytics
from hsrloop.ops.ap import Evaluator
from hsrloop.ops.detections import detections_ahead
from hsrloop.train import detector
from hsrloop.train.evaluate import evaluate
from hsrloop.train.run import train
from hsrloop.train.validation import validate

Settings = Callable[..., Resolved]


@pytest.fixture
def yolo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ultralytics' YOLO, writing below tmp_path, its NMS time limit lifted."""
    import_ultralytics()
    from ultralytics import YOLO
    from ultralytics.utils import nms

    monkeypatch.chdir(tmp_path)
    original = nms.non_max_suppression
    monkeypatch.setattr(
        nms, "non_max_suppression", lambda *a, **k: original(*a, **{**k, "max_time_img": 100.0})
    )
    return YOLO


@pytest.mark.parametrize("imgsz", [320, 416])
def test_map_of_the_pretrained_network_on_coco(
    imgsz: int, real_data: Path, tmp_path: Path, yolo: Any
) -> None:
    """128 images of val2017, 80 classes: mAP to 1e-3, per class too."""
    shutil.copytree(real_data / "data" / "coco128_val128", tmp_path / "coco")
    data = tmp_path / "coco" / "data.yaml"
    weights = real_data / "weights" / "yolov8n_coco_rebuilt.pt"
    theirs = yolo(weights).val(
        data=str(data), imgsz=imgsz, rect=False, batch=8, workers=0, plots=False, verbose=False,
        device="cpu",
    )  # fmt: skip
    values = {"dataset": str(data), "model": str(weights), "imgsz": imgsz, "device": "cpu"}
    ours = validate(resolve([("command line", values)]))
    assert ours is not None
    assert ours.ap50_95 == pytest.approx(float(theirs.box.map), abs=1e-3)
    assert ours.ap50 == pytest.approx(float(theirs.box.map50), abs=1e-3)
    assert ours.precision == pytest.approx(float(theirs.box.mp), abs=5e-3)
    assert ours.recall == pytest.approx(float(theirs.box.mr), abs=5e-3)
    named = {
        theirs.names[i]: ap for i, ap in zip(theirs.box.ap_class_index, theirs.box.ap, strict=True)
    }
    assert {c.name for c in ours.classes} == set(named)
    for score in ours.classes:
        assert score.ap50_95 == pytest.approx(float(named[score.name]), abs=2e-2), score.name


@pytest.mark.parametrize("candidates", [2048, 400])
def test_metrics_are_the_same_whether_the_host_waits_or_not(
    candidates: int, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 images of val2017; with few candidates most of them have to be looked at again."""
    monkeypatch.setattr(
        detector, "detections_ahead", partial(detections_ahead, candidates=candidates)
    )
    spec = load_dataset(str(real_data / "data" / "coco128_val128" / "data.yaml"))
    base = load_base(real_data / "weights" / "yolov8n_coco_rebuilt.pt", names=spec.names, seed=0)
    refs = spec.val[:24]
    loader = ValLoader(refs, ImageStore(refs, imgsz=320, interpolation="linear"), batch=7)
    again: list[int] = []
    settle = Evaluator.settle
    monkeypatch.setattr(
        Evaluator, "settle", lambda self: again.extend(places := settle(self)) or places
    )
    waiting, ahead = (
        evaluate(base.module, loader, names=spec.names, device=torch.device("cpu"), ahead=ahead)
        for ahead in (False, True)
    )
    assert len(again) > 10 if candidates == 400 else not again
    assert waiting is not None and ahead == waiting
    assert waiting.ap50_95 > 0.3


def test_a_trained_file_predicts_and_validates_there(
    real_data: Path, settings: Settings, yolo: Any, tmp_path: Path
) -> None:
    weights = real_data / "weights" / "yolov8n_coco_rebuilt.pt"
    given = settings(model=str(weights), epochs=2, imgsz=96, lr0=0.002)
    outcome = train(given)
    assert outcome.result is not None
    for name in ("best.pt", "last.pt"):
        model = yolo(outcome.run_dir / "weights" / name)
        assert list(model.names.values()) == ["square", "disc", "bar"]
    found = yolo(outcome.run_dir / "weights" / "best.pt").val(
        data=given.config.dataset, imgsz=96, rect=False, batch=4, workers=0, plots=False,
        verbose=False, device="cpu",
    )  # fmt: skip
    assert float(found.box.map) == pytest.approx(outcome.result["metrics"]["mAP50-95"], abs=1e-3)
    image = cv2.imread(str(next(Path(str(given.config.dataset)).parent.rglob("*.png"))))
    (prediction,) = model.predict(image, imgsz=96, verbose=False, device="cpu")
    assert prediction.orig_shape == image.shape[:2]


def test_fine_tuning_real_photographs_learns(real_data: Path, tmp_path: Path) -> None:
    """Two short epochs on 40 photographs of kitchen containers beat the untrained head by far."""
    source = real_data / "data" / "kitchen_containers"
    images = sorted((source / "images" / "train").iterdir())[::4][:40]
    vals = sorted((source / "images" / "val").iterdir())[::3]
    for name, paths in (("train", images), ("val", vals)):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, paths)) + "\n")
    names = (source / "data.yaml").read_text().splitlines()
    body = [line for line in names if not line.startswith(("train:", "val:", "test:", "path:"))]
    lists = [f"train: {tmp_path}/train.txt", f"val: {tmp_path}/val.txt"]
    data = tmp_path / "data.yaml"
    data.write_text("\n".join(lists + body) + "\n")
    values = {
        "dataset": str(data),
        "model": str(real_data / "weights" / "yolov8n_coco_rebuilt.pt"),
        "output": str(tmp_path / "runs"),
        "device": "cpu",
        "epochs": 4,
        "batch": 4,
        "imgsz": 256,
        "tensorboard": False,
    }
    outcome = train(resolve([("command line", values)]))
    assert outcome.result is not None
    assert outcome.result["metrics"]["mAP50"] > 0.05
