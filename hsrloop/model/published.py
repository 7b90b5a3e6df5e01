"""Checkpoints that `ultralytics.YOLO` opens, from release 8.0.100 to the newest."""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hsrloop.model import yolo

# Settings that Ultralytics 8.0.100 and 8.4.190 both know; others may be refused.
_SHARED_SETTINGS = (
    *("model", "epochs", "batch", "imgsz", "patience", "optimizer", "lr0", "lrf", "momentum"),
    *("weight_decay", "warmup_epochs", "cos_lr", "close_mosaic", "hsv_h", "hsv_s", "hsv_v"),
    *("degrees", "translate", "scale", "shear", "flipud", "fliplr", "mosaic", "mixup"),
    *("workers", "seed", "deterministic", "amp", "save_period"),
)


def to_ultralytics_checkpoint(
    network: nn.Module,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    epoch: int,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a dict for `torch.save`.

    Args:
        network: of `half_network`; it is part of what is returned.
        config: of the run, as `TrainConfig.to_json` gives it.
        metrics: of this network, by name.
        epoch: epochs completed.
        extra: further top-level keys; plain containers, tensors, numbers and strings only.
    """
    content: dict[str, Any] = {
        "epoch": int(epoch),
        "best_fitness": None,
        "model": network,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": _settings(config),
        "train_metrics": {key: float(value) for key, value in metrics.items()},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": importlib.metadata.version("ultralytics"),
        "license": "AGPL-3.0-or-later",
    }
    clash = set(content) & set(extra or {})
    assert not clash, f"extra would replace {clash}"
    return {**content, **(extra or {})}


def half_network(
    module: nn.Module, *, names: Sequence[str], config: Mapping[str, Any]
) -> nn.Module:
    """Return a copy of `module`, on any device, on the CPU: half, NCHW, eval mode, no gradients.

    Without a byte of GPU memory: its tensors are replaced while copying.

    Args:
        names: class names in data.yaml's order.
        config: of the run, as `TrainConfig.to_json` gives it.
    """
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        memo[id(tensor)] = _as_half(tensor)
    detect = yolo.head(module)
    memo.update(
        {id(value): _as_half(value) for value in vars(detect).values() if isinstance(value, Tensor)}
    )
    network: Any = copy.deepcopy(module, memo).eval()
    network.names = dict(enumerate(names))
    network.args = _settings(config)
    network.criterion = None
    network.stride = yolo.head(network).stride = _as_half(yolo.head(module).stride)
    for cache in ("anchors", "strides", "shape", "_end2end"):
        vars(yolo.head(network)).pop(
            cache, None
        )  # of an earlier image size; absent in old releases
    return cast(nn.Module, network)


def refill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put other weights, on the CPU and by name, into a `half_network`.

    NumPy rounds as torch does, and in one thread: it may run beside a training.
    """
    with np.errstate(over="ignore"):  # beyond half's range is infinite, as torch has it
        for name, ours in network.state_dict().items():
            np.copyto(ours.numpy(), tensors[name].numpy(), casting="unsafe")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: config[key] for key in _SHARED_SETTINGS if key in config}
    settings.update(task="detect", mode="train", data=config.get("dataset"), single_cls=False)
    return settings


def _as_half(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU in half precision, plain (NCHW) layout; integers stay integers."""
    kind = torch.float16 if tensor.is_floating_point() else tensor.dtype
    plain = torch.empty(tensor.shape, dtype=kind)
    plain.copy_(tensor.detach())
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain
