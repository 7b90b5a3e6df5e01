"""How long an epoch takes, and what is said of its steps meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hsrloop.events import StepDone
from hsrloop.train.ladder import MemoryThrashing
from hsrloop.train.runtime import Runtime
from hsrloop.train.state import LOSS_NAMES, TrainState

REPORT_EVERY_S = 0.5


class Meter:
    """Measures an epoch and reports its steps, at most every REPORT_EVERY_S seconds."""

    def __init__(self, state: TrainState, runtime: Runtime) -> None:
        self._state, self._runtime = state, runtime
        self._started = self._reported = self._accounted = time.monotonic()
        self._samples = self._judged_samples = 0
        self._judged = self._started
        if runtime.pressure is not None:
            runtime.pressure.resume()
        self._first = state.position.sample
        if self._first == 0:
            state.epoch_s = 0.0

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Count the time also when memory ran out; a device in that state is not waited for."""
        if kind is None:
            self.settle()
        else:
            self._account()

    def count(self, samples: int) -> None:
        """Count the images of a step, and report if it is time."""
        self._samples += samples
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY_S:
            self._reported = now
            self._runtime.emit(self._event(now))

    def apart(self, work: Callable[[], None]) -> None:
        """Do what is no part of training; its time does not count."""
        began = time.monotonic()
        work()
        spent = time.monotonic() - began
        self._started, self._accounted = self._started + spent, self._accounted + spent
        self._judged += spent

    def judge(self) -> None:
        """Look, after a report, at how the GPU's memory does.

        Raises:
            MemoryThrashing: it is too full to work with.
        """
        pressure = self._runtime.pressure
        if pressure is None or self._reported <= self._judged:
            return
        now = time.monotonic()
        samples, seconds = self._samples - self._judged_samples, now - self._judged
        self._judged, self._judged_samples = now, self._samples
        problem = pressure.observe(samples, seconds)
        if problem is not None:
            raise MemoryThrashing(problem)

    def settle(self) -> None:
        """Add the time spent to the run's and the epoch's; CUDA is waited for."""
        if self._state.device.type == "cuda":
            torch.cuda.synchronize(self._state.device)
        self._account()

    def _account(self) -> None:
        now = time.monotonic()
        spent, self._accounted = now - self._accounted, now
        self._state.epoch_s += spent
        self._state.elapsed_s += spent

    def _event(self, now: float) -> StepDone:
        state, runtime = self._state, self._runtime
        total = runtime.train_loader.n_samples
        rate = self._samples / max(now - self._started, 1e-9)
        position = state.position
        epoch_done = position.sample == 0
        done = total if epoch_done else position.sample
        epoch = position.epoch - 1 if epoch_done else position.epoch
        epochs_left = runtime.config.epochs - state.epochs_skipped - epoch - 1
        losses = runtime.guard.losses(state)
        val_s = state.val_s_per_epoch * (epochs_left + 1)
        cuda = state.device.type == "cuda"
        return StepDone(
            epoch=epoch + 1,
            epochs=runtime.config.epochs - state.epochs_skipped,
            step=state.steps,
            samples=done,
            epoch_samples=total,
            **{name: losses[name] for name in LOSS_NAMES},
            images_per_s=rate,
            epoch_left_s=(total - done) / rate,
            run_left_s=(total - done + epochs_left * total) / rate + val_s,
            memory_bytes=state.peak_bytes if cuda else 0,
        )
