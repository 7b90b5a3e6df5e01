"""The device watch counts what a GPU would be asked for, and what would make the host wait."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hsrloop.bench.counting import DeviceWatch, synchronisations

CPU = torch.device("cpu")

WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x[0]),
    "list": lambda x: x.tolist(),
    "host copy": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "copy into host memory": lambda x: torch.empty(4).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.clone().__setitem__(x > 0, x[:2]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.abs().long().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat": lambda x: x.repeat_interleave(x.abs().long()),
}

FREE: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).relu().sum(),
    "index": lambda x: x[torch.tensor([0, 1]).to(CPU)],
    "choice": lambda x: torch.where(x > 0, x, 0.0),
    "shape": lambda x: len(x[:2]) + x.numel(),
    "top": lambda x: x.topk(2).values.cumsum(0),
    "host work": lambda x: torch.arange(4)[torch.tensor([True, False, True, False])].tolist(),
    "copy that need not block": lambda x: torch.empty(4).copy_(x, non_blocking=True),
    "new on the device": lambda x: torch.zeros(4, device=CPU).add_(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_makes_the_host_wait_is_counted(name: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 0.0])
    with DeviceWatch(CPU, [x]) as watch:
        WAITING[name](x)
    assert sum(watch.waits.values()) == 1, watch.waits


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_is_not(name: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 0.0])
    with DeviceWatch(CPU, [x]) as watch:
        FREE[name](x)
    assert not watch.waits


@pytest.mark.parametrize("name", WAITING)
def test_work_on_the_host_waits_for_nobody(name: str) -> None:
    with DeviceWatch(CPU) as watch:
        WAITING[name](torch.tensor([1.0, -1.0, 2.0, 0.0]))
    assert not watch.waits and not watch.kernels


def test_results_of_what_was_sent_or_made_there_are_there() -> None:
    with DeviceWatch(CPU) as watch:
        sent = torch.ones(3).to(CPU, non_blocking=True)
        made = torch.zeros(3, device=CPU)
        home = torch.ones(3)
        assert watch.holds(sent * 2) and watch.holds(made.view(1, 3)) and watch.holds(home + made)
        assert not watch.holds(home) and not watch.holds((sent * 2).cpu())
    assert watch.sent == 1


def test_a_tensor_left_on_the_host_is_noticed_where_a_gpu_would_refuse_it() -> None:
    x = torch.ones(4)
    with DeviceWatch(CPU, [x]) as watch:
        x + torch.ones(4)
        torch.where(torch.tensor([True, False, True, False]), x, 0.0)
        x.clone()[torch.tensor([0, 1])] = torch.ones(2)
    assert watch.mixed == {"add": 1, "where": 1, "index_put_": 1}
    with DeviceWatch(CPU, [x]) as watch:
        x + torch.tensor(1.0)  # a single number may come from the host
        x[torch.tensor([0, 1])]
        x.copy_(torch.ones(4))
        torch.ones(4) + torch.ones(4)
        x + torch.ones(4).to(CPU)
    assert not watch.mixed


def test_kernels_of_both_directions_are_counted_and_views_are_not() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    with DeviceWatch(CPU, [x]) as watch:
        y = x.t().reshape(2, 8)[:, :4]
    assert watch.kernels == {"clone": 1}  # of the transposed memory
    with DeviceWatch(CPU, [x]) as watch:
        y = (x * x).exp().sum()
        y.backward()
    assert watch.kernels["mul"] >= 3 and watch.kernels["exp"] == 1 and watch.kernels["sum"] == 1


def test_memory_used_again_is_not_taken_for_the_device() -> None:
    watch = DeviceWatch(CPU, [torch.ones(1000)])
    fresh = [torch.ones(1000) for _ in range(20)]
    assert not any(watch.holds(tensor) for tensor in fresh)


def test_what_cuda_calls_synchronising_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)

    def set_mode(mode: object) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode detects synchronizing operations", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with synchronisations(torch.device("cuda")) as found:
        for _ in range(2):  # at one place: each counts
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(found) == 2
    assert modes == ["warn", 0]
    with pytest.raises(RuntimeError), synchronisations(torch.device("cuda")):
        raise RuntimeError
    assert modes == ["warn", 0, "warn", 0], "put back after a failure too"
    with synchronisations(CPU) as found:
        pass
    assert not found and len(modes) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_both_ways_of_counting_see_a_read_from_the_gpu() -> None:
    x = torch.ones(3, device="cuda")
    watch = DeviceWatch(x.device)
    with watch, synchronisations(x.device) as told:
        x.sum().item()
    assert sum(watch.waits.values()) == len(told) == 1
