"""A visit's patience, on a clock of our own: what it begins, what it leaves out, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest

from hsrloop.bench.results import Row
from hsrloop.bench.visit import Cell, run_suite
from hsrloop.errors import ConfigError, DependencyError, DeviceError
from tests.bench.test_bench import Clock


def collected(
    cells: Sequence[Cell], clock: Clock, *, minutes: float, began: float = 0.0
) -> list[tuple[str, str]]:
    rows: list[Row] = []
    run_suite(cells, minutes=minutes, began=began, has_gpu=False, on_row=rows.append, clock=clock)
    return [(row.name, row.note) for row in rows]


def works(clock: Clock, name: str, *, guess: float, takes: float, note: str = "") -> Cell:
    def run() -> Iterator[Row]:
        clock.now += takes
        yield Row(name=name, note=note)

    return Cell(name, guess, run)


def raises(error: Exception) -> Cell:
    def run() -> Iterator[Row]:
        yield Row(name="half")
        raise error

    return Cell("broken", 8, run)


def test_what_has_no_time_or_no_gpu_says_so_and_the_rest_goes_on() -> None:
    clock = Clock()
    never = works(clock, "gpu", guess=1, takes=1)
    cells = [
        works(clock, "a", guess=60, takes=60),
        Cell("gpu", 1, never.run, needs_gpu=True),
        works(clock, "long", guess=70, takes=70),
        works(clock, "short", guess=60, takes=60),
        works(clock, "late", guess=1, takes=1),
    ]
    assert collected(cells, clock, minutes=2) == [
        ("a", ""),
        ("gpu", "skipped: no GPU"),
        ("long", "skipped: no time left (70 s expected, 60 s left)"),
        ("short", ""),
        ("late", "skipped: no time left (1 s expected, 0 s left)"),
    ]


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (DependencyError("--compile on needs a C compiler"), "skipped: --compile on needs a C"),
        (DeviceError("no hardware for bf16\nand more"), "skipped: no hardware for bf16"),
        (ConfigError("imgsz is 650"), "failed: ConfigError: imgsz is 650"),
        (RuntimeError("no kernel image\nand more"), "failed: RuntimeError: no kernel image"),
        (RuntimeError(), "failed: RuntimeError: "),
    ],
)
def test_what_is_missing_is_skipped_and_what_breaks_failed(error: Exception, note: str) -> None:
    clock = Clock()
    rows = collected([raises(error), works(clock, "b", guess=1, takes=1)], clock, minutes=1)
    assert [name for name, _ in rows] == ["half", "broken", "b"]
    assert rows[1][1].startswith(note) and "and more" not in rows[1][1]


def test_the_clock_runs_from_the_start_of_the_process() -> None:
    clock = Clock()
    clock.now = 1050.0  # 50 s were spent before the first cell
    cells = [works(clock, "long", guess=11, takes=11), works(clock, "short", guess=10, takes=10)]
    rows = collected(cells, clock, minutes=1, began=1000.0)
    assert rows[0] == ("long", "skipped: no time left (11 s expected, 10 s left)")
    assert rows[1] == ("short", "")


@pytest.mark.parametrize("slowness", [1.0, 1.5, 2.0, 4.0])
def test_a_slow_card_leaves_cells_out_instead_of_overrunning(slowness: float) -> None:
    clock = Clock()
    guesses = [25, 20, 20, 20, 100, 90, 40, 15, 15, 20, 35, 25]
    cells = [
        works(clock, f"{i}", guess=guess, takes=slowness * guess) for i, guess in enumerate(guesses)
    ]
    rows = collected(cells, clock, minutes=8)
    assert clock.now <= 480
    left_out = sum(note.startswith("skipped") for _, note in rows)
    assert (left_out > 0) == (slowness * sum(guesses) > 480)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ([(10, 20)], 200),  # twice as slow as thought
        ([(10, 5)], 100),  # quick: the guesses stay
        ([(10, 20), (10, 1)], 150),  # quick parts do not make up for slow ones
        ([(10, 20), (30, 60)], 200),
    ],
)
def test_later_guesses_are_raised_by_how_far_earlier_ones_were_off(
    before: list[tuple[float, float]], expected: int
) -> None:
    clock = Clock()
    cells = [works(clock, "a", guess=guess, takes=takes) for guess, takes in before]
    cells.append(works(clock, "last", guess=100, takes=100))
    (*_, (_, note)) = collected(cells, clock, minutes=(sum(t for _, t in before) + 50) / 60)
    assert re.search(rf"\({expected} s expected, 50 s left\)", note)


@pytest.mark.parametrize("ending", ["skipped", "failed"])
def test_what_was_skipped_or_failed_at_once_says_nothing_of_the_pace(ending: str) -> None:
    clock = Clock()
    skips = works(clock, "skips", guess=8, takes=0, note="skipped: too small a card")
    cells = [
        works(clock, "slow", guess=10, takes=30),
        skips if ending == "skipped" else raises(RuntimeError("at once")),
        works(clock, "last", guess=10, takes=30),
    ]
    rows = collected(cells, clock, minutes=55 / 60)
    assert any(note.startswith(ending) for _, note in rows[:-1])
    assert rows[-1] == ("last", "skipped: no time left (30 s expected, 25 s left)")
