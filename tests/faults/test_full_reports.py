"""A disk that fills loses no row of the reports and ends no run."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hsrloop.events import EpochDone, Note
from hsrloop.report import files
from hsrloop.report.csv import CsvSink
from hsrloop.report.files import append
from hsrloop.report.telemetry import TelemetrySink
from hsrloop.report.tensorboard import TensorBoardSink
from hsrloop.train.hub import RETRY_S, Hub
from tests.faults.conftest import Clock, no_file_beyond
from tests.report.conftest import epoch_done as epoch_done  # a fixture
from tests.report.test_tensorboard import scalars
from tests.train.conftest import Recorder

Make = Callable[..., EpochDone]


class Reports:
    """The listeners of a run folder in `folder`, and a console that remembers."""

    def __init__(self, folder: Path) -> None:
        self.console, self.clock = Recorder(), Clock()
        self.csv, self.jsonl = folder / "results.csv", folder / "events.jsonl"
        self.tensorboard = folder / "tensorboard"
        self.hub = Hub([self.console], clock=self.clock)
        self.hub.add(TelemetrySink(self.jsonl))
        self.hub.add(CsvSink(self.csv))
        self.hub.add(TensorBoardSink(self.tensorboard))
        self.hub.complete()

    @property
    def sizes(self) -> dict[Path, int]:
        paths = [self.csv, self.jsonl, *self.tensorboard.iterdir()]
        return {path: path.stat().st_size for path in paths}

    def epochs(self) -> tuple[list[int], list[int], list[int]]:
        """The epochs found in results.csv, events.jsonl and TensorBoard's file."""
        rows = [int(row["epoch"]) for row in csv.DictReader(self.csv.read_text().splitlines())]
        lines = [json.loads(line) for line in self.jsonl.read_text().splitlines()]
        told = [line["epoch"] for line in lines if line["event"] == "EpochDone"]
        return rows, told, [step for step, _ in scalars(self.tensorboard)["metrics/mAP50"]]

    def warnings(self) -> list[str]:
        return [note.text for note in self.console.of(Note) if note.level == "warning"]


@pytest.mark.parametrize("room", [0, 1, 6])
def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path: Path, room: int) -> None:
    path = tmp_path / "rows"
    append(path, b"first\n")
    with no_file_beyond(6 + room), pytest.raises(OSError) as caught:
        append(path, b"second\n")
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_bytes() == b"first\n"
    append(path, b"second\n", sync=True)
    assert path.read_bytes() == b"first\nsecond\n"


def test_rows_wait_for_room_and_the_user_is_told_once(tmp_path: Path, epoch_done: Make) -> None:
    reports = Reports(tmp_path)
    reports.hub.emit(epoch_done(1))
    before = reports.sizes
    with no_file_beyond(min(before.values())):
        for epoch in (2, 3, 4):
            reports.hub.emit(epoch_done(epoch))
            reports.clock.now += RETRY_S
    assert reports.sizes == before
    (warning,) = reports.warnings()
    assert "cannot be written (File too large). Training goes on" in warning
    assert str(tmp_path) in warning
    reports.hub.emit(epoch_done(5))
    assert reports.epochs() == ([1, 2, 3, 4, 5],) * 3
    assert "written again" in reports.console.of(Note)[-1].text
    assert len(reports.console.of(Note)) == 2
    reports.hub.close()


def test_a_refused_file_is_not_tried_at_every_event(tmp_path: Path, epoch_done: Make) -> None:
    reports = Reports(tmp_path)
    with no_file_beyond(0):
        reports.hub.emit(epoch_done(1))
    reports.hub.emit(epoch_done(2))
    assert not reports.csv.exists() or reports.csv.stat().st_size == 0
    reports.clock.now += RETRY_S
    reports.hub.emit(epoch_done(3))
    assert reports.epochs() == ([1, 2, 3],) * 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_whatever_the_disk_says_training_goes_on(
    tmp_path: Path, epoch_done: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    reports = Reports(tmp_path)
    reports.hub.emit(epoch_done(1))

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        reports.hub.emit(epoch_done(2))
    assert len(reports.csv.read_text().splitlines()) == 2  # what was not synced is not kept twice
    assert os.strerror(number) in reports.warnings()[0]
    reports.clock.now += RETRY_S
    reports.hub.emit(epoch_done(3))
    assert reports.epochs() == ([1, 2, 3],) * 3


def test_what_stays_unwritten_is_said_at_the_end(tmp_path: Path, epoch_done: Make) -> None:
    reports = Reports(tmp_path)
    with no_file_beyond(0):
        reports.hub.emit(epoch_done(1))
        reports.hub.close()
    last = reports.warnings()[-1]
    assert last.startswith("not written to its end (File too large): ")
    assert str(reports.csv) in last and str(reports.jsonl) in last
    assert reports.console.closed == 1


def test_closing_writes_what_there_is_room_for_by_then(tmp_path: Path, epoch_done: Make) -> None:
    reports = Reports(tmp_path)
    with no_file_beyond(0):
        reports.hub.emit(epoch_done(1))
    reports.hub.close()
    assert reports.epochs() == ([1],) * 3
    assert len(reports.warnings()) == 1


def test_listeners_of_the_caller_still_fail_loudly(epoch_done: Make) -> None:
    class Broken(Recorder):
        def handle(self, event: object) -> None:
            raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        Hub([Broken()]).emit(epoch_done(1))
