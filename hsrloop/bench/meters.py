"""Instruments: seconds once the device has finished, peak memory, watts and utilisation."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from hsrloop.bench.results import Spread

SAMPLE_EVERY_S = 0.1  # NVML renews its figures about that often,
LAG_S = 0.5  # and each is a mean over a time before: a sixth of a second to one, by the card
Work = Callable[[int], None]  # does so many steps


@dataclass(slots=True)
class PowerReading:
    """Means over the samples taken while it is on; None where nothing could be read."""

    watts: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    _since: float = math.inf  # when it was turned on

    def resume(self) -> None:
        """Keep what is read from now on, less what still tells of the time before."""
        if self._since == math.inf:
            self._since = time.monotonic()

    def pause(self) -> None:
        """Keep nothing of what is read."""
        self._since = math.inf

    def take(self, watts: float, busy: float) -> None:
        """Keep a sample if it is of the time that it is on."""
        if time.monotonic() - self._since >= LAG_S:
            self.watts.append(watts)
            self.busy.append(busy)

    def means(self) -> tuple[float | None, float | None]:
        """Return mean watts and mean share of time with work on the GPU."""
        return _mean(self.watts), _mean(self.busy)


ReadPower = Callable[[], tuple[float, float]]  # watts and utilisation in [0, 1]


@contextmanager
def power(read: ReadPower | None) -> Iterator[PowerReading]:
    """Sample in a thread meanwhile; None: there is nothing to read."""
    reading = PowerReading()
    if read is None:
        yield reading
        return
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            reading.take(*read())

    thread = threading.Thread(target=sample, name="power-meter", daemon=True)
    thread.start()
    try:
        yield reading
    finally:
        done.set()
        thread.join()


def nvml_reader(uuid: str) -> ReadPower | None:
    """Return what reads a GPU's power and utilisation; None without a driver that tells.

    Args:
        uuid: as NVML or as torch spells it, which leaves "GPU-" out.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-" + uuid.removeprefix("GPU-"))

        def read() -> tuple[float, float]:
            busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            return pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, busy / 100

        read()
    except pynvml.NVMLError:
        return None
    return read


class Stopwatch:
    """Takes times now, to be compared later."""

    def stamp(self) -> Any:
        """Return this moment."""
        return time.perf_counter()

    def seconds(self, first: Any, last: Any) -> float:
        """Return the seconds between two moments."""
        return float(last - first)


class _CudaStopwatch(Stopwatch):
    """Its moments are those at which the current stream has done what it was given before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def seconds(self, first: Any, last: Any) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000


def stopwatch_of(device: torch.device) -> Stopwatch:
    """Return one that times what a device does, without waiting for it."""
    return _CudaStopwatch(device) if device.type == "cuda" else Stopwatch()


def finish(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeat(once: Callable[[], object]) -> Work:
    """Return the work of doing something so many times."""

    def work(steps: int) -> None:
        for _ in range(steps):
            once()

    return work


def in_turn(
    works: Mapping[str, Work],
    *,
    rounds: int,
    seconds: float,
    device: torch.device,
    on_round: Callable[[int, int], None] = lambda done, total: None,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Measure several works in rounds, in alternating order.

    A round of each work takes about `seconds`, but at least three steps; how many steps that is, is
    found out first, which also warms it up.

    Args:
        around: other instruments, for the time of one work in one round.

    Returns:
        By work, the seconds of a step in each round.
    """
    steps = {name: _steps_in(work, seconds, device, clock) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works) if number % 2 == 0 else list(works)[::-1]:
            with around(name):
                start = clock()
                works[name](steps[name])
                finish(device)
                times[name].append((clock() - start) / steps[name])
        on_round(number + 1, rounds)
    return times


def rates(seconds: list[float], images: float) -> Spread:
    """Return images/s of steps that take so many seconds for so many images."""
    return Spread.of([images / value for value in seconds])


def shares(whole: list[float], part: list[float]) -> Spread:
    """Return part / whole of values taken in pairs."""
    return Spread.of([b / a for a, b in zip(whole, part, strict=True)])


def _steps_in(work: Work, seconds: float, device: torch.device, clock: Callable[[], float]) -> int:
    work(1)  # compiles, autotunes, allocates
    finish(device)
    start = clock()
    work(2)
    finish(device)
    return max(3, round(seconds / max((clock() - start) / 2, 1e-6)))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
