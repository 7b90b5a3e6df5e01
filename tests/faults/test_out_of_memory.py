"""Memory runs out anywhere: the run ends as one that was planned to change settings there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hsrloop.config import Resolved, TrainConfig, resolve
from hsrloop.data.workers import WorkerPool
from hsrloop.errors import ResourceError
from hsrloop.events import Recovered
from hsrloop.hardware.memory import usable_cores
from hsrloop.records import Rung
from hsrloop.train import checkpoint, step
from hsrloop.train.resume import Wishes
from hsrloop.train.run import train
from tests.conftest import write_tiny_dataset
from tests.faults.conftest import Fault, host_error
from tests.train.conftest import Recorder, run_settings
from tests.train.test_resume import StopAfter, differences, state_of

Settings = Callable[..., Resolved]
Arm = Callable[..., Fault]
HOW_IT_GOT_THERE = {"recoveries"}
# 16 images in batches of 8 and one validation batch: an epoch asks three times whether to stop.
SHAPE = {"epochs": 2, "batch": 8, "imgsz": 64}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("faults") / "tiny", train=16)


@pytest.fixture
def settings(dataset: Path, tmp_path: Path) -> Settings:
    return lambda **changes: run_settings(dataset, tmp_path / "runs", **{**SHAPE, **changes})


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return end_of(train(run_settings(dataset, tmp_path_factory.mktemp("whole"), **SHAPE)).run_dir)


def end_of(run_dir: Path) -> dict[str, Any]:
    """Return all that a run ends with, but what it remembers of its way."""
    return {k: v for k, v in state_of(run_dir).items() if k not in HOW_IT_GOT_THERE}


def planned(settings: Settings, questions: int | None) -> dict[str, Any]:
    """Return the end of the run that was told to use half the micro-batch from a point on.

    Args:
        questions: answered before it stops and goes on; None: it had half from the start.
    """
    if questions is None:
        return end_of(train(settings(micro_batch=4)).run_dir)
    stopped = train(settings(), stop=StopAfter(questions))
    last = stopped.run_dir / "weights" / "last.pt"
    return end_of(train(resolve([("command line", {"micro_batch": 4})]), resume=last).run_dir)


@pytest.mark.parametrize(
    ("place", "call", "questions"),
    [
        ("forward", 0, None),  # the first step
        ("forward", 1, 0),
        ("backward", 2, 2),  # the first step after a validation
        ("unscale", 1, 0),
        ("optimizer", 2, 0),  # call 0 makes the optimizer's state
        ("forward", 3, 3),  # the last step
        # From here on the weights have moved: the step is finished before settings change.
        ("scaler update", 0, 0),
        ("ema", 1, 1),
        ("ema", 3, 4),
        ("reserve", 0, None),  # memory for copies
        ("best.pt", 0, 2),  # the first one
        ("last.pt", 0, 2),  # the first one
    ],
)
def test_the_end_is_that_of_the_run_planned_to_change_there(
    place: str,
    call: int,
    questions: int | None,
    settings: Settings,
    fault: Arm,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed = fault(place, call)
    outcome = train(settings(), sinks=[recorder])
    monkeypatch.undo()
    assert armed.raised == 1 and outcome.reason == "completed"
    assert [event.change for event in recorder.of(Recovered)] == ["micro_batch 8 -> 4"]
    assert differences(end_of(outcome.run_dir), planned(settings, questions)) == []
    assert outcome.result is not None
    assert [row["change"] for row in outcome.result["recoveries"]] == ["micro_batch 8 -> 4"]
    assert (outcome.run_dir / "weights" / "best.pt").is_file()
    assert len((outcome.run_dir / "results.csv").read_text().splitlines()) == 1 + SHAPE["epochs"]


def test_memory_that_runs_out_at_the_very_last_save_still_leaves_the_last_epoch(
    settings: Settings, fault: Arm, undisturbed: dict[str, Any]
) -> None:
    armed = fault("last.pt", 1)  # the first epoch is saved
    outcome = train(settings())
    assert armed.raised == 1 and outcome.reason == "completed"
    assert differences(end_of(outcome.run_dir), undisturbed) == []


def test_validation_gives_way_with_its_own_batch(
    settings: Settings, fault: Arm, undisturbed: dict[str, Any], recorder: Recorder
) -> None:
    fault("validation", 0, 1)
    outcome = train(settings(), sinks=[recorder])
    changes = [event.change for event in recorder.of(Recovered)]
    assert changes == ["val_batch 8 -> 4", "val_batch 4 -> 2"]
    trained = ("model", "ema", "optimizer", "position", "steps")
    end = end_of(outcome.run_dir)
    assert all(differences(end[name], undisturbed[name]) == [] for name in trained)


@pytest.mark.parametrize("place", ["forward", "backward", "ema", "last.pt", "writer"])
def test_main_memory_costs_the_cache_and_changes_no_number(
    place: str, settings: Settings, fault: Arm, undisturbed: dict[str, Any], recorder: Recorder
) -> None:
    fault(place, 1, error=host_error)
    outcome = train(settings(), sinks=[recorder])
    assert [event.change for event in recorder.of(Recovered)] == ["cache ram -> False"]
    assert differences(end_of(outcome.run_dir), undisturbed) == []


def test_a_worker_killed_from_outside_changes_no_number(
    settings: Settings, undisturbed: dict[str, Any], recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made: list[WorkerPool[Any, Any]] = []
    real = WorkerPool.map

    def once(pool: WorkerPool[Any, Any], tasks: Any) -> Any:
        if not made:
            made.append(pool)
            os.kill(pool._processes[0].pid or 0, signal.SIGKILL)
        return real(pool, tasks)

    monkeypatch.setattr(WorkerPool, "map", once)
    outcome = train(settings(workers=1), sinks=[recorder])
    assert [event.cause for event in recorder.of(Recovered)] == ["a loader process"]
    assert differences(end_of(outcome.run_dir), undisturbed) == []


def test_twice_in_a_row_it_steps_down_twice(
    settings: Settings, fault: Arm, recorder: Recorder
) -> None:
    fault("backward", 0, 1)
    outcome = train(settings(), sinks=[recorder])
    changes = [event.change for event in recorder.of(Recovered)]
    assert changes == ["micro_batch 8 -> 4", "micro_batch 4 -> 2"]
    assert outcome.reason == "completed"


class Budget:
    """GPU memory that a forward pass needs in proportion to its pixels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
        self.shapes: list[tuple[int, int]] = []
        real = step.forward_train

        def forward(module: Any, images: torch.Tensor) -> Any:
            if len(images) * images.shape[-1] ** 2 > pixels:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.shapes.append((len(images), images.shape[-1]))
            return real(module, images)

        monkeypatch.setattr(step, "forward_train", forward)


