"""A step recorded once and started whole: CUDA graphs, where a card has room for them.

A fast card runs a small network's kernels faster than the host can start them, one by one. What is
the same in every step is therefore recorded: the network's forward pass, its backward pass, and
all from the gradient to the commit. In between the criterion runs as ever, since its shapes follow
the boxes. A recorded step gives the same numbers, bit for bit, as `step.train_step`.

What a recording works on stays where it is: its memory is the run's until it is dropped. So there
is none where memory is short, or ran out before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hsrloop.events import Event, Note
from hsrloop.hardware.pressure import memory_use
from hsrloop.ops.loss import GAINS, LossSums
from hsrloop.ops.ranges import named
from hsrloop.ops.schedule import ema_decay
from hsrloop.records import Batch, RawPredictions
from hsrloop.train.ladder import cause_of
from hsrloop.train.precision import untuned
from hsrloop.train.state import TrainState
from hsrloop.train.step import (
    StepSettings,
    Transaction,
    add_detached,
    clip,
    is_single,
    normalise,
    rates,
    step_unless,
    to_input,
    to_targets,
    train_step,
    trained_parameters,
)

T = TypeVar("T")
Replay = Callable[[], object]
ROOMY_SHARE = 0.3  # of the card, at the peak without: recorded memory may come on top (a guess)


class Recorder(Protocol):
    """Records work on a device."""

    def has_room(self) -> bool:
        """Return whether there is memory for what is recorded beside all else."""
        ...

    def warm(self, work: Callable[[], object]) -> None:
        """Do work once: kernels are chosen and loaded, which cannot be recorded."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[Replay, T]:
        """Record work; whether it is done meanwhile is left open.

        Returns:
            What does it, and its result: tensors that hold what the newest replay computed.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs that are replayed in turn and share their memory; for one recording."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def has_room(self) -> bool:
        use = memory_use(str(self._device))
        return use is not None and use.peak_bytes <= ROOMY_SHARE * use.capacity_bytes

    def warm(self, work: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], T]) -> tuple[Replay, T]:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph, self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(self._device), recording:
            result = work()
        return graph.replay, result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """Forth and back with micro-batches of one size."""

    forward: Replay
    backward: Replay  # adds to the sum of gradients
    images: Tensor  # (B, 3, S, S) uint8, read by `forward`
    raw: RawPredictions  # written by `forward`; no gradient
    gradients: list[Tensor]  # of both kinds of logits, read by `backward`


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """A step's recordings, and the tensors that the last of them reads."""

    begin: Replay
    passes: Mapping[int, _Passes]  # by size
    commit: Replay
    gradients: list[Tensor]  # of the parameters, added up since the last commit
    totals: LossSums
    knobs: Tensor  # (groups + 2,): learning rates, samples / k, and EMA's weight


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what makes one recording; None where there is nothing that could."""
    return CudaRecorder(device) if device.type == "cuda" else None


class StepGraphs:
    """Takes the steps of a run, recorded where they can be."""

    def __init__(self) -> None:
        self._recorded: _Recorded | None = None
        self._of: tuple[object, ...] = ()  # what the recordings, if any, belong to
        self._impossible = False

    def prepare(
        self,
        state: TrainState,
        settings: StepSettings,
        transaction: Transaction,
        sizes: Collection[int],
        emit: Callable[[Event], None],
    ) -> None:
        """Record steps of the state's rung, unless that is done, not wanted, or memory is short.

        Nothing else may use the device meanwhile; the state stays as it is, bit for bit.

        Args:
            sizes: of the micro-batches to come.

        Raises:
            torch.OutOfMemoryError: there was less room than it seemed.
        """
        imgsz, compiled = state.rung.imgsz, settings.compiled
        many = frozenset(size for size in sizes if not is_single(size, imgsz, settings))
        of = state.generation, many, imgsz, compiled is not None and compiled.started
        if of == self._of or not settings.graphs or self._impossible:
            return
        self.drop()
        self._of = of
        recorder = None if state.recoveries else recorder_for(settings.device)
        if recorder is None or not many:
            return
        try:
            self._recorded = _record(recorder, state, settings, transaction, many)
        except RuntimeError as error:
            transaction.roll_back()
            if cause_of(error) is not None:
                raise
            self._impossible = True
            reason = str(error).splitlines()[0]
            text = f"steps cannot be recorded as CUDA graphs ({reason}); they are taken one by one"
            emit(Note(text=text, level="warning"))

    def drop(self) -> None:
        """Give the recordings' memory back."""
        self._recorded, self._of = None, ()

    def covers(self, micro_batches: Sequence[Batch]) -> bool:
        """Return whether there are recordings for all of these."""
        passes = self._recorded.passes if self._recorded is not None else {}
        found = [passes.get(len(batch.images)) for batch in micro_batches]
        return all(
            own is not None and own.images.shape == batch.images.shape
            for own, batch in zip(found, micro_batches, strict=True)
        )

    @property
    def gradients(self) -> list[Tensor]:
        """What `accumulate` leaves, by trained parameter; empty where nothing is recorded."""
        return [] if self._recorded is None else self._recorded.gradients

    def begin(self, transaction: Transaction) -> None:
        """Begin the transaction of a step."""
        if self._recorded is None:
            transaction.begin()
        else:
            self._recorded.begin()

    def train_step(
        self,
        state: TrainState,
        micro_batches: Sequence[Batch],
        *,
        settings: StepSettings,
        lr: float,
        transaction: Transaction,
    ) -> int:
        """Run one optimizer step and commit it; see `step.train_step`."""
        recorded = self._recorded
        if recorded is None or not self.covers(micro_batches):
            return train_step(
                state, micro_batches, settings=settings, lr=lr, transaction=transaction
            )
        totals, samples = self.accumulate(state, micro_batches, settings)
        decay = ema_decay(state.steps + 1, decay=settings.ema_decay, tau=settings.ema_tau)
        group_rates = rates(state, lr)
        for group, rate in zip(state.optimizer.param_groups, group_rates, strict=True):
            group["lr"] = rate
        knobs = torch.tensor(
            [*group_rates, samples / state.grad_scale, 1.0 - decay],
            pin_memory=recorded.knobs.is_cuda,
        )
        recorded.knobs.copy_(knobs, non_blocking=True)
        torch._foreach_copy_(recorded.totals.parts, totals.parts)
        with named("optimizer"):
            recorded.commit()
        state.ema.updates += 1
        state.steps += 1
        state.position = micro_batches[-1].after
        return samples

    def accumulate(
        self, state: TrainState, micro_batches: Sequence[Batch], settings: StepSettings
    ) -> tuple[LossSums, int]:
        """Leave the gradient of k times the un-normalised loss where `commit` finds it.

        Returns:
            The sums and the number of samples.
        """
        assert self._recorded is not None
        totals: LossSums | None = None
        for batch in micro_batches:
            passes = self._recorded.passes[len(batch.images)]
            totals = add_detached(totals, _pass(passes, state, batch, settings))
        assert totals is not None, "a step needs at least one micro-batch"
        return totals, sum(len(batch.images) for batch in micro_batches)


