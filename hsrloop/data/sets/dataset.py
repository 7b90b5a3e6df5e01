"""Load a data set: which images and boxes to train and to validate on.

The user's files are read, never written, and nothing in data.yaml is executed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hsrloop.data.sets.labels import Labels, label_path, parse_labels, read_labels
from hsrloop.data.sets.manifest import Listing, Manifest, list_images, read_manifest
from hsrloop.data.sets.places import summary
from hsrloop.data.sets.scan import Unreadable, image_size, quiet_pillow
from hsrloop.data.sets.split import hold_out
from hsrloop.data.threads import in_threads
from hsrloop.errors import DatasetError
from hsrloop.records import Problem
from hsrloop.words import counted, few

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ImageRef:
    """One usable image and its objects; size as decoded, EXIF orientation applied."""

    path: Path
    height: int
    width: int
    boxes_cxcywh: np.ndarray  # (n, 4) float32, fractions of the image
    labels: np.ndarray  # (n,) int64
    polygons: tuple[np.ndarray | None, ...]  # per row (k, 2) float32, fractions; None for a box row


@dataclass(frozen=True, slots=True, eq=False)
class DatasetSpec:
    """A data set ready to be used; images sorted by path.

    `fingerprint` covers the names, and of each image its path relative to `root`, its label bytes
    and its size in bytes: equal for a set that was only moved.
    """

    yaml: Path
    root: Path
    names: tuple[str, ...]
    train: tuple[ImageRef, ...]
    val: tuple[ImageRef, ...]
    test: tuple[ImageRef, ...]
    val_held_out: bool
    fingerprint: str

    @property
    def nc(self) -> int:
        """Return the number of classes."""
        return len(self.names)


@dataclass(slots=True)
class SplitScan:
    """What one split's files gave."""

    refs: list[ImageRef] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of each ref: its part of the fingerprint
    lines: list[tuple[int, ...]] = field(default_factory=list)  # of each ref: of its label rows
    unreadable: list[Problem] = field(default_factory=list)
    bad_rows: list[Problem] = field(default_factory=list)
    duplicates: list[Problem] = field(default_factory=list)
    unlabelled: list[Path] = field(default_factory=list)  # readable images without a label file
    label_files: int = 0


@dataclass(frozen=True, slots=True)
class _Read:
    """One image's header and labels."""

    size: tuple[int, int]  # (height, width); zeros when it is unusable
    content: bytes | None  # of the label file; None when there is none
    labels: Labels
    problem: Problem | None = None  # why the image is unusable


def load_dataset(
    yaml_path: str | Path,
    *,
    seed: int = 0,
    splits: tuple[str, ...] = ("train", "val"),
    train_optional: bool = False,
    cutouts_follow: bool = False,
) -> DatasetSpec:
    """Read data.yaml, its images' headers and its labels.

    What cannot be used is left out with a located warning: a row, or an unreadable image. Without a
    validation split of its own, a tenth of the training images is held out, look-alikes together.

    Args:
        seed: decides which images are held out.
        splits: which of train, val and test to read; the others stay empty.
        train_optional: a set without training images will do, if it has its own validation images.
        cutouts_follow: whoever reads them will call `warn_about_classes`.

    Raises:
        DatasetError: a file is missing or malformed, or nothing usable is left.
    """
    manifest = read_manifest(yaml_path, train_optional=train_optional)
    _heed(manifest.remarks, manifest.faults)
    scans: dict[str, SplitScan] = {}
    for split in splits:
        if manifest.splits[split]:
            optional = train_optional and split == "train"
            listing = list_images(manifest, split, optional=optional)
            _heed(listing.remarks, listing.faults)
            scan = scan_split(manifest, listing.paths)
            _warn_of_losses(split, scan, listing)
            if scan.refs or not optional:
                scans[split] = scan
    if train_optional and not scans:
        raise DatasetError(f"{manifest.yaml} has neither training nor validation images. Add val.")
    held_out = False
    if {"train", "val"} <= set(splits) and "train" in scans:
        held_out = _ensure_validation(manifest, scans, seed)
    for split, scan in scans.items():
        if reason := why_unusable(split, scan):
            raise DatasetError(f"{manifest.yaml}: {reason}.")
    refs = {split: tuple(scan.refs) for split, scan in scans.items()}
    spec = DatasetSpec(
        yaml=manifest.yaml,
        root=manifest.root,
        names=manifest.names,
        train=refs.get("train", ()),
        val=refs.get("val", ()),
        test=refs.get("test", ()),
        val_held_out=held_out,
        fingerprint=_fingerprint(manifest.names, scans),
    )
    if "train" in scans and not cutouts_follow:
        warn_about_classes(spec)
    return spec


