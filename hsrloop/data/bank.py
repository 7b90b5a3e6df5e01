"""Where the torch renderer's source images lie: in GPU memory, or in RAM and sent as tiles.

A pixel is one int32, its bytes R, G, B and a fourth that is not looked at: one gather fetches it
whole, and the row of a rectangle is contiguous.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from hsrloop.data.store import GREY, ImageStore

logger = logging.getLogger(__name__)

BankPlace = Literal["device", "pinned", "cv2"]
BYTES_PER_PIXEL = 4
BANK_SHARE = 0.25  # of the GPU memory that is free once weights and optimizer lie there (a guess)
LARGEST_BYTES = BYTES_PER_PIXEL * (2**31 - 2**16)  # pixels are counted in int32
MARGIN = 2  # grey pixels before the first image; taps of weight 0 may reach past the last one


def bank_place(
    *,
    bank_bytes: int,
    scratch_bytes: int,
    gpu_free_bytes: int,
    ram_bytes: int,
    ram_free_bytes: int,
    share: float = BANK_SHARE,
) -> BankPlace:
    """Decide where source images lie and who renders: the first step that fits, fastest first.

    Args:
        bank_bytes: all images at 4 bytes a pixel.
        scratch_bytes: what rendering itself takes on the GPU.
        gpu_free_bytes: GPU memory free now; 0 without a GPU.
        ram_bytes: all images in the RAM cache.
        ram_free_bytes: what that cache may take.
        share: of the free GPU memory that may be used, in [0, 1]; activations need the rest.

    Returns:
        "device": images in GPU memory. "pinned": images in RAM, tiles sent through page-locked
        memory. "cv2": rendered by the host.
    """
    usable = share * gpu_free_bytes
    if scratch_bytes + bank_bytes <= usable and bank_bytes <= LARGEST_BYTES:
        return "device"
    if scratch_bytes <= usable and ram_bytes <= ram_free_bytes:
        return "pinned"
    return "cv2"


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rectangles of source images, in whole source px; L of them, none empty."""

    sources: np.ndarray  # (L,) int64
    boxes_xyxy_px: np.ndarray  # (L, 4) int64


class ImageBank(Protocol):
    """Source images as the renderer reads them."""

    store: ImageStore

    def arrange(self, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
        """Return where tiles will lie once fetched together, from numbers alone.

        Returns:
            (L,) int64 index of the pixel at row 0, column 0 of each source, and (L,) int64 steps
            from one row to the next. The first may be negative: only the tile itself is there.
        """

    def fetch(self, tiles: Tiles) -> Tensor:
        """Return (P,) int32 pixels on the device that hold the tiles; the first two are grey."""


class DeviceBank:
    """All images of a store in the memory of the device.

    Args:
        store: needs no cache; each image is asked for once.
        threads: that decode meanwhile.
        progress: called with (done, total).
    """

    def __init__(
        self,
        store: ImageStore,
        device: torch.device,
        *,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.store = store
        self._widths = store.sizes[:, 1]
        areas = store.sizes.prod(axis=1)
        self._starts = MARGIN + np.concatenate(([0], np.cumsum(areas)))
        after = int(self._widths.max()) + 1
        self._pixels = torch.empty(int(self._starts[-1]) + after, dtype=torch.int32, device=device)
        self._pixels[:MARGIN] = packed_grey()
        self._pixels[-after:] = 0
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for done, _ in enumerate(pool.map(self._put, range(len(store))), 1):
                if progress:
                    progress(done, len(store))

    def _put(self, index: int) -> None:
        image = torch.from_numpy(cv2.cvtColor(self.store[index], cv2.COLOR_RGB2RGBA))
        part = self._pixels[self._starts[index] : self._starts[index + 1]]
        part.copy_(image.view(torch.int32).view(-1))

    def arrange(self, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
        """Return where tiles lie; see `ImageBank`."""
        return self._starts[tiles.sources], self._widths[tiles.sources]

    def fetch(self, tiles: Tiles) -> Tensor:
        """Return the whole bank."""
        return self._pixels


class TileBank:
    """Images in the host's RAM, as the store caches them; the tiles needed are sent.

    Tiles are gathered in page-locked memory and sent in one copy. The images themselves are not
    page-locked: memory that the system cannot move hurts a laptop more than a copy of the tiles
    costs, a tenth of rendering them here.
    """

    def __init__(self, store: ImageStore, device: torch.device) -> None:
        self.store = store
        self._device = device

    def arrange(self, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
        """Return where tiles will lie; see `ImageBank`."""
        starts, widths = _packed_places(tiles)
        return starts - tiles.boxes_xyxy_px[:, 1] * widths - tiles.boxes_xyxy_px[:, 0], widths

    def fetch(self, tiles: Tiles) -> Tensor:
        """Send the tiles; the copy is under way on the current stream when this returns."""
        starts, widths = _packed_places(tiles)
        x0, y0, x1, y1 = tiles.boxes_xyxy_px.T
        sizes = (x1 - x0) * (y1 - y0)
        after = int(widths.max(initial=0)) + 1
        total = int(MARGIN + sizes.sum())
        on_gpu = self._device.type == "cuda"
        host = torch.empty(total + after, dtype=torch.int32, pin_memory=on_gpu)
        host[:MARGIN] = packed_grey()
        host[total:] = 0
        pixels = host.numpy().view(np.uint8).reshape(-1, BYTES_PER_PIXEL)
        for i, source in enumerate(tiles.sources.tolist()):
            tile = self.store[source][y0[i] : y1[i], x0[i] : x1[i]]
            place = pixels[starts[i] : starts[i] + sizes[i]].reshape(*tile.shape[:2], 4)
            cv2.cvtColor(tile, cv2.COLOR_RGB2RGBA, dst=place)
        return host.to(self._device, non_blocking=True)


def bank_bytes(store: ImageStore) -> int:
    """Return what a `DeviceBank` of a store's images takes."""
    return BYTES_PER_PIXEL * (int(store.sizes.prod(axis=1).sum()) + store.imgsz + 2 * MARGIN)


def packed_grey() -> int:
    """Return a grey pixel as one int32."""
    return int(np.full(4, GREY, np.uint8).view(np.int32)[0])


def _packed_places(tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pixel and the width of tiles that lie one behind the other."""
    x0, y0, x1, y1 = tiles.boxes_xyxy_px.T
    sizes = (x1 - x0) * (y1 - y0)
    return MARGIN + np.cumsum(sizes) - sizes, x1 - x0
