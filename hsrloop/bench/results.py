"""What a benchmark found: rows of figures with their spread, as values, JSON, table or Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from hsrloop.hardware.memory import GIB


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure measured n times."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise; at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 1) -> str:
        """Return "median (lowest-highest)", or the value alone when there is one."""
        middle = f"{self.median:.{digits}f}"
        if self.n == 1:
            return middle
        return f"{middle} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing measured. What does not apply, or cannot be seen here, is None.

    `efficiency` is the share of the bare step's speed that is left, from rounds in pairs, and
    `data_wait` the share of time in which the host waited for a step's images; where a GPU's stream
    waits for them instead, efficiency alone shows it.
    """

    name: str
    images_per_s: Spread | None = None
    bare_images_per_s: Spread | None = None
    efficiency: Spread | None = None
    peak_memory_bytes: int | None = None  # of the GPU; on the CPU of this process
    host_waits: float | None = None  # an optimizer step, or a validation of all images
    data_wait: Spread | None = None
    watts: float | None = None
    utilisation: float | None = None  # share of time with work on the GPU
    note: str = ""  # such as "skipped: no GPU"
    ratios: Mapping[str, Spread] = field(default_factory=dict)  # times as fast as a peer, by part
    mean_ap: Spread | None = None  # mAP50-95
    settings: Mapping[str, Any] = field(default_factory=dict)  # shown before the figures

    @property
    def s_per_1000(self) -> float | None:
        """Seconds for 1,000 images."""
        return 1000 / self.images_per_s.median if self.images_per_s else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**dataclasses.asdict(self), "s_per_1000": self.s_per_1000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Rows with what they depend on."""

    host: str
    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def said(self) -> str:
        """Return the settings as one line."""
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [row.to_json() for row in self.rows]
        return {"host": self.host, "settings": dict(self.settings), "rows": rows}


_TITLES = (
    *("images/s", "bare step", "efficiency", "s per 1,000 images", "peak memory, GiB"),
    *("host waits", "data wait", "watts", "GPU busy", "mAP50-95", ""),
)


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's figures as text, in the order of the titles; "" for what is None."""
    return (
        row.images_per_s.text() if row.images_per_s else "",
        row.bare_images_per_s.text() if row.bare_images_per_s else "",
        row.efficiency.text(2) if row.efficiency else "",
        f"{row.s_per_1000:.1f}" if row.s_per_1000 is not None else "",
        f"{row.peak_memory_bytes / GIB:.2f}" if row.peak_memory_bytes is not None else "",
        f"{row.host_waits:g}" if row.host_waits is not None else "",
        f"{row.data_wait.median:.0%}" if row.data_wait else "",
        f"{row.watts:.0f}" if row.watts is not None else "",
        f"{row.utilisation:.0%}" if row.utilisation is not None else "",
        row.mean_ap.text(3) if row.mean_ap else "",
        row.note,
    )


def titled(rows: Sequence[Row]) -> list[tuple[str, Sequence[str]]]:
    """Return each title with a text for each row; settings and figures that no row has are absent.

    Settings come first, in the order in which the rows name them.
    """
    names = dict.fromkeys(name for row in rows for name in row.settings)
    settings = [(name, [str(row.settings.get(name, "")) for row in rows]) for name in names]
    columns = [cells(row) for row in rows]
    figures = [(title, [column[i] for column in columns]) for i, title in enumerate(_TITLES)]
    parts = dict.fromkeys(part for row in rows for part in row.ratios)
    figures[-1:-1] = [
        (f"{part}, times as fast", [_times(row, part) for row in rows]) for part in parts
    ]
    return [(title, texts) for title, texts in (*settings, *figures) if any(texts)]


def _times(row: Row, part: str) -> str:
    return f"{row.ratios[part].text(2)}x" if part in row.ratios else ""


def tables(rows: Sequence[Row]) -> Group:
    """Return the rows for a terminal: those of one run first, then those with their own settings.

    Side by side they would be too wide for a terminal of 80 columns.
    """
    parts = [[row for row in rows if bool(row.settings) == own] for own in (False, True)]
    shown: list[RenderableType] = []
    for part in filter(None, parts):
        shown += [*([""] if shown else []), table(part)]
    return Group(*shown)


def table(rows: Sequence[Row]) -> Table:
    """Return the rows for a terminal, side by side."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("", overflow="fold")
    for row in rows:
        shown.add_column(row.name, justify="right", overflow="fold")
    for title, texts in titled(rows):
        shown.add_row(title, *texts)
    return shown


def markdown(report: Report) -> list[str]:
    """Return the report as lines of a page, a line a row."""
    columns = titled(report.rows)
    said = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    lines = [report.host, "", *([said, ""] if said else [])]
    lines.append("| | " + " | ".join(title for title, _ in columns) + " |")
    lines.append("|" + "---|" * (len(columns) + 1))
    for i, row in enumerate(report.rows):
        lines.append(f"| {row.name} | " + " | ".join(texts[i] for _, texts in columns) + " |")
    return lines
