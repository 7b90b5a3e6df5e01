"""Box logits at the points that boxes were given, and their gradient, for the CPU in float32.

Tables of where each number lies would take longer to make and to read than the numbers themselves.
Two threads are no faster: it is memory that is waited for (measured).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hsrloop.ops.native import compiled


def _gather(
    logits: np.ndarray,
    image: np.ndarray,
    anchor: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write logits (B, C, A) of T points to (C, T)."""
    for channel in range(logits.shape[1]):
        for t in range(len(image)):
            out[channel, t] = logits[image[t], channel, anchor[t]]


def _box_gradient(
    p: np.ndarray,
    below: np.ndarray,
    share: np.ndarray,
    slope: np.ndarray,
    quarter: np.ndarray,
    image: np.ndarray,
    anchor: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write the gradient of both terms of T points, no two of them the same, to (B, 4 R, A).

    Args:
        p: (4, R, T) probabilities.
        below, share: (4, T) the bin below what a side should say, and how far it is from it.
        slope: (4, T) gradient of a side's distance.
        quarter: (T,) a quarter of a point's gradient of the focal loss.
        out: 0 elsewhere.
    """
    sides, bins, count = p.shape
    mean, row = np.empty(count, np.float32), np.empty(count, np.float32)
    for side in range(sides):
        mean[:] = 0
        for k in range(1, bins):
            for t in range(count):
                mean[t] += np.float32(k) * p[side, k, t]
        for k in range(bins):
            for t in range(count):  # by itself, so that it is vectorised
                pull = (mean[t] - np.float32(k)) * slope[side, t] + quarter[t]
                row[t] = pull * p[side, k, t]
            for t in range(count):
                out[image[t], side * bins + k, anchor[t]] = row[t]
        for t in range(count):
            first = side * bins + below[side, t]
            part = share[side, t] * quarter[t]
            out[image[t], first, anchor[t]] += part - quarter[t]
            out[image[t], first + 1, anchor[t]] -= part


_compiled_gather = compiled(_gather, "void(f4[:,:,::1], i8[::1], i8[::1], f4[:,::1])")
_compiled_gradient = compiled(
    _box_gradient,
    "void(f4[:,:,::1], i8[:,::1], f4[:,::1], f4[:,::1], f4[::1], i8[::1], i8[::1], f4[:,:,::1])",
)


def gather(logits: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
    """Return logits (B, C, A) of T points as (C, T)."""
    out = torch.empty((logits.shape[1], len(anchor)))
    _compiled_gather(*(part.numpy() for part in (logits, image, anchor, out)))
    return out


def box_gradient(*given: Tensor) -> None:
    """Write the gradient of box logits to the last argument; see `_box_gradient`."""
    _compiled_gradient(*(part.numpy() for part in given))
