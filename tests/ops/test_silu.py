"""A bias and SiLU by `silu.cu`: what torch's operators give, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hsrloop.ops import nvrtc, silu
from hsrloop.ops.silu import SOURCE, bias_silu, bias_silu_halves, silu_kernels
from tests.kernels import DEVICES, HostKernel, host_kernels

Kernel = Callable[..., None]
LAST = torch.channels_last
# Of the norm: a card's quick exponential serves half precision, where it is far below rounding.
RTOL = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}
SHAPES = [
    *((1, 4, 1, 1), (2, 8, 3, 5), (3, 16, 40, 40), (1, 64, 1, 7), (2, 80, 5, 1), (5, 12, 1, 1)),
    *((2, 1028, 2, 2), (1, 4096, 1, 2)),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    return host_kernels(SOURCE, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the device of the test."""
    if request.getfixturevalue("device") == "cpu":
        host = request.getfixturevalue("host")
        monkeypatch.setattr(silu, "silu_kernels", lambda device: host)
    else:
        assert silu_kernels(torch.device("cuda", 0)) is not None


def numbers(
    shape: tuple[int, ...], kind: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) and (C,)."""
    g = torch.Generator().manual_seed(sum(shape))
    x, bias = 3 * torch.randn(shape, generator=g), torch.rand(shape[1], generator=g)
    return x.to(device, kind, memory_format=LAST), bias.to(device, kind)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [*RTOL])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bias_and_silu_are_torchs(shape: tuple[int, ...], kind: torch.dtype, device: str) -> None:
    x, bias = numbers(shape, kind, device)
    expected = torch.nn.functional.silu((x + bias[:, None, None]).double())
    assert silu.takes(x)
    found = bias_silu(x, bias)
    assert found is x
    assert (found.double() - expected).norm() <= RTOL[kind] * expected.norm()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [*RTOL])
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (3, 16, 40, 40), (2, 80, 5, 1), (2, 12, 3, 3)])
def test_two_halves_are_the_whole_to_the_bit(
    shape: tuple[int, ...], kind: torch.dtype, device: str
) -> None:
    """Twelve channels have no halves that a thread could read in one piece: torch's operators."""
    x, bias = numbers(shape, kind, device)
    before = x.clone()
    halves = bias_silu_halves(x, bias)
    split = shape[1] % 8 == 0
    assert torch.equal(x, before) is split
    assert [own.is_contiguous(memory_format=LAST) for own in halves] == [split] * 2
    whole = bias_silu(before, bias) if split else x
    assert torch.equal(torch.cat([*halves], 1), whole)


def test_what_lies_otherwise_goes_by_torch(
    host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silu, "silu_kernels", lambda device: host)
    before = host["bias_silu"].calls
    for x in (numbers((2, 6, 5, 5))[0], numbers((2, 8, 5, 5))[0].contiguous()):
        expected = torch.nn.functional.silu(x + 1)
        torch.testing.assert_close(bias_silu(x, torch.ones(x.shape[1])), expected)
    assert host["bias_silu"].calls == before


def test_the_cpu_has_no_kernel() -> None:
    assert silu_kernels(torch.device("cpu")) is None


@pytest.mark.parametrize("kind", [*RTOL])
def test_no_numbers_stay_none_and_large_ones_are_finite(
    kind: torch.dtype, host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silu, "silu_kernels", lambda device: host)
    x, bias = torch.zeros(1, 4, 1, 4, dtype=kind).to(memory_format=LAST), torch.zeros(4, dtype=kind)
    x[0, 0] = torch.tensor([torch.nan, 60000.0, -60000.0, 0.0])
    said = bias_silu(x, bias)[0, 0, 0].tolist()
    large = float(torch.tensor(60000.0, dtype=kind))
    assert said[0] != said[0] and said[1:] == [large, 0.0, 0.0]


def test_the_kernel_is_proved_before_it_is_used(host: dict[str, HostKernel]) -> None:
    def wrong(grid: Any, block: Any, device: Any, given: Any) -> None:
        given.pixels -= 1
        host["bias_silu"](grid, block, device, given)

    assert silu._proves(host, torch.device("cpu"))
    assert not silu._proves({"bias_silu": wrong}, torch.device("cpu"))


def test_constants_are_those_of_the_sources() -> None:
    before = "".join(file.read_text() for file in nvrtc._BEFORE)
    assert f"#define WIDTH {silu.WIDTH}\n" in before
    assert f"#define DEEP {silu._DEEP} " in SOURCE.read_text()
    assert [
        f"#define {k} {n}\n" in before
        for k, n in zip(("FLOAT32", "FLOAT16", "BFLOAT16"), silu.KINDS.values(), strict=True)
    ] == [True] * 3
