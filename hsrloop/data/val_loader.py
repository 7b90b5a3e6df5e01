"""Letterboxed batches to validate on."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hsrloop.data.ahead import ahead, arriving
from hsrloop.data.loader import empty_images
from hsrloop.data.pixels.store import GREY, ImageStore, stored_size
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.data.threads import MapFunction, team

_HOST = torch.device("cpu")
_AT_A_TIME = 4  # images that a thread is given to letterbox (a guess)


@dataclass(frozen=True, slots=True)
class ValBatch:
    """Letterboxed images with their true boxes; N boxes over B images, N may be 0.

    Pixels of the original image are (letterboxed px - pads) / gains.
    """

    images: Tensor  # (B, 3, S, S) uint8 RGB, channels_last
    boxes_xyxy_px: Tensor  # (N, 4) float32, px of the letterboxed frame
    labels: Tensor  # (N,) int64
    image_index: Tensor  # (N,) int64, sorted, 0..B-1
    indices: Tensor  # (B,) int64, places in the split
    gains: Tensor  # (B, 2) float32, x and y
    pads: Tensor  # (B, 2) float32, left and top


class ValLoader:
    """A split in its own order, letterboxed into squares: centred, grey 114.

    Source: ultralytics@8.4.190 with rect=False: data/base.py load_image, data/augment.py LetterBox;
    its evaluator matches in the letterboxed frame too.

    Args:
        store: made with interpolation "linear".
        device: where the images go. On a GPU they are there when they are yielded: sent a batch
            ahead, on a stream of their own.
        prefetch: make one batch ahead in a thread; on a GPU always.
        threads: that letterbox a batch's images, or read and resize them.
    """

    def __init__(
        self,
        refs: Sequence[ImageRef],
        store: ImageStore,
        *,
        batch: int,
        device: torch.device = _HOST,
        prefetch: bool = True,
        threads: int = 1,
    ) -> None:
        self.n_samples = len(refs)
        self.batch = batch
        self._refs = refs
        self._store = store
        self._device = device
        self._prefetch = prefetch
        self._threads = threads
        sizes = [stored_size(ref.height, ref.width, store.imgsz) for ref in refs]
        self._frames = [_frame(r, size, store.imgsz) for r, size in zip(refs, sizes, strict=True)]
        self._boxes = [
            _letterboxed(ref.boxes_cxcywh, size, frame[2:])
            for ref, size, frame in zip(refs, sizes, self._frames, strict=True)
        ]

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.n_samples // self.batch)

    def __iter__(self) -> Iterator[ValBatch]:
        return self.of(range(self.n_samples))

    def head(self, count: int) -> ValLoader:
        """Return a loader of the first images alone."""
        refs, store = self._refs[:count], self._store
        return ValLoader(
            refs,
            store,
            batch=self.batch,
            device=self._device,
            prefetch=self._prefetch,
            threads=self._threads,
        )

    def of(self, indices: Sequence[int]) -> Iterator[ValBatch]:
        """Iterate over some places in the split, in batches, in the order given."""
        made = self._made(indices)
        if self._device.type == "cuda":
            sent = arriving(((batch.images, batch) for batch in made), self._device)
            return (replace(batch, images=images) for images, batch in sent)
        return ahead(made) if self._prefetch and len(indices) else made

    def _made(self, indices: Sequence[int]) -> Generator[ValBatch, None, None]:
        with team(self._threads) as mapped:
            for start in range(0, len(indices), self.batch):
                yield self._make(indices[start : start + self.batch], mapped)

    def _make(self, indices: Sequence[int], mapped: MapFunction) -> ValBatch:
        count = len(indices)
        images = empty_images(count, self._store.imgsz, pinned=self._device.type == "cuda")
        frames = np.array([self._frames[i] for i in indices])
        pixels = images.numpy()

        def lay(first: int) -> None:
            for place in range(first, min(first + _AT_A_TIME, count)):
                _, _, left, top = self._frames[indices[place]]
                _lay(pixels[place], self._store[indices[place]], left, top)

        list(mapped(lay, range(0, count, _AT_A_TIME)))
        kept = [0 if i in self._store.broken else len(self._refs[i].labels) for i in indices]
        shown = list(zip(indices, kept, strict=True))
        boxes = [self._boxes[i][:n] for i, n in shown]
        labels = [self._refs[i].labels[:n] for i, n in shown]
        return ValBatch(
            images=images.permute(0, 3, 1, 2),
            boxes_xyxy_px=torch.from_numpy(np.concatenate(boxes)),
            labels=torch.from_numpy(np.concatenate(labels)),
            image_index=torch.from_numpy(np.repeat(np.arange(count), kept)),
            indices=torch.tensor(list(indices)),
            gains=torch.from_numpy(frames[:, :2].astype(np.float32)),
            pads=torch.from_numpy(frames[:, 2:].astype(np.float32)),
        )

    def close(self) -> None:
        """Release nothing: an iterator ends its own thread."""


def _frame(ref: ImageRef, stored: tuple[int, int], side: int) -> tuple[float, float, int, int]:
    """Return gain x, gain y, left and top of an image, stored as (height, width), in a square.

    Halves of a pixel go to the right and bottom. Source: ultralytics@8.4.190, LetterBox.get_params.
    """
    height, width = stored
    left, top = round((side - width) / 2 - 0.1), round((side - height) / 2 - 0.1)
    return width / ref.width, height / ref.height, left, top


def _lay(image: np.ndarray, pixels: np.ndarray, left: int, top: int) -> None:
    """Put pixels into a square of another image's; grey around them, each byte written once."""
    height, width = pixels.shape[:2]
    image[:top], image[top + height :] = GREY, GREY
    middle = image[top : top + height]
    middle[:, :left], middle[:, left + width :] = GREY, GREY
    middle[:, left : left + width] = pixels


def _letterboxed(
    boxes_cxcywh: np.ndarray, stored: tuple[int, int], pad: tuple[int, int]
) -> np.ndarray:
    """Return (n, 4) xyxy px float32 of boxes in an image of (height, width) put at (left, top)."""
    scale, shift = np.array(stored[::-1], np.float32), np.array(pad, np.float32)
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    low, high = (centre - half) * scale + shift, (centre + half) * scale + shift
    return np.concatenate((low, high), axis=1).astype(np.float32)
