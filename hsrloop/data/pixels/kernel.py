"""`render.cu`, the torch renderer's pixels in one pass on CUDA, and the table it needs beside."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hsrloop.data.pixels.layout_torch import Slot
from hsrloop.ops.nvrtc import Kernels, kernels_in

SOURCE = Path(__file__).with_name("render.cu")
_BLOCK = (32, 8, 1)
_THREADS = 128  # of a block of `cover`
_FRAME = 14  # column of a stamp's row that names its frame


class RenderKernel:
    """Renders chunks of a batch on one device.

    Raises:
        KernelError: it cannot be compiled here.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernels = _compiled(device)

    def __call__(
        self,
        layers: Tensor,
        stamps: Tensor,
        links: Tensor,
        colours: Tensor | None,
        pixels: Tensor,
        out: Tensor,
    ) -> None:
        """Write what `compose`, `stamp`, `blend` and `recolour` would; on the current stream.

        Args:
            layers: (F, 1 + K, LAYER_COLUMNS) float32, see `compose`.
            stamps: (n, STAMP_COLUMNS) float32, see `stamp`.
            links: of `links_of`, on the device.
            colours: (B, 3) float32, see `recolour`; None leaves colours as they are.
            pixels: (P, 3) uint8 of the bank.
            out: (B, S, S, 3) uint8, contiguous, filled.
        """
        images, side = out.shape[:2]
        across, down, _ = _BLOCK
        grid = (-(-side // across), -(-side // down), images)
        frames, rows = layers.shape[:2]
        runs = torch.empty((frames, rows, side, 2), device=out.device)
        blocks = (-(-frames * rows * side // _THREADS), 1, 1)
        threads = (_THREADS, 1, 1)
        self._kernels["cover"](blocks, threads, out.device, layers, runs, frames * rows, side)
        tensors = (layers, runs, stamps, links, colours, pixels, out)
        self._kernels["render"](grid, _BLOCK, out.device, *tensors, frames, rows, side)


@functools.cache
def _compiled(device: torch.device) -> Kernels:
    return kernels_in(SOURCE.read_text(encoding="utf-8"), device)


def links_of(
    stamps: np.ndarray,
    slots: Sequence[Slot],
    mixes: Sequence[tuple[int, int, float]],
    frames: int,
    images: int,
) -> np.ndarray:
    """Return which stamps a frame has, in their order, and what an image is mixed with.

    Args:
        stamps: (n, STAMP_COLUMNS) float32, see `stamp`.
        slots: rows of it that are blended one after the other.
        mixes: image, frame of its partner, weight of the image.

    Returns:
        (F + 1 + 3 n + 2 B,) int32 as float32: where each frame's stamps begin, and the end; by
        frame, each stamp's row and its window's height and width; each image's partner, -1 for
        none, and its own weight, the bits of a float32.
    """
    own = stamps.view(np.int32)[:, _FRAME]
    counts = [slot.rows.stop - slot.rows.start for slot in slots]
    windows = np.array([slot.window for slot in slots], np.int32).reshape(-1, 2)
    order = np.argsort(own, kind="stable")  # rows come by slot already
    firsts = np.searchsorted(own[order], np.arange(frames + 1))
    pasted = np.concatenate((order[:, None], windows.repeat(counts, axis=0)[order]), axis=1)
    mixed = np.zeros((images, 2), np.int32)
    mixed[:, 0] = -1
    for image, partner, weight in mixes:
        mixed[image] = partner, np.float32(weight).view(np.int32)
    parts = (firsts, pasted.ravel(), mixed.ravel())
    return np.concatenate([part.astype(np.int32) for part in parts]).view(np.float32)