def test_the_ladder_shrinks_until_the_budget_is_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    budget = Budget(monkeypatch, 2 * 320**2)
    outcome = train(settings(imgsz=352, epochs=1), sinks=[recorder])
    changes = [event.change for event in recorder.of(Recovered)]
    assert changes == ["micro_batch 8 -> 4", "imgsz 352 -> 320", "micro_batch 4 -> 2"]
    assert set(budget.shapes) == {(2, 320)} and len(budget.shapes) == 8  # 16 images, each once
    result = json.loads((outcome.run_dir / "training_result.json").read_text())
    assert result["imgsz_trained"] == [352, 320]
    row = (outcome.run_dir / "results.csv").read_text().splitlines()
    named = dict(zip(row[0].split(","), row[1].split(","), strict=True))
    assert (named["micro_batch"], named["imgsz"]) == ("2", "320")


def test_without_recovery_the_error_is_one_clear_line(settings: Settings, fault: Arm) -> None:
    fault("forward", 0)
    with pytest.raises(ResourceError, match="recovery is off. Use a smaller --micro-batch"):
        train(settings(oom_recovery=False))


def test_other_errors_are_raised_untouched(settings: Settings, fault: Arm) -> None:
    fault("backward", 1, error=lambda: ZeroDivisionError("not memory"))
    with pytest.raises(ZeroDivisionError, match="not memory"):
        train(settings())


