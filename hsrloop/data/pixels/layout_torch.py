"""Lay out on the host what the torch renderer needs: which rectangles, under which inverse maps.

Plans' numbers become tables of float32, all layers or all cut-outs of some frames at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hsrloop.data.pixels.bank import PARTS, RING, Bank, Tiles
from hsrloop.data.pixels.pixels_torch import LAYER_COLUMNS, STAMP_COLUMNS
from hsrloop.data.plan import AugmentPlan, Paste
from hsrloop.data.scenes.cutouts import LEVELS
from hsrloop.data.sets.dataset import ImageRef

REACH = 2  # source px around what the output shows that taps may read
EDGE = 1e-3  # of a px: what lies exactly half a pixel outside is outside
WINDOW_STEP = 32  # px; windows are rounded up, so that memory is found again
SHADOW = 3  # edge of a cut-out; 0 to 2 are those that `Paste.alpha` names


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers that show; L of them."""

    frames: np.ndarray  # (L,) int64
    slots: np.ndarray  # (L,) int64, place within its frame
    inverse: np.ndarray  # (L, 6) output px to source px
    visible: np.ndarray  # (L, 4) int64, source px


@dataclass(frozen=True, slots=True)
class Stamps:
    """Cut-outs and shadows that show, by slot, then by frame; n of them."""

    frames: np.ndarray  # (n,) int64
    slots: np.ndarray  # (n,) int64
    inverse: np.ndarray  # (n, 6) output px to px of the source within its ring
    sizes: np.ndarray  # (n, 2) int64, width and height of the source with its ring
    windows: np.ndarray  # (n, 4) int64, output px
    looks: np.ndarray  # (n, 5) gains R, G, B; strength of the edge; which one


@dataclass(frozen=True, slots=True)
class Slot:
    """Stamps that are blended together, at most one for a frame."""

    rows: slice
    window: tuple[int, int]  # height and width


class LayerLayout:
    """Lays out layers of plans."""

    def __init__(self, bank: Bank, images: Sequence[ImageRef], imgsz: int) -> None:
        self._imgsz = imgsz
        native = np.array([(ref.width, ref.height) for ref in images], float).reshape(-1, 2)
        self._sizes = bank.sources.sizes[: len(images), ::-1]  # (n, 2) width and height as stored
        self._units_per_px = native / native.max(axis=1, keepdims=True) / self._sizes  # (n, 2)

    def find(self, frames: Sequence[AugmentPlan]) -> tuple[Layers, Tiles]:
        """Return the layers that show, and for each the source rectangle that does."""
        layers = [layer for frame in frames for layer in frame.layers]
        counts = [len(frame.layers) for frame in frames]
        sources = np.array([layer.source for layer in layers], np.int64)
        per_px = self._units_per_px[sources]
        inverse = _inverse(
            np.array([layer.affine for layer in layers]).reshape(-1, 6), per_px, self._imgsz
        )
        px = np.rint(
            np.array([layer.visible for layer in layers]).reshape(-1, 2, 2) / per_px[:, None]
        )
        visible = np.clip(px, 0, self._sizes[sources][:, None]).astype(np.int64).reshape(-1, 4)
        parts = _shown(inverse, visible, self._imgsz)
        shows = (parts[:, :2] < parts[:, 2:]).all(axis=1)
        found = Layers(
            np.repeat(np.arange(len(frames)), counts)[shows],
            np.concatenate([np.arange(count) for count in counts])[shows],
            inverse[shows],
            visible[shows],
        )
        return found, Tiles(sources[shows], parts[shows])

    @staticmethod
    def table(
        found: Layers, firsts: np.ndarray, steps: np.ndarray, frames: int, slots: int
    ) -> np.ndarray:
        """Return (F, 1 + K, LAYER_COLUMNS) float32; see `compose`.

        Args:
            firsts, steps: (L,) of the layers' tiles, as the bank arranges them.
            frames, slots: F and K; slots without a layer cover nothing.
        """
        table = np.zeros((frames, 1 + slots, LAYER_COLUMNS), np.float32)
        table[:, 1:, 10:12] = -1.0  # reaches: nothing is that near
        rows = np.empty((len(firsts), LAYER_COLUMNS), np.float32)
        rows[:, :6] = _between_pixels(found.inverse)
        rows[:, 6:8], rows[:, 8:10] = found.visible[:, :2], found.visible[:, 2:] - 1
        steepest = np.abs(found.inverse.reshape(-1, 2, 3)[..., :2]).max(axis=2)  # (L, 2)
        rows[:, 10:12] = 0.5 + (0.5 - EDGE) * steepest
        rows.view(np.int32)[:, 12:] = np.stack((firsts, steps), axis=1)
        table.view(np.int32)[found.frames, 1 + found.slots] = rows.view(np.int32)
        return table


