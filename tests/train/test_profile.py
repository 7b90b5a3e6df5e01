"""A profiled run leaves a trace with the named ranges and a short text; any other run, nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hsrloop.config import Resolved
from hsrloop.events import Note
from hsrloop.ops.ranges import RANGES, named
from hsrloop.train import profile
from hsrloop.train.profile import RECORDED, SKIPPED, WARM, StepProfiler, summary
from hsrloop.train.run import train
from tests.train.conftest import Recorder

Settings = Callable[..., Resolved]


def test_a_profiled_run_names_its_ranges_and_is_the_same_run(
    settings: Settings, recorder: Recorder
) -> None:
    outcome = train(settings(profile=True, epochs=1, batch=1), sinks=[recorder])
    (trace,) = (outcome.run_dir / "tensorboard").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    counts = {
        name: sum(e.get("name") == name and e.get("ph") == "X" for e in events) for name in RANGES
    }
    assert counts.pop("optimizer") == 2 * RECORDED, "clipping and the step"
    assert all(
        counts[name] == RECORDED for name in ("forward", "assign", "loss", "backward", "EMA")
    )
    assert counts["data"] >= RECORDED and counts["render"] >= RECORDED
    text = (outcome.run_dir / "profile.txt").read_text()
    shown = [line.replace("  of it ", "").split()[0] for line in text.splitlines()[1:10]]
    assert shown == ["step", *RANGES]
    assert len(text.splitlines()) == 1 + 9 + 2 + 10
    assert any(text in note.text for note in recorder.of(Note))
    plain = train(settings(epochs=1, batch=1)).run_dir
    assert not (plain / "profile.txt").exists() and not (plain / "tensorboard").exists()
    files = [
        torch.load(d / "weights/last.pt", weights_only=False) for d in (plain, outcome.run_dir)
    ]
    for a, b in zip(*(file["model"].parameters() for file in files), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("of", ["text", "folder"])
def test_a_full_disk_costs_the_profile_and_not_the_run(
    of: str,
    settings: Settings,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(profile, "summary") if of == "text" else (Path, "mkdir"), full)
    recording = StepProfiler(tmp_path, torch.device("cpu"), recorder.handle)
    for _ in range(SKIPPED + WARM + RECORDED):
        recording.step()
    (note,) = recorder.of(Note)
    assert note.level == "warning" and "No space left" in note.text
    monkeypatch.undo()

    monkeypatch.setattr(profile, "summary", full)
    outcome = train(settings(profile=True, epochs=1, batch=1), sinks=[recorder])
    assert outcome.reason == "completed" and not (outcome.run_dir / "profile.txt").exists()
    assert len([n for n in recorder.of(Note) if "profile cannot be written" in n.text]) == 2


def test_a_run_too_short_to_profile_says_so(settings: Settings, recorder: Recorder) -> None:
    outcome = train(settings(profile=True, epochs=1), sinks=[recorder])
    assert not (outcome.run_dir / "profile.txt").exists()
    needed = SKIPPED + WARM + 1
    assert any(f"that takes {needed} steps" in note.text for note in recorder.of(Note))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_name_costs_nothing_when_nobody_profiles() -> None:
    assert named("forward") is named("EMA"), "one object, made beforehand"
    with Seen() as seen, named("forward"):
        pass
    assert not seen.names


def test_operators_are_ranked_by_their_own_time_and_ranges_stand_apart() -> None:
    def average(key: str, host: float, gpu: float) -> Any:
        times = {"cpu_time_total": host, "self_cpu_time_total": host / 2}
        return SimpleNamespace(
            key=key, **times, device_time_total=gpu, self_device_time_total=gpu / 2
        )

    averages = [average(f"op{i}", 1000.0 * i, 500.0 * (20 - i)) for i in range(20)]
    averages += [average("forward", 4e6, 8e6), average("ProfilerStep#4", 9e9, 9e9)]
    on_host = summary(averages, steps=2, cuda=False).splitlines()
    assert on_host[1].split() == ["forward", "2000.00"]
    assert [line.split()[0] for line in on_host[4:]] == [f"op{i}" for i in range(19, 9, -1)]
    on_gpu = summary(averages, steps=2, cuda=True).splitlines()
    assert on_gpu[1].split() == ["forward", "2000.00", "4000.00"]
    assert [line.split()[0] for line in on_gpu[4:]] == [f"op{i}" for i in range(10)]
