"""Writes checkpoints beside the training: one at a time, in order, each whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsrloop.errors import OutputError
from hsrloop.events import CheckpointSaved, Event, Note
from hsrloop.model.published import half_network, refill
from hsrloop.ops.paths import on_cpu
from hsrloop.train import checkpoint
from hsrloop.train.checkpoint import LAST, PREVIOUS, RunIdentity
from hsrloop.train.snapshot import Snapshot, copy_into
from hsrloop.train.state import TrainState

RETRY_S = 60.0  # between attempts on a disk that is full, while training goes on
END_RETRY_S = 5.0  # the same when there is nothing left but to save
NICE = 10  # of the writer's thread
HANDOVER_S = 1e-4  # for which the writer may keep the interpreter that another thread waits for
END_PATIENCE_S = 120.0  # for which the end of a run waits for room


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One file to be written, and what of the run it holds."""

    name: str
    averages: Mapping[str, Tensor] | None  # None: what the snapshot holds, with the whole state
    metrics: Mapping[str, float]
    epoch: int
    sample: int


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of some jobs, written in order up to the first that failed."""

    written: Sequence[_Job]
    failure: OutputError | None


class Saver:
    """Copies a run's state between two steps, and writes it from a thread of its own.

    Weights (best.pt, epochN.pt) are copied when they are due; the newest of a name waits until it
    is on the disk. last.pt is copied once the writer has nothing else to do, into memory that is
    allocated once, so a slow disk sets the pace. It is written after the weights, so that it never
    tells of a best.pt that is not there. What cannot be written is tried again; what was written
    before stays meanwhile.

    Args:
        weights_dir: where the files go.
        identity: of the run; in every checkpoint.
        emit: hears what was saved and what could not be, on the thread that calls.
        minutes: between timed saves of last.pt; 0 for none.
        last_is_good: whether a last.pt that is there may become the previous one.
        clock: monotonic seconds; replaced in tests, as is `sleep`.
    """

    def __init__(
        self,
        weights_dir: Path,
        identity: RunIdentity,
        emit: Callable[[Event], None],
        *,
        minutes: float,
        last_is_good: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._weights_dir, self._identity, self._emit = weights_dir, identity, emit
        self._every_s = 60 * minutes or float("inf")
        self._last_is_good = last_is_good
        self._clock, self._sleep = clock, sleep
        self._next_at = clock() + self._every_s
        self._snapshot = Snapshot()
        self._network: nn.Module | None = None  # refilled for each file
        self._waiting: dict[str, _Job] = {}  # weights that are not on the disk yet, in order
        self._owed = False  # last.pt could not be written
        self._failure: OutputError | None = None
        self._writer = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoints", initializer=_give_way
        )
        self._writing: Future[_Outcome] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the writer; after an error of the run, weights that wait get one more chance."""
        try:
            if kind is not None and issubclass(kind, Exception):
                self._write_what_waits()
        finally:
            self._writer.shutdown()

    def _write_what_waits(self) -> None:
        self._wait()
        if self._waiting:
            self._writing = self._writer.submit(self._write, [*self._waiting.values()])
            self._wait()
        if self._waiting:
            text = f"{', '.join(self._waiting)} could not be written: {self._failure}"
            self._emit(Note(text=text, level="warning"))

    def reserve(self, state: TrainState) -> None:
        """Allocate what copies need, before training does not want to wait for it.

        Raises:
            RuntimeError, MemoryError: the host has no memory for a copy of the state.
        """
        if self._network is None:
            self._snapshot.take(state)
            names, config = self._identity.names, self._identity.config.to_json()
            self._network = half_network(state.ema.module, names=names, config=config)

    def due(self, state: TrainState) -> bool:
        """Return whether `save` would do something; asked after every step."""
        if self._writing is not None:
            return self._writing.done()
        if self._failure is None and (state.due or self._waiting or self._owed):
            return True
        return self._clock() >= self._next_at

    def save(self, state: TrainState) -> None:
        """Copy what is due, have it written if nothing else is, report what was written.

        Raises:
            RuntimeError, MemoryError: the host has no memory for it; it stays due.
        """
        self._collect()
        self._copy_weights(state)
        if self._writing is None and self.due(state):
            self._start(state)

    def finish(self, state: TrainState) -> None:
        """Return when all that is due is on the disk.

        Raises:
            OutputError: it cannot be written, also after waiting for room.
            RuntimeError, MemoryError: as `save`.
        """
        give_up_at: float | None = None
        self._wait()
        self._copy_weights(state)
        while state.due or self._waiting or self._owed:
            self._start(state)
            self._wait()
            if self._failure is None:
                continue
            if give_up_at is None:
                give_up_at = self._clock() + END_PATIENCE_S
                text = f"{self._failure} Waiting for room for {END_PATIENCE_S:g} s"
                self._emit(Note(text=text, level="warning"))
            if self._clock() >= give_up_at:
                names = ", ".join([*self._waiting, *([LAST] if self._owed else [])])
                raise OutputError(f"{self._failure} Not on the disk: the newest {names}.")
            self._sleep(END_RETRY_S)

    def _copy_weights(self, state: TrainState) -> None:
        for name in [name for name in state.due if name != LAST]:
            averages = averages_of(state)
            if self._failure is not None:  # on a full disk kept epochs would fill the memory too
                for older in [n for n in self._waiting if n.startswith("epoch")]:
                    del self._waiting[older]
                    self._emit(Note(text=f"weights/{older} is given up", level="warning"))
            self._waiting[name] = self._job(name, state, averages)
            state.due.remove(name)

    def _start(self, state: TrainState) -> None:
        """Hand the writer what waits and a last.pt of the state as it is now."""
        self.reserve(state)
        self._snapshot.take(state)
        jobs = [*self._waiting.values(), self._job(LAST, state, None)]
        if LAST in state.due:
            state.due.remove(LAST)
        self._next_at = self._clock() + self._every_s
        beside_gpu = not on_cpu(state.device)
        self._writing = self._writer.submit(self._write, jobs, beside_gpu=beside_gpu)

    def _job(self, name: str, state: TrainState, averages: Mapping[str, Tensor] | None) -> _Job:
        return _Job(
            name=name,
            averages=averages,
            metrics=state.metrics(),
            epoch=len(state.history),
            sample=state.position.sample,
        )

    def _wait(self) -> None:
        if self._writing is not None:
            wait([self._writing])
        self._collect()

    def _collect(self) -> None:
        """Take over and report what the writer has done."""
        if self._writing is None or not self._writing.done():
            return
        outcome, self._writing = self._writing, None
        self._owed = True  # until it is known to be written
        written, failure = outcome.result().written, outcome.result().failure
        for job in written:
            if self._waiting.get(job.name) is job:
                del self._waiting[job.name]
            where = f"weights/{job.name}"
            self._emit(CheckpointSaved(path=where, epoch=job.epoch, sample=job.sample))
        self._owed = failure is not None
        before, self._failure = self._failure, failure
        if failure is not None:
            self._next_at = self._clock() + RETRY_S
        if failure is not None and before is None:
            text = f"{failure} Training goes on, what was saved before is kept; trying again"
            self._emit(Note(text=f"{text} every {RETRY_S:g} s", level="warning"))
        elif failure is None and before is not None:
            self._emit(Note(text="checkpoints are written again"))

    def _write(self, jobs: Sequence[_Job], *, beside_gpu: bool = False) -> _Outcome:
        """Write files one after the other; runs on the writer's thread.

        Args:
            beside_gpu: steps are taken there meanwhile.
        """
        written: list[_Job] = []
        with _quick_handover if beside_gpu else contextlib.nullcontext():
            for job in jobs:
                run = self._snapshot.payload if job.averages is None else None
                if run is not None and not _is_finite(run):
                    continue  # a diverged run is the loop's to end; the last good state stays
                try:
                    self._write_one(job, run)
                except OutputError as error:
                    return _Outcome(written, error)
                written.append(job)
        return _Outcome(written, None)

    def _write_one(self, job: _Job, run: Mapping[str, Any] | None) -> None:
        network, path = self._network, self._weights_dir / job.name
        averages = run["ema"]["module"] if run is not None else job.averages
        assert network is not None and averages is not None
        refill(network, averages)
        whole = checkpoint.content(
            network, self._identity, metrics=job.metrics, epochs=job.epoch, run=run
        )
        previous = self._weights_dir / PREVIOUS if self._last_is_good else None
        try:
            checkpoint.write(path, whole, previous=previous)
        except OutputError as error:
            needed = 2 * sum(p.numel() for p in network.parameters())
            needed += self._snapshot.nbytes if run is not None else 0
            raise OutputError(f"{error} {_room(self._weights_dir, needed)}") from error
        self._last_is_good |= run is not None


