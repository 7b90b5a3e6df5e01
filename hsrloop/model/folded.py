"""Blocks whose BatchNorm is folded into the convolution: its bias and SiLU in one pass on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.model.blocks import blocks_do, is_watched
from hsrloop.ops.silu import bias_silu, silu_kernels


@contextmanager
def folded_blocks(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the folded blocks of an Ultralytics network do so meanwhile; elsewhere all is as ever."""
    if silu_kernels(device) is None:
        yield
        return
    with blocks_do(module, "Conv", _is_folded, _work):
        yield


def _work(own: Any, x: Tensor) -> Tensor:
    # With a bias torch adds it in a pass of its own.
    return bias_silu(own.conv._conv_forward(x, own.conv.weight, None), own.conv.bias)


def _is_folded(block: Any) -> bool:
    """Return whether it is, all of it is understood, and nobody looks on."""
    return (
        type(block.bn) is nn.Identity
        and type(block.act) is nn.SiLU
        and type(block.conv) is nn.Conv2d
        and block.conv.bias is not None
        and not is_watched(block.conv, block.bn, block.act)
    )
