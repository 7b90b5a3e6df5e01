"""Stepping down before memory runs out, and climbing back once when there is room again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsrloop.config import Resolved, TrainConfig, resolve
from hsrloop.events import Climbed, Recovered
from hsrloop.hardware import pressure
from hsrloop.hardware.pressure import MemoryUse, Pressure, Reading
from hsrloop.records import Rung
from hsrloop.train import checkpoint, ladder, loop, meter, run
from hsrloop.train.ladder import CLIMB_AFTER_EPOCHS, Cause, MemoryThrashing, cause_of, rung_above
from hsrloop.train.run import train
from hsrloop.train.state import TrainState
from tests.conftest import write_tiny_dataset
from tests.faults.conftest import Fault
from tests.train.conftest import Recorder, run_settings
from tests.train.test_resume import StopAfter, differences, state_of

Settings = Callable[..., Resolved]
Arm = Callable[..., Fault]
SHAPE = {"epochs": 2, "batch": 8, "imgsz": 64}  # 8 images: one step an epoch
HOW_IT_GOT_THERE = {"recoveries", "climbed"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("pressure") / "tiny", train=8)


@pytest.fixture
def settings(dataset: Path, tmp_path: Path) -> Settings:
    return lambda **changes: run_settings(dataset, tmp_path / "runs", **{**SHAPE, **changes})


def end_of(run_dir: Path) -> dict[str, Any]:
    return {k: v for k, v in state_of(run_dir).items() if k not in HOW_IT_GOT_THERE}


def test_thrashing_counts_as_running_out() -> None:
    assert cause_of(MemoryThrashing("slow")) is Cause.GPU_MEMORY


def test_a_thrashing_run_steps_down_and_ends_as_planned(
    settings: Settings, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = itertools.count()
    gauges = iter([Pressure(lambda: Reading(next(retries), 0.5))])
    monkeypatch.setattr(run, "watch", lambda device: next(gauges, None))
    monkeypatch.setattr(meter, "REPORT_EVERY_S", 0.0)  # a window for each step
    monkeypatch.setattr(pressure, "SETTLING", 0)
    monkeypatch.setattr(pressure, "GROWING", 2)
    outcome = train(settings(epochs=3), sinks=[recorder])
    monkeypatch.undo()
    (event,) = recorder.of(Recovered)
    assert (event.cause, event.change) == ("GPU memory", "micro_batch 8 -> 4")
    # The second step, which ends its epoch, stays done.
    assert (event.epoch, event.sample) == (1, 0)
    assert "empty its cache" in event.reason
    stopped = train(settings(epochs=3), stop=StopAfter(2))
    last = stopped.run_dir / "weights" / "last.pt"
    train(resolve([("command line", {"micro_batch": 4})]), resume=last)
    assert differences(end_of(outcome.run_dir), end_of(stopped.run_dir)) == []


def rung(micro_batch: int) -> Rung:
    return Rung(micro_batch=micro_batch, imgsz=64, cache=False, workers=0, val_batch=2, bank="cv2")


@pytest.mark.parametrize(
    ("now", "epochs", "memory", "then"),
    [
        (4, 2, MemoryUse(10, 40, 100), 8),
        (8, 9, MemoryUse(10, 40, 100), 12),  # at most what was asked for
        (12, 9, MemoryUse(10, 40, 100), None),
        (4, CLIMB_AFTER_EPOCHS - 1, MemoryUse(10, 40, 100), None),
        (4, 9, MemoryUse(10, 61, 100), None),  # no room to spare
        (4, 9, MemoryUse(0, 50, 100), None),  # twice that would be tight
        (4, 9, MemoryUse(30, 50, 100), 8),  # weights are not doubled
        (4, 9, None, None),
    ],
)
def test_when_to_climb(now: int, epochs: int, memory: MemoryUse | None, then: int | None) -> None:
    config = TrainConfig(batch=12)
    above = rung_above(config, rung(now), epochs=epochs, memory=memory)
    assert above == (None if then is None else rung(then))


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "CLIMB_AFTER_EPOCHS", 0)
    monkeypatch.setattr(loop, "memory_use", lambda device: MemoryUse(10, 30, 100))


def test_after_a_long_stretch_with_room_it_climbs_and_ends_as_planned(
    settings: Settings, fault: Arm, recorder: Recorder, roomy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault("forward", 0)
    outcome = train(settings(), sinks=[recorder])
    monkeypatch.undo()
    steps = [(type(e).__name__, e.change, e.epoch) for e in recorder.events if hasattr(e, "change")]
    assert steps == [
        ("Recovered", "micro_batch 8 -> 4", 0),
        ("Climbed", "micro_batch 4 -> 8", 1),
    ]
    stopped = train(settings(micro_batch=4), stop=StopAfter(0))  # once the first epoch is trained
    last = stopped.run_dir / "weights" / "last.pt"
    train(resolve([("command line", {"micro_batch": 8})]), resume=last)
    assert differences(end_of(outcome.run_dir), end_of(stopped.run_dir)) == []


def test_the_memory_of_recorded_steps_is_no_room_to_climb(
    settings: Settings, fault: Arm, recorder: Recorder, roomy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault("forward", 0)
    train_epoch = loop.train_epoch

    def recorded(state: TrainState, runtime: loop.Runtime) -> bool:
        state.recorded_bytes = 31  # of 100, and 30 are in use beside them
        return train_epoch(state, runtime)

    monkeypatch.setattr(loop, "train_epoch", recorded)
    train(settings(), sinks=[recorder])
    assert len(recorder.of(Recovered)) == 1 and not recorder.of(Climbed)


def test_it_climbs_once_only(
    settings: Settings, fault: Arm, recorder: Recorder, roomy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pass 0 fails, two make an epoch; number 3 is the first after the climb.
    armed = fault("forward", 0, 3)
    outcome = train(settings(epochs=4), sinks=[recorder])
    monkeypatch.undo()
    assert armed.raised == 2 and outcome.reason == "completed"
    assert len(recorder.of(Climbed)) == 1
    assert [event.epoch for event in recorder.of(Recovered)] == [0, 1]
    saved = checkpoint.read(outcome.run_dir / "weights" / "last.pt").state
    assert saved["climbed"] and saved["rung"]["micro_batch"] == 4
    small = train(settings(epochs=4, micro_batch=4))
    assert differences(end_of(outcome.run_dir), end_of(small.run_dir)) == []
