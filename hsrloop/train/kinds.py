"""Whether what a file holds is of the kind it should be: types, keys, shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def misfit(found: Any, like: Any, name: str) -> str | None:
    """Return what of a value is not as in an example of its kind, in words; None: it fits.

    Args:
        found: of a file: tensors, numbers, text, lists and dicts of them.
        like: an example. A number stands for its type (a float for whole numbers too), a tensor
            for its shape and dtype, a dict for its keys, a list of one item for any number of
            its kind, an empty list or dict for any, None for anything.
        name: of the value, for the words.
    """
    match like:
        case None:
            return None
        case Tensor():
            if isinstance(found, Tensor) and (found.shape, found.dtype) == (like.shape, like.dtype):
                return None
            return f"{name} is {_kind(found)}, not {_kind(like)}"
        case dict() if isinstance(found, Mapping):
            if like and (odd := found.keys() ^ like.keys()):
                return f"{name} lacks or does not know {min(map(str, odd))}"
            parts = [misfit(found[key], like[key], f"{name}.{key}") for key in like]
        case list() if isinstance(found, list):
            parts = [
                misfit(item, example, f"{name}[{i}]")
                for example in like
                for i, item in enumerate(found)
            ]
        case tuple() if isinstance(found, tuple) and len(found) == len(like):
            parts = [misfit(item, example, name) for item, example in zip(found, like, strict=True)]
        case float() if type(found) in (int, float):
            return None
        case int() | str() if type(found) is type(like):
            return None
        case _:
            return f"{name} is {_kind(found)}, not {_kind(like)}"
    return next((part for part in parts if part is not None), None)


def optimizer_misfit(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """Return what of a saved AdamW, Adam or SGD does not fit `optimizer`, in words; None: it fits.

    How a build computes (foreach, fused, ...) is not looked at: it may differ.

    Raises:
        ValueError, KeyError: other groups or parameters.
    """
    problem = misfit(saved, {"state": {}, "param_groups": [{}]}, "optimizer")
    if problem is not None:
        return problem
    problems: list[str | None] = []
    parameters: dict[int, Tensor] = {}
    for found, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        like = {key: value for key, value in own.items() if type(value) in (int, float, str, tuple)}
        like["params"] = [0]
        name = f"optimizer.{own['name']}"
        problems.append(misfit({key: found.get(key) for key in like}, like, name))
        if problems[-1] is None:
            parameters |= zip(found["params"], own["params"], strict=True)
    for number, held in saved["state"].items():
        problems.append(misfit(held, _moments(optimizer, parameters[number]), "optimizer.state"))
    return next((problem for problem in problems if problem is not None), None)


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return an example of what an optimizer remembers of a parameter."""
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": parameter} if optimizer.defaults["momentum"] else {}
    return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__
