"""Parts of a benchmark in their order, for as long as there is time.

A visit to a borrowed machine ends when it ends: rows are handed over as they come, nothing is begun
that is not expected to end in time, and a part that fails, lacks something or finds no time becomes
a row that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hsrloop.bench.results import Row
from hsrloop.errors import DependencyError, DeviceError, first_line
from hsrloop.hardware.memory import release_gpu_memory


@dataclass(frozen=True, slots=True)
class Cell:
    """One part."""

    name: str
    seconds: float  # it takes about, more than 0
    run: Callable[[], Iterable[Row]]
    needs_gpu: bool = False


@dataclass(slots=True)
class Pace:
    """How far estimates were off so far. Quick parts do not make up for slow ones."""

    expected_s: float = 0.0
    taken_s: float = 0.0

    def note(self, expected_s: float, took_s: float) -> None:
        """Count a part."""
        self.expected_s += expected_s
        self.taken_s += max(expected_s, took_s)

    @property
    def factor(self) -> float:
        """Seconds taken for a second expected; at least 1."""
        return self.taken_s / self.expected_s if self.expected_s else 1.0


def run_suite(
    cells: Sequence[Cell],
    *,
    minutes: float,
    began: float,
    has_gpu: bool,
    on_row: Callable[[Row], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the cells in order for as long as there is time; each row goes to `on_row` at once.

    Args:
        minutes: from `began` on, by `clock`.
    """
    end = began + 60 * minutes
    pace = Pace()
    for cell in cells:
        started = clock()
        left_s, expected_s = end - started, cell.seconds * pace.factor
        if cell.needs_gpu and not has_gpu:
            on_row(Row(name=cell.name, note="skipped: no GPU"))
        elif expected_s > left_s:
            times = f"{expected_s:.0f} s expected, {max(0.0, left_s):.0f} s left"
            on_row(Row(name=cell.name, note=f"skipped: no time left ({times})"))
        elif _measures(cell, on_row):
            pace.note(cell.seconds, clock() - started)


def _measures(cell: Cell, on_row: Callable[[Row], None]) -> bool:
    """Run a cell; return whether it did its work to the end, so that its time tells something."""
    worked = False
    try:
        for row in cell.run():
            on_row(row)
            worked = worked or not row.note.startswith("skipped")
        return worked
    except (DependencyError, DeviceError) as error:  # something is not here
        on_row(Row(name=cell.name, note=f"skipped: {first_line(error)}"))
    except Exception as error:  # whatever it is, the other cells are worth having
        on_row(Row(name=cell.name, note=f"failed: {type(error).__name__}: {first_line(error)}"))
    finally:
        with suppress(RuntimeError):  # a card that is lost fails the cells to come, one by one
            release_gpu_memory()  # else it would count against an emulated card
    return False
