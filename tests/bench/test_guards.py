"""What training and validation ask of a GPU, counted: no clock, so no busy machine can fail it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hsrloop.bench.counting import DeviceWatch
from hsrloop.config import TrainConfig
from hsrloop.data.pixels.bank import DeviceBank, Sources, TileBank
from hsrloop.data.pixels.render import Renderer
from hsrloop.data.pixels.render_torch import TorchRenderer
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.stream import TrainStream
from hsrloop.data.val_loader import ValLoader
from hsrloop.model.base import load_base
from hsrloop.model.yolo import build, head, strides
from hsrloop.train.build import build_state
from hsrloop.train.detector import Detector
from hsrloop.train.evaluate import evaluate
from hsrloop.train.state import TrainState
from hsrloop.train.step import (
    StepSettings,
    Transaction,
    forward_backward,
    to_input,
    to_targets,
    train_step,
)
from tests.train.test_step import NAMES, make_batches

CPU = torch.device("cpu")


def resident(state: TrainState, *more: Tensor) -> Iterator[Tensor]:
    """Everything of a run that lies on the device."""
    for module in (state.model, state.ema.module):
        yield from module.parameters()
        yield from module.buffers()
    for entry in state.optimizer.state.values():
        yield from (value for value in entry.values() if isinstance(value, Tensor))
    yield state.loss_sums
    yield from more


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("amp", [False, True])
def test_a_steady_step_waits_for_nothing_and_sends_each_batch_in_two_copies(
    amp: bool, optimizer: str
) -> None:
    config = TrainConfig(batch=8, imgsz=64, model="yolov8n.yaml", optimizer=optimizer)
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    state = build_state(config, module, CPU, fresh_share=None, amp=amp)
    settings = StepSettings(
        device=CPU, strides=(8, 16, 32), reg_max=16, amp=amp, ema_decay=0.9, ema_tau=10.0
    )
    transaction = Transaction(state)

    def step(seed: int) -> None:
        transaction.begin()
        batches = make_batches([4, 4], imgsz=64, seed=seed)
        train_step(state, batches, settings=settings, lr=1e-3, transaction=transaction)

    step(0)  # the scaler makes its tensors
    scale = [state.scaler._scale, state.scaler._growth_tracker] if amp else []
    with DeviceWatch(CPU, resident(state, *transaction.shadow, *scale)) as watch:
        step(1)
    assert not watch.waits and not watch.mixed
    assert watch.sent == 2 * 2, "of each micro-batch the images and the targets"
    assert watch.kernels["convolution"] == 2 * 63, "the whole network was watched"
    with DeviceWatch(CPU, resident(state, *scale)) as network:
        for batch in make_batches([4, 4], imgsz=64, seed=1):
            forward_backward(state, batch, settings)
    added = sum(watch.kernels.values()) - sum(network.kernels.values())
    assert added < 100, "clipping, optimizer, averages and what guards them"


class _Sends(TorchFunctionMode):
    """Writes down whether what is sent to a device lets the host go on."""

    def __init__(self) -> None:
        super().__init__()
        self.free: list[bool] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and any(isinstance(arg, torch.device) for arg in args[1:]):
            self.free.append(bool(kwargs.get("non_blocking")))
        return func(*args, **kwargs)


def test_a_batch_is_sent_without_waiting_for_it() -> None:
    settings = StepSettings(
        device=CPU, strides=(8, 16, 32), reg_max=16, amp=False, ema_decay=0.9, ema_tau=10.0
    )
    (batch,) = make_batches([4], imgsz=64, seed=0)
    with _Sends() as sends:
        to_input(batch.images, CPU)
        to_targets(batch, settings)
    assert sends.free == [True, True]


@pytest.mark.parametrize("batch", [2, 5])
def test_a_validation_waits_once_however_long_it_is(tiny_dataset: Path, batch: int) -> None:
    refs = load_dataset(tiny_dataset).val
    loader = ValLoader(refs, ImageStore(refs, imgsz=64), batch=batch, prefetch=False)
    module = build("yolov8n.yaml", names=NAMES, seed=0)
    with DeviceWatch(CPU) as watch:
        evaluate(module, loader, names=NAMES, device=CPU)
    assert watch.waits == {"cpu": 1} and not watch.mixed
    assert watch.kernels["conv2d"] == 63 * len(loader), "the whole network was watched"


def test_the_strides_are_known_without_asking_the_device() -> None:
    module = build("yolov8n.yaml", names=NAMES, seed=0)
    head(module).stride = head(module).stride.clone()  # moves to a GPU with the network
    with DeviceWatch(CPU, [head(module).stride]) as watch:
        assert strides(module) == (8, 16, 32)
    assert not watch.waits


@pytest.fixture
def mosaics(tiny_dataset: Path) -> Any:
    """The tiny set's references, its store, and plans of four sources without mixup."""
    refs = load_dataset(tiny_dataset).train
    config = TrainConfig(imgsz=64, mosaic=1.0, mixup=0.0)
    stream = TrainStream.of(refs, config)
    plans = [stream.plan(0, i, mosaic=True) for i in range(6)]
    return refs, ImageStore(refs, imgsz=64), plans


