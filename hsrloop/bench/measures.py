"""What is measured: the step, the loader, validation, and training as a whole.

The yardstick is the bare step: forward, criterion, backward and optimizer on a batch that lies on
the device as the network wants it. Nothing can train faster with this network; `efficiency` says
how near a run comes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hsrloop.bench.bare import bare_forward, bare_step
from hsrloop.bench.counting import DeviceWatch, synchronisations
from hsrloop.bench.machine import load_average
from hsrloop.bench.meters import (
    PowerReading,
    Work,
    finish,
    in_turn,
    nvml_reader,
    power,
    rates,
    repeat,
    shares,
)
from hsrloop.bench.results import Row, Spread
from hsrloop.bench.workbench import Emit, Workbench, workbench
from hsrloop.config import Resolved
from hsrloop.data.val_loader import ValLoader
from hsrloop.events import Note, Progress
from hsrloop.hardware.peak import peak_bytes, reset_peak
from hsrloop.records import Batch, Position
from hsrloop.train.detector import KeptDetector
from hsrloop.train.evaluate import evaluate
from hsrloop.train.loop import by_step
from hsrloop.train.meter import REPORT_EVERY_S
from hsrloop.train.profile import RECORDED, SKIPPED, WARM, StepProfiler
from hsrloop.train.step import to_input


@dataclass(frozen=True, slots=True)
class Effort:
    """How thoroughly to measure."""

    rounds: int = 7
    seconds: float = 2.0  # of each part of a round


def measure_step(bench: Workbench, effort: Effort) -> Row:
    """Measure the step as the loop takes it, its images on the device, beside the bare one."""
    batches = bench.first_step()
    works = {"bare": bare_step(bench, batches), "step": repeat(lambda: bench.step(batches))}
    timed = _timed(bench, effort, works, of="step", task="measuring the step")
    times = timed.seconds
    images = sum(len(batch.images) for batch in batches)
    return Row(
        name="step",
        images_per_s=rates(times["step"], images),
        bare_images_per_s=rates(times["bare"], images),
        efficiency=shares(times["step"], times["bare"]),
        host_waits=waits_of_a_step(bench, batches),
        **timed.instruments(),
    )


def measure_loader(bench: Workbench, effort: Effort) -> Row:
    """Measure the stream of training batches alone, up to the device."""
    stream = endless(bench)
    images = sum(len(batch.images) for batch in next(stream))

    def work(steps: int) -> None:
        for batches in itertools.islice(stream, steps):
            for batch in batches:
                to_input(batch.images, bench.device)

    timed = _timed(bench, effort, {"loader": work}, of="loader", task="measuring the loader")
    stream.close()
    return Row(
        name="loader",
        images_per_s=rates(timed.seconds["loader"], images),
        **timed.instruments(),
        note=f"{bench.loaders.bank}, {bench.loaders.train.workers} workers",
    )


def measure_validation(bench: Workbench, effort: Effort) -> Row:
    """Measure validation of the whole split, beside the network's forward passes alone."""
    loader = bench.loaders.val
    half = bench.settings.amp
    module = bench.state.ema.module
    kept = KeptDetector()
    detector = kept.of(module, bench.device, half=half)
    batch = next(iter(loader))
    forward = bare_forward(bench, detector.module, detector.inputs(batch.images))

    def bare(steps: int) -> None:
        for _ in range(steps * len(loader)):
            forward()

    def whole(steps: int) -> None:
        for _ in range(steps):
            validated(bench, loader, kept)

    works = {"bare": bare, "validation": whole}
    timed = _timed(bench, effort, works, of="validation", task="measuring validation")
    times = timed.seconds
    # A bare step repeats the first batch, which is as large as any.
    bare_images = len(loader) * len(batch.images)
    bare_s = [seconds * loader.n_samples / bare_images for seconds in times["bare"]]
    return Row(
        name="validation",
        images_per_s=rates(times["validation"], loader.n_samples),
        bare_images_per_s=rates(bare_s, loader.n_samples),
        efficiency=shares(times["validation"], bare_s),
        host_waits=waits_of_a_validation(bench, kept if bench.graphs.gradients else None),
        **timed.instruments(),
    )


def measure_training(bench: Workbench, effort: Effort) -> Row:
    """Measure training as a run trains, beside the bare step: loader, steps, reading of losses."""
    first = bench.first_step()
    stream = endless(bench)
    waited: list[float] = []
    images = sum(len(batch.images) for batch in first)

    def train(steps: int) -> None:
        begun = reported = time.perf_counter()
        wait = 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            if asked - reported >= REPORT_EVERY_S:
                bench.guard.losses(bench.state)
                reported = asked = time.perf_counter()
            batches = next(stream)
            wait += time.perf_counter() - asked
            bench.step(batches)
        finish(bench.device)
        waited.append(wait / (time.perf_counter() - begun))

    works = {"bare": bare_step(bench, first), "train": train}
    timed = _timed(bench, effort, works, of="train", task="measuring training")
    times = timed.seconds
    stream.close()
    return Row(
        name="train",
        images_per_s=rates(times["train"], images),
        bare_images_per_s=rates(times["bare"], images),
        efficiency=shares(times["train"], times["bare"]),
        host_waits=waits_of_a_step(bench, first),
        data_wait=Spread.of(waited[-effort.rounds :]),
        **timed.instruments(),
    )


MEASURES: dict[str, Callable[[Workbench, Effort], Row]] = {
    "step": measure_step,
    "loader": measure_loader,
    "validate": measure_validation,
    "train": measure_training,
}


