"""Turn plans into pixels on the device that trains: a batch at a time.

For each output pixel the source that covers it is found first, by the inverse maps of all layers;
then one bilinear interpolation reads it from the bank. Nothing is drawn twice but cut-outs, each
within its window, and no canvas is larger than the output. The plans' numbers travel in one copy,
and shapes depend on the host's numbers alone, so nothing waits for the device.

The same plans give the same pixels as `render` up to rounding, except at the edge of a source. On
CUDA one kernel of our own does it all in one pass (`kernel`); elsewhere, and where that cannot be
compiled, torch's operators do, which move every pixel dozens of times.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsrloop.data.pixels.bank import BYTES_PER_PIXEL, Bank, Tiles
from hsrloop.data.pixels.colour import colour_factors
from hsrloop.data.pixels.colour_torch import recolour
from hsrloop.data.pixels.kernel import RenderKernel, links_of
from hsrloop.data.pixels.layout_torch import LayerLayout, Slot, StampLayout
from hsrloop.data.pixels.pixels_torch import blend, compose, stamp, unpack
from hsrloop.data.plan import AugmentPlan
from hsrloop.data.sets.dataset import ImageRef

SCRATCH_BYTES = 256 * 2**20  # for temporaries; less means more, smaller kernels (a guess)
SCRATCH_PER_PIXEL = 112  # bytes an output pixel takes at most while it is rendered (measured)
TILES_PER_FRAME = 8  # tiles as large as the output that a frame needs at most (a guess)


def gpu_bytes(
    imgsz: int, batch: int, scratch_bytes: int = SCRATCH_BYTES, *, kernel: bool = False
) -> int:
    """Return what rendering takes on the GPU beside the bank: temporaries, tiles, three batches.

    Args:
        kernel: does it; else torch's operators.
    """
    tiles = BYTES_PER_PIXEL * TILES_PER_FRAME * imgsz**2
    frames = min(_frames_at_once(scratch_bytes, _frame_bytes(imgsz, kernel=kernel)), 2 * batch)
    return (0 if kernel else scratch_bytes) + tiles * frames + 9 * batch * imgsz**2


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive images that are rendered together: their own frames first, then partners'."""

    images: slice
    layers: slice  # of the layer table: frames
    stamps: slice  # of the stamp table
    slots: Sequence[Slot]  # counted from the first of `stamps`
    mixes: Sequence[tuple[int, int, float]]  # image, its partner's frame, weight of the image
    links: slice  # of the link table, see `kernel.links_of`
    tiles: Tiles


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch of plans as numbers alone: what is left to do is the device's work."""

    images: int
    chunks: Sequence[_Chunk]
    layers: np.ndarray  # (F, 1 + K, LAYER_COLUMNS) float32, see `compose`
    stamps: np.ndarray  # (n, STAMP_COLUMNS) float32, see `stamp`
    links: np.ndarray  # int32, as float32
    colours: np.ndarray  # (images, 3) float32, see `recolour`; empty: colours stay


