"""Seconds from the command to the end of the first optimizer step.

    python benchmarks/first_step.py --data path/to/data.yaml --model yolov8n.pt

Claim: at most 10 s for a set that was seen before. `hsrloop train` is started in a process of its
own, with everything on that is on by default, and ended once its first step is done. The first
start has an empty cache folder; those after it find there what it left. `--without-waking` lets
CUDA start where torch asks for it, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import describe_host, results_folder, write_markdown

from hsrloop.bench.results import Spread

_LAST = "first step"

# What the process runs: the command line, told to say what it has done, up to the first step.
_CHILD = """
import contextlib, os, sys, time
import hsrloop.cli.run as run
import hsrloop.hardware.probe as probing

def said(what):
    print("DONE", time.monotonic(), what, flush=True)

def watch(owner, name, *, before="", after=""):
    own = getattr(owner, name)

    def watched(*args, **kwargs):
        setattr(owner, name, own)
        if before:
            said(before)
        done = own(*args, **kwargs)
        if after:
            said(after)
        return done

    setattr(owner, name, watched)

def watch_the_run():
    import torch
    import hsrloop.train.build as building
    import hsrloop.train.run as training
    from hsrloop.train.graphs import StepGraphs
    from hsrloop.train.rehearsal import Rehearsal
    said("modules")
    watch(training, "_prepare", after="data set and network")
    watch(building, "build_loaders", before="run folder, TensorBoard")
    watch(Rehearsal, "run", before="images", after="trial step")
    watch(StepGraphs, "train_step", before="recordings")
    step = StepGraphs.train_step

    def first_step(*args, **kwargs):
        step(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        said("first step")
        os._exit(0)

    StepGraphs.train_step = first_step

if not int(os.environ["WAKING"]):
    import hsrloop.hardware.waking as waking
    waking.wake = lambda device: None

watch(run, "prepare", after="Python")
watch(probing, "probe", after="device")
loading = run.loading

@contextlib.contextmanager
def watched_loading():
    with loading():
        yield
    watch_the_run()

run.loading = watched_loading
from hsrloop.cli.main import main
main(args=sys.argv[1:], prog_name="hsrloop")
"""


def start(options: argparse.Namespace, cache: Path) -> dict[str, float]:
    """Return what a start had done when, in seconds from the command; the last is a step."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-c", _CHILD, "train", "-d", str(options.data.resolve())]
        command += ["-m", options.model, "-o", output, "--device", options.device]
        command += ["--imgsz", str(options.imgsz), "--batch", str(options.batch)]
        env = {**os.environ, "XDG_CACHE_HOME": str(cache), "WAKING": str(int(options.waking))}
        began = time.monotonic()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    said = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("DONE ")]
    reached = {what: float(moment) - began for _, moment, what in said}
    if _LAST not in reached:
        raise SystemExit(f"no first step:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return reached


def _stages(starts: list[dict[str, float]]) -> list[str]:
    """Return a row for each thing that was done."""
    rows, before = [], [0.0] * len(starts)
    for what in starts[0]:
        moments = [reached[what] for reached in starts]
        took = Spread.of([end - begin for begin, end in zip(before, moments, strict=True)])
        rows.append(f"| {what} | {took.text()} | {Spread.of(moments).median:.1f} |")
        before = moments
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="weights, or yolov8n.yaml from scratch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--without-waking", dest="waking", action="store_false")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        start(options, Path(cache) / "warm")  # torch and the photographs into the page cache
        first = start(options, Path(cache) / "own")
        seen = [start(options, Path(cache) / "own") for _ in range(options.rounds)]
    found = {
        "host": describe_host(),
        "data": options.data.resolve().parent.name,
        "model": Path(options.model).name,
        **{name: getattr(options, name) for name in ("device", "imgsz", "batch", "waking")},
        "first_s": first[_LAST],
        "seen_s": [reached[_LAST] for reached in seen],
        "reached_s": seen,
    }
    folder = results_folder(options.output)
    stem = "first_step" if options.device == "cpu" else "first_step_gpu"
    stem += "" if options.waking else "_without_waking"
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "# From the command to the first step",
        "",
        describe_host(),
        "",
        f"{found['data']}, {found['model']}, {options.imgsz} px, batch {options.batch}, "
        f"{options.device}; files in the page cache; everything else as by default, TensorBoard "
        "included. Until the first optimizer step is done:",
        "",
        "| start | s, median (lowest to highest) | n |",
        "|---|---|---|",
        f"| the first, nothing kept | {first[_LAST]:.1f} | 1 |",
        f"| of a set that was seen before | {Spread.of(found['seen_s']).text()} | {len(seen)} |",
        "",
        "Of the latter, by what was done:",
        "",
        "| done | s, median (lowest to highest) | s since the start |",
        "|---|---|---|",
        *_stages(seen),
    ]
    write_markdown(folder / f"{stem}.md", lines)


if __name__ == "__main__":
    main()
