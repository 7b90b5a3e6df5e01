"""Turn plans into pixels with torch, on the device that trains: a batch at a time.

For each output pixel the source that covers it is found first, by the inverse maps of all layers;
then one bilinear interpolation reads it from the bank. Nothing is drawn twice and no canvas is
larger than the output. The plans' numbers travel in one copy, shapes depend on the host's numbers
alone, and nothing waits for the device.

The same plans give the same pixels as `render` up to rounding, except at the edge of a source.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsrloop.data.bank import BYTES_PER_PIXEL, ImageBank, Tiles
from hsrloop.data.colour_torch import Recolour, colour_gains
from hsrloop.data.dataset import ImageRef
from hsrloop.data.plan import AugmentPlan

SCRATCH_BYTES = 128 * 2**20  # for temporaries; less means more, smaller kernels (a guess)
SCRATCH_PER_PIXEL = 72  # bytes an output pixel takes while it is rendered
REACH = 2  # source px around what the output shows that taps may read
WEIGHT_BITS = 7  # of taps: two channels' sums side by side then stay below the sign of an int32
EDGE = 1e-3  # of a px: what lies exactly half a pixel outside is outside
COLUMNS = 14  # of a layer's row: six of the map, four limits, two reaches, two whole numbers
_ODD = 0x00FF00FF  # R and B of a packed pixel; shifted by 8, G and the fourth byte
_HALF = 0x00010001 << (WEIGHT_BITS - 1)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive images that are rendered together: their own frames first, then partners'."""

    images: slice
    rows: slice  # of the layer table, one for each frame
    mixes: tuple[tuple[int, int, float], ...]  # image, its partner's frame, weight of the image
    recolours: bool
    tiles: Tiles


