"""The rehearsal: the worst step leaves no trace, and its result is remembered."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hsrloop.config import TrainConfig
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.records import DeviceInfo, Rung
from hsrloop.train import rehearsal
from hsrloop.train.fits import KEPT, Fits, key_of
from hsrloop.train.rehearsal import Rehearsal, RehearsalFailed, most_boxes, worst_batch
from tests.train.conftest import make_rehearsal
from tests.train.test_resume import differences

RUNG = Rung(micro_batch=4, imgsz=64, cache="ram", workers=0, val_batch=4, bank="cv2")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the images of each training pass."""
    seen: list[int] = []
    real = rehearsal.forward_backward

    def watched(state: Any, batch: Any, settings: Any) -> Any:
        seen.append(len(batch.images))
        return real(state, batch, settings)

    monkeypatch.setattr(rehearsal, "forward_backward", watched)
    yield seen


def everything(of: Rehearsal) -> dict[str, Any]:
    gradients = [p.grad for p in of.state.model.parameters()]
    return copy.deepcopy({**of.state.to_payload(), "gradients": gradients})


def test_the_state_stays_as_it_was_bit_for_bit(made: Rehearsal, passes: list[int]) -> None:
    before = everything(made)
    made.rehearse()
    assert passes == [4, 2]  # a whole micro-batch, and the next one beside its gradients
    assert differences(everything(made), before) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_state_stays_as_it_was_on_a_gpu_in_half_precision(tmp_path: Path, fits: Fits) -> None:
    made = make_rehearsal(tmp_path, fits, torch.device("cuda", 0))
    before = everything(made)
    made.rehearse()
    assert differences(everything(made), before) == []


def test_so_it_does_when_the_rehearsal_fails(
    made: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        torch.rand(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    before = everything(made)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", fail)
    with pytest.raises(RehearsalFailed) as raised:
        made.rehearse()
    assert not raised.value.validating and "CUDA" in str(raised.value.__cause__)
    assert differences(everything(made), before) == []


def test_what_fits_is_not_tried_again(made: Rehearsal, passes: list[int]) -> None:
    made.run()
    first = len(passes)
    made.run()
    assert first == 2 and len(passes) == first
    made.state.rung = dataclasses.replace(made.state.rung, micro_batch=6)
    made.run()
    assert len(passes) == first + 1


def test_a_result_that_turned_out_wrong_is_dropped(made: Rehearsal) -> None:
    made.run()
    assert made.fits.known() == made.state.rung
    made.state.rung = dataclasses.replace(made.state.rung, micro_batch=2)
    made.state.recoveries.append({"rehearsed": False})
    made.run()
    assert made.fits.known() is None


def test_recorded_steps_that_did_not_fit_say_nothing_of_it(
    made: Rehearsal, passes: list[int]
) -> None:
    made.run()
    known, tried = made.fits.known(), len(passes)
    made.state.rung = dataclasses.replace(made.state.rung, cuda_graphs=False)
    made.state.recoveries.append({"rehearsed": False, "change": "cuda_graphs True -> False"})
    made.run()
    assert made.fits.known() == known and len(passes) == tried


def test_the_validating_part_says_so(made: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(rehearsal.Detector, "find", fail)
    with pytest.raises(RehearsalFailed) as raised:
        made.rehearse()
    assert raised.value.validating


def ref(boxes: int) -> ImageRef:
    return ImageRef(
        path=Path("x.png"),
        height=10,
        width=10,
        boxes_cxcywh=np.full((boxes, 4), 0.5, np.float32),
        labels=np.zeros(boxes, np.int64),
        polygons=(None,) * boxes,
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 56), ({"mixup": 0}, 28), ({"mosaic": 0}, 14), ({"mosaic": 0, "mixup": 0}, 7)],
)
def test_most_boxes(changes: dict[str, float], expected: int) -> None:
    config = TrainConfig(**changes)  # type: ignore[arg-type]
    assert most_boxes([ref(2), ref(7), ref(0)], None, config) == expected
    assert most_boxes([], None, config) == 0


@pytest.mark.parametrize(("own_ground", "expected"), [(True, 8), (False, 15)])
def test_what_a_photograph_shows_stays_below_what_is_pasted(
    own_ground: bool, expected: int
) -> None:
    config = TrainConfig(mosaic=0, mixup=0, max_objects=8)
    scenes: Any = SimpleNamespace(count=3, backgrounds=(ref(0),) if own_ground else ())
    assert most_boxes([ref(2), ref(7)], scenes, config) == expected
    assert most_boxes([ref(2), ref(70)], scenes, config) == (70 if own_ground else 78)


def test_the_worst_batch_is_one_that_a_loader_could_make() -> None:
    batch = worst_batch(images=3, imgsz=64, boxes=5, classes=2)
    assert batch.images.shape == (3, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.image_index.tolist() == sorted([0, 1, 2] * 5)
    assert batch.labels.unique().tolist() == [0, 1]
    centres, sides = batch.boxes_cxcywh.split(2, 1)
    assert ((centres - sides / 2) >= 0).all() and ((centres + sides / 2) <= 1.0001).all()
    assert worst_batch(images=2, imgsz=64, boxes=0, classes=2).boxes_cxcywh.shape == (0, 4)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"key": 3}', '{"key": {}}', '{"key": {"micro_batch": 4}}', "\x00"]
    + [str({"key": {**dataclasses.asdict(RUNG), "imgsz": None}}).replace("'", '"')],
)
def test_a_damaged_file_counts_as_empty_and_is_replaced(fits: Fits, content: str) -> None:
    fits.path.parent.mkdir()
    fits.path.write_text(content)
    assert fits.known() is None and not fits.covers(RUNG)
    fits.forget()
    fits.remember(RUNG)
    assert fits.known() == RUNG


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    fits = Fits("key", tmp_path / "cache" / "fits.json")
    fits.remember(RUNG)
    assert fits.known() is None


