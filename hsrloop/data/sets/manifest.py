"""Understand data.yaml: names, splits, and where their images are; nothing in it is executed.

What can be worked around is a remark; what training must refuse, though the rest can still be
read, is a fault; only a file that says nothing raises.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsrloop.data.sets.document import Notes, parse
from hsrloop.data.sets.places import SUFFIXES, UNREAD_SUFFIXES, files_below, moved, read_regular
from hsrloop.errors import DatasetError
from hsrloop.paths import exists, expanded, is_folder
from hsrloop.records import Problem

SPLITS = ("train", "val", "test")
MOST_CLASSES = 100_000  # a guess: beyond it, nc is a mistake that would fill the memory


@dataclass(frozen=True, slots=True)
class Manifest:
    """What data.yaml says: `splits` maps a split to its entries, paths still as written."""

    yaml: Path
    root: Path
    names: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]
    keypoint_columns: int = 0  # of pose labels, to be dropped from each row
    name_lines: tuple[int, ...] = ()  # of each name in the file, from 1; 0 when unknown
    remarks: tuple[Problem, ...] = ()
    faults: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """The image files of a split, sorted, each once."""

    paths: tuple[Path, ...]
    folders: tuple[Path, ...] = ()  # that were searched for images
    remarks: tuple[Problem, ...] = ()
    missing: tuple[Problem, ...] = ()  # named in a .txt list
    unused: tuple[Problem, ...] = ()  # pictures of a kind that is not read
    faults: tuple[Problem, ...] = ()


def yaml_file(path: str | Path) -> Path:
    """Return the data.yaml that a path means; a folder stands for the one in it."""
    file = expanded(path).absolute()  # not resolved: labels lie beside a link
    return file / "data.yaml" if is_folder(file) else file


def read_manifest(path: str | Path, *, train_optional: bool = False) -> Manifest:
    """Read data.yaml; a folder stands for the data.yaml in it.

    Raises:
        DatasetError: nothing can be made of the file. Smaller things are `faults` of the manifest.
    """
    file = yaml_file(path)
    notes = Notes(file)
    data, lines = parse(notes)
    if "val" not in data and "validation" in data:
        data["val"] = data["validation"]
    names = _names(notes, data)
    splits = {split: _entries(notes, split, data.get(split)) for split in SPLITS}
    if not (splits["train"] or train_optional) and data.get("train") in (None, "", []):
        notes.fault("no 'train'; add the folder of training images, e.g. train: images/train")
    _compare_names(notes, names, lines)
    root = _root(notes, data.get("path"))
    return Manifest(
        yaml=file,
        root=root,
        names=names,
        splits=splits,
        keypoint_columns=_keypoint_columns(data.get("kpt_shape")),
        name_lines=lines if len(lines) == len(names) else (0,) * len(names),
        remarks=tuple(notes.remarks),
        faults=tuple(notes.faults),
    )


def _names(notes: Notes, data: dict[Any, Any]) -> tuple[str, ...]:
    file, names, nc = notes.file, data.get("names"), _nc(notes, data.get("nc"))
    if names is None:
        if nc is None:
            raise DatasetError(
                f"{file} has neither 'names' nor 'nc'; add names: [first, second, ...]."
            )
        notes.remark("no-names", f"no 'names'; classes are called class_0 to class_{nc - 1}")
        return tuple(f"class_{i}" for i in range(nc))
    if isinstance(names, dict):
        names = _ordered(notes, names)
    if not isinstance(names, list) or not names:
        raise DatasetError(
            f"{file}: names is {_brief(names)}; it must be a list or a map of class names."
        )
    for i, name in enumerate(names):
        if (
            isinstance(name, bool)
            or not isinstance(name, str | int | float)
            or not str(name).strip()
        ):
            notes.fault(f"names[{i}] is {_brief(name)}; it must be text. Put it in quotes")
    if nc is not None and nc != len(names):
        notes.fault(f"nc is {nc}, but names has {len(names)} entries; they must agree. Drop nc")
    return tuple(name if isinstance(name, str) else _brief(name) for name in names)


def _compare_names(notes: Notes, names: tuple[str, ...], lines: tuple[int, ...]) -> None:
    """Remark on names that stand for several classes."""
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if first.setdefault(name, i) != i:
            notes.remark(
                "name-twice",
                f"'{name}' is the name of class {first[name]} and of class {i}; "
                "they are separate classes",
                line=lines[i] if len(lines) == len(names) else 0,
            )


def _brief(value: Any) -> str:
    """Return a value as text of bounded length, however its aliases multiply it."""
    if isinstance(value, int | float):
        return str(value)[:80]
    form = reprlib.Repr()
    form.maxlevel, form.maxstring = 2, 60
    return form.repr(value)


def _ordered(notes: Notes, names: dict[Any, Any]) -> list[Any]:
    """Return a map's values by class number; one missing in between gets a name of its own."""
    numbers: dict[int, Any] = {}
    for key, value in names.items():
        try:
            numbers[int(key)] = value
        except (TypeError, ValueError, OverflowError):
            raise DatasetError(
                f"{notes.file}: names has the key {_brief(key)}; "
                "keys must be class numbers 0, 1, 2, ..."
            ) from None
    if sorted(numbers) == list(range(len(names))):
        return [numbers[i] for i in range(len(numbers))]
    notes.fault(
        f"names has the keys {_brief(sorted(numbers))}; "
        f"they must be 0 to {len(names) - 1} without gaps"
    )
    count = min(max(numbers, default=-1) + 1, MOST_CLASSES)
    return [numbers.get(i, f"class_{i}") for i in range(count)]


