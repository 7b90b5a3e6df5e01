"""Everything that needs a GPU, in one visit of a few minutes: the most telling parts first.

Rows are handed over as they come, so a visit that ends early leaves what it found. A part that
fails or finds no time becomes a row that says so, and the next one goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hsrloop.bench.against import against_ultralytics
from hsrloop.bench.criterion import measure_criterion
from hsrloop.bench.measures import (
    Effort,
    endless,
    measure_loader,
    measure_step,
    measure_training,
    measure_validation,
)
from hsrloop.bench.results import Row
from hsrloop.bench.tiers import measure_tiers
from hsrloop.bench.workbench import workbench
from hsrloop.config import Resolved
from hsrloop.events import Event
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.hardware.tiers import TIERS, tier_named
from hsrloop.records import Tier

Emit = Callable[[Event], None]
SCALES = ("n", "s", "m", "l", "x")
EXACT_STEPS = 4
TIGHT = replace(tier_named("medium"), name="too small a card", from_gib=2)  # must step down


@dataclass(frozen=True, slots=True)
class Cell:
    """One part of the suite."""

    name: str
    seconds: float  # it takes about (guesses)
    run: Callable[[], Iterable[Row]]
    needs_gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How much is measured: a visit to a GPU, or a look at whether the suite works."""

    scales: Sequence[str]
    imgsz: int
    batch: int
    effort: Effort
    criterion_images: int
    tiers: Sequence[Tier]
    tier_steps: int
    tier_changes: dict[str, Any]
    epochs: int  # against Ultralytics; 0: not at all


FULL = Scope(
    scales=SCALES,
    imgsz=640,
    batch=16,
    effort=Effort(rounds=3, seconds=1.0),
    criterion_images=16,
    tiers=TIERS,
    tier_steps=6,
    tier_changes={},
    epochs=3,
)
SMOKE = Scope(
    scales=("n",),
    imgsz=64,
    batch=2,
    effort=Effort(rounds=1, seconds=0.001),
    criterion_images=1,
    tiers=TIERS,
    tier_steps=1,
    tier_changes={"model": "yolov8n.yaml", "imgsz": 64, "batch": 2},
    epochs=0,
)


