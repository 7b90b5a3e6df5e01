"""Writes checkpoints beside the training: one at a time, in order, each whole or not at all."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hsrloop.errors import OutputError
from hsrloop.events import CheckpointSaved, Event, Note
from hsrloop.train import checkpoint
from hsrloop.train.checkpoint import RunIdentity
from hsrloop.train.snapshot import Snapshot
from hsrloop.train.state import TrainState

RETRY_S = 60.0  # between attempts on a disk that is full


@dataclass(slots=True)
class _Job:
    """One file to be written, and what of the run it holds."""

    name: str
    content: Mapping[str, Any]
    snapshot: Snapshot | None
    epoch: int
    sample: int


@dataclass(slots=True)
class _Shared:
    """What both threads see; only touched with the condition held."""

    waiting: dict[str, _Job] = field(default_factory=dict)  # by name, in the order of writing
    writing: _Job | None = None
    hurry: bool = False  # try at once, even after a failure
    closing: bool = False
    spare: list[Snapshot] = field(default_factory=list)


class Saver:
    """Takes snapshots of a run and writes them from a thread of its own.

    A file that waits is replaced by a newer one of its name. Files are written in the order given,
    so best.pt is on the disk before a last.pt that says so. What cannot be written is tried again
    every `RETRY_S` and whenever there is something new; the file before stays meanwhile.

    Args:
        weights_dir: where the files go.
        identity: of the run; in every checkpoint.
        emit: hears what was saved and what could not be, on the thread that calls `poll`.
        minutes: between timed saves of last.pt; 0 for none.
        clock: monotonic seconds; replaced in tests.
    """

    def __init__(
        self,
        weights_dir: Path,
        identity: RunIdentity,
        emit: Callable[[Event], None],
        *,
        minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._weights_dir, self._identity, self._emit = weights_dir, identity, emit
        self._every_s, self._clock = 60 * minutes, clock
        self._last_asked = clock()
        self._done: queue.SimpleQueue[_Job | OutputError | BaseException] = queue.SimpleQueue()
        self._shared, self._changed = _Shared(), threading.Condition()
        self._thread: threading.Thread | None = None
        self._failing: OutputError | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give what waits one more chance; after an error of the run, without complaint."""
        if kind is None or issubclass(kind, Exception):
            with contextlib.suppress(OutputError):
                self.finish()
        self._close()

    def due(self) -> bool:
        """Return whether it is time for another last.pt in the middle of an epoch.

        Not while one is on its way: a slow disk sets the pace.
        """
        if not self._every_s or self._clock() - self._last_asked < self._every_s:
            return False
        with self._changed:
            return self._shared.writing is None or bool(self._failing)

    def put(self, name: str, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Have a checkpoint of the state as it is now written under a name.

        Args:
            name: "last.pt", which a run can go on from, or that of a file with weights alone.
            metrics: of the averaged weights, as far as known.

        Raises:
            MemoryError, RuntimeError: the host has no memory for the copy; nothing is written.
        """
        resumable = name == "last.pt"
        snapshot = self._snapshot(state) if resumable else None
        content = checkpoint.content(state, self._identity, metrics=metrics)
        job = _Job(name, content, snapshot, len(state.history), state.position.sample)
        with self._changed:
            self._spare(self._shared.waiting.pop(name, None))
            self._shared.waiting[name] = job  # at the end
            self._shared.hurry = True
            self._changed.notify_all()
        if resumable:
            self._last_asked = self._clock()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()

    def poll(self) -> None:
        """Report what was written, and what could not be, since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._report(self._done.get_nowait())

    def finish(self) -> None:
        """Return when all is on the disk.

        Raises:
            OutputError: something still cannot be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._shared.writing is None)
            self._shared.hurry = True  # one more attempt, begun now
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy())
            waiting = list(self._shared.waiting)
        self.poll()
        if waiting:
            assert self._failing is not None
            raise OutputError(f"{self._failing} Not written: {', '.join(waiting)}.")

    def _busy(self) -> bool:
        shared = self._shared
        return shared.writing is not None or bool(shared.waiting and shared.hurry)

    def _snapshot(self, state: TrainState) -> Snapshot:
        """Copy the state into memory that no file still needs."""
        with self._changed:
            waiting = self._shared.waiting.get("last.pt")
            if waiting is not None:  # it will be replaced anyway
                del self._shared.waiting["last.pt"]
                self._spare(waiting)
            snapshot = self._shared.spare.pop() if self._shared.spare else Snapshot()
        snapshot.take(state)
        return snapshot

    def _spare(self, job: _Job | None) -> None:
        if job is not None and job.snapshot is not None:
            self._shared.spare.append(job.snapshot)

    def _report(self, outcome: _Job | OutputError | BaseException) -> None:
        if isinstance(outcome, _Job):
            if self._failing is not None:
                self._failing = None
                self._emit(Note(text=f"weights/{outcome.name} could be written again"))
            self._emit(
                CheckpointSaved(
                    path=f"weights/{outcome.name}", epoch=outcome.epoch, sample=outcome.sample
                )
            )
        elif isinstance(outcome, OutputError):
            if self._failing is None:
                text = f"{outcome} Training goes on; the file before is kept, and it is tried again"
                self._emit(Note(text=text, level="warning"))
            self._failing = outcome
        else:
            raise outcome

    def _work(self) -> None:
        """Write what waits until told to end; the thread's own loop."""
        try:
            while (job := self._next()) is not None:
                self._write(job)
        except BaseException as error:  # raised again by `poll`, on the thread of the run
            self._done.put(error)
            with self._changed:
                self._shared.writing = None
                self._shared.waiting.clear()
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        """Wait for something to write; None when told to end."""
        with self._changed:
            shared = self._shared
            while not shared.closing and not (shared.waiting and shared.hurry):
                if not self._changed.wait(RETRY_S if shared.waiting else None):
                    shared.hurry = True
            if shared.closing:
                return None
            shared.writing = shared.waiting.pop(next(iter(shared.waiting)))
            return shared.writing

    def _write(self, job: _Job) -> None:
        outcome: _Job | OutputError = job
        try:
            whole = job.content
            if job.snapshot is not None:
                whole = checkpoint.with_run(whole, job.snapshot.payload)
            checkpoint.write(self._weights_dir / job.name, whole)
        except OutputError as error:
            outcome = error
        self._done.put(outcome)
        with self._changed:
            shared = self._shared
            shared.writing = None
            if outcome is job:
                self._spare(job)
            else:
                shared.hurry = False
                if job.name in shared.waiting:  # a newer one came meanwhile
                    self._spare(job)
                else:
                    shared.waiting = {job.name: job, **shared.waiting}
            self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._shared.closing = True
            self._changed.notify_all()
        self.poll()
