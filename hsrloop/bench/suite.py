"""Everything that needs a GPU, in one visit of a few minutes: the most telling parts first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hsrloop.bench.against import against_ultralytics
from hsrloop.bench.cores import pinned
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
from hsrloop.bench.visit import Cell
from hsrloop.bench.workbench import Workbench, workbench
from hsrloop.config import Resolved
from hsrloop.errors import DependencyError
from hsrloop.events import Event
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.hardware.tiers import CPU, TIERS, tier_named
from hsrloop.records import Tier

Emit = Callable[[Event], None]
Measure = Callable[[Workbench, Effort], Row]
SCALES = ("n", "s", "m", "l", "x")
FEW_CORES = 2  # as a laptop that somebody lent may have
EXACT_STEPS = 4
TIGHT = replace(tier_named("medium"), name="too small a card", from_gib=2)  # must step down

# About how long parts take, in seconds: of l, x and compiled steps these are guesses, the others
# were measured on an H200.
SCALE_S = 18.0
COMPILED_S = 90.0
MOST_TIMES = 6.0  # what a pair is expected to take may one training last: a slow card is slower
AGAINST_S = {"n": 60.0, "s": 60.0, "m": 65.0, "l": 75.0, "x": 85.0}
TIER_S = {"low": 10.0, "medium": 10.0, "high": 12.0, "workstation": 15.0, "cpu": 15.0}


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
    effort=Effort(rounds=3, seconds=0.7),
    criterion_images=16,
    tiers=TIERS,
    tier_steps=5,  # with the warm-up an epoch of the largest batch: no validation in between
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


def cells_of(asked: Resolved, scope: Scope, emit: Emit) -> list[Cell]:
    """Return the parts in the order of what they tell.

    What answers each question for one model comes first and fits into one visit (tested); the same
    for the other models, and what only explains, come after.

    Args:
        asked: data set and device; the rest follows from `scope`.
    """
    parts = _Parts(_changed(asked, imgsz=scope.imgsz, batch=scope.batch), scope, emit)
    main = "m" if "m" in scope.scales else scope.scales[0]
    others = [scale for scale in scope.scales if scale != main]
    contests = [scale for scale in scope.scales if scale in ("n", "s", main)]
    return [
        parts.scale(main),
        parts.criterion(),
        *(parts.against(scale) for scale in contests),
        parts.recovery(main),
        *(parts.tier(tier) for tier in scope.tiers if tier is not CPU),
        parts.exactness(main),
        *(parts.scale(scale) for scale in others),
        *(parts.against(scale) for scale in scope.scales if scale not in contests),
        parts.step(main, "deterministic"),
        *(parts.step(scale, "without graphs") for scale in (main, *others)),
        parts.step(main, "compiled"),
        *(parts.train_on_all_cores(main, place) for place in ("GPU", "CPU")),
        *(parts.loader(main, place) for place in ("GPU", "CPU")),
        *(parts.step(scale, "bf16") for scale in scope.scales),
        *(parts.step(scale, "compiled") for scale in others),
        *(parts.tier(tier) for tier in scope.tiers if tier is CPU),
    ]


_STEPS: dict[str, dict[str, Any]] = {
    "without graphs": {"cuda_graphs": False},
    "bf16": {"amp_dtype": "bf16"},
    "compiled": {"compile": "on"},
    "deterministic": {"deterministic": True},
}
_RENDERERS = {"GPU": "auto", "CPU": "cpu"}  # settings of augment_device


@dataclass(frozen=True, slots=True)
class _Parts:
    """Makes cells."""

    base: Resolved
    scope: Scope
    emit: Emit

    def scale(self, scale: str) -> Cell:
        """Measure a model on few cores: a run's training, its step and its validation."""
        measures: dict[str, Measure] = {
            f"train, {scale}, fp16, rendered on the GPU": measure_training,
            f"step, {scale}, fp16": measure_step,
            f"validation, {scale}": measure_validation,
        }
        run = partial(_measured, measures, self._of(scale), self.scope.effort, self.emit)
        return Cell(f"{scale} on two CPU cores", SCALE_S, partial(_on_few_cores, run))

    def train_on_all_cores(self, scale: str, place: str) -> Cell:
        """Train as a run trains, images rendered on the "GPU" or the "CPU"."""
        settings = self._of(scale, augment_device=_RENDERERS[place])
        name = f"train, {scale}, fp16, rendered on the {place}, all CPU cores"
        return self._measured(name, measure_training, settings, 15)

    def step(self, scale: str, kind: str) -> Cell:
        """Take steps on images that are on the device already; kinds as in `_STEPS`."""
        name, settings = f"step, {scale}, {kind}", self._of(scale, **_STEPS[kind])
        cell = self._measured(name, measure_step, settings, 12)
        if kind == "compiled":
            return replace(cell, seconds=COMPILED_S, needs_gpu=True)
        return replace(cell, needs_gpu=kind in ("bf16", "without graphs"))

    def loader(self, scale: str, place: str) -> Cell:
        """Make training batches alone, rendered on the "GPU" or the "CPU"."""
        settings = self._of(scale, augment_device=_RENDERERS[place])
        return self._measured(f"loader, rendered on the {place}", measure_loader, settings, 10)

    def criterion(self) -> Cell:
        """Measure ours and Ultralytics' criterion on the same logits."""
        device = torch.device(torch_device(probe(self.base.config.device)))
        return Cell("criterion", 10, partial(_criterion, device, self.scope))

    def against(self, scale: str) -> Cell:
        """Train side by side with Ultralytics."""
        name = f"against Ultralytics, {scale}"
        limit_s = MOST_TIMES * AGAINST_S[scale]
        run = partial(_against, name, self._of(scale), self.scope, self.emit, limit_s)
        return Cell(name, AGAINST_S[scale], run)

    def recovery(self, scale: str) -> Cell:
        """Run out of memory for real."""
        run = partial(_tier, "recovery", TIGHT, self._of(scale), self.scope, self.emit)
        return Cell("recovery", 25, run, needs_gpu=True)

    def tier(self, tier: Tier) -> Cell:
        """Train a tier's defaults in its card's memory."""
        name = f"tier {tier.name}"
        run = partial(_tier, name, tier, self.base, self.scope, self.emit)
        return Cell(name, TIER_S[tier.name], run)

    def exactness(self, scale: str) -> Cell:
        """Train twice and compare."""
        name = "exactness under --deterministic"
        return Cell(name, 12, partial(_exactness, name, self._of(scale), self.emit))

    def _of(self, scale: str, **changes: Any) -> Resolved:
        return _changed(self.base, model=f"yolov8{scale}.yaml", **changes)

    def _measured(self, name: str, measure: Measure, settings: Resolved, seconds: float) -> Cell:
        run = partial(_measured, {name: measure}, settings, self.scope.effort, self.emit)
        return Cell(name, seconds, run)


