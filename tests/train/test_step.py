"""How a batch is split changes nothing, and a failed step leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hsrloop.config import TrainConfig
from hsrloop.model.base import load_base
from hsrloop.records import Batch, Position
from hsrloop.train import step as step_module
from hsrloop.train.build import build_state
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, Transaction, train_step
from tests.kernels import DEVICES

NAMES = ("cup", "can", "box")
CPU = torch.device("cpu")


def make_batches(sizes: list[int], *, imgsz: int = 64, seed: int = 0) -> list[Batch]:
    """The same sum(sizes) images with boxes, split as `sizes` says; some images have no box."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    images = torch.randint(0, 256, (total, 3, imgsz, imgsz), generator=generator).to(torch.uint8)
    counts = [i % 4 for i in range(total)]
    boxes = [torch.rand(n, 4, generator=generator) * 0.4 + 0.3 for n in counts]
    labels = [torch.randint(0, len(NAMES), (n,), generator=generator) for n in counts]
    batches, start = [], 0
    for size in sizes:
        mine = range(start, start + size)
        index = torch.cat([torch.full((counts[i],), i - start) for i in mine]).long()
        batches.append(
            Batch(
                images=images[start : start + size].contiguous(memory_format=torch.channels_last),
                boxes_cxcywh=torch.cat([boxes[i] for i in mine]),
                labels=torch.cat([labels[i] for i in mine]),
                image_index=index,
                after=Position(0, start + size),
                ends_step=start + size == total,
            )
        )
        start += size
    return batches


def step_settings(device: torch.device, **changes: Any) -> StepSettings:
    """In float32, with an EMA that moves fast; `changes` on top."""
    fixed: dict[str, Any] = {"strides": (8, 16, 32), "reg_max": 16, "amp": False}
    return StepSettings(device=device, **{**fixed, "ema_decay": 0.9, "ema_tau": 10.0, **changes})


def make_state(
    dtype: torch.dtype = torch.float32, *, frozen_norms: bool = True, **changes: object
) -> tuple[TrainState, StepSettings]:
    config = TrainConfig(batch=8, imgsz=64, model="yolov8n.yaml").replace(**changes)
    base = load_base("yolov8n.yaml", names=NAMES, seed=0)
    state = build_state(config, base.module, CPU, fresh_share=None, amp=False)
    state.model.to(dtype)
    state.ema.module.to(dtype)
    state.optimizer.load_state_dict(state.optimizer.state_dict())  # casts its tensors likewise
    if frozen_norms:
        for module in state.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    return state, step_settings(CPU, dtype=dtype)


def weights_of(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def gradient_of(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The clipped gradient that the optimizer would see."""
    state, settings = make_state(optimizer="SGD")
    seen: list[torch.Tensor] = []

    def record(parameters: list[torch.nn.Parameter], _: float) -> torch.Tensor:
        seen.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return torch.tensor(1.0)

    monkeypatch.setattr(step_module.nn.utils, "clip_grad_norm_", record)
    train_step(state, make_batches(sizes), settings=settings, lr=0.0)
    return seen[0].clone()


@pytest.mark.parametrize("sizes", [[4, 4], [1] * 8, [5, 3], [2, 1, 4, 1]])
def test_the_gradient_does_not_depend_on_the_split(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradient_of([8], monkeypatch)
    parts = gradient_of(sizes, monkeypatch)
    assert whole.norm() > 0
    assert (whole - parts).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_images_in_half_are_what_autocast_would_make_of_them(
    kind: torch.dtype, device: str
) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    where = torch.device(device)
    given = step_module.to_input(images, where, kind)
    assert given.dtype == kind and given.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(given, step_module.to_input(images, where).to(kind))


def test_twenty_steps_of_sgd_do_not_depend_on_the_split() -> None:
    ends = []
    for sizes in ([8], [3, 5]):
        state, settings = make_state(torch.float64, optimizer="SGD")
        for i in range(20):
            train_step(state, make_batches(sizes, seed=i), settings=settings, lr=0.01)
        ends.append(weights_of(state))
    start, _ = make_state(torch.float64, optimizer="SGD")
    moved = (ends[0] - weights_of(start)).norm()
    assert moved > 1e-2
    assert (ends[0] - ends[1]).norm() / moved < 1e-6


def test_the_gradient_equals_that_of_the_loss_as_the_peer_defines_it() -> None:
    """batch / S times the un-normalised sum: the same as its per-batch normalisation."""
    from ultralytics.cfg import get_cfg
    from ultralytics.utils.loss import v8DetectionLoss

    state, settings = make_state(optimizer="SGD", momentum=0.0, weight_decay=0.0)
    (batch,) = make_batches([8])
    peer = copy.deepcopy(state.model)
    peer.args = get_cfg()
    for theirs, ours in zip(peer.parameters(), state.model.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    inputs = step_module.to_input(batch.images, CPU)
    loss, items = v8DetectionLoss(peer)(
        peer(inputs),
        {
            "batch_idx": batch.image_index.float(),
            "cls": batch.labels.float(),
            "bboxes": batch.boxes_cxcywh,
        },
    )
    loss.sum().backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), 10.0)
    before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    train_step(state, [batch], settings=settings, lr=1.0)
    for (name, ours), theirs in zip(state.model.named_parameters(), peer.parameters(), strict=True):
        if theirs.grad is None:
            assert torch.equal(before[name], ours)
            continue
        torch.testing.assert_close(before[name] - ours.detach(), theirs.grad, rtol=2e-3, atol=1e-6)
    means = state.mean_losses()
    assert [means[n] for n in ("box_loss", "cls_loss", "dfl_loss")] == pytest.approx(
        [float(items[n]) for n in ("box_loss", "cls_loss", "dfl_loss")], rel=1e-4
    )


def fail_at(call: int, function: Callable[..., object]) -> Callable[..., object]:
    calls = 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("injected")
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize("where", ["forward_train", "detection_loss"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_step_leaves_no_trace(
    where: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, settings = make_state(frozen_norms=False)
    transaction = Transaction(state)
    train_step(state, make_batches([4, 4]), settings=settings, lr=0.01)
    before = copy.deepcopy(state.to_payload())
    transaction.begin()
    with monkeypatch.context() as patched:
        patched.setattr(step_module, where, fail_at(call, getattr(step_module, where)))
        with pytest.raises(torch.OutOfMemoryError):
            train_step(state, make_batches([4, 4], seed=1), settings=settings, lr=0.01)
    transaction.roll_back()
    assert_same(before, state.to_payload())
    assert all(p.grad is None for p in state.model.parameters())


def assert_same(a: object, b: object, path: str = "") -> None:
    """Equal to the last bit, tensors included."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple) and len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def test_a_step_without_any_box_trains_the_background() -> None:
    state, settings = make_state()
    (batch,) = make_batches([4])
    empty = Batch(
        images=batch.images,
        boxes_cxcywh=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        image_index=torch.zeros(0, dtype=torch.int64),
        after=batch.after,
        ends_step=True,
    )
    before = weights_of(state)
    train_step(state, [empty], settings=settings, lr=0.01)
    assert torch.isfinite(weights_of(state)).all()
    assert not torch.equal(before, weights_of(state))
    losses = state.mean_losses()
    assert losses["cls_loss"] > 0 and losses["box_loss"] == 0 and losses["dfl_loss"] == 0