class StampLayout:
    """Lays out cut-outs and their shadows, each a stamp of its own."""

    def __init__(self, bank: Bank, imgsz: int) -> None:
        self._imgsz = imgsz
        self._images = len(bank.sources.images)
        self._cutouts = cutouts = bank.sources.cutouts
        extents = [cutouts.extent(i) for i in range(len(cutouts))] if cutouts else []
        extents = [extent for extent in extents for _ in range(LEVELS)]
        # Both by cut-out and level.
        self._sizes = bank.sources.sizes[self._images :: PARTS, ::-1]  # (n, 2) width and height
        self._units_per_px = np.array(extents).reshape(-1, 2) / (self._sizes - 2 * RING)

    def find(self, frames: Sequence[AugmentPlan]) -> tuple[Stamps, Tiles]:
        """Return the stamps that show, and tiles: all their colours, then all their edges."""
        drawn = [
            (n, *row)
            for n, frame in enumerate(frames)
            for paste in frame.pastes
            for row in self._stamps(paste)
        ]
        numbers = np.array(drawn, float).reshape(-1, 13)
        frame, place = numbers[:, 0].astype(np.int64), numbers[:, 1].astype(np.int64)
        affine, per_px, sizes = numbers[:, 2:8], self._units_per_px[place], self._sizes[place]
        inverse = _inverse(affine, per_px, self._imgsz)
        inverse[:, [2, 5]] += RING
        windows = _windows(affine * self._imgsz, (sizes - 2 * RING) * per_px, self._imgsz)
        whole = np.concatenate((np.zeros_like(sizes), sizes), axis=1)
        parts = _shown(inverse, whole, self._imgsz)
        shows = np.concatenate((windows[:, :2] < windows[:, 2:], parts[:, :2] < parts[:, 2:]), 1)
        kept = np.flatnonzero(shows.all(axis=1))
        slots = np.arange(len(kept)) - np.searchsorted(frame[kept], frame[kept])
        order = kept[np.argsort(slots, kind="stable")]
        found = Stamps(
            frame[order],
            np.sort(slots),
            inverse[order],
            sizes[order],
            windows[order],
            numbers[order, 8:],
        )
        colours = self._images + PARTS * place[order]
        edges = colours + np.where(found.looks[:, 4] == SHADOW, 2, 1)
        both = np.concatenate((colours, edges))
        return found, Tiles(both, np.tile(parts[order], (2, 1)))

    def table(
        self, found: Stamps, firsts: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, list[Slot]]:
        """Return (n, STAMP_COLUMNS) float32, see `stamp`, and which rows to blend together.

        Args:
            firsts, steps: (2 n,) of the stamps' tiles, as the bank arranges them.
        """
        count = len(found.frames)
        table = np.empty((count, STAMP_COLUMNS), np.float32)
        table[:, :6] = _between_pixels(found.inverse)
        table[:, 6:8] = found.sizes - 1
        table[:, 8:12] = found.looks[:, :4]
        spread = []
        for slot in range(int(found.slots.max(initial=-1)) + 1):
            rows = slice(*np.searchsorted(found.slots, (slot, slot + 1)).tolist())
            corner = found.windows[rows, :2]
            longest = (found.windows[rows, 2:] - corner).max(axis=0)  # width, height
            size = np.minimum(-(-longest // WINDOW_STEP) * WINDOW_STEP, self._imgsz)
            table[rows, 12:14] = np.minimum(corner, self._imgsz - size)
            spread.append(Slot(rows, (int(size[1]), int(size[0]))))
        channels = found.looks[:, 4] % SHADOW
        whole = (found.frames, firsts[:count], firsts[count:], steps[:count], channels)
        table.view(np.int32)[:, 14:] = np.stack(whole, axis=1)
        return table, spread

    def _stamps(self, paste: Paste) -> Iterator[tuple[float, ...]]:
        """Yield a row for each stamp of a paste: place, map, and the columns of `Stamps.looks`."""
        assert self._cutouts is not None
        a, b, c, d, e, f = paste.affine
        long_px = self._imgsz * math.sqrt(abs(a * e - b * d))
        place = LEVELS * paste.cutout + self._cutouts.level_for(paste.cutout, long_px)
        dx, dy, opacity = paste.shadow
        if opacity > 0:
            yield place, a, b, c + dx, d, e, f + dy, 0, 0, 0, opacity, SHADOW
        yield place, *paste.affine, *paste.gains, 1.0, paste.alpha


def _windows(affine: np.ndarray, extents: np.ndarray, imgsz: int) -> np.ndarray:
    """Return (n, 4) int64 output px that mapped rectangles from the origin can touch."""
    linear, half = affine.reshape(-1, 2, 3), extents / 2
    centre = (linear[..., :2] * half[:, None]).sum(axis=2) + linear[..., 2]
    reach = (np.abs(linear[..., :2]) * half[:, None]).sum(axis=2)
    low, high = np.floor(centre - reach), np.ceil(centre + reach)
    return np.concatenate((np.maximum(low, 0), np.minimum(high, imgsz)), axis=1).astype(np.int64)


def _inverse(affine: np.ndarray, units_per_px: np.ndarray, imgsz: int) -> np.ndarray:
    """Return (L, 6) maps from output px to source px, of (L, 6) maps between units."""
    per_x, per_y = units_per_px.T
    a, b, c, d, e, f = affine.T * imgsz
    a, b, d, e = a * per_x, b * per_y, d * per_x, e * per_y
    whole = a * e - b * d
    a, b, d, e = e / whole, -b / whole, -d / whole, a / whole
    return np.stack((a, b, -(a * c + b * f), d, e, -(d * c + e * f)), axis=1)


def _shown(inverse: np.ndarray, visible: np.ndarray, imgsz: int) -> np.ndarray:
    """Return the (L, 4) part of each source rectangle that the output may read, whole px."""
    linear = inverse.reshape(-1, 2, 3)
    centre = linear @ np.array([imgsz / 2, imgsz / 2, 1.0])  # (L, 2)
    reach = np.abs(linear[..., :2]).sum(axis=2) * imgsz / 2 + REACH
    low, high = np.floor(centre - reach), np.ceil(centre + reach)
    found = np.maximum(low, visible[:, :2]), np.minimum(high, visible[:, 2:])
    return np.concatenate(found, axis=1).astype(np.int64)


def _between_pixels(inverse: np.ndarray) -> np.ndarray:
    """Return (L, 6) maps between pixel indices; pixel i has its centre at i + 0.5."""
    maps = inverse.reshape(-1, 2, 3).copy()
    maps[..., 2] += (maps[..., 0] + maps[..., 1]) / 2 - 0.5
    return maps.reshape(-1, 6)
