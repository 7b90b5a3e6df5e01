"""Look a data set over: what it holds, and what in it would hurt training.

Nothing is written, nothing in data.yaml is executed, and one problem does not hide the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hsrloop.config import TrainConfig
from hsrloop.data.doctor import objects
from hsrloop.data.doctor.advice import by_kind, finding, worst_first
from hsrloop.data.doctor.leaks import leaks, repeats
from hsrloop.data.doctor.names import name_findings
from hsrloop.data.doctor.strays import stray_labels
from hsrloop.data.scenes.cutout_files import annotated_sources
from hsrloop.data.scenes.synthesis import Folders, load_synthesis
from hsrloop.data.sets.alike import Album, Look, look_at
from hsrloop.data.sets.dataset import (
    DatasetSpec,
    SplitScan,
    scan_split,
    why_unusable,
)
from hsrloop.data.sets.manifest import SPLITS, Manifest, list_images
from hsrloop.data.threads import in_threads
from hsrloop.errors import DatasetError
from hsrloop.records import CheckReport, ClassCount, Finding, Problem, SplitCount

Progress = Callable[[str, int, int], None]
_THREADS = os.cpu_count() or 1


@dataclass(slots=True)
class _Findings:
    """What was found so far."""

    found: list[Finding] = field(default_factory=list)

    def add(self, kind: str, problems: Sequence[Problem], *, split: str = "") -> None:
        """Note the problems of one kind, if there are any."""
        if problems:
            self.found.append(finding(kind, problems, split=split))


def check_dataset(
    manifest: Manifest,
    *,
    imgsz: int = 640,
    folders: Folders | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read a data set as training would, decode each image small, and report what is wrong.

    Args:
        imgsz: the size that training would use.
        folders: of cut-outs and backgrounds, which may make up for training images.
        progress: called with (task, done, total).
    """
    notes = _Findings(by_kind([*manifest.remarks, *manifest.faults]) + name_findings(manifest))
    synthetic = folders is not None and folders.suffice
    listings = {
        split: list_images(manifest, split, optional=split == "train" and synthetic)
        for split in SPLITS
        if manifest.splits[split]
    }
    scans: dict[str, SplitScan] = {}
    albums: dict[str, Album] = {}
    for split, listing in listings.items():
        notes.found += by_kind(
            [*listing.remarks, *listing.missing, *listing.unused, *listing.faults], split=split
        )
        if not listing.paths:
            continue
        scan = scan_split(manifest, listing.paths, progress=_named(progress, f"{split} labels"))
        albums[split] = _look(scan, _named(progress, f"{split} images"))
        scans[split] = scan
        _note_split(notes, manifest, split, scan, imgsz)
    notes.found += by_kind(stray_labels(listings.values(), manifest.root))
    _note_repeats(notes, manifest, scans, albums)
    pasted = _note_material(notes, manifest, folders, scans) if folders is not None else set()
    notes.found += objects.class_findings(manifest, scans, pasted)
    return _report(manifest, imgsz, scans, notes.found)


