"""Blocks that keep less train as they did."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsrloop.model import lean as lean_module
from hsrloop.model import yolo
from hsrloop.model.base import load_base
from hsrloop.model.yolo import forward_eval, forward_train
from hsrloop.ops import norm
from hsrloop.ops.nvrtc import counted_launches, kernel_names
from hsrloop.ops.paths import as_on_a_gpu
from hsrloop.train.precision import set_kernels
from tests.kernels import DEVICES, HostKernel, host_kernels
from tests.ops.test_norm import KERNELS, use_small_blocks

NAMES = ("a", "b")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    together: dict[str, int | None] = dict.fromkeys(kernel_names(norm.SOURCE.read_text()))
    return host_kernels(norm.SOURCE, tmp_path_factory.mktemp("kernels"), together=together)


def proved(host: dict[str, HostKernel]) -> Callable[[torch.device], dict[str, HostKernel]]:
    """As kernels are when a network first needs them."""

    @functools.cache
    def kernels(device: torch.device) -> dict[str, HostKernel]:
        assert norm._proves(host, device)
        for kernel in host.values():
            kernel.calls = 0
        return host

    return kernels


def network(device: str = "cpu") -> Any:
    module: Any = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    return module.train().to(device, memory_format=torch.channels_last)


def images(device: str = "cpu", kind: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 3, 96, 96, generator=g)
    return noise.to(device, kind, memory_format=torch.channels_last)


def passed(module: nn.Module, device: str, *, half: bool) -> list[Tensor]:
    """Logits, gradients and buffers of one pass."""
    with torch.autocast(device, torch.float16 if half else torch.bfloat16, enabled=half):
        raw = forward_train(module, images(device, next(module.parameters()).dtype))
    box, cls = raw.box_logits.float(), raw.class_logits.float()
    (1024 * (box.square().mean() + cls.sigmoid().mean())).backward()  # within what half can say
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return [box.detach(), cls.detach(), *found, *(b.clone() for b in module.buffers())]


def both(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], object] = lambda module: None,
    device: str = "cpu",
    *,
    half: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """The same pass without lean blocks and with them."""
    results = []
    for lean in (False, True):
        module = network(device)
        change(module)
        with monkeypatch.context() as patched, as_on_a_gpu():
            if not lean:
                patched.setattr(yolo, "lean_blocks", lambda module: nullcontext())
            results.append(passed(module, device, half=half))
    return results[0], results[1]


def freeze_first(module: Any) -> None:
    for parameter in module.model[0].parameters():
        parameter.requires_grad_(False)


def norms_in_eval(module: Any) -> None:
    for own in module.modules():
        if isinstance(own, nn.BatchNorm2d):
            own.eval()


@pytest.mark.parametrize("change", [lambda module: None, freeze_first, norms_in_eval])
def test_logits_gradients_and_statistics_stay_to_the_bit(
    change: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, lean = both(monkeypatch, change)
    assert len(plain) == len(lean) > 100
    assert all(map(torch.equal, plain, lean))


def test_other_activations_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(module: Any) -> None:
        module.model[1].act = nn.LeakyReLU(0.1)
        module.model[2].cv1.bn.momentum = None

    assert all(map(torch.equal, *both(monkeypatch, change)))


def test_who_looks_on_is_shown_every_layer() -> None:
    module, seen = network(), []
    # One activation is shared by all.
    looked_at = [module.model[0].bn, module.model[1].act, module.model[2].cv1]
    hooks = [layer.register_forward_hook(lambda own, *_: seen.append(own)) for layer in looked_at]
    backwards = module.model[4].cv1, module.model[5].bn
    hooks += [
        layer.register_full_backward_hook(lambda own, *_: seen.append(own)) for layer in backwards
    ]
    with as_on_a_gpu():
        raw = forward_train(module, images())
        (raw.box_logits.sum() + raw.class_logits.sum()).backward()
    for hook in hooks:
        hook.remove()
    assert all(layer in seen for layer in (*looked_at, *backwards))


def errors(found: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Relative errors of logits, gradients and buffers."""
    pairs = list(zip(found, truth, strict=True))
    wide = [(own.double(), other.double()) for own, other in pairs]  # counters, too
    return torch.stack([(own - other).norm() / other.norm() for own, other in wide if other.any()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True])
def test_all_is_as_near_to_the_truth(
    half: bool, device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded elsewhere, each number may differ; by how much in all is the measure.

    An untrained network makes several hundred times as much of each rounding.
    """
    if device == "cpu":
        if half:
            pytest.skip("half precision is a GPU's")
        host: dict[str, HostKernel] = request.getfixturevalue("host")
        use_small_blocks(monkeypatch)
        monkeypatch.setattr(norm, "norm_kernels", proved(host))
    else:
        set_kernels(torch.device("cuda", 0), deterministic=True)
        assert norm.norm_kernels(torch.device("cuda", 0)) is not None
    parts: list[int] = []

    def seen(x: Tensor, own: Any, count: int) -> Any:
        parts.append(count)
        return norm.norm_silu(x, own, count)

    monkeypatch.setattr(lean_module, "norm_silu", seen)
    try:
        with counted_launches() as launches:
            plain, lean = both(monkeypatch, device=device, half=half)
        exact = network(device).double()
        truth = passed(exact, device, half=False)
    finally:
        if device == "cuda":
            set_kernels(torch.device("cuda", 0), deterministic=False)
    for own in KERNELS:
        name = f"{own}_{'float16' if half else 'float32'}"
        assert (host[name].calls if device == "cpu" else launches[name]) == 57
    assert sorted(parts) == [1] * 49 + [2] * 8
    own, other = errors(lean, truth), errors(plain, truth)
    assert own.median() <= 1.2 * other.median() and own.max() <= 1.5 * other.max()


def kept_bytes(module: nn.Module, device: str) -> int:
    """Bytes that autograd keeps of activations, each storage once."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in own:
            held[memory.data_ptr()] = memory.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        raw = forward_train(module, images(device))
    total = sum(held.values())
    del raw
    return total


@pytest.mark.parametrize("device", DEVICES)
def test_a_quarter_less_is_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with as_on_a_gpu():
        lean = kept_bytes(network(device), device)
        monkeypatch.setattr(yolo, "lean_blocks", lambda module: nullcontext())
        plain = kept_bytes(network(device), device)
    assert lean < 0.75 * plain


def test_only_passes_that_train_on_a_gpu_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    block = type(module.model[0])
    before = block.forward

    def refuse(x: Tensor, norm: nn.BatchNorm2d, parts: int) -> Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(lean_module, "_norm_and_silu", refuse)
    forward_train(module, images())
    with as_on_a_gpu():
        forward_eval(module, images())
        with pytest.raises(ZeroDivisionError):
            forward_train(module, images())
    assert block.forward is before
    assert type(module.model[2]).forward.__module__.startswith("ultralytics")
