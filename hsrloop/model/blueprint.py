"""A network's shape as plain values, so that a file can hold it without pickling a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hsrloop.errors import WeightsError
from hsrloop.model import yolo


def blueprint(module: nn.Module) -> dict[str, Any]:
    """Return all in which YOLOv8 detectors of one scale differ, but for classes and weights."""
    conv: Any = type(yolo.layers(module)[0])
    parts: list[tuple[str, Any]] = list(module.named_modules())
    return {
        "scale": yolo.scale_of(module),
        "class_widths": [branch[0].conv.out_channels for branch in yolo.head(module).cv3],
        "activations": {
            name: type(part.act).__name__ for name, part in parts if isinstance(part, conv)
        },
        "norms": {
            name: [part.eps, part.momentum]
            for name, part in parts
            if isinstance(part, nn.BatchNorm2d)
        },
    }


def from_blueprint(plan: Mapping[str, Any], *, names: Sequence[str]) -> nn.Module:
    """Build the network that `blueprint` described, untrained, on the CPU.

    Raises:
        WeightsError: no such network.
    """
    module = yolo.build(f"yolov8{plan['scale']}.yaml", names=names, seed=0)
    try:
        shape_like(module, plan)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"no YOLOv8 detector is built like that ({error}).") from error
    return yolo.prepare(module, names)


def shape_like(module: nn.Module, plan: Mapping[str, Any]) -> None:
    """Give a detector of the right scale what a blueprint has: class branches, activations, norms.

    Raises:
        KeyError, TypeError, ValueError: the blueprint is of another network.
    """
    conv: Any = type(yolo.layers(module)[0])
    for branch, width in zip(yolo.head(module).cv3, plan["class_widths"], strict=True):
        if width != branch[0].conv.out_channels:
            branch[0] = conv(branch[0].conv.in_channels, width, 3)
            branch[1] = conv(width, width, 3)
            branch[2] = nn.Conv2d(width, branch[2].out_channels, 1)
    acts = {"SiLU": nn.SiLU(), "Identity": nn.Identity()}
    part: Any
    for name, part in module.named_modules():
        if isinstance(part, conv):
            act = plan["activations"][name]
            if act not in acts:
                raise ValueError(f"activation {act} at {name}")
            part.act = acts[act]
        elif isinstance(part, nn.BatchNorm2d):
            eps, momentum = plan["norms"][name]
            part.eps, part.momentum = float(eps), float(momentum)
