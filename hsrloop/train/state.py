"""The only mutable object of a run, and all that a checkpoint holds of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.errors import CheckpointError, first_line
from hsrloop.hardware.peak import peak_bytes, reset_peak
from hsrloop.model.ema import Ema
from hsrloop.ops.loss import GAINS, LossSums
from hsrloop.records import Position, Rung
from hsrloop.train.kinds import misfit, optimizer_misfit

_COUNTERS = (
    "grad_scale",
    "steps",
    "history",
    "best_ap50_95",
    "best_epoch",
    "epochs_skipped",
    "recoveries",
    "climbed",
    "lr_scale",
    "rollbacks",
    "elapsed_s",
    "epoch_s",
    "val_s_per_epoch",
)
# Earlier versions wrote no such fields of a rung.
_LATER = [f.name for f in dataclasses.fields(Rung) if f.default is not dataclasses.MISSING]
LOSS_NAMES = ("box_loss", "cls_loss", "dfl_loss")
METRIC_NAMES = ("ap50", "ap50_95", "precision", "recall")
# What is asked of the rows of lists that begin empty.
_ROWS: Mapping[str, Mapping[str, Any]] = {
    "history": {
        **dict.fromkeys((*LOSS_NAMES, "skipped_steps", *METRIC_NAMES, "best_conf"), 0.0),
        "classes": [{}],
    },
    "recoveries": {"change": "", "epoch": 0, "rung": {}},
    "rollbacks": {},
}


@dataclass(slots=True)
class Commit:
    """What is left to do of a step whose weights have moved; `done` counts what is done.

    Each part allocates before it changes anything, so a part that fails can be done again.
    """

    samples: int
    after: Position
    totals: LossSums
    normaliser: Tensor
    skipped: Tensor  # () bool on the device
    ema_decay: float
    done: int = 0


@dataclass(slots=True)
class TrainState:
    """Weights, their average, the optimizer, and where the run stands.

    `loss_sums` is (6,) float64 on the device: box, cls and dfl loss (normalised, gain-weighted)
    added up over the epoch's steps, the number of these steps, how many more were skipped because
    they were no finite numbers, and how many in a row up to now, over epochs.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    grad_scale: float  # k: keeps un-normalised sums inside fp16's range
    batch: int
    rung: Rung
    loss_sums: Tensor
    position: Position = Position(0, 0)
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per validated epoch
    best_ap50_95: float = -1.0
    best_epoch: int = 0  # from 1; 0: none yet
    epochs_skipped: int = 0  # by early stopping: the schedule jumps over them to its tail
    elapsed_s: float = 0.0
    epoch_s: float = 0.0  # training time of the current epoch
    val_s_per_epoch: float = 0.0  # of the last validation: for the time left
    recoveries: list[dict[str, Any]] = field(default_factory=list)  # events.Recovered as dicts
    climbed: bool = False  # a larger micro-batch was tried again; once is enough
    lr_scale: float = 1.0  # of the planned learning rate; halved by each rollback
    rollbacks: list[dict[str, Any]] = field(default_factory=list)  # events.RolledBack as dicts
    commit: Commit | None = None  # of a step in progress; never saved
    due: list[str] = field(default_factory=list)  # files under weights/ to be saved; never saved
    recorded_bytes: int = 0  # kept by recorded steps beside what is allocated; never saved
    earlier_peak_bytes: int = 0  # before steps were recorded; never saved
    generation: int = 0  # counts up when tensors are replaced, not just changed; never saved

    @property
    def amp(self) -> bool:
        """Whether gradients are scaled (fp16 on CUDA)."""
        return self.scaler.is_enabled()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.loss_sums.device

    @property
    def peak_bytes(self) -> int:
        """The most memory in use so far; on a GPU what recorded steps keep for themselves too."""
        return self.with_recorded(peak_bytes(self.device))

    def with_recorded(self, peak_bytes: int) -> int:
        """Return a peak, counted since steps were recorded, with their memory."""
        return max(self.earlier_peak_bytes, peak_bytes + self.recorded_bytes)

    def renew_scaler(self, saved: Mapping[str, Any]) -> None:
        """Replace the scaler by a fresh one in the saved state: unscaled marks do not survive."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp)
        self.generation += 1
        if saved:
            self.scaler.load_state_dict(dict(saved))

    def count_recorded(self, held_bytes: int) -> None:
        """Note what recorded steps keep for themselves from now on; see `peak_bytes`."""
        self.earlier_peak_bytes, self.recorded_bytes = self.peak_bytes, held_bytes
        reset_peak(self.device)

    def forget_peak(self) -> None:
        """Count `peak_bytes` from here on: an attempt and its recordings are gone."""
        self.earlier_peak_bytes = self.recorded_bytes = 0
        reset_peak(self.device)

    def record_losses(self, totals: LossSums, normaliser: Tensor, skipped: Tensor) -> None:
        """Add one step's losses to the epoch's; nothing is read back from the device."""
        terms = torch.stack(
            (GAINS.box * totals.box, GAINS.cls * totals.cls, GAINS.dfl * totals.dfl)
        )
        terms = terms / normaliser
        # What is no number was not trained on.
        terms = torch.where(skipped, torch.zeros_like(terms), terms)
        counts = torch.stack((~skipped, skipped))
        added = torch.cat((terms.to(self.loss_sums.dtype), counts))
        in_a_row = (self.loss_sums[5:] + 1) * skipped
        self.loss_sums.copy_(torch.cat((self.loss_sums[:5] + added, in_a_row)))

    def begin_epoch(self) -> None:
        """Set the epoch's sums to zero."""
        self.loss_sums[:5].zero_()

    def mean_losses(self) -> dict[str, float]:
        """Return the epoch's mean losses so far and its `skipped_steps`; reads the device once."""
        return mean_losses(self.loss_sums)

    def metrics(self) -> dict[str, float]:
        """Return what is known of the averaged weights as they are: nothing within an epoch."""
        if not self.history or self.position != Position(len(self.history), 0):
            return {}
        return {name: float(self.history[-1][name]) for name in METRIC_NAMES}

    def to_payload(self) -> dict[str, Any]:
        """Return everything as tensors and plain containers; tensors are not copied."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rung": dataclasses.asdict(self.rung),
            "loss_sums": self.loss_sums,
            "position": [self.position.epoch, self.position.sample],
            **{name: getattr(self, name) for name in _COUNTERS},
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def load_file(self, payload: Mapping[str, Any]) -> None:
        """Take over a payload of unknown origin: every value is looked at before any is used.

        Raises:
            CheckpointError: the payload is of another model or optimizer, or none at all.
        """
        with _fitting():
            self._check(payload)
        self.load_payload(payload)

    def load_payload(self, payload: Mapping[str, Any]) -> None:
        """Take over what `to_payload` gave.

        Raises:
            CheckpointError: the payload is of another model or optimizer.
        """
        with _fitting():
            self.model.load_state_dict(payload["model"])
            self.ema.load_state_dict(payload["ema"])
            self.optimizer.load_state_dict(payload["optimizer"])
            self.generation += 1
            if payload["scaler"]:
                self.renew_scaler(payload["scaler"])
            self.loss_sums.copy_(payload["loss_sums"])
            self.position = Position(*payload["position"])
            torch.set_rng_state(payload["torch_rng"].cpu())
            if payload["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(payload["cuda_rng"].cpu())
            self.rung = Rung(**payload["rung"])
            for name in _COUNTERS:
                setattr(self, name, payload[name])
            if self.amp != bool(payload["scaler"]):  # from the CPU to a GPU, or back
                self.grad_scale = initial_grad_scale(self.batch) if self.amp else 1.0

    def _check(self, payload: Mapping[str, Any]) -> None:
        """Raise ValueError where a part is of another kind than this state's own."""
        like = {name: value for name, value in self.to_payload().items() if name not in _ROWS}
        like["rung"] = _known_of(payload["rung"], {**like["rung"], "cache": None})
        like |= {"optimizer": {}, "scaler": {}, "cuda_rng": None, "position": [0]}
        if payload["scaler"]:
            like["scaler"] = torch.amp.GradScaler("cpu").state_dict()
        for name, example in like.items():
            _must_fit(misfit(payload[name], example, name))
        _must_fit(optimizer_misfit(payload["optimizer"], self.optimizer))
        rung = payload["rung"]
        if rung["cache"] not in (True, False, "ram", "disk"):
            raise ValueError(f"rung.cache is {rung['cache']}")
        if min(rung["micro_batch"], rung["val_batch"], rung["imgsz"]) < 1:
            raise ValueError("an empty batch or image")
        for name, row in _ROWS.items():
            rows = payload[name]
            _must_fit(misfit(rows, [{}], name))
            for i, given in enumerate(rows):
                known = {key: given.get(key) for key in row}
                examples = dict(row)
                if "rung" in row:
                    examples["rung"] = _known_of(given.get("rung"), like["rung"])
                _must_fit(misfit(known, examples, f"{name}[{i}]"))
        if min(*payload["position"], payload["steps"], payload["best_epoch"]) < 0:
            raise ValueError("a negative count")
        if payload["best_epoch"] > len(payload["history"]):
            raise ValueError("the best epoch is none of the history")


@contextmanager
def _fitting() -> Iterator[None]:
    """Say in one line that a payload is not one of this run."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"the checkpoint does not fit this model and optimizer ({reason}). "
            "Resume with the settings the run was started with."
        ) from error


def _known_of(found: Any, rung: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example of a rung, without what an earlier version did not write."""
    written = found if isinstance(found, Mapping) else rung
    return {name: rung[name] for name in rung if name in written or name not in _LATER}


def _must_fit(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


def mean_losses(sums: Tensor) -> dict[str, float]:
    """Return mean losses and `skipped_steps` of `TrainState.loss_sums`."""
    box, cls, dfl, steps, skipped, _ = sums.tolist()
    count = max(steps, 1.0)
    means = dict(zip(LOSS_NAMES, (box / count, cls / count, dfl / count), strict=True))
    return {**means, "skipped_steps": skipped}


def initial_grad_scale(batch: int) -> float:
    """Return k for a run: S is about 100 per mosaic image, so sums stay near 1 (a guess)."""
    return 1.0 / (128 * batch)