def _pass(passes: _Passes, state: TrainState, batch: Batch, settings: StepSettings) -> LossSums:
    """Take one micro-batch forth and back; see `step.forward_backward`."""
    passes.images.copy_(batch.images, non_blocking=True)
    targets = to_targets(batch, settings.device)
    with named("forward"):
        passes.forward()
    box = passes.raw.box_logits.detach().requires_grad_()
    cls = passes.raw.class_logits.detach().requires_grad_()
    raw = RawPredictions(box, cls, passes.raw.shapes)
    sums = settings.criterion(raw, settings.strides, targets, reg_max=settings.reg_max)
    with named("backward"):
        loss = state.scaler.scale(GAINS.weigh(sums) * state.grad_scale)
        torch._foreach_copy_(passes.gradients, torch.autograd.grad(loss, (box, cls)))
        passes.backward()
    return sums


class _Network:
    """The work of `_Passes`, before it is recorded.

    Args:
        total: the parameters' gradients are added to it.
    """

    def __init__(
        self, state: TrainState, settings: StepSettings, size: int, total: list[Tensor]
    ) -> None:
        self._state, self._settings, self._total = state, settings, total
        shape = (size, 3, state.rung.imgsz, state.rung.imgsz)
        images = torch.zeros(shape, dtype=torch.uint8, device=settings.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self._raw: RawPredictions | None = None  # between a forward and its backward
        self.shapes: tuple[tuple[int, int], ...] = ()
        self.gradients: list[Tensor] = []  # of both kinds of logits

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return both kinds of logits."""
        settings = self._settings
        device, kind = settings.device, settings.amp_dtype
        # Weights that are cast for a recording must not be kept for another.
        with torch.autocast(device.type, kind, enabled=settings.amp, cache_enabled=False):
            inputs = to_input(self.images, device, settings.dtype)
            self._raw = settings.network(self._state.model, inputs)
        self.shapes = self._raw.shapes
        logits = self._raw.box_logits.detach(), self._raw.class_logits.detach()
        self.gradients = self.gradients or [torch.zeros_like(x) for x in logits]
        return logits

    def backward(self) -> None:
        """Add to the gradients."""
        raw, self._raw = self._raw, None
        assert raw is not None, "there was no forward pass"
        logits, parameters = (raw.box_logits, raw.class_logits), trained_parameters(self._state)
        found = torch.autograd.grad(logits, parameters, self.gradients)
        torch._foreach_add_(self._total, found)

    def recorded(self, recorder: Recorder) -> _Passes:
        """Record both, once they have been warmed."""
        forward, logits = recorder.record(self.forward)
        backward, _ = recorder.record(self.backward)
        return _Passes(
            forward=forward,
            backward=backward,
            images=self.images,
            raw=RawPredictions(*logits, shapes=self.shapes),
            gradients=self.gradients,
        )


def _record(
    recorder: Recorder,
    state: TrainState,
    settings: StepSettings,
    transaction: Transaction,
    sizes: Collection[int],
) -> _Recorded | None:
    """Record a step; None: there is no room for that. What is done on the way is undone."""
    device = settings.device
    gradients = [torch.zeros_like(p) for p in trained_parameters(state)]
    totals = LossSums(*torch.full((4,), torch.nan, dtype=settings.dtype, device=device))
    knobs = torch.zeros(len(state.optimizer.param_groups) + 2, device=device)
    networks = {size: _Network(state, settings, size, gradients) for size in sorted(sizes)}
    transaction.begin()
    for size, network in networks.items():
        # Kernels are looked for where most steps find them; it takes seconds for each size.
        with nullcontext() if size == max(sizes) else untuned():
            recorder.warm(network.forward)
            recorder.warm(network.backward)
    if not recorder.has_room():
        transaction.roll_back()
        return None
    passes = {}
    for size, network in networks.items():
        with nullcontext() if size == max(sizes) else untuned():
            passes[size] = network.recorded(recorder)

    def commit() -> None:
        _commit(state, transaction, gradients, totals, knobs)
        torch._foreach_zero_(gradients)

    # Losses that are no numbers make it a skipped step, which moves nothing but these two.
    scaler, loss_sums = state.scaler.state_dict(), state.loss_sums.clone()
    state.scaler.scale(totals.box)  # makes its tensors, if there are none yet
    recorder.warm(commit)
    replay_commit, _ = recorder.record(commit)
    state.scaler.load_state_dict(scaler)
    state.loss_sums.copy_(loss_sums)
    begin, _ = recorder.record(transaction.begin)
    return _Recorded(
        begin=begin,
        passes=passes,
        commit=replay_commit,
        gradients=gradients,
        totals=totals,
        knobs=knobs,
    )


def _commit(
    state: TrainState,
    transaction: Transaction,
    gradients: Sequence[Tensor],
    totals: LossSums,
    knobs: Tensor,
) -> None:
    """Do what `step.train_step` does with a gradient, as far as it is the device's work."""
    *group_rates, factor, weight = knobs.unbind()
    for parameter, gradient in zip(trained_parameters(state), gradients, strict=True):
        parameter.grad = gradient
    normaliser = normalise(state, totals, factor)
    skipped = clip(state, totals)
    with rates_on_device(state.optimizer, group_rates):
        step_unless(skipped, state.optimizer)
    state.optimizer.zero_grad(set_to_none=True)
    transaction.undo_buffers(skipped)
    state.scaler.update()
    state.ema.move(state.model, weight, skipped)
    state.record_losses(totals, normaliser, skipped)


@contextmanager
def rates_on_device(optimizer: torch.optim.Optimizer, group_rates: list[Tensor]) -> Iterator[None]:
    """Let a fused optimizer read its learning rates from the device meanwhile."""
    groups = optimizer.param_groups
    names = ("lr", "capturable")
    kept: list[dict[str, Any]] = [{k: group[k] for k in names if k in group} for group in groups]
    recording = group_rates[0].is_cuda and torch.cuda.is_current_stream_capturing()
    for group, values, rate in zip(groups, kept, group_rates, strict=True):
        group.update(dict.fromkeys(values, recording) | {"lr": rate})
    try:
        yield
    finally:
        for group, values in zip(groups, kept, strict=True):
            group.update(values)
