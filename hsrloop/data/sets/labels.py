"""Read one label file: box rows and polygon rows, also mixed; a bad row costs only itself."""

from __future__ import annotations

import codecs
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsrloop.data.sets.places import read_regular
from hsrloop.paths import exists
from hsrloop.records import Problem

TOLERANCE = 0.01  # coordinates this far outside [0, 1] are clipped, further ones are refused
# Source: ultralytics@8.4.190, data/utils.py verify_image_label
SMALLEST = 1e-6  # sides below this are no box: a hundredth of a pixel in 10,000


@dataclass(frozen=True, slots=True)
class Labels:
    """The objects of one image, and which rows were left out and why."""

    boxes_cxcywh: np.ndarray  # (n, 4) float32 in [0, 1]
    labels: np.ndarray  # (n,) int64
    polygons: tuple[np.ndarray | None, ...]  # (k, 2) float32 in [0, 1]; None for a box row
    problems: tuple[Problem, ...] = ()
    duplicates: tuple[Problem, ...] = ()  # rows that repeat another
    lines: tuple[int, ...] = ()  # of each object, from 1


def label_path(image: Path) -> Path:
    """Return where an image's labels belong: the last /images/ becomes /labels/, the suffix .txt.

    The path is taken as written: a symlinked image has its labels beside the link, not its target.
    Without a folder called images, or when nothing is there, labels lie beside the image.
    """
    beside = image.with_suffix(".txt")
    head, images, tail = os.fspath(beside).rpartition(f"{os.sep}images{os.sep}")
    if not images:
        return beside
    mapped = Path(f"{head}{os.sep}labels{os.sep}{tail}")
    return beside if exists(beside) and not exists(mapped) else mapped


def read_labels(source: Path, nc: int, keypoint_columns: int = 0) -> tuple[bytes | None, Labels]:
    """Read a label file; return its bytes, None when there is no file, and the objects in it.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        content: bytes | None = read_regular(source)
    except FileNotFoundError:
        content = None
    return content, parse_labels(_decoded(content or b""), source, nc, keypoint_columns)


def _decoded(content: bytes) -> str:
    """Return the text of a file in UTF-8 or, with a byte order mark, UTF-16."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig", errors="replace")


def parse_labels(text: str, source: Path, nc: int, keypoint_columns: int = 0) -> Labels:
    """Read the rows `class cx cy w h` and `class x y x y x y ...`, all in fractions of the image.

    Args:
        source: the label file, for messages.
        nc: number of classes; rows of others are left out.
        keypoint_columns: columns after each box that belong to keypoints, dropped.
    """
    boxes: list[tuple[float, ...]] = []
    labels: list[int] = []
    polygons: list[np.ndarray | None] = []
    lines: list[int] = []
    problems: list[Problem] = []
    duplicates: list[Problem] = []
    seen: dict[tuple[float, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if keypoint_columns and len(words) == 5 + keypoint_columns:
            words = words[:5]
        row = _numbers(words)
        kind, text = _problem(words, row, nc)
        if kind:
            problems.append(Problem(kind, source, text, number))
            continue
        first = seen.setdefault(tuple(row), number)
        if first != number:
            duplicates.append(Problem("row-twice", source, f"the same as line {first}", number))
            continue
        polygon = _polygon(row) if len(row) > 5 else None
        boxes.append(_clipped(row[1:]) if polygon is None else _around(polygon))
        labels.append(int(row[0]))
        polygons.append(polygon)
        lines.append(number)
    return Labels(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        tuple(polygons),
        tuple(problems),
        tuple(duplicates),
        tuple(lines),
    )


def _numbers(words: list[str]) -> list[float]:
    """Return the row as numbers; NaN where a word is none."""
    try:
        return [float(word) for word in words]
    except ValueError:
        return [math.nan] * len(words)


def _problem(words: list[str], row: list[float], nc: int) -> tuple[str, str]:
    """Return the kind of a row that cannot be used, and why; both empty for a good one."""
    if any("," in word or ";" in word for word in words):
        return "columns", f"'{_short(words)}' has commas; separate columns by spaces"
    if len(row) < 5 or len(row) == 6 or len(row) % 2 == 0:
        text = f"{len(row)} columns; a box has 5, a polygon 7, 9, 11, ..."
        return "columns", text + (_IF_POSE if _may_be_pose(row) else "")
    if not all(math.isfinite(value) for value in row):
        return "not-numbers", f"'{_short(words)}' is not all finite numbers"
    if row[0] != int(row[0]):
        return "class-fraction", f"class {words[0][:20]} is not a whole number"
    if not 0 <= row[0] < nc:
        return "class-unknown", (
            f"class {row[0]:.15g}, but data.yaml names {nc} classes (0-{nc - 1}). "
            "Fix the label or add the class"
        )
    if len(row) == 5 and min(row[3:]) <= 0:
        return "no-area", _no_area(*row[3:])
    wrong = next((v for v in row[1:] if not -TOLERANCE <= v <= 1 + TOLERANCE), None)
    if wrong is not None:
        text = f"coordinate {wrong:g} is outside 0 to 1; write fractions of the image, not pixels"
        return "outside", text + (_IF_POSE if _may_be_pose(row) else "")
    width, height = _extent(row)
    if width <= SMALLEST or height <= SMALLEST:
        return "no-area", _no_area(width, height)
    return "", ""


def _no_area(width: float, height: float) -> str:
    return f"a box of size {width:g} x {height:g}; both sides must be above 0"


_IF_POSE = " (keypoints after the box? data.yaml must say so: kpt_shape: [number, 3])"


def _may_be_pose(row: list[float]) -> bool:
    """Return whether what follows a box may be keypoints: x, y and visibility each."""
    return len(row) > 5 and (len(row) - 5) % 3 == 0 and set(row[7::3]) <= {0.0, 1.0, 2.0}


def _short(words: list[str]) -> str:
    """Return the beginning of a row, safe to print."""
    text = " ".join(words)[:60]
    return text if text.isprintable() else text.encode("unicode_escape").decode()[:60]


def _extent(row: list[float]) -> tuple[float, float]:
    """Return width and height of what is inside the image."""
    if len(row) == 5:
        _, _, width, height = _clipped(row[1:])
    else:
        _, _, width, height = _around(_polygon(row))
    return width, height


def _clipped(box: list[float]) -> tuple[float, ...]:
    """Clip a cxcywh box to the image; one inside, give or take rounding, keeps its digits."""
    cx, cy, w, h = box
    x0, y0, x1, y1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    if min(x0, y0) >= -1e-5 and max(x1, y1) <= 1 + 1e-5:
        return cx, cy, w, h
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def _polygon(row: list[float]) -> np.ndarray:
    return np.array(row[1:], dtype=np.float32).reshape(-1, 2).clip(0, 1)


def _around(polygon: np.ndarray) -> tuple[float, ...]:
    """Return the cxcywh box around a polygon."""
    (x0, y0), (x1, y1) = polygon.min(0).tolist(), polygon.max(0).tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
