"""How a step is recorded as CUDA graphs: what is in them, and what they read and write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hsrloop.errors import first_line, raised_from
from hsrloop.hardware.pressure import memory_use
from hsrloop.ops.loss import LossSums, PaddedTargets
from hsrloop.records import Batch, RawPredictions
from hsrloop.train.halves import Halves
from hsrloop.train.precision import untuned
from hsrloop.train.state import TrainState
from hsrloop.train.step import (
    StepSettings,
    Transaction,
    after_the_weights,
    back_to_logits,
    by_kernels,
    clip,
    normalise,
    step_unless,
    to_input,
    to_targets,
    trained_parameters,
)

T = TypeVar("T")
Replay = Callable[[], object]
ROOMY_SHARE = 0.4  # of the card, at the peak without: recorded memory may come on top (a guess)


class Recorder(Protocol):
    """Records work on a device."""

    def has_room(self) -> bool:
        """Return whether there is memory for what is recorded beside all else."""
        ...

    def held_bytes(self) -> int:
        """Return the memory that recordings keep for themselves and do not use between replays."""
        ...

    def warm(self, work: Callable[[], object]) -> None:
        """Do work once: kernels are chosen and loaded, which cannot be recorded."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[Replay, T]:
        """Record work; whether it is done meanwhile is left open.

        Returns:
            What does it, which keeps alive what it reads, and its result: tensors that hold what
            the newest replay computed.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs that are replayed in turn and share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # What is recorded keeps the stream's priority: images of steps to come are rendered in its
        # gaps, not before it.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def has_room(self) -> bool:
        use = memory_use(str(self._device))
        if use is None:
            return False
        # What is recorded already does not count as in use between replays.
        return use.peak_bytes + self.held_bytes() <= ROOMY_SHARE * use.capacity_bytes

    def held_bytes(self) -> int:
        own = [
            segment
            for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
            if tuple(segment["segment_pool_id"]) == tuple(self._pool)
        ]
        return sum(int(part["total_size"]) - int(part["allocated_size"]) for part in own)

    def warm(self, work: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:  # what is undone after an error comes after what was started
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], T]) -> tuple[Replay, T]:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph, self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        before = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.device(self._device), recording:
                result = work()
        except BaseException:
            self._end_allocation()
            raise
        finally:
            torch.cuda.set_stream(before)  # torch 2.11 leaves its own current after an error

        def replay(_reads: Callable[[], T] = work) -> None:
            graph.replay()

        return replay, result

    def _end_allocation(self) -> None:
        """Let the allocator leave the pool that it goes on with, in torch 2.11, after an error.

        Else it would never again free what several streams use, nor the pool itself.
        """
        index = self._device.index or 0
        with suppress(RuntimeError):  # it has left it
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)


def reason_of(error: BaseException) -> str:
    """Return why work could not be recorded: CUDA says at the end only that something failed."""
    while isinstance(earlier := raised_from(error), RuntimeError | AssertionError):
        error = earlier
    return first_line(error)


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records on a device; None where there is nothing that could."""
    return CudaRecorder(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCriterion:
    """From logits to their gradient."""

    replay: Replay
    targets: PaddedTargets  # read by it; with `step.PLACES`, denser ones go without it
    sums: Tensor  # (4,) parts of the loss, written by `replay`


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Forth and back with micro-batches of one size."""

    forward: Replay
    criterion: RecordedCriterion | None
    backward: Replay  # adds to the sum of gradients
    images: Tensor  # (B, 3, S, S) uint8, read by `forward`
    raw: RawPredictions  # written by `forward`; no gradient
    gradients: list[Tensor]  # of both kinds of logits, read by `backward`


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A step's recordings, and the tensors that the last of them reads."""

    begin: Replay
    passes: Mapping[int, Passes]  # by size
    commit: Replay
    gradients: list[Tensor]  # of the parameters, added up since the last commit
    totals: LossSums
    knobs: Tensor  # (groups + 2,): learning rates, samples / k, and EMA's weight


class _Network:
    """The work of `Passes`, before it is recorded.

    Args:
        total: the parameters' gradients are added to it.
        halves: of the state's network; None: it casts its weights itself, if any.
    """

    def __init__(
        self,
        state: TrainState,
        settings: StepSettings,
        size: int,
        total: list[Tensor],
        halves: Halves | None,
    ) -> None:
        self._state, self._settings, self._total = state, settings, total
        self._halves = halves
        shape = (size, 3, state.rung.imgsz, state.rung.imgsz)
        images = torch.zeros(shape, dtype=torch.uint8, device=settings.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        none = torch.zeros(0, dtype=torch.int64)
        empty = Batch(self.images, torch.zeros(0, 4), none, none, state.position, ends_step=True)
        self.targets = to_targets(empty, settings) if by_kernels(settings) else None
        self._raw: RawPredictions | None = None  # between a forward and its backward
        self._logits: RawPredictions | None = None  # of the latest forward, without gradient
        self.gradients: list[Tensor] = []  # of both kinds of logits

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return both kinds of logits."""
        settings = self._settings
        device, kind = settings.device, settings.amp_dtype
        # Weights that are cast for a recording must not be kept for another.
        with (
            torch.autocast(device.type, kind, enabled=settings.amp, cache_enabled=False),
            nullcontext() if self._halves is None else self._halves.instead(),
        ):
            inputs = to_input(self.images, device, settings.input_dtype)
            self._raw = settings.network(self._state.model, inputs)
        logits = self._raw.box_logits.detach(), self._raw.class_logits.detach()
        self._logits = RawPredictions(*logits, shapes=self._raw.shapes)
        self.gradients = self.gradients or [torch.zeros_like(x) for x in logits]
        return logits

    def criterion(self) -> tuple[Tensor, ...]:
        """Return the parts of the loss, (4,), and the gradient of the latest logits."""
        assert self._logits is not None and self.targets is not None
        sums, found = back_to_logits(self._logits, self.targets, self._state, self._settings)
        return torch.stack(sums.parts).detach(), *found

    def warm(self, recorder: Recorder) -> None:
        """Do all of it once."""
        recorder.warm(self.forward)
        if self.targets is not None:
            recorder.warm(self.criterion)
        recorder.warm(self.backward)

    def backward(self) -> None:
        """Add to the gradients."""
        raw, self._raw = self._raw, None
        assert raw is not None, "there was no forward pass"
        logits, leaves = (raw.box_logits, raw.class_logits), trained_parameters(self._state)
        if self._halves is None:
            found = list(torch.autograd.grad(logits, leaves, self.gradients))
        else:
            halves = torch.autograd.grad(logits, self._halves.leaves(leaves), self.gradients)
            found = self._halves.widened(halves, self._total)
        torch._foreach_add_(self._total, found)

    def recorded(self, recorder: Recorder) -> Passes:
        """Record all of it, once it has been warmed."""
        forward, _ = recorder.record(self.forward)
        raw, criterion = self._logits, None
        assert raw is not None
        if self.targets is not None:
            replay, (sums, *self.gradients) = recorder.record(self.criterion)
            criterion = RecordedCriterion(replay=replay, targets=self.targets, sums=sums)
        backward, _ = recorder.record(self.backward)
        return Passes(
            forward=forward,
            criterion=criterion,
            backward=backward,
            images=self.images,
            raw=raw,
            gradients=self.gradients,
        )


def record(
    recorder: Recorder,
    state: TrainState,
    settings: StepSettings,
    transaction: Transaction,
    sizes: Collection[int],
) -> Recorded | None:
    """Record a step; None: there is no room for that. What is done on the way is undone."""
    if not recorder.has_room():
        return None
    transaction.begin()
    device = settings.device
    gradients = [torch.zeros_like(p) for p in trained_parameters(state)]
    totals = LossSums(*torch.full((4,), torch.nan, dtype=settings.dtype, device=device))
    knobs = torch.zeros(len(state.optimizer.param_groups) + 2, device=device)
    compiled = settings.compiled is not None and settings.compiled.started
    plain = compiled or not settings.amp
    halves = None if plain else Halves(state.model, settings.amp_dtype)
    networks = {size: _Network(state, settings, size, gradients, halves) for size in sorted(sizes)}
    for size, network in networks.items():
        # Kernels are looked for where most steps find them; it takes seconds for each size.
        with untuned(when=size < max(sizes)):
            network.warm(recorder)
    transaction.undo_buffers(torch.ones((), dtype=torch.bool, device=device))
    if not recorder.has_room():
        return None
    passes = {}
    for size, network in networks.items():
        with untuned(when=size < max(sizes)):
            passes[size] = network.recorded(recorder)

    def commit() -> None:
        _commit(state, transaction, gradients, totals, knobs)
        torch._foreach_zero_(gradients)

    # Losses that are no numbers make it a skipped step, which moves nothing but these two.
    scaler, loss_sums = state.scaler.state_dict(), state.loss_sums.clone()
    state.scaler.scale(totals.box)  # makes its tensors, if there are none yet
    try:
        recorder.warm(commit)
        replay_commit, _ = recorder.record(commit)
    finally:
        state.scaler.load_state_dict(scaler)
        state.loss_sums.copy_(loss_sums)
    begin, _ = recorder.record(transaction.begin)
    return Recorded(
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

    def average() -> None:
        state.ema.move(state.model, weight, skipped)

    for part in after_the_weights(state, transaction, (totals, normaliser, skipped), average):
        part()


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
