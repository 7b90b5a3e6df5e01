"""Cut-out objects: their outlines, and their pixels prepared once for pasting.

Everything about an edge is made ahead: the mask is freed of specks and eroded a little (a mask
drawn by hand or by a network keeps a seam of its old background), and colours are spread beyond it,
so that no interpolation mixes the old background in.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from hsrloop.data.sets.scan import Unreadable, decode, decode_as, read_bytes
from hsrloop.data.threads import in_threads
from hsrloop.errors import DatasetError

CHANNELS = 7  # R, G, B, alpha hard, alpha feathered, alpha Gaussian, shadow
MARGIN = 0.12  # of the object's long side, on each side: room for blur and shadow
SIDE = 0.6  # stored long side at most, fraction of imgsz: larger objects are rarely pasted; a guess
MOST_BYTES = 2**30  # all prepared cut-outs; beyond it they are stored smaller
OBJECT = 127  # masks show the object above this value
WORKING_PX = 768  # crops are cleaned at this long side at most
LEVELS = 4
STAIRS = 0.7  # px: hard edges are smoothed this much, or enlarged masks show their pixels
SPECK = 0.01  # parts and holes below this share of the largest part are mended
# Fractions of the stored long side, all a guess judged by eye.
ERODED = 0.004
FEATHER = 0.015
BLUR = 0.007
SHADOW = 0.035


@dataclass(frozen=True, slots=True, eq=False)
class Cutout:
    """One object and its outline; no pixels.

    Cut-out units: the long side of its image, margin included, is 1.
    """

    path: Path
    mask: Path | None  # None: the image's own transparency
    label: int  # class; -1: a distractor
    height: int  # px of the image, margin included; stored at this size or smaller
    width: int
    contours: tuple[np.ndarray, ...]  # (k, 2) float32 in cut-out units; inside by even-odd
    area: float  # of the object, in cut-out units squared
    mean_rgb: tuple[float, float, float]  # of the object, 0 to 255
    share: float  # the object's long side as a fraction of its photograph's
    cut: bool  # the photograph's frame cuts it

    @property
    def extent(self) -> tuple[float, float]:
        """Return (width, height) in cut-out units."""
        longest = max(self.height, self.width)
        return self.width / longest, self.height / longest


@dataclass(frozen=True, slots=True, eq=False)
class _Crop:
    """An object with its margin."""

    rgb: np.ndarray  # (h, w, 3) uint8
    mask: np.ndarray  # (h, w) uint8, 0 or 255, cleaned and eroded
    share: float
    cut: bool


def read_cutout(path: Path, mask: Path | None, label: int) -> Cutout:
    """Return what is to be known of one cut-out.

    Raises:
        Unreadable: image or mask cannot be used; the message says why, without the path.
    """
    crop = _crop(path, mask)
    height, width = crop.mask.shape
    mean = cv2.mean(crop.rgb, crop.mask)
    return Cutout(
        path=path,
        mask=mask,
        label=label,
        height=height,
        width=width,
        contours=outline(crop.mask),
        area=np.count_nonzero(crop.mask) / max(height, width) ** 2,
        mean_rgb=(mean[0], mean[1], mean[2]),
        share=crop.share,
        cut=crop.cut,
    )


def outline(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the contours of a mask with its holes, in units of its long side; inside by even-odd.

    OpenCV traces the centres of border pixels; on a mask of twice the size these lie a quarter of a
    pixel from the border.
    """
    fine = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    found, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    unit = 2 * max(mask.shape)
    simple = [cv2.approxPolyDP(contour, 1.0, closed=True)[:, 0] for contour in found]
    return tuple(((points + 0.5) / unit).astype(np.float32) for points in simple if len(points) > 2)


