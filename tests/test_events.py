"""Events survive a line of JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hsrloop import events
from hsrloop.events import Event

KINDS = [k for k in vars(events).values() if isinstance(k, type) and issubclass(k, Event)]
SAMPLES: dict[str, Any] = {
    "str": "text",
    "int": 3,
    "float": 0.1,
    "bool": True,
    "dict[str, Any]": {"a": 1},
    "dict[str, str]": {"a": "b"},
    "dict[str, float]": {"weights": 1e-3},
    "list[str]": ["cup"],
    "list[dict[str, Any]]": [{"name": "cup"}],
}


def sample(kind: type[Event]) -> Event:
    """Return an event of a kind with every field filled."""
    return kind(**{f.name: SAMPLES[str(f.type)] for f in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not Event])
def test_round_trip(kind: type[Event]) -> None:
    event = sample(kind)
    assert events.from_json(json.loads(json.dumps(event.to_json()))) == event


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not Event])
def test_events_are_frozen(kind: type[Event]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample(kind).time = 2.0  # type: ignore[misc]


def test_only_the_frequent_ones_are_left_out_of_the_file() -> None:
    left_out = {
        kind.__name__ for kind in KINDS if kind is not Event and not events.is_logged(sample(kind))
    }
    assert left_out == {"Progress", "StepDone"}


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(KeyError):
        events.from_json({"event": "Nothing"})
