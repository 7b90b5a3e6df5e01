"""How full a GPU is: too full to work with, or with room to spare.

Running out shows as an error. Two things come before it and do not: the allocator finds no memory
until it has emptied its cache, again and again; and drivers that lend main memory in place of the
card's own (Windows, WSL), which makes a step many times slower. All numbers are the host's own;
nothing here waits for the device.
"""

from __future__ import annotations

import platform
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hsrloop.hardware.memory import capped, gpu_memory
from hsrloop.records import DeviceInfo

SETTLING = 2  # windows in which kernels are still being chosen, which takes and gives memory
GROWING = 3  # windows in a row in which the allocator had to start over (a guess)
FULL_SHARE = 0.95
SLOWER = 3.0  # times the median of what was usual
SLOW = 2  # such windows in a row: a pause of the process is one (a guess)
REMEMBERED = 100  # windows
SPILL_SHARE = 0.97  # of what is free at the start: where a driver would begin to lend (a guess)


@dataclass(frozen=True, slots=True)
class Reading:
    """A look at a card: how often its allocator started over, and what share of it is taken.

    The share is of what this process may have of the card.
    """

    retries: int
    full_share: float


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of a card: held between steps, at the peak, and all that this process could have."""

    fixed_bytes: int
    peak_bytes: int
    capacity_bytes: int


class Pressure:
    """Judges a training by windows of time, each from one reading of the device to the next.

    Args:
        read: a look at the card, at the end of each window.
    """

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self._usual: deque[float] = deque(maxlen=REMEMBERED)  # s/image
        self._windows = self._growing = self._slow = self._retries = 0
        self._resumed = True

    def resume(self) -> None:
        """Say that training goes on after something else, whose memory and time do not count."""
        self._retries = self._read().retries
        self._resumed = True

    def observe(self, samples: int, seconds: float) -> str | None:
        """Take a window in; return what is wrong in words, None while nothing is."""
        reading, per_image = self._read(), seconds / max(samples, 1)
        grew, self._retries = reading.retries > self._retries, reading.retries
        first, self._resumed = self._resumed, False
        self._windows += 1
        if self._windows <= SETTLING:
            return None
        self._growing = self._growing + 1 if grew else 0
        usual = statistics.median(self._usual) if len(self._usual) > SETTLING else per_image
        slow = per_image > SLOWER * usual and reading.full_share > FULL_SHARE and not first
        self._slow = self._slow + 1 if slow else 0
        if not slow and not first:
            self._usual.append(per_image)
        if self._growing >= GROWING:
            return "the allocator had to empty its cache again and again to find memory"
        if self._slow >= SLOW:
            return (
                f"steps became {per_image / usual:.1f} times slower with "
                f"{reading.full_share:.0%} of the memory taken"
            )
        return None


def watch(device: str) -> Pressure | None:
    """Return what watches a device as torch spells it; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    def read() -> Reading:
        memory = gpu_memory(device)
        retries = int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
        return Reading(retries, 1 - memory.free_bytes / memory.total_bytes)

    return Pressure(read)


def memory_use(device: str) -> MemoryUse | None:
    """Return what this process has taken of a device; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return MemoryUse(
        fixed_bytes=torch.cuda.memory_allocated(device),
        peak_bytes=torch.cuda.max_memory_allocated(device),
        capacity_bytes=gpu_memory(device).free_bytes + torch.cuda.memory_reserved(device),
    )


def spill_cap(
    info: DeviceInfo, *, system: str = platform.system(), release: str = platform.release()
) -> float | None:
    """Return the share of the card that torch may take, where the driver lends main memory.

    With a cap torch raises instead, and settings shrink. None: no cap is needed.

    Args:
        system, release: of the operating system, as `platform` names them.
    """
    lends = system == "Windows" or "microsoft" in release.lower()  # the latter: WSL
    if info.kind != "cuda" or not info.total_bytes or not lends:
        return None
    return min(1.0, SPILL_SHARE * info.free_bytes / info.total_bytes)


@contextmanager
def without_spilling(info: DeviceInfo) -> Iterator[None]:
    """Keep torch, meanwhile, from memory that the driver would lend; see `spill_cap`."""
    share = spill_cap(info)
    if share is None:
        yield
        return
    with capped(f"cuda:{info.index}", share):
        yield
