"""A network's blocks, made to do otherwise meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def blocks_do(
    module: nn.Module,
    name: str,
    suits: Callable[[Any], bool],
    work: Callable[[Any, Tensor], Tensor],
) -> Iterator[None]:
    """Let the blocks that suit do this work meanwhile; the others do as ever.

    Args:
        name: of the blocks' class, of which there is one at least: "Conv" or "C2f".
    """
    block: Any = type(next(own for own in module.modules() if type(own).__name__ == name))
    before = block.forward

    def forward(own: Any, x: Tensor) -> Tensor:
        result: Tensor = work(own, x) if suits(own) else before(own, x)
        return result

    block.forward = forward
    try:
        yield
    finally:
        block.forward = before


def split_block(block: Any, halves: Sequence[Tensor]) -> Tensor:
    """Do what a C2f block does with both halves of what its first convolution returns."""
    parts = [*halves]
    for own in block.m:
        parts.append(own(parts[-1]))
    result: Tensor = block.cv2(torch.cat(parts, 1))
    return result


def is_watched(*layers: nn.Module) -> bool:
    """Return whether somebody wants to be shown what goes through one of these layers."""
    return any(getattr(own, hooks) for own in layers for hooks in _HOOKS)