class TorchRenderer:
    """Renders batches of plans at one size on one device; one per thread.

    Args:
        bank: source images on, or for, the same device.
        scratch_bytes: bound of temporaries; at least one image with its mixup partner is rendered.
    """

    def __init__(
        self,
        bank: ImageBank,
        refs: Sequence[ImageRef],
        *,
        imgsz: int,
        device: torch.device,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self.bank = bank
        self.device = device
        self.imgsz = imgsz
        self._frames_at_once = max(2, scratch_bytes // (SCRATCH_PER_PIXEL * imgsz**2))
        longest = np.array([max(ref.height, ref.width) for ref in refs])
        native = np.array([(ref.width, ref.height) for ref in refs])
        self._sizes = bank.store.sizes[:, ::-1]  # (n, 2) width and height as stored
        self._units_per_px = native / longest[:, None] / self._sizes  # (n, 2)
        index = torch.arange(imgsz, dtype=torch.float32, device=device)
        self._x, self._y = index.view(1, 1, -1), index.view(1, -1, 1)
        self._recolour = Recolour(device)

    @torch.no_grad()
    def pixels(self, plans: Sequence[AugmentPlan]) -> Tensor:
        """Return (B, 3, S, S) uint8 RGB, channels_last, on the device; made on its current stream.

        Every image of a batch has HSV gains, or none has.
        """
        side = self.imgsz
        chunks, layers, gains = self._lay_out(plans)
        table, colours = self._send(layers, gains)
        out = torch.empty((len(plans), side, side, 3), dtype=torch.uint8, device=self.device)
        for chunk in chunks:
            frames = compose(table[chunk.rows], self.bank.fetch(chunk.tiles), self._x, self._y)
            for image, partner, weight in chunk.mixes:
                _blend(frames[image], frames[partner], weight)
            images = out[chunk.images]
            own = frames[: len(images)]
            if chunk.recolours:
                self._recolour(own, colours[chunk.images], images)
            else:
                images.copy_(own.view(torch.uint8).view(*own.shape, BYTES_PER_PIXEL)[..., :3])
        return out.permute(0, 3, 1, 2)

    def _send(self, layers: np.ndarray, gains: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the layer table and the colour gains on the device, sent in one copy.

        Page-locked memory comes from torch's cache, which hands it out again only once the copy is
        done.
        """
        on_gpu = self.device.type == "cuda"
        host = torch.empty(layers.size + gains.size, dtype=torch.float32, pin_memory=on_gpu)
        numbers = host.numpy()
        numbers[: layers.size], numbers[layers.size :] = layers.ravel(), gains.ravel()
        sent = host.to(self.device, non_blocking=True)
        return sent[: layers.size].view(layers.shape), sent[layers.size :].view(gains.shape)

    def _lay_out(self, plans: Sequence[AugmentPlan]) -> tuple[list[_Chunk], np.ndarray, np.ndarray]:
        """Return how to go about a batch: chunks, (F, K, COLUMNS) layers, (B, 3) colour gains."""
        groups = list(_grouped(plans, self._frames_at_once))
        frames = [frame for group in groups for frame in _frames(plans[group])]
        slots = max(len(frame.layers) for frame in frames)
        table = np.zeros((len(frames), slots, COLUMNS), np.float32)
        table[..., 10:12] = -1.0  # reaches of an empty slot: nothing is that near
        chunks, first = [], 0
        for group in groups:
            count = len(_frames(plans[group]))
            rows = slice(first, first + count)
            tiles = self._fill(table[rows], frames[rows])
            mixes, partner = [], group.stop - group.start
            for image, plan in enumerate(plans[group]):
                if plan.mix is not None:
                    mixes.append((image, partner, plan.mix_weight))
                    partner += 1
            recolours = plans[group.start].hsv_gains is not None
            chunks.append(_Chunk(group, rows, tuple(mixes), recolours, tiles))
            first += count
        gains = [colour_gains(plan.hsv_gains or (0.0, 0.0, 0.0)) for plan in plans]
        return chunks, table, np.array(gains, np.float32)

    def _fill(self, table: np.ndarray, frames: Sequence[AugmentPlan]) -> Tiles:
        """Write the layers of a chunk's frames into its (F, K, COLUMNS) rows.

        Returns:
            The source rectangles that show, in the order of the rows that read them.
        """
        layers = [layer for frame in frames for layer in frame.layers]
        counts = [len(frame.layers) for frame in frames]
        frame = np.repeat(np.arange(len(frames)), counts)
        slot = np.concatenate([np.arange(count) for count in counts])
        sources = np.array([layer.source for layer in layers])
        inverse = self._inverse(np.array([layer.affine for layer in layers]), sources)
        visible = self._whole_px(np.array([layer.visible for layer in layers]), sources)
        parts = self._shown(inverse, visible)  # (L, 4)
        seen = (parts[:, :2] < parts[:, 2:]).all(axis=1)
        tiles = Tiles(sources[seen], parts[seen])
        bases, steps = self.bank.arrange(tiles)
        rows = np.empty((len(layers), COLUMNS), np.float32)[seen]
        inverse, visible = inverse[seen], visible[seen]
        rows[:, :6] = _between_pixels(inverse)
        rows[:, 6:8], rows[:, 8:10] = visible[:, :2], visible[:, 2:] - 1
        steepest = np.abs(inverse.reshape(-1, 2, 3)[..., :2]).max(axis=2)  # (L, 2)
        rows[:, 10:12] = 0.5 + (0.5 - EDGE) * steepest
        rows.view(np.int32)[:, 12], rows.view(np.int32)[:, 13] = bases, steps
        table[frame[seen], slot[seen]] = rows
        return tiles

    def _inverse(self, affine: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Return (L, 6) maps from output px to source px, of (L, 6) maps between units."""
        per_x, per_y = self._units_per_px[sources].T
        a, b, c, d, e, f = affine.T * self.imgsz
        a, b, d, e = a * per_x, b * per_y, d * per_x, e * per_y
        whole = a * e - b * d
        a, b, d, e = e / whole, -b / whole, -d / whole, a / whole
        return np.stack((a, b, -(a * c + b * f), d, e, -(d * c + e * f)), axis=1)

    def _whole_px(self, visible: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Return (L, 4) rectangles in units as whole source px, int64."""
        px = np.rint(visible.reshape(-1, 2, 2) / self._units_per_px[sources][:, None])
        inside: np.ndarray = np.clip(px, 0, self._sizes[sources][:, None])
        return inside.astype(np.int64).reshape(-1, 4)

    def _shown(self, inverse: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """Return the (L, 4) part of each rectangle that the output may read, whole source px."""
        linear = inverse.reshape(-1, 2, 3)
        centre = linear @ np.array([self.imgsz / 2, self.imgsz / 2, 1.0])  # (L, 2)
        reach = np.abs(linear[..., :2]).sum(axis=2) * self.imgsz / 2 + REACH
        low, high = np.floor(centre - reach), np.ceil(centre + reach)
        found = np.maximum(low, visible[:, :2]), np.minimum(high, visible[:, 2:])
        return np.concatenate(found, axis=1).astype(np.int64)


def compose(table: Tensor, pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Put layers over grey, each pixel interpolated once, from the last layer that covers it.

    A layer covers the pixels whose centres lie in its rectangle or less than half a pixel outside;
    beyond its edge it is continued, so that no seam shows grey.

    Args:
        table: (F, K, COLUMNS) float32, the last two columns the bits of int32. A row maps output
            pixel indices to source ones (six), limits those (low x, low y, high x, high y), says
            how far beyond the limits it still covers (x, y), and where the source's pixels begin
            and how many a row of it has.
        pixels: (P,) int32, see `bank`.
        x, y: (1, 1, S) and (1, S, 1) float32 pixel indices.

    Returns:
        (F, S, S) int32 packed pixels.
    """
    frames, slots, _ = table.shape
    side = x.shape[2]
    column, row = x.new_zeros((frames, side, side)), x.new_zeros((frames, side, side))
    base = torch.zeros((frames, side, side), dtype=torch.int32, device=x.device)  # the grey pixel
    step = torch.zeros_like(base)
    whole = table.view(torch.int32)
    for slot in range(slots):
        a, b, c, d, e, f, x0, y0, x1, y1, reach_x, reach_y, _, _ = table[
            :, slot, :, None, None
        ].unbind(1)  # each (F, 1, 1)
        u, v = (b * y + c) + a * x, (e * y + f) + d * x  # (F, S, S)
        inside_x, inside_y = u.clamp(x0, x1), v.clamp(y0, y1)
        covers = ((u - inside_x).abs_() <= reach_x) & ((v - inside_y).abs_() <= reach_y)
        column, row = torch.where(covers, inside_x, column), torch.where(covers, inside_y, row)
        base = torch.where(covers, whole[:, slot, 12, None, None], base)
        step = torch.where(covers, whole[:, slot, 13, None, None], step)
    return _bilinear(pixels, column, row, base, step)


def _bilinear(pixels: Tensor, column: Tensor, row: Tensor, base: Tensor, step: Tensor) -> Tensor:
    """Interpolate packed pixels, two channels at a time in one int32 each.

    Args:
        pixels: (P,) int32.
        column, row: float32 pixel indices of any one shape, not negative.
        base, step: int32, where a source begins and the length of its rows.
    """
    x, y = column.floor(), row.floor()
    one = 1 << WEIGHT_BITS
    wx, wy = ((column - x) * one).round_().int(), ((row - y) * one).round_().int()
    at = (base + y.int() * step + x.int()).view(-1)
    # Tap weights in whole parts that always sum to one.
    both = (wx * wy + one // 2) >> WEIGHT_BITS
    weights = (one - wx - wy + both, wx - both, wy - both, both)
    below = at + step.view(-1)
    odd, even = torch.full_like(wx, _HALF), torch.full_like(wx, _HALF)
    for place, weight in zip((at, at + 1, below, below + 1), weights, strict=True):
        tap = pixels.index_select(0, place).view_as(wx)
        odd += (tap & _ODD) * weight
        even += (tap >> 8 & _ODD) * weight
    return (odd >> WEIGHT_BITS & _ODD) | (even >> WEIGHT_BITS & _ODD) << 8


def _blend(frame: Tensor, partner: Tensor, weight: float) -> None:
    """Replace `frame`, (S, S) packed, by weight times itself and the rest of its partner."""
    mixed = torch.lerp(partner.view(torch.uint8).float(), frame.view(torch.uint8).float(), weight)
    frame.view(torch.uint8).copy_(mixed.round_())


def _between_pixels(inverse: np.ndarray) -> np.ndarray:
    """Return (L, 6) maps between pixel indices; pixel i has its centre at i + 0.5."""
    maps = inverse.reshape(-1, 2, 3).copy()
    maps[..., 2] += (maps[..., 0] + maps[..., 1]) / 2 - 0.5
    return maps.reshape(-1, 6)


def _frames(plans: Sequence[AugmentPlan]) -> list[AugmentPlan]:
    """Return the plans of one chunk, then their mixup partners."""
    return [*plans, *(plan.mix for plan in plans if plan.mix is not None)]


def _grouped(plans: Sequence[AugmentPlan], frames_at_once: int) -> Iterator[slice]:
    """Yield runs of plans that make at most so many frames, and at least one plan."""
    frames = [1 if plan.mix is None else 2 for plan in plans]
    start, total = 0, 0
    for stop, more in enumerate(itertools.chain(frames, [frames_at_once + 1])):
        if total and total + more > frames_at_once:
            yield slice(start, stop)
            start, total = stop, 0
        total += more
