"""Where an epoch of a run goes: the host's time, part by part, as it trains.

    python benchmarks/epoch.py --device cuda:0 --model yolov8n.yaml --imgsz 640 --batch 16
    python benchmarks/epoch.py --without-checkpoints     # what does the writer cost?

A run as `hsrloop train` makes it, on painted scenes unless a set is given. The first epoch warms up
and is left out. Parts are of the thread that trains; what other threads take from it shows as more
time in all of them. Each part that waits for the device contains what the device still had to do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reporting import describe_host, results_folder, write_markdown

from hsrloop.cli.run import prepare

prepare()  # before torch is loaded

from hsrloop.bench.results import Spread  # noqa: E402
from hsrloop.cli.tabletop import write_data_set  # noqa: E402
from hsrloop.config import resolve  # noqa: E402
from hsrloop.ops.ap import Evaluator  # noqa: E402
from hsrloop.train import loop, run, saver  # noqa: E402
from hsrloop.train.detector import KeptDetector  # noqa: E402
from hsrloop.train.graphs import StepGraphs  # noqa: E402
from hsrloop.train.guard import Guard  # noqa: E402
from hsrloop.train.meter import Meter  # noqa: E402

# What is timed: where it is found, by which name, and what it is called.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (Guard, "begin", "the state to go back to"),
    (StepGraphs, "begin", "beginning steps"),
    (StepGraphs, "train_step", "starting steps"),
    (Guard, "persists", "waiting for steps"),
    (Meter, "settle", "waiting for the last ones"),
    (loop, "unsound", "are weights numbers?"),
    (KeptDetector, "of", "validation: the detector"),
    (Evaluator, "settle", "validation: waiting, matching"),
    (Evaluator, "compute", "validation: average precision"),
    (loop, "evaluate", "validation in all"),
    (saver.Saver, "save", "copies for checkpoints"),
)
DATA = "waiting for data"
EPOCH = "an epoch in all"


class Clock:
    """Adds up the seconds of parts, epoch by epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._own: dict[str, float] = defaultdict(float)
        self._began = 0.0  # before the first epoch

    def timed(self, work: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return the same work, its seconds added to a part."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self._own[part] += time.perf_counter() - began

        return watched

    def waiting(self, source: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return the same iterator, the seconds until each item added to `DATA`."""

        def watched(*args: Any) -> Iterator[Any]:
            items = source(*args)
            ask = self.timed(lambda: next(items, None), DATA)
            while (item := ask()) is not None:
                yield item

        return watched

    def epoch(self, train_epoch: Callable[..., bool]) -> Callable[..., bool]:
        """Return the same epoch; what was timed until it begins belongs to the one before."""

        def watched(*args: Any) -> bool:
            self.end()
            return train_epoch(*args)

        return watched

    def end(self) -> None:
        """Close the epoch, if there was one."""
        now = time.perf_counter()
        if self._began:
            self.epochs.append({**self._own, EPOCH: now - self._began})
        self._own, self._began = defaultdict(float), now


def watch(clock: Clock) -> None:
    """Time the parts of whatever trains in this process from now on."""
    for owner, name, part in PARTS:
        setattr(owner, name, clock.timed(getattr(owner, name), part))
    loop.by_step = clock.waiting(loop.by_step)  # type: ignore[assignment]
    loop.train_epoch = clock.epoch(loop.train_epoch)


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Train, and return the seconds of each part of each epoch but the first."""
    data = options.data or write_data_set(folder, train=options.train, val=options.val, seed=0)
    settings = {"dataset": str(data), "output": str(folder / "run"), "patience": 0}
    settings |= {k: getattr(options, k) for k in ("model", "imgsz", "batch", "epochs", "device")}
    clock = Clock()
    watch(clock)
    if options.without_checkpoints:
        saver.Saver._write = lambda own, jobs: saver._Outcome(list(jobs), None)  # type: ignore[method-assign]
    settings |= {"tensorboard": False, "dynamic_synthetic": False}
    run.train(resolve([("benchmark", settings)]))
    clock.end()
    return clock.epochs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--train", type=int, default=384, help="painted scenes to train on")
    parser.add_argument("--val", type=int, default=256, help="painted scenes to validate on")
    parser.add_argument("--model", default="yolov8n.yaml")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--without-checkpoints", action="store_true")
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first one is left out")
    output = results_folder(options.output)  # before minutes are spent
    with tempfile.TemporaryDirectory() as folder:
        epochs = measure(options, Path(folder))
    names = [*(part for _, _, part in PARTS), DATA, EPOCH]
    found = {name: [1e3 * epoch.get(name, 0.0) for epoch in epochs] for name in names}
    said = {k: getattr(options, k) for k in ("model", "device", "imgsz", "batch")}
    said["checkpoints"] = not options.without_checkpoints
    data = options.data.resolve().parent.name if options.data else "painted scenes"
    stem = "epoch" if options.device == "cpu" else "epoch_gpu"
    stem += "_without_checkpoints" if options.without_checkpoints else ""
    content = {"host": describe_host(), "data": data, **said, "ms": found}
    (output / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["# Where an epoch goes", "", describe_host(), ""]
    lines += [", ".join([data, *(f"{key} {value}" for key, value in said.items())]), ""]
    lines += [f"| ms of an epoch, n = {len(epochs)} | median (lowest to highest) |", "|---|---|"]
    lines += [f"| {name} | {Spread.of(times).text()} |" for name, times in found.items()]
    write_markdown(output / f"{stem}.md", lines)


if __name__ == "__main__":
    main()
