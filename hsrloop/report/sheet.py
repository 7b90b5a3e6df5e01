"""One picture of a data set: boxes by class, their sizes, and where they lie."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hsrloop.errors import OutputError
from hsrloop.records import CheckReport, ClassCount
from hsrloop.report.checkup import clean

_LOG = logging.getLogger(__name__)
_COLOURS = {"train": "#3b6ea8", "val": "#e08a3c", "test": "#8a8a8a"}
_INK = "#333333"
_MOST_BARS = 60  # classes with a bar of their own
_FEWEST_ROWS = 12  # of room for bars, so that few of them are no blocks
_LONGEST_NAME = 24
_CELLS = 24  # of the heat map, a side
_TINY_PX = 8
_FONT = "DejaVu Sans"  # comes with matplotlib
# Of those installed, one after the other draws what those before lack: Latin letters apart.
_MORE_FONTS = re.compile(
    r"Noto Sans (CJK )?(JP|KR|SC|TC)|IPA.*Gothic|Takao.*Gothic|VL.*Gothic|MS Gothic|Yu Gothic"
    r"|Hiragino Sans|Meiryo|WenQuanYi|Nanum|Malgun|Droid Sans Fallback"
)


def save_sheet(report: CheckReport, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OutputError: it cannot be written.
    """
    with matplotlib.rc_context({"font.size": 9, "font.family": _installed_fonts()}):
        figure = draw_sheet(report)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            try:
                figure.savefig(path, format="png", dpi=120)
            except OSError as error:
                raise OutputError(f"--plot {path} cannot be written: {error.strerror}.") from None
    unknown = [warning for warning in given if "missing from font" in str(warning.message)]
    for warning in given:
        if warning not in unknown:
            warnings.warn(warning.message, stacklevel=2)
    if unknown:
        _LOG.warning(
            "%s: some letters are drawn as boxes, since no font here has them. "
            "sudo apt install fonts-noto-cjk helps.",
            path,
        )


def draw_sheet(report: CheckReport) -> Figure:
    """Return the figure: a bar for each class on the left, sizes and places on the right."""
    bars = len(_bars(report.classes, [count.split for count in report.splits])[0])
    figure = Figure(figsize=(12, max(7.0, 1.6 + 0.19 * bars)), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    boxes, images = len(report.boxes_cxcywh), sum(count.images for count in report.splits)
    figure.suptitle(
        clean(f"{_two_parts(report.yaml)}: {images} images, {boxes} boxes"),
        fontsize=12,
        color=_INK,
        parse_math=False,
    )
    _draw_classes(figure.add_subplot(grid[:, 0]), report)
    _draw_sizes(figure.add_subplot(grid[0, 1]), report)
    _draw_places(figure, figure.add_subplot(grid[1, 1]), report)
    return figure


def _installed_fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = sorted(set(fontManager.get_font_names()))
    return [_FONT, *(font for font in installed if _MORE_FONTS.match(font))]


def _two_parts(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _draw_classes(axes: Axes, report: CheckReport) -> None:
    """Draw boxes by class, stacked by split; most on top."""
    splits = [count.split for count in report.splits]
    names, rows = _bars(report.classes, splits)
    at = np.arange(len(names))
    left = np.zeros(len(names))
    for i, split in enumerate(splits):
        widths = np.array([row[i] for row in rows], dtype=float)
        axes.barh(at, widths, left=left, height=0.78, color=_COLOURS[split], label=split)
        left += widths
    for y, total in zip(at, left, strict=True):
        axes.annotate(
            f"{total:.0f}", (total, y), (3, 0), textcoords="offset points", va="center",
            fontsize=7, color=_INK,
        )  # fmt: skip
    axes.set_yticks(at, names, parse_math=False)
    axes.set_ylim(max(len(names), _FEWEST_ROWS) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _dress(axes, "Boxes by class", "boxes")
    axes.tick_params(axis="y", length=0)
    if splits:
        axes.legend(loc="lower right", frameon=False)


def _bars(
    classes: Sequence[ClassCount], splits: Sequence[str]
) -> tuple[list[str], list[list[int]]]:
    """Return names and boxes by split of each bar; of many classes the rest is summed up."""
    ordered = sorted(classes, key=_total, reverse=True)
    if len(ordered) > _MOST_BARS:
        used = [count for count in ordered if _total(count)]
        shown = used if len(used) < _MOST_BARS else used[: _MOST_BARS - 1]
    else:
        shown = ordered
    names = [_short(count.name) for count in shown]
    rows = [[count.boxes[split] for split in splits] for count in shown]
    if rest := ordered[len(shown) :]:
        names.append(f"{len(rest)} more classes")
        rows.append([sum(count.boxes[split] for count in rest) for split in splits])
    return names, rows


def _total(count: ClassCount) -> int:
    return sum(count.boxes.values())


def _short(name: str) -> str:
    name = clean(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _draw_sizes(axes: Axes, report: CheckReport) -> None:
    """Draw how large boxes are at imgsz, on a logarithmic axis, with the limit of tiny."""
    side = np.sqrt(report.sides_px.prod(axis=1))
    _dress(axes, f"Box size at imgsz {report.imgsz}", "square root of the area, px")
    axes.set_ylabel("boxes", color=_INK)
    if not len(side):
        return _say_none(axes)
    ends = min(float(side.min()), _TINY_PX / 2), float(report.imgsz)
    axes.hist(side, bins=np.geomspace(max(ends[0], 0.5), ends[1], 41).tolist(), color="#3b6ea8")
    axes.set_xscale("log", base=2)
    ticks = [px for px in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if px <= ends[1]]
    axes.set_xticks(ticks, [str(px) for px in ticks])
    axes.set_xlim(max(ends[0], 0.5), ends[1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    tiny = int((side < _TINY_PX).sum())
    axes.axvline(_TINY_PX, color="#b03030", linewidth=1, linestyle="--")
    axes.annotate(
        f"below {_TINY_PX} px: {tiny}", (_TINY_PX, 1), (4, -4), xycoords=("data", "axes fraction"),
        textcoords="offset points", va="top", color="#b03030", fontsize=8,
    )  # fmt: skip


def _draw_places(figure: Figure, axes: Axes, report: CheckReport) -> None:
    """Draw how many box centres fall into each cell of the image."""
    _dress(axes, "Box centres", "x, fraction of the width")
    axes.set_ylabel("y, fraction of the height", color=_INK)
    axes.grid(visible=False)
    if not len(report.boxes_cxcywh):
        return _say_none(axes)
    x, y = report.boxes_cxcywh[:, 0], report.boxes_cxcywh[:, 1]
    counts, _, _ = np.histogram2d(y, x, bins=_CELLS, range=((0, 1), (0, 1)))
    drawn = axes.imshow(
        counts, extent=(0, 1, 1, 0), cmap="Blues", aspect="auto", interpolation="nearest"
    )
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    bar.outline.set_visible(False)


def _dress(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.set_xlabel(xlabel, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def _say_none(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no boxes", ha="center", va="center", transform=axes.transAxes)
