"""Does every tier's default fit its card? A short real run for each, on this machine.

On a large card the smaller tiers are emulated: the allocator may take no more than the smallest
card of the tier has. What recovery makes of settings that do not fit is part of the answer. What
fits such a card is remembered apart from what fits the user's, and no longer than it is emulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hsrloop.bench.meters import (
    PowerReading,
    Stopwatch,
    nvml_reader,
    power,
    stopwatch_of,
)
from hsrloop.bench.results import Row, Spread
from hsrloop.bench.scratch import scratch
from hsrloop.bench.workbench import at_hand
from hsrloop.config import Resolved
from hsrloop.errors import ConfigError, HsrloopError
from hsrloop.events import Climbed, EpochDone, Event, Progress, Recovered
from hsrloop.hardware.memory import GIB, capped, release_gpu_memory
from hsrloop.hardware.peak import peak_bytes, reset_peak
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.hardware.threads import threads_at_start
from hsrloop.hardware.tiers import CPU, TIERS, nominal_gib, settings_of
from hsrloop.records import DeviceInfo, Tier
from hsrloop.train.fits import FILE
from hsrloop.train.run import train

SMALLEST_LOW_GIB = 4.0  # of the cards that train at all (a guess)
WARM = 3  # steps before the clock starts
DECIDED = ("model", "batch", "imgsz")  # by the tier


def card_gib(tier: Tier) -> float:
    """Return the memory of the smallest card of a tier, GiB."""
    return tier.from_gib or SMALLEST_LOW_GIB


def why_not(tier: Tier, info: DeviceInfo) -> str:
    """Return why a tier cannot be tried on this machine; empty when it can."""
    if tier is CPU:
        return ""
    if info.kind == "cpu":
        return "skipped: no GPU"
    has = nominal_gib(info.total_bytes)
    wanted = card_gib(tier)
    return f"skipped: it takes {wanted:g} GiB, the card has {has}" if has < wanted else ""


class StepWatch:
    """Listens to a run and ends it after enough steps on the settings it came to.

    A step is timed from the end of the one before in its epoch, on the device itself; validation
    and saving are left out. Where an epoch is a single step, saving and its start are not.

    Args:
        steps: to be timed, after `WARM` others.
        reading: on while steps are timed.
        stopwatch: replaced in tests.
    """

    def __init__(
        self,
        steps: int,
        *,
        reading: PowerReading | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.changes: list[str] = []
        self._steps, self._stopwatch = steps, stopwatch or Stopwatch()
        self._reading = reading or PowerReading()
        self._warm = self._in_epoch = 0
        self._timed: list[tuple[Any, Any]] = []
        self._before: Any = None  # the moment that the next step is timed from
        self._validating = False

    def handle(self, event: Event) -> None:
        """Start over when settings change; know validation from training."""
        if isinstance(event, Recovered | Climbed):
            self.changes.append(event.change)
            self._start_over()
        elif isinstance(event, Progress) and event.task == "validating":
            self._validating = True
            self._reading.pause()
        elif isinstance(event, EpochDone):
            self._validating = False
            self._before = self._stopwatch.stamp() if self._in_epoch == 1 else None
            self._in_epoch = 0

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def __call__(self) -> bool:
        """Count a step; return whether the run shall end. Also asked while validating."""
        if self._validating:
            return False
        now = self._stopwatch.stamp()
        if self._warm < WARM:
            self._warm += 1
        elif self._before is not None:
            self._timed.append((self._before, now))
        self._before = now
        self._in_epoch += 1
        if self._warm == WARM:
            self._reading.resume()
        return len(self._timed) == self._steps

    @property
    def step_s(self) -> float:
        """Seconds of a step; 0 when the run ended before."""
        if len(self._timed) < self._steps:
            return 0.0
        return sum(self._stopwatch.seconds(*pair) for pair in self._timed) / self._steps

    def _start_over(self) -> None:
        self._warm = self._in_epoch = 0
        self._timed.clear()
        self._before, self._validating = None, False
        self._reading.pause()


def measure_tiers(
    resolved: Resolved,
    *,
    steps: int,
    emit: Callable[[Event], None],
    tiers: Sequence[Tier] = TIERS,
    changes: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """Yield a row for each tier; one that fails says how, and the others go on.

    Args:
        resolved: data set, device and whatever a tier does not decide.
        changes: laid over each tier's settings, to try this code out in little time.
    """
    info = probe(resolved.config.device)
    for done, tier in enumerate(tiers):
        emit(Progress(task="trying the tiers", done=done, total=len(tiers)))
        reason = why_not(tier, info)
        values = {**settings_of(tier), **(changes or {})}
        if reason:
            yield Row(name=tier.name, note=reason, settings={k: values[k] for k in DECIDED})
            continue
        device = "cpu" if tier is CPU else torch_device(info)
        sources = {**resolved.sources, **dict.fromkeys(values, f"tier {tier.name}")}
        try:
            asked = Resolved(resolved.config.replace(**values, device=device), sources)
        except ConfigError as error:  # a micro-batch larger than the tier's batch
            yield Row(name=tier.name, note=str(error), settings={k: values[k] for k in DECIDED})
            continue
        yield _measured(tier, at_hand(asked, emit), info, steps)
    emit(Progress(task="trying the tiers", done=len(tiers), total=len(tiers)))


@contextmanager
def memory_of(tier: Tier, device: torch.device, total_bytes: int) -> Iterator[None]:
    """Let the allocator take no more than the tier's smallest card has."""
    if device.type != "cuda":
        yield
        return
    release_gpu_memory()
    try:
        with capped(device, card_gib(tier) * GIB / total_bytes):
            yield
    finally:
        release_gpu_memory()


@contextmanager
def threads_of(device: torch.device) -> Iterator[None]:
    """Let the CPU have threads as in a process of its own: one that used a GPU has a single one."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads_at_start())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(tier: Tier, asked: Resolved, info: DeviceInfo, steps: int) -> Row:
    config = asked.config
    device = torch.device(config.device)
    reader = nvml_reader(info.uuid) if device.type == "cuda" else None
    reset_peak(device)
    failure, ended, peak = "", {}, 0
    with (
        scratch("tier") as output,
        memory_of(tier, device, info.total_bytes),
        threads_of(device),
        power(reader) as reading,
    ):
        watch = StepWatch(steps, reading=reading, stopwatch=stopwatch_of(device))
        endless = config.replace(output=str(output), epochs=10_000, patience=0, tensorboard=False)
        try:
            outcome = train(
                Resolved(endless, asked.sources),
                sinks=[watch],
                stop=watch,
                fits=output / FILE,
            )
            ended, peak = {"micro_batch": outcome.rung.micro_batch}, outcome.peak_memory_bytes
        except HsrloopError as error:
            failure = str(error)
    speed = Spread.of([config.batch / watch.step_s]) if watch.step_s else None
    watts, busy = reading.means()
    return Row(
        name=tier.name,
        images_per_s=speed,
        peak_memory_bytes=peak or peak_bytes(device),
        watts=watts,
        utilisation=busy,
        note=failure or "; ".join(watch.changes) or "fits",
        settings={**{name: getattr(config, name) for name in DECIDED}, **ended},
    )
