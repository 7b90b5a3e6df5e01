"""Worker processes that render batches into memory shared with their parent.

Each worker has two slots in an anonymous shared mapping and answers in the order of its tasks, so
the stream is the same for any number of them, and neither /dev/shm nor a queue can fill up.
"""

from __future__ import annotations

import gc
import logging
import mmap
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

import cv2
import numpy as np

from hsrloop.errors import HsrloopError

logger = logging.getLogger(__name__)

DEPTH = 2  # tasks ahead per worker
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDied(RuntimeError):
    """A loader process ended by itself: killed for memory, or crashed."""


class WorkerPool(Generic[Task, Result]):
    """Processes that run `work(task, slot)` in order; forked, they see the parent's data.

    Args:
        work: fills `slot`, a (slot_bytes,) uint8 array, and returns a small picklable result.
        count: number of processes, at least 1.
    """

    def __init__(
        self, work: Callable[[Task, np.ndarray], Result], *, count: int, slot_bytes: int
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._slots: list[list[np.ndarray]] = []
        self._processes = []
        self._waiting = [0] * count  # answers due from each worker
        threads = cv2.getNumThreads()
        cv2.setNumThreads(0)  # a thread of its pool would leave a lock held in every child
        for _ in range(count):
            block = np.frombuffer(mmap.mmap(-1, DEPTH * slot_bytes), np.uint8).reshape(
                DEPTH, slot_bytes
            )
            ours, theirs = context.Pipe()
            self._connections.append(ours)
            self._slots.append(list(block))
            process = context.Process(
                target=_serve,
                args=(theirs, tuple(self._connections), work, list(block)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
        cv2.setNumThreads(threads)

    def map(self, tasks: Sequence[Task]) -> Iterator[tuple[Result, np.ndarray]]:
        """Yield (result, slot) of each task in order; a slot is valid until the next is asked for.

        Raises:
            WorkerDied: a process is gone.
            HsrloopError: `work` raised it.
            RuntimeError: `work` raised something else; with its traceback.
        """
        self._drain()
        count = len(self._processes)
        for number in range(min(len(tasks), DEPTH * count)):
            self._send(number, tasks)
        for number in range(len(tasks)):
            result = self._receive(number % count)
            yield result, self._slots[number % count][number // count % DEPTH]
            if number + DEPTH * count < len(tasks):
                self._send(number + DEPTH * count, tasks)

    def close(self) -> None:
        """End the processes and release the memory."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
                process.join()
        self._connections, self._processes, self._slots, self._waiting = [], [], [], []

    def _send(self, number: int, tasks: Sequence[Task]) -> None:
        which, turn = number % len(self._processes), number // len(self._processes)
        try:
            self._connections[which].send((tasks[number], turn % DEPTH))
        except OSError:
            raise self._died(which) from None
        self._waiting[which] += 1

    def _receive(self, which: int) -> Result:
        try:
            answer, failure = self._connections[which].recv()
        except (EOFError, OSError):
            raise self._died(which) from None
        self._waiting[which] -= 1
        if isinstance(failure, HsrloopError):
            raise failure
        if failure:
            raise RuntimeError(f"a loader process failed:\n{failure}")
        result: Result = answer
        return result

    def _drain(self) -> None:
        """Take the answers that an epoch left half-way did not wait for."""
        for which, due in enumerate(self._waiting):
            for _ in range(due):
                self._receive(which)

    def _died(self, which: int) -> WorkerDied:
        process = self._processes[which]
        process.join(timeout=5)
        return WorkerDied(
            f"loader process {process.pid} ended by itself (exit code {process.exitcode})."
        )


def _serve(
    connection: Connection,
    parents_ends: tuple[Connection, ...],
    work: Callable[[Task, np.ndarray], Result],
    slots: list[np.ndarray],
) -> None:
    """Answer tasks until the parent is gone; a copy of its pipe ends here would hide that."""
    gc.freeze()  # what the parent left behind, such as CUDA's memory, is not ours to free
    for end in parents_ends:
        end.close()
    # Both reach the whole process group. The parent still needs this epoch's batches: a worker ends
    # when its pipe does.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    cv2.setNumThreads(0)  # one process for each core already
    while True:
        try:
            task, turn = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[Result | None, str | HsrloopError] = (work(task, slots[turn]), "")
        except HsrloopError as error:
            answer = (None, error)
        except Exception:  # whatever it is, the parent raises it
            answer = (None, traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return
