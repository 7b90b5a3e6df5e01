"""results.csv: a row per epoch, in the columns that Ultralytics' users plot."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from hsrloop.events import EpochDone, Event
from hsrloop.report.files import append, replace_text

FIRST_COLUMNS = (
    "epoch",
    "box_loss",
    "cls_loss",
    "dfl_loss",
    "mAP50",
    "mAP50-95",
    "precision",
    "recall",
)
_LAST_COLUMNS = ("images_per_s", "skipped_steps", "micro_batch", "imgsz", "train_s", "val_s")


class CsvSink:
    """Appends a row for each `EpochDone`; the row is on the disk when `handle` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def handle(self, event: Event) -> None:
        """Write the row of an `EpochDone`; other events are not for a table.

        Raises:
            OSError: the disk does not take it; nothing of it was written.
        """
        if not isinstance(event, EpochDone):
            return
        header = _header(self._path)
        new = header is None
        columns = header or [*FIRST_COLUMNS, *(f"lr/{name}" for name in event.lr), *_LAST_COLUMNS]
        cells = _cells(event)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if new:
            writer.writerow(columns)
        writer.writerow([cells.get(column, "") for column in columns])
        append(self._path, text.getvalue().encode(), sync=True)

    def close(self) -> None:
        """Nothing is held between rows."""


def cut_back(path: Path, epoch: int) -> None:
    """Drop the rows after `epoch` (from 1; 0 drops all rows), and a row cut off by a crash.

    A file that is not there stays so.
    """
    if not path.exists():
        return
    text_read = path.read_text(encoding="utf-8-sig", errors="replace")  # a spreadsheet saves so
    whole, _, _ = text_read.rpartition("\n")
    rows = list(csv.reader(io.StringIO(whole, newline="")))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if rows and rows[0][:1] == list(FIRST_COLUMNS[:1]):  # else nobody knows what the columns are
        writer.writerow(rows[0])
        writer.writerows(row for row in rows[1:] if _is_kept(row, epoch))
    replace_text(path, text.getvalue())


def _is_kept(row: list[str], epoch: int) -> bool:
    """Return whether a row is one of an epoch up to `epoch`."""
    return bool(row) and row[0].isdecimal() and int(row[0]) <= epoch


def _header(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), None)


def _cells(event: EpochDone) -> dict[str, str]:
    numbers: dict[str, float] = {
        "box_loss": event.box_loss,
        "cls_loss": event.cls_loss,
        "dfl_loss": event.dfl_loss,
        "mAP50": event.ap50,
        "mAP50-95": event.ap50_95,
        "precision": event.precision,
        "recall": event.recall,
        "images_per_s": event.images_per_s,
        "train_s": event.train_s,
        "val_s": event.val_s,
        **{f"lr/{name}": rate for name, rate in event.lr.items()},
    }
    return {
        "epoch": str(event.epoch),
        "skipped_steps": str(event.skipped_steps),
        "micro_batch": str(event.micro_batch),
        "imgsz": str(event.imgsz),
        **{name: f"{value:.6g}" for name, value in numbers.items()},
    }