class CutoutStore:
    """Prepared cut-outs as (h, w, 7) uint8 arrays, read-only.

    Channels: R, G, B, alpha hard, alpha feathered, alpha Gaussian, shadow. Colours go on beyond the
    mask. Each is kept at half, a quarter and an eighth of its size too: bilinear interpolation
    alone would show a small object as a few of its pixels. All lie in one anonymous mapping that
    forked workers share without a copy.

    Raises:
        DatasetError: a file that could be read before no longer can.
    """

    def __init__(self, cutouts: Sequence[Cutout], *, imgsz: int, threads: int = 1) -> None:
        side = SIDE * imgsz
        while self._bytes(cutouts, side) > MOST_BYTES:
            side *= 0.9
        self._extents = [cutout.extent for cutout in cutouts]
        self._shapes = [_level_shapes(cutout, side) for cutout in cutouts]
        sizes = [CHANNELS * math.prod(shape) for shapes in self._shapes for shape in shapes]
        self._starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._block = np.frombuffer(mmap.mmap(-1, max(1, int(self._starts[-1])), flags), np.uint8)

        def put(index: int) -> None:
            whole = _prepared(cutouts[index], self._shapes[index][0])
            parts = (whole[..., :4].copy(), whole[..., 4:].copy())  # OpenCV resizes up to four
            for level, (height, width) in enumerate(self._shapes[index]):
                small = (
                    cv2.resize(p, (width, height), interpolation=cv2.INTER_AREA) for p in parts
                )
                self.level(index, level)[:] = np.concatenate(tuple(small), axis=2)

        list(in_threads(put, range(len(cutouts)), threads=threads))
        self._block.flags.writeable = False

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one prepared cut-out at its full size."""
        return self.level(index, 0)

    def level(self, index: int, level: int) -> np.ndarray:
        """Return one cut-out, its sides halved `level` times (0 to 3), rounded up."""
        slot = LEVELS * index + level
        start, end = self._starts[slot], self._starts[slot + 1]
        return self._block[start:end].reshape(*self._shapes[index][level], CHANNELS)

    def level_for(self, index: int, long_px: float) -> int:
        """Return the smallest level that need not be enlarged for a long side of `long_px`."""
        ratio = max(self._shapes[index][0]) / max(long_px, 1.0)
        return min(max(math.floor(math.log2(ratio)), 0), LEVELS - 1)

    def extent(self, index: int) -> tuple[float, float]:
        """Return (width, height) of one in cut-out units: exact where whole pixels are not."""
        return self._extents[index]

    @property
    def bytes(self) -> int:
        """Return how many bytes the pixels take."""
        return int(self._starts[-1])

    @staticmethod
    def _bytes(cutouts: Sequence[Cutout], side: float) -> int:
        shapes = (shape for cutout in cutouts for shape in _level_shapes(cutout, side))
        return CHANNELS * sum(math.prod(shape) for shape in shapes)


def _level_shapes(cutout: Cutout, side: float) -> list[tuple[int, int]]:
    """Return (height, width) of each level; the first is never enlarged."""
    ratio = min(1.0, side / max(cutout.height, cutout.width))
    return [
        (math.ceil(cutout.height * ratio / 2**k), math.ceil(cutout.width * ratio / 2**k))
        for k in range(LEVELS)
    ]


def _prepared(cutout: Cutout, shape: tuple[int, int]) -> np.ndarray:
    try:
        crop = _crop(cutout.path, cutout.mask)
    except Unreadable as error:
        raise DatasetError(f"{cutout.path} changed while it was read: {error}.") from None
    height, width = shape
    rgb = cv2.resize(_spread(crop.rgb, crop.mask), (width, height), interpolation=cv2.INTER_AREA)
    hard = cv2.resize(crop.mask, (width, height), interpolation=cv2.INTER_AREA)
    hard = cv2.GaussianBlur(hard, (3, 3), STAIRS)
    longest = max(shape)
    solid = (hard > OBJECT).view(np.uint8)
    inside = cv2.distanceTransform(solid, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    outside = cv2.distanceTransform(1 - solid, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    distance = np.maximum(inside - 0.5, 0) - np.maximum(outside - 0.5, 0)  # to the outline, px
    feather = np.clip(0.5 + distance / max(2.0, FEATHER * longest), 0, 1) * 255
    gaussian = cv2.GaussianBlur(hard, (0, 0), max(0.8, BLUR * longest))
    shadow = cv2.GaussianBlur(hard, (0, 0), max(1.0, SHADOW * longest))
    return np.dstack((rgb, hard, feather.round().astype(np.uint8), gaussian, shadow))


def _crop(path: Path, mask_path: Path | None) -> _Crop:
    """Return an object cut from its photograph, with its margin."""
    rgb, mask = _pixels(path, mask_path)
    solid: np.ndarray = (mask > OBJECT).view(np.uint8)
    if not solid.any():
        raise Unreadable(f"its mask is empty: nothing above {OBJECT} (largest value {mask.max()})")
    x, y, w, h = cv2.boundingRect(solid)
    height, width = solid.shape
    touched = (x == 0) + (y == 0) + (x + w == width) + (y + h == height)
    room = math.ceil(MARGIN * max(w, h))
    rgb, solid = (part[y : y + h, x : x + w] for part in (rgb, solid))
    rgb, solid = (
        cv2.copyMakeBorder(part, room, room, room, room, cv2.BORDER_CONSTANT)
        for part in (rgb, solid)
    )
    ratio = WORKING_PX / max(solid.shape)
    if ratio < 1:
        size = (round(solid.shape[1] * ratio), round(solid.shape[0] * ratio))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        solid = (cv2.resize(solid * 255, size, interpolation=cv2.INTER_AREA) > OBJECT).view(
            np.uint8
        )
        if not solid.any():
            raise Unreadable(f"its mask has only specks, which vanish at {WORKING_PX} px")
    cleaned = _mended(_eroded(solid))
    # Touching all four sides is a tight crop, not an object that the frame cuts.
    return _Crop(rgb, cleaned * 255, max(w, h) / max(height, width), 0 < touched < 4)


def _pixels(path: Path, mask_path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return RGB pixels and the mask of one file, or of a photograph and its mask."""
    if mask_path is None:
        pixels = decode_as(cv2.IMREAD_UNCHANGED, read_bytes(path))
        if pixels.ndim != 3 or pixels.shape[2] != 4:
            stem = path.stem
            raise Unreadable(
                "it has neither a mask nor transparency; its mask would be "
                f"masks/{stem}_mask.png or masks/{stem}.png"
            )
        if pixels.dtype != np.uint8:
            pixels = (pixels / 257).astype(np.uint8)
        return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB), pixels[..., 3]
    rgb = decode(path)
    try:
        mask = decode_as(cv2.IMREAD_GRAYSCALE, read_bytes(mask_path))
    except Unreadable as error:
        raise Unreadable(f"its mask {mask_path.name}: {error}") from None
    if mask.shape != rgb.shape[:2]:
        (h, w), (height, width) = mask.shape, rgb.shape[:2]
        raise Unreadable(f"its mask is {w} x {h} px, the image {width} x {height}")
    return rgb, mask


