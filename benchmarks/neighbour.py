"""Training beside a process that keeps one core busy: it may lose that core, and no more.

    python benchmarks/neighbour.py --data data.yaml --model yolov8n.pt

Claim: on two cores, training beside one busy process keeps at least half of its images/s. With
OpenMP's default spinning it would stall: threads that wait for each other burn the time slices
that the other one needs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from reporting import describe_host, results_folder, write_markdown

COUNTED_FROM = 1  # the first epoch warms up


def train(data: str, model: str, epochs: int) -> float:
    """Train with the command line; return seconds per epoch after the first."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "hsrloop", "train", "-d", data, "-m", model, "-o", output]
        command += ["--device", "cpu", "--no-tensorboard", "--epochs", str(epochs)]
        command += ["--imgsz", "320", "--batch", "8"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (run_dir,) = Path(output).iterdir()
        lines = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
        times = [e["train_s"] for e in lines if e["event"] == "EpochDone"]
        return statistics.median(times[COUNTED_FROM:])


def spin() -> None:
    """Keep one core busy."""
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    ratios = []
    for _ in range(options.rounds):
        alone = train(options.data, options.model, options.epochs)
        busy = multiprocessing.Process(target=spin, daemon=True)
        busy.start()
        beside = train(options.data, options.model, options.epochs)
        busy.kill()
        busy.join()
        ratios.append(alone / beside)
    cores = len(os.sched_getaffinity(0))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    lines = [describe_host(), "", "Speed beside one busy process, as a share of the speed alone."]
    lines += ["", "| share kept | its fair part | n |", "|---|---|---|"]
    lines += [f"| {spread} | {1 - 1 / cores:.2f} | {len(ratios)} |"]
    write_markdown(results_folder(options.output) / "neighbour.md", lines)


if __name__ == "__main__":
    main()