def measure(
    resolved: Resolved,
    parts: Sequence[str],
    effort: Effort,
    emit: Emit,
    *,
    profile: Path | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Measure the named parts of one run, in that order.

    Args:
        profile: folder for a recording of a few steps; None: nothing is recorded.

    Returns:
        A row a part, and the settings that the figures depend on.

    Raises:
        HsrloopError: as a run would raise.
    """
    with workbench(resolved, emit) as bench:
        batch, images = bench.config.batch, bench.loaders.train.n_samples
        if images < batch:
            text = f"batch is {batch}, but a step has {images}: the data set has no more images"
            emit(Note(text=text, level="warning"))
        rows = [MEASURES[part](bench, effort) for part in parts]
        if profile is not None:
            record_steps(bench, profile)
        return rows, said_of(bench)


def record_steps(bench: Workbench, folder: Path) -> None:
    """Record a few steps of training, their data included; see `StepProfiler`."""
    profiler = StepProfiler(folder, bench.device, bench.emit)
    stream = endless(bench)
    for _ in range(SKIPPED + WARM + RECORDED):
        bench.step(next(stream))
        profiler.step()
    profiler.close()
    stream.close()
    if profiler.written:
        bench.emit(Note(text=f"Written: {folder}/profile.txt, tensorboard/"))


def said_of(bench: Workbench) -> dict[str, Any]:
    """Return what figures depend on beside the machine."""
    config = bench.config
    precision = str(bench.settings.amp_dtype if bench.settings.amp else torch.float32)
    return {
        "device": bench.info.name,
        "model": Path(config.model).name,
        "imgsz": bench.state.rung.imgsz,
        "batch": min(config.batch, bench.loaders.train.n_samples),
        "micro_batch": bench.state.rung.micro_batch,
        "precision": precision.removeprefix("torch."),
        "compile": config.compile,
        "deterministic": config.deterministic,
        "cuda_graphs": bool(bench.graphs.gradients),
        "threads": torch.get_num_threads(),
        "load": round(load_average(), 1),
    }


def validated(bench: Workbench, loader: ValLoader, kept: KeptDetector | None) -> None:
    """Validate as a run does."""
    evaluate(
        bench.state.ema.module,
        loader,
        names=bench.spec.names,
        device=bench.device,
        half=bench.settings.amp,
        kept=kept,
        recorded=bench.graphs.detections,
    )
    bench.graphs.count(bench.state)


def waits_of_a_validation(bench: Workbench, kept: KeptDetector | None = None) -> int:
    """Count how often the host waits in a validation of two batches; see `waits_of_a_step`."""
    few = bench.loaders.val.head(2 * bench.loaders.val.batch)
    with DeviceWatch(bench.device) as watch, synchronisations(bench.device) as told:
        validated(bench, few, kept)
    return max(sum(watch.waits.values()), len(told))


def waits_of_a_step(bench: Workbench, batches: list[Batch]) -> int | None:
    """Count how often the host waits in one steady step; on the CPU, how often it would.

    On a GPU it is counted twice, by operator and by CUDA's own debug mode; the larger is returned.
    Compiled code is not watched by operator: it would be left for the plain one, in torch 2.11 for
    the rest of the process. None: it cannot be counted.
    """
    bench.step(batches)
    compiled = bench.settings.compiled
    if compiled is not None and compiled.started:
        with synchronisations(bench.device) as told:
            bench.step(batches)
        return len(told) if bench.device.type == "cuda" else None
    watch = DeviceWatch(bench.device, bench.resident())
    with watch, synchronisations(bench.device) as told:
        bench.step(batches)
    return max(sum(watch.waits.values()), len(told))


def endless(bench: Workbench) -> Generator[list[Batch], None, None]:
    """Yield the full steps of the stream, epoch after epoch."""
    loader = bench.loaders.train
    for epoch in itertools.count():
        for batches in by_step(loader.batches(Position(epoch, 0))):
            full = sum(len(batch.images) for batch in batches) == min(
                loader.batch, loader.n_samples
            )
            if full:
                yield batches


@dataclass(slots=True)
class _Timed:
    """Seconds of works taken in turn, and what else was read while one of them ran."""

    seconds: dict[str, list[float]]
    reading: PowerReading
    peak_bytes: int

    def instruments(self) -> dict[str, Any]:
        """Return fields of a row."""
        watts, busy = self.reading.means()
        return {"peak_memory_bytes": self.peak_bytes, "watts": watts, "utilisation": busy}


def _timed(
    bench: Workbench, effort: Effort, works: Mapping[str, Work], *, of: str, task: str
) -> _Timed:
    """Time works in turn.

    Args:
        of: the work whose memory, watts and utilisation are read; warm by then, so that what
            autotuning and compiling took is not among it.
    """
    peak = 0

    @contextmanager
    def around(name: str) -> Iterator[None]:
        nonlocal peak
        if name != of:
            yield
            return
        reset_peak(bench.device)
        reading.resume()
        yield
        reading.pause()
        peak = max(peak, peak_bytes(bench.device) + bench.state.recorded_bytes)

    def observed(work: Work) -> Work:
        def run(steps: int) -> None:
            work(steps)
            bench.observe()

        return run

    with power(nvml_reader(bench.info.uuid)) as reading:
        seconds = in_turn(
            {name: observed(work) for name, work in works.items()},
            rounds=effort.rounds,
            seconds=effort.seconds,
            device=bench.device,
            on_round=lambda done, total: bench.emit(Progress(task=task, done=done, total=total)),
            around=around,
        )
    return _Timed(seconds, reading, peak)
