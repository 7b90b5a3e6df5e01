"""What a run says while it goes: frozen records, and all that any report sees.

Each event turns into one JSON object (`to_json`) and back (`from_json`); `events.jsonl` in the run
folder is that, a line each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; `time` is seconds since the epoch, set by whoever emits."""

    time: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict with the event's type under "event"."""
        return {"event": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A run begins or goes on; `epoch` is the first one to be trained, from 1."""

    run_dir: str
    config: dict[str, Any]
    sources: dict[str, str]
    names: list[str]
    device: str
    train_images: int
    val_images: int
    parameters: int
    groups: list[dict[str, Any]]  # name, lr_scale, weight_decay, parameters
    epochs: int  # to be trained in all; fewer than planned once early stopping has ended it
    epoch: int = 1
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """A counted task before or between epochs: caching, validating, fetching."""

    LOGGED: ClassVar[bool] = False  # too many for events.jsonl

    task: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """An optimizer step; losses are means over the epoch so far, gains applied, not times batch."""

    LOGGED: ClassVar[bool] = False

    epoch: int  # from 1
    epochs: int
    step: int  # optimizer steps of the whole run, from 1
    samples: int  # of this epoch, so far
    epoch_samples: int
    box_loss: float
    cls_loss: float
    dfl_loss: float
    images_per_s: float
    epoch_left_s: float
    run_left_s: float
    memory_bytes: int  # peak on the GPU; 0 on the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochDone(Event):
    """An epoch with its validation; losses as in `StepDone`, metrics of the averaged weights."""

    epoch: int  # from 1
    epochs: int
    box_loss: float
    cls_loss: float
    dfl_loss: float
    ap50: float
    ap50_95: float
    precision: float
    recall: float
    lr: dict[str, float]  # by parameter group
    images_per_s: float
    train_s: float
    val_s: float
    skipped_steps: int  # of this epoch, for loss or gradient that was no finite number
    micro_batch: int  # at the epoch's end, as is imgsz
    imgsz: int
    best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Event):
    """Something the user should know; `level` is "info" or "warning"."""

    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(Event):
    """Memory ran out; the run goes on at smaller settings, from the sample where it stood."""

    cause: str
    change: str  # such as "micro_batch 8 -> 4"
    rung: dict[str, Any]  # records.Rung, after the change
    epoch: int  # epochs completed
    sample: int  # samples of the next epoch already trained
    reason: str  # the error's first line
    rehearsed: bool = False  # it ran out in a rehearsal, no training was lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Climbed(Event):
    """There was room to spare for long after memory ran out: a larger micro-batch is tried."""

    change: str  # such as "micro_batch 4 -> 8"
    rung: dict[str, Any]  # records.Rung, after the change
    epoch: int  # epochs completed


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """Steps or weights were no finite numbers; the run went back, with lower scales."""

    cause: str
    number: int  # of this run's rollbacks, from 1
    most: int  # of them that there may be
    step: int  # optimizer steps done when it was found
    epoch: int  # epochs completed
    sample: int  # samples of the next epoch that stay trained
    lr_scale: float  # of the planned learning rate, from now on
    loss_scale: float  # in fp16; 1 without mixed precision


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A file under weights/ was written; the path is relative to the run folder."""

    path: str
    epoch: int  # epochs completed
    sample: int  # samples of the next epoch already trained


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStopped(Event):
    """A run ended before its last epoch; `reason` is "interrupted"."""

    reason: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """A run reached its end; `result` is the content of training_result.json."""

    run_dir: str
    reason: str  # "completed" or "patience"
    result: dict[str, Any]
    classes: list[dict[str, Any]] = field(default_factory=list)  # records.ClassScore as dicts


class Sink(Protocol):
    """Whoever listens to a run."""

    def handle(self, event: Event) -> None:
        """Take one event; must not raise for an event it does not know."""

    def close(self) -> None:
        """Release what is held; called once, also after an error."""


_KINDS: Mapping[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted,
        Progress,
        StepDone,
        EpochDone,
        Note,
        Recovered,
        Climbed,
        RolledBack,
        CheckpointSaved,
        RunStopped,
        RunFinished,
    )
}


def from_json(data: Mapping[str, Any]) -> Event:
    """Return the event that `to_json` wrote; KeyError for an unknown type."""
    fields = dict(data)
    return _KINDS[fields.pop("event")](**fields)


def is_logged(event: Event) -> bool:
    """Return whether the event belongs in events.jsonl (the frequent ones do not)."""
    return bool(getattr(type(event), "LOGGED", True))
