"""A moving average of many tensors: one pass over memory on CUDA, three by torch's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hsrloop.ops.nvrtc import Kernels, proved_kernels

SOURCE = Path(__file__).with_name("average.cu")
_THREADS = 256  # of a block
_PIECE = 8 * _THREADS  # numbers of a block: as many a thread as it reads at once


class Averager:
    """Moves averages towards numbers, in place; remembers where they lie.

    What a recorded step reads of it lives as long as this does.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, ...], Tensor] = {}  # by where they begin

    @torch.no_grad()
    def move(self, averages: list[Tensor], numbers: list[Tensor], weight: Tensor) -> None:
        """Add weight * (number - average) to each average.

        Args:
            averages, numbers: tensors of the same shapes, the numbers of any type; finite, since
                0 * NaN would be NaN.
            weight: () float32, on their device.
        """
        kernel = _kernel_for(averages, numbers)
        if kernel is not None:
            self._by(kernel, averages, numbers, weight)
            return
        pairs = zip(averages, numbers, strict=True)
        way = torch._foreach_sub([other.to(own.dtype) for own, other in pairs], averages)
        torch._foreach_mul_(way, weight)
        torch._foreach_add_(averages, way)

    def _by(
        self,
        kernel: Callable[..., None],
        averages: Sequence[Tensor],
        numbers: Sequence[Tensor],
        weight: Tensor,
    ) -> None:
        """Do it with `average.cu`."""
        where = tuple(t.data_ptr() for pair in zip(averages, numbers, strict=True) for t in pair)
        pieces = self._pieces.get(where)
        if pieces is None:
            pieces = self._pieces[where] = _pieces(averages, numbers).to(weight.device)
        if len(pieces):
            kernel((len(pieces), 1, 1), (_THREADS, 1, 1), weight.device, pieces, weight)


def _kernel_for(
    averages: Sequence[Tensor], numbers: Sequence[Tensor]
) -> Callable[..., None] | None:
    """Return what averages all of them in one go; None where torch's operators have to."""
    if not averages or not averages[0].is_cuda:
        return None
    pairs = zip(averages, numbers, strict=True)
    if not all(own.dtype is torch.float32 and _alike(own, other) for own, other in pairs):
        return None
    kernels = proved_kernels(SOURCE, averages[0].device, _proves)
    return None if kernels is None else kernels["average"]


def _alike(own: Tensor, other: Tensor) -> bool:
    """Return whether the numbers of two tensors lie in the same order, without gaps."""
    if (own.dtype, own.device, own.stride()) != (other.dtype, other.device, other.stride()):
        return False
    return own.is_contiguous() or own.is_contiguous(memory_format=torch.channels_last)


def _pieces(averages: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    """Return (pieces, 3) int64, on the host: addresses of both, and how many numbers."""
    rows = [
        (own.data_ptr() + 4 * first, other.data_ptr() + 4 * first, min(_PIECE, count - first))
        for own, other in zip(averages, numbers, strict=True)
        for count in (own.numel(),)
        for first in range(0, count, _PIECE)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _proves(kernels: Kernels, device: torch.device) -> bool:
    """Return whether it gives what torch's operators give on the CPU, to the bit."""
    g = torch.Generator().manual_seed(0)
    sides = ((3, 7), (_PIECE + 5,), (1,))
    own, other = ([torch.randn(side, generator=g) for side in sides] for _ in range(2))
    weight = torch.tensor(0.3)
    expected = [a + (b - a) * weight for a, b in zip(own, other, strict=True)]
    own, other = ([t.to(device) for t in part] for part in (own, other))
    Averager()._by(kernels["average"], own, other, weight.to(device))
    return all(torch.equal(a.cpu(), b) for a, b in zip(own, expected, strict=True))