def _nc(notes: Notes, value: Any) -> int | None:
    if value is None:
        return None
    try:
        nc = float(value)
    except (TypeError, ValueError, OverflowError):
        nc = 0.5
    if isinstance(value, bool) or not 1 <= nc <= MOST_CLASSES or nc != int(nc):
        raise DatasetError(
            f"{notes.file}: nc is {_brief(value)}; it must be a whole number of classes, "
            f"1 to {MOST_CLASSES}."
        )
    return int(nc)


def _keypoint_columns(shape: Any) -> int:
    """Return how many columns of keypoints follow each box in a pose set (kpt_shape: [17, 3])."""
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape):
        return max(0, int(shape[0] * shape[1]))
    return 0


def _entries(notes: Notes, split: str, value: Any) -> tuple[str, ...]:
    if value is None or value == "" or value == []:
        return ()
    values = value if isinstance(value, list) else [value]
    for entry in values:
        if not isinstance(entry, str):
            notes.fault(f"{split} is {_brief(entry)}; it must be a path or a list of paths")
    return tuple(entry for entry in values if isinstance(entry, str))


def _root(notes: Notes, value: Any) -> Path:
    """Return the folder that entries are relative to."""
    folder = notes.file.parent
    if value is None or value == "":
        return folder
    if not isinstance(value, str):
        notes.fault(f"path is {_brief(value)}; it must be a folder")
        return folder
    declared = folder / expanded(value)
    if is_folder(declared):
        return declared
    found = moved(value, [folder, folder.parent]) or folder
    notes.remark("moved", f"path {value[:200]} does not exist here; using {found} instead")
    return found


def list_images(manifest: Manifest, split: str, *, optional: bool = False) -> Listing:
    """Return the image files of a split; `faults` when an entry is missing, or all are empty.

    Args:
        optional: no image at all is an answer too.
    """
    files: dict[Path, None] = {}
    folders: list[Path] = []
    notes = Notes(manifest.yaml)
    missing: list[Problem] = []
    unused: dict[Path, None] = {}
    for entry in manifest.splits[split]:
        place = _locate(manifest, notes, split, entry)
        if place is None:
            continue
        if is_folder(place):
            folders.append(place)
            for path in files_below(place, SUFFIXES | UNREAD_SUFFIXES):
                (files if path.suffix.lower() in SUFFIXES else unused)[path] = None
        elif place.suffix.lower() == ".txt":
            listed, absent = _listed(manifest, notes, place)
            files.update(dict.fromkeys(listed))
            missing += absent
        elif place.suffix.lower() in SUFFIXES:
            files[place] = None
        else:
            notes.fault(f"{split}: {place} is neither a folder, a .txt list nor an image")
    if not (files or optional or notes.faults):
        where = ", ".join(manifest.splits[split])
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        notes.fault(f"no images in {split} ({where[:200]}). Known kinds: {kinds}")
    return Listing(
        tuple(sorted(files)),
        tuple(folders),
        tuple(notes.remarks),
        tuple(missing),
        tuple(Problem("kind-unread", path, "") for path in sorted(unused)),
        tuple(notes.faults),
    )


def _locate(manifest: Manifest, notes: Notes, split: str, entry: str) -> Path | None:
    direct = manifest.root / expanded(entry)
    if exists(direct):
        return direct
    found = moved(entry, [manifest.root, manifest.yaml.parent])
    if found is None:
        remedy = "" if split == "train" else f". Without a '{split}' line, "
        remedy += {
            "train": "",
            "val": "a tenth of train is held out",
            "test": "there is no test set",
        }[split]
        notes.fault(
            f"{split}: {str(direct)[:300]} does not exist. Paths are relative to 'path', "
            f"which is relative to the folder of data.yaml{remedy}"
        )
        return None
    notes.remark("moved", f"{split}: {entry} does not exist here; using {found} instead")
    return found


def _listed(manifest: Manifest, notes: Notes, file: Path) -> tuple[list[Path], list[Problem]]:
    """Return the images that a .txt file names, and those that are not there."""
    found: list[Path] = []
    missing: list[Problem] = []
    try:
        text = read_regular(file).decode("utf-8-sig", errors="replace")
    except OSError as error:
        notes.fault(f"the list {file} cannot be read: {error.strerror}")
        return found, missing
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if Path(entry).suffix.lower() not in SUFFIXES:
            text = f"{entry[:200]} is no image of a kind that is read"
            missing.append(Problem("listed-missing", file, text, number))
            continue
        bases = (
            [file.parent, manifest.root] if entry.startswith("./") else [manifest.root, file.parent]
        )
        direct = next((base / entry for base in bases if exists(base / entry)), None)
        image = direct or moved(entry, bases)
        if image is None:
            text = f"{entry[:200]} does not exist"
            missing.append(Problem("listed-missing", file, text, number))
        else:
            found.append(image)
    return found, missing
