"""Memory over a long run: nothing grows with epochs.

    python benchmarks/memory.py --epochs 200

Claim: after the first quarter, the memory of a run and its loader processes (what they share
counted once: PSS; without files' pages, which belong to whoever maps them) grows by less than 0.1
MiB an epoch. A small set painted here, copy-paste synthesis on, yolov8n at 64 px from scratch; one
run in one process, one with two loader processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from reporting import describe_host, results_folder, write_markdown  # noqa: E402

from hsrloop.cli.sprites import paint_sprite  # noqa: E402
from hsrloop.cli.tabletop import NAMES, write_data_set  # noqa: E402
from hsrloop.config import resolve  # noqa: E402
from hsrloop.events import EpochDone, Event  # noqa: E402
from hsrloop.train.run import train  # noqa: E402

MIB = 2**20
SETTINGS = {
    "model": "yolov8n.yaml", "device": "cpu", "imgsz": 64, "batch": 8, "patience": 0,
    "tensorboard": True, "tensorboard_port": 0, "synthetic_ratio": 1.0,
}  # fmt: skip


class MemorySink:
    """Notes the memory of this process and its children after each epoch."""

    def __init__(self) -> None:
        self.rss: list[float] = []
        self.pss: list[float] = []

    def handle(self, event: Event) -> None:
        if not isinstance(event, EpochDone):
            return
        own = psutil.Process()
        # The server of TensorBoard is a program of its own.
        children = [p for p in own.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
        family = [own, *(p for p in children if p.exe() == own.exe())]
        family = [p for p in family if "tensorboard_server" not in " ".join(p.cmdline())]
        self.rss.append(own.memory_info().rss / MIB)
        self.pss.append(sum(own_pages(p.pid) for p in family) / MIB)
        sys.stderr.write(f"\repoch {event.epoch}: {self.pss[-1]:.0f} MiB ")

    def close(self) -> None:
        sys.stderr.write("\n")


def own_pages(pid: int) -> int:
    """Return a process' bytes that no file holds, those shared divided by who shares them."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(size.split()[0]) for name, size in (row.split(":") for row in rows)}
    return 1024 * (kib["Pss_Anon"] + kib["Pss_Shmem"])


def measure(data: Path, annotated: Path, epochs: int, workers: int) -> MemorySink:
    """Train and return what was noted."""
    sink = MemorySink()
    with tempfile.TemporaryDirectory() as output:
        changes = {"dataset": str(data), "annotated_dir": str(annotated), "output": output}
        given = {**SETTINGS, **changes, "epochs": epochs, "workers": workers}
        train(resolve([("benchmark", given)]), sinks=[sink])
    return sink


def paint_cutouts(folder: Path) -> Path:
    """Write three cut-outs of each class, RGBA."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        (folder / name / "images").mkdir(parents=True)
        for i in range(3):
            sprite = cv2.cvtColor(paint_sprite(name, rng), cv2.COLOR_RGBA2BGRA)
            cv2.imwrite(str(folder / name / "images" / f"{i}.png"), sprite)
    return folder


def slope(values: list[float]) -> float:
    """Return MiB an epoch over the last three quarters, by least squares."""
    kept = values[len(values) // 4 :]
    return float(np.polyfit(np.arange(len(kept)), kept, 1)[0])


def plot(path: Path, runs: dict[int, MemorySink]) -> None:
    """Draw memory against epochs."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for workers, sink in runs.items():
        axes.plot(range(1, len(sink.pss) + 1), sink.pss, label=f"{workers} loader processes")
    axes.set(xlabel="epoch", ylabel="MiB of the run and its processes", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    logging.getLogger("hsrloop").setLevel(logging.ERROR)
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        data = write_data_set(Path(scratch) / "set", train=16, val=8, seed=0)
        annotated = paint_cutouts(Path(scratch) / "annotated")
        for workers in options.workers:
            runs[workers] = measure(data, annotated, options.epochs, workers)
    folder = results_folder(options.output)
    lines = [describe_host(), "", f"{options.epochs} epochs of 16 real and 16 composed images."]
    lines += ["", "| loader processes | MiB after the first quarter | at the end | MiB an epoch |"]
    lines += ["|---|---|---|---|"]
    for workers, sink in runs.items():
        start = sink.pss[len(sink.pss) // 4]
        lines += [f"| {workers} | {start:.0f} | {sink.pss[-1]:.0f} | {slope(sink.pss):+.3f} |"]
    lines += ["", "![memory over epochs](memory.png)"]
    write_markdown(folder / "memory.md", lines)
    rows = {str(n): {"pss_mib": sink.pss, "rss_mib": sink.rss} for n, sink in runs.items()}
    (folder / "memory.json").write_text(json.dumps({"host": describe_host(), "runs": rows}) + "\n")
    plot(folder / "memory.png", runs)


if __name__ == "__main__":
    main()
