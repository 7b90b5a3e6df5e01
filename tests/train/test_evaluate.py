"""Validation: what is asked on the way, and images that are looked at twice."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.val_loader import ValLoader
from hsrloop.model.yolo import build
from hsrloop.ops import detections
from hsrloop.ops.detections import detections_ahead
from hsrloop.train import detector
from hsrloop.train.detector import Detector, KeptDetector, RecordedDetections
from hsrloop.train.evaluate import evaluate
from tests.kernels import host_kernels
from tests.train.test_graphs import Rerun

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
    monkeypatch.setattr(detector, "detections_ahead", partial(detections_ahead, candidates=20))
    progress: list[tuple[int, int]] = []
    got = evaluate(**given, ahead=True, on_progress=lambda *said: progress.append(said))
    assert got == expected
    assert progress == [(2, 4), (4, 4), (6, 8), (8, 8)]


def test_kernels_find_in_a_network_what_operators_find(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = {"candidates": None, "suppress": None}
    kernels = host_kernels(detections.SOURCE, tmp_path, together=together)
    expected = evaluate(**given, ahead=True)
    monkeypatch.setattr(detections, "_THREADS", 6)
    monkeypatch.setattr(detector, "detect_kernels", lambda device: kernels)
    place = detector.place
    monkeypatch.setattr(
        detector, "place", lambda *given: place(*given).to(memory_format=torch.channels_last)
    )  # as on a GPU
    got = evaluate(**given, ahead=True)
    assert [kernel.calls for kernel in kernels.values()] == [len(given["loader"])] * 2
    assert got is not None and expected is not None
    assert (got.ap50, got.ap50_95) == pytest.approx((expected.ap50, expected.ap50_95), abs=1e-6)


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_it_stops_after_any_batch(
    given: dict[str, Any], batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "detections_ahead", partial(detections_ahead, candidates=20))
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


def trained_on(module: torch.nn.Module, seed: int) -> None:
    """Move every weight and statistic, as an epoch does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                moved = tensor.abs() + noise.abs() if "running_var" in name else tensor + noise
                tensor.copy_(moved)


@pytest.mark.parametrize("half", [False, True])
def test_a_kept_detector_is_as_a_new_one(half: bool) -> None:
    module, kept = build("yolov8n.yaml", names=NAMES, seed=0), KeptDetector()
    first = kept.of(module, CPU, half=half)
    places = [tensor.data_ptr() for tensor in first.module.state_dict().values()]
    for seed in range(3):
        trained_on(module, seed)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        again = kept.of(module, CPU, half=half)
        assert again is first
        expected = Detector.of(module, CPU, half=half).module.state_dict()
        found = again.module.state_dict()
        assert [tensor.data_ptr() for tensor in found.values()] == places
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert kept.of(module, CPU, half=not half) is not first
    other = build("yolov8s.yaml", names=NAMES, seed=0)
    assert kept.of(other, CPU, half=half).module is not first.module


def test_validations_with_a_kept_detector_find_the_same(given: dict[str, Any]) -> None:
    kept = KeptDetector()
    for seed in range(2):
        assert evaluate(**given, kept=kept) == evaluate(**given)
        trained_on(given["module"], seed)