def _on_few_cores(run: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    with pinned(FEW_CORES) as cores:
        on = f"{cores} CPU core{'s' if cores > 1 else ''}"
        for row in run():
            yield replace(row, note="; ".join(filter(None, (on, row.note))))


def _measured(
    measures: Mapping[str, Measure], settings: Resolved, effort: Effort, emit: Emit
) -> Iterator[Row]:
    """Yield a row for each measure, under its name.

    Nothing is rehearsed: time is short, and what does not fit has a row that says so.
    """
    with workbench(_changed(settings, rehearsal="never"), emit) as bench:
        for name, measure in measures.items():
            yield replace(measure(bench, effort), name=name)


def _criterion(device: torch.device, scope: Scope) -> list[Row]:
    return measure_criterion(
        device,
        rounds=scope.effort.rounds,
        seconds=scope.effort.seconds,
        images=scope.criterion_images,
        imgsz=scope.imgsz,
    )


def _exactness(name: str, settings: Resolved, emit: Emit) -> Iterator[Row]:
    """Train the same few steps twice with deterministic kernels and compare every weight."""
    exact = _changed(settings, deterministic=True, rehearsal="never")
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
    yield Row(name=name, note=f"{moved}: {'equal bit for bit' if equal else 'NOT equal'}")


def _tier(name: str, tier: Tier, settings: Resolved, scope: Scope, emit: Emit) -> Iterator[Row]:
    """Train a tier's defaults, with real failures where they do not fit."""
    for row in measure_tiers(
        settings, steps=scope.tier_steps, emit=emit, tiers=[tier], changes=scope.tier_changes
    ):
        yield replace(row, name=name)


def _against(name: str, settings: Resolved, scope: Scope, emit: Emit, limit_s: float) -> list[Row]:
    """Train one short pair, each in so many seconds at most.

    Raises:
        DependencyError: Ultralytics is not installed.
        RuntimeError: a training failed.
    """
    if not scope.epochs:
        return [Row(name=name, note="skipped: takes minutes")]
    if importlib.util.find_spec("ultralytics") is None:
        raise DependencyError("ultralytics is not installed")
    short = _changed(settings, epochs=scope.epochs)
    device = torch_device(probe(settings.config.device))
    try:
        rows = against_ultralytics(
            short, pairs=1, device=device, emit=emit, judged=False, limit_s=limit_s
        )
    except DependencyError as error:  # here: a process that broke off, with its last words
        raise RuntimeError(str(error).strip().splitlines()[-1]) from error
    return [replace(row, name=f"{name}: {row.name}") for row in rows]


def _changed(asked: Resolved, **changes: Any) -> Resolved:
    sources = {**asked.sources, **dict.fromkeys(changes, "suite")}
    return Resolved(asked.config.replace(**changes), sources)
