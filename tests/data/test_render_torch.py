"""The torch renderer shows what the cv2 renderer shows, from either bank, and waits for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hsrloop.data.bank import Bank, DeviceBank, Sources, TileBank
from hsrloop.data.cutouts import CutoutStore
from hsrloop.data.dataset import ImageRef
from hsrloop.data.plan import AugmentPlan, AugmentSettings, Paste, draw_plan
from hsrloop.data.render import Renderer
from hsrloop.data.render_torch import TorchRenderer
from hsrloop.data.store import ImageStore

SIDE = 160
SIZES = ((240, 320), (320, 200), (160, 160), (40, 160), (97, 131), (480, 333))
ALL = AugmentSettings(
    hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, degrees=10, translate=0.1, scale=0.5, shear=5,
    flipud=0.3, fliplr=0.5, mosaic=0.8, mixup=0.3,
)  # fmt: skip
PLAIN = dataclasses.replace(ALL, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0)
HSV = AugmentSettings(hsv_h=0.5, hsv_s=0.7, hsv_v=0.4)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def smooth(index: int, height: int, width: int) -> np.ndarray:
    """Return a picture of slow waves that uses the whole range."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(x * (5 + c) + index + c) * np.cos(y * (7 - c) - index) for c in range(3)]
    return np.rint(127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)


def made_of(images: Sequence[np.ndarray], folder: Path) -> tuple[tuple[ImageRef, ...], ImageStore]:
    """Write images and return their references, with one box each, and a store."""
    refs = []
    for i, image in enumerate(images):
        path = folder / f"{i}.png"
        cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        box = np.array([[0.5, 0.5, 0.4, 0.4]], np.float32)
        refs.append(ImageRef(path, *image.shape[:2], box, np.array([i]), (None,)))
    return tuple(refs), ImageStore(refs, imgsz=SIDE, cache="ram")


