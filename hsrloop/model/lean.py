"""Blocks of convolution, BatchNorm and SiLU that keep a third less for the backward pass.

Autograd keeps what each of the three returned. What BatchNorm returned follows from its input and
two numbers a channel, so it is computed again instead, and forward SiLU need not copy what it
overwrites. Where `ops.norm` has kernels, both are one, forth and back. Gradients stay as near to
the truth as they were. The CPU, which has memory enough, is faster without (1 to 3%, measured), and
torch.compile decides by itself what to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hsrloop.model.blocks import blocks_do, is_watched
from hsrloop.ops.norm import Norm, Normed, norm_silu, norm_silu_backward

_aten = torch.ops.aten


@contextmanager
def lean_blocks(module: nn.Module) -> Iterator[None]:
    """Let the blocks of an Ultralytics network keep less meanwhile; elsewhere they do as ever."""
    counters: list[Tensor] = []

    def work(own: Any, x: Tensor) -> Tensor:
        counters.append(own.bn.num_batches_tracked)
        return _norm_and_silu(own.conv(x), own.bn)

    with blocks_do(module, lambda own: _spares(own.bn, own.act), work):
        yield
    if counters:
        torch._foreach_add_(counters, 1)  # each block comes once


def _spares(norm: nn.Module, act: nn.Module) -> bool:
    """Return whether there is something to be spared, it is understood, and nobody looks on."""
    return (
        type(norm) is nn.BatchNorm2d
        and type(act) is nn.SiLU
        and norm.training
        and norm.track_running_stats
        and norm.affine
        and norm.momentum is not None
        and not is_watched(norm, act)
    )


def _norm_and_silu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    out: Tensor = _NormAndSilu.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps
    )
    return out


class _NormAndSilu(torch.autograd.Function):
    """Both for a batch: by one's own kernels, or the operators that autograd would choose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        running_mean, running_var, momentum, eps = rest
        done = norm_silu(x, Norm(weight, bias, running_mean, running_var, momentum, eps))
        if done is not None:
            out, normed = done
            ctx.save_for_backward(x, weight, bias, normed.mean, normed.invstd)
            ctx.which, ctx.eps = None, eps
            return out
        out, mean, invstd, reserve, which = torch._batch_norm_impl_index(
            *(x, weight, bias, running_mean, running_var, True, momentum, eps),
            torch.backends.cudnn.enabled,
        )
        ctx.save_for_backward(x, weight, bias, mean, invstd, reserve)
        ctx.which, ctx.eps = which, eps
        return F.silu(out, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, *reserve = ctx.saved_tensors
        normed = Normed(x, weight, bias, mean, invstd, ctx.eps)
        if ctx.which is None:
            return (*norm_silu_backward(grad, normed), None, None, None, None)
        output = normed.output
        _aten.silu_backward.grad_input(grad, output, grad_input=output)
        mask = ctx.needs_input_grad[:3]
        found = _aten._batch_norm_impl_index_backward(
            *(ctx.which, x, output, weight, None, None, mean, invstd, True, ctx.eps, mask, *reserve)
        )
        return (*found, None, None, None, None)
