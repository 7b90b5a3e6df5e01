"""The most memory that a process had in use."""

from __future__ import annotations

import sys

import psutil
import torch


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: allocated on the GPU, resident on the CPU.

    What recordings hold between their replays is not among it, see `TrainState.recorded_bytes`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # absent on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
