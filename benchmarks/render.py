"""Images/s of both renderers, cv2 on one core and torch on the device, beside Ultralytics' loader.

All make the same augmented samples (see `makers`) in interleaved rounds. Processor time is that of
the whole process with one thread for each library, so for cv2 and Ultralytics it is time on one
core. Wall time ends when the device has finished; for the torch renderer it covers the host, which
draws plans and labels, and the device, whichever is slower. On a machine without a GPU the torch
renderer runs on the CPU, where nobody would use it: that row then only shows that it works. The
last row is about the host's part alone: plans, labels, tables and launches for images of 32 px,
whose pixels cost next to nothing.

    python benchmarks/render.py --data path/to/data.yaml
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from makers import (  # noqa: E402
    BATCH,
    measure,
    one_core_options,
    ours,
    ours_by_torch,
    theirs,
)
from reporting import describe_host, results_folder, write_markdown  # noqa: E402


def wall_time() -> float:
    """Return seconds, once the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the result as lines of a page."""
    where = result["where"]
    lines = [
        "# Renderers: images/s",
        "",
        f"{where['host']}; load {where['load']:.1f} during the run.",
        f"{where['data']} at {where['imgsz']}, RAM cache, batch {BATCH}, n = {result['n']} "
        f"interleaved rounds of {where['images']} images each; ms an image: median (min to max).",
        "",
        "| | processor ms | images/s and core | wall ms | images/s |",
        "|---|---|---|---|---|",
    ]
    for name in result["ms_per_image"]["cpu"]:
        cells = []
        for clock in ("cpu", "wall"):
            times = result["ms_per_image"][clock][name]
            middle = statistics.median(times)
            cells += [f"{middle:.2f} ({min(times):.2f} to {max(times):.2f})", f"{1e3 / middle:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    options = one_core_options(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        makers = {
            "Ultralytics": theirs(options.data, options.imgsz, Path(scratch)),
            "hsrloop, cv2": ours(options.data, options.imgsz),
            f"hsrloop, torch on {device.type}": ours_by_torch(options.data, options.imgsz, device),
            "hsrloop, torch, the host's part": ours_by_torch(options.data, 32, device),
        }
        clocks = {"cpu": time.process_time, "wall": wall_time}
        times = measure(makers, options.images, options.rounds, clocks)
    result = {
        "where": {
            "host": describe_host(),
            "load": os.getloadavg()[0],
            "data": options.data.parent.name,
            "imgsz": options.imgsz,
            "images": options.images,
        },
        "n": options.rounds,
        "ms_per_image": times,
    }
    folder = results_folder(options.output)
    (folder / "render.json").write_text(json.dumps(result, indent=2) + "\n")
    write_markdown(folder / "render.md", markdown(result))


if __name__ == "__main__":
    main()
