"""Checkpoints that `ultralytics.YOLO` opens, from release 8.0.100 to the newest."""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

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
    module: nn.Module,
    *,
    names: Sequence[str],
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    epoch: int,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a dict for `torch.save`; `module`, on any device, stays as it is.

    The network in it is a copy on the CPU: half, NCHW, eval mode, without loss or gradients.

    Args:
        names: class names in data.yaml's order.
        config: of the run, as `TrainConfig.to_json` gives it.
        metrics: of this network, by name.
        epoch: epochs completed.
        extra: further top-level keys; plain containers, tensors, numbers and strings only.
    """
    settings = {key: config[key] for key in _SHARED_SETTINGS if key in config}
    settings.update(task="detect", mode="train", data=config.get("dataset"), single_cls=False)
    content: dict[str, Any] = {
        "epoch": int(epoch),
        "best_fitness": None,
        "model": _network(module, names, settings),
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": settings,
        "train_metrics": {key: float(value) for key, value in metrics.items()},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": importlib.metadata.version("ultralytics"),
        "license": "AGPL-3.0-or-later",
    }
    clash = set(content) & set(extra or {})
    assert not clash, f"extra would replace {clash}"
    return {**content, **(extra or {})}


def _network(module: nn.Module, names: Sequence[str], settings: Mapping[str, Any]) -> Any:
    """Copy the network without a byte of GPU memory: its tensors are replaced while copying."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        memo[id(tensor)] = _as_half(tensor)
    detect = yolo.head(module)
    memo.update(
        {id(value): _as_half(value) for value in vars(detect).values() if isinstance(value, Tensor)}
    )
    network: Any = copy.deepcopy(module, memo).eval()
    network.names = dict(enumerate(names))
    network.args = dict(settings)
    network.criterion = None
    network.stride = yolo.head(network).stride = _as_half(yolo.head(module).stride)
    for cache in ("anchors", "strides", "shape", "_end2end"):
        vars(yolo.head(network)).pop(
            cache, None
        )  # of an earlier image size; absent in old releases
    return network


def _as_half(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU in half precision, plain (NCHW) layout; integers stay integers."""
    kind = torch.float16 if tensor.is_floating_point() else tensor.dtype
    plain = torch.empty(tensor.shape, dtype=kind)
    plain.copy_(tensor.detach())
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain
