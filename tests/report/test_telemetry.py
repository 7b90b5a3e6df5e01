"""events.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hsrloop.events import (
    CheckpointSaved,
    EpochDone,
    Event,
    Note,
    Progress,
    RolledBack,
    RunStopped,
    from_json,
)
from hsrloop.report.telemetry import TelemetrySink, cut_back

Make = Callable[..., EpochDone]


def write(path: Path, events: list[Event]) -> None:
    sink = TelemetrySink(path)
    for event in events:
        sink.handle(event)
    sink.close()


def read(path: Path) -> list[Event]:
    return [from_json(json.loads(line)) for line in path.read_text().splitlines()]


def saved(epoch: int, sample: int) -> CheckpointSaved:
    return CheckpointSaved(path="weights/last.pt", epoch=epoch, sample=sample)


def test_a_line_for_each_logged_event(tmp_path: Path, epoch_done: Make) -> None:
    path = tmp_path / "events.jsonl"
    events = [Note(text="カップ"), epoch_done(1), saved(1, 0)]
    write(path, [*events, Progress(task="caching", done=1, total=2)])
    assert read(path) == events


def test_lines_can_be_read_while_the_run_goes(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = TelemetrySink(path)
    sink.handle(Note(text="now"))
    assert read(path) == [Note(text="now")]
    sink.close()


def test_what_came_after_the_checkpoint_is_dropped(tmp_path: Path, epoch_done: Make) -> None:
    path = tmp_path / "events.jsonl"
    kept = [Note(text="begin"), epoch_done(1), saved(1, 0), saved(1, 16)]
    write(path, [*kept, Note(text="?"), saved(1, 32), epoch_done(2)])
    cut_back(path, 1, 16)
    assert read(path) == [*kept, Note(text="?")]


def rolled_back(number: int) -> RolledBack:
    return RolledBack(
        cause="?", number=number, most=3, step=9, epoch=1, sample=0, lr_scale=0.5**number,
        loss_scale=1.0,
    )  # fmt: skip


def test_what_came_before_a_known_rollback_stays_and_a_later_one_goes(
    tmp_path: Path, epoch_done: Make
) -> None:
    path = tmp_path / "events.jsonl"
    # Having gone back, the run stands where it was before: the place alone does not tell.
    known = [epoch_done(1), saved(1, 48), rolled_back(1), saved(1, 16)]
    write(path, [*known, saved(1, 32), rolled_back(2), saved(1, 8)])
    cut_back(path, 1, 16, rollbacks=1)
    assert read(path) == known
    path.unlink()
    write(path, [epoch_done(1), saved(1, 0), rolled_back(1), epoch_done(2)])
    cut_back(path, 1, 0, rollbacks=0)
    assert read(path) == [epoch_done(1), saved(1, 0)]


@pytest.mark.parametrize("sample", [0, 16])
def test_the_end_of_an_interrupted_run_stays(tmp_path: Path, epoch_done: Make, sample: int) -> None:
    path = tmp_path / "events.jsonl"
    events = [epoch_done(1), saved(1, sample), RunStopped(reason="interrupted", text="go on with")]
    write(path, events)
    cut_back(path, 1, sample)
    assert read(path) == events


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [Note(text="one"), Note(text="two")])
    path.write_text(path.read_text()[:-5])
    cut_back(path, 3)
    assert read(path) == [Note(text="one")]


def test_a_file_that_is_not_there_stays_so(tmp_path: Path) -> None:
    cut_back(tmp_path / "none.jsonl", 3)
    assert not list(tmp_path.iterdir())