def _mended(solid: np.ndarray) -> np.ndarray:
    """Return a 0/1 mask without specks and pinholes."""
    count, places, stats, _ = cv2.connectedComponentsWithStats(solid)
    areas = stats[:, cv2.CC_STAT_AREA]
    least = SPECK * areas[1:].max()
    kept = (areas >= least).astype(np.uint8)
    kept[0] = 0
    solid = kept[places] if count > 2 else solid
    _, places, stats, _ = cv2.connectedComponentsWithStats(1 - solid, connectivity=4)
    filled = (stats[:, cv2.CC_STAT_AREA] < least).astype(np.uint8)
    filled[0] = 1
    mended: np.ndarray = filled[places]
    return mended


def _eroded(solid: np.ndarray) -> np.ndarray:
    """Return a 0/1 mask less whiskers and its outermost pixels; thin objects stay as they are."""
    steps = max(1, round(ERODED * max(solid.shape)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * steps + 1,) * 2)
    eroded = cv2.erode(cv2.morphologyEx(solid, cv2.MORPH_OPEN, kernel), kernel)
    return eroded if np.count_nonzero(eroded) >= 0.8 * np.count_nonzero(solid) else solid


def _spread(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image where every pixel outside the mask has the colour of the nearest inside."""
    outside = (mask == 0).view(np.uint8)
    _, places = cv2.distanceTransformWithLabels(
        outside, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = np.zeros((int(places.max()) + 1, 3), np.uint8)
    colours[places[mask > 0]] = rgb[mask > 0]
    spread: np.ndarray = colours[places]
    return spread
