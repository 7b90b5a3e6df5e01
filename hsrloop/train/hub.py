"""One place that hands each event to every listener, with the time stamped on it."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable

from hsrloop.events import Event, Note, Progress, Sink, is_logged

RETRY_S = 10.0  # between two tries to write what a full disk refused (a guess)


class Hub:
    """Listeners of a run; `close` closes each once, in the order they came.

    The listeners of `add` write files of the run folder. What they cannot write is kept and tried
    again later, so that a full disk loses no row and ends no run.
    """

    def __init__(self, sinks: list[Sink], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._sinks = sinks
        self._files: list[_FileSink] = []
        self._clock = clock
        self._blocked = False  # a file could not be written, and the user was told
        self._early: list[Event] | None = []  # said before the run folder's listeners existed
        self._due: tuple[Callable[[], bool], Callable[[], None]] | None = None  # of `when`

    def add(self, sink: Sink) -> None:
        """Let `sink`, which writes a file, listen; it first hears what was said before."""
        file = _FileSink(sink)
        for event in self._early or ():
            file.handle(event, self._clock())
        self._files.append(file)

    def emit(self, event: Event) -> None:
        """Stamp and deliver."""
        if self._due is not None and self._due[0]():
            (_, say), self._due = self._due, None
            say()
        stamped = dataclasses.replace(event, time=time.time())
        if self._early is not None and not isinstance(event, Progress):
            self._early.append(stamped)
        for sink in self._sinks:
            sink.handle(stamped)
        for file in self._files:
            file.handle(stamped, self._clock())
        self._say_what_changed()

    def when(self, ready: Callable[[], bool], say: Callable[[], None]) -> None:
        """Call `say`, which emits something, before the first event that finds `ready`."""
        self._due = ready, say

    def complete(self) -> None:
        """Declare that nobody joins any more, so that nothing need be remembered."""
        self._early = None

    def progress(self, task: str) -> Callable[[int, int], None]:
        """Return a callback (done, total) that reports `task`."""
        return lambda done, total: self.emit(Progress(task=task, done=done, total=total))

    def close(self) -> None:
        """Try a last time to write what is missing, say what stays so, close every listener."""
        for file in self._files:
            file.flush()
        lacking = [file for file in self._files if file.error is not None]
        if lacking:
            where = ", ".join(file.where for file in lacking)
            text = f"not written to its end ({lacking[0].reason}): {where}"
            for sink in self._sinks:
                sink.handle(Note(text=text, level="warning", time=time.time()))
        for sink in (*self._sinks, *(file.sink for file in self._files)):
            sink.close()
        self._sinks, self._files = [], []

    def _say_what_changed(self) -> None:
        blocked = next((file for file in self._files if file.error is not None), None)
        if self._blocked == (blocked is not None):
            return
        self._blocked = blocked is not None  # first, since what is said comes by here again
        if blocked is None:
            self.emit(Note(text="the run's reports are written again, and complete"))
        else:
            text = (
                f"{blocked.where} cannot be written ({blocked.reason}). Training goes on; what is "
                "missing is kept and written once the disk takes it. Free space."
            )
            self.emit(Note(text=text, level="warning"))


class _FileSink:
    """A listener whose file the disk may refuse: events wait, in order, until it takes them."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.waiting: deque[Event] = deque()
        self.error: OSError | None = None
        self._retry_at = 0.0

    @property
    def where(self) -> str:
        """The file that cannot be written."""
        named = self.error.filename if self.error is not None else None
        return str(named or type(self.sink).__name__)

    @property
    def reason(self) -> str:
        """Why, in the system's words."""
        assert self.error is not None
        return self.error.strerror or str(self.error)

    def handle(self, event: Event, now: float) -> None:
        """Deliver an event, or keep it; the frequent ones are not kept."""
        if self.error is None or is_logged(event):
            self.waiting.append(event)
        if self.error is not None and now < self._retry_at:
            return
        self.flush()
        if self.error is not None:
            self._retry_at = now + RETRY_S

    def flush(self) -> None:
        """Deliver what waits, as far as the disk takes it."""
        try:
            while self.waiting:
                self.sink.handle(self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            self.error = error
        else:
            self.error = None