def _heed(remarks: Sequence[Problem], faults: Sequence[Problem]) -> None:
    """Warn of what was worked around; raise the first of what cannot be."""
    for remark in remarks:
        logger.warning("%s.", remark)
    if faults:
        raise DatasetError(f"{faults[0]}.")


def scan_split(
    manifest: Manifest, paths: Sequence[Path], *, progress: Callable[[int, int], None] | None = None
) -> SplitScan:
    """Read the headers of images and their labels.

    Args:
        progress: called with (done, total).
    """
    scan = SplitScan()
    threads = min(8, (os.cpu_count() or 1) + 4)
    with quiet_pillow():
        found = in_threads(lambda path: _read(manifest, path), paths, threads=threads)
        for done, (path, read) in enumerate(zip(paths, found, strict=True), 1):
            _add(scan, manifest.root, path, read)
            if progress:
                progress(done, len(paths))
    return scan


def _add(scan: SplitScan, root: Path, path: Path, read: _Read) -> None:
    labels = read.labels
    scan.bad_rows += labels.problems
    scan.duplicates += labels.duplicates
    scan.label_files += read.content is not None
    if read.problem is not None:
        scan.unreadable.append(read.problem)
        return
    if read.content is None:
        scan.unlabelled.append(path)
    scan.refs.append(
        ImageRef(path, *read.size, labels.boxes_cxcywh, labels.labels, labels.polygons)
    )
    scan.lines.append(labels.lines)
    relative = os.fsencode(Path(os.path.relpath(path, root)).as_posix())
    parts = (relative, read.content or b"", str(path.stat().st_size).encode())
    scan.digests.append(hashlib.sha256(b"\0".join(parts)).digest())


def _read(manifest: Manifest, path: Path) -> _Read:
    """Read one image's header and its labels."""
    source = label_path(path)
    nc = len(manifest.names)
    try:
        content, labels = read_labels(source, nc, manifest.keypoint_columns)
    except OSError as error:
        reason = f"its labels {source} cannot be read: {error.strerror}"
        return _Read(
            (0, 0), None, parse_labels("", source, nc), Problem("unreadable", path, reason)
        )
    try:
        return _Read(image_size(path), content, labels)
    except Unreadable as error:
        return _Read((0, 0), content, labels, Problem("unreadable", path, str(error)))


def _warn_of_losses(split: str, scan: SplitScan, listing: Listing) -> None:
    """Warn of what is left out of a split, with places."""
    for count, what, problems in (
        (len(listing.missing), "listed images left out", listing.missing),
        (len(listing.unused), "pictures of kinds that are not read left out", listing.unused),
        (len(scan.unreadable), "unreadable images left out", scan.unreadable),
        (len(scan.bad_rows), "bad label rows left out", scan.bad_rows),
    ):
        if count:
            logger.warning("%s", summary(f"{split}: {count} {what}", problems))
    if scan.duplicates:
        logger.warning("%s: %d duplicate label rows left out.", split, len(scan.duplicates))
    if 0 < len(scan.unlabelled) < len(scan.refs):
        logger.warning(
            "%s: %d of %d images have no label file and count as background; "
            "`hsrloop check` names them.",
            split, len(scan.unlabelled), len(scan.refs),
        )  # fmt: skip


