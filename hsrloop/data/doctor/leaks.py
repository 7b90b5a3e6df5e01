"""Pictures that are in a data set more than once: within a split, and between train and another."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hsrloop.data.doctor.advice import finding
from hsrloop.data.sets.alike import (
    BURST,
    NEAR,
    SAME_CELL,
    Groups,
    Look,
    bit_counts,
    bits_apart,
    distances,
    original_stem,
)
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.records import Finding, Problem

_BURST_STEP = 2  # between the numbers of neighbours in a burst
_SHOWN = 3  # members of a group named in its line


class Album:
    """The pictures of one split, ready to be compared; `looks` in the order of `refs`."""

    def __init__(self, refs: Sequence[ImageRef], looks: Sequence[Look]) -> None:
        self.refs = refs
        self.looks = looks
        self.hashes = np.array([look.hash for look in looks], dtype=np.uint64)
        self.grids = np.array([look.grid for look in looks], dtype=np.float32).reshape(-1, 256)

    def same(self, look: Look, candidates: np.ndarray) -> np.ndarray:
        """Return those of the candidates (indices) that show the same picture, best first."""
        worst = np.abs(self.grids[candidates] - look.grid).max(axis=1, initial=0.0)
        order = np.argsort(worst, kind="stable")
        found: np.ndarray = candidates[order][worst[order] <= SAME_CELL]
        return found


def repeats(album: Album, split: str) -> list[Finding]:
    """Return copies, and groups of pictures that look alike, within one split."""
    copies, contradictions, first = _copies(album)
    found = []
    for kind, problems in (("copy-contradicts", contradictions), ("copy", copies)):
        if problems:
            found.append(finding(kind, problems, split=split, of=len(album.refs)))
    groups = _alike(Album([album.refs[i] for i in first], [album.looks[i] for i in first]))
    if groups:
        found.append(finding("alike", groups, split=split))
    return found


def leaks(train: Album, other: Album, split: str) -> list[Finding]:
    """Return the pictures of another split that training sees as well, each once."""
    found: dict[str, list[Problem]] = defaultdict(list)
    copies = {look.digest: i for i, look in reversed(list(enumerate(train.looks)))}
    versions = _versions(train)
    series = _series(train)
    counts = bit_counts()
    for ref, look in zip(other.refs, other.looks, strict=True):
        apart = bits_apart(train.hashes, np.uint64(look.hash), counts)
        alike = train.same(look, np.flatnonzero(apart <= NEAR))
        before = series.get(_place_in_series(ref.path), [])
        burst = [i for i in before if apart[i] <= BURST]
        if look.digest in copies:
            kind, twin = "copy-across", copies[look.digest]
        elif len(alike) or _version(ref.path) in versions:
            kind = "alike-across"
            twin = int(alike[0]) if len(alike) else versions[_version(ref.path)]
        elif burst:
            kind, twin = "burst-across", burst[0]
        else:
            continue
        found[kind].append(Problem(kind, ref.path, f"see {train.refs[twin].path}"))
    return [
        finding(kind, problems, split=split, of=len(other.refs)) for kind, problems in found.items()
    ]


def _copies(album: Album) -> tuple[list[Problem], list[Problem], list[int]]:
    """Return copies that agree, copies that contradict, and the first of each picture."""
    agree: list[Problem] = []
    contradict: list[Problem] = []
    first: dict[bytes, int] = {}
    for i, (ref, look) in enumerate(zip(album.refs, album.looks, strict=True)):
        original = album.refs[first.setdefault(look.digest, i)]
        if original is ref:
            continue
        if _objects(original) == _objects(ref):
            agree.append(Problem("copy", ref.path, f"see {original.path}"))
        else:
            contradict.append(Problem("copy-contradicts", ref.path, f"see {original.path}"))
    return agree, contradict, list(first.values())


def _objects(ref: ImageRef) -> list[tuple[float, ...]]:
    rows = np.column_stack((ref.labels, ref.boxes_cxcywh)).round(4)
    return sorted(map(tuple, rows.tolist()))


def _alike(album: Album) -> list[Problem]:
    """Return a problem for each group of two or more pictures that look alike."""
    groups = Groups(len(album.refs))
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, ref in enumerate(album.refs):
        members[str(ref.path.parent), original_stem(ref.path)].append(i)
    for same in members.values():
        groups.join(same[0], same[1:])
    series = _series(album)
    for i, apart in enumerate(distances(album.hashes)):
        near = groups.apart(i, np.flatnonzero(apart <= NEAR) + i + 1)
        groups.join(i, album.same(album.looks[i], near))
        following = [j for j in series.get(_place_in_series(album.refs[i].path), []) if j > i]
        groups.join(i, [j for j in following if apart[j - i - 1] <= BURST])
    found = []
    for group in groups.lists():
        if len(group) > 1:
            names = [album.refs[i].path.name for i in group[1:]]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            text = f"with {', '.join(names[:_SHOWN])}{more}"
            found.append(Problem("alike", album.refs[group[0]].path, text))
    return found


_Place = tuple[str, int]


def _place_in_series(path: Path) -> _Place:
    """Return a camera's name for a picture, without its last number, and that number."""
    head, number, tail = re.fullmatch(r"(.*?)(\d{0,18})(\D*)", original_stem(path), re.S).groups()  # type: ignore[union-attr]
    return (f"{head}#{tail}", int(number)) if number else ("", 0)


def _series(album: Album) -> dict[_Place, list[int]]:
    """Return for each place in a series which pictures lie within a burst's step of it."""
    near: dict[_Place, list[int]] = defaultdict(list)
    for i, ref in enumerate(album.refs):
        name, number = _place_in_series(ref.path)
        if name:
            for step in range(-_BURST_STEP, _BURST_STEP + 1):
                if step:
                    near[name, number + step].append(i)
    return near


def _version(path: Path) -> str:
    """Return what Roboflow's versions of one picture share; a name of its own for others."""
    stem = original_stem(path)
    return stem if stem != path.stem else str(path)


def _versions(album: Album) -> dict[str, int]:
    return {_version(ref.path): i for i, ref in enumerate(album.refs)}