def test_a_recovered_run_is_resumed_on_its_rung(
    settings: Settings, fault: Arm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault("forward", 0)
    whole = train(settings())
    monkeypatch.undo()
    fault("forward", 0)
    stopped = train(settings(), stop=StopAfter(1))
    monkeypatch.undo()
    resumed = train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    saved = checkpoint.read(resumed.run_dir / "weights" / "last.pt").state["rung"]
    assert saved["micro_batch"] == 4
    assert differences(state_of(resumed.run_dir), state_of(whole.run_dir)) in (
        [],
        [".recoveries[0].time"],
    )


@pytest.mark.parametrize("wanted", [None, False])
def test_a_recovered_run_records_steps_as_it_did_unless_told_otherwise(
    wanted: bool | None, settings: Settings, fault: Arm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault("forward", 0)
    stopped = train(settings(), stop=StopAfter(1))
    monkeypatch.undo()
    told = [] if wanted is None else [("command line", {"cuda_graphs": wanted})]
    resumed = train(resolve(told), resume=stopped.run_dir / "weights" / "last.pt")
    assert resumed.rung.micro_batch == 4
    assert resumed.rung.cuda_graphs is (wanted is None)


def test_what_is_said_again_when_resuming_holds_from_then_on(
    settings: Settings, fault: Arm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was asked for the same when it began."""
    fault("forward", 0)
    fault("backward", 0, error=host_error)
    stopped = train(settings(micro_batch=8, cache="ram"), stop=StopAfter(1))
    monkeypatch.undo()
    last = stopped.run_dir / "weights" / "last.pt"
    assert (stopped.rung.micro_batch, stopped.rung.cache) == (4, False)
    shutil.copytree(stopped.run_dir, stopped.run_dir.with_name("again"))
    kept = train(resolve([("file a.yaml", {"micro_batch": 8, "cache": "ram"})]), resume=last)
    assert (kept.rung.micro_batch, kept.rung.cache) == (4, False), "a file names every setting"
    told = resolve([("command line", {"micro_batch": 8, "cache": "ram", "workers": 8})])
    copy = stopped.run_dir.with_name("again") / "weights" / "last.pt"
    again = train(told, resume=copy)
    assert (again.rung.micro_batch, again.rung.val_batch, again.rung.cache) == (8, 8, "ram")
    assert again.rung.workers == min(8, usable_cores() - 1), "workers were not asked for before"


PINNED = Rung(micro_batch=4, imgsz=64, cache="ram", workers=1, val_batch=4, bank="pinned")


@pytest.mark.parametrize(
    ("changes", "now", "expected"),
    [
        (["micro_batch 8 -> 4"], {}, ("device", 8)),  # where images lie, the machine decides
        (["micro_batch 8 -> 4", "bank device -> pinned"], {}, ("pinned", 8)),
        (["bank device -> pinned"], {"augment_device": "gpu"}, ("device", 8)),
        (["bank device -> pinned"], {"augment_device": "auto"}, ("device", 8)),
        (["bank device -> pinned"], {"device": "cuda:1"}, ("device", 8)),
        (["workers 2 -> 1"], {}, ("device", 1)),
        (["cache ram -> False, workers 2 -> 1"], {"workers": 3}, ("device", 3)),
    ],
)
def test_only_what_memory_ran_out_for_stays_given_up(
    changes: list[str], now: dict[str, Any], expected: tuple[str, int]
) -> None:
    before = TrainConfig()
    wishes = Wishes(before, before.replace(**now), said=frozenset(now))
    state = SimpleNamespace(rung=PINNED, recoveries=[{"change": change} for change in changes])
    rung = wishes.rung(state)  # type: ignore[arg-type]
    assert (rung.bank, rung.workers) == expected and rung.micro_batch == 4


@pytest.mark.parametrize(
    ("before", "now", "said", "choose"),
    [
        ("auto", "auto", False, False),
        ("auto", "auto", True, True),
        (None, "auto", True, True),
        ("auto", 8, True, False),
    ],
)
def test_a_micro_batch_is_chosen_once_unless_told_otherwise(
    before: Any, now: Any, said: bool, choose: bool
) -> None:
    configs = TrainConfig(micro_batch=before), TrainConfig(micro_batch=now)
    wishes = Wishes(*configs, said=frozenset({"micro_batch"} if said else ()))
    assert wishes.choose is choose
    state = SimpleNamespace(rung=PINNED, recoveries=[])
    kept = 16 if choose else (8 if now == 8 else 4)
    assert wishes.rung(state).micro_batch == kept  # type: ignore[arg-type]
