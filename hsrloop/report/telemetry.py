"""events.jsonl: every logged event of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hsrloop.events import Event, is_logged
from hsrloop.report.files import SPELLED_OUT, append, json_text, replace_text


class TelemetrySink:
    """Appends logged events; each line is handed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def handle(self, event: Event) -> None:
        """Write the event, unless it is one of the frequent ones.

        Raises:
            OSError: the disk does not take it; nothing of it was written.
        """
        if is_logged(event):
            line = json_text(event.to_json()) + "\n"
            append(self._path, line.encode(errors=SPELLED_OUT))

    def close(self) -> None:
        """Nothing is held between lines."""


def cut_back(path: Path, epoch: int, sample: int = 0, *, rollbacks: int = 0) -> None:
    """Drop what a run said after its checkpoint, so that it can be said again.

    Cuts at the first line that lies beyond the checkpoint: an `EpochDone` of a later epoch, a
    `CheckpointSaved` of a later position, a later rollback, the run's end, or a line cut off by a
    crash. What stands before the last rollback that the checkpoint knows of was said before it.

    Args:
        path: events.jsonl; a file that is not there stays so.
        epoch: epochs completed at the checkpoint.
        sample: samples of the next epoch already trained at the checkpoint.
        rollbacks: of the run at the checkpoint.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = list(file)
    events = [_parse(line) for line in lines]
    past = 0
    for number, event in enumerate(events):
        if event is not None and _rollback(event) in range(1, rollbacks + 1):
            past = number + 1
    end = next(
        (
            number
            for number, event in enumerate(events[past:], past)
            if event is None or _is_beyond(event, (epoch, sample)) or _rollback(event)
        ),
        len(lines),
    )
    replace_text(path, "".join(lines[:end]))


def _parse(line: str) -> dict[str, Any] | None:
    if not line.endswith("\n"):
        return None
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


def _is_beyond(event: dict[str, Any], position: tuple[int, int]) -> bool:
    match event.get("event"):
        case "EpochDone" | "Climbed":
            return _number(event, "epoch") > position[0]
        case "CheckpointSaved" | "Recovered":
            return (_number(event, "epoch"), _number(event, "sample")) > position
        case "RunFinished":
            return True
    return False


def _rollback(event: dict[str, Any]) -> int:
    """Return which rollback an event tells of, from 1; 0: none."""
    number = event.get("number") if event.get("event") == "RolledBack" else 0
    return number if isinstance(number, int) else 0


def _number(event: dict[str, Any], key: str) -> float:
    """Return a number of an event; beyond everything when the line is damaged."""
    value = event.get(key)
    return value if isinstance(value, int) else math.inf
