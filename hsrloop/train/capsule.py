"""A step that went wrong, in one file: all that is needed to take it again, without the data set.

The file holds plain containers and tensors only, so that opening one runs nothing.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.config import TrainConfig
from hsrloop.data.loader import TrainLoader
from hsrloop.data.plan import AugmentPlan
from hsrloop.data.stream import TrainStream
from hsrloop.errors import CheckpointError, ConfigError, DivergedError, HsrloopError, first_line
from hsrloop.model.blueprint import blueprint
from hsrloop.model.safe_load import read_checkpoint
from hsrloop.records import Batch, Position
from hsrloop.train.checkpoint import RunIdentity, write_atomically
from hsrloop.train.guard import LastStep
from hsrloop.train.state import TrainState
from hsrloop.train.step import (
    StepSettings,
    Transaction,
    accumulate,
    trained_parameters,
)
from hsrloop.train.trace import traced

FORMAT = 1
_KEY = "hsrloop_capsule"
NUMBERS = ("box", "cls", "dfl", "target_scores", "norm", "before")  # of `Measured`


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a step computed: sums over its samples, the norm of the normalised gradient, a trace."""

    box: float
    cls: float
    dfl: float
    target_scores: float
    norm: float
    before: float  # as the names below: of `Trace`
    first_output: str
    first_gradient: str

    def same(self, other: Measured) -> bool:
        """Return whether both are equal to the last bit; what is no number equals itself."""
        names = (self.first_output, self.first_gradient)
        return names == (other.first_output, other.first_gradient) and all(
            a == b or (a != a and b != b) for a, b in self._numbers(other)
        )

    def like(self, other: Measured) -> bool:
        """Return whether the same of both are finite."""
        return all(math.isfinite(a) == math.isfinite(b) for a, b in self._numbers(other))

    def _numbers(self, other: Measured) -> Iterator[tuple[float, float]]:
        for name in NUMBERS:
            yield getattr(self, name), getattr(other, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capsule:
    """A capsule read back; `state` is a payload of `TrainState`, from before the step."""

    cause: str
    config: TrainConfig
    names: tuple[str, ...]
    fingerprint: str  # of the data set
    versions: Mapping[str, str]
    threads: int
    fresh_share: float | None
    network: Mapping[str, Any]  # a blueprint
    device: str  # "cuda" or "cpu"
    amp: bool
    lr: float  # of the step, before the groups' factors
    state: Mapping[str, Any]
    batches: tuple[Batch, ...]
    plans: Sequence[Mapping[str, Any]]  # of each image, `AugmentPlan` as a dict
    sources: Mapping[int, Mapping[str, Any]]  # what plans refer to: path, boxes_cxcywh, labels
    cutouts: Mapping[int, str]  # paths
    measured: Measured


def diverged(
    state: TrainState,
    transaction: Transaction,
    last: LastStep | None,
    *,
    cause: str,
    run_dir: Path,
    identity: RunIdentity,
    settings: StepSettings,
    loader: TrainLoader,
) -> DivergedError:
    """Return the error that ends a diverged run; its last step is left in a capsule.

    Where no capsule can be written the error says why.
    """
    path = run_dir / f"capsule_{state.steps:06d}.pt"
    if last is None:
        kept = ""
    else:
        try:
            content = _content(state, transaction, last, cause, identity, settings, loader.stream)
            write_atomically(path, lambda file: torch.save({_KEY: content}, file))
            kept = f" To see its last step: hsrloop replay {shlex.quote(str(path))}"
        except (HsrloopError, RuntimeError, MemoryError) as error:  # a full disk, or full memory
            reason = first_line(error)
            kept = f" Its last step could not be kept: {reason}"
    lr0, tried = identity.config.lr0, len(state.rollbacks)
    went = f"It went back {tried} times, to {state.lr_scale:g} of the learning rate. "
    return DivergedError(
        f"Training diverged in epoch {len(state.history) + 1}: {cause}. {went if tried else ''}"
        f"What was saved before stays as it is. Start again with a smaller learning rate, such "
        f"as --lr0 {lr0 / 10:g}; if that does not help, look the data over: hsrloop check.{kept}"
    )


def measure(state: TrainState, micro_batches: Iterable[Batch], settings: StepSettings) -> Measured:
    """Compute a step up to its gradient, which stays in `grad`; BatchNorm's buffers move."""
    with traced(state.model) as trace:
        sought = accumulate(state, micro_batches, settings)
    norm = nn.utils.get_total_norm(
        [p.grad for p in trained_parameters(state) if p.grad is not None]
    )
    totals = sought.totals
    return Measured(
        box=float(totals.box),
        cls=float(totals.cls),
        dfl=float(totals.dfl),
        target_scores=float(totals.target_scores),
        norm=float(norm),
        before=trace.before,
        first_output=trace.output,
        first_gradient=trace.gradient,
    )


def _content(
    state: TrainState,
    transaction: Transaction,
    last: LastStep,
    cause: str,
    identity: RunIdentity,
    settings: StepSettings,
    stream: TrainStream,
) -> dict[str, Any]:
    """Return what the file holds; the step is taken again, up to its gradient, to measure it."""
    payload = _before(state, last)
    state.renew_scaler(payload["scaler"])
    transaction.begin()
    measured = measure(state, last.micro_batches, settings)
    transaction.roll_back()
    count = sum(len(batch.images) for batch in last.micro_batches)
    order = stream.order(last.start.epoch)[last.start.sample :][:count]
    plans = [stream.plan(last.start.epoch, int(i), mosaic=last.mosaic) for i in order]
    return {
        "format": FORMAT,
        "cause": cause,
        "config": identity.config.to_json(),
        "names": list(identity.names),
        "fingerprint": identity.fingerprint,
        "versions": dict(identity.versions),
        "threads": identity.threads,
        "fresh_share": identity.fresh_share,
        "network": blueprint(state.model),
        "device": state.device.type,
        "amp": state.amp,
        "lr": last.lr,
        "state": payload,
        "batches": [_plain(batch) for batch in last.micro_batches],
        "plans": [dataclasses.asdict(plan) for plan in plans],
        "sources": _sources(plans, stream),
        "cutouts": {p.cutout: str(stream.cutouts[p.cutout].path) for x in plans for p in x.pastes},
        "measured": dataclasses.asdict(measured),
    }


def _before(state: TrainState, last: LastStep) -> dict[str, Any]:
    """Return the state from before a step: a skipped one moved counters and loss scale alone.

    Where it was not skipped the weights are those after it, which are what is wrong.
    """
    payload = state.to_payload()
    payload["position"] = [last.start.epoch, last.start.sample]
    payload["steps"] -= 1
    payload["ema"] = {**payload["ema"], "updates": payload["ema"]["updates"] - 1}
    if state.loss_sums[5]:
        payload["loss_sums"] = state.loss_sums.clone()
        payload["loss_sums"][4:] -= 1
        if state.amp:
            scaler = payload["scaler"]
            payload["scaler"] = {**scaler, "scale": scaler["scale"] / scaler["backoff_factor"]}
    return payload


def _plain(batch: Batch) -> dict[str, Any]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    fields["after"] = [batch.after.epoch, batch.after.sample]
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in fields.items()}


