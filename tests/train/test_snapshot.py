"""A state can be taken and gone back to, any number of times, without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hsrloop.train.snapshot import Snapshot, copy_into
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, train_step
from tests.train.test_resume import differences
from tests.train.test_step import make_batches, make_state


def train_on(state: TrainState, settings: StepSettings, seeds: list[int]) -> None:
    for seed in seeds:
        train_step(state, make_batches([2], seed=seed), settings=settings, lr=0.01)
        state.history.append({"step": seed})


def frozen(state: TrainState) -> dict[str, Any]:
    snapshot = Snapshot()
    snapshot.take(state)
    return snapshot.payload


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_what_was_taken_comes_back_and_goes_on_the_same(optimizer: str) -> None:
    state, settings = make_state(optimizer=optimizer)
    state.model.to(memory_format=torch.channels_last)
    train_on(state, settings, [0, 1])
    held, there = Snapshot(), frozen(state)
    held.take(state)
    train_on(state, settings, [2, 3])
    beyond = frozen(state)
    assert differences(there, beyond) != []
    for _ in range(2):  # what is held stays as it is, whatever the restored state does
        held.restore(state)
        assert differences(there, frozen(state)) == []
        train_on(state, settings, [2, 3])
        assert differences(beyond, frozen(state)) == []
    assert differences(there, held.payload) == []


def test_memory_is_allocated_once() -> None:
    state, settings = make_state()
    held = Snapshot()
    held.take(state)
    places = {k: t.data_ptr() for k, t in held.payload["model"].items()}
    size = held.nbytes
    assert size > 4 * 4 * sum(p.numel() for p in state.model.parameters())
    train_on(state, settings, [0])
    held.take(state)
    assert {k: t.data_ptr() for k, t in held.payload["model"].items()} == places
    assert held.nbytes == size
    assert all(
        torch.equal(held.payload["model"][k], t) for k, t in state.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 6).t(),
        torch.randn(4, 6)[:, ::2],  # with gaps
        torch.tensor(3.0, dtype=torch.float64),
        torch.randn(3).to(torch.bfloat16),
        torch.zeros(0),
        torch.arange(5),
    ],
    ids=["channels_last", "transposed", "gaps", "scalar", "bfloat16", "empty", "integers"],
)
def test_any_layout_and_type_is_copied_bit_by_bit(tensor: torch.Tensor) -> None:
    held = torch.empty_like(tensor)
    copy_into([held], [tensor])
    assert torch.equal(held, tensor) and held.dtype == tensor.dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_from_the_gpu_are_waited_for() -> None:
    device = torch.device("cuda")
    state, _ = make_state()
    state.loss_sums = state.loss_sums.to(device)
    state.model.to(device)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(1.0)
    held = Snapshot()
    held.take(state)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(2.0)
    parameters = dict(state.model.named_parameters())
    assert all((held.payload["model"][name] == 1.0).all() for name in parameters)
    assert all(held.payload["model"][name].is_pinned() for name in parameters)
