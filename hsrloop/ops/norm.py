"""BatchNorm of a batch together with SiLU, forth and back, on CUDA: `norm.cu`.

Forth, torch's operators pass over memory five times and more: statistics, BatchNorm's output,
SiLU's. Here it is three times, and back five in place of eight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrloop.ops.nvrtc import Kernels, proved_kernels
from hsrloop.ops.silu import TOLERANCES, WIDTH, aligned, parts_like, takes

SOURCE = Path(__file__).with_name("norm.cu")

# As in `norm.cu`.
_FINDING = 1024
_WRITING = 256

_ACROSS = 8  # threads side by side, at most: 32 channels of half precision
# Blocks that find, at most: about as many as a large card has multiprocessors. Each block that
# writes adds up what all of them found.
_FINDERS = 128
_WRITERS = 512
_PIXELS = 4  # of a thread, at least, about: fewer blocks where there is less to do
_READ = ("x", "by_x", "weight", "bias", "mean", "invstd")
_WRITTEN = ("running_mean", "running_var", "by_bias", "by_weight", "partial")


class _Part(ctypes.Structure):
    """A part of the channels; see `norm.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "grad")),
        *((name, ctypes.c_int) for name in ("channels", "pitch")),
    )


class _Given(ctypes.Structure):
    """What the kernels are given; see `norm.cu`."""

    _fields_ = (
        ("parts", _Part * 2),
        *((name, ctypes.c_void_p) for name in (*_READ, *_WRITTEN)),
        *((name, ctypes.c_int) for name in ("pixels", "channels", "across", "blocks")),
        *((name, ctypes.c_float) for name in ("eps", "momentum")),
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """BatchNorm's numbers.

    Args:
        weight, bias, running_mean, running_var: (C,) float32; the last two are moved.
        momentum: share of the batch in the running ones.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


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
        """What torch's operators returned."""
        x, weight, bias, mean, invstd = self.x, self.weight, self.bias, self.mean, self.invstd
        if x.is_cuda:
            return torch.batch_norm_elemt(x, weight, bias, mean, invstd, self.eps)
        scale = invstd * weight
        shift = torch.addcmul(bias, mean, scale, value=-1)
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


def takes_norm(x: Tensor, norm: Norm, parts: int = 1) -> bool:
    """Return whether `norm_silu` can be asked; else torch's operators have to."""
    return norm_kernels(x.device) is not None and _suits(x, norm, parts)


def norm_silu(x: Tensor, norm: Norm, parts: int = 1) -> tuple[list[Tensor], Normed]:
    """Apply both to (B, C, H, W) numbers, by the batch's own statistics.

    Args:
        parts: 2 to have the channels as two tensors of half as many.

    Returns:
        What SiLU returns, and what `norm_silu_backward` needs.
    """
    kernels = norm_kernels(x.device)
    assert kernels is not None, "see takes_norm"
    return _forward(kernels, x, norm, parts)


def norm_silu_backward(grads: Sequence[Tensor], normed: Normed) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by x, weight and bias of what `norm_silu` did.

    Args:
        grads: by each part of what it returned.
    """
    kernels = norm_kernels(normed.x.device)
    assert kernels is not None, "see takes_norm"
    return _backward(kernels, grads, normed)


def norm_kernels(device: torch.device) -> Kernels | None:
    """Return what does both; None where torch's operators have to."""
    return proved_kernels(SOURCE, device, _proves) if device.type == "cuda" else None


def _suits(x: Tensor, norm: Norm, parts: int) -> bool:
    """Return whether the kernels can take these."""
    numbers = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return (
        takes(x)
        and x.shape[1] % (parts * WIDTH) == 0
        and x.numel() > x.shape[1]  # one number has no variance
        and all(own.dtype is torch.float32 and own.is_contiguous() for own in numbers)
        and all(map(aligned, numbers))
    )


def _forward(
    kernels: Kernels, x: Tensor, norm: Norm, parts: int = 1
) -> tuple[list[Tensor], Normed]:
    mean, invstd = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    normed = Normed(x, norm.weight, norm.bias, mean, invstd, norm.eps)
    outs = parts_like(x, parts)
    launch = _Launch(normed)
    for part, out in zip(launch.given.parts, outs, strict=False):
        part.out, part.channels = out.data_ptr(), out.shape[1]
    launch.given.running_mean = norm.running_mean.data_ptr()
    launch.given.running_var = norm.running_var.data_ptr()
    launch.given.momentum = norm.momentum
    launch(kernels, "moments", "norm_silu")
    return outs, normed


def _backward(
    kernels: Kernels, grads: Sequence[Tensor], normed: Normed
) -> tuple[Tensor, Tensor, Tensor]:
    x = normed.x
    by_x = torch.empty_like(x)
    by_weight, by_bias = torch.empty_like(normed.weight), torch.empty_like(normed.bias)
    launch = _Launch(normed)
    regular = [_regular(grad, x.dtype) for grad in grads]  # alive until the kernels are started
    for part, (grad, pitch) in zip(launch.given.parts, regular, strict=False):
        part.grad, part.channels, part.pitch = grad.data_ptr(), grad.shape[1], pitch
    launch.given.by_x = by_x.data_ptr()
    launch.given.by_weight, launch.given.by_bias = by_weight.data_ptr(), by_bias.data_ptr()
    launch(kernels, "gradient_sums", "norm_silu_backward")
    return by_x, by_weight, by_bias


class _Launch:
    """Two kernels for the same numbers: one finds, the other writes."""

    def __init__(self, normed: Normed) -> None:
        x = normed.x
        images, channels, height, width = x.shape
        pixels, quads = images * height * width, channels // WIDTH
        tiles = -(-quads // _ACROSS)
        across = -(-quads // tiles)
        self._device = x.device
        self._kind = str(x.dtype).removeprefix("torch.")
        self._sizes = []
        for threads, most in ((_FINDING, _FINDERS), (_WRITING, _WRITERS)):
            rows = threads // across
            blocks = min(-(-pixels // (_PIXELS * rows)), max(1, most // tiles))
            self._sizes.append(((blocks, tiles, 1), (across * rows, 1, 1)))
        (blocks, _, _), _ = self._sizes[0]
        self._partial = x.new_empty((blocks, 3, channels), dtype=torch.float32)
        self.given = _Given(
            x=x.data_ptr(),
            weight=normed.weight.data_ptr(),
            bias=normed.bias.data_ptr(),
            mean=normed.mean.data_ptr(),
            invstd=normed.invstd.data_ptr(),
            partial=self._partial.data_ptr(),
            pixels=pixels,
            channels=channels,
            across=across,
            blocks=blocks,
            eps=normed.eps,
        )

    def __call__(self, kernels: Kernels, *names: str) -> None:
        for name, (grid, block) in zip(names, self._sizes, strict=True):
            kernels[f"{name}_{self._kind}"](grid, block, self._device, self.given)


def _regular(grad: Tensor, kind: torch.dtype) -> tuple[Tensor, int]:
    """Return a gradient of this kind as kernels can read it, and its `_pitch`."""
    pitch = _pitch(grad)
    if pitch is not None and grad.dtype is kind:
        return grad, pitch
    laid = grad.to(kind, memory_format=torch.channels_last, copy=True)
    return laid, laid.shape[1]


def _pitch(grad: Tensor) -> int | None:
    """Return how many numbers lie between two pixels; None: pixels are not that regular."""
    images, channels, height, width = grad.shape
    pitch = grad.stride(3) if width > 1 else grad.stride(2) if height > 1 else grad.stride(0)
    lies = (width * height * pitch, 1, width * pitch, pitch)
    if any(n > 1 and a != b for n, a, b in zip(grad.shape, grad.stride(), lies, strict=True)):
        return None
    regular = pitch % WIDTH == 0 and pitch >= channels
    return pitch if regular and aligned(grad) else None


def _proves(kernels: Kernels, device: torch.device) -> bool:
    """Return whether they give what torch's operators give on the CPU, but for rounding."""
    g = torch.Generator().manual_seed(0)
    x, grad = (4 * torch.randn(1, 40, 30, 31, generator=g) for _ in range(2))  # several blocks
    numbers = torch.rand(4, 40, generator=g) + 0.5
    for kind, tolerance in TOLERANCES.items():
        own, by_out = (t.to(kind, memory_format=torch.channels_last) for t in (x, grad))
        exact = _norm_of(numbers.double())
        leaves = [t.double().requires_grad_() for t in (own, numbers[0], numbers[1])]
        expected = F.silu(_by_torch(leaves[0], exact, *leaves[1:]))
        wanted = [expected.detach(), exact.running_mean, exact.running_var]
        wanted += torch.autograd.grad(expected, leaves, by_out.double())
        for parts in (1, 2):
            norm = _norm_of(numbers.to(device, copy=True))
            outs, normed = _forward(kernels, own.to(device), norm, parts)
            found = [torch.cat(outs, 1), norm.running_mean, norm.running_var]
            found += _backward(kernels, by_out.to(device).chunk(parts, 1), normed)
            for a, b in zip(found, wanted, strict=True):
                if not bool((a.cpu().double() - b).norm() <= tolerance * b.norm()):
                    return False
    return True


def _norm_of(numbers: Tensor) -> Norm:
    weight, bias, mean, var = numbers
    return Norm(weight, bias, mean, var, momentum=0.03, eps=1e-3)


def _by_torch(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    running = norm.running_mean, norm.running_var
    return F.batch_norm(x, *running, weight, bias, True, norm.momentum, norm.eps)