def _sources(plans: Sequence[AugmentPlan], stream: TrainStream) -> dict[int, dict[str, Any]]:
    parts = [part for plan in plans for part in (plan, plan.mix) if part is not None]
    used = sorted({layer.source for part in parts for layer in part.layers})
    refs = {index: stream.images[index] for index in used}
    return {
        index: {
            "path": str(ref.path),
            "boxes_cxcywh": ref.boxes_cxcywh.tolist(),
            "labels": ref.labels.tolist(),
        }
        for index, ref in refs.items()
    }


def read(path: Path) -> Capsule:
    """Read a capsule; nothing in the file is run.

    Raises:
        WeightsError: not there, damaged, or holding more than plain values and tensors.
        CheckpointError: no capsule, an incomplete one, or one of another version.
    """
    content = read_checkpoint(path).get(_KEY)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no capsule of this version of hsrloop; replay takes RUN/capsule_N.pt."
        )
    try:
        return Capsule(
            config=TrainConfig.from_json(content["config"]),
            names=tuple(content["names"]),
            batches=tuple(_batch(fields) for fields in content["batches"]),
            measured=Measured(**content["measured"]),
            **{
                field.name: content[field.name]
                for field in dataclasses.fields(Capsule)
                if field.name not in ("config", "names", "batches", "measured")
            },
        )
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is an incomplete capsule ({error}).") from error


def _batch(fields: Mapping[str, Any]) -> Batch:
    return Batch(**{**fields, "after": Position(*fields["after"])})
