"""Mixed precision, as far as a CPU can show it: autocast in half, scaled gradients, overflow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hsrloop.config import TrainConfig
from hsrloop.errors import DeviceError
from hsrloop.events import Note
from hsrloop.model.base import load_base
from hsrloop.model.yolo import forward_train
from hsrloop.records import DeviceInfo
from hsrloop.train import precision
from hsrloop.train.build import build_state
from hsrloop.train.precision import autocast_dtype, fp16_is_sound, set_kernels
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, Transaction, train_step
from tests.train.test_step import assert_same, make_batches, step_settings, weights_of

NAMES = ("cup", "can", "box")
CPU = torch.device("cpu")


@pytest.fixture
def half() -> tuple[TrainState, StepSettings]:
    """A state whose gradients are scaled, computing in half."""
    config = TrainConfig(batch=8, imgsz=64, model="yolov8n.yaml")
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    state = build_state(config, module, CPU, fresh_share=None, amp=True)
    settings = StepSettings(
        device=CPU, strides=(8, 16, 32), reg_max=16, amp=True, ema_decay=0.9, ema_tau=10.0
    )
    return state, settings


def test_steps_in_half_are_rarely_skipped(half: tuple[TrainState, StepSettings]) -> None:
    """Few steps: without hardware for it, half is slow. The GPU test below makes fifty."""
    state, settings = half
    for i in range(8):
        train_step(state, make_batches([4, 4], imgsz=32, seed=i), settings=settings, lr=0.002)
    assert state.mean_losses()["skipped_steps"] <= 4
    assert torch.isfinite(weights_of(state)).all()
    assert state.steps == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fifty_steps_in_half_on_a_gpu_skip_at_most_four() -> None:
    device = torch.device("cuda")
    config = TrainConfig(batch=8, imgsz=320, model="yolov8n.yaml")
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    state = build_state(config, module, device, fresh_share=None, amp=True)
    settings = StepSettings(
        device=device, strides=(8, 16, 32), reg_max=16, amp=True, ema_decay=0.9, ema_tau=10.0
    )
    for i in range(50):
        train_step(state, make_batches([4, 4], imgsz=320, seed=i), settings=settings, lr=0.002)
    assert state.mean_losses()["skipped_steps"] <= 4
    assert torch.isfinite(weights_of(state)).all()


def test_an_overflow_commits_the_position_and_nothing_else(
    half: tuple[TrainState, StepSettings],
) -> None:
    state, settings = half
    train_step(state, make_batches([8]), settings=settings, lr=0.002)
    weights, optimizer = weights_of(state), copy.deepcopy(state.optimizer.state_dict()["state"])
    averages = [p.clone() for p in state.ema.module.parameters()]
    scale = state.scaler.get_scale()
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1e30})
    batches = make_batches([8], seed=1)
    train_step(state, batches, settings=settings, lr=0.002)
    assert torch.equal(weights, weights_of(state))
    assert_same(optimizer, state.optimizer.state_dict()["state"])
    for before, now in zip(averages, state.ema.module.parameters(), strict=True):
        assert torch.equal(before, now)
    assert state.position == batches[-1].after and state.steps == 2
    assert state.mean_losses()["skipped_steps"] == 1
    assert state.scaler.get_scale() < 1e30 and scale > 0


def test_an_overflow_in_the_forward_leaves_batchnorm_and_average_whole(
    half: tuple[TrainState, StepSettings],
) -> None:
    state, settings = half
    transaction = Transaction(state)
    transaction.begin()
    buffers = [b.clone() for b in state.model.buffers()]
    first = next(state.model.parameters())
    with torch.no_grad():
        kept = first.clone()
        first.mul_(1e30)
    train_step(state, make_batches([8]), settings=settings, lr=0.002, transaction=transaction)
    with torch.no_grad():
        first.copy_(kept)
    assert state.mean_losses()["skipped_steps"] == 1
    for before, now in zip(buffers, state.model.buffers(), strict=True):
        assert torch.equal(before, now)
    assert all(torch.isfinite(p).all() for p in state.ema.module.state_dict().values())


def test_a_failure_after_unscaling_can_be_tried_again(
    half: tuple[TrainState, StepSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, settings = half
    transaction = Transaction(state)
    transaction.begin()
    before = copy.deepcopy(state.scaler.state_dict())

    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.utils, "clip_grad_norm_", fail)
        with pytest.raises(torch.OutOfMemoryError):
            train_step(state, make_batches([8]), settings=settings, lr=0.002)
    transaction.roll_back()
    assert state.scaler.state_dict() == before
    train_step(state, make_batches([8]), settings=settings, lr=0.002)
    assert state.steps == 1


def test_healthy_half_is_accepted_and_the_network_is_left_alone() -> None:
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    before = copy.deepcopy(module.state_dict())
    assert fp16_is_sound(module, CPU, lambda _: pytest.fail("nothing to say"))
    assert_same(dict(before), dict(module.state_dict()))
    assert all(p.grad is None for p in module.parameters())


def test_a_card_that_computes_nan_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, images: torch.Tensor) -> Any:
        raw = forward_train(module, images)
        factor = float("nan") if torch.is_autocast_enabled("cpu") else 1.0
        return type(raw)(raw.box_logits * factor, raw.class_logits * factor, raw.shapes)

    monkeypatch.setattr(precision, "forward_train", broken)
    said: list[Note] = []
    listen: Callable[[Any], None] = said.append
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    assert not fp16_is_sound(module, CPU, listen)
    assert [note.level for note in said] == ["warning"] and "wrong values in fp16" in said[0].text


def test_bf16_trains_without_scaling_and_as_float32_does() -> None:
    """Autocast to bfloat16 on the CPU; losses are those of float32, roughly."""
    ends = []
    for amp in (False, True):
        config = TrainConfig(batch=8, imgsz=64, model="yolov8n.yaml")
        module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
        state = build_state(config, module, CPU, fresh_share=None, amp=False)
        settings = step_settings(CPU, amp=amp, amp_dtype=torch.bfloat16)
        assert not state.scaler.is_enabled() and state.grad_scale == 1.0
        for seed in range(3):
            train_step(state, make_batches([4, 4], imgsz=32, seed=seed), settings=settings, lr=1e-3)
        ends.append(state.mean_losses())
        assert all(p.dtype == torch.float32 for p in state.model.parameters())
    plain, half = ends
    assert half["skipped_steps"] == 0
    for name, tolerance in (("box_loss", 0.2), ("cls_loss", 0.05), ("dfl_loss", 0.2)):
        assert half[name] == pytest.approx(plain[name], rel=tolerance)
        assert half[name] != plain[name], "nothing was computed in bfloat16"


def card(**has: Any) -> DeviceInfo:
    return DeviceInfo(kind="cuda", name="Card", **has)


def test_the_type_of_mixed_precision() -> None:
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module

    def chosen(info: DeviceInfo, device: str = "cuda", **settings: Any) -> torch.dtype | None:
        config = TrainConfig(**settings)
        return autocast_dtype(config, info, module, torch.device(device), lambda _: None)

    assert chosen(card(bf16=True), amp_dtype="bf16") is torch.bfloat16
    assert chosen(card(bf16=True), amp=False, amp_dtype="bf16") is None
    assert chosen(card(), device="cpu") is None
    with pytest.raises(DeviceError, match="Card has no hardware for it .* Use --amp-dtype fp16"):
        chosen(card(), amp_dtype="bf16")


def test_beside_a_gpu_the_host_computes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, threads = torch.backends.cudnn, list[int]()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    try:
        with cudnn.flags(enabled=True):
            set_kernels(CPU, deterministic=False)
            assert not threads
            set_kernels(torch.device("cuda", 0), deterministic=False)
            assert threads == [1] and cudnn.benchmark
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
