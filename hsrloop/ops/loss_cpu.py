"""Box terms of the loss at the points that boxes were given, for the CPU in float32.

An image after the other, so that what is computed of its points stays in cache. Tables of where
each number lies, as a GPU has them, would take longer to make and to read than the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsrloop.ops.native import compiled, exp, share

_ZERO, _ONE = np.float32(0), np.float32(1)
_NUMBERS_OF_A_THREAD = 200_000  # 0.4 ms of work, five times what a thread costs (measured)
_TO_ZERO = 8  # numbers that are set to 0 while one is computed


def _distributions(
    logits: np.ndarray,
    ends: np.ndarray,
    anchor: np.ndarray,
    aim: np.ndarray,
    p: np.ndarray,
    likely: np.ndarray,
    images: np.ndarray,
) -> None:
    """Write probabilities of T points, and how likely they make what sides should say.

    Args:
        logits: (B, 4 R, A).
        ends: (B,) of each image's points, which begin where those of the one before end.
        anchor: (T,).
        aim: (4, T) what sides should say, in bins, below R - 1.
        p: (4, R, T).
        likely: (T,) sum over the sides of the logarithm.
        images: (2,) from one to another, without the latter. Others' points are left alone.
    """
    sides, bins, _ = p.shape
    for image in range(images[0], images[1]):
        start, stop = ends[image - 1] if image else 0, ends[image]
        at, near = anchor[start:stop].astype(np.uint32), likely[start:stop]
        x = np.empty((bins, len(at)), np.float32)
        top, total = np.empty((2, len(at)), np.float32)
        product = np.ones(len(at), np.float32)  # of four totals of at most R
        near[:] = _ZERO
        for side in range(sides):
            top[:], total[:] = -np.inf, _ZERO
            for k in range(bins):
                row, own = logits[image, side * bins + k], x[k]
                for t in range(len(at)):
                    own[t] = row[at[t]]
                for t in range(len(at)):  # by itself, as others below, so that it is vectorised
                    top[t] = max(top[t], own[t])
            for k in range(bins):
                own, chance = x[k], p[side, k, start:stop]
                for t in range(len(at)):
                    chance[t] = exp(own[t] - top[t])
                    total[t] += chance[t]
            said = aim[side, start:stop]
            for t in range(len(at)):
                below = np.uint64(said[t])
                less, more = x[below, t], x[below + 1, t]
                near[t] += less - top[t] + (said[t] - np.float32(below)) * (more - less)
                product[t] *= total[t]
                total[t] = _ONE / total[t]
            for k in range(bins):
                chance = p[side, k, start:stop]
                for t in range(len(at)):
                    chance[t] *= total[t]
        for t in range(len(at)):
            near[t] -= np.log(product[t])


def _gradient(
    p: np.ndarray,
    ends: np.ndarray,
    anchor: np.ndarray,
    aim: np.ndarray,
    slope: np.ndarray,
    quarter: np.ndarray,
    out: np.ndarray,
    images: np.ndarray,
) -> None:
    """Write the gradient of both terms, 0 where no point is; see `_distributions`.

    Args:
        slope: (4, T) gradient of a side's distance.
        quarter: (T,) a quarter of a point's gradient of the focal loss.
        out: (B, 4 R, A).
    """
    sides, bins, _ = p.shape
    for image in range(images[0], images[1]):
        start, stop = ends[image - 1] if image else 0, ends[image]
        at, pull = anchor[start:stop].astype(np.uint32), quarter[start:stop]
        mean, x = np.empty(len(at), np.float32), np.empty((bins, len(at)), np.float32)
        for side in range(sides):
            steep, said = slope[side, start:stop], aim[side, start:stop]
            mean[:] = _ZERO
            for k in range(1, bins):
                chance = p[side, k, start:stop]
                for t in range(len(at)):
                    mean[t] += np.float32(k) * chance[t]
            for k in range(bins):
                own, chance = x[k], p[side, k, start:stop]
                for t in range(len(at)):
                    own[t] = ((mean[t] - np.float32(k)) * steep[t] + pull[t]) * chance[t]
            for t in range(len(at)):
                below = np.uint64(said[t])
                part = (said[t] - np.float32(below)) * pull[t]
                x[below, t] += part - pull[t]
                x[below + 1, t] -= part
            for k in range(bins):
                row, own = out[image, side * bins + k], x[k]
                row[:] = _ZERO  # just before it is written to, so that it is in cache
                for t in range(len(at)):
                    row[at[t]] = own[t]


_POINTS = "i8[::1], i8[::1], f4[:,::1]"
_compiled_distributions = compiled(
    _distributions, f"void(f4[:,:,::1], {_POINTS}, f4[:,:,::1], f4[::1], i8[::1])"
)
_compiled_gradient = compiled(
    _gradient, f"void(f4[:,:,::1], {_POINTS}, f4[:,::1], f4[::1], f4[:,:,::1], i8[::1])"
)


class BoxTerms(torch.autograd.Function):
    """Weighted 1 - CIoU and the distribution focal loss, summed over T points.

    Takes box logits, (B, 4 R, A) float32, contiguous; image and anchor of each point, (T,), images
    rising and no point twice; what sides should say, (4, T), in bins; weight and CIoU, (T,); the
    derivative of weighted CIoU by distances, (4, T). Returns two 0-dim sums.
    """

    @staticmethod
    def forward(ctx: Any, box_logits: Tensor, *points: Tensor) -> tuple[Tensor, Tensor]:
        image, anchor, aim, weight, overlap, slope = (part.contiguous() for part in points)
        images, channels, _ = ctx.shape = box_logits.shape
        last = np.searchsorted(image.numpy(), np.arange(images), side="right")
        ends, likely = torch.from_numpy(last), torch.empty_like(weight)
        p = torch.empty(4, channels // 4, len(anchor))
        given = box_logits.detach(), ends, anchor, aim, p, likely
        _by_images(_compiled_distributions, given, images, numbers=p.numel())
        ctx.save_for_backward(p, ends, anchor, aim, slope, weight)
        return torch.dot(1 - overlap, weight), torch.dot(likely, weight) / -4

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, ends, anchor, aim, slope, weight = ctx.saved_tensors
        by_box, by_dfl = grads
        out = torch.empty(ctx.shape)
        found = p, ends, anchor, aim, slope * by_box, weight * (by_dfl / 4), out
        numbers = p.numel() + out.numel() // _TO_ZERO
        _by_images(_compiled_gradient, found, len(out), numbers=numbers)
        return (out, *[None] * 6)


def _by_images(
    loop: Callable[..., None], tensors: Sequence[Tensor], images: int, *, numbers: int
) -> None:
    """Run a loop over images by threads, where there are enough numbers to compute."""
    given = [tensor.numpy() for tensor in tensors]

    def some(start: int, stop: int) -> None:
        loop(*given, np.array((start, stop)))

    threads = min(torch.get_num_threads(), numbers // _NUMBERS_OF_A_THREAD)
    share(some, images, threads=threads)
