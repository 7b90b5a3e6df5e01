"""What was found in a data set, for a terminal and for programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from hsrloop.records import CheckReport, Finding, Problem

_SHOWN_PROBLEMS = 5
_SHOWN_CLASSES = 40
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def checkup(report: CheckReport) -> RenderableType:
    """Return what `hsrloop check` prints: splits, classes, findings worst first, a verdict."""
    parts: list[RenderableType] = [_splits_table(report), ""]
    if report.splits:
        parts += [_classes_table(report), ""]
    for finding in report.findings:
        parts += [_shown_finding(finding, report.root), ""]
    return Group(*parts, verdict(report))


def verdict(report: CheckReport) -> Text:
    """Return the last line: how many findings of each kind, and what they mean for training."""
    counts = {grade: sum(f.severity == grade for f in report.findings) for grade in _STYLES}
    said = ", ".join(f"{n} {grade}{'s' * (n != 1)}" for grade, n in counts.items() if n)
    if counts["error"]:
        return Text(f"{said}. Training would not start.", style="bold red")
    if counts["warning"]:
        return Text(f"{said}. Training would suffer.", style="bold yellow")
    return Text(f"{f'{said}. ' if said else ''}Ready to train.", style="bold green")


def checkup_json(report: CheckReport) -> dict[str, Any]:
    """Return the report as plain values; paths as they are on this machine."""
    sides = sorted(float(side) for side in (report.sides_px.prod(axis=1) ** 0.5))
    return {
        "dataset": str(report.yaml),
        "imgsz": report.imgsz,
        "ready": not report.suffers,
        "splits": {
            count.split: {
                "images": count.images,
                "backgrounds": count.backgrounds,
                "unreadable": count.unreadable,
                "boxes": count.boxes,
                "classes": count.classes,
            }
            for count in report.splits
        },
        "classes": [
            {"name": c.name, "boxes": c.boxes, "images": c.images, "median_px": c.median_px}
            for c in report.classes
        ],
        "box_sides_px": {f"p{q}": _quantile(sides, q / 100) for q in (0, 10, 50, 90, 100)},
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "split": finding.split or None,
                "title": finding.title,
                "count": len(finding.problems),
                "effect": finding.effect,
                "remedy": finding.remedy,
                "places": [
                    {"file": str(p.file), "line": p.line or None, "text": p.text}
                    for p in finding.problems
                ],
            }
            for finding in report.findings
        ],
    }


class CheckBar:
    """A bar on a terminal for each task that reports (task, done, total); silent elsewhere."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> CheckBar:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def __call__(self, task: str, done: int, total: int) -> None:
        """Show how far a task is; it goes when it is done."""
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total)
        self._progress.update(self._tasks[task], completed=done, visible=done < total)


def _splits_table(report: CheckReport) -> Table:
    table = _table("split", *("images", "background", "unreadable", "boxes", "classes"))
    for count in report.splits:
        table.add_row(
            count.split,
            *map(str, (count.images, count.backgrounds, count.unreadable)),
            str(count.boxes),
            f"{count.classes} of {len(report.classes)}",
        )
    return table


def _classes_table(report: CheckReport) -> RenderableType:
    """Return boxes by class and split; of many classes those with the fewest in training."""
    splits = [count.split for count in report.splits]
    first = splits[0]
    classes = [count for count in report.classes if any(count.boxes.values())]
    unused = len(report.classes) - len(classes)
    rest = len(classes) - _SHOWN_CLASSES
    if rest > 0:
        classes = sorted(classes, key=lambda count: count.boxes[first])[:_SHOWN_CLASSES]
    table = _table("boxes by class", *splits, f"{first} images", f"median px at {report.imgsz}")
    for count in classes:
        table.add_row(
            clean(count.name),
            *(str(count.boxes[split]) for split in splits),
            str(count.images[first]),
            f"{count.median_px:.0f}",
            style=None if all(count.boxes.values()) else "yellow",
        )
    lines = []
    if rest > 0:
        least = max(count.boxes[first] for count in classes)
        lines.append(f"... and {rest} more classes, each with at least {least} boxes in {first}")
    if unused:
        lines.append(f"... and {unused} more classes without any box" if classes else "no boxes")
    return Group(table, *(Text(line, style="dim") for line in lines)) if classes else Text(*lines)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(title, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _shown_finding(finding: Finding, root: Path) -> RenderableType:
    head = Text.assemble(
        (f"{finding.severity.upper():<8}", _STYLES[finding.severity]), (finding.title, "bold")
    )
    lines = [_Hanging("", Text(_shown(p, root))) for p in finding.problems[:_SHOWN_PROBLEMS]]
    more = len(finding.problems) - _SHOWN_PROBLEMS
    if more > 0:
        lines.append(_Hanging("", Text(f"... and {more} more", style="dim")))
    effect, remedy = Text(finding.effect), Text(finding.remedy)
    return Group(head, *lines, _Hanging("Effect  ", effect), _Hanging("Remedy  ", remedy))


class _Hanging:
    """A paragraph under the finding's title, its label in the margin of the first line.

    Unlike rich's own padding it leaves no spaces at the ends of lines.
    """

    def __init__(self, label: str, text: Text) -> None:
        self._label = label
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        margin = " " * 8
        width = max(options.max_width - len(margin) - len(self._label), 16)
        for i, line in enumerate(self._text.wrap(console, width)):
            label = self._label if i == 0 else " " * len(self._label)
            yield Text.assemble(margin, (label, "italic"), line)


def _shown(problem: Problem, root: Path) -> str:
    """Return a problem as text, its paths relative to `root`."""
    return clean(str(problem).replace(f"{root}{os.sep}", ""))


def clean(text: str) -> str:
    """Return text safe for a terminal: control characters and broken names are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    return round(ordered[round(q * (len(ordered) - 1))], 1) if ordered else None
