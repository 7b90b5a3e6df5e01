"""Images/s per core of the training stream, against the data set class of Ultralytics.

Both make the same augmented samples (mosaic 1, degrees 10, mixup 0.1, scale 0.5, translate 0.1,
HSV, left-right flip) from images decoded into RAM, in one process and one thread, in interleaved
rounds. Time is CPU time of that thread, so a busy machine disturbs it little. The claim is the
median over rounds of the paired ratio; beside it the floor, what no loader of this kind can avoid.

    python benchmarks/loader.py --data path/to/data.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from makers import measure, one_core_options, ours, theirs  # noqa: E402
from reporting import describe_host, results_folder  # noqa: E402

from hsrloop.data.pixels.colour_cpu import recolour  # noqa: E402


def floor(imgsz: int, repeats: int = 30) -> dict[str, float]:
    """Return milliseconds of the steps that every such loader needs."""
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 255, (80, 80, 4), dtype=np.uint8), (imgsz, imgsz))
    three = np.ascontiguousarray(image[..., :3])
    turned = cv2.getRotationMatrix2D((imgsz / 2, imgsz / 2), 7, 1.0)
    table = np.arange(256, dtype=np.uint8)
    hsv = cv2.cvtColor(three, cv2.COLOR_RGB2HSV)

    def hsv_trip() -> None:
        cv2.cvtColor(cv2.LUT(cv2.cvtColor(three, cv2.COLOR_RGB2HSV), table), cv2.COLOR_HSV2RGB)

    planes = [np.ascontiguousarray(three[..., channel]) for channel in range(3)]
    steps: dict[str, Callable[[], Any]] = {
        "bilinear warp, 3 channels": lambda: cv2.warpAffine(three, turned, (imgsz, imgsz)),
        "bilinear warp, 4 channels": lambda: cv2.warpAffine(image, turned, (imgsz, imgsz)),
        "HSV there, table, and back, by OpenCV": hsv_trip,
        "HSV in one compiled pass": lambda: recolour(planes, (0.05, 1.2, 0.9)),
        "copy": lambda: hsv.copy(),
    }
    result = {}
    for name, step in steps.items():
        step()
        times = []
        for _ in range(repeats):
            start = time.thread_time()
            step()
            times.append(time.thread_time() - start)
        result[name] = 1e3 * statistics.median(times)
    return result


def describe(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "host": describe_host(),
        "load": os.getloadavg()[0],
        "data": data.parent.name,
        "imgsz": options.imgsz,
        "images": options.images,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    where, rows = result["where"], result["ms_per_image"]
    lines = [
        "# Training stream: images/s per core",
        "",
        f"{where['host']}; one thread, CPU time; load {where['load']:.1f} during the run.",
        f"{where['data']} at {where['imgsz']}, RAM cache, {result['n']} interleaved rounds of "
        f"{where['images']} images each.",
        "",
        "| | ms an image, median (min to max) | images/s and core |",
        "|---|---|---|",
    ]
    for name, times in rows.items():
        middle = statistics.median(times)
        spread = f"{middle:.2f} ({min(times):.2f} to {max(times):.2f})"
        lines.append(f"| {name} | {spread} | {1e3 / middle:.0f} |")
    lines += [
        "",
        f"Median of paired ratios: **{result['ratio']:.2f}x** "
        f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f}, n = {result['n']}).",
        "",
        "Floor, ms: " + "; ".join(f"{k} {v:.2f}" for k, v in result["floor_ms"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = one_core_options(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        makers = {
            "hsrloop": ours(options.data, options.imgsz),
            "Ultralytics": theirs(options.data, options.imgsz, Path(scratch)),
        }
        clocks = {"cpu": time.thread_time}
        times = measure(makers, options.images, options.rounds, clocks)["cpu"]
    ratios = [b / a for a, b in zip(times["hsrloop"], times["Ultralytics"], strict=True)]
    result = {
        "where": describe(options.data, options),
        "n": options.rounds,
        "ms_per_image": times,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "floor_ms": floor(options.imgsz),
    }
    folder = results_folder(options.output)
    (folder / "loader.json").write_text(json.dumps(result, indent=2) + "\n")
    page = markdown(result)
    (folder / "loader.md").write_text(page)
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
