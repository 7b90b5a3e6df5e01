"""Averages moved by `average.cu` are those that torch's operators give, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsrloop.model.ema import Ema
from hsrloop.ops import averaging
from hsrloop.ops.averaging import SOURCE, Averager
from hsrloop.ops.nvrtc import proved_kernels
from tests.kernels import DEVICES, HostKernel, host_kernels

SIDES = ((), (1,), (0,), (5,), (averaging._PIECE,), (3 * averaging._PIECE + 1,), (4, 3, 5, 2))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKernel:
    return host_kernels(SOURCE, tmp_path_factory.mktemp("kernels"))["average"]


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Any:
    """Compiled for the device of the test."""
    if request.getfixturevalue("device") == "cpu":
        return request.getfixturevalue("host")
    found = proved_kernels(SOURCE, torch.device("cuda", 0), averaging._proves)
    assert found is not None
    return found["average"]


def numbers(seed: int, device: str = "cpu") -> list[Tensor]:
    """Tensors of many shapes, some of them in channels_last."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(side, generator=g).to(device) for side in (*SIDES, *SIDES[-1:])]
    return [*made[:-1], made[-1].contiguous(memory_format=torch.channels_last)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_averages_are_those_of_torchs_operators(weight: float, device: str, kernel: Any) -> None:
    averages, current = numbers(0, device), numbers(1, device)
    share = torch.tensor(weight, device=device)
    expected = [a + (b - a) * share for a, b in zip(averages, current, strict=True)]
    averager = Averager()
    averager._by(kernel, averages, current, share)
    assert all(torch.equal(a, b) for a, b in zip(averages, expected, strict=True))
    expected = [a + (b - a) * share for a, b in zip(averages, current, strict=True)]
    averager._by(kernel, averages, current, share)  # where they lie is known by now
    assert all(torch.equal(a, b) for a, b in zip(averages, expected, strict=True))


def test_an_averaged_module_goes_by_the_kernel_where_there_is_one(
    host: HostKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def net(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
            memory_format=torch.channels_last
        )

    ends = []
    for kernel in (None, host):
        monkeypatch.setattr(averaging, "_kernel_for", lambda *_, kernel=kernel: kernel)
        ema = Ema(net(0))
        before = host.calls
        for skipped in (False, True, False):
            ema.update(net(1), 0.75, skipped=torch.tensor(skipped))
        assert host.calls - before == (0 if kernel is None else 3)
        ends.append(ema.module.state_dict())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_only_what_lies_alike_goes_by_the_kernel() -> None:
    alike = averaging._alike
    square, wide = torch.zeros(4, 4), torch.zeros(2, 3, 4, 4)
    last = wide.to(memory_format=torch.channels_last)
    assert alike(square, torch.ones(4, 4))
    assert alike(last, last.clone())
    assert not alike(wide, last)
    assert not alike(square, square.T)
    assert not alike(square[:, ::2], square[:, ::2])  # gaps
    assert not alike(square, square.double())
    assert averaging._kernel_for([square], [square]) is None  # on the CPU


def test_the_kernel_is_proved_before_it_is_used(host: HostKernel) -> None:
    assert averaging._proves({"average": host}, torch.device("cpu"))
    assert not averaging._proves({"average": lambda *args: None}, torch.device("cpu"))
