"""What the loop works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hsrloop.config import TrainConfig
from hsrloop.data.loader import TrainLoader
from hsrloop.data.val_loader import ValLoader
from hsrloop.events import Event
from hsrloop.hardware.contention import SpinGovernor
from hsrloop.hardware.pressure import Pressure
from hsrloop.train.checkpoint import RunIdentity
from hsrloop.train.detector import KeptDetector
from hsrloop.train.graphs import StepGraphs
from hsrloop.train.guard import Guard
from hsrloop.train.profile import StepProfiler
from hsrloop.train.saver import Saver
from hsrloop.train.step import StepSettings, Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a run stands on at a position; rebuilt, never changed."""

    config: TrainConfig
    identity: RunIdentity
    saver: Saver
    train_loader: TrainLoader
    val_loader: ValLoader
    settings: StepSettings
    transaction: Transaction
    guard: Guard
    emit: Callable[[Event], None]
    stop: Callable[[], bool]
    governor: SpinGovernor | None = None  # on the CPU: keeps busy neighbours from stalling us
    pressure: Pressure | None = None  # on a GPU: notices that its memory is too full
    profiler: StepProfiler | None = None
    graphs: StepGraphs = field(default_factory=StepGraphs)
    detector: KeptDetector = field(default_factory=KeptDetector)
