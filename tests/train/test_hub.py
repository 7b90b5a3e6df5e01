"""What is said once something is ready."""

from __future__ import annotations

from hsrloop.events import Note, Progress
from hsrloop.train.hub import Hub
from tests.train.conftest import Recorder


def test_what_is_due_is_said_once_before_the_first_event_that_finds_it_ready() -> None:
    listener, answers = Recorder(), iter([False, False, True])
    hub = Hub([listener])
    hub.when(lambda: next(answers), lambda: hub.emit(Note(text="TensorBoard: here")))
    for done in range(1, 6):
        hub.emit(Progress(task="reading", done=done, total=5))
    order = [e.text if isinstance(e, Note) else e.done for e in listener.events]
    assert order == [1, 2, "TensorBoard: here", 3, 4, 5]
