"""Folded blocks with a kernel for bias and SiLU detect what others detect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsrloop.model import folded
from hsrloop.model.base import load_base
from hsrloop.model.yolo import forward_eval, forward_train, fuse_for_inference
from hsrloop.ops import silu
from hsrloop.ops.nvrtc import counted_launches
from hsrloop.ops.paths import as_on_a_gpu
from tests.kernels import DEVICES, HostKernel, host_kernels

BLOCKS = 57


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    return host_kernels(silu.SOURCE, tmp_path_factory.mktemp("kernels"))


def network(device: str = "cpu") -> Any:
    """With biases and statistics that let every block reach the logits."""
    module = load_base("yolov8n.yaml", names=("a", "b"), seed=0).module.train()
    generator = torch.Generator().manual_seed(1)
    norms = [own for own in module.modules() if isinstance(own, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.bias.copy_(0.5 * torch.randn(norm.bias.shape, generator=generator))
            norm.momentum = 1.0
        forward_train(module, images())
    return module.eval().to(device, memory_format=torch.channels_last)


def images(device: str = "cpu") -> Tensor:
    noise = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return noise.to(device, memory_format=torch.channels_last)


def logits(module: nn.Module, x: Tensor) -> list[Tensor]:
    with as_on_a_gpu():
        raw = forward_eval(module, x)
    return [raw.box_logits.double(), raw.class_logits.double()]


def alike(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in pairs)


@pytest.fixture
def exact_products() -> Iterator[None]:
    """On a card TF32 would make much of a difference in the last bit."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True])
def test_logits_are_those_of_torchs_operators(
    half: bool, device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if half and device == "cpu":
        pytest.skip("half precision is a GPU's")
    module, x = fuse_for_inference(network(device)), images(device)
    if half:
        module, x = module.half(), x.half()
    monkeypatch.setattr(folded, "silu_kernels", lambda device: None)
    expected = logits(module, x)
    monkeypatch.undo()
    if device == "cpu":
        host = request.getfixturevalue("host")
        for own in (folded, silu):
            monkeypatch.setattr(own, "silu_kernels", lambda device: host)
    else:
        assert silu.silu_kernels(x.device) is not None
    split: list[bool] = []

    def halves(x: Tensor, bias: Tensor) -> Any:
        own = silu.bias_silu_halves(x, bias)
        split.append(own[0].data_ptr() != x.data_ptr())
        return own

    monkeypatch.setattr(folded, "bias_silu_halves", halves)
    with counted_launches() as launches:
        found = logits(module, x)
    assert (host["bias_silu"].calls if device == "cpu" else launches["bias_silu"]) == BLOCKS
    assert split == [True] * 8
    assert alike(found, expected, 2e-2 if half else 1e-4)


@pytest.mark.parametrize("wrong", ["no bias", "no SiLU", "nothing"])
def test_a_wrong_pass_would_be_seen(
    wrong: str, host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fuse_for_inference(network())
    expected = logits(module, images())
    passes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "no bias": lambda x, bias: torch.nn.functional.silu(x),
        "no SiLU": lambda x, bias: x + bias[:, None, None],
        "nothing": lambda x, bias: torch.zeros_like(x),
    }
    monkeypatch.setattr(folded, "silu_kernels", lambda device: host)
    monkeypatch.setattr(folded, "bias_silu", passes[wrong])
    assert not alike(logits(module, images()), expected, 2e-2)


def test_others_are_left_alone(
    host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for own in (folded, silu):
        monkeypatch.setattr(own, "silu_kernels", lambda device: host)
    before = host["bias_silu"].calls
    plain = network()
    block = type(plain.model[0])
    forward = block.forward
    with as_on_a_gpu():
        forward_eval(plain, images())  # not folded
    assert host["bias_silu"].calls == before
    module, seen = fuse_for_inference(network()), []
    module.model[0].act = nn.SiLU()  # one activation is shared by all
    module.model[0].act.register_forward_hook(lambda *given: seen.append(given))
    module.model[1].act = nn.LeakyReLU(0.1)
    module.model[2].cv1.register_forward_hook(lambda *given: seen.append(given))
    with as_on_a_gpu():
        forward_eval(module, images())
    assert len(seen) == 2 and host["bias_silu"].calls == before + BLOCKS - 2
    assert block.forward is forward
