"""results.csv."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from hsrloop.events import EpochDone, Note
from hsrloop.report.csv import CsvSink, cut_back

Make = Callable[..., EpochDone]
PROMISED = "epoch,box_loss,cls_loss,dfl_loss,mAP50,mAP50-95,precision,recall"


def write(path: Path, make: Make, epochs: range) -> None:
    sink = CsvSink(path)
    for epoch in epochs:
        sink.handle(make(epoch))
    sink.close()


def test_the_promised_columns_come_first(tmp_path: Path, epoch_done: Make) -> None:
    path = tmp_path / "results.csv"
    write(path, epoch_done, range(1, 3))
    lines = path.read_text().splitlines()
    assert lines[0].startswith(PROMISED + ",lr/weights,lr/biases,images_per_s")
    assert lines[1].startswith("1,1,2,1.5,0.5,0.25,0.6,0.4,0.001,0.002,12.5,")


def test_a_row_is_in_the_file_when_handle_returns(tmp_path: Path, epoch_done: Make) -> None:
    path = tmp_path / "results.csv"
    CsvSink(path).handle(epoch_done(1))
    assert len(path.read_text().splitlines()) == 2


def test_other_events_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    CsvSink(path).handle(Note(text="hello"))
    assert not path.exists()


def test_cut_and_gone_on_equals_never_stopped(tmp_path: Path, epoch_done: Make) -> None:
    whole, resumed = tmp_path / "whole.csv", tmp_path / "resumed.csv"
    write(whole, epoch_done, range(1, 6))
    write(resumed, epoch_done, range(1, 5))
    cut_back(resumed, 2)
    write(resumed, epoch_done, range(3, 6))
    assert resumed.read_bytes() == whole.read_bytes()


def test_cut_back_to_nothing_keeps_the_header(tmp_path: Path, epoch_done: Make) -> None:
    path = tmp_path / "results.csv"
    write(path, epoch_done, range(1, 3))
    cut_back(path, 0)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("cut", [1, 2, 12, 40])
def test_a_row_cut_off_by_a_crash_is_dropped(tmp_path: Path, epoch_done: Make, cut: int) -> None:
    path = tmp_path / "results.csv"
    write(path, epoch_done, range(1, 3))
    path.write_text(path.read_text()[:-cut])
    cut_back(path, 5)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1"]


def test_a_file_that_is_not_there_stays_so(tmp_path: Path) -> None:
    cut_back(tmp_path / "none.csv", 3)
    assert not list(tmp_path.iterdir())
