"""Findings about what is labelled: boxes, classes, backgrounds, sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from hsrloop.data.doctor.advice import finding
from hsrloop.data.sets.dataset import ImageRef, SplitScan
from hsrloop.data.sets.labels import label_path
from hsrloop.data.sets.manifest import Manifest
from hsrloop.records import Finding, Problem

TINY_PX = 8.0  # the finest grid's cell; below it little is left of an object
FAR_LARGER = 4.0  # times imgsz; a guess: beyond it JPEGs decode slower than a mosaic is rendered
SAME_BOX_IOU = 0.9  # a guess: two people, or tools, never draw one object closer than this apart
MANY = 0.1  # of a split's images without a label file: more look forgotten; a guess
MANY_TINY = 0.25  # of a class's boxes, and at least this many of them; a guess
LEAST_TINY = 5
FEW_TWICE = 0.01  # of a split's boxes drawn twice: no harm to training yet; a guess
_ROWS = 256  # boxes compared at a time, to bound memory


def sides_px(ref: ImageRef, imgsz: int) -> np.ndarray:
    """Return (n, 2) widths and heights of an image's boxes once its long side is imgsz."""
    scale = imgsz / max(ref.height, ref.width)
    size = np.array([ref.width * scale, ref.height * scale], np.float32)
    sides: np.ndarray = ref.boxes_cxcywh[:, 2:] * size
    return sides


def mean_side_px(ref: ImageRef, imgsz: int) -> np.ndarray:
    """Return (n,) square roots of the areas of an image's boxes at imgsz."""
    side: np.ndarray = np.sqrt(sides_px(ref, imgsz).prod(axis=1))
    return side


def image_findings(scan: SplitScan, *, split: str, imgsz: int) -> list[Finding]:
    """Return images without labels and images far larger than training needs."""
    found = []
    if scan.unlabelled:
        problems = [
            Problem("unlabelled", path, f"{label_path(path)} does not exist")
            for path in scan.unlabelled
        ]
        many = len(problems) > MANY * len(scan.refs)
        found.append(
            finding(
                "unlabelled",
                problems,
                split=split,
                of=len(scan.refs),
                severity="warning" if many else None,
            )
        )
    large = [
        Problem("large", ref.path, f"{ref.width} x {ref.height}")
        for ref in scan.refs
        if max(ref.height, ref.width) > FAR_LARGER * imgsz
    ]
    if large:
        found.append(finding("large", large, split=split, of=len(scan.refs)))
    return found


def box_findings(manifest: Manifest, scan: SplitScan, *, split: str, imgsz: int) -> list[Finding]:
    """Return boxes drawn twice, boxes of two classes, and boxes too small to learn."""
    problems: dict[str, list[Problem]] = {"box-two-classes": [], "box-twice": [], "tiny": []}
    tiny_classes = np.zeros(len(manifest.names), np.int64)
    classes = np.zeros(len(manifest.names), np.int64)
    for ref, lines in zip(scan.refs, scan.lines, strict=True):
        source = label_path(ref.path)
        for i, j, iou in _overlapping(ref.boxes_cxcywh):
            same = ref.labels[i] == ref.labels[j]
            kind = "box-twice" if same else "box-two-classes"
            a, b = manifest.names[ref.labels[i]], manifest.names[ref.labels[j]]
            text = f"{a}, overlaps line {lines[j]}{'' if same else f' ({b})'} by {iou:.2f}"
            problems[kind].append(Problem(kind, source, text, lines[i]))
        classes += np.bincount(ref.labels, minlength=len(classes))
        small = np.flatnonzero(mean_side_px(ref, imgsz) < TINY_PX)
        tiny_classes += np.bincount(ref.labels[small], minlength=len(classes))
        for k, (width, height) in zip(small.tolist(), sides_px(ref, imgsz)[small], strict=True):
            text = f"{manifest.names[ref.labels[k]]}, {width:.1f} x {height:.1f} px at {imgsz}"
            problems["tiny"].append(Problem("tiny", source, text, lines[k]))
    total = int(classes.sum())
    harmless = {
        "tiny": not (tiny_classes >= np.maximum(MANY_TINY * classes, LEAST_TINY)).any(),
        "box-twice": len(problems["box-twice"]) < FEW_TWICE * total,
        "box-two-classes": len(problems["box-two-classes"]) < FEW_TWICE * total,
    }
    return [
        finding(kind, some, split=split, of=total, severity="note" if harmless[kind] else "warning")
        for kind, some in problems.items()
        if some
    ]


def class_findings(
    manifest: Manifest, scans: Mapping[str, SplitScan], cutouts: Collection[int] = ()
) -> list[Finding]:
    """Return classes that train or val never shows; those of a split that is not there are none.

    Args:
        cutouts: classes that are pasted into training images.
    """
    present = {
        split: {int(label) for ref in scan.refs for label in ref.labels}
        for split, scan in scans.items()
    }
    if cutouts:
        present["train"] = present.get("train", set()) | set(cutouts)
    found = []
    for split, kind in (("train", "class-untrained"), ("val", "class-unvalidated")):
        if not present.get(split):
            continue
        absent = [
            Problem(kind, manifest.yaml, f"{name} (class {i})", line)
            for i, (name, line) in enumerate(zip(manifest.names, manifest.name_lines, strict=True))
            if i not in present[split] and (split == "train" or i in present.get("train", {i}))
        ]
        if absent:
            found.append(finding(kind, absent, of=len(manifest.names)))
    return found


def _overlapping(boxes_cxcywh: np.ndarray) -> list[tuple[int, int, float]]:
    """Return (i, j, IoU) of each box i with the first box j < i that nearly equals it."""
    if len(boxes_cxcywh) < 2:
        return []
    half = boxes_cxcywh[:, 2:] / 2
    low, high = boxes_cxcywh[:, :2] - half, boxes_cxcywh[:, :2] + half  # (n, 2)
    area = boxes_cxcywh[:, 2:].prod(axis=1)
    found = []
    for start in range(0, len(area), _ROWS):
        rows = slice(start, start + _ROWS)
        shared = np.minimum(high[rows, None], high) - np.maximum(low[rows, None], low)
        overlap = shared.clip(0).prod(axis=2)  # (rows, n)
        iou = overlap / (area[rows, None] + area - overlap)
        iou[np.arange(len(area)) >= np.arange(start, start + len(iou))[:, None]] = 0
        for i in np.flatnonzero(iou.max(axis=1) >= SAME_BOX_IOU):
            j = int(np.argmax(iou[i] >= SAME_BOX_IOU))
            found.append((start + int(i), j, float(iou[i, j])))
    return found
