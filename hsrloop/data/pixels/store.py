"""Images resized once to the size that training uses, decoded ahead where memory allows.

Cached, partly cached and uncached, an image has the same bytes: it is decoded and resized by the
same code, only at another time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from hsrloop.data.sets.dataset import ImageRef
from hsrloop.data.sets.scan import Unreadable, decode
from hsrloop.data.threads import in_threads
from hsrloop.errors import OutputError

logger = logging.getLogger(__name__)

SPARE = 2  # how much larger than imgsz a JPEG is decoded at least, where it is that large
FORMAT = 2  # of what is stored; raise it when the same image would become other bytes
GREY = 114  # what stands for no image. Source: ultralytics@8.4.190, data/augment.py


def stored_size(height: int, width: int, imgsz: int) -> tuple[int, int]:
    """Return (height, width) with the long side at imgsz, the short side rounded up.

    Smaller images are enlarged. Source: ultralytics@8.4.190, data/base.py load_image.
    """
    ratio = imgsz / max(height, width)
    if ratio == 1:
        return height, width
    return min(math.ceil(height * ratio), imgsz), min(math.ceil(width * ratio), imgsz)


def decode_shrink(path: Path, height: int, width: int, imgsz: int) -> int:
    """Return how much smaller than it is to decode an image that is then shrunk to imgsz.

    Only JPEGs gain by it, and only sides that divide evenly stay in place, as those of cameras do.
    What is decoded stays at least twice as large as what is kept, so that
    most of the averaging is still `resize`'s: 0.3 of 255 from a whole decode in the mean, 3 at the
    99.9th percentile (measured on a photograph of 12 megapixels, 320 to 800 px).
    """
    if path.suffix.lower() not in (".jpg", ".jpeg", ".mpo"):
        return 1
    for shrink in (8, 4, 2):
        large = max(height, width) >= SPARE * imgsz * shrink
        if large and height % shrink == 0 and width % shrink == 0:
            return shrink
    return 1


class ImageStore:
    """The images of one split as (h, w, 3) uint8 RGB arrays, read-only, long side == imgsz.

    With cache "ram" they lie in one anonymous mapping, which forked workers see without a copy
    (nobody writes to it) and which needs no /dev/shm; with "disk", in one mapped file below
    `cache_dir`, found again by the next run. An image that fails to decode is grey, its index in
    `broken`, warned of once.

    Args:
        budget_bytes: upper bound of the cache; None for no bound. The first images that fit are
            cached, the others decoded each time.
        interpolation: "area" when shrinking for training; "linear" as the peer validates.
        cache_dir: folder for cache "disk", outside the data set.
        progress: called with (done, total) while the cache fills.

    Raises:
        OutputError: `cache_dir` is missing, inside the data set, or cannot be written.
    """

    def __init__(
        self,
        refs: Sequence[ImageRef],
        *,
        imgsz: int,
        cache: bool | str = False,
        budget_bytes: int | None = None,
        interpolation: str = "area",
        cache_dir: Path | None = None,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        assert interpolation in ("area", "linear"), interpolation
        self.imgsz = imgsz
        self.interpolation = interpolation
        self.broken: set[int] = set()
        self._refs = refs
        self._shapes = [stored_size(ref.height, ref.width, imgsz) for ref in refs]
        sizes = [3 * height * width for height, width in self._shapes]
        self._starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        self._block: np.ndarray | None = None
        self.cached_images = self._fitting(budget_bytes) if cache else 0
        if self.cached_images == 0:
            return
        if cache == "disk":
            self._fill_disk(cache_dir, threads, progress)
        else:
            mapping = mmap.mmap(-1, self.cached_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapping.madvise(mmap.MADV_HUGEPAGE)  # a warp 7% faster than from 4 KiB pages
            self._block = np.frombuffer(mapping, np.uint8)
            self._fill(self._block, threads, progress)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one image, read-only; grey when it cannot be decoded."""
        if self._block is None or index >= self.cached_images:
            pixels = self._load(index)
        else:
            pixels = self._slot(self._block, index)
        pixels.flags.writeable = False
        return pixels

    @property
    def sizes(self) -> np.ndarray:
        """Return (height, width) of every stored image; (n, 2) int64."""
        return np.array(self._shapes, np.int64).reshape(-1, 2)

    @property
    def bytes(self) -> int:
        """Return how many bytes all images take, cached or not."""
        return int(self._starts[-1])

    @property
    def cached_bytes(self) -> int:
        """Return how many bytes the cached images take."""
        return int(self._starts[self.cached_images])

    def close(self) -> None:
        """Let go of the cache; images are then decoded each time."""
        self._block = None
        self.cached_images = 0

    def _fitting(self, budget_bytes: int | None) -> int:
        if budget_bytes is None or self._starts[-1] <= budget_bytes:
            return len(self._refs)
        count = int(np.searchsorted(self._starts, budget_bytes, side="right")) - 1
        logger.warning(
            "The image cache needs %.2f GiB and may use %.2f GiB: %d of %d images are cached, "
            "the others are decoded each time.",
            self._starts[-1] / 2**30, budget_bytes / 2**30, count, len(self._refs),
        )  # fmt: skip
        return count

    def _slot(self, block: np.ndarray, index: int) -> np.ndarray:
        start, end = self._starts[index], self._starts[index + 1]
        return block[start:end].reshape(*self._shapes[index], 3)

    def _load(self, index: int) -> np.ndarray:
        """Decode and resize one image."""
        ref, (height, width) = self._refs[index], self._shapes[index]
        try:
            pixels = decode(ref.path, shrink=self._shrink(ref))
        except Unreadable as error:
            if index not in self.broken:
                self.broken.add(index)
                logger.warning(
                    "%s became unreadable: %s. It is grey from now on, without labels.",
                    ref.path,
                    error,
                )
            return np.full((height, width, 3), GREY, np.uint8)
        if pixels.shape[:2] == (height, width):
            return pixels
        shrinks = height * width < pixels.shape[0] * pixels.shape[1]
        method = cv2.INTER_AREA if self.interpolation == "area" and shrinks else cv2.INTER_LINEAR
        return cv2.resize(pixels, (width, height), interpolation=method)

    def _shrink(self, ref: ImageRef) -> int:
        if self.interpolation != "area":
            return 1  # validation is decoded as the peer does
        return decode_shrink(ref.path, ref.height, ref.width, self.imgsz)

    def _fill(
        self, block: np.ndarray, threads: int, progress: Callable[[int, int], None] | None
    ) -> None:
        def put(index: int) -> None:
            self._slot(block, index)[:] = self._load(index)

        made = in_threads(put, range(self.cached_images), threads=threads)
        for done, _ in enumerate(made, 1):
            if progress:
                progress(done, self.cached_images)

    def _fill_disk(
        self, cache_dir: Path | None, threads: int, progress: Callable[[int, int], None] | None
    ) -> None:
        """Map the cache file of these very images, writing it first when there is none."""
        if cache_dir is None:
            raise OutputError("cache is disk, but there is no folder for it. Use cache: ram.")
        self._refuse_inside_data(cache_dir)
        file = cache_dir / f"{self._key()}.images"
        notes = file.with_suffix(".json")
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            whole = file.exists() and file.stat().st_size == self.cached_bytes
            if not (whole and notes.exists()):
                self._write_cache(file, notes, threads, progress)
        except OSError as error:
            raise OutputError(
                f"The image cache in {cache_dir} cannot be written: {error.strerror}."
            ) from None
        if self.cached_images:
            self.broken = set(json.loads(notes.read_text())["broken"])
            self._block = np.memmap(file, np.uint8, mode="r")

    def _write_cache(
        self,
        file: Path,
        notes: Path,
        threads: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Write the cache file, whole before it has its name; without room, cache nothing."""
        free = shutil.disk_usage(file.parent).free
        if free < self.cached_bytes * 1.05:
            logger.warning(
                "%s has %.2f GiB free and the image cache needs %.2f GiB: no cache.",
                file.parent, free / 2**30, self.cached_bytes / 2**30,
            )  # fmt: skip
            self.cached_images = 0
            return
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            block = np.memmap(temporary, np.uint8, mode="w+", shape=(self.cached_bytes,))
            # A disk that fills up raises here; writing to the mapping later would kill the process.
            with temporary.open("r+b") as reserved:
                os.posix_fallocate(reserved.fileno(), 0, self.cached_bytes)
            self._fill(block, threads, progress)
            block.flush()
            notes.write_text(json.dumps({"broken": sorted(self.broken)}))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def _refuse_inside_data(self, cache_dir: Path) -> None:
        inside = cache_dir.resolve()
        for folder in {ref.path.parent.resolve() for ref in self._refs}:
            head, images, _ = f"{folder}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
            top = Path(head) if images else folder
            if inside == top or top in inside.parents:
                raise OutputError(
                    f"cache folder {cache_dir} lies inside the data set {top}; choose another."
                )

    def _key(self) -> str:
        """Return a name for the cache file that changes with the images and how they are stored."""
        how = f"{FORMAT} {self.imgsz} {self.interpolation} {cv2.__version__}"
        digest = hashlib.sha256(how.encode())
        for ref in self._refs[: self.cached_images]:
            status = ref.path.stat() if ref.path.exists() else None
            stamp = (status.st_mtime_ns, status.st_size) if status else (0, 0)
            digest.update(os.fsencode(f"\0{os.path.abspath(ref.path)} {stamp}"))
        return digest.hexdigest()[:32]
