"""SiLU together with what comes before it, in one pass over memory on CUDA.

Forward that is a bias. Backward it is BatchNorm's output, which was not kept: it follows from its
input.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrloop.ops.nvrtc import Kernels, proved_kernels

SOURCE = Path(__file__).with_name("silu.cu")

# As in `silu.cu`.
_WIDTH = 4
_DEEP = 4
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TENSORS = ("x", "grad", "out", "mean", "invstd", "weight", "bias")

_THREADS = 256  # of a block, about
_MOST_CHANNELS = 1024 * _WIDTH
_aten = torch.ops.aten


class _Biased(ctypes.Structure):
    """What `bias_silu` is given; see `silu.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias")),
        *((name, ctypes.c_int) for name in ("pixels", "channels", "kind")),
    )


class _Given(ctypes.Structure):
    """What `silu_backward` is given; see `silu.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int) for name in ("pixels", "channels", "pitch", "kind")),
    )


@dataclass(frozen=True, slots=True)
class Normed:
    """What BatchNorm did to a batch.

    Args:
        x: (B, C, H, W) its input.
        weight, bias, mean, invstd: (C,).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    invstd: Tensor
    eps: float

    @property
    def output(self) -> Tensor:
        """What it returned."""
        x, weight, bias, mean, invstd = self.x, self.weight, self.bias, self.mean, self.invstd
        if x.is_cuda:
            return torch.batch_norm_elemt(x, weight, bias, mean, invstd, self.eps)
        scale = invstd * weight
        shift = torch.addcmul(bias, mean, scale, value=-1)
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to each channel of (B, C, H, W) numbers and apply SiLU, in place; return them."""
    kernels = silu_kernels(x.device)
    if kernels is not None and _takes(x) and bias.dtype is x.dtype and _aligned(bias):
        _add_and_apply(kernels["bias_silu"], x, bias)
        return x
    return F.silu(x.add_(bias[:, None, None]), inplace=True)


def silu_backward(grad: Tensor, normed: Normed) -> Tensor:
    """Return the gradient by BatchNorm's output, given that by what SiLU made of it."""
    kernels = silu_kernels(grad.device)
    if kernels is not None and _suits(grad, normed):
        return _by(kernels["silu_backward"], grad, normed)
    found = normed.output
    _aten.silu_backward.grad_input(grad, found, grad_input=found)
    return found


def silu_kernels(device: torch.device) -> Kernels | None:
    """Return what does both in one pass over memory; None where torch's operators have to."""
    return proved_kernels(SOURCE, device, _proves) if device.type == "cuda" else None


def _suits(grad: Tensor, normed: Normed) -> bool:
    """Return whether the kernel can take these."""
    numbers = normed.weight, normed.bias, normed.mean, normed.invstd
    return (
        _takes(normed.x)
        and grad.dtype is normed.x.dtype
        and all(own.dtype is torch.float32 and own.is_contiguous() for own in numbers)
        and all(map(_aligned, numbers))
    )


def _takes(x: Tensor) -> bool:
    """Return whether a kernel can take it: channels_last, a few channels in one piece."""
    return (
        x.dtype in _KINDS
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and x.shape[1] % _WIDTH == 0
        and x.shape[1] <= _MOST_CHANNELS
        and _aligned(x)
    )


def _aligned(tensor: Tensor) -> bool:
    """Return whether it begins where a thread may read its few channels in one piece."""
    return tensor.data_ptr() % (_WIDTH * tensor.element_size()) == 0


def _pitch(grad: Tensor) -> int | None:
    """Return how many numbers lie between two pixels; None: pixels are not that regular."""
    images, channels, height, width = grad.shape
    pitch = grad.stride(3) if width > 1 else grad.stride(2) if height > 1 else grad.stride(0)
    if images * height * width == 1:
        pitch = channels
    lies = (width * height * pitch, 1, width * pitch, pitch)
    if any(n > 1 and a != b for n, a, b in zip(grad.shape, grad.stride(), lies, strict=True)):
        return None
    regular = pitch % _WIDTH == 0 and pitch >= channels
    return pitch if regular and _aligned(grad) else None


def _by(kernel: Callable[..., None], grad: Tensor, normed: Normed) -> Tensor:
    """Do it with `silu.cu`."""
    x = normed.x
    out = torch.empty_like(x)
    pitch = _pitch(grad)
    if pitch is None:
        grad, pitch = grad.clone(memory_format=torch.channels_last), x.shape[1]
    images, channels, height, width = x.shape
    tensors = (x, grad, out, normed.mean, normed.invstd, normed.weight, normed.bias)
    given = _Given(
        **{name: own.data_ptr() for name, own in zip(_TENSORS, tensors, strict=True)},
        pixels=images * height * width,
        channels=channels,
        pitch=pitch,
        kind=_KINDS[x.dtype],
    )
    _start(kernel, given, x.device)
    return out


def _add_and_apply(kernel: Callable[..., None], x: Tensor, bias: Tensor) -> None:
    """Do what `bias_silu` does with `silu.cu`."""
    images, channels, height, width = x.shape
    given = _Biased(
        x=x.data_ptr(),
        bias=bias.data_ptr(),
        pixels=images * height * width,
        channels=channels,
        kind=_KINDS[x.dtype],
    )
    _start(kernel, given, x.device)


def _start(kernel: Callable[..., None], given: _Biased | _Given, device: torch.device) -> None:
    across = given.channels // _WIDTH
    rows = max(1, _THREADS // across)
    blocks = -(-given.pixels // (rows * _DEEP))
    kernel((blocks, 1, 1), (across, rows, 1), device, given)


def _proves(kernels: Kernels, device: torch.device) -> bool:
    """Return whether they give what torch's operators give, but for rounding."""
    g = torch.Generator().manual_seed(0)
    x, grad = (4 * torch.randn(3, 24, 9, 7, generator=g) for _ in range(2))
    weight, bias, mean, invstd = (torch.rand(4, 16, generator=g) + 0.5).to(device)
    for kind, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        own, whole = (t.to(device, kind, memory_format=torch.channels_last) for t in (x, grad))
        x16 = own[:, :16].clone(memory_format=torch.channels_last)
        normed = Normed(x16, weight, bias, mean, invstd, 1e-3)
        for part in (whole[:, 8:], whole[:, :16].contiguous()):
            found = _by(kernels["silu_backward"], part, normed).double()
            expected = _aten.silu_backward(part, normed.output).double()
            if not bool((found - expected).norm() <= tolerance * expected.norm()):
                return False
        expected = F.silu(normed.x.double() + bias.to(kind).double()[:, None, None])
        _add_and_apply(kernels["bias_silu"], normed.x, bias.to(kind))
        if not bool((normed.x.double() - expected).norm() <= tolerance * expected.norm()):
            return False
    return True
