"""The most memory that a process had in use."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: allocated on the GPU, resident on the CPU.

    What CUDA graphs hold between their replays is not among it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # `getrusage` also counts what a process was before it was this one
        told = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        if told is not None:
            return int(told[1]) * 1024
    import resource  # absent on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here on; elsewhere than on Linux a process' is its most so far.

    Source: proc(5), clear_refs and status.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # where a container forbids it
            _CLEAR.write_text("5")
