"""The network, and the only file that imports Ultralytics.

Ultralytics supplies the `nn.Module`; what runs it is here, written against the four attributes that
its detection models have had in every release: `model` (the layers), a layer's `f` (where its input
comes from) and `i` (its number), and `save` (which outputs are needed later).
"""

from __future__ import annotations

import atexit
import importlib
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hsrloop.errors import WeightsError
from hsrloop.model.folded import folded_blocks
from hsrloop.model.lean import lean_blocks
from hsrloop.ops.anchors import joined
from hsrloop.ops.paths import on_cpu
from hsrloop.paths import expanded, has_folder, is_file
from hsrloop.records import LevelLogits, RawPredictions

SCALES = ("n", "s", "m", "l", "x")
SIZES = {(16, 2): "n", (32, 2): "s", (48, 4): "m", (64, 6): "l", (80, 6): "x"}  # width, depth
LAYERS = (
    *("Conv", "Conv", "C2f", "Conv", "C2f", "Conv", "C2f", "Conv", "C2f", "SPPF"),
    *("Upsample", "Concat", "C2f", "Upsample", "Concat", "C2f"),
    *("Conv", "Concat", "C2f", "Conv", "Concat", "C2f", "Detect"),
)


def import_ultralytics() -> ModuleType:
    """Import Ultralytics with its side effects off, and return the package.

    No network, no automatic installs, no settings file in the user's home, no analytics, no banner;
    what it changes in the process (threads, environment, `torch.save`, `PIL.Image.open`, NumPy's
    print options) is put back. Calling it again costs nothing.
    """
    package = sys.modules.get("ultralytics.nn.tasks")
    if package is None:
        with _side_effects_undone():
            importlib.import_module("ultralytics.nn.tasks")
    return importlib.import_module("ultralytics")


