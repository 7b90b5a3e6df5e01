"""`hsrloop bench`: how fast this machine trains, and where the time goes."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hsrloop.cli.layers import Request, add_machine, resolve_explicit
from hsrloop.cli.run import check_file_place, from_anywhere, prepare
from hsrloop.config import Resolved

_SCENES = {"train": 128, "val": 32}  # of the set that is painted when none is given


def run_bench(
    request: Request,
    parts: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    json_file: Path | None,
    plot: Path | None,
) -> int:
    """Measure, print a table, write JSON and a picture if asked; return the exit code.

    Raises:
        HsrloopError: anything the user can mend.
    """
    for file, option in ((json_file, "--json"), (plot, "--plot")):
        if file is not None:
            check_file_place(file, option)
    asked = resolve_explicit(request)
    prepare()
    resolved = from_anywhere(add_machine(request, asked))

    from hsrloop.bench.machine import describe_host
    from hsrloop.bench.measures import MEASURES, Effort, measure
    from hsrloop.bench.picture import save_bars
    from hsrloop.bench.results import Report, table
    from hsrloop.report.console import ConsoleSink, make_console

    console = make_console()
    sink = ConsoleSink(console)
    try:
        with data_set(resolved) as given:
            rows, settings = measure(
                given, tuple(parts) or tuple(MEASURES), Effort(rounds, seconds), sink.handle
            )
    finally:
        sink.close()
    report = Report(host=describe_host(), rows=rows, settings=settings)
    console.print(report.host, soft_wrap=True)
    console.print(", ".join(f"{key} {value}" for key, value in settings.items()), soft_wrap=True)
    console.print(table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        console.print(f"Written: {json_file}", soft_wrap=True)
    if plot is not None:
        save_bars(report, plot)
        console.print(f"Written: {plot}", soft_wrap=True)
    return 0


@contextlib.contextmanager
def data_set(resolved: Resolved) -> Iterator[Resolved]:
    """Yield the settings with a data set: the one given, or one painted for the time being."""
    if resolved.config.dataset is not None:
        yield resolved
        return
    from hsrloop.cli.tabletop import write_data_set

    with tempfile.TemporaryDirectory(prefix="hsrloop-bench-") as folder:
        yaml = write_data_set(Path(folder), **_SCENES, seed=0)
        yield with_settings(resolved, dataset=str(yaml))


def with_settings(resolved: Resolved, **changes: Any) -> Resolved:
    """Return the settings with some replaced, said to come from the benchmark."""
    sources = {**resolved.sources, **dict.fromkeys(changes, "benchmark")}
    return Resolved(resolved.config.replace(**changes), sources)
