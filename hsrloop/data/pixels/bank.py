"""Where the torch renderer's sources lie: in GPU memory, or in RAM and sent as tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from hsrloop.data.pixels.store import GREY, ImageStore
from hsrloop.data.scenes.cutouts import LEVELS, CutoutStore
from hsrloop.data.threads import in_threads

BankPlace = Literal["device", "pinned", "cv2"]
PLACES: tuple[BankPlace, ...] = ("device", "pinned", "cv2")  # from fast to frugal
BYTES_PER_PIXEL = 3
BANK_SHARE = 0.25  # of the GPU memory that is free once weights and optimizer lie there (a guess)
LARGEST_BYTES = BYTES_PER_PIXEL * (2**31 - 2**16)  # pixels are counted in int32
MARGIN = 2  # grey pixels before the first source; taps of weight 0 may reach past the last one
RING = 1  # px of nothing around a cut-out, so that interpolation fades it out
_PARTS = (slice(0, 3), slice(3, 6), slice(6, 7))  # channels of a cut-out's level; see `Sources`
PARTS = len(_PARTS)


def bank_place(
    *,
    bank_bytes: int,
    scratch_bytes: int,
    gpu_free_bytes: int,
    ram_bytes: int,
    ram_free_bytes: int,
    share: float = BANK_SHARE,
) -> BankPlace:
    """Decide where sources lie and who renders: the first of three steps that fits.

    Args:
        bank_bytes: of all sources.
        scratch_bytes: what rendering itself takes on the GPU.
        gpu_free_bytes: GPU memory free now; 0 without a GPU.
        ram_bytes: all images in the RAM cache.
        ram_free_bytes: what that cache may take.
        share: of the free GPU memory that may be used, in [0, 1]; activations need the rest.

    Returns:
        "device": sources in GPU memory. "pinned": sources in RAM, tiles sent through page-locked
        memory. "cv2": rendered by the host.
    """
    usable = share * gpu_free_bytes
    if scratch_bytes + bank_bytes <= usable and bank_bytes <= LARGEST_BYTES:
        return "device"
    if 0 < scratch_bytes <= usable and ram_bytes <= ram_free_bytes:
        return "pinned"
    return "cv2"


class Sources:
    """All that plans draw from, as images of three bytes a pixel, numbered from 0.

    First the photographs. Then each cut-out at each of its levels three times, within a ring of
    nothing: its colours; its edges (hard, feathered, Gaussian); and its shadow's, in the first of
    three bytes.
    """

    def __init__(self, images: ImageStore, cutouts: CutoutStore | None = None) -> None:
        self.images = images
        self.cutouts = cutouts
        count = LEVELS * len(cutouts) if cutouts else 0
        shapes = [self._cutout(place).shape[:2] for place in range(count)]
        pasted = np.array(shapes, np.int64).reshape(-1, 2) + 2 * RING
        self.sizes = np.concatenate((images.sizes, pasted.repeat(PARTS, axis=0)))  # height, width

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def bytes(self) -> int:
        """Return what a bank of all sources takes."""
        return BYTES_PER_PIXEL * (int(self.sizes.prod(axis=1).sum()) + MARGIN + self._longest)

    @property
    def _longest(self) -> int:
        return int(self.sizes[:, 1].max(initial=0)) + 1

    def copy(self, index: int, box_xyxy_px: tuple[int, int, int, int], out: np.ndarray) -> None:
        """Copy a rectangle of a source into (h, w, 3) uint8."""
        x0, y0, x1, y1 = box_xyxy_px
        if index < len(self.images):
            np.copyto(out, self.images[index][y0:y1, x0:x1])
            return
        place, part_of_it = divmod(index - len(self.images), PARTS)
        pixels = self._cutout(place)
        height, width = pixels.shape[:2]
        out.fill(0)
        left, top = max(x0 - RING, 0), max(y0 - RING, 0)
        right, bottom = min(x1 - RING, width), min(y1 - RING, height)
        if left < right and top < bottom:
            rows = slice(top + RING - y0, bottom + RING - y0)
            columns = slice(left + RING - x0, right + RING - x0)
            part = pixels[top:bottom, left:right, _PARTS[part_of_it]]
            out[rows, columns, : part.shape[2]] = part

    def _cutout(self, place: int) -> np.ndarray:
        assert self.cutouts is not None
        return self.cutouts.level(*divmod(place, LEVELS))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rectangles of sources, in whole source px; L of them, none empty."""

    sources: np.ndarray  # (L,) int64
    boxes_xyxy_px: np.ndarray  # (L, 4) int64

    def __add__(self, other: Tiles) -> Tiles:
        return Tiles(
            np.concatenate((self.sources, other.sources)),
            np.concatenate((self.boxes_xyxy_px, other.boxes_xyxy_px)),
        )