def run_suite(
    cells: Sequence[Cell],
    *,
    minutes: float,
    has_gpu: bool,
    on_row: Callable[[Row], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the cells in order for as long as there is time; each row goes to `on_row` at once."""
    end = clock() + 60 * minutes
    for cell in cells:
        if cell.needs_gpu and not has_gpu:
            on_row(Row(name=cell.name, note="skipped: no GPU"))
        elif clock() + cell.seconds > end:
            on_row(Row(name=cell.name, note="skipped: no time left"))
        else:
            _run_cell(cell, on_row)


def _run_cell(cell: Cell, on_row: Callable[[Row], None]) -> None:
    try:
        for row in cell.run():
            on_row(row)
    except Exception as error:  # whatever it is, the other cells are worth having
        first = (str(error).splitlines() or [""])[0]
        on_row(Row(name=cell.name, note=f"failed: {type(error).__name__}: {first}"))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cells_of(asked: Resolved, scope: Scope, emit: Emit) -> list[Cell]:
    """Return the parts in the order of what they tell.

    Args:
        asked: data set and device; the rest follows from `scope`.
    """
    main = "m" if "m" in scope.scales else scope.scales[0]
    base = _changed(asked, imgsz=scope.imgsz, batch=scope.batch)

    def of(scale: str, **changes: Any) -> Resolved:
        return _changed(base, model=f"yolov8{scale}.yaml", **changes)

    def part(name: str, measure: Any, settings: Resolved, seconds: float, **more: Any) -> Cell:
        run = partial(_measured, name, measure, settings, scope.effort, emit)
        return Cell(name, seconds, run, **more)

    device = torch.device(torch_device(probe(asked.config.device)))
    cells = [
        part(f"train, {main}, fp16, rendered on the GPU", measure_training, of(main), 25),
        part(f"step, {main}, fp16", measure_step, of(main), 20),
        Cell("criterion", 20, partial(_criterion, device, scope)),
        part(f"validation, {main}", measure_validation, of(main), 20),
        part(
            f"train, {main}, fp16, rendered on the CPU",
            measure_training,
            of(main, augment_device="cpu"),
            25,
        ),
    ]
    cells += [
        part(f"step, {scale}, fp16", measure_step, of(scale), 20)
        for scale in scope.scales
        if scale != main
    ]
    cells += [
        Cell("exactness", 30, partial(_exactness, of(main), scope, emit)),
        part(f"step, {main}, deterministic", measure_step, of(main, deterministic=True), 20),
        Cell("recovery", 40, partial(_recovery, of(main), scope, emit), needs_gpu=True),
        Cell("tiers", 100, partial(_tiers, base, scope, emit)),
    ]
    cells += [
        part(f"step, {scale}, bf16", measure_step, of(scale, amp_dtype="bf16"), 15, needs_gpu=True)
        for scale in scope.scales
    ]
    cells += [
        part(f"loader, rendered on the {place}", measure_loader, of(main, augment_device=given), 10)
        for place, given in (("GPU", "auto"), ("CPU", "cpu"))
    ]
    cells += [
        part(f"step, {scale}, compiled", measure_step, of(scale, compile="on"), 90, needs_gpu=True)
        for scale in (main, *(scale for scale in scope.scales if scale != main))
    ]
    cells.append(Cell("against Ultralytics", 120, partial(_against, of("n"), scope, emit)))
    return cells


def _measured(
    name: str, measure: Any, settings: Resolved, effort: Effort, emit: Emit
) -> Iterator[Row]:
    with workbench(settings, emit) as bench:
        started = time.monotonic()
        row = measure(bench, effort)
        took = f"{time.monotonic() - started:.0f} s"
        yield replace(row, name=name, note="; ".join(filter(None, (row.note, took))))


def _criterion(device: torch.device, scope: Scope) -> list[Row]:
    return measure_criterion(
        device,
        rounds=scope.effort.rounds,
        seconds=scope.effort.seconds,
        images=scope.criterion_images,
        imgsz=scope.imgsz,
    )


def _exactness(settings: Resolved, scope: Scope, emit: Emit) -> Iterator[Row]:
    """Train the same few steps twice with deterministic kernels and compare every weight."""
    exact = _changed(settings, deterministic=True)
    ends = []
    for _ in range(2):
        with workbench(exact, emit) as bench:
            stream = endless(bench)
            for _ in range(EXACT_STEPS):
                bench.step(next(stream), lr=1e-3)
            stream.close()
            ends.append([p.detach().clone() for p in bench.state.model.parameters()])
    equal = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    moved = f"{EXACT_STEPS} steps twice"
    yield Row(
        name="exactness under --deterministic",
        note=f"{moved}: {'equal bit for bit' if equal else 'NOT equal'}",
    )


def _recovery(settings: Resolved, scope: Scope, emit: Emit) -> Iterator[Row]:
    """Train a tier's defaults on a card that is too small for them, with real failures."""
    yield from measure_tiers(
        settings,
        steps=scope.tier_steps,
        emit=emit,
        tiers=[TIGHT],
        changes=scope.tier_changes,
    )


def _tiers(settings: Resolved, scope: Scope, emit: Emit) -> Iterator[Row]:
    for row in measure_tiers(
        settings,
        steps=scope.tier_steps,
        emit=emit,
        tiers=scope.tiers,
        changes=scope.tier_changes,
    ):
        yield replace(row, name=f"tier {row.name}")


def _against(settings: Resolved, scope: Scope, emit: Emit) -> list[Row]:
    if not scope.epochs:
        return [Row(name="against Ultralytics", note="skipped: takes minutes")]
    short = _changed(settings, epochs=scope.epochs, imgsz=320)
    device = torch_device(probe(settings.config.device))
    return against_ultralytics(short, pairs=1, device=device, emit=emit)


def _changed(asked: Resolved, **changes: Any) -> Resolved:
    sources = {**asked.sources, **dict.fromkeys(changes, "suite")}
    return Resolved(asked.config.replace(**changes), sources)