def plans_of(refs: Sequence[ImageRef], settings: AugmentSettings, count: int) -> list[AugmentPlan]:
    return [draw_plan(7, i // len(refs), i % len(refs), refs, settings) for i in range(count)]


class PaintedCutouts:
    """Cut-outs as their store gives them: a disc of waves with every kind of edge."""

    def __init__(self) -> None:
        self.images = []
        for i, (height, width) in enumerate(((60, 80), (100, 40), (33, 33))):
            y, x = np.mgrid[0:height, 0:width]
            far = np.hypot((y + 0.5) / height - 0.5, (x + 0.5) / width - 0.5)  # 0.5 at the frame
            edges = [np.clip((0.4 - far) * sharp + 0.5, 0, 1) for sharp in (1000, 15, 8, 5)]
            image = smooth(i + 10, height, width)
            self.images.append(np.dstack((image, *(np.uint8(255 * edge) for edge in edges))))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def extent(self, index: int) -> tuple[float, float]:
        height, width = self.images[index].shape[:2]
        return width / max(height, width), height / max(height, width)


def pasted(plan: AugmentPlan, rng: np.random.Generator, cutouts: int) -> AugmentPlan:
    """Return a plan with up to five cut-outs of any size and place, some outside the frame."""
    pastes = []
    for _ in range(int(rng.integers(6))):
        turn, size = rng.uniform(-3, 3), rng.uniform(0.08, 0.6)
        a, b = size * np.cos(turn), size * np.sin(turn)
        x, y = rng.uniform(-0.2, 1.2, 2)
        shadow = (*rng.uniform(-0.05, 0.05, 2).tolist(), float(rng.choice([0.0, 0.4])))
        gains = tuple(rng.uniform(0.6, 1.4, 3).tolist())
        which, edge = int(rng.integers(cutouts)), int(rng.integers(3))
        pastes.append(Paste(which, (a, -b, x, b, a, y), 0, edge, gains, shadow))
    mix = pasted(plan.mix, rng, cutouts) if plan.mix else None
    return dataclasses.replace(plan, pastes=tuple(pastes), mix=mix)


def by_cv2(
    plans: Sequence[AugmentPlan],
    refs: Sequence[ImageRef],
    store: ImageStore,
    cutouts: CutoutStore | None = None,
) -> np.ndarray:
    """Return (B, S, S, 3) uint8."""
    images = np.empty((len(plans), SIDE, SIDE, 3), np.uint8)
    renderer = Renderer(SIDE)
    for plan, image in zip(plans, images, strict=True):
        renderer.pixels(plan, store, refs, image, cutouts)
    return images


def by_torch(
    plans: Sequence[AugmentPlan], refs: Sequence[ImageRef], bank: Bank, device: str = "cpu"
) -> np.ndarray:
    """Return (B, S, S, 3) uint8."""
    renderer = TorchRenderer(bank, refs, imgsz=SIDE, device=torch.device(device))
    images = renderer.pixels(plans)
    assert images.shape == (len(plans), 3, SIDE, SIDE) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.device.type == device
    return images.permute(0, 2, 3, 1).cpu().numpy()


def seams(plans: Sequence[AugmentPlan], refs: Sequence[ImageRef], folder: Path) -> np.ndarray:
    """Return (B, S, S) bool: where another layer, or none, lies within two pixels."""
    slots = range(max(len(plan.layers) for plan in plans))
    folder.mkdir()
    flat = [np.full((r.height, r.width, 3), 50 * slot, np.uint8) for slot in slots for r in refs]
    flat_refs, store = made_of(flat, folder)
    shown = by_cv2([marked(plan, len(refs)) for plan in plans], flat_refs, store)
    around = np.ones((5, 5), np.uint8)
    return np.array(
        [cv2.morphologyEx(image[..., 0], cv2.MORPH_GRADIENT, around) > 0 for image in shown]
    )


def marked(plan: AugmentPlan, count: int) -> AugmentPlan:
    """Return the plan with a colour of its own for each layer: equal sources look different."""
    layers = [
        dataclasses.replace(layer, source=layer.source + count * slot)
        for slot, layer in enumerate(plan.layers)
    ]
    return dataclasses.replace(
        plan, layers=tuple(layers), mix=marked(plan.mix, count) if plan.mix else None
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [DeviceBank, TileBank])
def test_smooth_images_equal_the_cv2_renderers(
    tmp_path: Path, kind: type[Bank], device: str
) -> None:
    refs, store = made_of([smooth(i, *size) for i, size in enumerate(SIZES)], tmp_path)
    plans = plans_of(refs, PLAIN, 200)
    away = ~seams(plans, refs, tmp_path / "flat")
    assert away.mean() > 0.8
    bank = kind(Sources(store), torch.device(device))  # type: ignore[call-arg]
    found = by_torch(plans, refs, bank, device)
    difference = np.abs(found.astype(int) - by_cv2(plans, refs, store))
    assert difference[away].mean() <= 0.1  # of 255; the most that is allowed is 1
    assert np.quantile(difference[away], 0.999) <= 4
    assert difference.mean() <= 1  # seams and all


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [DeviceBank, TileBank])
def test_pasted_cutouts_equal_the_cv2_renderers(
    tmp_path: Path, kind: type[Bank], device: str
) -> None:
    refs, store = made_of([smooth(i, *size) for i, size in enumerate(SIZES)], tmp_path)
    cutouts, rng = PaintedCutouts(), np.random.default_rng(0)
    plain = plans_of(refs, PLAIN, 200)
    plans = [pasted(plan, rng, len(cutouts)) for plan in plain]
    away = ~seams(plain, refs, tmp_path / "flat")
    bank = kind(Sources(store, cutouts), torch.device(device))  # type: ignore[arg-type, call-arg]
    found = by_torch(plans, refs, bank, device)
    difference = np.abs(found.astype(int) - by_cv2(plans, refs, store, cutouts))  # type: ignore[arg-type]
    assert (by_cv2(plans, refs, store, cutouts) != by_cv2(plain, refs, store)).mean() > 0.2  # type: ignore[arg-type]
    assert difference[away].mean() <= 0.2
    assert np.quantile(difference[away], 0.999) <= 4


@pytest.mark.parametrize("device", DEVICES)
def test_colours_equal_the_cv2_renderers(tmp_path: Path, device: str) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    refs, store = made_of([smooth(0, SIDE, SIDE), noise, noise // 4 * 0 + 200], tmp_path)
    plans = plans_of(refs, HSV, 200)
    bank = DeviceBank(Sources(store), torch.device(device))
    difference = np.abs(
        by_torch(plans, refs, bank, device).astype(int) - by_cv2(plans, refs, store)
    )
    assert difference.mean() <= 0.2 and difference.max() <= 2  # allowed: 2 and 8
