"""Folded blocks with a kernel for bias and SiLU detect what others detect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hsrloop.model import folded
from hsrloop.model.base import load_base
from hsrloop.model.yolo import forward_eval, fuse_for_inference
from hsrloop.ops import silu
from hsrloop.ops.paths import as_on_a_gpu
from tests.kernels import DEVICES, HostKernel, host_kernels


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    return host_kernels(silu.SOURCE, tmp_path_factory.mktemp("kernels"))


def network(device: str = "cpu") -> Any:
    module = load_base("yolov8n.yaml", names=("a", "b"), seed=0).module
    return module.eval().to(device, memory_format=torch.channels_last)


def images(device: str = "cpu") -> torch.Tensor:
    noise = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return noise.to(device, memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True])
def test_logits_are_those_of_torchs_operators(
    half: bool, device: str, host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    if half and device == "cpu":
        pytest.skip("half precision is a GPU's")
    module, x = fuse_for_inference(network(device)), images(device)
    if half:
        module, x = module.half(), x.half()
    with as_on_a_gpu():
        monkeypatch.setattr(folded, "silu_kernels", lambda device: None)
        expected = forward_eval(module, x)
        monkeypatch.undo()
        if device == "cpu":
            for own in (folded, silu):
                monkeypatch.setattr(own, "silu_kernels", lambda device: host)
        found = forward_eval(module, x)
    assert device == "cuda" or host["bias_silu"].calls == 57
    for own, other in (
        (found.box_logits, expected.box_logits),
        (found.class_logits, expected.class_logits),
    ):
        difference = (own.double() - other.double()).norm()
        assert difference <= (2e-2 if half else 1e-4) * other.double().norm()


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
    with as_on_a_gpu():
        forward_eval(module, images())
    assert len(seen) == 1 and host["bias_silu"].calls == before + 55
    assert block.forward is forward