@contextmanager
def _side_effects_undone() -> Iterator[None]:
    """Keep an import of Ultralytics from changing this process or the user's home."""
    import cv2
    import numpy as np
    import torchvision  # noqa: F401  (its operators must be registered before Ultralytics looks)
    from PIL import Image

    if not os.environ.get("YOLO_CONFIG_DIR"):
        folder = tempfile.mkdtemp(prefix="hsrloop-ultralytics-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["YOLO_CONFIG_DIR"] = folder
    for key, value in {"OFFLINE": "true", "AUTOINSTALL": "false", "VERBOSE": "false"}.items():
        os.environ[f"YOLO_{key}"] = value
    environment = dict(os.environ)
    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    print_options, save, open_image = np.get_printoptions(), torch.save, Image.open
    try:
        yield
    finally:
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
        torch.set_num_threads(torch_threads)
        cv2.setNumThreads(cv2_threads)
        np.set_printoptions(**print_options)
        torch.set_printoptions(profile="default")  # type: ignore[no-untyped-call]
        torch.save = save
        Image.open = open_image  # its own asks for another library when a file is no image
        logging.getLogger("ultralytics").setLevel(logging.ERROR)


def build(yaml_name: str, *, names: Sequence[str], seed: int) -> nn.Module:
    """Build an untrained YOLOv8 detector on the CPU, float32, in train mode.

    Args:
        yaml_name: "yolov8n.yaml", or another of the scales n, s, m, l, x; a path to such a file, as
            long as it describes what the packaged one does.
        names: class names, in data.yaml's order; at least one.
        seed: the initial weights are a function of it alone; the global generator is untouched.

    Raises:
        WeightsError: a name that is none of the five, no such file, or one of another network.
    """
    own = yaml_name if has_folder(yaml_name) or is_file(yaml_name) else None
    yaml_name = os.path.basename(yaml_name)
    known = [f"yolov8{scale}.yaml" for scale in SCALES]
    if yaml_name not in known:
        raise WeightsError(f"{yaml_name} is no model; for scratch use one of {', '.join(known)}.")
    import_ultralytics()
    tasks = importlib.import_module("ultralytics.nn.tasks")
    described = _packaged(tasks)
    if own is not None:
        _compare(own, described)
    described["scale"] = yaml_name[len("yolov8")]
    described["yaml_file"] = yaml_name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = tasks.DetectionModel(described, ch=3, nc=len(names), verbose=False)
    # YOLOv8 activates this convolution; ultralytics 8.4.0 builds it without, 8.4.190 with.
    spp: Any = layers(module)[9]
    spp.cv1.act = nn.SiLU()
    return prepare(module, names)


def _packaged(tasks: Any) -> dict[str, Any]:
    """Return Ultralytics' own description of YOLOv8, never a file of that name found elsewhere."""
    folder = os.path.dirname(importlib.import_module("ultralytics").__file__ or "")
    described = tasks.yaml_model_load(os.path.join(folder, "cfg/models/v8/yolov8.yaml"))
    assert isinstance(described, dict)
    return described


def _compare(own: str, described: dict[str, Any]) -> None:
    """Refuse a file that describes another network: Ultralytics would run what stands in it."""
    try:
        content = yaml.safe_load(expanded(own).read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{own} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise WeightsError(f"{own} is not valid YAML.") from None
    parts = ("backbone", "head", "scales", "activation")
    if not isinstance(content, dict) or any(content.get(p) != described.get(p) for p in parts):
        raise WeightsError(
            f"{own} describes another network than YOLOv8; only its own can be trained here. Use "
            "the name alone, such as -m yolov8n.yaml."
        )


def prepare(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Set what a module to be trained carries: names, task, trainable parameters; return it."""
    detector: Any = module
    detector.names = dict(enumerate(names))
    detector.yaml["nc"] = len(names)
    detector.nc = len(names)
    detector.task = "detect"
    detector.args = {}
    detector.criterion = None
    module.float().train()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    for parameter in head(module).dfl.parameters():
        parameter.requires_grad_(False)  # fixed weights 0, 1, ... reg_max - 1
    return module


def layers(module: nn.Module) -> nn.Sequential:
    """Return the numbered layers of a detection model, the head last."""
    sequence = module.model
    assert isinstance(sequence, nn.Sequential)
    return sequence


def head(module: nn.Module) -> Any:
    """Return the detection head; its branches are `cv2` (boxes) and `cv3` (classes)."""
    return layers(module)[-1]


def class_outputs(module: nn.Module) -> tuple[nn.Conv2d, ...]:
    """Return the last convolutions of the class branches, one a level; their rows are classes."""
    return tuple(branch[-1] for branch in head(module).cv3)


def strides(module: nn.Module) -> tuple[int, ...]:
    """Return the pixels of a cell of each level, (8, 16, 32) for YOLOv8.

    Read from the model's copy, which stays on the host; the head's moves with it to a GPU.
    """
    detector: Any = module
    return tuple(int(s) for s in detector.stride)


def reg_max(module: nn.Module) -> int:
    """Return the number of bins of the distribution over each box side."""
    return int(head(module).reg_max)


def prior_bias(stride: int, nc: int) -> float:
    """Return the logit a new class starts from: about 5 objects in a 640 px image.

    Source: ultralytics@8.4.190 Detect.bias_init.
    """
    return math.log(5 / nc / (640 / stride) ** 2)


def forward_train(module: nn.Module, images: Tensor) -> RawPredictions:
    """Run the network.

    Args:
        module: from `build` or `load_base`.
        images: (B, 3, S, S) float in [0, 1].

    Returns:
        The head's logits, before decoding; A = sum of h * w over the levels.
    """
    return joined(_levels(module, images))


def forward_eval(module: nn.Module, images: Tensor) -> RawPredictions:
    """Run the network in eval mode: the same logits, no decoding, no gradient.

    The caller decides on eval mode (`module.eval()` or `fuse_for_inference`).
    """
    return joined(forward_levels(module, images))


def forward_levels(module: nn.Module, images: Tensor) -> LevelLogits:
    """Do what `forward_eval` does; the levels stay apart, as they lie."""
    with torch.no_grad():
        return _levels(module, images)


def _levels(module: nn.Module, images: Tensor) -> LevelLogits:
    detect = head(module)
    with _blocks(module, images.device):
        levels = _features(module, images)
        boxes = [branch(x) for branch, x in zip(detect.cv2, levels, strict=True)]
        classes = [branch(x) for branch, x in zip(detect.cv3, levels, strict=True)]
    return LevelLogits(boxes, classes)


def _blocks(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Return what lets the network's blocks do as is best on a device, meanwhile."""
    if on_cpu(device) or torch.compiler.is_compiling():
        return nullcontext()
    return lean_blocks(module) if torch.is_grad_enabled() else folded_blocks(module, device)


def _features(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Run all layers but the head; return what the head takes, finest level first."""
    detector: Any = module
    outputs: list[Tensor | None] = []
    body: list[Any] = list(layers(module))[:-1]
    for layer in body:
        x = layer(_inputs(layer.f, x, outputs))
        outputs.append(x if layer.i in detector.save else None)
    levels = _inputs(head(module).f, x, outputs)
    assert isinstance(levels, list)
    return levels


def _inputs(
    origin: int | list[int], x: Tensor, outputs: list[Tensor | None]
) -> Tensor | list[Tensor]:
    """Return the output of the layer before (-1) or of numbered earlier layers."""
    if isinstance(origin, int):
        return x if origin == -1 else _kept(outputs[origin])
    return [x if j == -1 else _kept(outputs[j]) for j in origin]


def _kept(x: Tensor | None) -> Tensor:
    assert x is not None, "a layer's output that is needed later was not saved"
    return x


def set_train_mode(module: nn.Module, *, freeze: int = 0, norms_eval: bool = False) -> None:
    """Put the module in train mode; BatchNorm of the first `freeze` layers (or all) in eval."""
    module.train()
    frozen = [module] if norms_eval else list(layers(module)[:freeze])
    for part in frozen:
        for layer in part.modules():
            if _is_norm(layer):
                layer.eval()


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


@contextmanager
def norms_in_eval(module: nn.Module, *, when: bool) -> Iterator[None]:
    """Let BatchNorm use its running statistics meanwhile, if `when`, and leave them as they are."""
    norms = [m for m in module.modules() if when and _is_norm(m) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def _is_block(layer: nn.Module, module: nn.Module) -> bool:
    """Return whether a layer is a convolution with a BatchNorm that is not folded yet."""
    block: Any = layer
    return isinstance(layer, type(layers(module)[0])) and isinstance(block.bn, nn.BatchNorm2d)


def fuse_for_inference(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm into its convolution, in place; return the module, in eval mode."""
    module.eval().requires_grad_(False)
    layer: Any
    for layer in module.modules():
        if _is_block(layer, module):
            conv, norm = layer.conv, layer.bn
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None and variance is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
            )
            layer.bn = nn.Identity()
    return module


@torch.no_grad()
def refold(fused: nn.Module, source: nn.Module, *, rounding: torch.dtype) -> None:
    """Bring what `fuse_for_inference` made of a copy up to date with its source, in place.

    Equals rounding a copy's tensors to a type and back, and folding it again; a few kernels do it.

    Args:
        fused: of any float type, on the source's device.
        source: in float32; not changed.
        rounding: float16 for what a file in half holds.
    """
    pairs: list[tuple[Any, Any]] = list(zip(fused.modules(), source.modules(), strict=True))
    blocks = [(new.conv, old) for new, old in pairs if _is_block(old, source)]
    norms = [old.bn for _, old in blocks]
    inside = {id(tensor) for _, old in blocks for tensor in old.parameters()}
    others = {name: t for name, t in source.named_parameters() if id(t) not in inside}
    targets = dict(fused.named_parameters())

    def rounded(tensors: list[Tensor]) -> list[Tensor]:
        halves = [torch.empty_like(tensor, dtype=rounding) for tensor in tensors]
        torch._foreach_copy_(halves, tensors)
        wide = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(wide, halves)
        return wide

    weights = rounded([old.conv.weight for _, old in blocks])
    scales, shifts, means, variances = (
        rounded([getattr(norm, name) for norm in norms])
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    # In the order of torch's `fuse_conv_bn_weights`, so that not a bit differs.
    factors = torch._foreach_add(variances, [norm.eps for norm in norms])
    torch._foreach_rsqrt_(factors)
    biases = torch._foreach_neg(means)
    torch._foreach_mul_(biases, factors)
    torch._foreach_mul_(biases, scales)
    torch._foreach_add_(biases, shifts)
    torch._foreach_mul_(scales, factors)
    for weight, scale in zip(weights, scales, strict=True):
        weight.mul_(scale.view(-1, 1, 1, 1))
    torch._foreach_copy_([new.weight for new, _ in blocks], weights)
    torch._foreach_copy_([new.bias for new, _ in blocks], biases)
    torch._foreach_copy_([targets[name] for name in others], rounded(list(others.values())))


def scale_of(module: nn.Module) -> str:
    """Return the scale letter, "n" to "x", from the width and depth of the module."""
    stem: Any = layers(module)[0]
    blocks: Any = layers(module)[4]
    return SIZES[(stem.conv.out_channels, len(blocks.m))]
