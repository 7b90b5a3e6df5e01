"""The most memory that a process had in use."""

from __future__ import annotations

import sys

import psutil
import torch


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: allocated on the GPU, resident on the CPU.

    What CUDA graphs hold on a GPU counts even while it is idle: nobody else can have it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _held_by_graphs(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # absent on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _held_by_graphs(device: torch.device) -> int:
    """Return the bytes of the recordings that exist now which are not allocated at the moment."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )
