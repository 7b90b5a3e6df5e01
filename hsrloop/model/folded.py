"""Blocks whose BatchNorm is folded into the convolution: its bias and SiLU in one pass on CUDA.

What a block splits afterwards is split as it is written, not copied from between two halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.model.blocks import blocks_do, is_watched, split_block
from hsrloop.ops.silu import bias_silu, bias_silu_halves, silu_kernels


@contextmanager
def folded_blocks(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the folded blocks of an Ultralytics network do so meanwhile; elsewhere all is as ever."""
    if silu_kernels(device) is None:
        yield
        return
    with (
        blocks_do(module, "Conv", _is_folded, _work),
        blocks_do(module, "C2f", _splits, _work_split),
    ):
        yield


def _work(own: Any, x: Tensor) -> Tensor:
    return bias_silu(_convolved(own, x), own.conv.bias)


def _work_split(own: Any, x: Tensor) -> Tensor:
    first = own.cv1
    return split_block(own, bias_silu_halves(_convolved(first, x), first.conv.bias))


def _convolved(own: Any, x: Tensor) -> Tensor:
    """Return it without the bias, which torch adds in a pass of its own."""
    result: Tensor = own.conv._conv_forward(x, own.conv.weight, None)
    return result


def _splits(block: Any) -> bool:
    return _is_folded(block.cv1) and not is_watched(block.cv1)


def _is_folded(block: Any) -> bool:
    """Return whether it is, all of it is understood, and nobody looks on."""
    return (
        type(block.bn) is nn.Identity
        and type(block.act) is nn.SiLU
        and type(block.conv) is nn.Conv2d
        and block.conv.bias is not None
        and not is_watched(block.conv, block.bn, block.act)
    )
