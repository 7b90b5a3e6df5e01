"""Label files that train nothing: their image is missing, or in no split."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hsrloop.data.sets.labels import label_path
from hsrloop.data.sets.manifest import Listing
from hsrloop.data.sets.places import SUFFIXES, files_below, read_regular
from hsrloop.records import Problem


def stray_labels(listings: Iterable[Listing], root: Path) -> list[Problem]:
    """Return label files near those of a data set that belong to no image of it.

    Args:
        root: of the data set; nothing is looked for beside it.


    "labels-alone": there is no image anywhere; "labels-unused": there is, but no split has it.
    A file without a row that begins like a label, such as classes.txt, is neither.
    """
    expected: set[Path] = set()
    folders: set[Path] = set()
    for listing in listings:
        unread = [problem.file for problem in listing.unused]  # once converted, they have labels
        expected |= {label_path(path) for path in (*listing.paths, *unread)}
        folders |= {label_path(folder / "any.jpg").parent for folder in listing.folders}
    folders |= {path.parent for path in expected}
    around = {place for folder in folders for place in _around(folder, root)}
    stems: dict[Path, set[str]] = {}
    found = []
    for file in sorted({file for folder in around for file in files_below(folder, _TEXT)}):
        if file not in expected and _looks_like_labels(file):
            kind = "labels-unused" if _has_image(file, stems) else "labels-alone"
            found.append(Problem(kind, file, ""))
    return found


_TEXT = frozenset({".txt"})


def _around(folder: Path, root: Path) -> list[Path]:
    """Return the label folders to look through, so that those of other splits are among them.

    Splits are folders in labels/ or, as Roboflow writes them, folders that have a labels/ each.
    """
    head, labels, _ = f"{folder}{os.sep}".rpartition(f"{os.sep}labels{os.sep}")
    if not labels:
        return [folder]
    split = Path(head)
    others = sorted(split.parent.glob("*/labels")) if root in split.parents else []
    return [split / "labels", *others]


def _looks_like_labels(file: Path) -> bool:
    try:
        words = read_regular(file).split(maxsplit=5)[:5]
        return len(words) == 5 and all(abs(float(word)) < 1e9 for word in words)
    except (OSError, ValueError):
        return False


def _has_image(label: Path, stems: dict[Path, set[str]]) -> bool:
    """Return whether an image lies where this label file would be looked for."""
    head, labels, tail = f"{label.parent}{os.sep}".rpartition(f"{os.sep}labels{os.sep}")
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
