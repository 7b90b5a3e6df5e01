"""Read one label file: box rows and polygon rows, also mixed; a bad row costs only itself."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TOLERANCE = 0.01  # coordinates this far outside [0, 1] are clipped, further ones are refused
# Source: ultralytics@8.4.190, data/utils.py verify_image_label


@dataclass(frozen=True, slots=True)
class Labels:
    """The objects of one image; `problems` say what was left out, with file and line."""

    boxes_cxcywh: np.ndarray  # (n, 4) float32 in [0, 1]
    labels: np.ndarray  # (n,) int64
    polygons: tuple[np.ndarray | None, ...]  # (k, 2) float32 in [0, 1]; None for a box row
    problems: tuple[str, ...] = ()
    duplicates: int = 0


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
    return beside if beside.exists() and not mapped.exists() else mapped


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
    problems: list[str] = []
    seen: set[tuple[float, ...]] = set()
    duplicates = 0
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if keypoint_columns and len(words) == 5 + keypoint_columns:
            words = words[:5]
        row = _numbers(words)
        problem = _problem(words, row, nc)
        if problem:
            problems.append(f"{source}:{number}: {problem}")
            continue
        key = tuple(row)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        polygon = _polygon(row) if len(row) > 5 else None
        boxes.append(_clipped(row[1:]) if polygon is None else _around(polygon))
        labels.append(int(row[0]))
        polygons.append(polygon)
    return Labels(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        tuple(polygons),
        tuple(problems),
        duplicates,
    )


def _numbers(words: list[str]) -> list[float]:
    """Return the row as numbers; NaN where a word is none."""
    try:
        return [float(word) for word in words]
    except ValueError:
        return [math.nan] * len(words)


def _problem(words: list[str], row: list[float], nc: int) -> str:
    """Return why a row cannot be used, or an empty string."""
    if len(row) < 5 or len(row) == 6 or len(row) % 2 == 0:
        return f"{len(row)} columns; a box has 5, a polygon 7, 9, 11, ..."
    if not all(math.isfinite(value) for value in row):
        return f"'{' '.join(words)[:60]}' is not all finite numbers"
    if row[0] != int(row[0]):
        return f"class {words[0]} is not a whole number"
    if not 0 <= row[0] < nc:
        return (
            f"class {int(row[0])}, but data.yaml names {nc} classes (0-{nc - 1}). "
            "Fix the label or add the class"
        )
    wrong = next((v for v in row[1:] if not -TOLERANCE <= v <= 1 + TOLERANCE), None)
    if wrong is not None:
        return f"coordinate {wrong:g} is outside 0 to 1; write fractions of the image, not pixels"
    width, height = _extent(row)
    if width <= 0 or height <= 0:
        return f"a box of size {width:g} x {height:g}; both sides must be above 0"
    return ""


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
    if w <= 0 or h <= 0:
        return cx, cy, min(w, 0.0), min(h, 0.0)
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
