"""One place that hands each event to every listener, with the time stamped on it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from hsrloop.events import Event, Progress, Sink


class Hub:
    """Listeners of a run; `close` closes each once, in the order they came."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._early: list[Event] | None = []  # said before the run folder's listeners existed

    def add(self, sink: Sink) -> None:
        """Let `sink` listen from now on; it first hears what was said before."""
        for event in self._early or ():
            sink.handle(event)
        self._sinks.append(sink)

    def emit(self, event: Event) -> None:
        """Stamp and deliver."""
        stamped = dataclasses.replace(event, time=time.time())
        if self._early is not None and not isinstance(event, Progress):
            self._early.append(stamped)
        for sink in self._sinks:
            sink.handle(stamped)

    def complete(self) -> None:
        """Declare that nobody joins any more, so that nothing need be remembered."""
        self._early = None

    def progress(self, task: str) -> Callable[[int, int], None]:
        """Return a callback (done, total) that reports `task`."""
        return lambda done, total: self.emit(Progress(task=task, done=done, total=total))

    def close(self) -> None:
        """Close every listener."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []
