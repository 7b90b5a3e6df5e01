"""The README's rows of what only a GPU can show, from what `gpu_suite.py` wrote."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALES = "nsmlx"
GIB = 2**30
ABSENT = "not measured"
TRAIN = "train, {}, fp16, rendered on the GPU"
KINDS = ("fp16", "without graphs", "bf16", "compiled")
STEP, VALIDATION, EXACT = "step, {}, fp16", "validation, {}", "step, {}, deterministic"
OURS, THEIRS = "against Ultralytics, {}: hsrloop", "against Ultralytics, {}: Ultralytics"

OBJECTS = (10, 100, 300)
CRITERION = "criterion, {} objects an image"
PEERS_CRITERION = f"Ultralytics' {CRITERION}"

Row = Mapping[str, Any]  # as `hsrloop.bench.results.Row` in JSON
Rows = Mapping[str, Row]  # of one card and visit, by name


@dataclass(frozen=True, slots=True)
class Figures:
    """Cells of the README's table; all are empty where nothing was measured."""

    ours: str = ""
    theirs: str = ""
    ratio: str = ""
    n: str = ""


def gpu_rows(results: Path, letter: Callable[[str], str]) -> Iterator[Sequence[str]]:
    """Yield for each goal a row of every visit to a card that tells of it, and what none does.

    Of what several visits to a card found the newest counts.

    Args:
        letter: returns the letter of a host that is described in one line.
    """
    files = sorted(results.glob("gpu_suite_*.json"))
    reports = sorted((json.loads(file.read_text()) for file in files), key=_time)
    reports = [report for report in reports if report["settings"].get("device") != "CPU"]
    for words, figures in GOALS.items():
        visits = _newest(reports, TOGETHER.get(figures, ()))
        found = [(host, figures(rows)) for host, rows in visits]
        found = [(host, f) for host, f in found if f != Figures()]
        yield from _table_rows(words, found, letter)
        if found and (missing := _missing(visits, WANTED.get(figures, {}))):
            yield words, f"{missing}: {ABSENT}", "", "", "", ""
    starts = [json.loads(file.read_text()) for file in sorted(results.glob("first_step*.json"))]
    seen = [
        (s["host"], _first_step(s["seen_s"]))
        for s in starts
        if s["device"] != "cpu" and s.get("waking", True)
    ]
    yield from _table_rows("from the command to the first step, s", seen, letter)


def _newest(
    reports: Sequence[Mapping[str, Any]], together: Sequence[tuple[str, str]]
) -> list[tuple[str, Rows]]:
    """Return of each report, oldest first, its host and the rows that no later one of its card has.

    What was skipped or failed does not replace what was not.

    Args:
        together: names of rows that tell something beside each other only: of both or none.
    """
    units = {name: pair for pair in together for name in pair}
    newest: dict[tuple[str, ...], int] = {}

    def key(report: Mapping[str, Any], name: str) -> tuple[str, ...]:
        return str(report["settings"].get("device")), *units.get(name, (name,))

    for i, report in enumerate(reports):
        rows = {row["name"]: str(row["note"]) for row in report["rows"]}
        found = {name for name, note in rows.items() if not note.startswith(("skipped", "failed"))}
        for name in rows:
            own = key(report, name)
            if own not in newest or found.issuperset(own[1:]):
                newest[own] = i
    return [
        (
            report["host"],
            {row["name"]: row for row in report["rows"] if newest[key(report, row["name"])] == i},
        )
        for i, report in enumerate(reports)
    ]


def _time(report: Mapping[str, Any]) -> str:
    """Return when it was written: to the minute, or, in older results, the day."""
    return str(report["settings"].get("time", report["host"][:10]))


def _table_rows(
    words: str, found: Sequence[tuple[str, Figures]], letter: Callable[[str], str]
) -> Iterator[Sequence[str]]:
    for host, f in found:
        cells = (cell.replace("|", "/") for cell in (f.ours, f.theirs, f.ratio, f.n))
        yield words, *cells, letter(host)
    if not found:
        yield words, ABSENT, "", "", "", ""


def _training(rows: Rows) -> Figures:
    return Figures(_by_scale(rows, TRAIN, _speed_and_share), n=_rounds(rows, TRAIN))


def _against(rows: Rows) -> Figures:
    ratio = _in_pairs(rows, OURS, THEIRS, _times_as_fast)
    ours, theirs = (_by_scale(rows, name, _speed) for name in (OURS, THEIRS))
    return Figures(ours, theirs, ratio, "1 pair" if ratio else "")


def _validation(rows: Rows) -> Figures:
    ratio = _by_scale(rows, OURS, _validation_ratio)
    ours = _by_scale(rows, VALIDATION, _speed_and_share)
    return Figures(ours, "", ratio, _rounds(rows, VALIDATION))


def _memory(rows: Rows) -> Figures:
    """Return both trainers' memory where both told it, else ours beside the bare step."""
    ratio = _in_pairs(rows, OURS, THEIRS, _times_the_memory)
    if not ratio:
        return Figures(_by_scale(rows, TRAIN, _gib))
    ours, theirs = (_by_scale(rows, name, _gib) for name in (OURS, THEIRS))
    return Figures(ours, theirs, ratio, "1 pair")


def _waits(rows: Rows) -> Figures:
    kinds = {"a step": STEP, "a validation": VALIDATION}
    return Figures(_listed({kind: _by_scale(rows, kinds[kind], _host_waits) for kind in kinds}))


def _steps(rows: Rows) -> Figures:
    speeds = {kind: _by_scale(rows, f"step, {{}}, {kind}", _speed) for kind in KINDS}
    return Figures(_listed(speeds), n=_rounds(rows, STEP))


def _criterion(rows: Rows) -> Figures:
    ours, theirs = (
        {f"{n} objects": rows.get(name.format(n), {}) for n in OBJECTS}
        for name in (CRITERION, PEERS_CRITERION)
    )
    ratios = {key: _times_as_fast(ours[key], theirs[key]) for key in ours}
    speeds = [
        _joined({k: _speed(row) for k, row in side.items()}, " ", ", ") for side in (ours, theirs)
    ]
    return Figures(*speeds, _joined(ratios, " ", ", "), _counted(ours.values()))


def _deterministic(rows: Rows) -> Figures:
    return Figures(_in_pairs(rows, STEP, EXACT, _times_as_fast))


def _tiers(rows: Rows) -> Figures:
    names = [name for name in rows if name.startswith("tier ") and name != "tier cpu"]
    return Figures(_listed({name.removeprefix("tier "): _note(rows[name]) for name in names}))


def _recovery(rows: Rows) -> Figures:
    return Figures(_note(rows.get("recovery", {})))


def _exactness(rows: Rows) -> Figures:
    return Figures(_note(rows.get("exactness under --deterministic", {})))


GOALS: Mapping[str, Callable[[Rows], Figures]] = {
    "training on two CPU cores, images/s (share of the bare step's speed)": _training,
    "training side by side, images/s": _against,
    "validation, images/s (share of the network's speed); side by side": _validation,
    "peak memory, GiB": _memory,
    "waits of the host": _waits,
    "optimizer step alone, images/s": _steps,
    "loss and gradient, images/s": _criterion,
    "time of a step with `--deterministic`, over that without": _deterministic,
    "each tier's defaults in its card's memory": _tiers,
    "settings that do not fit": _recovery,
    "trained twice with `--deterministic`": _exactness,
}


_CONTESTS = [(OURS.format(scale), THEIRS.format(scale)) for scale in SCALES]
TOGETHER: Mapping[Callable[[Rows], Figures], Sequence[tuple[str, str]]] = {
    **dict.fromkeys((_against, _validation, _memory), _CONTESTS),
    _criterion: [(CRITERION.format(n), PEERS_CRITERION.format(n)) for n in OBJECTS],
    _deterministic: [(STEP.format(scale), EXACT.format(scale)) for scale in SCALES],
}


# Of each goal's parts the rows of which one is enough.
WANTED: Mapping[Callable[[Rows], Figures], Mapping[str, Sequence[str]]] = {
    _training: {scale: [TRAIN.format(scale)] for scale in SCALES},
    _against: {scale: [OURS.format(scale)] for scale in SCALES},
    _validation: {f"{scale} alone": [VALIDATION.format(scale)] for scale in SCALES},
    _waits: {scale: [STEP.format(scale)] for scale in SCALES},
    _steps: {kind: [f"step, {scale}, {kind}" for scale in SCALES] for kind in KINDS},
}


def _missing(visits: Sequence[tuple[str, Rows]], wanted: Mapping[str, Sequence[str]]) -> str:
    """Return the parts that no visit measured."""
    measured = {name for _, rows in visits for name in rows if _median(rows[name]) is not None}
    return ", ".join(part for part, names in wanted.items() if measured.isdisjoint(names))


def _first_step(seconds: Sequence[float]) -> Figures:
    middle, low, high = (f"{f(seconds):.1f}" for f in (statistics.median, min, max))
    return Figures(f"{middle} ({low} to {high})", n=str(len(seconds)))


def _by_scale(rows: Rows, name: str, text: Callable[[Row], str]) -> str:
    """Return what `text` says of each scale's row: "n 212, s 108"; "" when it says nothing."""
    said = {scale: text(rows.get(name.format(scale), {})) for scale in SCALES}
    return _joined(said, " ", ", ")


def _in_pairs(rows: Rows, first: str, second: str, text: Callable[[Row, Row], str]) -> str:
    """Return what `text` says of each scale's two rows, as `_by_scale`."""
    pairs = {s: [rows.get(name.format(s), {}) for name in (first, second)] for s in SCALES}
    return _joined({scale: text(*pair) for scale, pair in pairs.items()}, " ", ", ")


def _joined(said: Mapping[str, str], within: str, between: str) -> str:
    return between.join(f"{key}{within}{words}" for key, words in said.items() if words)


def _listed(said: Mapping[str, str]) -> str:
    return _joined(said, ": ", "; ")


def _median(row: Row, figure: str = "images_per_s") -> float | None:
    spread = row.get(figure)
    return None if spread is None else float(spread["median"])


def _speed(row: Row) -> str:
    speed = _median(row)
    return "" if speed is None else f"{speed:.0f}"


def _speed_and_share(row: Row) -> str:
    share = _median(row, "efficiency")
    return "" if share is None else f"{_speed(row)} ({share:.2f})"


def _times_as_fast(row: Row, other: Row) -> str:
    speeds = _median(row), _median(other)
    return "" if None in speeds else f"{speeds[0] / speeds[1]:.2f}x"


def _gib(row: Row) -> str:
    peak = row.get("peak_memory_bytes")
    return "" if peak is None else f"{peak / GIB:.2f}"


def _times_the_memory(ours: Row, theirs: Row) -> str:
    """Return the other's over ours, so that more than 1 is better, as in all of the table."""
    both = [row.get("peak_memory_bytes") for row in (ours, theirs)]
    return f"{both[1] / both[0]:.2f}x" if all(both) else ""


def _host_waits(row: Row) -> str:
    waits = row.get("host_waits")
    return "" if waits is None else f"{waits:g}"


def _validation_ratio(row: Row) -> str:
    """Find it among the ratios, or, in older results, in the note."""
    if "validation" in row.get("ratios", {}):
        return f"{row['ratios']['validation']['median']:.2f}x"
    match = re.search(r"validation (\d+\.\d+)", row.get("note", ""))
    return f"{match[1]}x" if match else ""


def _note(row: Row) -> str:
    """Return a row's note; "" when it says that the part was skipped."""
    note = str(row.get("note", ""))
    return "" if note.startswith("skipped") else note


def _rounds(rows: Rows, name: str) -> str:
    return _counted(rows.get(name.format(scale), {}) for scale in SCALES)


def _counted(rows: Iterable[Row]) -> str:
    """Return how many rounds rows were measured in; "" where none was."""
    counts = sorted({row["images_per_s"]["n"] for row in rows if row.get("images_per_s")})
    return f"rounds: {' to '.join(str(n) for n in counts)}" if counts else ""
