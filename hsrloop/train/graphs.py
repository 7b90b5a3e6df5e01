"""A step recorded once and started whole: CUDA graphs, where a card has room for them.

A fast card runs a small network's kernels faster than the host can start them, one by one. What is
the same in every step is therefore recorded: the network's forward pass, the criterion where its
shapes do not follow the boxes, the backward pass, and all from the gradient to the commit. A
recorded step gives the same numbers, bit for bit, as `step.train_step`.

What a recording works on stays where it is: its memory is the run's until it is dropped. So there
is none where memory is short, and recordings are the first to go when it runs out beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from hsrloop.events import Event, Note
from hsrloop.hardware.memory import release_gpu_memory
from hsrloop.ops.loss import LossSums
from hsrloop.ops.ranges import named
from hsrloop.ops.schedule import ema_decay
from hsrloop.records import Batch
from hsrloop.train.detector import RecordedDetections
from hsrloop.train.recording import Passes, Recorded, Recorder, reason_of, record, recorder_for
from hsrloop.train.state import TrainState
from hsrloop.train.step import (
    StepSettings,
    Transaction,
    add_detached,
    back_to_logits,
    is_single,
    set_rates,
    to_targets,
    train_step,
)


class StepGraphs:
    """Takes the steps of a run, recorded where they can be."""

    def __init__(self) -> None:
        self._recorded: Recorded | None = None
        self._recorder: Recorder | None = None
        self.detections: RecordedDetections | None = None  # in the memory of the steps
        self._counted = -1  # of them, beside the steps
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
            emit: hears why it cannot be done.
        """
        imgsz, compiled = state.rung.imgsz, settings.compiled
        many = frozenset(size for size in sizes if not is_single(size, imgsz, settings))
        started = compiled is not None and compiled.started
        of = state.generation, state.grad_scale, many, imgsz, started
        if of == self._of or not state.rung.cuda_graphs or self._impossible:
            return
        self.drop()
        self._of = of
        if state.recorded_bytes:
            state.count_recorded(0)
        recorder = recorder_for(settings.device)
        if recorder is None or not many:
            return
        try:
            self._recorded = record(recorder, state, settings, transaction, many)
        except (RuntimeError, AssertionError) as error:
            transaction.roll_back()
            self._impossible = True
            why = reason_of(error)
            text = f"steps cannot be recorded as CUDA graphs ({why}); they are taken one by one"
            emit(Note(text=text, level="warning"))
        if self._recorded is not None:
            self._recorder, self.detections = recorder, RecordedDetections(recorder)
            self.count(state)
        else:
            release_gpu_memory()  # of the stream that it was tried on

    def count(self, state: TrainState) -> None:
        """Let the state know what the recordings hold, if there are more than the last time."""
        if self._recorder is None or self.detections is None:
            return
        if self._counted != self.detections.recordings:
            self._counted = self.detections.recordings
            state.count_recorded(self._recorder.held_bytes())

    def drop(self) -> None:
        """Give the recordings' memory back."""
        self._recorded = self._recorder = self.detections = None
        self._of, self._counted = (), -1

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
        knobs = torch.tensor(
            [*set_rates(state, lr), samples / state.grad_scale, 1.0 - decay],
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


def _pass(passes: Passes, state: TrainState, batch: Batch, settings: StepSettings) -> LossSums:
    """Take one micro-batch forth and back; see `step.forward_backward`."""
    recorded = passes.criterion
    passes.images.copy_(batch.images, non_blocking=True)
    targets = to_targets(batch, settings)
    with named("forward"):
        passes.forward()
    if recorded is not None and targets.labels.shape == recorded.targets.labels.shape:
        torch._foreach_copy_(recorded.targets.tensors, targets.tensors)
        with named("loss"):
            recorded.replay()
        sums = LossSums(*recorded.sums.clone())  # the next micro-batch overwrites them
    else:
        sums, gradients = back_to_logits(passes.raw, targets, state, settings)
        torch._foreach_copy_(passes.gradients, gradients)
    with named("backward"):
        passes.backward()
    return sums
