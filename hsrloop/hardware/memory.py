"""What this process may use of host and GPU: memory, cores, disk; limits set on it counted in."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

GIB = 2**30
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """RAM in bytes: the machine's, or its container's when that is less."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Memory of a GPU in bytes: the card's, or this process's own cap's when that is less."""

    total_bytes: int
    free_bytes: int


def host_memory(root: Path = _ROOT) -> HostMemory:
    """Return total and free RAM, the tightest of the machine and all enclosing cgroups.

    Page cache that the kernel would give up counts as free. `root` is for tests.
    """
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _memory_limits(root):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return HostMemory(total, free)


def usable_cores(root: Path = _ROOT) -> int:
    """Return the cores this process may keep busy: its affinity mask, or a smaller cgroup quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # absent on Windows and macOS
        cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(int(quota) for quota in _core_quotas(root))]))


def gpu_memory(device: torch.device | str) -> GpuMemory:
    """Return what this process may have of a GPU in all, and what it can still take of it.

    Free is what the driver has left, or what torch's allocator may still take under its cap
    (`capped`), whichever is less. Memory that the allocator holds unused is not counted as free.

    Args:
        device: "cuda" or "cuda:N"; without a number the current one.
    """
    import torch

    index = torch.device(device).index
    free, total = torch.cuda.mem_get_info(index)
    cap = int(torch.cuda.get_per_process_memory_fraction(index) * total)
    left = cap - torch.cuda.memory_reserved(index)
    return GpuMemory(min(total, cap), max(0, min(free, left)))


@contextmanager
def capped(device: torch.device | str, share: float) -> Iterator[None]:
    """Let torch's allocator take no more than a share of a GPU; a smaller cap set before stays.

    Args:
        device: as for `gpu_memory`.
        share: of the card's whole memory; above 1 it caps nothing.
    """
    import torch

    index = torch.device(device).index
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.set_per_process_memory_fraction(min(before, share), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


def gpu_neighbours(uuid: str) -> tuple[tuple[int, int], ...]:
    """Return (pid, bytes held) of the other processes on a GPU, the largest first.

    Args:
        uuid: as NVML or as torch spells it, which leaves "GPU-" out.

    Empty without a driver, or where it does not tell (in containers and under Windows).
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-" + uuid.removeprefix("GPU-"))
        found = [
            *pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
            *pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
        ]
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    held = {p.pid: int(p.usedGpuMemory or 0) for p in found if p.pid != os.getpid()}
    return tuple(sorted(held.items(), key=lambda item: -item[1]))


def cache_budget(free_bytes: int, *, reserve_bytes: int = 2 * GIB, share: float = 0.6) -> int:
    """Return how many bytes of decoded images to keep in RAM.

    Args:
        free_bytes: RAM free now.
        reserve_bytes: left to torch, the loader and the desktop (a guess); at most half of what is
            free, so that small machines cache too.
        share: of the rest (a guess).
    """
    return int(max(0, free_bytes - min(reserve_bytes, free_bytes // 2)) * share)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use that cannot be reclaimed) of each limited cgroup around us."""
    files = (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for controller, limit_file, used_file, cache_key in files:
        for folder in _cgroups(root, controller):
            limit = _number(folder / limit_file)
            used = _number(folder / used_file)
            if limit is not None and used is not None:
                yield limit, max(0, used - _stat(folder / "memory.stat", cache_key))


def _core_quotas(root: Path) -> Iterator[float]:
    for folder in _cgroups(root, ""):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            yield int(words[0]) / int(words[1])
    for folder in _cgroups(root, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            yield quota / period


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield our cgroup's folder and those around it; controller "" is version 2.

    In a container the path of /proc/self/cgroup is often the host's and does not exist here; the
    mounted root is then our own group, and it is always yielded.
    """
    mount = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = mount / path.lstrip("/")
            while folder != mount and mount in folder.parents:
                yield folder
                folder = folder.parent
    yield mount


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # no such controller, or not ours to see: no limit known


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _stat(path: Path, key: str) -> int:
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def release_gpu_memory() -> None:
    """Give back what nothing holds any more; waits for the GPU.

    Recordings that are gone may still be running in that memory.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
