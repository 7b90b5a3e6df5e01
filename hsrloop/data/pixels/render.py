"""Turn a plan into pixels with OpenCV: one interpolation per visible source, no larger canvas.

Sources are widened to four channels on the way: OpenCV warps those two to three times faster than
three (measured 1.2 against 3.1 ms at 640 on an EPYC core, OpenCV 5.0).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import cv2
import numpy as np

from hsrloop.data.pixels.colour import colour_factors
from hsrloop.data.pixels.geometry import Box, Matrix, between_pixels, bounds, inverse
from hsrloop.data.pixels.store import GREY, ImageStore
from hsrloop.data.plan import AugmentPlan, Layer, plan_labels
from hsrloop.data.scenes.cutouts import CutoutStore
from hsrloop.data.scenes.paste import draw_paste
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.records import Sample

RING = 2  # px that a source is continued beyond its edge; up to half an output px shows
_STRIP = 160  # lines recoloured at a time, so that they stay in cache; no worse than any (measured)
_SHIFT = 8  # fractional bits of polygon corners


def render(
    plan: AugmentPlan, store: ImageStore, refs: Sequence[ImageRef], *, imgsz: int | None = None
) -> Sample:
    """Render one plan as (S, S, 3) uint8 RGB with its labels; S is the store's imgsz by default."""
    side = imgsz or store.imgsz
    image = np.empty((side, side, 3), np.uint8)
    Renderer(side).pixels(plan, store, refs, image)
    return Sample(image, *without_broken(plan_labels(plan, refs, side), store.broken))