def test_opencv_interpolates_once_for_each_source_and_no_pixel_twice(
    mosaics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, store, plans = mosaics
    for index in range(len(refs)):
        store[index]  # decoding resizes, rendering must not
    warped: list[int] = []
    warp = cv2.warpAffine

    def counted(source: Any, matrix: Any, size: tuple[int, int], **more: Any) -> Any:
        warped.append(size[0] * size[1])
        return warp(source, matrix, size, **more)

    store = ImageStore(refs, imgsz=64, cache="ram", threads=1)
    monkeypatch.setattr(cv2, "warpAffine", counted)
    for name in ("remap", "resize", "warpPerspective"):
        monkeypatch.setattr(cv2, name, _forbidden(name))
    renderer, out = Renderer(64), np.empty((64, 64, 3), np.uint8)
    for plan in plans:
        warped.clear()
        renderer.pixels(plan, store, refs, out)
        assert 1 <= len(warped) <= len(plan.layers)
        # Bounding boxes of slightly turned tiles overlap a little.
        assert sum(warped) <= 1.7 * 64 * 64
    store.close()


def _forbidden(name: str) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"cv2.{name} while rendering")

    return call


@pytest.mark.parametrize("kind", [DeviceBank, TileBank])
def test_torch_interpolates_once_for_each_image_and_sends_one_table(
    mosaics: Any, kind: type
) -> None:
    refs, store, plans = mosaics
    bank = kind(Sources(store), CPU)
    renderer = TorchRenderer(bank, refs, imgsz=64, device=CPU)
    renderer.pixels(plans)
    held = [renderer._x, renderer._y, *([bank._pixels] if kind is DeviceBank else [])]
    with DeviceWatch(CPU, held) as watch:
        renderer.pixels(plans)
    assert not watch.waits and not watch.mixed
    # Twelve numbers of the layer that each pixel shows, then the four taps of one interpolation:
    # for six images of four sources each.
    assert watch.kernels["index_select"] == 12 + 4
    assert watch.sent == (1 if kind is DeviceBank else 2), "the plans' numbers, and tiles"


def test_the_cache_holds_the_images_at_their_stored_size_and_nothing_else(
    tiny_dataset: Path,
) -> None:
    refs = load_dataset(tiny_dataset).train
    with_cache = ImageStore(refs, imgsz=64, cache="ram", threads=1)
    assert with_cache.cached_bytes == sum(with_cache[i].nbytes for i in range(len(refs)))
    assert with_cache.cached_bytes <= len(refs) * 3 * 64 * 64
    memory = with_cache[0]
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    assert memory.nbytes == with_cache.cached_bytes, "what they lie in"
    with_cache.close()


def test_a_validation_batch_is_sent_once(tiny_dataset: Path) -> None:
    refs = load_dataset(tiny_dataset).val
    loader = ValLoader(refs, ImageStore(refs, imgsz=64), batch=4, prefetch=False)
    detector = Detector.of(build("yolov8n.yaml", names=NAMES, seed=0), CPU, half=False)
    sent = 0
    for batch in loader:
        with DeviceWatch(CPU, detector.module.parameters()) as watch:
            detector.find(batch.images)
        sent += watch.sent
    assert sent == len(loader)
