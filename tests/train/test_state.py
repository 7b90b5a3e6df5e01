"""Everything of a run's state goes into a checkpoint and comes back out of it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from hsrloop.errors import CheckpointError
from hsrloop.records import Position
from hsrloop.train.state import LOSS_NAMES, METRIC_NAMES, TrainState
from tests.train.test_resume import differences
from tests.train.test_step import make_state

HISTORY_ROW = {
    **dict.fromkeys((*LOSS_NAMES, "skipped_steps", *METRIC_NAMES, "best_conf"), 0.5),
    "classes": [],
}
# Of what is in progress, and of recorded steps.
NOT_SAVED = {"commit", "due", "generation", "recorded_bytes", "earlier_peak_bytes"}
DECIDED = {"batch"}  # by the configuration, which is in the file too


def recovery(state: TrainState) -> dict[str, Any]:
    """A row as `events.Recovered` leaves it."""
    return {"change": "imgsz 96 -> 64", "epoch": 1, "rung": dataclasses.asdict(state.rung)}


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
    payload["rung"]["cache"] = "disk"
    payload["history"] = [HISTORY_ROW, HISTORY_ROW]
    payload["recoveries"] = [recovery(state)]
    before = copy.deepcopy(state.to_payload())
    state.load_file(copy.deepcopy(payload))
    after = state.to_payload()
    for key in payload.keys() - {"scaler", "cuda_rng"}:
        assert differences(payload[key], after[key]) == [], key
        assert differences(before[key], after[key]) != [], key


def test_a_payload_without_any_one_of_its_parts_is_refused() -> None:
    state, _ = make_state()
    whole = state.to_payload()
    for key in whole:
        with pytest.raises(CheckpointError, match=key):
            state.load_file({k: v for k, v in whole.items() if k != key})


def test_a_rung_of_an_earlier_version_is_read() -> None:
    state, _ = make_state()
    state.recoveries = [recovery(state)]
    payload = copy.deepcopy(state.to_payload())
    for rung in (payload["rung"], payload["recoveries"][0]["rung"]):
        del rung["cuda_graphs"]
    state.load_file(payload)
    assert state.rung.cuda_graphs
    del payload["rung"]["imgsz"]
    with pytest.raises(CheckpointError, match="imgsz"):
        state.load_file(payload)


def test_the_scaler_of_fp16_comes_back() -> None:
    state, _ = make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    payload = copy.deepcopy(state.to_payload())
    payload["scaler"]["scale"] = 128.0
    payload["scaler"]["_growth_tracker"] = 7
    state.load_payload(payload)
    assert state.scaler.get_scale() == 128.0 and state.scaler._get_growth_tracker() == 7


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to the values of a payload; of many alike to the first two."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    alike = len(items) > 40
    found = []
    for key, item in items[: 2 if alike else None]:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


def trained_payload() -> tuple[dict[str, Any], TrainState]:
    """The payload of a state whose optimizer has moments and whose lists have rows."""
    state, batch = make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    state.position = Position(1, 4)
    state.history, state.best_epoch = [dict(HISTORY_ROW)], 1
    state.recoveries = [recovery(state)]
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    return copy.deepcopy(state.to_payload()), state


def test_a_value_of_another_kind_is_refused_wherever_it_is() -> None:
    """Nothing but CheckpointError, and never a state that fails in the middle of a step."""
    payload, state = trained_payload()
    free = {
        "cuda_rng",
        "cache",
        "params",
        "foreach",
        "maximize",
        "capturable",
        "differentiable",
        "fused",
    }
    free |= {"decoupled_weight_decay", "amsgrad", "rollbacks"}
    paths = [path for path in places(payload) if not free & set(path)]
    assert len(paths) > 60
    for path in paths:
        parent = payload
        for key in path[:-1]:
            parent = parent[key]
        for wrong in (None, "x", {"x": None}, torch.zeros(2, 7, 3)):
            if type(wrong) is type(parent[path[-1]]) is not torch.Tensor:
                continue
            kept, parent[path[-1]] = parent[path[-1]], wrong
            with pytest.raises(CheckpointError):
                state.load_file(payload)
                pytest.fail(f"{path} may be {wrong!r}")
            parent[path[-1]] = kept


@pytest.mark.parametrize(
    "change",
    [{"steps": -1}, {"position": [0, -4]}, {"best_epoch": 2}, {"history": [{}]}, {"position": []}],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    payload, state = trained_payload()
    with pytest.raises(CheckpointError):
        state.load_file({**payload, **change})