class TorchRenderer:
    """Renders batches of plans at one size on one device; one per thread.

    Args:
        bank: sources on, or for, the same device.
        images: what `Layer.source` counts in; those of the bank.
        scratch_bytes: bound of temporaries; at least one image with its mixup partner is rendered.
            A kernel that reads a bank on the device needs none, and renders a batch in one piece.
        kernel: does it in one pass; None: torch's operators do.
    """

    def __init__(
        self,
        bank: Bank,
        images: Sequence[ImageRef],
        *,
        imgsz: int,
        device: torch.device,
        scratch_bytes: int = SCRATCH_BYTES,
        kernel: RenderKernel | None = None,
    ) -> None:
        self._kernel = kernel
        self.bank = bank
        self.device = device
        self.imgsz = imgsz
        one = _frame_bytes(imgsz, kernel=kernel is not None, resident=bank.resident)
        self._frames_at_once = _frames_at_once(scratch_bytes, one)
        self._layers = LayerLayout(bank, images, imgsz)
        self._stamps = StampLayout(bank, imgsz)
        index = torch.arange(imgsz, dtype=torch.float32, device=device)
        self._x, self._y = index.view(1, 1, -1), index.view(1, -1, 1)

    def pixels(self, plans: Sequence[AugmentPlan]) -> Tensor:
        """Return (B, 3, S, S) uint8 RGB, channels_last, on the device; made on its current stream.

        Every image of a batch has HSV gains, or none has.
        """
        return self.draw(self.lay_out(plans))

    @torch.no_grad()
    def draw(self, layout: Layout) -> Tensor:
        """Return what `pixels` returns."""
        tables = self._send(layout.layers, layout.stamps, layout.links, layout.colours)
        shape = (layout.images, self.imgsz, self.imgsz, 3)
        out = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for chunk in layout.chunks:
            source = self.bank.fetch(chunk.tiles)
            if self._kernel is None:
                self._draw(chunk, tables, source, out)
                continue
            layers, stamps, links, colours = tables
            self._kernel(
                layers[chunk.layers],
                stamps[chunk.stamps],
                links[chunk.links],
                colours[chunk.images] if len(colours) else None,
                source,
                out[chunk.images],
            )
        return out.permute(0, 3, 1, 2)

    def _draw(self, chunk: _Chunk, tables: Sequence[Tensor], source: Tensor, out: Tensor) -> None:
        layers, stamps, _, colours = tables
        x, y = self._x, self._y
        frames = compose(layers[chunk.layers], source, x, y)
        rows = stamps[chunk.stamps]
        for slot in chunk.slots:
            stamp(frames, rows[slot.rows], source, x, y, slot.window)
        for image, partner, weight in chunk.mixes:
            blend(frames[image], frames[partner], weight)
        images = out[chunk.images]
        if len(colours):
            recolour(frames[: len(images)], colours[chunk.images], images)
        else:
            unpack(frames[: len(images)], images)

    def _send(self, *tables: np.ndarray) -> list[Tensor]:
        """Return float32 tables on the device, sent in one copy.

        Page-locked memory comes from torch's cache, which hands it out again only once the copy is
        done.
        """
        ends = list(itertools.accumulate(table.size for table in tables))
        on_gpu = self.device.type == "cuda"
        host = torch.empty(ends[-1], dtype=torch.float32, pin_memory=on_gpu)
        for table, end in zip(tables, ends, strict=True):
            # As integers: a copy as floats may alter bits that are not meant as a float.
            host.numpy()[end - table.size : end].view(np.int32)[:] = table.ravel().view(np.int32)
        sent = host.to(self.device, non_blocking=True)
        return [
            sent[end - table.size : end].view(table.shape)
            for table, end in zip(tables, ends, strict=True)
        ]

    def lay_out(self, plans: Sequence[AugmentPlan]) -> Layout:
        """Return how to go about a batch; does not touch the device, so any process may do it."""
        recoloured = [plan.hsv_gains for plan in plans if plan.hsv_gains is not None]
        assert len(recoloured) in (0, len(plans))
        colours = np.array([colour_factors(gains) for gains in recoloured], np.float32)
        groups = list(_grouped(plans, self._frames_at_once))
        framed = [_frames(plans[group]) for group in groups]
        slots = max(len(frame.layers) for frames in framed for frame in frames)
        chunks, layers, stamps, links = [], [], [], []
        first_layer = first_stamp = first_link = 0
        for group, frames in zip(groups, framed, strict=True):
            wanted, layer_tiles = self._layers.find(frames)
            pasted, stamp_tiles = self._stamps.find(frames)
            tiles = layer_tiles + stamp_tiles
            firsts, steps = self.bank.arrange(tiles)
            count = len(layer_tiles.sources)
            layers.append(
                self._layers.table(wanted, firsts[:count], steps[:count], len(frames), slots)
            )
            rows, spread = self._stamps.table(pasted, firsts[count:], steps[count:])
            stamps.append(rows)
            mixes = _mixes(plans[group])
            linked = links_of(rows, spread, mixes, len(frames), len(plans[group]))
            links.append(linked)
            layer_rows = slice(first_layer, first_layer + len(frames))
            stamp_rows = slice(first_stamp, first_stamp + len(rows))
            link_rows = slice(first_link, first_link + len(linked))
            chunks.append(_Chunk(group, layer_rows, stamp_rows, spread, mixes, link_rows, tiles))
            first_layer, first_stamp = layer_rows.stop, stamp_rows.stop
            first_link = link_rows.stop
        return Layout(
            len(plans),
            chunks,
            np.concatenate(layers),
            np.concatenate(stamps),
            np.concatenate(links),
            colours,
        )


def _frame_bytes(imgsz: int, *, kernel: bool, resident: bool = False) -> int:
    """Return what a frame takes while it is rendered; its tiles, where it is little else."""
    if kernel and resident:
        return 0
    return (BYTES_PER_PIXEL * TILES_PER_FRAME if kernel else SCRATCH_PER_PIXEL) * imgsz**2


def _frames_at_once(scratch_bytes: int, frame_bytes: int) -> int:
    return max(2, scratch_bytes // frame_bytes) if frame_bytes else sys.maxsize


def _frames(plans: Sequence[AugmentPlan]) -> list[AugmentPlan]:
    """Return the plans of one chunk, then their mixup partners."""
    return [*plans, *(plan.mix for plan in plans if plan.mix is not None)]


def _mixes(plans: Sequence[AugmentPlan]) -> list[tuple[int, int, float]]:
    """Return which images are mixed with which of `_frames`, and their weights."""
    mixed = [(image, plan.mix_weight) for image, plan in enumerate(plans) if plan.mix is not None]
    return [(image, len(plans) + i, weight) for i, (image, weight) in enumerate(mixed)]


def _grouped(plans: Sequence[AugmentPlan], frames_at_once: int) -> Iterator[slice]:
    """Yield runs of plans that make at most so many frames, and at least one plan."""
    frames = [1 if plan.mix is None else 2 for plan in plans]
    start, total = 0, 0
    for stop, more in enumerate(itertools.chain(frames, [frames_at_once + 1])):
        if total and total + more > frames_at_once:
            yield slice(start, stop)
            start, total = stop, 0
        total += more
