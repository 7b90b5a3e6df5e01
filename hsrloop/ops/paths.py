"""Which way a computation goes: the CPU's own, or the one that suits a GPU.

Both give the same. On a GPU work is few large kernels that the host does not wait for; on the CPU
it is pieces that stay in cache, and loops that skip what is not needed. A machine without a GPU can
take the GPU's way to have it counted and tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_as_on_a_gpu = False


def on_cpu(device: torch.device) -> bool:
    """Return whether to take the CPU's own way."""
    return device.type == "cpu" and not _as_on_a_gpu


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Take the GPU's way on the CPU meanwhile, in all threads."""
    global _as_on_a_gpu
    before, _as_on_a_gpu = _as_on_a_gpu, True
    try:
        yield
    finally:
        _as_on_a_gpu = before
