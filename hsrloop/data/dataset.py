"""Load a data set: which images and boxes to train and to validate on.

The user's files are read, never written, and nothing in data.yaml is executed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hsrloop.data.labels import Labels, label_path, parse_labels
from hsrloop.data.manifest import Manifest, images_of, read_manifest
from hsrloop.data.places import summary
from hsrloop.data.scan import Unreadable, image_size
from hsrloop.data.split import hold_out
from hsrloop.errors import DatasetError

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
class _Scan:
    """What one split's files gave."""

    refs: list[ImageRef] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    duplicates: int = 0
    label_files: int = 0


def load_dataset(
    yaml_path: str | Path,
    *,
    seed: int = 0,
    splits: tuple[str, ...] = ("train", "val"),
    train_optional: bool = False,
) -> DatasetSpec:
    """Read data.yaml, its images' headers and its labels.

    What cannot be used is left out with a located warning: a row, or an unreadable image. Without a
    validation split of its own, a tenth of the training images is held out, look-alikes together.

    Args:
        seed: decides which images are held out.
        splits: which of train, val and test to read; the others stay empty.
        train_optional: a set without training images will do, if it has its own validation images.

    Raises:
        DatasetError: a file is missing or malformed, or nothing usable is left.
    """
    manifest = read_manifest(yaml_path, train_optional=train_optional)
    scans = {
        split: _scan(manifest, split, optional=train_optional and split == "train")
        for split in splits
        if manifest.splits[split]
    }
    if train_optional and "train" in scans and not scans["train"].refs:
        del scans["train"]
    if train_optional and not scans:
        raise DatasetError(f"{manifest.yaml} has neither training nor validation images. Add val.")
    held_out = False
    if {"train", "val"} <= set(splits) and "train" in scans:
        held_out = _ensure_validation(manifest, scans, seed)
    for split, scan in scans.items():
        _check_usable(manifest, split, scan)
    if "train" in scans:
        _warn_about_classes(manifest, scans)
    refs = {split: tuple(scan.refs) for split, scan in scans.items()}
    return DatasetSpec(
        yaml=manifest.yaml,
        root=manifest.root,
        names=manifest.names,
        train=refs.get("train", ()),
        val=refs.get("val", ()),
        test=refs.get("test", ()),
        val_held_out=held_out,
        fingerprint=_fingerprint(manifest.names, scans),
    )


def _scan(manifest: Manifest, split: str, *, optional: bool = False) -> _Scan:
    """Read images' headers and labels of one split, and warn of what is left out."""
    paths = images_of(manifest, split, optional=optional)
    scan = _Scan()
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 4)) as pool:
        for path, (size, text, labels, problem) in zip(
            paths, pool.map(lambda path: _read(manifest, path), paths), strict=True
        ):
            scan.problems += labels.problems
            scan.duplicates += labels.duplicates
            scan.label_files += text is not None
            if problem:
                scan.dropped.append(f"{path}: {problem}")
                continue
            scan.refs.append(
                ImageRef(path, *size, labels.boxes_cxcywh, labels.labels, labels.polygons)
            )
            relative = Path(os.path.relpath(path, manifest.root)).as_posix()
            parts = (relative.encode(), text or b"", str(path.stat().st_size).encode())
            scan.digests.append(hashlib.sha256(b"\0".join(parts)).digest())
    if scan.dropped:
        logger.warning(
            "%s", summary(f"{split}: {len(scan.dropped)} unreadable images left out", scan.dropped)
        )
    if scan.problems:
        logger.warning(
            "%s", summary(f"{split}: {len(scan.problems)} bad label rows left out", scan.problems)
        )
    if scan.duplicates:
        logger.warning("%s: %d duplicate label rows left out.", split, scan.duplicates)
    return scan


def _read(manifest: Manifest, path: Path) -> tuple[tuple[int, int], bytes | None, Labels, str]:
    """Return one image's size, label bytes (None: no file), labels, and why it is unusable."""
    source = label_path(path)
    text: bytes | None = None
    try:
        text = source.read_bytes()
    except FileNotFoundError:
        text = None
    except OSError as error:
        return (
            (0, 0),
            None,
            parse_labels("", source, 1),
            f"its labels {source} cannot be read: {error.strerror}",
        )
    decoded = (text or b"").decode("utf-8-sig", errors="replace")
    labels = parse_labels(decoded, source, len(manifest.names), manifest.keypoint_columns)
    try:
        return image_size(path), text, labels, ""
    except Unreadable as error:
        return (0, 0), text, labels, str(error)


def _check_usable(manifest: Manifest, split: str, scan: _Scan) -> None:
    if not scan.refs:
        raise DatasetError(
            f"{manifest.yaml}: none of the {len(scan.dropped)} images in {split} can be read. "
            f"The first: {scan.dropped[0]}."
        )
    if any(len(ref.labels) for ref in scan.refs):
        return
    example = label_path(scan.refs[0].path)
    if scan.problems:
        why = f"all {len(scan.problems)} label rows are bad. The first: {scan.problems[0]}"
    elif scan.label_files:
        why = f"all {scan.label_files} label files are empty"
    else:
        why = f"there is no label file; for {scan.refs[0].path.name} it would be {example}"
    raise DatasetError(f"{manifest.yaml}: no usable box in {split}: {why}.")


def _ensure_validation(manifest: Manifest, scans: dict[str, _Scan], seed: int) -> bool:
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
    useful = [len(ref.labels) > 0 for ref in train.refs]
    picked = set(hold_out([ref.path for ref in train.refs], seed=seed, useful=useful))
    if not picked:
        logger.warning(
            "%s: %s and only %d image: it is used for both.", manifest.yaml, why, len(train.refs)
        )
        scans["val"] = train
        return True
    kept, held = _Scan(), _Scan()
    for i, (ref, digest) in enumerate(zip(train.refs, train.digests, strict=True)):
        side = held if i in picked else kept
        side.refs.append(ref)
        side.digests.append(digest)
    for side in (kept, held):
        side.label_files, side.problems, side.dropped = (
            train.label_files,
            train.problems,
            train.dropped,
        )
    scans["train"], scans["val"] = kept, held
    logger.warning(
        "%s: %s, so %d of %d images are held out for validation (seed %d) and not trained on. "
        "Add val images of other scenes to know how good the model is.",
        manifest.yaml, why, len(held.refs), len(train.refs), seed,
    )  # fmt: skip
    return True


def _real(scan: _Scan) -> set[str]:
    return {os.path.realpath(ref.path) for ref in scan.refs}


def _warn_about_classes(manifest: Manifest, scans: dict[str, _Scan]) -> None:
    present = {split: _classes(scan) for split, scan in scans.items()}
    absent = [name for i, name in enumerate(manifest.names) if i not in present["train"]]
    if absent:
        logger.warning("%d classes have no training image: %s.", len(absent), _few(absent))
    if "val" in present:
        unseen = [manifest.names[i] for i in sorted(present["train"] - present["val"])]
        if unseen:
            logger.warning("%d classes have no validation image: %s.", len(unseen), _few(unseen))


def _classes(scan: _Scan) -> set[int]:
    return {int(label) for ref in scan.refs for label in ref.labels}


def _few(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _fingerprint(names: tuple[str, ...], scans: dict[str, _Scan]) -> str:
    digest = hashlib.sha256("\0".join(names).encode())
    for split in sorted(scans):
        digest.update(f"\n{split}\n".encode())
        for part in scans[split].digests:
            digest.update(part)
    return digest.hexdigest()