def test_kernels_are_looked_for_at_the_size_of_most_batches_alone(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    find = Detector.find

    def spy(self: Detector, images: torch.Tensor, **options: Any) -> Any:
        seen.append((len(images), torch.backends.cudnn.benchmark))
        return find(self, images, **options)

    monkeypatch.setattr(Detector, "find", spy)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    given["loader"].batch = 3
    evaluate(**given)
    assert seen == [(3, True), (1, False)]


def test_recorded_detections_are_those_of_the_network_as_it_is_by_then(
    given: dict[str, Any],
) -> None:
    rerun, kept, module = Rerun(), KeptDetector(), given["module"]
    recorded, seen = RecordedDetections(rerun), []
    batches = [batch.images for batch in given["loader"]]
    for _ in range(3):
        own = kept.of(module, CPU, half=False)
        found = [own.find(images, ahead=True, recorded=recorded) for images in batches]
        for images, got in zip(batches, found, strict=True):
            expected = Detector.of(module, CPU, half=False).find(images, ahead=True)
            assert torch.equal(got.rows, expected.rows) and got.rows.any()
            assert torch.equal(got.settled, expected.settled)
            seen.append(got.rows.sum().item())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.01)
    assert len(set(seen)) == 6
    assert rerun.recordings == 1
    assert rerun.replays == 6 - 1, "all batches but the first one"
    Detector.of(module, CPU, half=False).find(batches[0], ahead=True, recorded=recorded)
    assert rerun.replays == 5, "another detector has recordings of its own"


@pytest.mark.parametrize("trouble", ["", "room", "error"])
def test_a_refresh_that_is_recorded_is_as_a_new_detector(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = RuntimeError("operation not permitted\nmore") if trouble == "error" else None
    rerun, kept = Rerun(room=trouble != "room", error=error), KeptDetector()
    recorded = RecordedDetections(rerun)
    modules = [build("yolov8n.yaml", names=NAMES, seed=seed) for seed in range(2)]
    for number, module in enumerate((*[modules[0]] * 5, *[modules[1]] * 4)):
        trained_on(module, number)
        own = kept.of(module, CPU, half=False, recorded=recorded).module.state_dict()
        expected = Detector.of(module, CPU, half=False).module.state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in expected)
    # A new one, one as ever, then recorded; the other network has its own.
    assert rerun.replays == (0 if trouble else 3 + 2)
    assert rerun.recordings == recorded.recordings + (trouble == "error")
    assert recorded.recordings == (0 if trouble else 2)
    assert ("refreshing cannot be recorded as CUDA graphs" in caplog.text) is (trouble == "error")


def test_a_validation_with_recorded_detections_is_the_same(given: dict[str, Any]) -> None:
    rerun, kept = Rerun(), KeptDetector()
    recorded = RecordedDetections(rerun)
    for seed in range(4):
        got = evaluate(**given, ahead=True, kept=kept, recorded=recorded)
        assert got == evaluate(**given, ahead=True)
        trained_on(given["module"], seed)
    assert rerun.replays == 7 + 2, "all batches but the first, and the last two refreshes"
    rerun.replays = 0
    kept = KeptDetector()
    evaluate(**given, ahead=False, kept=kept, recorded=recorded)
    assert not rerun.replays


@pytest.mark.parametrize("trouble", ["room", "error"])
def test_what_cannot_be_recorded_is_detected_all_the_same(
    trouble: str, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    error = RuntimeError("operation not permitted\nmore") if trouble == "error" else None
    rerun, kept = Rerun(room=trouble != "room", error=error), KeptDetector()
    recorded = RecordedDetections(rerun)
    for _ in range(2):
        found = evaluate(**given, ahead=True, kept=kept, recorded=recorded)
        assert found == evaluate(**given, ahead=True)
    assert rerun.replays == 0 and rerun.recordings == (trouble == "error")
    assert ("(operation not permitted)" in caplog.text) is (trouble == "error")


def test_a_shape_that_cannot_be_recorded_leaves_the_others_alone(given: dict[str, Any]) -> None:
    rerun = Rerun(error=RuntimeError("operation not permitted"))
    rerun.fails_at = 2
    recorded, own = RecordedDetections(rerun), Detector.of(given["module"], CPU, half=False)
    pair, single = (torch.zeros((n, 3, 64, 64), dtype=torch.uint8) for n in (2, 1))
    for images in (pair, pair, single, single, pair, single):
        own.find(images, ahead=True, recorded=recorded)
    assert rerun.recordings == 2 and rerun.replays == 2
    assert recorded.recordings == 1
