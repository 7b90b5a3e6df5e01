"""Find cut-outs below a folder of class folders, and say of each file why it cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsrloop.data.scenes.cutouts import Cutout, read_cutout
from hsrloop.data.sets.places import SUFFIXES, summary
from hsrloop.data.sets.scan import Unreadable
from hsrloop.data.threads import in_threads
from hsrloop.errors import DatasetError

logger = logging.getLogger(__name__)

LAYOUT = (
    "DIR/<class name>/images/a.jpg with DIR/<class name>/masks/a_mask.png or a.png, or images with "
    "transparency"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One file that may be a cut-out; without a mask its own transparency is the mask."""

    path: Path
    mask: Path | None
    label: int


def annotated_sources(folder: Path, names: Sequence[str]) -> list[Source]:
    """Return the files below the class folders of `folder`, class by class.

    Raises:
        DatasetError: a folder is named like no class.
    """
    folders = _folders(folder)
    unknown = [place.name for place in folders if place.name not in names]
    if unknown:
        raise DatasetError(
            f"{folder}: no class is named {', '.join(unknown)}. data.yaml names "
            f"{', '.join(names)}. Rename the folders, or move those of other objects to "
            "--distractors-dir."
        )
    by_name = {place.name: place for place in folders}
    return [
        Source(path, mask, label)
        for label, name in enumerate(names)
        if name in by_name and name not in names[:label]
        for path, mask in _files(by_name[name])
    ]


def distractor_sources(folder: Path, names: Sequence[str]) -> list[Source]:
    """Return the files in `folder` and in its folders, less those named like a class."""
    places = [place for place in _folders(folder) if place.name not in ("images", "masks")]
    known = [place.name for place in places if place.name in names]
    if known:
        logger.warning(
            "%s: %s left out: distractors have no label, and these are classes.",
            folder,
            ", ".join(known),
        )
    places = [folder, *(place for place in places if place.name not in names)]
    return [Source(path, mask, -1) for place in places for path, mask in _files(place)]


def read_all(sources: Sequence[Source], *, threads: int) -> list[Cutout]:
    """Read cut-outs; what cannot be used is left out with a warning that counts and locates it.

    An object that its photograph's frame cuts is left out too, unless its class has no other.
    """

    def read(source: Source) -> Cutout | str:
        try:
            return read_cutout(source.path, source.mask, source.label)
        except Unreadable as error:
            return f"{source.path}: {error}"

    results = list(in_threads(read, sources, threads=threads))
    found = [result for result in results if isinstance(result, Cutout)]
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        logger.warning("%s", summary(f"{len(problems)} bad cut-outs left out", problems))
    return _without_cut(found)


def _without_cut(found: Sequence[Cutout]) -> list[Cutout]:
    """Leave out objects that a frame cuts: pasted elsewhere, they would look broken."""
    whole = {cutout.label for cutout in found if not cutout.cut}
    out = [cutout for cutout in found if cutout.cut and cutout.label in whole]
    kept = [cutout for cutout in found if cutout.cut and cutout.label not in whole]
    for title, part in (
        (f"{len(out)} cut-outs left out: the frame of the photograph cuts the object", out),
        (f"{len(kept)} cut-outs are cut by the frame, and used: their class has no other", kept),
    ):
        if part:
            logger.warning("%s", summary(title, [str(cutout.path) for cutout in part]))
    return [cutout for cutout in found if not (cutout.cut and cutout.label in whole)]


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield the images of one object's folder with their masks."""
    place = folder / "masks"
    found = [path for path in place.iterdir() if path.is_file()] if place.is_dir() else []
    masks = {path.stem + path.suffix.lower(): path for path in sorted(found)}
    for place in (folder / "images", folder):
        if not place.is_dir():
            continue
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                yield path, next((masks[n] for n in _mask_names(path) if n in masks), None)


def _mask_names(path: Path) -> list[str]:
    """Return what an image's mask may be called, in small letters but for its stem."""
    return [f"{path.stem}{end}.png" for end in ("_mask", "")]
