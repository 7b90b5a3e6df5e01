"""The torch renderer shows what the cv2 renderer shows, from either bank, and waits for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch

from hsrloop.bench.counting import synchronisations
from hsrloop.data.ahead import arriving
from hsrloop.data.pixels.bank import Bank, DeviceBank, Sources, TileBank, bank_place
from hsrloop.data.pixels.render import Renderer
from hsrloop.data.pixels.render_torch import TorchRenderer
from hsrloop.data.pixels.store import GREY, ImageStore
from hsrloop.data.plan import AugmentPlan, AugmentSettings, Paste, draw_plan, plan_labels
from hsrloop.data.sets.dataset import ImageRef
from tests.kernels import DEVICES

SIDE = 160
SIZES = ((240, 320), (320, 200), (160, 160), (40, 160), (97, 131), (480, 333))
ALL = AugmentSettings(
    hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, degrees=10, translate=0.1, scale=0.5, shear=5,
    flipud=0.3, fliplr=0.5, mosaic=0.8, mixup=0.3,
)  # fmt: skip
PLAIN = dataclasses.replace(ALL, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0)
HSV = AugmentSettings(hsv_h=0.5, hsv_s=0.7, hsv_v=0.4)


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

    def level(self, index: int, level: int) -> np.ndarray:
        image = self.images[index]
        return image[:: 2**level, :: 2**level]

    def level_for(self, index: int, long_px: float) -> int:
        return int(long_px < 50)

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
    cutouts: Any = None,
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


class Case(NamedTuple):
    """200 random plans over smooth images, HSV off, and what the cv2 renderer makes of them."""

    refs: tuple[ImageRef, ...]
    store: ImageStore
    cutouts: PaintedCutouts
    plain: list[AugmentPlan]
    with_pastes: list[AugmentPlan]
    away: np.ndarray  # (200, S, S) bool: pixels away from seams
    plain_by_cv2: np.ndarray
    pastes_by_cv2: np.ndarray


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    refs, store = made_of([smooth(i, *size) for i, size in enumerate(SIZES)], folder)
    cutouts, rng = PaintedCutouts(), np.random.default_rng(0)
    plain = plans_of(refs, PLAIN, 200)
    with_pastes = [pasted(plan, rng, len(cutouts)) for plan in plain]
    return Case(
        refs,
        store,
        cutouts,
        plain,
        with_pastes,
        ~seams(plain, refs, folder / "flat"),
        by_cv2(plain, refs, store),
        by_cv2(with_pastes, refs, store, cutouts),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [DeviceBank, TileBank])
def test_smooth_images_equal_the_cv2_renderers(
    case: Case, kind: Callable[..., Bank], device: str
) -> None:
    assert case.away.mean() > 0.8
    bank = kind(Sources(case.store), torch.device(device))
    found = by_torch(case.plain, case.refs, bank, device)
    difference = np.abs(found.astype(int) - case.plain_by_cv2)
    assert difference[case.away].mean() <= 0.1  # of 255; measured 0.006
    assert np.quantile(difference[case.away], 0.999) <= 4  # measured 1
    assert difference.mean() <= 0.2  # seams and all; measured 0.025


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [DeviceBank, TileBank])
def test_pasted_cutouts_equal_the_cv2_renderers(
    case: Case, kind: Callable[..., Bank], device: str
) -> None:
    assert (case.pastes_by_cv2 != case.plain_by_cv2).mean() > 0.05
    bank = kind(Sources(case.store, case.cutouts), torch.device(device))
    found = by_torch(case.with_pastes, case.refs, bank, device)
    difference = np.abs(found.astype(int) - case.pastes_by_cv2)
    changed = case.away & (case.pastes_by_cv2 != case.plain_by_cv2).any(axis=-1)
    assert difference[changed].mean() <= 0.2
    assert np.quantile(difference[changed], 0.999) <= 4


@pytest.mark.parametrize("device", DEVICES)
def test_colours_equal_the_cv2_renderers(tmp_path: Path, device: str) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    refs, store = made_of([smooth(0, SIDE, SIDE), noise, np.full_like(noise, 200)], tmp_path)
    plans = plans_of(refs, HSV, 200)
    bank = DeviceBank(Sources(store), torch.device(device))
    difference = np.abs(
        by_torch(plans, refs, bank, device).astype(int) - by_cv2(plans, refs, store)
    )
    assert difference.mean() <= 0.01 and difference.max() <= 1  # allowed: 2 and 8


@pytest.mark.parametrize("kind", [DeviceBank, TileBank])
def test_the_size_of_chunks_changes_no_byte(tmp_path: Path, kind: Callable[..., Bank]) -> None:
    refs, store = made_of([smooth(i, *size) for i, size in enumerate(SIZES)], tmp_path)
    cutouts, rng = PaintedCutouts(), np.random.default_rng(1)
    plans = [pasted(plan, rng, len(cutouts)) for plan in plans_of(refs, ALL, 12)]
    device = torch.device("cpu")
    bank = kind(Sources(store, cutouts), device)

    def render(plans: Sequence[AugmentPlan], scratch_bytes: int) -> torch.Tensor:
        renderer = TorchRenderer(bank, refs, imgsz=SIDE, device=device, scratch_bytes=scratch_bytes)
        return renderer.pixels(plans)

    whole = render(plans, 2**30)
    assert torch.equal(whole, render(plans, 0))
    assert torch.equal(whole, torch.cat([render([plan], 2**30) for plan in plans]))


@pytest.mark.parametrize("settings", [PLAIN, ALL])
def test_nothing_depends_on_what_the_device_holds(
    tmp_path: Path, settings: AugmentSettings
) -> None:
    """Tensors without content: whatever asks for a value, or for its size, fails on them."""
    refs, store = made_of([smooth(i, *size) for i, size in enumerate(SIZES)], tmp_path)
    cutouts, rng, device = PaintedCutouts(), np.random.default_rng(1), torch.device("meta")
    plans = [pasted(plan, rng, len(cutouts)) for plan in plans_of(refs, settings, 12)]
    assert any(plan.mix for plan in plans)
    for kind in (DeviceBank, TileBank):
        bank = kind(Sources(store, cutouts), device)
        renderer = TorchRenderer(bank, refs, imgsz=SIDE, device=device)
        assert renderer.pixels(plans).shape == (12, 3, SIDE, SIDE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [DeviceBank, TileBank])
def test_the_host_waits_for_nothing_and_two_runs_are_bit_equal(
    tmp_path: Path, kind: Callable[..., Bank]
) -> None:
    refs, store = made_of([smooth(i, *size) for i, size in enumerate(SIZES)], tmp_path)
    cutouts, rng, device = PaintedCutouts(), np.random.default_rng(1), torch.device("cuda")
    plans = [pasted(plan, rng, len(cutouts)) for plan in plans_of(refs, ALL, 32)]
    bank = kind(Sources(store, cutouts), device)
    renderer = TorchRenderer(bank, refs, imgsz=SIDE, device=device)
    first = renderer.pixels(plans)
    torch.cuda.synchronize()
    with synchronisations(device) as waits:
        made = ((renderer.pixels(plans), i) for i in range(4))
        streamed = list(arriving(made, device))
    assert not waits
    assert [rest for _, rest in streamed] == [0, 1, 2, 3]
    assert all(torch.equal(images, first) for images, _ in streamed)


@pytest.mark.parametrize("name", ["translate", "scale", "flipud", "fliplr", "mosaic"])
def test_painted_rectangles_lie_where_their_labels_say(tmp_path: Path, name: str) -> None:
    boxes = [(40, 30, 150, 120), (20, 60, 130, 250), (30, 40, 110, 90), (10, 5, 120, 30)]
    images = [np.zeros((*size, 3), np.uint8) for size in SIZES[:4]]
    for image, (x0, y0, x1, y1) in zip(images, boxes, strict=True):
        image[y0:y1, x0:x1] = 255
    refs, store = made_of(images, tmp_path)
    rows = [
        np.array([[(x0 + x1) / 2 / r.width, (y0 + y1) / 2 / r.height, (x1 - x0) / r.width,
                   (y1 - y0) / r.height]], np.float32)
        for r, (x0, y0, x1, y1) in zip(refs, boxes, strict=True)
    ]  # fmt: skip
    refs = tuple(
        dataclasses.replace(ref, boxes_cxcywh=row) for ref, row in zip(refs, rows, strict=True)
    )
    settings = AugmentSettings(**{name: 0.4 if name in ("translate", "scale") else 1.0})
    plans = [
        AugmentPlan((layer,), plan.zoom)  # one source at a time: each box is found alone
        for plan in plans_of(refs, settings, 40)
        for layer in plan.layers
    ]
    found = by_torch(plans, refs, DeviceBank(Sources(store), torch.device("cpu")))
    checked = 0
    for plan, image in zip(plans, found, strict=True):
        expected, _, _ = plan_labels(plan, refs, SIDE)
        ys, xs = np.where(image[..., 0] > GREY + (255 - GREY) // 2)
        if len(expected):
            painted = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            np.testing.assert_allclose(painted, expected[0], atol=1.0)
            checked += 1
    assert checked >= 30


def test_a_mosaic_leaves_no_gap_and_no_seam(tmp_path: Path) -> None:
    """White sources, turned, show one white area: no grey line inside, nothing between."""
    white = [np.full((*size, 3), 255, np.uint8) for size in SIZES[:3]]
    refs, store = made_of(white, tmp_path)
    plans = plans_of(refs, AugmentSettings(mosaic=1.0, degrees=20.0, scale=0.5), 40)
    for image in by_torch(plans, refs, DeviceBank(Sources(store), torch.device("cpu"))):
        assert set(np.unique(image)) <= {GREY, 255}
        grey = (image[..., 0] == GREY).astype(np.uint8)
        inside = cv2.morphologyEx(grey, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) < grey
        _, _, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
        low, high = stats[1:, :2], stats[1:, :2] + stats[1:, 2:4]
        at_frame = (low == 0).any(axis=1) | (high == SIDE).any(axis=1)  # a wedge of the outside
        assert (at_frame | (stats[1:, cv2.CC_STAT_AREA] <= 3)).all()  # corners of it


def test_a_plan_without_layers_is_grey(tmp_path: Path) -> None:
    refs, store = made_of([smooth(0, 40, 40)], tmp_path)
    for kind in (DeviceBank, TileBank):
        bank = kind(Sources(store), torch.device("cpu"))
        assert (by_torch([AugmentPlan((), 1.0)], refs, bank) == GREY).all()


NEEDS = {"bank_bytes": 5 << 30, "scratch_bytes": 1 << 30, "ram_bytes": 6 << 30}


@pytest.mark.parametrize(
    ("gpu_gib", "ram_gib", "place"),
    [
        (80, 64, "device"),
        (24, 0, "device"),  # 6 GiB is a quarter of it
        (23, 64, "pinned"),
        (4, 6, "pinned"),
        (4, 5, "cv2"),
        (3, 64, "cv2"),
        (0, 64, "cv2"),
    ],
)
def test_sources_lie_where_they_fit(gpu_gib: int, ram_gib: int, place: str) -> None:
    free = {"gpu_free_bytes": gpu_gib << 30, "ram_free_bytes": ram_gib << 30}
    assert bank_place(**NEEDS, **free) == place


def test_less_memory_never_steps_up() -> None:
    order = ("cv2", "pinned", "device")
    grid = [i << 28 for i in range(0, 400, 7)]
    for ram in grid[::8]:
        places = [
            order.index(bank_place(**NEEDS, gpu_free_bytes=gpu, ram_free_bytes=ram)) for gpu in grid
        ]
        assert places == sorted(places)
    huge = {**NEEDS, "bank_bytes": 7 << 30}  # more pixels than an int32 counts
    assert bank_place(**huge, gpu_free_bytes=1 << 40, ram_free_bytes=1 << 40) == "pinned"
