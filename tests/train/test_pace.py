"""The micro-batch is chosen by measured speed, once, and the run keeps it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hsrloop.config import Resolved, TrainConfig, resolve
from hsrloop.data.pixels.bank import BANK_SHARE
from hsrloop.events import Note
from hsrloop.train import checkpoint, pace
from hsrloop.train.pace import Pace, choose_micro_batch, measure, sizes_to_try
from hsrloop.train.rehearsal import Rehearsal
from hsrloop.train.run import train
from tests.conftest import GIB, CardMemory
from tests.train.conftest import Recorder
from tests.train.test_resume import StopAfter, differences, state_of


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(64, (4, 8, 16, 32, 64)), (12, (4, 8, 12)), (4, (4,)), (3, (3,)), (5, (4, 5))],
)
def test_sizes_to_try(batch: int, sizes: tuple[int, ...]) -> None:
    assert sizes_to_try(batch) == sizes


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({4: 50.0, 8: 90.0, 16: 70.0}, 8),  # the fastest, not the largest
        ({4: 50.0, 8: 90.0, 16: 89.0}, 16),  # as fast: BatchNorm likes more images
        ({4: 50.0, 8: None}, 4),
        ({4: None}, 4),  # then it is for recovery
    ],
)
def test_which_is_best(rates: dict[int, float | None], best: int) -> None:
    assert Pace(rates).best == best


def test_the_first_that_does_not_fit_is_the_last_tried() -> None:
    def rate_of(size: int) -> float:
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 10.0 * size

    found = measure((4, 8, 16, 32), rate_of)
    assert found.rates == {4: 40.0, 8: 80.0, 16: None}
    assert str(found) == (
        "micro_batch 8 is chosen (4: 40.0 images/s, 8: 80.0 images/s, 16: does not fit)"
    )


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(ZeroDivisionError):
        measure((4,), lambda size: 1 / 0)


class SlowInPasses:
    """A clock that a training pass moves on: by 1 s, and by 1 s for each image above four."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        real = pace.forward_backward

        def passing(state: Any, batch: Any, settings: Any) -> Any:
            self.now += 1 + max(0, len(batch.images) - 4)
            return real(state, batch, settings)

        monkeypatch.setattr(pace, "forward_backward", passing)

    def __call__(self) -> float:
        return self.now


def test_the_faster_one_is_chosen_and_nothing_else_of_the_state_changes(
    made: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(made.state.to_payload())
    said: list[Any] = []
    object.__setattr__(made, "emit", said.append)
    choose_micro_batch(made, (), clock=SlowInPasses(monkeypatch))
    after = made.state.to_payload()
    assert (made.state.rung.micro_batch, made.state.rung.val_batch) == (4, 4)
    progress = [(event.done, event.total) for event in said[:-1]]
    assert progress == [(0, 2), (1, 2), (2, 2)]
    assert said[-1].text == "micro_batch 4 is chosen (4: 4.0 images/s, 6: 2.0 images/s)"
    assert differences({**after, "rung": 0}, {**before, "rung": 0}) == []


def test_passes_before_threads_were_governed_do_not_count(
    made: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be ten times slower, whatever the size."""
    clock = SlowInPasses(monkeypatch)
    reacts = iter([False, True, *[False] * 9])

    def observe() -> bool:
        if reacted := next(reacts):
            clock.now += 100
        return reacted

    assert pace.rate(made, 4, clock, observe) == 4.0


def test_room_is_kept_for_images_that_fit_under_the_cap(
    card_memory: CardMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    card_memory.share = 2 / 80
    taken = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: taken.append(size))
    rehearsal: Any = SimpleNamespace(
        state=SimpleNamespace(device=torch.device("cuda:0")), config=TrainConfig(imgsz=640)
    )
    photographs: Any = [SimpleNamespace(height=640, width=640)] * 10_000
    pace._room_for(photographs, rehearsal)
    assert taken == [pytest.approx(2 * GIB * BANK_SHARE, abs=1)]


def test_an_earlier_choice_is_taken_over(made: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    made.fits.remember(made.state.rung)
    monkeypatch.setattr(pace, "rate", lambda *_: pytest.fail("measured again"))
    choose_micro_batch(made, ())
    assert made.state.rung.micro_batch == 4


def test_a_run_keeps_what_was_chosen_when_it_goes_on(
    settings: Callable[..., Resolved], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "rate", lambda rehearsal, size, *_: 1.0 / size)
    shape = {"batch": 8, "epochs": 2}
    stopped = train(settings(**shape, micro_batch="auto"), sinks=[recorder], stop=StopAfter(0))
    assert any("micro_batch 4 is chosen" in note.text for note in recorder.of(Note))
    last = stopped.run_dir / "weights" / "last.pt"
    assert checkpoint.read(last).identity.config.micro_batch == "auto"
    monkeypatch.setattr(pace, "rate", lambda *_: pytest.fail("chosen again"))
    resumed = train(resolve([]), resume=last)
    planned = train(settings(**shape, micro_batch=4))
    assert differences(state_of(resumed.run_dir), state_of(planned.run_dir)) == []
    monkeypatch.setattr(pace, "rate", lambda rehearsal, size, *_: float(size))
    more = resolve([("command line", {"epochs": 3})])
    assert train(more, resume=last).reason == "completed"
    rung = checkpoint.read(last).state["rung"]
    assert (rung["micro_batch"], rung["val_batch"]) == (4, 4)
