"""Label files whose image is missing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hsrloop.data.sets.labels import label_path
from hsrloop.data.sets.manifest import Listing
from hsrloop.data.sets.places import SUFFIXES, files_below, read_regular
from hsrloop.records import Problem


def labels_alone(listings: Iterable[Listing]) -> list[Problem]:
    """Return label files beside those of a data set for which there is no image anywhere.

    A file without a row that begins like a label, such as classes.txt, is none.
    """
    expected: set[Path] = set()
    folders: set[Path] = set()
    for listing in listings:
        expected |= {label_path(path) for path in listing.paths}
        folders |= {label_path(folder / "any.jpg").parent for folder in listing.folders}
    folders |= {path.parent for path in expected}
    stems: dict[Path, set[str]] = {}
    found = []
    for file in sorted({file for folder in folders for file in files_below(folder, _TEXT)}):
        if file not in expected and _looks_like_labels(file) and not _has_image(file, stems):
            found.append(Problem("labels-alone", file, ""))
    return found


_TEXT = frozenset({".txt"})


def _looks_like_labels(file: Path) -> bool:
    try:
        words = read_regular(file).split(maxsplit=5)[:5]
        return len(words) == 5 and all(abs(float(word)) < 1e9 for word in words)
    except (OSError, ValueError):
        return False


def _has_image(label: Path, stems: dict[Path, set[str]]) -> bool:
    """Return whether an image lies where this label file would be looked for, listed or not."""
    head, labels, tail = os.fspath(label.parent / "").rpartition(f"{os.sep}labels{os.sep}")
    places = [label.parent, *([Path(f"{head}{os.sep}images{os.sep}{tail}")] if labels else [])]
    for place in places:
        if place not in stems:
            stems[place] = {path.stem for path in _images_in(place)}
        if label.stem in stems[place]:
            return True
    return False


def _images_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    except OSError:
        return []
