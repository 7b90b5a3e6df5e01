"""Data that many tests share: a small synthetic set, and the real sets when they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

SHAPES = ("square", "disc", "bar")
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 80, 230))


def _scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """Draw up to four coloured shapes on a noisy ground; return BGR pixels and label rows."""
    image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    rows = []
    for _ in range(int(rng.integers(1, 5))):
        label = int(rng.integers(len(SHAPES)))
        w = int(rng.integers(width // 8, width // 3))
        h = w // 3 if SHAPES[label] == "bar" else w
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        if SHAPES[label] == "disc":
            axes = (w // 2, w // 2)
            cv2.ellipse(image, (x + w // 2, y + w // 2), axes, 0, 0, 360, COLOURS[label], -1)
        else:
            cv2.rectangle(image, (x, y), (x + w - 1, y + h - 1), COLOURS[label], -1)
        cx, cy = (x + w / 2) / width, (y + h / 2) / height
        rows.append(f"{label} {cx:.6f} {cy:.6f} {w / width:.6f} {h / height:.6f}")
    return image, rows


def write_tiny_dataset(root: Path, *, train: int = 8, val: int = 4, seed: int = 0) -> Path:
    """Write a set of coloured shapes with three classes below `root`; return its data.yaml."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(count):
            image, rows = _scene(rng, *((120, 160) if i % 2 else (160, 128)))
            cv2.imwrite(str(root / "images" / split / f"{split}_{i:02d}.png"), image)
            (root / "labels" / split / f"{split}_{i:02d}.txt").write_text("\n".join(rows) + "\n")
    yaml = root / "data.yaml"
    yaml.write_text(f"train: images/train\nval: images/val\nnames: [{', '.join(SHAPES)}]\n")
    return yaml


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """Return the data.yaml of a fresh set: 8 images to train on, 4 to validate, 3 classes."""
    return write_tiny_dataset(tmp_path / "tiny")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder that holds `data/` and `weights/`; skip when it is not at hand."""
    folder = os.environ.get("HSRLOOP_TEST_DATA")
    if not folder:
        pytest.skip("HSRLOOP_TEST_DATA is not set: no real data and weights to test on")
    return Path(folder)
