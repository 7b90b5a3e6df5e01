"""Process settings that must stand before torch is loaded; this file never loads it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping

from hsrloop.hardware.memory import usable_cores
from hsrloop.paths import cache_folder

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def prepare_environment(*, cores: int | None = None) -> None:
    """Set the variables that OpenMP and torch read once, at load; those already set stay.

    Args:
        cores: threads of OpenMP; the cores this process may use when not given.
    """
    for key, value in _settings(cores or usable_cores()).items():
        os.environ.setdefault(key, value)


def threads_at_start() -> int:
    """Return the threads that torch's operators begin with on the CPU."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # what follows is for nested ones
    return int(first) if first.strip().isdecimal() and int(first) else usable_cores()


def as_found(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what `prepare_environment` sets, for other programs."""
    ours = _settings(usable_cores())
    return {k: v for k, v in environment.items() if ours.get(k) != v}


def _settings(cores: int) -> dict[str, str]:
    settings = {
        "OMP_NUM_THREADS": str(cores),
        # Threads wait for each other by spinning, up to 2 ms here. Sleeping sooner costs a third
        # of the speed on an idle virtual machine (10 against 15 images/s; measured, 2 cores,
        # torch 2.15). Beside a busy process it is the other way round: see `contention`.
        "GOMP_SPINCOUNT": "100000",
        "OMP_WAIT_POLICY": "passive",  # the spin count while throttled is 0
        # A kernel is loaded when it is first started. torch wants it too, but says so too late:
        # see `waking`.
        "CUDA_MODULE_LOADING": "LAZY",
        # What --deterministic needs of cuBLAS; read once, when CUDA starts. The smaller of the two
        # that it may be: 32 MiB for each thread and stream is more than its few products need.
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        **_kept_between_starts(),
        # torch's profiler tells of its stages, and of a missing GPU as an error.
        "KINETO_LOG_LEVEL": "99",
        # Large tensors on the CPU ask for huge pages, which saves page faults.
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    if sys.platform.startswith("linux") and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # A smaller micro-batch after running out of memory can then use what the larger one left.
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return settings


def _kept_between_starts() -> dict[str, str]:
    """Return where matplotlib and torch's compiler keep what they would make again.

    They would put it into the home and the temporary folder; here it outlives a reboot. Nothing
    where nothing can be written: torch is not loaded with a folder that it cannot make.
    """
    places = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "compiled"}
    folders = {key: cache_folder() / name for key, name in places.items()}
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    writable = all(os.access(folder, os.W_OK | os.X_OK) for folder in folders.values())
    return {key: str(folder) for key, folder in folders.items()} if writable else {}


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory instead of giving it back to the system at once.

    A training step on the CPU frees and takes hundreds of MB; by default each large tensor is a
    fresh mapping whose pages fault in one by one. The price: memory once used stays with the
    process. Linux with glibc only; returns whether it was applied.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 28))
    applied = [mallopt(option, value) == 1 for option, value in wanted]
    return all(applied)
