"""Bars of images/s, the bare step's behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hsrloop.bench.results import Report, Row, Spread
from hsrloop.errors import OutputError

_CUT = 1.5  # of what stands beside a bare step
_COLOUR, _BEHIND, _INK = "#3b6ea8", "#d5dde8", "#333333"


def save_bars(report: Report, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        draw_bars(report).savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"--plot {path} cannot be written: {error.strerror}.") from None


def draw_bars(report: Report) -> Figure:
    """Return the figure: a bar a row that has a speed, whiskers from lowest to highest.

    What is much faster than all that stands beside a bare step, as a loader alone, is cut off.
    """
    rows = [row for row in report.rows if row.images_per_s is not None]
    figure = Figure(figsize=(9, 1.4 + 0.55 * max(len(rows), 1)), layout="constrained")
    axes = figure.add_subplot()
    at = np.arange(len(rows))
    bare = [row.bare_images_per_s.median if row.bare_images_per_s else 0.0 for row in rows]
    axes.barh(at, bare, height=0.8, color=_BEHIND, label="bare step")
    speeds = [row.images_per_s for row in rows if row.images_per_s is not None]
    axes.barh(
        at,
        [speed.median for speed in speeds],
        height=0.5,
        color=_COLOUR,
        xerr=_whiskers(speeds),
        ecolor=_INK,
        label="images/s",
    )
    ends = [max(speed.high, behind) for speed, behind in zip(speeds, bare, strict=True)]
    compared = [end for end, behind in zip(ends, bare, strict=True) if behind]
    longest = min(max(ends, default=1.0), _CUT * max(compared, default=math.inf))
    for place, row, end in zip(at, rows, ends, strict=True):  # beside the bar: it may be short
        text = f"  {_said(row)}"
        if end > longest:
            axes.barh(place, end, left=longest, height=0.9, color="white", zorder=2)
            text += " (the bar is cut off)"
        at_end = min(end, longest), place
        axes.annotate(text, at_end, va="center", color=_INK, fontsize=8)
    axes.set_xlim(0, 1.35 * longest)  # room for what stands beside the longest
    axes.set_yticks(at, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("images/s")
    axes.spines[["top", "right"]].set_visible(False)
    if any(bare):
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
    said = "\n".join(text for text in (report.said(), report.host) if text)
    figure.suptitle(said, fontsize=6, color=_INK, wrap=True, parse_math=False)
    return figure


def _whiskers(speeds: Sequence[Spread]) -> np.ndarray:
    below = [speed.median - speed.low for speed in speeds]
    above = [speed.high - speed.median for speed in speeds]
    return np.array([below, above])


def _said(row: Row) -> str:
    assert row.images_per_s is not None
    share = f", {row.efficiency.median:.0%} of bare" if row.efficiency else ""
    return f"{row.images_per_s.median:.1f}{share}"
