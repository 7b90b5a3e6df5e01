"""The torch renderer shows what the cv2 renderer shows, from either bank, and waits for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hsrloop.data.bank import DeviceBank, ImageBank, TileBank, bank_bytes, bank_place
from hsrloop.data.dataset import ImageRef
from hsrloop.data.plan import AugmentPlan, AugmentSettings, draw_plan
from hsrloop.data.render import Renderer
from hsrloop.data.render_torch import TorchRenderer, _grouped
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


def by_cv2(plans: Sequence[AugmentPlan], refs: Sequence[ImageRef], store: ImageStore) -> np.ndarray:
    """Return (B, S, S, 3) uint8."""
    images = np.empty((len(plans), SIDE, SIDE, 3), np.uint8)
    renderer = Renderer(SIDE)
    for plan, image in zip(plans, images, strict=True):
        renderer.pixels(plan, store, refs, image)
    return images


def by_torch(
    plans: Sequence[AugmentPlan], refs: Sequence[ImageRef], bank: ImageBank, device: str = "cpu"
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
    tmp_path: Path, kind: type[ImageBank], device: str
) -> None:
    refs, store = made_of([smooth(i, *size) for i, size in enumerate(SIZES)], tmp_path)
    plans = plans_of(refs, PLAIN, 200)
    away = ~seams(plans, refs, tmp_path / "flat")
    assert away.mean() > 0.8
    bank = kind(store, torch.device(device))  # type: ignore[call-arg]
    found = by_torch(plans, refs, bank, device)
    difference = np.abs(found.astype(int) - by_cv2(plans, refs, store))
    assert difference[away].mean() <= 1
    assert np.quantile(difference[away], 0.999) <= 4
    assert difference.mean() <= 1  # seams and all
