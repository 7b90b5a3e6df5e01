"""Parameter groups: who is trained, how fast, and with which weight decay."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hsrloop.errors import ConfigError
from hsrloop.model import yolo

Group = dict[str, Any]


def frozen_modules(module: nn.Module, freeze: int) -> tuple[nn.Module, ...]:
    """Return the first `freeze` layers.

    Raises:
        ConfigError: `freeze` leaves no layer to be trained.
    """
    count = len(yolo.layers(module))
    if not 0 <= freeze < count:
        raise ConfigError(
            f"freeze is {freeze}; it must be from 0 to {count - 1}, one layer less than "
            f"the model has."
        )
    return tuple(yolo.layers(module)[:freeze])


def parameter_groups(
    module: nn.Module,
    *,
    lr0: float,
    weight_decay: float,
    llrd_rate: float | None = None,
    freeze: int = 0,
    lr_scale: float = 1.0,
    head_lr_scale: float | None = None,
) -> list[Group]:
    """Split the trainable parameters into groups for an optimizer, and freeze the others.

    Each group has `params`, `name`, `kind` ("weights", "norms" or "biases"), `module` (the layer's
    number, -1 without layer-wise decay), `lr_scale`, `weight_decay` and `lr` = lr0 * lr_scale.
    Norms and biases have no weight decay.

    Args:
        llrd_rate: a layer's rate is scaled by llrd_rate ** (head index - layer index).
        freeze: number of leading layers that are not trained.
        lr_scale: of every layer, before layer-wise decay.
        head_lr_scale: in its place for the last convolutions of the class branches, whose rows are
            the classes; None leaves them in the group of their kind.

    Raises:
        ConfigError: see `frozen_modules`.
    """
    frozen = {id(p) for part in frozen_modules(module, freeze) for p in part.parameters()}
    fixed = {id(p) for p in yolo.head(module).dfl.parameters()}
    outputs = {id(p) for out in yolo.class_outputs(module) for p in out.parameters()}
    last = len(yolo.layers(module)) - 1
    groups: dict[str, Group] = {}
    for index, layer in enumerate(yolo.layers(module)):
        for parameter, kind in _kinds(layer):
            parameter.requires_grad_(id(parameter) not in frozen | fixed)
            if not parameter.requires_grad:
                continue
            output = head_lr_scale is not None and id(parameter) in outputs
            decay = 1.0 if llrd_rate is None else llrd_rate ** (last - index)
            scale = decay * (head_lr_scale if output and head_lr_scale else lr_scale)
            name = f"class_{kind}" if output else kind
            name = name if llrd_rate is None else f"{index:02d}_{name}"
            group = groups.setdefault(
                name,
                {
                    "params": [],
                    "name": name,
                    "kind": kind,
                    "module": -1 if llrd_rate is None else index,
                    "lr_scale": scale,
                    "weight_decay": weight_decay if kind == "weights" else 0.0,
                    "lr": lr0 * scale,
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


def _kinds(layer: nn.Module) -> Iterable[tuple[nn.Parameter, str]]:
    """Yield each parameter of a layer once, with its kind."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    for part in layer.modules():
        for name, parameter in part.named_parameters(recurse=False):
            kind = "norms" if isinstance(part, norms) else "biases" if name == "bias" else "weights"
            yield parameter, kind


def groups_table(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one plain row a group: name, lr_scale, weight_decay, parameters (a count)."""
    return [
        {
            "name": group["name"],
            "lr_scale": group["lr_scale"],
            "weight_decay": group["weight_decay"],
            "parameters": sum(p.numel() for p in group["params"]),
        }
        for group in groups
    ]


def build_optimizer(
    name: str, groups: Sequence[Group], *, momentum: float
) -> torch.optim.Optimizer:
    """Return a fused optimizer over `groups`, which it copies.

    Args:
        name: "AdamW", "Adam" or "SGD" (Nesterov).
        momentum: SGD's momentum; beta1 of the other two.

    Raises:
        ConfigError: another name.
    """
    copies = [dict(group) for group in groups]
    betas = (momentum, 0.999)
    if name == "AdamW":
        return torch.optim.AdamW(copies, betas=betas, fused=True)
    if name == "Adam":
        return torch.optim.Adam(copies, betas=betas, fused=True)
    if name == "SGD":
        return torch.optim.SGD(copies, momentum=momentum, nesterov=momentum > 0, fused=True)
    raise ConfigError(f"optimizer is {name}; it must be one of AdamW, Adam, SGD.")


def materialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Create all optimizer state now, so that no step can stop half-way for want of memory.

    Takes one step with zero gradients, rates and weight decay, then sets the step counts back.
    Weights do not move, and training goes on as if the first real step had made the state, bit by
    bit.
    Does nothing when there is state already. Gradients are None afterwards.
    """
    if optimizer.state:
        return
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    parameters = list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group["lr"], group["weight_decay"] = values
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
