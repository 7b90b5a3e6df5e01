"""Decoded images on the disk between runs, in a folder of the user's cache.

An image is found by its file's content and by how it is stored, so a photograph that is added
leaves the others as they are, and a copy of the data set elsewhere finds them too. Each file has
its checksum at its end: what is damaged is decoded again. The folder stays within a bound; what was
not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hsrloop.errors import OutputError

logger = logging.getLogger(__name__)

LIMIT_BYTES = 10 * 2**30  # a guess: 8,000 images of 640 px
LIMIT_SHARE = 0.2  # of what is free and already taken by it (a guess)
SPARE_SHARE = 0.05  # of the free disk that is left alone even when asked to keep all (a guess)
RECENT_S = 3600.0  # what was used since then belongs to a run that goes on (a guess)
ABANDONED_S = 86400.0  # a file half-written so long ago is nobody's any more
_TRAILER = struct.Struct("<I")
_DRAFT = ".draft"


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

    def name_of(self, path: Path, how: str) -> str | None:
        """Return the name of an image's entry; None when its file cannot be read.

        Args:
            how: everything beside the content that decides its bytes.
        """
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20))
        except OSError:
            return None
        digest.update(how.encode())
        return digest.hexdigest()

    def find(self, name: str, shape: tuple[int, int, int]) -> np.ndarray | None:
        """Return an image mapped from the disk, read-only; None when it is not there whole.

        An image that somebody evicts stays readable for who has it mapped.
        """
        path, size = self._path(name), shape[0] * shape[1] * shape[2]
        try:
            if path.stat().st_size != size + _TRAILER.size:
                return None
            content = np.memmap(path, np.uint8, mode="r")
            os.utime(path)
        except (OSError, ValueError):
            return None
        if zlib.crc32(content[:size].data) != _TRAILER.unpack(content[size:].tobytes())[0]:
            logger.debug("%s is damaged and made anew", path)
            return None
        with self._lock:
            self._used.add(name)
        return content[:size].reshape(shape)

    def keep(self, name: str, pixels: np.ndarray) -> None:
        """Write an image, if there is room; a disk that refuses is warned of once."""
        size = pixels.nbytes + _TRAILER.size
        if not self._make_room(size):
            return
        path = self._path(name)
        draft = path.with_name(f"{name}.{os.getpid()}.{threading.get_ident()}{_DRAFT}")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                with draft.open("wb") as file:
                    file.write(np.ascontiguousarray(pixels).data)
                    file.write(_TRAILER.pack(zlib.crc32(np.ascontiguousarray(pixels).data)))
                os.replace(draft, path)
            except OSError:
                draft.unlink(missing_ok=True)
                raise
        except OSError as error:
            self._refuse(f"cannot be written ({error.strerror})")
            return
        with self._lock:
            self._total += size
            self._used.add(name)

    def _make_room(self, size: int) -> bool:
        with self._lock:
            if self._full:
                return False
            while self._total + size > self.limit_bytes and self._old:
                name, its_bytes = self._old.pop()
                if name in self._used:
                    continue
                with contextlib.suppress(OSError):
                    self._path(name).unlink()
                self._total -= its_bytes
            enough = self._total + size <= self.limit_bytes
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


def refuse_inside_data(folder: Path, images: Iterator[Path]) -> None:
    """Check that a folder is not one of a data set.

    Raises:
        OutputError: it is.
    """
    inside = folder.resolve()
    for place in {path.parent.resolve() for path in images}:
        head, below, _ = f"{place}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
        top = Path(head) if below else place
        if inside == top or top in inside.parents:
            raise OutputError(
                f"cache folder {folder} lies inside the data set {top}; choose another."
            )
