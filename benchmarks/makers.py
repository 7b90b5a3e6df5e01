"""What benchmarks of the training stream compare: the same augmented samples, made by each side.

Mosaic 1, degrees 10, mixup 0.1, scale 0.5, translate 0.1, HSV, left-right flip, from images decoded
into RAM.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import torch
import torchvision  # noqa: F401  (before ultralytics)
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset

from hsrloop.config import TrainConfig
from hsrloop.data.loader import TrainLoader
from hsrloop.data.pixels.bank import DeviceBank, Sources
from hsrloop.data.pixels.render_torch import TorchRenderer
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.sets.labels import label_path
from hsrloop.data.stream import TrainStream
from hsrloop.hardware.threads import keep_freed_memory
from hsrloop.records import Position

BATCH = 8
SHARED = {
    "mosaic": 1.0, "degrees": 10.0, "mixup": 0.1, "scale": 0.5, "translate": 0.1, "shear": 0.0,
    "fliplr": 0.5, "flipud": 0.0, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
}  # fmt: skip

Maker: TypeAlias = Callable[[int, int], None]  # (count, round): make so many samples


def ours(data: Path, imgsz: int) -> Maker:
    """Return a maker with hsrloop's loader, rendering by cv2."""
    refs = load_dataset(data).train
    store = ImageStore(refs, imgsz=imgsz, cache="ram", threads=1)
    config = TrainConfig(imgsz=imgsz, batch=BATCH, **SHARED)
    loader = TrainLoader(refs, store, config)

    def make(count: int, number: int) -> None:
        done = 0
        while done < count:
            for batch in loader.batches(Position(number, 0)):
                done += len(batch.images)
                if done >= count:
                    break

    return make


def ours_by_torch(data: Path, imgsz: int, device: torch.device) -> Maker:
    """Return a maker with hsrloop's torch renderer, nothing made ahead."""
    refs = load_dataset(data).train
    bank = DeviceBank(Sources(ImageStore(refs, imgsz=imgsz)), device)
    renderer = TorchRenderer(bank, refs, imgsz=imgsz, device=device)
    stream = TrainStream.of(refs, TrainConfig(imgsz=imgsz, batch=BATCH, **SHARED))

    def make(count: int, number: int) -> None:
        order = stream.order(number)
        for start in range(0, count, BATCH):
            chosen = [int(order[i % len(order)]) for i in range(start, min(start + BATCH, count))]
            plans = [stream.plan(number, index, mosaic=True) for index in chosen]
            for plan in plans:
                stream.labels(plan, imgsz)
            renderer.pixels(plans)

    return make


def theirs(data: Path, imgsz: int, scratch: Path) -> Maker:
    """Return a maker with Ultralytics' training data set.

    It works on copies below `scratch`: that class writes a cache beside the labels, and rewrites
    truncated images, in whatever data set it is given.
    """
    settings = {"imgsz": imgsz, "cache": "ram", "task": "detect", "mode": "train", "rect": False}
    hyp = get_cfg(overrides={**settings, **SHARED})
    spec = load_dataset(data)
    info = {"names": dict(enumerate(spec.names)), "nc": spec.nc, "channels": 3}
    for folder in ("images", "labels"):
        (scratch / folder).mkdir()
    for number, ref in enumerate(spec.train):
        name = f"{number:06d}{ref.path.suffix}"
        shutil.copyfile(ref.path, scratch / "images" / name)
        label = label_path(ref.path)
        if label.exists():
            shutil.copyfile(label, (scratch / "labels" / name).with_suffix(".txt"))
    images = str(scratch / "images")
    dataset = build_yolo_dataset(hyp, images, BATCH, info, mode="train", rect=False)

    def make(count: int, number: int) -> None:
        order = np.random.default_rng(number).permutation(len(dataset))
        for start in range(0, count, BATCH):
            chosen = [order[i % len(order)] for i in range(start, min(start + BATCH, count))]
            dataset.collate_fn([dataset[int(i)] for i in chosen])

    return make


def measure(
    makers: Mapping[str, Maker],
    images: int,
    rounds: int,
    clocks: Mapping[str, Callable[[], float]],
) -> dict[str, dict[str, list[float]]]:
    """Return by clock, by maker, the milliseconds per image of each round, in alternating order."""
    for make in makers.values():
        make(2 * BATCH, 10_000)
    times: dict[str, dict[str, list[float]]] = {c: {name: [] for name in makers} for c in clocks}
    for number in range(rounds):
        names = list(makers) if number % 2 == 0 else list(makers)[::-1]
        for name in names:
            starts = {clock: read() for clock, read in clocks.items()}
            makers[name](images, number)
            for clock, read in clocks.items():
                times[clock][name].append(1e3 * (read() - starts[clock]) / images)
    return times


def one_core_options(doc: str | None) -> argparse.Namespace:
    """Read the command line of such a benchmark, and hold this process to one thread.

    Freed memory is kept, as in every run; in one process all that is compared profits.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    given = os.environ.get("HSRLOOP_TEST_DATA")
    default = Path(given) / "data/ycb_household/data.yaml" if given else None
    parser.add_argument("--data", type=Path, default=default, required=default is None)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--images", type=int, default=64, help="per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    keep_freed_memory()
    return options