def test_only_the_newest_results_are_kept(fits: Fits) -> None:
    for i in range(KEPT + 5):
        dataclasses.replace(fits, key=str(i)).remember(RUNG)
    assert dataclasses.replace(fits, key="4").known() is None
    assert dataclasses.replace(fits, key="5").known() == RUNG


@pytest.mark.parametrize(
    ("change", "covered"),
    [
        ({}, True),
        ({"workers": 3, "cache": False}, True),  # no matter of the GPU
        ({"micro_batch": 8}, False),
        ({"imgsz": 96}, False),
        ({"val_batch": 8}, False),
        ({"bank": "pinned"}, False),
        ({"micro_batch": 2}, True),
    ],
)
def test_what_a_result_covers(fits: Fits, change: dict[str, Any], covered: bool) -> None:
    fits.remember(RUNG)
    assert fits.covers(dataclasses.replace(RUNG, **change)) == covered


def test_a_result_holds_for_the_same_card_software_and_sizes_only() -> None:
    def key(config: TrainConfig, **device: Any) -> str:
        info = DeviceInfo(kind="cuda", name="Card", uuid="GPU-1", free_bytes=6 * 2**30)
        info = dataclasses.replace(info, **device)
        return key_of(info, config, parameters=3, classes=2, boxes=5, images=9)

    same = key(TrainConfig(), cores=3)
    assert same == key(TrainConfig(lr0=0.5, epochs=3, micro_batch=None), free_bytes=6 * 2**30 + 1)
    others = [
        *(key(TrainConfig(**{n: v})) for n, v in {"imgsz": 320, "batch": 8, "amp": False}.items()),
        *(key(TrainConfig(), **{n: "x"}) for n in ("name", "uuid", "driver")),
        key(TrainConfig(), free_bytes=5 * 2**30),
        key(TrainConfig(model="yolov8s.pt")),
        key(TrainConfig(micro_batch=4)),
    ]
    assert len({same, *others}) == len(others) + 1