def without_broken(
    found: tuple[np.ndarray, np.ndarray, np.ndarray], broken: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes and labels of `plan_labels`, less those of images that cannot be decoded."""
    boxes, labels, sources = found
    if not broken:
        return boxes, labels
    whole = ~np.isin(sources, list(broken))
    return boxes[whole], labels[whole]


class Renderer:
    """Scratch memory for rendering at one size; one per thread or process."""

    def __init__(self, imgsz: int) -> None:
        # Compiles, which a run that renders on a GPU need not wait for.
        from hsrloop.data.pixels.colour_cpu import recolour

        self._recolour_planes = recolour
        self.imgsz = imgsz
        self._canvas = np.empty((imgsz, imgsz, 4), np.uint8)
        self._partner = np.empty((0, 0, 4), np.uint8)  # made at the first mixup
        self._warped = np.empty((imgsz, imgsz, 4), np.uint8)
        self._mask = np.empty((imgsz, imgsz), np.uint8)
        self._padded = np.empty((imgsz + 2 * RING, imgsz + 2 * RING, 4), np.uint8)
        self._planes = [np.empty((_STRIP, imgsz), np.uint8) for _ in range(4)]

    def pixels(
        self,
        plan: AugmentPlan,
        store: ImageStore,
        refs: Sequence[ImageRef],
        out: np.ndarray,
        cutouts: CutoutStore | None = None,
    ) -> None:
        """Render a plan's pixels into `out` (S, S, 3) uint8 RGB; pastes need their cut-outs."""
        self._compose(self._canvas, plan, store, refs, cutouts)
        if plan.mix is not None:
            if not self._partner.size:
                self._partner = np.empty_like(self._canvas)
            self._compose(self._partner, plan.mix, store, refs, cutouts)
            weight = plan.mix_weight
            cv2.addWeighted(self._canvas, weight, self._partner, 1 - weight, 0, dst=self._canvas)
        if plan.hsv_gains is None:
            cv2.cvtColor(self._canvas, cv2.COLOR_RGBA2RGB, dst=out)
        else:
            self._recolour(out, plan.hsv_gains)

    def _compose(
        self,
        canvas: np.ndarray,
        plan: AugmentPlan,
        store: ImageStore,
        refs: Sequence[ImageRef],
        cutouts: CutoutStore | None,
    ) -> None:
        canvas.fill(GREY)
        for layer in plan.layers:
            self._lay(canvas, layer, store, refs[layer.source])
        for paste in plan.pastes:
            assert cutouts is not None
            draw_paste(canvas, paste, cutouts)

    def _lay(self, canvas: np.ndarray, layer: Layer, store: ImageStore, ref: ImageRef) -> None:
        """Warp the part of one source that shows into its place on the canvas."""
        longest = max(ref.height, ref.width)
        pixels = store[layer.source]
        height, width = pixels.shape[:2]
        per_x, per_y = (
            ref.width / longest / width,
            ref.height / longest / height,
        )  # units per source px
        visible = _rounded(layer.visible, per_x, per_y, width, height)
        a, b, c, d, e, f = (value * self.imgsz for value in layer.affine)
        matrix = (a * per_x, b * per_y, c, d * per_x, e * per_y, f)  # source px to output px
        place = bounds(matrix, visible, (0, 0, self.imgsz, self.imgsz), margin=0)
        if place is None:
            return
        part = bounds(inverse(matrix), place, visible, margin=2)
        if part is None:
            return
        padded = self._pad(pixels[part[1] : part[3], part[0] : part[2]])
        x, y, w, h = place[0], place[1], place[2] - place[0], place[3] - place[1]
        warped, mask = self._warped[:h, :w], self._mask[:h, :w]
        cv2.warpAffine(
            padded,
            between_pixels(matrix, (part[0] - RING, part[1] - RING), (x, y)),
            (w, h),
            dst=warped,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(GREY,) * 4,
        )
        mask.fill(0)
        cv2.fillConvexPoly(mask, _corners(matrix, visible, (x, y)), 255, shift=_SHIFT)
        cv2.copyTo(warped, mask, canvas[y : y + h, x : x + w])

    def _pad(self, part: np.ndarray) -> np.ndarray:
        """Return the part in four channels within a ring of its own edge.

        Without the ring, pixels at a seam would be mixed with grey.
        """
        height, width = part.shape[:2]
        padded = self._padded[: height + 2 * RING, : width + 2 * RING]
        cv2.cvtColor(part, cv2.COLOR_RGB2RGBA, dst=padded[RING:-RING, RING:-RING])
        whole = padded.view(np.uint32)[..., 0]  # a pixel as one number: quicker to copy by columns
        whole[:RING], whole[-RING:] = whole[RING], whole[-RING - 1]
        for i in range(RING):
            whole[:, i], whole[:, -1 - i] = whole[:, RING], whole[:, -RING - 1]
        return padded

    def _recolour(self, out: np.ndarray, gains: tuple[float, float, float]) -> None:
        """Shift hue and scale saturation and value of the canvas, into `out`."""
        factors = colour_factors(gains)
        for top in range(0, self.imgsz, _STRIP):
            rows = slice(top, min(top + _STRIP, self.imgsz))
            planes = [plane[: rows.stop - top] for plane in self._planes]
            cv2.split(self._canvas[rows], planes)
            self._recolour_planes(planes[:3], factors)
            cv2.merge(planes[:3], dst=out[rows])


def _rounded(
    visible: tuple[float, float, float, float], per_x: float, per_y: float, width: int, height: int
) -> Box:
    """Return a rectangle in units as whole source pixels."""
    x0, y0, x1, y1 = visible
    return (
        max(0, round(x0 / per_x)),
        max(0, round(y0 / per_y)),
        min(width, round(x1 / per_x)),
        min(height, round(y1 / per_y)),
    )


def _corners(matrix: Matrix, box: Box, target: tuple[int, int]) -> np.ndarray:
    """Return the (4, 2) corners of a mapped box as fixed-point pixel indices of a window."""
    a, b, c, d, e, f = matrix
    x0, y0, x1, y1 = box
    points = [
        (a * x + b * y + c - target[0] - 0.5, d * x + e * y + f - target[1] - 0.5)
        for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    ]
    corners: np.ndarray = np.rint(np.array(points) * (1 << _SHIFT)).astype(np.int32)
    return corners
