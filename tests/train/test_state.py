"""Everything of a run's state goes into a checkpoint and comes back out of it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from hsrloop.errors import CheckpointError
from hsrloop.train.state import TrainState
from tests.train.test_resume import differences
from tests.train.test_step import make_state

NOT_SAVED = {"commit", "due"}  # of a step and of saves in progress
DECIDED = {"batch"}  # by the configuration, which is in the file too


@pytest.fixture
def changed() -> tuple[dict[str, Any], TrainState]:
    """A payload in which every value differs from those of a fresh state, and a fresh state."""
    state, _ = make_state()
    fresh = state.to_payload()
    return {key: other(value) for key, value in fresh.items()}, state


def other(value: Any) -> Any:
    """Return a value of the same kind that differs in every leaf."""
    match value:
        case torch.Tensor():
            return value + 1 if value.dtype != torch.uint8 else value.roll(1)
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value} other"
        case dict() if value:
            return {key: other(item) for key, item in value.items()}
        case list() if value:
            return [other(item) for item in value]
        case list():
            return [{"some": 1}]
    return copy.copy(value)


def test_every_field_is_in_the_payload() -> None:
    state, _ = make_state()
    fields = {field.name for field in dataclasses.fields(state)}
    assert fields == (set(state.to_payload()) - {"torch_rng", "cuda_rng"}) | NOT_SAVED | DECIDED


def test_every_value_comes_back(changed: tuple[dict[str, Any], TrainState]) -> None:
    payload, state = changed
    payload["optimizer"]["param_groups"] = state.optimizer.state_dict()["param_groups"]
    payload["optimizer"]["param_groups"][0]["lr"] = 0.5
    payload["scaler"], payload["cuda_rng"] = {}, None  # of a GPU
    payload["torch_rng"] = torch.Generator().manual_seed(123).get_state()
    before = copy.deepcopy(state.to_payload())
    state.load_payload(copy.deepcopy(payload))
    after = state.to_payload()
    for key in payload.keys() - {"scaler", "cuda_rng"}:
        assert differences(payload[key], after[key]) == [], key
        assert differences(before[key], after[key]) != [], key


def test_a_payload_without_any_one_of_its_parts_is_refused() -> None:
    state, _ = make_state()
    whole = state.to_payload()
    for key in whole:
        with pytest.raises(CheckpointError, match=key):
            state.load_payload({k: v for k, v in whole.items() if k != key})


def test_the_scaler_of_fp16_comes_back() -> None:
    state, _ = make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    payload = copy.deepcopy(state.to_payload())
    payload["scaler"]["scale"] = 128.0
    payload["scaler"]["_growth_tracker"] = 7
    state.load_payload(payload)
    assert state.scaler.get_scale() == 128.0 and state.scaler._get_growth_tracker() == 7
