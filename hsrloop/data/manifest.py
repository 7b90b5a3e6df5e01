"""Read data.yaml: class names, and the image files of each split.

A set that moved (another machine, a container, a Windows path) is found again beside its data.yaml.
Nothing named in the file is ever executed or downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hsrloop.data.places import SUFFIXES, images_below, moved, summary
from hsrloop.errors import DatasetError

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What data.yaml says: `splits` maps a split to its entries, paths still as written."""

    yaml: Path
    root: Path
    names: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]
    keypoint_columns: int = 0  # of pose labels, to be dropped from each row


def yaml_file(path: str | Path) -> Path:
    """Return the data.yaml that a path means; a folder stands for the one in it."""
    file = Path(path).expanduser().absolute()  # not resolved: labels lie beside a link
    return file / "data.yaml" if file.is_dir() else file


def read_manifest(path: str | Path, *, train_optional: bool = False) -> Manifest:
    """Read data.yaml; a folder stands for the data.yaml in it.

    Raises:
        DatasetError: the file is missing, not YAML, or says something impossible.
    """
    file = yaml_file(path)
    data = _parse(file)
    if "val" not in data and "validation" in data:
        data["val"] = data["validation"]
    names = _names(file, data)
    splits = {split: _entries(file, split, data.get(split)) for split in SPLITS}
    if not splits["train"] and not train_optional:
        raise DatasetError(
            f"{file} has no 'train'; add the folder of training images, e.g. train: images/train"
        )
    root = _root(file, data.get("path"))
    return Manifest(file, root, names, splits, _keypoint_columns(data.get("kpt_shape")))


def _parse(file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(
            f"{file} does not exist. Give the path of a data.yaml with --dataset."
        ) from None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{file} is not UTF-8 text ({error.reason}). Save it as UTF-8."
        ) from None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = (
            " Write Windows paths with forward slashes." if "escape" in str(error.problem) else ""
        )
        hint = " Indent with spaces, not tabs." if "\\t" in str(error.problem) else hint
        raise DatasetError(f"{file}:{line}: not valid YAML: {error.problem}.{hint}") from None
    except yaml.YAMLError as error:
        raise DatasetError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise DatasetError(
            f"{file} holds {_kind(data)}; it must map train, val and names to values."
        )
    return data


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _names(file: Path, data: dict[str, Any]) -> tuple[str, ...]:
    names, nc = data.get("names"), _nc(file, data.get("nc"))
    if names is None:
        if nc is None:
            raise DatasetError(
                f"{file} has neither 'names' nor 'nc'; add names: [first, second, ...]."
            )
        logger.warning("%s has no 'names'; classes are called class_0 to class_%d.", file, nc - 1)
        return tuple(f"class_{i}" for i in range(nc))
    if isinstance(names, dict):
        names = _ordered(file, names)
    if not isinstance(names, list) or not names:
        raise DatasetError(
            f"{file}: names is {names!r}; it must be a list or a map of class names."
        )
    for i, name in enumerate(names):
        if (
            isinstance(name, bool)
            or not isinstance(name, str | int | float)
            or not str(name).strip()
        ):
            raise DatasetError(
                f"{file}: names[{i}] is {name!r}; it must be text. Put it in quotes."
            )
    if nc is not None and nc != len(names):
        raise DatasetError(
            f"{file}: nc is {nc}, but names has {len(names)} entries; they must agree. Drop nc."
        )
    result = tuple(str(name) for name in names)
    twice = sorted({name for name in result if result.count(name) > 1})
    if twice:
        logger.warning(
            "%s names %s more than once; they are separate classes.", file, ", ".join(twice)
        )
    return result


def _ordered(file: Path, names: dict[Any, Any]) -> list[Any]:
    """Return a map's values by class number, which must run from 0 without gaps."""
    try:
        numbers = {int(key): value for key, value in names.items()}
    except (TypeError, ValueError):
        wrong = next(key for key in names if not str(key).lstrip("-").isdigit())
        raise DatasetError(
            f"{file}: names has the key {wrong!r}; keys must be class numbers 0, 1, 2, ..."
        ) from None
    if sorted(numbers) != list(range(len(names))):
        raise DatasetError(
            f"{file}: names has the keys {sorted(numbers)}; "
            f"they must be 0 to {len(names) - 1} without gaps."
        )
    return [numbers[i] for i in range(len(numbers))]


