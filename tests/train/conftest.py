"""Short real runs, shared by the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsrloop.config import Resolved, resolve
from hsrloop.events import Event


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
