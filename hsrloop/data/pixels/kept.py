"""Decoded images on the disk between runs, in a folder of the user's cache.

An image is found by its file's content and by how it is stored, so a photograph that is added
leaves the others as they are, and a copy of the data set elsewhere finds them too. Each file has
its checksum at its end: what is damaged is decoded again. The folder stays within a bound; what was
not used for longest goes first. An entry appears whole, by renaming, and is never changed, so runs
share the folder without locks, and who has an entry mapped keeps it when it is evicted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

logger = logging.getLogger(__name__)

LIMIT_BYTES = 10 * 2**30  # a guess: 8,000 images of 640 px
LIMIT_SHARE = 0.2  # of what is free and already taken by it (a guess)
SPARE_SHARE = 0.05  # of the free disk that is left alone even when asked to keep all (a guess)
RECENT_S = 3600.0  # what was used since then belongs to a run that goes on (a guess)
ABANDONED_S = 86400.0  # a file half-written so long ago is nobody's any more
MOST_MAPPED = 30_000  # entries at once; Linux lets a process have 65,530 mappings
INDEXED = 100_000  # image files whose content is remembered by their stamp; the oldest go first
SETTLED_S = 2.0  # a file may change again unseen within a tick of its clock (ext4: 4 ms; FAT: 2 s)
_INDEX = "index.json"
_TRAILER = struct.Struct("<I")
_DRAFT = ".draft"

Stamp = tuple[int, int, int, int]  # bytes, mtime in ns, ctime in ns, inode


class KeptImages:
    """The folder of decoded images; may be used by several threads and runs at once.

    Args:
        folder: made if it is not there.
        wanted: bytes of the images to be kept in any case, if the disk has room, and their number.

    Raises:
        OSError: the folder cannot be made or listed.
    """

    def __init__(self, folder: Path, *, wanted: tuple[int, int] = (0, 0)) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        found = _listed(folder)
        self._total = sum(size for _, _, size in found)
        recent = time.time() - RECENT_S
        self._old = [(name, size) for used, name, size in found if used < recent]
        in_use = self._total - sum(size for _, size in self._old)
        free = shutil.disk_usage(folder).free
        most = int(free * (1 - SPARE_SHARE)) + self._total
        limit = min(LIMIT_BYTES, int(LIMIT_SHARE * (free + self._total)))
        if wanted[1]:
            limit = max(limit, in_use + wanted[0] + wanted[1] * _TRAILER.size)
        self.limit_bytes = min(limit, most)
        self._used: set[str] = set()  # by this run
        self._full = False
        self._index = _read_index(folder / _INDEX)
        self._learnt: dict[str, tuple[Stamp, str]] = {}

    def known(self, path: Path, how: str) -> str | None:
        """Return the name of an image's entry without reading its file; None when that must be.

        Args:
            how: everything beside the content that decides its bytes.
        """
        stamp, found = stamp_of(path), self._index.get(os.path.abspath(path))
        if stamp is None or found is None or found[0] != stamp:
            return None
        return _name(found[1], how)

    def name_of(self, path: Path, stamp: Stamp | None, data: np.ndarray, how: str) -> str:
        """Return the name of an image's entry, and remember its content by its stamp.

        Args:
            stamp: of the file, from before it was read.
            data: (n,) uint8, all of the file.
            how: see `known`.
        """
        digest = hashlib.sha256(
            data.data
        ).hexdigest()  # processors of the last years have it built in
        if stamp is not None and time.time() - max(stamp[1:3]) / 1e9 > SETTLED_S:
            with self._lock:
                self._learnt[os.path.abspath(path)] = (stamp, digest)
        return _name(digest, how)

    def remember(self) -> None:
        """Write down which files are known; what another run adds meanwhile is learnt again."""
        if not self._learnt:
            return
        path = self._folder / _INDEX
        known = {**_read_index(path), **self._learnt}
        rows = {file: (*stamp, digest) for file, (stamp, digest) in list(known.items())[-INDEXED:]}
        try:
            self._write(path, [json.dumps(rows).encode("ascii")])
        except OSError as error:  # the next start reads the files again
            logger.debug("%s is not written: %s", path, error)

    def has(self, name: str) -> bool:
        """Return whether there is an entry, whole or not."""
        return self._path(name).is_file()

    def read_into(self, name: str, pixels: np.ndarray) -> bool:
        """Fill (h, w, 3) uint8 from an entry; False when it is not there whole."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                whole = file.readinto(pixels.data.cast("B")) == pixels.nbytes
                return whole and self._is_sound(name, pixels, file.read())
        except OSError:
            return False

    def find(self, name: str, shape: tuple[int, int, int]) -> np.ndarray | None:
        """Return an image mapped from the disk; None when it is not there whole.

        Mapped by torch, which leaves no file open; numpy does, and a process may have 1,024.
        """
        path, size = self._path(name), shape[0] * shape[1] * shape[2]
        try:
            if path.stat().st_size != size + _TRAILER.size:
                return None
            with path.open("rb") as file:
                file.seek(size)
                trailer = file.read()
            mapped = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError):  # not there, or no more mappings
            return None
        pixels: np.ndarray = mapped.numpy().reshape(shape)
        return pixels if self._is_sound(name, pixels, trailer) else None

    def _is_sound(self, name: str, pixels: np.ndarray, trailer: bytes) -> bool:
        """Return whether pixels are those that were written; if so they count as used now."""
        if trailer != _TRAILER.pack(zlib.crc32(pixels.data)):
            logger.debug("%s is damaged and made anew", self._path(name))
            return False
        with self._lock:
            self._used.add(name)
        with contextlib.suppress(OSError):
            os.utime(self._path(name))
        return True

    def keep(self, name: str, pixels: np.ndarray) -> None:
        """Write an image, if there is room; a disk that refuses is warned of once."""
        size = pixels.nbytes + _TRAILER.size
        if not self._make_room(name, size):
            return
        path, content = self._path(name), np.ascontiguousarray(pixels).data
        try:
            path.parent.mkdir(exist_ok=True)
            self._write(path, [content.cast("B"), _TRAILER.pack(zlib.crc32(content))])
        except OSError as error:
            self._refuse(f"cannot be written ({error.strerror})")

    @staticmethod
    def _write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file that appears whole."""
        draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{_DRAFT}")
        try:
            with draft.open("wb") as file:
                for part in parts:
                    file.write(part)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def _make_room(self, name: str, size: int) -> bool:
        """Evict until an entry fits, and count it as there; return whether it does."""
        with self._lock:
            if self._full:
                return False
            while self._total + size > self.limit_bytes and self._old:
                oldest, its_bytes = self._old.pop()
                if oldest in self._used:
                    continue
                with contextlib.suppress(OSError):
                    self._path(oldest).unlink()
                self._total -= its_bytes
            enough = self._total + size <= self.limit_bytes
            if enough:
                self._total += size
                self._used.add(name)
        if not enough:
            self._refuse(f"may hold {self.limit_bytes / 2**30:.2f} GiB and is full")
        return enough

    def _refuse(self, why: str) -> None:
        with self._lock:
            known, self._full = self._full, True
        if not known:
            logger.warning(
                "The folder of decoded images %s %s: the other images are decoded again at the "
                "next start.",
                self._folder, why,
            )  # fmt: skip

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name


def _listed(folder: Path) -> list[tuple[float, str, int]]:
    """Return (when it was used, name, bytes) of all entries, the least recently used last.

    What an earlier run left half-written is removed.
    """
    found = []
    for entry in _files(folder):
        try:
            status = entry.stat()
            if not entry.name.endswith(_DRAFT):
                found.append((status.st_mtime, entry.name, status.st_size))
            elif time.time() - status.st_mtime > ABANDONED_S:
                os.unlink(entry.path)
        except OSError:  # another run evicted it just now
            continue
    return sorted(found, reverse=True)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as shelves:
        for shelf in shelves:
            if shelf.is_dir():
                with os.scandir(shelf.path) as entries:
                    yield from entries
            elif shelf.name.endswith(_DRAFT):
                yield shelf


def _read_index(path: Path) -> dict[str, tuple[Stamp, str]]:
    """Return (stamp, digest of the content) of image files; empty when damaged or not there."""
    try:
        rows = json.loads(path.read_text(encoding="ascii"))
        return {
            file: ((int(a), int(b), int(c), int(d)), str(digest))
            for file, (a, b, c, d, digest) in rows.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def stamp_of(path: Path) -> Stamp | None:
    """Return what changes whenever a file does; None when it cannot be asked."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _name(digest: str, how: str) -> str:
    return hashlib.sha256(f"{digest} {how}".encode()).hexdigest()[:40]


def data_set_around(folder: Path, images: Iterable[Path]) -> Path | None:
    """Return the data set that a folder lies in, going by where its images are; None for none."""
    inside = folder.resolve()
    for place in {path.parent.resolve() for path in images}:
        head, below, _ = f"{place}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
        top = Path(head) if below else place
        if inside == top or top in inside.parents:
            return top
    return None