def _nc(file: Path, value: Any) -> int | None:
    if value is None:
        return None
    try:
        nc = float(value)
    except (TypeError, ValueError):
        nc = 0.5
    if isinstance(value, bool) or nc != int(nc) or nc < 1:
        raise DatasetError(
            f"{file}: nc is {value!r}; it must be a whole number of classes, at least 1."
        )
    return int(nc)


def _keypoint_columns(shape: Any) -> int:
    """Return how many columns of keypoints follow each box in a pose set (kpt_shape: [17, 3])."""
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape):
        return int(shape[0] * shape[1])
    return 0


def _entries(file: Path, split: str, value: Any) -> tuple[str, ...]:
    if value is None or value == "" or value == []:
        return ()
    values = value if isinstance(value, list) else [value]
    for entry in values:
        if not isinstance(entry, str):
            raise DatasetError(
                f"{file}: {split} is {entry!r}; it must be a path or a list of paths."
            )
    return tuple(values)


def _root(file: Path, value: Any) -> Path:
    """Return the folder that entries are relative to."""
    folder = file.parent
    if value is None or value == "":
        return folder
    if not isinstance(value, str):
        raise DatasetError(f"{file}: path is {value!r}; it must be a folder.")
    declared = folder / Path(value).expanduser()
    if declared.is_dir():
        return declared
    found = moved(value, [folder, folder.parent]) or folder
    logger.warning("%s: path %s does not exist here; using %s instead.", file, value, found)
    return found


def images_of(manifest: Manifest, split: str, *, optional: bool = False) -> list[Path]:
    """Return the image files of a split, sorted, each once.

    Args:
        optional: none at all is an answer too.

    Raises:
        DatasetError: an entry does not exist, or there is no image in any of them.
    """
    files: dict[Path, None] = {}
    for entry in manifest.splits[split]:
        place = _locate(manifest, split, entry)
        if place.is_dir():
            files.update(dict.fromkeys(images_below(place)))
        elif place.suffix.lower() == ".txt":
            files.update(dict.fromkeys(_listed(manifest, place)))
        elif place.suffix.lower() in SUFFIXES:
            files[place] = None
        else:
            raise DatasetError(
                f"{manifest.yaml}: {split}: {place} is neither a folder, a .txt list nor an image."
            )
    if not files and not optional:
        where = ", ".join(manifest.splits[split])
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise DatasetError(
            f"{manifest.yaml}: no images in {split} ({where}). Known kinds: {kinds}."
        )
    return sorted(files)


def _locate(manifest: Manifest, split: str, entry: str) -> Path:
    direct = manifest.root / Path(entry).expanduser()
    if direct.exists():
        return direct
    found = moved(entry, [manifest.root, manifest.yaml.parent])
    if found is None:
        remedy = "" if split == "train" else f" Without a '{split}' line, "
        remedy += {
            "train": "",
            "val": "a tenth of train is held out.",
            "test": "there is no test set.",
        }[split]
        raise DatasetError(
            f"{manifest.yaml}: {split}: {direct} does not exist. Paths are relative to 'path', "
            f"which is relative to the folder of data.yaml.{remedy}"
        )
    logger.warning(
        "%s: %s: %s does not exist here; using %s instead.", manifest.yaml, split, entry, found
    )
    return found


def _listed(manifest: Manifest, file: Path) -> Iterator[Path]:
    """Yield the images that a .txt file names; missing ones are counted and located."""
    missing: list[str] = []
    text = file.read_bytes().decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or Path(entry).suffix.lower() not in SUFFIXES:
            continue
        bases = (
            [file.parent, manifest.root] if entry.startswith("./") else [manifest.root, file.parent]
        )
        direct = next((base / entry for base in bases if (base / entry).exists()), None)
        found = direct or moved(entry, bases)
        if found is None:
            missing.append(f"{file}:{number}: {entry} does not exist")
        else:
            yield found
    if missing:
        logger.warning("%s", summary(f"{len(missing)} listed images left out", missing))
