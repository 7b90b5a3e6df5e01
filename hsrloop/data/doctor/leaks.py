"""Pictures that are in a data set more than once: within a split, and between train and another."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from hsrloop.data.doctor.advice import finding
from hsrloop.data.sets.alike import (
    BURST,
    NEAR,
    Album,
    bit_counts,
    bits_apart,
    place_in_series,
    version_of,
)
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.records import Finding, Problem

_SHOWN = 3  # members of a group named in its line


def repeats(refs: Sequence[ImageRef], album: Album, split: str) -> list[Finding]:
    """Return copies, and groups of pictures that look alike, within one split.

    Args:
        refs: the album's pictures.
    """
    copies, contradictions, first = _copies(refs, album)
    found = []
    for kind, problems in (("copy-contradicts", contradictions), ("copy", copies)):
        if problems:
            found.append(finding(kind, problems, split=split, of=len(refs)))
    groups = _alike(Album([album.paths[i] for i in first], [album.looks[i] for i in first]))
    if groups:
        found.append(finding("alike", groups, split=split))
    return found


def leaks(train: Album, other: Album, split: str) -> list[Finding]:
    """Return the pictures of another split that training sees as well, each once."""
    found: dict[str, list[Problem]] = defaultdict(list)
    copies = {look.digest: i for i, look in reversed(list(enumerate(train.looks)))}
    versions = {version_of(path): i for i, path in enumerate(train.paths)}
    series = train.series()
    counts = bit_counts()
    for path, look in zip(other.paths, other.looks, strict=True):
        apart = bits_apart(train.hashes, np.uint64(look.hash), counts)
        alike = train.same(look, np.flatnonzero(apart <= NEAR))
        before = series.get(place_in_series(path), [])
        burst = [i for i in before if apart[i] <= BURST]
        if look.digest in copies:
            kind, twin = "copy-across", copies[look.digest]
        elif len(alike) or version_of(path) in versions:
            kind = "alike-across"
            twin = int(alike[0]) if len(alike) else versions[version_of(path)]
        elif burst:
            kind, twin = "burst-across", burst[0]
        else:
            continue
        found[kind].append(Problem(kind, path, f"see {train.paths[twin]}"))
    return [
        finding(kind, problems, split=split, of=len(other.paths))
        for kind, problems in found.items()
    ]


def _copies(
    refs: Sequence[ImageRef], album: Album
) -> tuple[list[Problem], list[Problem], list[int]]:
    """Return copies that agree, copies that contradict, and the first of each picture."""
    agree: list[Problem] = []
    contradict: list[Problem] = []
    first: dict[bytes, int] = {}
    for i, (ref, look) in enumerate(zip(refs, album.looks, strict=True)):
        original = refs[first.setdefault(look.digest, i)]
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
    found = []
    for group in album.groups():
        if len(group) > 1:
            first, *others = (album.paths[i] for i in group)
            names = [os.path.relpath(path, first.parent) for path in others]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            text = f"with {', '.join(names[:_SHOWN])}{more}"
            found.append(Problem("alike", first, text))
    return found
