"""SiLU and what comes before it by `silu.cu`: what torch's operators give, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hsrloop.ops import silu
from hsrloop.ops.silu import SOURCE, Normed, bias_silu, silu_backward, silu_kernels
from tests.kernels import DEVICES, HostKernel, host_kernels

Kernel = Callable[..., None]
LAST = torch.channels_last
# Of the norm: a card's quick exponential serves half precision, where it is far below rounding.
RTOL = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    return host_kernels(SOURCE, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Any:
    """Compiled for the device of the test."""
    if request.getfixturevalue("device") == "cpu":
        return request.getfixturevalue("host")
    found = silu_kernels(torch.device("cuda", 0))
    assert found is not None
    return found


@pytest.fixture
def kernel(kernels: Mapping[str, Kernel]) -> Kernel:
    return kernels["silu_backward"]


def normed_of(
    shape: tuple[int, ...], kind: torch.dtype = torch.float32, device: str = "cpu"
) -> Normed:
    g = torch.Generator().manual_seed(sum(shape))
    x = 3 * torch.randn(shape, generator=g)
    numbers = [torch.rand(shape[1], generator=g).to(device) + 0.5 for _ in range(4)]
    return Normed(x.to(device, kind, memory_format=LAST), *numbers, 1e-3)


def gradient_of(normed: Normed, *, beside: int = 0) -> Tensor:
    """A gradient in channels_last, cut out of one with so many channels more on either side."""
    images, channels, height, width = normed.x.shape
    g = torch.Generator().manual_seed(channels)
    whole = torch.randn(images, channels + 2 * beside, height, width, generator=g)
    whole = whole.to(normed.x.device, normed.x.dtype, memory_format=LAST)
    return whole[:, beside : beside + channels]


def expected_of(grad: Tensor, normed: Normed) -> Tensor:
    """By autograd in float64, from BatchNorm's output as it was rounded."""
    output = normed.output.double().requires_grad_()
    torch.nn.functional.silu(output).backward(grad.double())
    assert output.grad is not None
    return output.grad


def rounded(number: float, kind: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=kind))


def silu_slope(y: float, kind: torch.dtype) -> float:
    s = 1 / (1 + math.exp(-y))
    return rounded(s * (1 + y * (1 - s)), kind)


SHAPES = [
    *((1, 4, 1, 1), (2, 8, 3, 5), (3, 16, 40, 40), (1, 64, 1, 7), (2, 80, 5, 1), (5, 12, 1, 1)),
    *((2, 1028, 2, 2), (1, 4096, 1, 2)),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [*RTOL])
@pytest.mark.parametrize("beside", [0, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_autograds(
    shape: tuple[int, ...], beside: int, kind: torch.dtype, device: str, kernel: Kernel
) -> None:
    normed = normed_of(shape, kind, device)
    grad = gradient_of(normed, beside=beside)
    assert silu._suits(grad, normed) and silu._pitch(grad) is not None
    found = silu._by(kernel, grad, normed)
    assert found.dtype is kind and found.is_contiguous(memory_format=LAST)
    expected = expected_of(grad, normed)
    assert (found.double() - expected).norm() <= RTOL[kind] * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_lie_otherwise_are_laid_right_first(device: str, kernel: Kernel) -> None:
    normed = normed_of((2, 8, 6, 10), device=device)
    grad = gradient_of(normed)
    for own in (
        grad.contiguous(),  # planes
        gradient_of(normed, beside=1),  # between two pieces
        grad.repeat(1, 1, 1, 2)[..., :10],
        grad.new_ones(()).expand(2, 8, 6, 10),
        grad.new_ones((2, 8, 1, 1)).expand(2, 8, 6, 10),
    ):
        found, expected = silu._by(kernel, own, normed), expected_of(own, normed)
        assert (found.double() - expected).norm() <= RTOL[torch.float32] * expected.norm()


def test_what_the_kernel_cannot_take_goes_by_torch() -> None:
    fine = normed_of((2, 8, 6, 6))
    grad = gradient_of(fine)
    assert silu._suits(grad, fine)
    assert not silu._suits(grad.double(), fine)
    for shape in ((2, 6, 5, 5), (0, 8, 6, 6)):
        other = normed_of(shape)
        assert not silu._suits(torch.ones(shape), other)
    planes = Normed(fine.x.contiguous(), fine.weight, fine.bias, fine.mean, fine.invstd, 1e-3)
    assert not silu._suits(grad, planes)
    assert silu_kernels(grad.device) is None  # on the CPU
    found = silu_backward(grad, fine)
    torch.testing.assert_close(found, expected_of(grad, fine).float())


@pytest.mark.parametrize("kind", [*RTOL])
def test_no_numbers_stay_none_and_large_ones_are_finite(
    kind: torch.dtype, host: dict[str, HostKernel]
) -> None:
    normed = normed_of((1, 4, 1, 4), kind)
    ones = torch.ones(4)
    normed = Normed(normed.x, ones, ones, 0 * ones, ones, 1e-3)
    normed.x[0, 0] = torch.tensor([torch.nan, 60000.0, -60000.0, 0.0])
    ones = torch.ones_like(normed.x)
    found = silu._by(host["silu_backward"], ones, normed)[0, 0, 0].tolist()
    assert found[0] != found[0] and found[1:] == [1.0, 0.0, silu_slope(1.0, kind)]
    silu._add_and_apply(host["bias_silu"], normed.x, torch.zeros(4, dtype=kind))
    said = normed.x[0, 0, 0].tolist()
    assert said[0] != said[0] and said[1:] == [rounded(60000.0, kind), 0.0, 0.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [*RTOL])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bias_and_silu_are_torchs(
    shape: tuple[int, ...],
    kind: torch.dtype,
    device: str,
    kernels: Mapping[str, Kernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silu, "silu_kernels", lambda device: kernels)
    normed = normed_of(shape, kind, device)
    x, bias = normed.x, normed.bias.to(kind)
    expected = torch.nn.functional.silu((x + bias[:, None, None]).double())
    assert silu._takes(x)
    found = bias_silu(x, bias)
    assert found is x
    assert (found.double() - expected).norm() <= RTOL[kind] * expected.norm()


def test_a_bias_that_lies_otherwise_goes_by_torch(
    host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silu, "silu_kernels", lambda device: host)
    before = host["bias_silu"].calls
    for shape in ((2, 6, 5, 5), (2, 8, 5, 5)):
        x = normed_of(shape).x if shape[1] == 6 else normed_of(shape).x.contiguous()
        expected = torch.nn.functional.silu(x + 1)
        torch.testing.assert_close(bias_silu(x, torch.ones(shape[1])), expected)
    assert host["bias_silu"].calls == before


@pytest.mark.parametrize("name", ["bias_silu", "silu_backward"])
def test_kernels_are_proved_before_they_are_used(name: str, host: dict[str, HostKernel]) -> None:
    def wrong(grid: Any, block: Any, device: Any, given: Any) -> None:
        given.pixels -= 1
        host[name](grid, block, device, given)

    assert silu._proves(host, torch.device("cpu"))
    assert not silu._proves({**host, name: wrong}, torch.device("cpu"))


def test_constants_are_those_of_the_source() -> None:
    text = SOURCE.read_text()
    assert f"#define WIDTH {silu._WIDTH} " in text and f"#define DEEP {silu._DEEP} " in text
