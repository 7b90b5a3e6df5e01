"""Read data.yaml as a mapping, and note where its class names stand and what is given twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hsrloop.data.sets.places import read_regular
from hsrloop.errors import DatasetError
from hsrloop.records import Problem

_MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`, which may be there several times
_MOST_BYTES = 16 << 20  # a guess: a second a MiB; 100,000 images listed are half of it
_MOST_KEYS = 200_000  # of one mapping once aliases are merged; a guess


@dataclass(slots=True)
class Notes:
    """What is noticed on the way through one file."""

    file: Path
    remarks: list[Problem] = field(default_factory=list)
    faults: list[Problem] = field(default_factory=list)

    def remark(self, kind: str, text: str, *, line: int = 0) -> None:
        self.remarks.append(Problem(kind, self.file, text, line))

    def fault(self, text: str, *, kind: str = "yaml", line: int = 0) -> None:
        self.faults.append(Problem(kind, self.file, text, line))


class _Loader(yaml.SafeLoader):
    """A safe loader in which merged aliases cannot grow without bound.

    It knows which keys of a mapping are given twice as written: once merged, a key of `<<` that the
    mapping overrides stands in it twice as well.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._repeated: dict[int, list[tuple[str, int, int]]] = {}  # by id of the node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping."""
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        self._repeated[id(node)] = list(_repeated(node))
        return node

    def repeated(self, node: yaml.Node | None) -> list[tuple[str, int, int]]:
        """Return key, line and first line of what a mapping gives again; nothing for others."""
        return self._repeated.get(id(node), [])

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge `<<` keys into a mapping."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(
                None, None, "merged aliases grow without bound", node.start_mark
            )


def parse(notes: Notes) -> tuple[dict[Any, Any], tuple[int, ...]]:
    """Return the mapping in the file and the line of each value in its `names`.

    Raises:
        DatasetError: it cannot be read, or is no mapping. Keys given twice are faults.
    """
    file = notes.file
    text = _text(file)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = (
            " Write Windows paths with forward slashes." if "escape" in str(error.problem) else ""
        )
        hint = " Indent with spaces, not tabs." if "\\t" in str(error.problem) else hint
        raise DatasetError(f"{file}:{line}: not valid YAML: {error.problem}.{hint}") from None
    except RecursionError:
        raise DatasetError(f"{file} is not valid YAML: nested too deeply.") from None
    # A value that does not fit its tag, as in `2024-13-45` or `!!int ""`, raises any of the others.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise DatasetError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise DatasetError(
            f"{file} holds {_kind(data)}; it must map train, val and names to values."
        )
    lines, names = _name_lines(node)
    for mapping, where in ((node, ""), (names, " in names")):  # YAML would silently take the last
        for key, line, first in loader.repeated(mapping):
            text = f"'{key[:80]}' is given twice{where}, the first time in line {first}"
            notes.fault(text, line=line)
    return data, lines


def _repeated(node: yaml.MappingNode) -> Iterator[tuple[str, int, int]]:
    first: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            line = key.start_mark.line + 1
            if key.value in first:
                yield key.value, line, first[key.value]
            first.setdefault(key.value, line)


def _text(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise DatasetError(
                f"{file} has {size >> 20} MiB; a data.yaml has at most {_MOST_BYTES >> 20}. Give "
                "the right file, or list images in .txt files."
            )
        return read_regular(file).decode("utf-8-sig")
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


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _name_lines(node: yaml.Node | None) -> tuple[tuple[int, ...], yaml.Node | None]:
    """Return the line of each value of `names`, in the order written, and the node of it."""
    assert isinstance(node, yaml.MappingNode), "it made a mapping"
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "names":
            if isinstance(value, yaml.SequenceNode):
                return tuple(item.start_mark.line + 1 for item in value.value), value
            if isinstance(value, yaml.MappingNode):
                return tuple(item.start_mark.line + 1 for _, item in value.value), value
    return (), None
