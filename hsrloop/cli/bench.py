"""`hsrloop bench`: how fast this machine trains, and where the time goes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsrloop.cli.layers import Request, add_machine, check_asked, resolve_explicit
from hsrloop.cli.run import (
    check_file_place,
    check_outside,
    check_png,
    from_anywhere,
    places_of,
    prepare,
    write_json,
)
from hsrloop.cli.stop import Stop
from hsrloop.config import Resolved
from hsrloop.data.sets.manifest import read_manifest
from hsrloop.errors import ConfigError, OutputError
from hsrloop.events import Note

if TYPE_CHECKING:
    from hsrloop.bench.results import Row
    from hsrloop.report.console import ConsoleSink

TIERS = "tiers"
_SCENES = {"train": 128, "val": 32}  # of the set that is painted when none is given
_TIER_STEPS = 6
_LEFT_TO_TIERS = ("gpu_tier", "model", "batch", "imgsz")
_EPOCHS_AGAINST, _PAIRS_AGAINST = 5, 3
_EVEN = 1.25  # between columns, a bare step's highest speed over its lowest
_OTHERS_CORES = 0.5  # kept busy by others, from which on ratios tell of them (a guess)
_SECONDS = 2.0  # of each part of a round


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure and how thoroughly."""

    parts: Sequence[str] = ()
    against: bool = False
    rounds: int | None = None
    seconds: float | None = None
    profile: Path | None = None  # folder for a recording of a few steps

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: it does not.
        """
        if self.against and self.parts:
            raise ConfigError("--against measures whole trainings; name no part with it.")
        if self.against and self.seconds is not None:
            raise ConfigError(
                "--seconds is nothing to --against, which trains whole epochs. Use --rounds, "
                "--epochs or --imgsz to make it shorter."
            )
        if self.seconds is not None and not math.isfinite(self.seconds):
            raise ConfigError(f"--seconds is {self.seconds}; it must be a number up to 600.")
        if set(self.parts) == {TIERS} and (self.rounds, self.seconds) != (None, None):
            raise ConfigError(
                "--rounds and --seconds are nothing to tiers, which takes a few steps of each. "
                "Drop them, or name another part too."
            )
        if self.profile is not None and (self.against or set(self.parts) == {TIERS}):
            raise ConfigError(
                "--profile records steps of this machine's own settings. Name a part other than "
                "tiers, and leave --against out."
            )


def run_bench(
    request: Request, wanted: Wanted, *, json_file: Path | None, plot: Path | None
) -> int:
    """Measure, print a table, write JSON and a picture if asked; return the exit code.

    Raises:
        HsrloopError: anything the user can mend.
    """
    for file, option in ((json_file, "--json"), (plot, "--plot")):
        if file is not None:
            check_file_place(file, option)
    if plot is not None:
        check_png(plot, "--plot")
    if wanted.profile is not None:
        make_folder(wanted.profile, "--profile")
    asked = resolve_explicit(request)
    _check_apart(asked, json_file, plot)
    if TIERS in wanted.parts:
        _check_left_to_tiers(asked)
    check_asked(asked)
    prepare(asked.config.device)
    Stop("Stopped: nothing is written.").listen()
    resolved = from_anywhere(add_machine(request, asked))

    from hsrloop.bench.machine import OthersWork, describe_host
    from hsrloop.bench.picture import save_bars
    from hsrloop.bench.results import Report, tables
    from hsrloop.report.console import ConsoleSink, make_console

    console = make_console()
    sink, others = ConsoleSink(console), OthersWork()
    try:
        with data_set(resolved) as given:
            rows, settings = _measured(given, wanted, sink)
    finally:
        sink.close()
    for warning in (unevenness(rows), disturbance(others.cores(), wanted.against)):
        if warning is not None:
            sink.handle(Note(text=warning, level="warning"))
    report = Report(host=describe_host(), rows=rows, settings=settings)
    console.print(report.host, soft_wrap=True)
    if settings:
        console.print(report.said(), soft_wrap=True)
    console.print(tables(rows))
    outputs: list[tuple[Path | None, Callable[[Path], None]]] = [
        (json_file, partial(write_json, value=report.to_json())),
        (plot, partial(save_bars, report)),
    ]
    failed: list[OutputError] = []
    for file, write in outputs:
        if file is not None:
            try:
                write(file)
                console.print(f"Written: {file}", soft_wrap=True)
            except OutputError as error:  # the other is wanted all the more
                failed.append(error)
    if failed:
        raise failed[0]
    return 0


def unevenness(rows: Sequence[Row]) -> str | None:
    """Return a warning where the same bare step was not equally fast beside two things measured."""
    same = [row.bare_images_per_s for row in rows if row.name in ("step", "train")]
    speeds = [bare.median for bare in same if bare is not None]
    if not speeds or max(speeds) <= _EVEN * min(speeds):
        return None
    return (
        f"the same bare step made {min(speeds):.1f} and {max(speeds):.1f} images/s: the machine "
        "was busy with something else. Compare within a column, or measure again."
    )


def disturbance(cores: float, against: bool) -> str | None:
    """Return a warning where other programs kept so many cores busy meanwhile.

    Args:
        against: two trainers were compared.
    """
    if cores <= _OTHERS_CORES:
        return None
    effect = (
        "they take from the two sides unequally, so the ratios cannot be used"
        if against
        else "speeds are lower than this machine's, and shares of the bare step's are uncertain"
    )
    return (
        f"other programs kept {cores:.1f} cores busy meanwhile: {effect}. "
        "End them, and measure again."
    )


def _check_apart(asked: Resolved, json_file: Path | None, plot: Path | None) -> None:
    """Refuse outputs in each other's place or in that of what is read.

    Raises:
        OutputError: one would be lost.
        DatasetError: there is no such data set.
    """
    if json_file is not None and plot is not None and json_file.resolve() == plot.resolve():
        raise OutputError(f"--json and --plot are both {plot}. Name two files.")
    if asked.config.dataset is None:
        return
    manifest = read_manifest(asked.config.dataset, train_optional=True)
    for file, option in ((json_file, "--json"), (plot, "--plot")):
        if file is not None:
            check_outside(file, option, (manifest.yaml, *places_of(manifest)))


def _check_left_to_tiers(asked: Resolved) -> None:
    """Refuse settings that trying the tiers would ignore.

    Raises:
        ConfigError: a tier is named, or something that each tier decides.
    """
    values = {name: getattr(asked.config, name) for name in _LEFT_TO_TIERS}
    given = {k: v for k, v in values.items() if v is not None and asked.sources[k] != "default"}
    if given:
        said = " and ".join(f"{name} is {value}" for name, value in given.items())
        raise ConfigError(
            f"{said}, but bench tiers tries every tier with its own model, batch and imgsz. "
            f"Drop {' and '.join(given)}, or name other parts than tiers."
        )


def _measured(
    resolved: Resolved, wanted: Wanted, sink: ConsoleSink
) -> tuple[list[Row], dict[str, Any]]:
    from hsrloop.bench.against import against_ultralytics
    from hsrloop.bench.machine import load_average
    from hsrloop.bench.measures import MEASURES, Effort, measure
    from hsrloop.bench.tiers import measure_tiers
    from hsrloop.bench.workbench import at_hand
    from hsrloop.hardware.memory import usable_cores
    from hsrloop.hardware.probe import probe, torch_device

    if wanted.against:
        if resolved.sources["epochs"] == "default":
            resolved = with_settings(resolved, epochs=_EPOCHS_AGAINST)
        resolved = at_hand(resolved, sink.handle)
        config, info = resolved.config, probe(resolved.config.device)
        rows = against_ultralytics(
            resolved,
            pairs=wanted.rounds or _PAIRS_AGAINST,
            device=torch_device(info),
            emit=sink.handle,
        )
        given = {name: getattr(config, name) for name in ("imgsz", "batch", "epochs", "seed")}
        said = {"device": info.name, "model": Path(config.model).name, **given}
        return rows, {**said, "threads": f"{usable_cores()} each", "load": round(load_average(), 1)}
    parts = [part for part in wanted.parts or MEASURES if part != TIERS]
    rows, settings = [], dict[str, Any]()
    if parts:
        effort = Effort(wanted.rounds or 7, wanted.seconds or _SECONDS)
        rows, settings = measure(resolved, parts, effort, sink.handle, profile=wanted.profile)
    if TIERS in wanted.parts:
        rows += measure_tiers(resolved, steps=_TIER_STEPS, emit=sink.handle)
    return rows, settings


@contextlib.contextmanager
def data_set(resolved: Resolved) -> Iterator[Resolved]:
    """Yield the settings with a data set: the one given, or one painted for the time being."""
    if resolved.config.dataset is not None:
        yield resolved
        return
    from hsrloop.bench.scratch import scratch
    from hsrloop.cli.tabletop import write_data_set

    with scratch("bench") as folder:
        yaml = write_data_set(folder, **_SCENES, seed=0)
        yield with_settings(resolved, dataset=str(yaml))


def make_folder(folder: Path, option: str) -> None:
    """Make a folder to write to.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{option} {folder} cannot be made ({error.strerror}).") from None


def with_settings(resolved: Resolved, **changes: Any) -> Resolved:
    """Return the settings with some replaced, said to come from the benchmark."""
    sources = {**resolved.sources, **dict.fromkeys(changes, "benchmark")}
    return Resolved(resolved.config.replace(**changes), sources)
