"""Seconds until all images of a set are decoded: the first start, and the next one.

    python benchmarks/second_start.py --data path/to/data.yaml

Claim: the second start takes under a tenth of the first for large photographs, whose decoded
versions it finds in the cache folder without reading the photographs. The set given, and 60
painted JPEGs of 12 megapixels, at 640 px into RAM, on all cores, files in the page cache; median
of rounds, each with a folder of its own. "Decoding" keeps nothing: what a start costs without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from reporting import describe_host, results_folder, write_markdown  # noqa: E402

from hsrloop.data.pixels.kept import SETTLED_S  # noqa: E402
from hsrloop.data.pixels.store import ImageStore  # noqa: E402
from hsrloop.data.sets.dataset import ImageRef, load_dataset  # noqa: E402
from hsrloop.hardware.memory import usable_cores  # noqa: E402

IMGSZ = 640


def paint_photographs(folder: Path, count: int) -> list[ImageRef]:
    """Write JPEGs of 4000 x 3000 px, about 5 MB each: soft shapes with a camera's noise."""
    rng = np.random.default_rng(0)
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    refs = []
    for number in range(count):
        coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (4000, 3000), interpolation=cv2.INTER_CUBIC)
        noise = rng.integers(0, 16, (3000, 4000, 1), dtype=np.uint8)
        path = folder / f"{number:03d}.jpg"
        cv2.imwrite(str(path), cv2.add(image, noise.repeat(3, 2)), [cv2.IMWRITE_JPEG_QUALITY, 92])
        refs.append(ImageRef(path, 3000, 4000, *none, ()))
    return refs


def start(refs: Sequence[ImageRef], folder: Path | None) -> float:
    """Return the seconds that a start spends on images."""
    began = time.perf_counter()
    ImageStore(refs, imgsz=IMGSZ, cache="ram", cache_dir=folder, threads=usable_cores())
    return time.perf_counter() - began


def measure(refs: Sequence[ImageRef], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each kind of start, a round after the other."""
    start(refs, None)  # files into the page cache
    times: dict[str, list[float]] = {"decoding": [], "first": [], "second": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            times["decoding"].append(start(refs, None))
            times["first"].append(start(refs, Path(folder)))
            times["second"].append(start(refs, Path(folder)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    given = os.environ.get("HSRLOOP_TEST_DATA")
    default = Path(given) / "data/kitchen_containers/data.yaml" if given else None
    parser.add_argument("--data", type=Path, default=default, required=default is None)
    parser.add_argument("--photographs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    spec = load_dataset(options.data)
    with tempfile.TemporaryDirectory() as scratch:
        sets = {
            f"{options.data.parent.name}, {len(spec.train)} images": spec.train,
            f"{options.photographs} JPEGs of 12 megapixels": paint_photographs(
                Path(scratch), options.photographs
            ),
        }
        time.sleep(SETTLED_S + 1)
        times = {name: measure(refs, options.rounds) for name, refs in sets.items()}
    lines = [f"{describe_host()}. Seconds, median (min to max), n = {options.rounds}.", ""]
    lines += [
        "| | decoding | first start | second start | second to first |",
        "|---|---|---|---|---|",
    ]
    for name, found in times.items():
        cells = [
            f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in found.values()
        ]
        ratio = statistics.median(
            b / a for a, b in zip(found["first"], found["second"], strict=True)
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.3f} |")
    folder = results_folder(options.output)
    write_markdown(folder / "second_start.md", lines)
    (folder / "second_start.json").write_text(
        json.dumps({"host": describe_host(), "seconds": times}) + "\n"
    )


if __name__ == "__main__":
    main()
