"""A run that was stopped anywhere and goes on ends bit-identical to one that never stopped."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.config import Resolved, resolve
from hsrloop.errors import CheckpointError, DependencyError
from hsrloop.events import Note
from hsrloop.model import export
from hsrloop.records import Metrics
from hsrloop.train import checkpoint, loop, resume, run
from hsrloop.train.folder import newest_unfinished
from hsrloop.train.run import train
from tests.conftest import write_tiny_dataset
from tests.train.conftest import run_settings

Settings = Callable[..., Resolved]
# Wall times, and how the machine was used, which changes no number.
CLOCK = {"elapsed_s", "epoch_s", "val_s_per_epoch", "rung"}


class StopAfter:
    """Says stop at the n-th question; the loop asks after each step and each validation batch."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def state_of(run_dir: Path) -> dict[str, Any]:
    saved = checkpoint.read(run_dir / "weights" / "last.pt")
    return {k: v for k, v in saved.state.items() if k not in CLOCK}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for key in a for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{path}[{i}]")
        ]
    return [] if a == b else [path]


def rows(run_dir: Path) -> list[list[str]]:
    """results.csv without the columns of wall time."""
    lines = [line.split(",") for line in (run_dir / "results.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(lines[0]) if not name.endswith("_s")]
    return [[line[i] for i in kept] for line in lines]


def kinds(run_dir: Path) -> list[tuple[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["event"], e.get("epoch")) for e in events if e["event"] == "EpochDone"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    dataset = write_tiny_dataset(folder / "tiny")
    return train(run_settings(dataset, folder / "runs")).run_dir


# Questions: one after each step, one after each validation batch. The stops below fall in the
# first step, mid-epoch, on an epoch's last step, in a validation, and in the last epoch.
@pytest.mark.parametrize("questions", [0, 1, 2, 3, 4, 6, 8])
def test_stopped_anywhere_it_ends_the_same(
    questions: int, settings: Settings, never_stopped: Path
) -> None:
    stopped = train(settings(), stop=StopAfter(questions))
    assert stopped.reason == "interrupted"
    last = stopped.run_dir / "weights" / "last.pt"
    outcome = train(resolve([]), resume=last)
    assert outcome.reason == "completed" and outcome.run_dir == stopped.run_dir
    assert differences(state_of(never_stopped), state_of(outcome.run_dir)) == []
    assert rows(outcome.run_dir) == rows(never_stopped)
    assert kinds(outcome.run_dir) == kinds(never_stopped)


def test_stopped_twice_it_ends_the_same(settings: Settings, never_stopped: Path) -> None:
    first = train(settings(), stop=StopAfter(1))
    last = first.run_dir / "weights" / "last.pt"
    second = train(resolve([]), resume=last, stop=StopAfter(3))
    assert second.reason == "interrupted"
    train(resolve([]), resume=last)
    assert differences(state_of(never_stopped), state_of(first.run_dir)) == []


FORGETTABLE = ("model", "ema", "optimizer", "loss_sums", "position", "steps", "history")


@pytest.mark.parametrize("forgotten", FORGETTABLE)
def test_forgetting_any_part_of_the_state_shows(
    forgotten: str, settings: Settings, never_stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = train(settings(), stop=StopAfter(6))
    fresh = train(settings(), stop=StopAfter(0))
    other = checkpoint.read(fresh.run_dir / "weights" / "last.pt").state
    real = checkpoint.read

    def forgetful(path: Path, *, trust: bool = False) -> checkpoint.Saved:
        saved = real(path, trust=trust)
        content = copy.copy(dict(saved.state))
        content[forgotten] = other[forgotten]
        return dataclasses.replace(saved, state=content)

    monkeypatch.setattr(checkpoint, "read", forgetful)
    if forgotten == "history":  # then it lacks the best epoch
        with pytest.raises(CheckpointError, match="best epoch is none of the history"):
            train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
        return
    train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    monkeypatch.setattr(checkpoint, "read", real)
    assert differences(state_of(never_stopped), state_of(stopped.run_dir)) != []


KILL = """
import json, os, signal, sys, time
from concurrent.futures import wait
from pathlib import Path
from hsrloop.config import resolve
from hsrloop.train import checkpoint
from hsrloop.train.run import train
from hsrloop.train.saver import Saver

values, places = json.loads(sys.argv[1]), json.loads(sys.argv[2])
left = 6  # two epochs, and a step of the third


def when_idle(method):
    # What falls due is saved at once, also where the disk is slow.
    def waiting(self, state):
        if self._writing is not None:
            wait([self._writing])
        return method(self, state)
    return waiting


def stop():
    global left
    left -= 1
    if left >= 0:
        return False
    place, until = places.pop(0), time.monotonic() + 120
    (last,) = Path(values["output"]).glob("*/weights/last.pt")
    while (found := checkpoint.read(last).state["position"]) != place:
        if time.monotonic() > until:
            sys.exit(f"last.pt stays at {found}, expected {place}")
        time.sleep(0.05)
    if not places:
        os.kill(os.getpid(), signal.SIGKILL)
    return False


Saver.due, Saver.save = when_idle(Saver.due), when_idle(Saver.save)
train(resolve([("test", values)]), stop=stop)
"""


@pytest.mark.parametrize("places", [[[2, 0]], [[2, 0], [2, 4]]], ids=["end", "within"])
def test_killed_it_goes_on_from_the_last_save(
    places: list[list[int]], settings: Settings, never_stopped: Path
) -> None:
    """SIGKILL leaves last.pt of the newest finished epoch, or of a moment within one.

    What was reported beyond is cut back.
    """
    values = settings(checkpoint_minutes=1e-9 if len(places) > 1 else 0).config.to_json()
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILL, json.dumps(values), json.dumps(places)]
    done = subprocess.run(command, env=env, check=False)
    assert done.returncode == -9
    last = newest_unfinished(Path(values["output"]))
    train(resolve([]), resume=last)
    run_dir = last.parent.parent
    assert differences(state_of(never_stopped), state_of(run_dir)) == []
    assert rows(run_dir) == rows(never_stopped)


def test_what_a_kill_left_half_written_is_cleared_away(settings: Settings) -> None:
    stopped = train(settings(epochs=1), stop=StopAfter(1))
    for name in (".config.yaml.7.tmp", "results.csv.tmp", "weights/.last.pt.7.tmp"):
        (stopped.run_dir / name).touch()
    train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt", stop=StopAfter(0))
    assert not list(stopped.run_dir.rglob("*.tmp"))


def test_another_data_set_is_refused(settings: Settings, tiny_dataset: Path) -> None:
    stopped = train(settings(), stop=StopAfter(1))
    label = next(tiny_dataset.parent.rglob("labels/train/*.txt"))
    before = label.read_text()
    try:
        label.write_text(before + "0 0.5 0.5 0.2 0.2\n")
        with pytest.raises(CheckpointError, match="changed since"):
            train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    finally:
        label.write_text(before)


def test_another_model_is_refused(settings: Settings) -> None:
    stopped = train(settings(), stop=StopAfter(1))
    given = resolve([("command line", {"model": "yolov8s.pt"})])
    with pytest.raises(CheckpointError, match=r"is a run of yolov8n.yaml, not of yolov8s.pt"):
        train(given, resume=stopped.run_dir / "weights" / "last.pt")


def test_what_cannot_change_is_said(settings: Settings, recorder: Any) -> None:
    stopped = train(settings(epochs=1), stop=StopAfter(1))
    given = resolve([("command line", {"lr0": 0.5})])
    train(given, resume=stopped.run_dir / "weights" / "last.pt", sinks=[recorder])
    assert any("lr0 stays 0.001" in note.text for note in recorder.of(Note))


def test_best_pt_cannot_be_resumed(settings: Settings) -> None:
    outcome = train(settings(epochs=1))
    with pytest.raises(CheckpointError, match="holds weights but no run"):
        train(resolve([]), resume=outcome.run_dir / "weights" / "best.pt")


def test_a_checkpoint_outside_a_run_folder_is_refused(settings: Settings, tmp_path: Path) -> None:
    stopped = train(settings(), stop=StopAfter(1))
    stray = tmp_path / "backup" / "last.pt"
    stray.parent.mkdir()
    stray.write_bytes((stopped.run_dir / "weights" / "last.pt").read_bytes())
    with pytest.raises(CheckpointError, match="does not lie in the weights/ folder"):
        train(resolve([]), resume=stray)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backup", "runs", "tiny"]


def test_more_epochs_on_a_finished_run_make_it_unfinished(settings: Settings) -> None:
    done = train(settings(epochs=1))
    more = resolve([("command line", {"epochs": 2, "micro_batch": 2})])
    again = train(more, resume=done.run_dir / "weights" / "last.pt", stop=StopAfter(0))
    assert again.reason == "interrupted"
    assert newest_unfinished(done.run_dir.parent) == done.run_dir / "weights" / "last.pt"


def test_nothing_unfinished_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no unfinished run below"):
        newest_unfinished(tmp_path)


HOLD = """
import sys
from pathlib import Path
from hsrloop.train.folder import held
with held(Path(sys.argv[1])):
    sys.stdout.write("held\\n"); sys.stdout.flush()
    sys.stdin.read()
"""


def test_a_run_that_another_process_trains_is_left_alone(settings: Settings) -> None:
    stopped = train(settings(), stop=StopAfter(1))
    last = stopped.run_dir / "weights" / "last.pt"
    command = [sys.executable, "-c", HOLD, str(stopped.run_dir)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="is still training, in another process"):
            train(resolve([]), resume=last)
        with pytest.raises(CheckpointError, match="no unfinished run below .*, but 1 still"):
            newest_unfinished(stopped.run_dir.parent)
        other.kill()
    assert newest_unfinished(stopped.run_dir.parent) == last
    assert train(resolve([]), resume=last, stop=StopAfter(1)).reason == "interrupted"


def test_a_run_holds_its_own_folder(settings: Settings) -> None:
    seen: list[bool] = []

    def stop() -> bool:
        (run,) = Path(settings().config.output).iterdir()
        code = "import sys; from hsrloop.train import folder; from pathlib import Path; "
        code += "sys.exit(folder._is_running(Path(sys.argv[1])))"
        seen.append(subprocess.run([sys.executable, "-c", code, run]).returncode == 1)
        return True

    train(settings(workers=1), stop=stop)
    assert seen == [True]


@pytest.mark.parametrize("questions", [0, 3, None])
def test_a_best_pt_that_is_gone_is_made_up_for(
    questions: int | None, settings: Settings, recorder: Any
) -> None:
    outcome = train(settings(epochs=2), stop=StopAfter(questions or 0))
    last = outcome.run_dir / "weights" / "last.pt"
    if questions != 0:
        limit = StopAfter(questions) if questions else (lambda: False)
        train(resolve([]), resume=last, stop=limit)
    (last.parent / "best.pt").unlink(missing_ok=True)
    outcome = train(resolve([]), resume=last, sinks=[recorder])
    assert outcome.result is not None and (last.parent / "best.pt").is_file()
    assert any("best.pt is gone" in n.text for n in recorder.of(Note)) == (questions != 0)


def test_another_output_is_said_to_be_ignored(settings: Settings, recorder: Any) -> None:
    stopped = train(settings(), stop=StopAfter(1))
    last = stopped.run_dir / "weights" / "last.pt"
    elsewhere = resolve([("command line", {"output": "elsewhere"})])
    train(elsewhere, resume=last, sinks=[recorder], stop=StopAfter(1))
    assert any("output elsewhere is ignored" in n.text for n in recorder.of(Note))
    assert checkpoint.read(last).identity.config.output == settings().config.output


@pytest.mark.parametrize(
    ("saved", "given", "same"),
    [
        ("yolov8n.pt", "yolov8n", True),
        ("yolov8n", "yolov8n.pt", True),
        ("w/yolov8n.pt", os.path.abspath("w/yolov8n.pt"), True),
        ("/w/yolov8n.pt", "yolov8n.pt", True),
        ("/w/yolov8n.pt", "/v/yolov8n.pt", False),
        ("yolov8n.pt", "yolov8s.pt", False),
        ("yolov8n.pt", "yolov8n.yaml", False),
    ],
)
def test_one_model_may_be_spelled_in_several_ways(saved: str, given: str, same: bool) -> None:
    assert resume._same_model(given, saved) == same


def test_more_patience_takes_early_stopping_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(ap50=0.5, ap50_95=0.5, precision=0.5, recall=0.5, best_conf=0.5)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: metrics)
    outcome = train(settings(epochs=4, patience=1, close_mosaic=0))
    assert outcome.reason == "patience"
    patient = resolve([("command line", {"patience": 100})])
    again = train(patient, resume=outcome.run_dir / "weights" / "last.pt")
    assert again.reason == "completed" and again.result is not None
    assert again.result["epochs_completed"] == 4


@pytest.mark.parametrize("content", ["epoch,box_loss\nabc,1\n1,2\n", "\ufeffepoch,a\n1,2\n", "x\n"])
def test_a_damaged_table_does_not_end_a_run(settings: Settings, content: str) -> None:
    stopped = train(settings(epochs=2), stop=StopAfter(3))
    (stopped.run_dir / "results.csv").write_text(content, encoding="utf-8")
    train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    written = (stopped.run_dir / "results.csv").read_text().splitlines()
    assert written[0].startswith("epoch,") and written[-1].startswith("2,")


@pytest.mark.parametrize("field", ["config", "names", "threads", "fingerprint", "sources"])
def test_an_incomplete_checkpoint_is_said(settings: Settings, field: str) -> None:
    stopped = train(settings(epochs=1), stop=StopAfter(0))
    last = stopped.run_dir / "weights" / "last.pt"
    content = torch.load(last, weights_only=False)
    del content["hsrloop"][field]
    torch.save(content, last)
    with pytest.raises(CheckpointError, match="is incomplete"):
        train(resolve([]), resume=last)


def test_what_an_export_needs_is_checked_when_a_run_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may go on in another installation than the one it was checked in."""
    monkeypatch.setattr(export, "_LIBRARIES", {})
    stopped = train(settings(export="onnx"), stop=StopAfter(1))
    monkeypatch.setattr(export, "_LIBRARIES", {"onnx": ("no_such_library",)})
    with pytest.raises(DependencyError, match="--export onnx needs no_such_library"):
        train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")


@pytest.mark.parametrize("now", [False, True])
def test_a_checkpoint_is_trusted_only_when_that_is_said_now(
    now: bool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says itself of how it was opened before does not count."""
    stopped = train(settings(trust_checkpoint=True), stop=StopAfter(1))
    trusted, real = list[bool](), run.load_base

    def load(*given: Any, trust: bool, **how: Any) -> Any:
        trusted.append(trust)
        return real(*given, trust=trust, **how)

    monkeypatch.setattr(run, "load_base", load)
    told = resolve([("command line", {"trust_checkpoint": True})] if now else [])
    train(told, resume=stopped.run_dir / "weights" / "last.pt")
    assert trusted == [now]
