"""Data that many tests share: a small synthetic set, and the real sets when they are at hand."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # as `hsrloop` does

import cv2
import numpy as np
import pytest

GIB = 2**30
SHAPES = ("square", "disc", "bar")
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 80, 230))


def pytest_collection_finish() -> None:
    """Let garbage be looked for among what tests make only: all modules are loaded."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries call what is left over at the end a leak


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let test processes report to each other in UTF-8 also what tests of file names print."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


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


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what runs remember between starts out of the user's folder; processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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


def write_object(path: Path, mask: Path | None, *, seed: int, size: int = 120) -> None:
    """Write a photograph of a five-cornered object and its mask; without a mask, as RGBA."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (size, size * 4 // 3, 3), dtype=np.uint8)
    alpha = np.zeros(image.shape[:2], np.uint8)
    turn = np.sort(rng.random(5)) * 0.6 + np.arange(5) * 2 * np.pi / 5
    reach = rng.uniform(0.25, 0.45, 5) * size
    points = np.stack((np.cos(turn), np.sin(turn)), 1) * reach[:, None]
    cv2.fillPoly(alpha, [np.int32(points + (size * 2 / 3, size / 2))], 255)
    image[alpha > 0] = rng.integers(80, 256, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    if mask is None:
        cv2.imwrite(str(path), np.dstack((image, alpha)))
        return
    mask.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    cv2.imwrite(str(mask), alpha)


def write_material(root: Path, *, each: int = 2, backgrounds: int = 3) -> None:
    """Write annotated/ (square and disc; bar has none) and backgrounds/ below `root`."""
    for label, name in enumerate(SHAPES[:2]):
        place = root / "annotated" / name
        for i in range(each):
            mask = place / "masks" / f"o{i}_mask.png"
            write_object(place / "images" / f"o{i}.png", mask, seed=10 * label + i)
    for i in range(backgrounds):
        rng = np.random.default_rng(100 + i)
        coarse = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
        (root / "backgrounds").mkdir(parents=True, exist_ok=True)
        smooth = cv2.resize(coarse, (200, 120 + 40 * i), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / "backgrounds" / f"b{i}.jpg"), smooth)


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """Return the data.yaml of a fresh set: 8 images to train on, 4 to validate, 3 classes."""
    return write_tiny_dataset(tmp_path / "tiny")


class CardMemory:
    """A card's memory as driver and allocator tell of it, and this process's cap; sizes in GiB."""

    def __init__(self) -> None:
        self.total = 80.0
        self.others = 0.0  # what other processes hold
        self.reserved = 0.0  # what this one holds
        self.share = 1.0  # the cap
        self.shares: list[float] = []  # caps as they were set

    def set_share(self, share: float, device: int | None = None) -> None:
        self.share = share
        self.shares.append(share)


@pytest.fixture
def card_memory(monkeypatch: pytest.MonkeyPatch) -> CardMemory:
    """Let torch speak of a card of 80 GiB that the test fills; nothing can be computed on it."""
    import torch

    card = CardMemory()
    for name, answer in (
        (
            "mem_get_info",
            lambda device=None: (
                int(GIB * (card.total - card.others - card.reserved)),
                int(GIB * card.total),
            ),
        ),
        ("memory_reserved", lambda device=None: int(GIB * card.reserved)),
        ("get_per_process_memory_fraction", lambda device=None: card.share),
        ("set_per_process_memory_fraction", card.set_share),
        ("empty_cache", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    return card


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder that holds `data/` and `weights/`; skip when it is not at hand."""
    folder = os.environ.get("HSRLOOP_TEST_DATA")
    if not folder:
        pytest.skip("HSRLOOP_TEST_DATA is not set: no real data and weights to test on")
    return Path(folder)