def _named(progress: Progress | None, task: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(task, done, total)


def _look(scan: SplitScan, progress: Callable[[int, int], None] | None) -> Album:
    """Decode all images of a split, and move those that fail to its unreadable ones."""
    looks: list[Look] = []
    kept: list[int] = []
    paths = [ref.path for ref in scan.refs]
    for i, look in enumerate(in_threads(look_at, paths, threads=_THREADS)):
        if look is None:
            scan.unreadable.append(Problem("unreadable", paths[i], "it cannot be decoded"))
        else:
            kept.append(i)
            looks.append(look)
        if progress:
            progress(i + 1, len(paths))
    gone = {problem.file for problem in scan.unreadable}
    scan.refs = [scan.refs[i] for i in kept]
    scan.lines = [scan.lines[i] for i in kept]
    scan.digests = [scan.digests[i] for i in kept]
    scan.unlabelled = [path for path in scan.unlabelled if path not in gone]
    return Album([ref.path for ref in scan.refs], looks)


def _note_split(
    notes: _Findings, manifest: Manifest, split: str, scan: SplitScan, imgsz: int
) -> None:
    """Note what is wrong with the files, rows and boxes of one split."""
    notes.add("unreadable", scan.unreadable, split=split)
    notes.found += by_kind([*scan.bad_rows, *scan.duplicates], split=split)
    if reason := why_unusable(split, scan):
        notes.add("unusable", [Problem("unusable", manifest.yaml, reason)], split=split)
    notes.found += objects.image_findings(scan, split=split, imgsz=imgsz)
    notes.found += objects.box_findings(manifest, scan, split=split, imgsz=imgsz)


def _note_material(
    notes: _Findings, manifest: Manifest, folders: Folders, scans: dict[str, SplitScan]
) -> set[int]:
    """Note what training would refuse of cut-outs; return the classes that there are some of.

    Where they are to make up for training images they are read as training reads them.
    """
    if folders.annotated is None:
        return set()
    alone = folders.suffice and "train" not in scans
    if alone and "val" not in scans:
        reason = "there are neither training nor validation images; add val"
        notes.add("unusable", [Problem("unusable", manifest.yaml, reason)], split="val")
        return set()
    try:
        sources = annotated_sources(folders.annotated, manifest.names)
        if alone:
            load_synthesis(
                TrainConfig(), folders, _without_training(manifest, scans), threads=_THREADS
            )
    except DatasetError as error:
        reason = str(error).removeprefix(f"{manifest.yaml}: ").removesuffix(".")
        notes.add("unusable", [Problem("unusable", manifest.yaml, reason)], split="train")
        return set()
    return {source.label for source in sources}


def _without_training(manifest: Manifest, scans: dict[str, SplitScan]) -> DatasetSpec:
    return DatasetSpec(
        yaml=manifest.yaml,
        root=manifest.root,
        names=manifest.names,
        train=(),
        val=tuple(scans["val"].refs),
        test=(),
        val_held_out=False,
        fingerprint="",
    )


def _note_repeats(
    notes: _Findings, manifest: Manifest, scans: dict[str, SplitScan], albums: dict[str, Album]
) -> None:
    """Note pictures that are there more than once, within a split and across."""
    for split, album in albums.items():
        notes.found += repeats(scans[split].refs, album, split)
    if "val" not in albums:
        if not manifest.splits["val"]:
            notes.add("no-val", [Problem("no-val", manifest.yaml, "")])
    elif "train" in albums and _files(albums["val"]) == _files(albums["train"]):
        notes.add("val-is-train", [Problem("val-is-train", manifest.yaml, "")])
        albums = {split: album for split, album in albums.items() if split != "val"}
    for split in ("val", "test"):
        if split in albums and "train" in albums:
            notes.found += leaks(albums["train"], albums[split], split)


def _files(album: Album) -> set[str]:
    return {os.path.realpath(path) for path in album.paths}


def _report(
    manifest: Manifest, imgsz: int, scans: dict[str, SplitScan], found: Sequence[Finding]
) -> CheckReport:
    """Count what the splits hold."""
    everything = [ref for scan in scans.values() for ref in scan.refs]
    boxes = [ref.boxes_cxcywh for ref in everything]
    sides = [objects.sides_px(ref, imgsz) for ref in everything]
    none = np.zeros((0, 4), np.float32)
    return CheckReport(
        yaml=manifest.yaml,
        root=manifest.root,
        imgsz=imgsz,
        splits=tuple(_split_count(split, scan) for split, scan in scans.items()),
        classes=_class_counts(manifest, scans, imgsz),
        findings=worst_first(found),
        boxes_cxcywh=np.concatenate([none, *boxes]),
        sides_px=np.concatenate([none[:, :2], *sides]),
    )


def _split_count(split: str, scan: SplitScan) -> SplitCount:
    return SplitCount(
        split=split,
        images=len(scan.refs),
        backgrounds=sum(not len(ref.labels) for ref in scan.refs),
        unreadable=len(scan.unreadable),
        boxes=sum(len(ref.labels) for ref in scan.refs),
        classes=len({int(label) for ref in scan.refs for label in ref.labels}),
    )


def _class_counts(
    manifest: Manifest, scans: dict[str, SplitScan], imgsz: int
) -> tuple[ClassCount, ...]:
    nc = len(manifest.names)
    boxes = {split: np.zeros(nc, np.int64) for split in scans}
    images = {split: np.zeros(nc, np.int64) for split in scans}
    sizes: list[list[float]] = [[] for _ in range(nc)]
    for split, scan in scans.items():
        for ref in scan.refs:
            boxes[split] += np.bincount(ref.labels, minlength=nc)
            images[split][np.unique(ref.labels)] += 1
            for label, side in zip(ref.labels, objects.mean_side_px(ref, imgsz), strict=True):
                sizes[label].append(float(side))
    return tuple(
        ClassCount(
            name=name,
            boxes={split: int(counts[i]) for split, counts in boxes.items()},
            images={split: int(counts[i]) for split, counts in images.items()},
            median_px=float(np.median(sizes[i])) if sizes[i] else 0.0,
        )
        for i, name in enumerate(manifest.names)
    )
