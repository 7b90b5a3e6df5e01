"""What a process that runs are forked from has loaded: everything that takes seconds.

No tensor is computed here: a process that has run OpenMP threads cannot be forked and run them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision  # noqa: F401  (before ultralytics)
import ultralytics.nn.tasks  # noqa: F401

import hsrloop.data.pixels.colour_cpu
import hsrloop.ops.assign_cpu
import hsrloop.ops.loss_cpu  # noqa: F401
from hsrloop.config import resolve
from hsrloop.train.run import train


def run(values: dict[str, Any], resume: str | None) -> None:
    """Train from settings, or go on with a run."""
    if resume is None:
        train(resolve([("test", values)]))
    else:
        train(resolve([]), resume=Path(resume))