def why_unusable(split: str, scan: SplitScan) -> str:
    """Return why nothing in a split can be trained or validated on; empty when something can."""
    if not scan.refs and not scan.unreadable:
        return f"there are no images in {split}"
    if not scan.refs:
        return (
            f"none of the {len(scan.unreadable)} images in {split} can be read. "
            f"The first: {scan.unreadable[0]}"
        )
    if any(len(ref.labels) for ref in scan.refs):
        return ""
    example = label_path(scan.refs[0].path)
    if scan.bad_rows:
        why = f"all {len(scan.bad_rows)} label rows are bad. The first: {scan.bad_rows[0]}"
    elif scan.label_files:
        why = f"all {scan.label_files} label files are empty"
    else:
        why = f"there is no label file; for {scan.refs[0].path.name} it would be {example}"
    return f"no usable box in {split}: {why}"


def _ensure_validation(manifest: Manifest, scans: dict[str, SplitScan], seed: int) -> bool:
    """Hold out a tenth of train when val is missing or the same; return whether it was done."""
    train, val = scans["train"], scans.get("val")
    if val is not None:
        shared = _real(train) & _real(val)
        if _real(train) != _real(val):
            if shared:
                logger.warning(
                    "%d images are in both train and val: validation will look too good.",
                    len(shared),
                )
            return False
    why = "no val in data.yaml" if val is None else "val is the same images as train"
    shown = [set(ref.labels.tolist()) for ref in train.refs]
    picked = set(hold_out([ref.path for ref in train.refs], seed=seed, shown=shown))
    if not picked:
        logger.warning(
            "%s: %s and too few pictures with objects to hold some out: all %d are used for both.",
            manifest.yaml, why, len(train.refs),
        )  # fmt: skip
        scans["val"] = train
        return True
    kept, held = SplitScan(), SplitScan()
    for i, (ref, digest) in enumerate(zip(train.refs, train.digests, strict=True)):
        side = held if i in picked else kept
        side.refs.append(ref)
        side.digests.append(digest)
    for side in (kept, held):
        side.label_files = train.label_files
        side.bad_rows, side.unreadable = train.bad_rows, train.unreadable
    scans["train"], scans["val"] = kept, held
    logger.warning(
        "%s: %s, so %d of %d images are held out for validation (seed %d) and not trained on. "
        "Add val images of other scenes to know how good the model is.",
        manifest.yaml, why, len(held.refs), len(train.refs), seed,
    )  # fmt: skip
    return True


def _real(scan: SplitScan) -> set[str]:
    """Return the files behind the images, whatever links they were reached by."""
    return {os.path.realpath(ref.path) for ref in scan.refs}


def warn_about_classes(spec: DatasetSpec, cutouts: Collection[int] = ()) -> None:
    """Warn of classes that nothing shows in training, and of those that validation never shows.

    Args:
        cutouts: classes that are pasted.
    """
    trained = _classes(spec.train) | set(cutouts)
    absent = [name for i, name in enumerate(spec.names) if i not in trained]
    if absent:
        what = "training image or cut-out" if cutouts else "training image"
        logger.warning("no %s of %s: %s.", what, counted(len(absent), "class"), few(absent))
    if spec.val:
        unseen = [spec.names[i] for i in sorted(trained - _classes(spec.val))]
        if unseen:
            classes = counted(len(unseen), "class")
            logger.warning("no validation image of %s: %s.", classes, few(unseen))


def _classes(refs: Sequence[ImageRef]) -> set[int]:
    return {int(label) for ref in refs for label in ref.labels}


def _fingerprint(names: tuple[str, ...], scans: dict[str, SplitScan]) -> str:
    digest = hashlib.sha256("\0".join(names).encode())
    for split in sorted(scans):
        digest.update(f"\n{split}\n".encode())
        for part in scans[split].digests:
            digest.update(part)
    return digest.hexdigest()
