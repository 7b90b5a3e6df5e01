"""Backwards through SiLU by `silu.cu`: what torch's operators give, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hsrloop.ops import silu
from hsrloop.ops.nvrtc import compile_source, proved_kernels
from hsrloop.ops.silu import SOURCE, Normed, silu_backward
from tests.kernels import DEVICES, HostKernel, host_kernels

Kernel = Callable[..., None]
LAST = torch.channels_last
# Of the norm: a card's quick exponential serves half precision, where it is far below rounding.
RTOL = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKernel:
    return host_kernels(SOURCE, tmp_path_factory.mktemp("kernels"))["silu_backward"]


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Any:
    """Compiled for the device of the test."""
    if request.getfixturevalue("device") == "cpu":
        return request.getfixturevalue("host")
    found = proved_kernels(SOURCE, torch.device("cuda", 0), silu._proves)
    assert found is not None
    return found["silu_backward"]


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
    assert silu._kernel_for(grad, fine) is None  # on the CPU
    found = silu_backward(grad, fine)
    torch.testing.assert_close(found, expected_of(grad, fine).float())


@pytest.mark.parametrize("kind", [*RTOL])
def test_no_numbers_stay_none_and_large_ones_are_finite(
    kind: torch.dtype, host: HostKernel
) -> None:
    normed = normed_of((1, 4, 1, 4), kind)
    ones = torch.ones(4)
    normed = Normed(normed.x, ones, ones, 0 * ones, ones, 1e-3)
    normed.x[0, 0] = torch.tensor([torch.nan, 60000.0, -60000.0, 0.0])
    found = silu._by(host, torch.ones_like(normed.x), normed)[0, 0, 0].tolist()
    assert found[0] != found[0] and found[1:3] == [1.0, 0.0]
    assert torch.isfinite(torch.tensor(found[1:])).all()


def test_the_kernel_is_proved_before_it_is_used(host: HostKernel) -> None:
    def wrong(grid: Any, block: Any, device: Any, given: Any) -> None:
        given.bias = given.mean
        host(grid, block, device, given)

    assert silu._proves({"silu_backward": host}, torch.device("cpu"))
    assert not silu._proves({"silu_backward": wrong}, torch.device("cpu"))


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_it_compiles_for_cards_that_are_not_here(capability: tuple[int, int]) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is made without CUDA")
    assert b"silu_backward" in compile_source(SOURCE.read_text(), capability)


def test_constants_are_those_of_the_source() -> None:
    text = SOURCE.read_text()
    assert f"#define WIDTH {silu._WIDTH} " in text and f"#define DEEP {silu._DEEP} " in text
