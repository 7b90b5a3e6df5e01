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
_BURST_STEP = 2  # between the numbers of neighbours in a burst
_COPY_MARK = re.compile(r"\.rf\.[0-9a-f]{8,}$")  # Roboflow's copies of one picture


def group_alike(paths: Sequence[Path], *, threads: int = 4) -> list[list[int]]:
    """Return groups of indices: near-duplicates, bursts, and Roboflow's copies of one picture."""
    looks = [look or _NO_LOOK for look in in_threads(look_at, paths, threads=threads)]
    return Album(paths, looks).groups()


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What is kept of a picture to compare it with others."""

    digest: bytes  # of the file
    hash: int
    grid: np.ndarray  # (256,) float32: 16 x 16 cells, mean 0, standard deviation 50


_NO_LOOK = Look(b"", 0, np.full(256, np.nan, np.float32))  # is like none


class Album:
    """Pictures, ready to be compared."""

    def __init__(self, paths: Sequence[Path], looks: Sequence[Look]) -> None:
        self.paths = paths
        self.looks = looks
        self.hashes = np.array([look.hash for look in looks], dtype=np.uint64)
        self._grids = np.array([look.grid for look in looks], dtype=np.float32).reshape(-1, 256)

    def same(self, look: Look, candidates: np.ndarray) -> np.ndarray:
        """Return those of the candidates (indices) that show the same picture, best first."""
        worst = np.abs(self._grids[candidates] - look.grid).max(axis=1, initial=0.0)
        order = np.argsort(worst, kind="stable")
        found: np.ndarray = candidates[order][worst[order] <= SAME_CELL]
        return found

    def series(self) -> dict[Place, list[int]]:
        """Return for each place in a series which pictures lie within a burst's step of it."""
        near: dict[Place, list[int]] = defaultdict(list)
        for i, path in enumerate(self.paths):
            name, number = place_in_series(path)
            if name:
                for step in range(-_BURST_STEP, _BURST_STEP + 1):
                    if step:
                        near[name, number + step].append(i)
        return near

    def groups(self) -> list[list[int]]:
        """Return the indices in groups that look alike, each in one, most of them alone."""
        groups = Groups(len(self.paths))
        members: dict[tuple[Path, str], list[int]] = defaultdict(list)
        for i, path in enumerate(self.paths):
            members[path.parent, original_stem(path)].append(i)
        for same in members.values():
            groups.join(same[0], same[1:])
        series = self.series()
        for i, apart in enumerate(distances(self.hashes)):
            near = groups.apart(i, np.flatnonzero(apart <= NEAR) + i + 1)
            groups.join(i, self.same(self.looks[i], near))
            following = [j for j in series.get(place_in_series(self.paths[i]), []) if j > i]
            groups.join(i, [j for j in following if apart[j - i - 1] <= BURST])
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


Place = tuple[str, int]


def place_in_series(path: Path) -> Place:
    """Return a camera's name for a picture, without its last number, and that number."""
    head, number, tail = re.fullmatch(r"(.*?)(\d{0,18})(\D*)", original_stem(path), re.S).groups()  # type: ignore[union-attr]
    return (f"{head}#{tail}", int(number)) if number else ("", 0)


def version_of(path: Path) -> str:
    """Return what Roboflow's versions of one picture share; a name of its own for others."""
    stem = original_stem(path)
    return stem if stem != path.stem else str(path)
