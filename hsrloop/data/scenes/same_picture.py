"""Find pictures that validation also holds: none of them may enter training by another door."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from hsrloop.data.sets.alike import BURST, bit_counts, bits_apart, hash_of
from hsrloop.data.threads import in_threads

GRID = 32
ALIKE = 0.9  # correlation of small grey versions. A guess; re-encoded copies reach 0.99
FLAT = 2.0  # grey levels: a picture with less contrast is compared byte by byte alone


def also_in(paths: Sequence[Path], held: Sequence[Path], *, threads: int = 4) -> dict[Path, Path]:
    """Return which of `paths` show the same picture as one of `held`, and as which.

    Same bytes; or near by difference hash and alike at 32 x 32, which copies in another size or
    quality are. The hash alone would not do: dark pictures have similar ones by chance.
    """
    unique = list(dict.fromkeys(paths))
    digests = dict(zip(held, in_threads(_digest, held, threads=threads), strict=True))
    own = list(in_threads(_digest, unique, threads=threads))
    hashes = np.array(list(in_threads(hash_of, held, threads=threads)), np.uint64)
    own_hashes = np.array(list(in_threads(hash_of, unique, threads=threads)), np.uint64)
    by_digest = {digest: path for path, digest in digests.items()}
    grey = functools.cache(_grey)
    found: dict[Path, Path] = {}
    counts = bit_counts()
    for path, digest, number in zip(unique, own, own_hashes, strict=True):
        if digest in by_digest:
            found[path] = by_digest[digest]
            continue
        near = np.flatnonzero(bits_apart(hashes, number, counts) <= BURST) if len(hashes) else ()
        twin = next((held[int(i)] for i in near if _alike(grey(path), grey(held[int(i)]))), None)
        if twin is not None:
            found[path] = twin
    return found


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return str(path).encode()  # like no other; whoever reads it says what is wrong


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    if a.std() < FLAT or b.std() < FLAT:
        return False
    return bool(np.corrcoef(a.ravel(), b.ravel())[0, 1] > ALIKE)


def _grey(path: Path) -> np.ndarray:
    try:
        data = np.fromfile(path, np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_2) if data.size else None
    except (OSError, cv2.error):
        pixels = None
    if pixels is None:
        return np.zeros((GRID, GRID), np.float32)
    return cv2.resize(pixels, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(np.float32)
