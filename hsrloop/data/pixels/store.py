"""Images resized once to the size that training uses, decoded ahead where memory allows.

Cached, partly cached and uncached, an image has the same bytes: it is decoded and resized by the
same code, only at another time.
"""

from __future__ import annotations

import logging
import math
import mmap
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from hsrloop.data.pixels.kept import MOST_MAPPED, KeptImages, data_set_around, stamp_of
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.data.sets.scan import Unreadable, decode_bytes, read_bytes
from hsrloop.data.threads import in_threads
from hsrloop.errors import DatasetError, OutputError
from hsrloop.paths import is_file

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

SPARE = 2  # how much larger than imgsz a JPEG is decoded at least, where it is that large
FORMAT = 2  # of what is stored; raise it when the same image would become other bytes
_MOST_NAMED = 5  # images that became unreadable
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
    (nobody writes to it) and which needs no /dev/shm; with "disk" they are mapped from files below
    `cache_dir`. Whatever the cache, an image that was decoded by an earlier run is taken from those
    files, if there is a `cache_dir`. An image that fails to decode is grey, its index in `broken`,
    warned of once.

    Args:
        budget_bytes: upper bound of the cache; None for no bound. The first images that fit are
            cached, the others read each time.
        interpolation: "area" when shrinking for training; "linear" as the peer validates.
        cache_dir: folder for decoded images between runs, outside the data set; None for none.
        progress: called with (task, done, total) while the cache fills; the task is "reading" for
            what an earlier run decoded, "decoding" for the rest.

    Raises:
        OutputError: cache is "disk", and `cache_dir` is missing, cannot be written or lies inside
            the data set. With another cache, nothing is kept there then.
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
        progress: Progress | None = None,
    ) -> None:
        assert interpolation in ("area", "linear"), interpolation
        self.imgsz = imgsz
        self.interpolation = interpolation
        self.broken: set[int] = set()
        self._refs = refs
        self._shapes = [stored_size(ref.height, ref.width, imgsz) for ref in refs]
        sizes = [3 * height * width for height, width in self._shapes]
        self._starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        self._images: dict[int, np.ndarray] = {}
        self._kept = self._keeping(cache, cache_dir)
        self._names: dict[int, str] = {}  # of entries, for images that were read
        self.cached_images = self._fitting(budget_bytes) if cache else 0
        if cache == "disk":
            self.cached_images = min(self.cached_images, MOST_MAPPED)
        if self.cached_images == 0:
            return
        if cache != "disk":
            self._images = self._slots()
        self._fill(threads, progress)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one image, read-only; grey when it cannot be decoded."""
        cached = self._images.get(index)
        if cached is not None:
            return cached
        if index in self.broken:  # also if it can be decoded again: its labels are left out
            return self._blank(index)
        pixels = self._taken(index)
        if pixels is None:
            pixels = self._decoded(index)
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
        """Let go of the cache; images are then read each time."""
        self._images = {}
        self.cached_images = 0

    def remember(self) -> None:
        """Note for the next start what was read of the images' files since the last call."""
        if self._kept is not None:
            self._kept.remember()

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

    def _keeping(self, cache: bool | str, folder: Path | None) -> KeptImages | None:
        """Open the folder of decoded images; only cache "disk" cannot do without."""
        if folder is None:
            if cache == "disk":
                raise OutputError("cache is disk, but there is no folder for it. Use cache: ram.")
            return None
        data_set = data_set_around(folder, (ref.path for ref in self._refs))
        if data_set is not None:
            problem = f"{folder} lies inside the data set {data_set}"
        else:
            try:
                wanted = (self.bytes, len(self)) if cache == "disk" else (0, 0)
                return KeptImages(folder, wanted=wanted)
            except OSError as error:
                problem = f"{folder} cannot be written ({error.strerror})"
        if cache == "disk":
            raise OutputError(
                f"The image cache in {problem}. Set XDG_CACHE_HOME to another folder, or use "
                "--cache ram."
            )
        logger.warning("%s: images are decoded again at the next start.", problem)
        return None

    def _slots(self) -> dict[int, np.ndarray]:
        """Return memory for the images to be cached, one after the other."""
        mapping = mmap.mmap(-1, self.cached_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)  # a warp 7% faster than from 4 KiB pages
        block, starts = np.frombuffer(mapping, np.uint8), self._starts
        return {
            i: block[starts[i] : starts[i + 1]].reshape(*self._shapes[i], 3)
            for i in range(self.cached_images)
        }

    def _fill(self, threads: int, progress: Progress | None) -> None:
        """Read what is known to be decoded, then decode the rest."""
        known = [i for i in range(self.cached_images) if self._is_kept(i)]
        rest = sorted(set(range(self.cached_images)) - set(known))
        for task, indices in (("reading", known), ("decoding", rest)):
            made = in_threads(self._put, indices, threads=threads)
            for done, _ in enumerate(made, 1):
                if progress:
                    progress(task, done, len(indices))
        for pixels in self._images.values():
            pixels.flags.writeable = False
        self.remember()

    def _is_kept(self, index: int) -> bool:
        if self._kept is None:
            return False
        name = self._kept.known(self._refs[index].path, self._how(index))
        return name is not None and self._kept.has(name)

    def _put(self, index: int) -> None:
        """Cache one image: in its slot, or mapped from the folder of decoded images."""
        slot = self._images.get(index)
        pixels = self._taken(index, slot)
        if pixels is None:
            pixels = self._decoded(index)
            if slot is None and index not in self.broken:
                pixels = self._taken(index)  # mapped from now on, if there was room for it
        if slot is None and pixels is not None:
            self._images[index] = pixels
        elif slot is not None and pixels is not slot:
            slot[:] = pixels

    def _taken(self, index: int, slot: np.ndarray | None = None) -> np.ndarray | None:
        """Return an image from its entry, in `slot` if given, else mapped; None if not there."""
        if self._kept is None:
            return None
        name = self._names.get(index)
        if name is None:
            name = self._kept.known(self._refs[index].path, self._how(index))
        if name is None:
            return None
        if slot is None:
            return self._kept.find(name, (*self._shapes[index], 3))
        return slot if self._kept.read_into(name, slot) else None

    def _decoded(self, index: int) -> np.ndarray:
        """Decode one image and keep it; or find that its content was decoded before.

        What is decoded is what was read, whatever becomes of the file meanwhile.
        """
        path, name = self._refs[index].path, None
        stamp = stamp_of(path)
        try:
            data = read_bytes(path)
            if self._kept is not None:
                name = self._kept.name_of(path, stamp, data, self._how(index))
                self._names[index] = name
                found = self._kept.find(name, (*self._shapes[index], 3))
                if found is not None:
                    return found
            pixels = self._pixels(index, data)
        except Unreadable as error:
            return self._grey(index, error)
        if self._kept is not None and name is not None:
            self._kept.keep(name, pixels)
        return pixels

    def _how(self, index: int) -> str:
        """Return all that decides an image's bytes beside its file's content."""
        shrink = self._shrink(self._refs[index])
        software = f"{cv2.__version__} {platform.machine()}"
        return f"{FORMAT} {self._shapes[index]} {self.interpolation} {shrink} {software}"

    def _pixels(self, index: int, data: np.ndarray) -> np.ndarray:
        """Return an image as it is stored, from its file's bytes.

        Raises:
            Unreadable: it cannot be decoded.
        """
        height, width = self._shapes[index]
        pixels = decode_bytes(data, shrink=self._shrink(self._refs[index]))
        if pixels.shape[:2] == (height, width):
            return pixels
        shrinks = height * width < pixels.shape[0] * pixels.shape[1]
        method = cv2.INTER_AREA if self.interpolation == "area" and shrinks else cv2.INTER_LINEAR
        return cv2.resize(pixels, (width, height), interpolation=method)

    def _grey(self, index: int, error: Unreadable) -> np.ndarray:
        """Return what stands for an image that cannot be decoded; say so the first time.

        Raises:
            DatasetError: the files of most images are gone, with their disk or folder.
        """
        path = self._refs[index].path
        self.broken.add(index)
        broken = len(self.broken)
        if broken & (broken - 1) == 0 and not is_file(path):  # seldom: it looks at all files
            gone = sum(not is_file(ref.path) for ref in self._refs)
            if gone > len(self._refs) // 2:
                raise DatasetError(
                    f"{gone} of {len(self._refs)} images are gone, one of them {path}. "
                    "Bring their folder or disk back; a run that had begun goes on with --resume."
                )
        if broken <= _MOST_NAMED:
            text = "%s became unreadable: %s. It is grey from now on, without labels.%s"
            more = " More are not named." if broken == _MOST_NAMED else ""
            logger.warning(text, path, error, more)
        return self._blank(index)

    def _blank(self, index: int) -> np.ndarray:
        return np.full((*self._shapes[index], 3), GREY, np.uint8)

    def _shrink(self, ref: ImageRef) -> int:
        if self.interpolation != "area":
            return 1  # validation is decoded as the peer does
        return decode_shrink(ref.path, ref.height, ref.width, self.imgsz)
