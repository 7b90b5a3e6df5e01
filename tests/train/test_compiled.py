"""Compiling: when it is worth it, and that it changes nothing but speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from hsrloop.config import Resolved, TrainConfig
from hsrloop.errors import DependencyError
from hsrloop.events import Event
from hsrloop.train.compiled import (
    COMPILE_S,
    GAIN,
    Compiled,
    compiled_for,
    consider,
    worth_compiling,
)
from hsrloop.train.run import train
from hsrloop.train.step import train_step
from tests.train.test_step import make_batches, make_state, weights_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_compiling_is_worth_it_once_it_saves_more_than_it_takes() -> None:
    step_s = 0.1
    even = COMPILE_S / GAIN / step_s
    assert not worth_compiling(steps_left=int(even) - 1, step_s=step_s)
    assert worth_compiling(steps_left=int(even) + 1, step_s=step_s)
    assert not worth_compiling(steps_left=10_000_000, step_s=0.0), "not known yet"
    assert worth_compiling(steps_left=11, step_s=1.0, compile_s=1.0, gain=0.1)


def test_a_run_considers_it_until_it_has_started() -> None:
    compiled, said = Compiled(backend="eager"), list[Event]()
    now = {"step_s": 0.1, "emit": said.append}
    consider(compiled, micro_batch=4, steps_left=100, **now)
    assert not compiled.started and not said
    for micro_batch in (4, 2):  # memory ran out meanwhile
        consider(compiled, micro_batch=micro_batch, steps_left=100_000, **now)
    assert compiled.started and len(said) == 1 and compiled.micro_batch == 2
    consider(None, micro_batch=4, steps_left=100_000, **now)


@pytest.mark.parametrize(
    ("mode", "device", "deterministic", "tools", "expected"),
    [
        ("off", CUDA, False, True, "nothing"),
        ("auto", CUDA, False, True, "later"),
        ("auto", CUDA, True, True, "nothing"),
        ("auto", CUDA, False, False, "nothing"),
        ("auto", CPU, False, True, "nothing"),
        ("on", CUDA, True, True, "now"),
        ("on", CPU, False, True, "now"),
    ],
)
def test_what_is_compiled_where(
    mode: str, device: torch.device, deterministic: bool, tools: bool, expected: str
) -> None:
    config = TrainConfig(compile=mode, deterministic=deterministic)
    found = {"find": lambda _: object() if tools else None, "which": lambda _: "/usr/bin/cc"}
    compiled = compiled_for(config, device, **found)
    state = "nothing" if compiled is None else "now" if compiled.started else "later"
    assert state == expected


def test_without_tools_on_says_what_to_install() -> None:
    config = TrainConfig(compile="on")
    with pytest.raises(DependencyError, match="needs a C compiler .* and triton .*, or drop it"):
        compiled_for(config, CUDA, find=lambda _: None, which=lambda _: None)


@pytest.fixture
def fresh_counters() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


# Dynamo looks at the gradients of logits.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_steps_train_as_plain_ones_and_are_captured_once(fresh_counters: Any) -> None:
    """Captured by dynamo and run as it was; of batches of another size nothing is captured."""
    ends = []
    for compiled in (None, Compiled(backend="eager")):
        state, settings = make_state(optimizer="SGD", frozen_norms=False)
        settings = dataclasses.replace(settings, compiled=compiled)
        if compiled is not None:
            compiled.start()
            compiled.micro_batch = 4
        graphs = []
        for seed, sizes in enumerate([[4], [4], [4], [4, 2], [4]]):
            batches = make_batches(sizes, imgsz=32, seed=seed)
            train_step(state, batches, settings=settings, lr=0.01)
            graphs.append(fresh_counters["stats"]["unique_graphs"])
        ends.append(weights_of(state))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    assert graphs[0] >= 2, "the network and the criterion were captured"
    assert graphs[-1] == graphs[2], "later batches need nothing new"


def test_a_run_starts_compiling_when_the_clock_says_so(
    settings: Callable[..., Resolved], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps left are asked for at each epoch's start, the time of a step from the second on."""
    from hsrloop.train import loop

    asked: list[tuple[int, float]] = []

    def note(compiled: Any, *, micro_batch: int, steps_left: int, step_s: float, emit: Any) -> None:
        assert micro_batch == 4
        asked.append((steps_left, step_s))

    monkeypatch.setattr(loop, "consider", note)
    train(settings(epochs=3))
    assert [left for left, _ in asked] == [6, 4, 2]
    assert asked[0][1] == 0 and all(step_s > 0 for _, step_s in asked[1:])
