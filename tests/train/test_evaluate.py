"""Validation: what is asked on the way, and images that are looked at twice."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.data.loader import ValLoader
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.model.yolo import build
from hsrloop.ops.nms import nms_ahead
from hsrloop.train import detector
from hsrloop.train.evaluate import evaluate

NAMES = ("square", "disc", "bar")
CPU = torch.device("cpu")


@pytest.fixture
def given(tiny_dataset: Path) -> dict[str, Any]:
    """A network of random weights and four images, two at a time."""
    refs = load_dataset(tiny_dataset).val
    loader = ValLoader(refs, ImageStore(refs, imgsz=64), batch=2, prefetch=False)
    module = build("yolov8n.yaml", names=NAMES, seed=0)
    for branch in module.model[-1].cv3:  # scores about 0.5 instead of 0.0001
        torch.nn.init.zeros_(branch[-1].bias)
    return {"module": module, "loader": loader, "names": NAMES, "device": CPU}


def test_images_that_are_not_settled_are_looked_at_again(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(**given, ahead=False)
    monkeypatch.setattr(detector, "nms_ahead", partial(nms_ahead, candidates=20))
    progress: list[tuple[int, int]] = []
    got = evaluate(**given, ahead=True, on_progress=lambda *said: progress.append(said))
    assert got == expected
    assert progress == [(2, 4), (4, 4), (6, 8), (8, 8)]


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_it_stops_after_any_batch(
    given: dict[str, Any], batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "nms_ahead", partial(nms_ahead, candidates=20))
    asked = iter(range(1, 5))
    assert evaluate(**given, ahead=True, stop=lambda: next(asked) == batches) is None
    assert next(asked, None) == (batches + 1 if batches < 4 else None)


def test_the_network_is_not_changed(given: dict[str, Any]) -> None:
    module = given["module"]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trained = [p.requires_grad for p in module.parameters()]
    assert module.training and evaluate(**given) is not None
    assert module.training and [p.requires_grad for p in module.parameters()] == trained
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
