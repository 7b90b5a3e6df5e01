"""Fill the table of GPU figures in one short visit: at most 8 minutes, no network, no data set.

    python benchmarks/gpu_suite.py              # on a machine with an NVIDIA GPU
    python benchmarks/gpu_suite.py --only tier  # the parts whose names match, into a file beside
    python benchmarks/gpu_suite.py --smoke      # on any machine: does it work at all?

The most telling parts come first, and what was found is written after every part, as
benchmarks/results/gpu_suite_CARD.json and .md; a second visit's files get a number. What is missing
says why. Minutes count from the start of this process, and nothing is begun that is not expected to
end in time, by a guess that is raised when earlier parts took longer than theirs. Networks are
untrained and images painted: both cost what trained networks and photographs cost. Afterwards
`python benchmarks/readme.py` puts the figures into the README.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

STARTED = time.monotonic()  # what is loaded and painted below is part of the visit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hsrloop.cli.run import prepare  # noqa: E402

prepare()  # before torch is loaded

from reporting import results_folder, unused  # noqa: E402

from hsrloop.bench.machine import describe_host, load_average  # noqa: E402
from hsrloop.bench.results import Report, Row, markdown, table  # noqa: E402
from hsrloop.bench.suite import FULL, SMOKE, cells_of  # noqa: E402
from hsrloop.bench.visit import run_suite  # noqa: E402
from hsrloop.cli.tabletop import write_data_set  # noqa: E402
from hsrloop.config import resolve  # noqa: E402
from hsrloop.errors import HsrloopError  # noqa: E402
from hsrloop.hardware.probe import probe  # noqa: E402
from hsrloop.report.console import ConsoleSink, make_console  # noqa: E402

SCENES = {"train": 384, "val": 256}  # fewer would show what a validation costs once
SMOKE_SCENES = {"train": 8, "val": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="of the whole visit")
    parser.add_argument(
        "--only", type=_pattern, help="a regular expression: parts whose names it is found in"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    scope = SMOKE if options.smoke else FULL
    device = "cpu" if options.smoke else "auto"
    try:
        info = probe(device)
    except HsrloopError as error:
        parser.error(str(error))
    if info.kind == "cpu" and not options.smoke:
        parser.error("there is no GPU here; --smoke tries the suite on the CPU")
    card = _words(info.name)
    scope_name = "smoke" if options.smoke else card
    part = _words(options.only.pattern) if options.only else ""
    name = "_".join(filter(None, ("gpu_suite", scope_name, part)))
    try:
        folder = results_folder(options.output)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    stem = folder / name if options.smoke else unused(folder / name)
    console = make_console()
    sink = ConsoleSink(console)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        report = Report(
            host=describe_host(),
            rows=rows,
            settings={
                "time": datetime.now().isoformat(timespec="minutes"),
                "device": info.name,
                **({"driver": info.driver} if info.driver else {}),
                "load": round(load_average(), 1),
            },
        )
        console.print(table([row]))
        text = json.dumps(report.to_json(), indent=2) + "\n"
        for path, content in (
            (stem.with_suffix(".json"), text),
            (stem.with_suffix(".md"), "\n".join(markdown(report)) + "\n"),
        ):
            fresh = path.with_suffix(f"{path.suffix}.new")
            fresh.write_text(content, encoding="utf-8")
            os.replace(fresh, path)

    with tempfile.TemporaryDirectory(prefix="hsrloop-suite-") as painted:
        scenes = SMOKE_SCENES if options.smoke else SCENES
        data = write_data_set(Path(painted), **scenes, seed=0)
        asked = resolve([("suite", {"dataset": str(data), "device": device})])
        cells = cells_of(asked, scope, sink.handle)
        if options.only:
            names = "; ".join(cell.name for cell in cells)
            cells = [cell for cell in cells if options.only.search(cell.name)]
            if not cells:
                parser.error(f"--only {options.only.pattern} is found in no part's name: {names}")
        run_suite(
            cells,
            minutes=options.minutes,
            began=STARTED,
            has_gpu=info.kind == "cuda",
            on_row=keep,
        )
    sink.close()
    console.print(f"Written: {stem}.json and .md", soft_wrap=True)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} are no minutes")
    return minutes


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _words(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"\W+", "_", text).strip("_").lower()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