def _give_way() -> None:
    """Let training's threads go before this one, where the system has priorities by thread."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError):  # not allowed; a process may have given way further already
        thread = threading.get_native_id()
        given = max(NICE, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, given)


class _QuickHandover:
    """Makes all threads of this process give the interpreter up sooner, while one writes.

    Pickling 1,300 tensors takes it for 80 ms. Beside a GPU a step gives it up some thirty times, at
    each start of a kernel, and would have to wait 5 ms to get it back each time. On the CPU a step
    seldom needs it, and the writer, which gives way to training, had better not hold it often.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writers = 0
        self._usual = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._writers == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(HANDOVER_S)
            self._writers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._writers -= 1
            if self._writers == 0:
                sys.setswitchinterval(self._usual)


_quick_handover = _QuickHandover()


def averages_of(state: TrainState) -> dict[str, Tensor]:
    """Return a copy of the averaged weights on the CPU, by name."""
    averages = state.ema.module.state_dict()
    # Not pinned: it is allocated anew each time.
    copies = {name: torch.empty_like(t, device="cpu") for name, t in averages.items()}
    copy_into([*copies.values()], [*averages.values()])
    if state.device.type == "cuda":
        torch.cuda.current_stream(state.device).synchronize()
    return copies


def _is_finite(run: Mapping[str, Any]) -> bool:
    """Return whether the losses and weights of a payload are numbers; in one thread, by NumPy."""
    tensors = [run["loss_sums"], *run["model"].values(), *run["ema"]["module"].values()]
    floats = [t.numpy() for t in tensors if t.is_floating_point()]
    return all(bool(np.isfinite(values).all()) for values in floats)


def _room(folder: Path, needed: int) -> str:
    """Return what a file needs and what its disk has, in words."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"({folder}: {error.strerror}.)"
    asked, has = math.ceil(needed / 2**20), free // 2**20
    return f"It needs {asked} MiB, the disk has {has} MiB free."
