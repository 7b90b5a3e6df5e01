"""Numeric settings of the device: which kernels, and whether fp16 can be trusted on this card."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hsrloop.config import TrainConfig
from hsrloop.errors import DeviceError
from hsrloop.events import Event, Note
from hsrloop.model.yolo import forward_train
from hsrloop.records import DeviceInfo
from hsrloop.train.step import to_input

PROBE_PX = 128  # side of the probe image: large enough for every layer, small enough to be free
KERNELS_TRIED = (
    4  # of those that cuDNN names first, for each convolution (a guess): each costs time
)
TOLERANCE = 0.1  # relative, of the logits; broken cards give NaN (a guess)
PROBE_SCALE = 1024.0  # of the probe's loss: unscaled, fp16 gradients would vanish


def set_kernels(device: torch.device, *, deterministic: bool) -> None:
    """Choose cuDNN autotuning (shapes are static) or deterministic kernels, and few threads beside.

    TF32 serves convolutions only: decoding boxes is a matrix product that needs float32.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.benchmark_limit = KERNELS_TRIED
    torch.use_deterministic_algorithms(deterministic)
    # Nothing here reads what nothing wrote (tested); filling it is another pass over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.cuda.set_device(device)
    # Little is left to the host, and a second thread waits busily for more of it; see `threads`.
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False  # as by default, but not in every container


@contextmanager
def untuned(*, when: bool = True) -> Iterator[None]:
    """Do not look for the fastest kernels meanwhile, if `when`.

    For sizes that are met only now and then: looking takes seconds for each.
    """
    cudnn = torch.backends.cudnn
    if not when:
        yield
        return
    with cudnn.flags(enabled=True, benchmark=False, deterministic=cudnn.deterministic):
        yield


def autocast_dtype(
    config: TrainConfig,
    info: DeviceInfo,
    module: nn.Module,
    device: torch.device,
    emit: Callable[[Event], None],
) -> torch.dtype | None:
    """Return the type of mixed precision; None: everything is computed in float32.

    Raises:
        DeviceError: bf16 is asked for, and the card has no hardware for it.
    """
    if not config.amp or device.type != "cuda":
        return None
    if config.amp_dtype == "fp16":
        return torch.float16 if fp16_is_sound(module, device, emit) else None
    if not info.bf16:
        raise DeviceError(
            f"amp_dtype is bf16, but {info.name} has no hardware for it (RTX 30 and newer do). "
            "Use --amp-dtype fp16."
        )
    return torch.bfloat16


def fp16_is_sound(module: nn.Module, device: torch.device, emit: Callable[[Event], None]) -> bool:
    """Compare one fp16 forward and backward with float32; say so when fp16 cannot be used.

    GTX 16xx cards compute NaN in fp16 convolutions. The module comes back as it was: same weights
    and buffers, no gradients, on the CPU or wherever it stood.
    """
    probe = place(copy.deepcopy(module), device).train()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, PROBE_PX, PROBE_PX), generator=generator)
    images = to_input(noise.to(torch.uint8), device)
    logits = []
    finite = True
    for half in (False, True):
        probe.zero_grad(set_to_none=True)
        with untuned():
            with torch.autocast(device.type, torch.float16, enabled=half):
                raw = forward_train(probe, images)
            loss = raw.class_logits.float().mean() + raw.box_logits.float().mean()
            torch.autograd.backward(PROBE_SCALE * loss)
        gradients = [p.grad for p in probe.parameters() if p.grad is not None]
        finite = finite and all(bool(torch.isfinite(g).all()) for g in gradients)
        logits.append(raw.class_logits.detach().float())
    sound = finite and _close(*logits)
    if not sound:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        text = f"{name} computes wrong values in fp16: mixed precision is off, float32 is used"
        emit(Note(text=text, level="warning"))
    return sound


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move `module` to `device`, its weights in channels_last; return it."""
    return module.to(device).to(memory_format=torch.channels_last)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not bool(torch.isfinite(b).all()):
        return False
    return bool((a - b).norm() <= TOLERANCE * a.norm() + 1e-6)
