"""Events of a made-up run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hsrloop.config import resolve
from hsrloop.events import EpochDone, RunFinished, RunStarted

CLASSES = [
    {
        "name": name,
        "images": 4,
        "boxes": 9,
        "precision": 0.5,
        "recall": 0.6,
        "ap50": ap + 0.2,
        "ap50_95": ap,
        "best_conf": 0.4,
    }
    for name, ap in (("cup", 0.7), ("fork", 0.1), ("plate", 0.3))
]


@pytest.fixture
def epoch_done() -> Callable[..., EpochDone]:
    """Return a maker of `EpochDone`, by epoch."""

    def make(epoch: int, **changes: Any) -> EpochDone:
        values: dict[str, Any] = {
            "epoch": epoch, "epochs": 3, "box_loss": 1 / epoch, "cls_loss": 2.0, "dfl_loss": 1.5,
            "ap50": 0.5, "ap50_95": 0.25, "precision": 0.6, "recall": 0.4,
            "lr": {"weights": 1e-3, "biases": 2e-3}, "images_per_s": 12.5, "train_s": 61.0,
            "val_s": 3.0, "skipped_steps": 0, "micro_batch": 4, "imgsz": 64, "best": False,
        }  # fmt: skip
        return EpochDone(**{**values, **changes})

    return make


@pytest.fixture
def run_started() -> RunStarted:
    """Return the first event of a run with two chosen settings."""
    resolved = resolve([("tier low", {"batch": 8}), ("command line", {"lr0": 0.002})])
    return RunStarted(
        run_dir="runs/competition_20260101_000000",
        config=resolved.config.to_json(),
        sources=dict(resolved.sources),
        names=["cup", "fork", "plate"],
        device="CPU",
        train_images=80,
        val_images=20,
        parameters=3_200_000,
        epochs=100,
        groups=[
            {"name": "weights", "lr_scale": 0.5, "weight_decay": 5e-4, "parameters": 3_100_000}
        ],
    )


@pytest.fixture
def run_finished() -> RunFinished:
    """Return the last event of a run."""
    return RunFinished(
        run_dir="runs/competition_20260101_000000",
        reason="patience",
        result={
            "best_model_path": "weights/best.pt",
            "metrics": {"mAP50": 0.9, "mAP50-95": 0.6, "precision": 0.8, "recall": 0.7},
            "epochs_completed": 3,
            "training_time_minutes": 12.5,
            "best_confidence": 0.37,
        },
        classes=CLASSES,
    )
