"""BatchNorm and SiLU by `norm.cu`: what torch's operators give, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsrloop.ops import norm as norm_module
from hsrloop.ops.norm import SOURCE, Norm, norm_kernels, takes_norm
from hsrloop.ops.nvrtc import kernel_names
from tests.kernels import DEVICES, HostKernel, host_kernels

KERNELS = ["moments", "norm_silu", "gradient_sums", "norm_silu_backward"]  # each for three kinds
LAST = torch.channels_last
KINDS = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [
    *((1, 4, 1, 2), (2, 8, 3, 5), (3, 16, 40, 41), (1, 64, 1, 7), (2, 80, 9, 1), (3, 12, 1, 1)),
    *((2, 48, 33, 20), (2, 576, 3, 3), (1, 1028, 2, 2)),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    return compiled(tmp_path_factory)


def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    together: dict[str, int | None] = dict.fromkeys(kernel_names(SOURCE.read_text()))
    return host_kernels(SOURCE, tmp_path_factory.mktemp("kernels"), together=together)


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host takes a while to start as many threads as a card has in a block."""
    monkeypatch.setattr(norm_module, "_FINDING", 64)
    monkeypatch.setattr(norm_module, "_WRITING", 32)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiled for the device of the test."""
    if request.getfixturevalue("device") == "cpu":
        use_small_blocks(monkeypatch)
        return request.getfixturevalue("host")
    found = norm_kernels(torch.device("cuda", 0))
    assert found is not None
    return found


def case(
    shape: tuple[int, ...], kind: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Norm]:
    """Channels whose means lie far from 0, by their spread."""
    g = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]
    spread, mean = torch.rand(2, 1, channels, 1, 1, generator=g)
    x = (0.1 + 3 * spread) * torch.randn(shape, generator=g) + 20 * (mean - 0.5)
    weight, bias, running_mean, running_var = torch.rand(4, channels, generator=g).to(device) + 0.5
    norm = Norm(weight, bias, running_mean, running_var, momentum=0.03, eps=1e-3)
    return x.to(device, kind, memory_format=LAST), norm


def gradient(x: Tensor, *, beside: int = 0) -> Tensor:
    """One in channels_last, cut out of one with so many channels more on either side."""
    images, channels, height, width = x.shape
    g = torch.Generator().manual_seed(channels)
    whole = torch.randn(images, channels + 2 * beside, height, width, generator=g)
    whole = whole.to(x.device, x.dtype, memory_format=LAST)
    return whole[:, beside : beside + channels]


def exact(x: Tensor, norm: Norm, grad: Tensor, kind: torch.dtype = torch.float64) -> list[Tensor]:
    """Output, running statistics and gradients by autograd."""
    leaves = [t.detach().to(kind).requires_grad_() for t in (x, norm.weight, norm.bias)]
    running = [t.to(kind, copy=True) for t in (norm.running_mean, norm.running_var)]
    normed = F.batch_norm(leaves[0], *running, *leaves[1:], True, norm.momentum, norm.eps)
    out = F.silu(normed)
    return [out.detach(), *running, *torch.autograd.grad(out, leaves, grad.to(kind))]


def found_by(kernels: Any, x: Tensor, norm: Norm, grad: Tensor, parts: int = 1) -> list[Tensor]:
    outs, normed = norm_module._forward(kernels, x, norm, parts)
    assert len(outs) == parts
    assert all(own.is_contiguous(memory_format=LAST) for own in outs)
    gradients = norm_module._backward(kernels, grad.chunk(parts, 1), normed)
    return [torch.cat(outs, 1), norm.running_mean, norm.running_var, *gradients]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", [0, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_is_as_by_autograd(
    shape: tuple[int, ...], beside: int, kind: torch.dtype, device: str, kernels: Any
) -> None:
    x, norm = case(shape, kind, device)
    grad = gradient(x, beside=beside)
    assert norm_module._suits(x, norm, 1) and norm_module._pitch(grad) is not None
    expected, by_torch = exact(x, norm, grad), exact(x, norm, grad, torch.float32)
    found = found_by(kernels, x, norm, grad)
    assert found[0].dtype is found[3].dtype is kind
    assert found[3].is_contiguous(memory_format=LAST)
    names = ("out", "mean", "var", "x", "weight", "bias")
    for name, own, plain, truth in zip(names, found, by_torch, expected, strict=True):
        bound = ROUNDING[torch.float32 if name in ("mean", "var") else kind] * truth.norm()
        # Of few pixels a gradient by x is a small difference of large numbers.
        most = max(bound, 2 * (plain.double() - truth).norm())
        assert (own.double() - truth).norm() <= most, name


@pytest.mark.parametrize("shape", [(3, 16, 40, 41), (2, 80, 9, 1)])
def test_blocks_as_large_as_a_cards_give_the_same_but_for_rounding(
    shape: tuple[int, ...], host: Mapping[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, norm = case(shape)
    found = found_by(host, x, norm, gradient(x))
    use_small_blocks(monkeypatch)
    x, norm = case(shape)
    for one, other in zip(found, found_by(host, x, norm, gradient(x)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 48, 33, 20), (1, 576, 4, 4)])
def test_two_halves_are_the_whole_to_the_bit(
    shape: tuple[int, ...], kind: torch.dtype, device: str, kernels: Any
) -> None:
    found = []
    for parts in (1, 2):
        x, norm = case(shape, kind, device)
        found.append(found_by(kernels, x, norm, gradient(x), parts))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_two_halves_lie_as_they_like(device: str, kernels: Any) -> None:
    x, norm = case((2, 16, 5, 6), device=device)
    grad = gradient(x)
    _, normed = norm_module._forward(kernels, x, norm, 2)
    one, other = gradient(x, beside=8).chunk(2, 1)[0], grad.chunk(2, 1)[1].contiguous()
    halves = (gradient(x, beside=8)[:, :8], other.contiguous(memory_format=LAST))
    assert [norm_module._pitch(half) for half in halves] == [32, 8] and one.shape == other.shape
    expected = norm_module._backward(kernels, [torch.cat(halves, 1)], normed)
    assert all(map(torch.equal, norm_module._backward(kernels, halves, normed), expected))


@pytest.mark.parametrize("device", DEVICES)
def test_a_mean_far_from_zero_costs_no_digits(device: str, kernels: Any) -> None:
    """As variance from sums of squares would: 1000 spreads away it has none left."""
    x, norm = case((4, 8, 40, 40), device=device)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True) + 1000
    x = x.contiguous(memory_format=LAST)
    _, normed = norm_module._forward(kernels, x, norm)
    var = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(normed.invstd.double(), (var + norm.eps).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 16, 40, 41), (2, 576, 3, 3)])
def test_twice_the_same_is_the_same_to_the_bit(
    shape: tuple[int, ...], device: str, kernels: Any
) -> None:
    runs = []
    for _ in range(3):
        x, norm = case(shape, torch.float16, device)
        runs.append(found_by(kernels, x, norm, gradient(x)))
    assert all(all(map(torch.equal, runs[0], run)) for run in runs[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_lie_otherwise_are_laid_right_first(device: str, kernels: Any) -> None:
    x, norm = case((2, 8, 6, 10), device=device)
    grad = gradient(x)
    for own in (
        grad.contiguous(),  # planes
        gradient(x, beside=1),  # between two pieces
        grad.repeat(1, 1, 1, 2)[..., :10],
        grad.new_ones(()).expand(2, 8, 6, 10),
        grad.new_ones((2, 8, 1, 1)).expand(2, 8, 6, 10),
        grad.double(),
    ):
        expected, (_, _, _, *found) = exact(x, norm, own)[3:], found_by(kernels, x, norm, own)
        for one, truth in zip(found, expected, strict=True):
            assert (one.double() - truth).norm() <= 1e-5 * own.double().norm()


def test_what_the_kernels_cannot_take_goes_by_torch() -> None:
    x, norm = case((2, 8, 6, 6))
    assert norm_module._suits(x, norm, 1)
    assert not norm_module._suits(x.double(), norm, 1)
    assert not norm_module._suits(x.contiguous(), norm, 1)
    for shape in ((2, 6, 5, 5), (0, 8, 6, 6), (1, 8, 1, 1)):
        assert not norm_module._suits(*case(shape), 1)
    halves = Norm(norm.weight.half(), norm.bias, norm.running_mean, norm.running_var, 0.1, 1e-3)
    assert not norm_module._suits(x, halves, 1)
    assert norm_module._suits(x, norm, 2) and not norm_module._suits(*case((2, 12, 6, 6)), 2)
    assert norm_kernels(x.device) is None and not takes_norm(x, norm)  # on the CPU


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_number_spoils_its_channel_alone(
    bad: float, host: Mapping[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_blocks(monkeypatch)
    x, norm = case((2, 8, 6, 6))
    x[1, 3, 2, 2] = bad
    out, mean, var, by_x, by_weight, by_bias = found_by(host, x, norm, gradient(x))
    others = [c for c in range(8) if c != 3]
    for own in (out[:, 3], by_x[:, 3], mean[3], var[3], by_weight[3], by_bias[3]):
        assert own.isnan().any()
    assert all(own[:, others].isfinite().all() for own in (out, by_x))
    assert all(own[others].isfinite().all() for own in (mean, var, by_weight, by_bias))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_proved_before_they_are_used(
    name: str, kind: str, host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that a card could get wrong: other blocks' work, a kind, halves."""
    use_small_blocks(monkeypatch)
    own, grids = host[f"{name}_{kind}"], []

    def wrong(grid: Any, block: Any, device: Any, given: Any) -> None:
        grids.append(grid)
        pixels, given.pixels = given.pixels, given.pixels // 2
        own(grid, block, device, given)
        given.pixels = pixels

    def of_one_block(grid: Any, block: Any, device: Any, given: Any) -> None:
        blocks, given.blocks = given.blocks, 1
        own(grid, block, device, given)
        given.blocks = blocks

    bad = [wrong]
    if name.startswith("norm_silu"):
        other = "float16" if kind == "bfloat16" else "bfloat16"
        bad.append(host[f"{name}_{other}"])
        bad += [of_one_block] if kind == "float32" else []
    for one in bad:
        kernels = {**host, f"{name}_{kind}": one}
        assert not norm_module._proves(kernels, torch.device("cpu"))  # type: ignore[arg-type]
    assert all(grid[0] > 1 and grid[1] > 1 for grid in grids)


def test_kernels_that_are_right_are_used(
    host: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_blocks(monkeypatch)
    assert norm_module._proves(host, torch.device("cpu"))  # type: ignore[arg-type]


def test_the_proof_has_several_blocks_on_a_card() -> None:
    seen = []

    def look(grid: Any, block: Any, device: Any, given: Any) -> None:
        seen.append(grid)

    kernels: Any = dict.fromkeys(kernel_names(SOURCE.read_text()), look)
    norm_module._proves(kernels, torch.device("cpu"))
    assert len(seen) >= 2 and all(across > 1 and tiles > 1 for across, tiles, _ in seen)


def test_constants_are_those_of_the_source() -> None:
    text = SOURCE.read_text()
    assert f"#define FINDING {norm_module._FINDING} " in text
    assert f"#define WRITING {norm_module._WRITING} " in text
