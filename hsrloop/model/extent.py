"""How large what was read from a file becomes once somebody walks through it.

A few bytes can hold a list that holds one list twice, which holds another twice, and so on: copying
or printing it takes for ever. A tensor of stride 0 claims any size without having it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

MOST_VALUES = 20_000_000  # a guess; a run of 1000 epochs on 100 classes has a twentieth
_OPEN = -1  # being counted


def check_extent(content: Any, opaque: type) -> None:
    """Check that content is no larger than it seems.

    Args:
        content: made of containers, tensors, plain values, and objects with attributes.
        opaque: the base class of these objects.

    Raises:
        ValueError: it holds itself, more than `MOST_VALUES` values when what is shared counts each
            time, or a tensor beyond its storage.
        RecursionError: it is nested too deeply.
    """
    _count(content, opaque, {})


def _count(value: Any, opaque: type, known: dict[int, int]) -> int:
    """Return the number of values in it, itself included; `known` is by id."""
    if isinstance(value, torch.Tensor):
        _check_tensor(value)
        return 1
    parts = _parts(value, opaque)
    if parts is None:
        return 1
    if id(value) in known:
        if known[id(value)] == _OPEN:
            raise ValueError("a value that holds itself")
        return known[id(value)]
    known[id(value)] = _OPEN
    count = 1
    for part in parts:
        count += _count(part, opaque, known)
        if count > MOST_VALUES:
            raise ValueError("far more values than any training needs")
    known[id(value)] = count
    return count


def _parts(value: Any, opaque: type) -> Iterable[Any] | None:
    """Return what a value holds; None: it is one by itself."""
    if isinstance(value, dict):
        return (part for item in value.items() for part in item)
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, opaque):
        return vars(value).values()
    return None


def _check_tensor(tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise ValueError("a tensor of an unknown kind")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor larger than what is stored of it")
