"""Running the command in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hsrloop.cli import run
from hsrloop.cli.main import main
from hsrloop.config import Resolved
from hsrloop.hardware import probe as probe_module
from hsrloop.records import DeviceInfo, Metrics, Rung
from hsrloop.train import run as train_run
from hsrloop.train import validation

Invoke = Callable[..., Result]
RUNG = Rung(micro_batch=4, imgsz=64, cache=False, workers=0, val_batch=4, bank="cv2")


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Return a function that runs `hsrloop` with the arguments given."""
    monkeypatch.setattr(gc, "freeze", lambda: None)  # the process goes on, with other garbage
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@dataclass
class Calls:
    """What the command asked of the run, and what it is answered."""

    trained: list[tuple[Resolved, Path | None]] = field(default_factory=list)
    validated: list[Resolved] = field(default_factory=list)
    exported: list[tuple[Path, str, int]] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)  # devices
    reason: str = "completed"
    signum: int = 0
    metrics: Metrics | None = None

    @property
    def resolved(self) -> Resolved:
        """The settings of the only run."""
        ((resolved, _),) = self.trained
        return resolved


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Calls]:
    """Replace training, validation, export and the probe; yield what they were asked."""
    calls = Calls()

    def train(resolved: Resolved, *, resume: Path | None, sinks: Any, stop: Any) -> Any:
        calls.trained.append((resolved, resume))
        if calls.reason == "interrupted":
            stop.signum = calls.signum
            return train_run.Outcome(
                run_dir=tmp_path, reason=calls.reason, rung=RUNG, peak_memory_bytes=0, result=None
            )
        result = {"best_model_path": "weights/best.pt", "config": resolved.config.to_json()}
        return train_run.Outcome(
            run_dir=tmp_path, reason=calls.reason, rung=RUNG, peak_memory_bytes=0, result=result
        )

    def validate(resolved: Resolved, *, sinks: Any, stop: Any) -> Metrics | None:
        calls.validated.append(resolved)
        return calls.metrics

    def export(path: Path, form: str, *, imgsz: int) -> Path:
        calls.exported.append((path, form, imgsz))
        return path.with_suffix(f".{form}")

    monkeypatch.setattr(train_run, "train", train)
    monkeypatch.setattr(validation, "validate", validate)
    monkeypatch.setattr(run, "_export", export)
    monkeypatch.setattr(run, "prepare", calls.prepared.append)
    monkeypatch.setattr(run.Stop, "listen", lambda self: None)
    monkeypatch.setattr(
        probe_module,
        "probe",
        lambda device: DeviceInfo(kind="cuda", name="Fake", total_bytes=8 * 2**30 - 2**28),
    )
    yield calls
