"""Short real runs, shared by the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.config import Resolved, resolve
from hsrloop.events import Event
from hsrloop.model.yolo import reg_max, strides
from hsrloop.train.build import build_state, load_model
from hsrloop.train.fits import Fits
from hsrloop.train.rehearsal import Rehearsal
from hsrloop.train.step import StepSettings, Transaction


class Recorder:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1

    def of(self, kind: type[Event]) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind)]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def run_settings(dataset: Path, output: Path, /, **changes: Any) -> Resolved:
    """Settings of a run of seconds; `changes` count as given on the command line."""
    base = {
        "dataset": str(dataset),
        "model": "yolov8n.yaml",
        "output": str(output),
        "device": "cpu",
        "epochs": 3,
        "batch": 4,
        "imgsz": 64,
        "tensorboard": False,
        "patience": 0,
    }
    return resolve([("test", base), ("command line", changes)])


@pytest.fixture
def settings(tiny_dataset: Path, tmp_path: Path) -> Callable[..., Resolved]:
    """`run_settings` on this test's own data set and output."""
    return lambda **changes: run_settings(tiny_dataset, tmp_path / "runs", **changes)


@pytest.fixture
def fits(tmp_path: Path) -> Fits:
    return Fits("key", tmp_path / "cache" / "fits.json")


def make_rehearsal(tmp_path: Path, fits: Fits, device: torch.device) -> Rehearsal:
    """A rehearsal of batch 6 in micro-batches of 4 at 64 px, on a state of its own."""
    resolved = run_settings(tmp_path, tmp_path, batch=6, micro_batch=4)
    _, base = load_model(resolved, ("a", "b"), emit=lambda event: None)
    state = build_state(resolved.config, base.module, device, fresh_share=None, amp=True)
    settings = StepSettings(
        device=device,
        strides=strides(base.module),
        reg_max=reg_max(base.module),
        amp=device.type == "cuda",  # the scaler is on all the same: it is part of the state
        ema_decay=0.9999,
        ema_tau=2000,
    )
    return Rehearsal(
        state=state,
        config=resolved.config,
        settings=settings,
        transaction=Transaction(state),
        boxes=5,
        classes=2,
        fits=fits,
        emit=lambda event: None,
    )


@pytest.fixture
def made(tmp_path: Path, fits: Fits) -> Rehearsal:
    """A rehearsal on the CPU."""
    return make_rehearsal(tmp_path, fits, torch.device("cpu"))