class Bank(Protocol):
    """Sources as the renderer reads them."""

    sources: Sources
    resident: bool  # nothing is sent: tiles take no memory of their own

    def arrange(self, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
        """Return where tiles will lie once fetched together, from numbers alone.

        Returns:
            (L,) int64 index of the pixel at row 0, column 0 of each source, and (L,) int64 steps
            from one row to the next. The first may be negative: only the tile itself is there.
        """

    def fetch(self, tiles: Tiles) -> Tensor:
        """Return (P, 3) uint8 pixels on the device that hold the tiles; the first two are grey."""


class DeviceBank:
    """All sources in the memory of the device.

    Args:
        sources: each is asked for once; the image store needs no cache.
        threads: that decode meanwhile.
        progress: called with (done, total).
    """

    resident = True

    def __init__(
        self,
        sources: Sources,
        device: torch.device,
        *,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sources = sources
        self._starts = MARGIN + np.concatenate(([0], np.cumsum(sources.sizes.prod(axis=1))))
        shape = (sources.bytes // BYTES_PER_PIXEL, BYTES_PER_PIXEL)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._pixels[:MARGIN] = GREY
        made = in_threads(self._put, range(len(sources)), threads=threads)
        for done, _ in enumerate(made, 1):
            if progress:
                progress(done, len(sources))

    def _put(self, index: int) -> None:
        height, width = self.sources.sizes[index].tolist()
        image = np.empty((height, width, BYTES_PER_PIXEL), np.uint8)
        self.sources.copy(index, (0, 0, width, height), image)
        part = self._pixels[self._starts[index] : self._starts[index + 1]]
        part.copy_(torch.from_numpy(image).view(part.shape))

    def arrange(self, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
        """Return where tiles lie; see `Bank`."""
        return self._starts[tiles.sources], self.sources.sizes[tiles.sources, 1]

    def fetch(self, tiles: Tiles) -> Tensor:
        """Return the whole bank."""
        return self._pixels


class TileBank:
    """Sources in the host's RAM, as their stores cache them; the tiles that show are sent.

    Tiles are gathered in page-locked memory and sent in one copy. The sources themselves are not
    page-locked: memory that the system cannot move hurts a laptop more than gathering costs.
    """

    resident = False

    def __init__(self, sources: Sources, device: torch.device) -> None:
        self.sources = sources
        self._device = device

    def arrange(self, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
        """Return where tiles will lie; see `Bank`."""
        starts, widths, _ = _behind_each_other(tiles)
        x0, y0 = tiles.boxes_xyxy_px[:, :2].T
        return starts - y0 * widths - x0, widths

    def fetch(self, tiles: Tiles) -> Tensor:
        """Send the tiles; the copy is under way on the current stream when this returns.

        Page-locked memory comes from torch's cache, which hands it out again only once the copy is
        done.
        """
        starts, widths, heights = _behind_each_other(tiles)
        total = MARGIN + int((widths * heights).sum())
        after = int(widths.max(initial=0)) + 1
        on_gpu = self._device.type == "cuda"
        shape = (total + after, BYTES_PER_PIXEL)
        host = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        pixels = host.numpy()
        pixels[:MARGIN], pixels[total:] = GREY, 0
        shapes = zip(starts.tolist(), heights.tolist(), widths.tolist(), strict=True)
        wanted = zip(tiles.sources.tolist(), tiles.boxes_xyxy_px.tolist(), strict=True)
        for (source, box), (start, height, width) in zip(wanted, shapes, strict=True):
            part = pixels[start : start + height * width]
            self.sources.copy(source, box, part.reshape(height, width, BYTES_PER_PIXEL))
        return host.to(self._device, non_blocking=True)


def _behind_each_other(tiles: Tiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first pixel, width and height of tiles laid one behind the other."""
    x0, y0, x1, y1 = tiles.boxes_xyxy_px.T
    sizes = (x1 - x0) * (y1 - y0)
    return MARGIN + np.cumsum(sizes) - sizes, x1 - x0, y1 - y0
