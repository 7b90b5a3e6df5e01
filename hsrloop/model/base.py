"""Base weights: a network of the right size, filled from a file, its classes matched by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.errors import WeightsError
from hsrloop.model import yolo
from hsrloop.model.archive import plain
from hsrloop.model.blueprint import shape_like
from hsrloop.model.safe_load import read_checkpoint, tensors, walk

_COUNTER = ".num_batches_tracked"  # of BatchNorm: the only whole numbers
_HEAD = f"model.{len(yolo.LAYERS) - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A detector ready to be fine-tuned, and where it comes from."""

    module: nn.Module
    fresh_classes: tuple[bool, ...]  # by class: True where no weights were carried over
    scale: str  # "n" to "x"
    source: str  # the file, or the yaml name
    source_names: tuple[str, ...]  # classes of the file; empty for scratch

    @property
    def fresh_share(self) -> float | None:
        """Share of classes that pretrained weights do not know; None from scratch."""
        if not self.source_names:
            return None
        return sum(self.fresh_classes) / len(self.fresh_classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What a checkpoint says about its network."""

    path: str
    scale: str
    names: tuple[str, ...]
    weights: Mapping[str, Tensor]  # a state dict
    parts: Mapping[str, Any]  # by dotted name: stand-ins of the modules


def load_base(
    source: Path | str, *, names: Sequence[str] | None, seed: int, trust: bool = False
) -> BaseModel:
    """Return a detector of `names` with the weights of `source`, float32 on the CPU, in train mode.

    Rows of the class outputs are carried over by name (case and outer spaces do not matter); the
    class branches keep the width they have in the file. Classes that are new start from a fresh
    layer's weights, a function of `seed` alone, and the usual prior.

    Args:
        source: path of a .pt file, or "yolov8n.yaml" (n, s, m, l, x) for scratch.
        names: class names in data.yaml's order; None takes the file's own.
        seed: of the fresh weights.
        trust: see `read_checkpoint`.

    Raises:
        WeightsError: see `read_checkpoint`; or weights that are not YOLOv8 detection.
    """
    if str(source).endswith((".yaml", ".yml")):
        if names is None:
            raise WeightsError(f"{source} has no classes of its own; give a data set.")
        module = yolo.build(str(source), names=names, seed=seed)
        fresh = (True,) * len(names)
        scale = yolo.scale_of(module)
        return BaseModel(
            module=module, fresh_classes=fresh, scale=scale, source=str(source), source_names=()
        )
    found = _understand(Path(source), read_checkpoint(source, trust=trust))
    wanted = tuple(found.names if names is None else names)
    module = yolo.build(f"yolov8{found.scale}.yaml", names=wanted, seed=seed)
    rows = _matching_rows(found.names, wanted)
    try:
        shape_like(module, _blueprint_of(found))
        _fill(module, found, names=wanted, rows=rows, seed=seed)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _not_yolov8(found.path, str(error).splitlines()[-1].strip()[:160]) from error
    return BaseModel(
        module=module,
        fresh_classes=tuple(row is None for row in rows),
        scale=found.scale,
        source=str(source),
        source_names=found.names,
    )


def _not_yolov8(path: Path | str, reason: str) -> WeightsError:
    return WeightsError(
        f"{path} is not a YOLOv8 detection model of scale n, s, m, l or x ({plain(reason)}). "
        f"Use one of yolov8n.pt to yolov8x.pt, or a best.pt made from them."
    )


def _understand(path: Path, content: Mapping[str, Any]) -> _Source:
    """Find the network in a checkpoint and make sure that it is YOLOv8 detection."""
    network = content.get("ema") if content.get("ema") is not None else content.get("model")
    if network is None or isinstance(network, Mapping):
        loose = content if network is None else network
        if any(isinstance(value, Tensor) for value in loose.values()):
            raise _not_yolov8(path, "a plain state dict: tensors without their network")
        raise _not_yolov8(
            path,
            "no network under 'model', but "
            + (", ".join(map(str, list(content)[:5])) or "nothing"),
        )
    kind = type(network).__name__
    if kind != "DetectionModel":
        raise _not_yolov8(path, f"a {kind}")
    try:
        parts = dict(walk(network))
        weights = tensors(network)
        kinds = tuple(type(m).__name__ for m in vars(parts["model"])["_modules"].values())
        if kinds != yolo.LAYERS:
            raise _not_yolov8(path, "its layers are " + ", ".join(kinds))
        if "model.0.bn.weight" not in weights:
            raise WeightsError(
                f"{path} was fused for inference, without BatchNorm; give the unfused file."
            )
        width = weights["model.0.conv.weight"].shape[0]
        depth = len(vars(parts["model.4.m"])["_modules"])
        scale = yolo.SIZES[(width, depth)]
        classes = weights[f"{_HEAD}.cv3.0.2.weight"].shape[0]
    except (KeyError, AttributeError, TypeError, IndexError, RecursionError) as error:
        raise _not_yolov8(path, f"unexpected structure at {error}") from error
    if not all(w.is_floating_point() or n.endswith(_COUNTER) for n, w in weights.items()):
        raise _not_yolov8(path, "weights that are no fractions")
    if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
        raise WeightsError(f"{path} holds values that are not numbers. Use another checkpoint.")
    return _Source(
        path=str(path),
        scale=scale,
        names=_names(vars(network).get("names"), classes),
        weights=weights,
        parts=parts,
    )


def _names(names: Any, count: int) -> tuple[str, ...]:
    """Return `count` class names from a file's map or list; numbers where it has none."""
    listed = names if isinstance(names, list | tuple) else ()
    table = names if isinstance(names, dict) else dict(enumerate(listed))
    return tuple(str(table.get(i, i)) for i in range(count))


def _matching_rows(have: Sequence[str], want: Sequence[str]) -> list[int | None]:
    """Return, for each wanted class, its row in the file, or None.

    Where no name is the same, one that differs in case or in what stands between words is: "wine
    glass" may have become "wine_glass", which ROS takes.
    """
    exact: dict[str, int] = {}
    alike: dict[str, int] = {}
    for row, name in enumerate(have):
        exact.setdefault(name.strip().lower(), row)
        alike.setdefault(_bare(name), row)
    alike.pop("", None)  # of nothing but what stands between words
    return [exact.get(name.strip().lower(), alike.get(_bare(name))) for name in want]


def _bare(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _blueprint_of(found: _Source) -> dict[str, Any]:
    """Return what a file's network differs in, as `blueprint` says it."""
    parts = {name: vars(part) for name, part in found.parts.items()}
    acts = {n: p["_modules"]["act"] for n, p in parts.items() if "act" in p.get("_modules", {})}
    return {
        "class_widths": [
            found.weights[f"{_HEAD}.cv3.{level}.0.conv.weight"].shape[0] for level in range(3)
        ],
        "activations": {name: type(act).__name__ for name, act in acts.items()},
        "norms": {
            n: [p["eps"], p["momentum"]]
            for n, p in parts.items()
            if "running_mean" in p.get("_buffers", {})
        },
    }


def _fill(
    module: nn.Module,
    found: _Source,
    *,
    names: Sequence[str],
    rows: Sequence[int | None],
    seed: int,
) -> None:
    """Copy the file's weights into the module; class outputs row by row, new rows fresh."""
    state = dict(found.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for level, out in enumerate(yolo.class_outputs(module)):
            prefix = f"{_HEAD}.cv3.{level}.2"
            fresh = nn.Conv2d(out.in_channels, len(rows), 1)
            weight, bias = fresh.weight.detach(), fresh.bias.detach()  # type: ignore[union-attr]
            bias.fill_(yolo.prior_bias(yolo.strides(module)[level], len(rows)))
            for row, origin in enumerate(rows):
                if origin is not None:
                    weight[row] = found.weights[f"{prefix}.weight"][origin]
                    bias[row] = found.weights[f"{prefix}.bias"][origin]
            state[f"{prefix}.weight"], state[f"{prefix}.bias"] = weight, bias
    module.load_state_dict(state, strict=True)
    yolo.prepare(module, names)
