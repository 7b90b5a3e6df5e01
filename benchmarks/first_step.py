"""Seconds from the command to the end of the first optimizer step.

    python benchmarks/first_step.py --data path/to/data.yaml --model yolov8n.pt

Claim: at most 10 s for a set that was seen before. `hsrloop train` is started in a process of its
own, with everything on that is on by default, and ended once its first step is done. The first
start has an empty cache folder; those after it find there what it left.
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

# What the process runs: the command line, told to say when the first step is done.
_CHILD = """
import os, sys, time
import hsrloop.cli.run as run
prepare = run.prepare

def prepare_and_watch(device):
    prepare(device)  # before torch is loaded
    import torch
    from hsrloop.train.graphs import StepGraphs
    step = StepGraphs.train_step

    def first_step(*args, **kwargs):
        step(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print("DONE", time.monotonic(), flush=True)
        os._exit(0)

    StepGraphs.train_step = first_step

run.prepare = prepare_and_watch
from hsrloop.cli.main import main
main(args=sys.argv[1:], prog_name="hsrloop")
"""


def start(options: argparse.Namespace, cache: Path) -> float:
    """Return the seconds of one start."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-c", _CHILD, "train", "-d", str(options.data.resolve())]
        command += ["-m", options.model, "-o", output, "--device", options.device]
        command += ["--imgsz", str(options.imgsz), "--batch", str(options.batch)]
        env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        began = time.monotonic()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("DONE ")]
    if len(said) != 1:
        raise SystemExit(f"no first step:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return float(said[0].split()[1]) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="weights, or yolov8n.yaml from scratch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        start(options, Path(cache) / "warm")  # torch and the photographs into the page cache
        first = start(options, Path(cache) / "own")
        seen = [start(options, Path(cache) / "own") for _ in range(options.rounds)]
    found = {
        "host": describe_host(),
        "data": options.data.resolve().parent.name,
        "model": Path(options.model).name,
        **{name: getattr(options, name) for name in ("device", "imgsz", "batch")},
        "first_s": first,
        "seen_s": seen,
    }
    folder = results_folder(options.output)
    stem = "first_step" if options.device == "cpu" else "first_step_gpu"
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
        f"| the first, nothing kept | {first:.1f} | 1 |",
        f"| of a set that was seen before | {Spread.of(seen).text()} | {len(seen)} |",
    ]
    write_markdown(folder / f"{stem}.md", lines)


if __name__ == "__main__":
    main()
