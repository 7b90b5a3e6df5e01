"""A bias and SiLU in one pass over memory, on CUDA: `silu.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrloop.ops.nvrtc import Kernels, proved_kernels

SOURCE = Path(__file__).with_name("silu.cu")

# As in `numbers.cuh`.
WIDTH = 4
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# What rounding may do, relative to the norm.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

_DEEP = 4  # as in `silu.cu`
_THREADS = 256  # of a block, about
_MOST_CHANNELS = 1024 * WIDTH


class _Biased(ctypes.Structure):
    """What `bias_silu` is given; see `silu.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias")),
        ("outs", ctypes.c_void_p * 2),
        *((name, ctypes.c_int) for name in ("pixels", "channels", "width", "kind")),
    )


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to each channel of (B, C, H, W) numbers and apply SiLU, in place; return them."""
    kernels = silu_kernels(x.device)
    if kernels is not None and _suits(x, bias):
        _by(kernels["bias_silu"], x, bias, [x])
        return x
    return F.silu(x.add_(bias[:, None, None]), inplace=True)


def bias_silu_halves(x: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """Do the same and return both halves of the channels, for (B, C, H, W) numbers with C even."""
    kernels = silu_kernels(x.device)
    if kernels is None or not _suits(x, bias, parts=2):
        return bias_silu(x, bias).chunk(2, 1)
    outs = parts_like(x, 2)
    _by(kernels["bias_silu"], x, bias, outs)
    return outs


def parts_like(x: Tensor, parts: int) -> list[Tensor]:
    """Return new tensors in channels_last for as many parts of the channels of (B, C, H, W)."""
    images, channels, height, width = x.shape
    half = (images, channels // parts, height, width)
    return [
        torch.empty(half, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for _ in range(parts)
    ]


def silu_kernels(device: torch.device) -> Kernels | None:
    """Return what does it in one pass over memory; None where torch's operators have to."""
    return proved_kernels(SOURCE, device, _proves) if device.type == "cuda" else None


def takes(x: Tensor) -> bool:
    """Return whether kernels can take it: channels_last, a few channels in one piece."""
    return (
        x.dtype in KINDS
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and x.shape[1] % WIDTH == 0
        and x.shape[1] <= _MOST_CHANNELS
        and aligned(x)
    )


def aligned(tensor: Tensor) -> bool:
    """Return whether it begins where a thread may read its few numbers in one piece."""
    return tensor.data_ptr() % (WIDTH * tensor.element_size()) == 0


def _suits(x: Tensor, bias: Tensor, *, parts: int = 1) -> bool:
    fits = takes(x) and x.shape[1] % (parts * WIDTH) == 0
    return fits and bias.dtype is x.dtype and aligned(bias)


def _by(kernel: Callable[..., None], x: Tensor, bias: Tensor, outs: Sequence[Tensor]) -> None:
    """Do it with `silu.cu`."""
    images, channels, height, width = x.shape
    given = _Biased(
        x=x.data_ptr(),
        bias=bias.data_ptr(),
        outs=(ctypes.c_void_p * 2)(*(out.data_ptr() for out in outs)),
        pixels=images * height * width,
        channels=channels,
        width=channels // len(outs),
        kind=KINDS[x.dtype],
    )
    across = channels // WIDTH
    rows = max(1, _THREADS // across)
    blocks = -(-given.pixels // (rows * _DEEP))
    kernel((blocks, 1, 1), (across, rows, 1), x.device, given)


def _proves(kernels: Kernels, device: torch.device) -> bool:
    """Return whether it gives what torch's operators give on the CPU, but for rounding."""
    g = torch.Generator().manual_seed(0)
    numbers, bias = 4 * torch.randn(3, 16, 9, 7, generator=g), torch.rand(16, generator=g)
    for kind, tolerance in TOLERANCES.items():
        x, own = numbers.to(kind, memory_format=torch.channels_last), bias.to(kind)
        expected = F.silu(x.double() + own.double()[:, None, None])
        x, own = x.to(device, copy=True), own.to(device)
        halves = parts_like(x, 2)
        _by(kernels["bias_silu"], x, own, halves)
        _by(kernels["bias_silu"], x, own, [x])
        for found in (x, torch.cat(halves, 1)):
            if not bool((found.cpu().double() - expected).norm() <= tolerance * expected.norm()):
                return False
    return True
