"""Find pictures that show the same: copies, near-duplicates, bursts."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from hsrloop.data.sets.scan import reduced
from hsrloop.data.threads import in_threads

NEAR = 4  # of 64 bits: the same picture anywhere in the set; a guess
BURST = 12  # of 64 bits: neighbours by file name; a guess
SAME_CELL = 18.0  # of a grid, at most, in the same picture. Measured: re-encoding moves a cell
# by up to 4, other light by 20, a turned container before a fixed camera by 10 to 40.
_UNREADABLE = np.full((8, 9), 114, np.uint8)
_COPY_MARK = re.compile(r"\.rf\.[0-9a-f]{8,}$")  # Roboflow's copies of one picture


def group_alike(paths: list[Path], *, threads: int = 4) -> list[list[int]]:
    """Return groups of indices: near-duplicates, bursts, and Roboflow's copies of one picture."""
    hashes = np.array(list(in_threads(hash_of, paths, threads=threads)), dtype=np.uint64)
    groups = Groups(len(paths))
    by_stem: dict[tuple[Path, str], int] = {}
    for i, apart in enumerate(distances(hashes)):
        path = paths[i]
        groups.join(i, [by_stem.setdefault((path.parent, original_stem(path)), i)])
        groups.join(i, np.flatnonzero(apart <= NEAR) + i + 1)
        if len(apart) and apart[0] <= BURST and _consecutive(path, paths[i + 1]):
            groups.join(i, [i + 1])
    return groups.lists()


class Groups:
    """Disjoint groups of 0..n-1, at first one each."""

    def __init__(self, n: int) -> None:
        self._group = np.arange(n)

    def join(self, member: int, others: Sequence[int] | np.ndarray) -> None:
        """Make one group of those that a member and the others are in."""
        own = self._group[member]
        theirs = self._group[np.asarray(others, dtype=np.int64)]
        for group in np.unique(theirs[theirs != own]):
            self._group[self._group == group] = own

    def apart(self, member: int, others: np.ndarray) -> np.ndarray:
        """Return those of the others that are not in the member's group."""
        found: np.ndarray = others[self._group[others] != self._group[member]]
        return found

    def lists(self) -> list[list[int]]:
        """Return the groups, in the order of their smallest members."""
        found: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(self._group.tolist()):
            found[group].append(i)
        return list(found.values())


def distances(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each of (n,) uint64 the number of bits in which each later one differs."""
    counts = bit_counts()
    for i in range(len(hashes)):
        yield bits_apart(hashes[i + 1 :], hashes[i], counts)


def bits_apart(hashes: np.ndarray, one: np.uint64, counts: np.ndarray) -> np.ndarray:
    """Return in how many bits each of (n,) uint64 differs from one.

    Args:
        counts: (65536,) the set bits of each 16-bit number.
    """
    words = (hashes ^ one).view(np.uint16).reshape(-1, 4)
    apart: np.ndarray = counts[words].sum(axis=1, dtype=np.uint8)
    return apart


def bit_counts() -> np.ndarray:
    """Return the number of set bits of each 16-bit number; (65536,) uint8."""
    return np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


def difference_hash(grey: np.ndarray) -> int:
    """Return 64 bits: whether each cell of a 9 x 8 grid is darker than its right neighbour."""
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = (small[:, 1:] > small[:, :-1] + 1).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def original_stem(path: Path) -> str:
    """Return a file's name without its suffix and the mark of Roboflow's copies."""
    return _COPY_MARK.sub("", path.stem)


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What is kept of a picture to compare it with others."""

    digest: bytes  # of the file
    hash: int
    grid: np.ndarray  # (256,) float32: 16 x 16 cells, mean 0, standard deviation 50


def look_at(path: Path) -> Look | None:
    """Read an image once, decoding no more than an eighth of its size; None if it does not decode.

    A flat picture's noise is not blown up: what deviates by less than 8 grey levels stays small.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError:
        return None
    grey = reduced(data)
    if grey is None:
        return None
    cells = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    cells = (cells - cells.mean()) * (50 / max(float(cells.std()), 8.0))
    return Look(hashlib.sha256(data.data).digest(), difference_hash(grey), cells)


def hash_of(path: Path) -> int:
    """Return the hash of an image file; that of plain grey when it is unreadable."""
    try:
        grey = reduced(np.fromfile(path, np.uint8))
    except OSError:
        grey = None
    return difference_hash(_UNREADABLE if grey is None else grey)


def _consecutive(a: Path, b: Path) -> bool:
    """Return whether two names differ by a small step of their last number, as a camera counts."""
    first, second = re.findall(r"\d+", a.stem), re.findall(r"\d+", b.stem)
    if a.parent != b.parent or not first or len(first) != len(second) or first[:-1] != second[:-1]:
        return False
    return 0 < int(second[-1]) - int(first[-1]) <= 2
