"""Steps that are no finite numbers: skipped, counted, and undone when they persist."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.config import Resolved, TrainConfig, resolve
from hsrloop.errors import DivergedError
from hsrloop.events import EpochDone, RolledBack
from hsrloop.model.base import load_base
from hsrloop.ops.loss import LossSums
from hsrloop.records import Position
from hsrloop.train import guard as guard_module
from hsrloop.train import step as step_module
from hsrloop.train.build import build_state
from hsrloop.train.guard import MOVED, Guard, unsound
from hsrloop.train.loop import learning_rate
from hsrloop.train.run import train
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, Transaction, train_step
from tests.conftest import write_tiny_dataset
from tests.train.conftest import Recorder, run_settings
from tests.train.test_resume import StopAfter, differences, rows, state_of
from tests.train.test_step import CPU, NAMES, assert_same, make_batches, make_state

NOWHERE = Path("nowhere")
Poison = Callable[[Callable[[TrainState], str | None]], None]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    return poisoner(monkeypatch)


def poisoner(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Return a function that arms every micro-batch with what a rule says of the state.

    "gradient" makes one number of one gradient infinite, "loss" the loss, "weights" one weight NaN
    after the step's forward pass; None leaves the step alone.
    """
    real = step_module.forward_backward

    def arm(rule: Callable[[TrainState], str | None]) -> None:
        def poisoned(state: TrainState, batch: Any, settings: StepSettings) -> LossSums:
            torch.rand(1)  # so that the generator is a part of the state that matters
            what = rule(state)
            sums = real(state, batch, settings)
            first = next(p for p in state.model.parameters() if p.grad is not None)
            with torch.no_grad():
                if what == "gradient":
                    assert first.grad is not None
                    first.grad[(0,) * first.dim()] = float("inf")
                elif what == "weights":
                    first[(0,) * first.dim()] = float("nan")
            if what == "loss":
                return LossSums(sums.box, sums.cls + float("inf"), sums.dfl, sums.target_scores)
            return sums

        monkeypatch.setattr(step_module, "forward_backward", poisoned)

    return arm


def take(state: TrainState, settings: StepSettings, seed: int) -> None:
    transaction = Transaction(state)
    transaction.begin()
    batches = make_batches([4, 4], seed=seed)
    train_step(state, batches, settings=settings, lr=0.01, transaction=transaction)


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD"])
def test_a_step_that_is_no_number_is_one_that_was_never_taken(
    optimizer: str, what: str, poison: Poison
) -> None:
    """The oracle is the run told to leave that step out; momentum and BatchNorm would show it."""
    ends = []
    for planned in (False, True):
        torch.manual_seed(0)
        state, settings = make_state(frozen_norms=False, optimizer=optimizer)
        poison(lambda state: what if state.steps == 1 else None)
        take(state, settings, 0)
        if planned:
            torch.rand(1), torch.rand(1)  # as the step's two micro-batches do
            state.steps, state.position = 2, Position(0, 8)
            state.ema.updates += 1
            state.loss_sums[4] += 1
        else:
            take(state, settings, 1)
            assert state.loss_sums.tolist()[3:] == [1, 1, 1]
        take(state, settings, 2)
        ends.append(state.to_payload())
    assert_same(*ends)
    assert ends[0]["loss_sums"].tolist()[3:] == [2, 1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_on_a_gpu_the_device_decides_by_itself(optimizer: str, amp: bool, poison: Poison) -> None:
    device = torch.device("cuda")
    config = TrainConfig(batch=8, imgsz=64, model="yolov8n.yaml", optimizer=optimizer)
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    state = build_state(config, module, device, fresh_share=None, amp=amp)
    settings = StepSettings(
        device=device, strides=(8, 16, 32), reg_max=16, amp=amp, ema_decay=0.9, ema_tau=10.0
    )
    watch = Guard(state, NOWHERE)
    poison(lambda state: "gradient" if state.steps else None)
    take(state, settings, 0)
    already = int(state.loss_sums[5])  # in fp16 the first scale may be too large for the card
    before = copy.deepcopy(state.to_payload())
    seen = []
    for i in range(guard_module.IN_A_ROW_SCALED + guard_module.LAG + 1):
        take(state, settings, i)
        seen.append(watch.persists(state))
    most = guard_module.IN_A_ROW_SCALED if amp else guard_module.IN_A_ROW
    assert seen.index(True) == most - 1 - already + guard_module.LAG
    for name in ("model", "optimizer"):
        assert_same({**before[name]}, {**state.to_payload()[name]})
    assert_same(dict(before["ema"]["module"]), dict(state.ema.module.state_dict()))


def test_skipped_steps_in_a_row_are_counted_over_epochs(poison: Poison) -> None:
    state, settings = make_state()
    poison(lambda state: "gradient" if state.steps in (1, 2) else None)
    counts = []
    for i in range(4):
        take(state, settings, i)
        counts.append(int(state.loss_sums[5]))
        state.begin_epoch()
    assert counts == [0, 1, 2, 0]
    assert state.loss_sums.tolist()[:5] == [0] * 5


@pytest.mark.parametrize("lag", [0, 2])
def test_what_persists_is_seen_a_few_steps_later_and_only_while_it_lasts(lag: int) -> None:
    state, _ = make_state()
    watch, most = Guard(state, NOWHERE, lag=lag), guard_module.IN_A_ROW
    seen = []
    for in_a_row in [*range(1, most + 3), 0, *range(1, most + 1), 0, 0, 0]:
        state.loss_sums[5] = in_a_row
        seen.append(watch.persists(state))
    first = most - 1 + lag
    assert seen.index(True) == first
    # Two more of the first row; with a lag the second row ends before it is seen.
    assert [i for i, s in enumerate(seen) if s] == (
        [first, first + 1, first + 2, 2 * most + 2] if lag == 0 else [first]
    )


def test_a_sound_state_is_left_as_it_is() -> None:
    state, settings = make_state(frozen_norms=False)
    take(state, settings, 0)
    before = copy.deepcopy(state.to_payload())
    modes = [m.training for m in state.model.modules()]
    assert unsound(state) is None
    assert_same(before, state.to_payload())
    assert modes == [m.training for m in state.model.modules()]


def spoil_loss(state: TrainState) -> None:
    state.loss_sums[1] = float("nan")


def spoil_row(state: TrainState) -> None:
    state.loss_sums[5] = guard_module.IN_A_ROW


def spoil_share(state: TrainState) -> None:
    state.loss_sums[3:5] = torch.tensor([guard_module.IN_A_ROW, guard_module.IN_A_ROW + 1])


def spoil_weights(state: TrainState) -> None:
    next(state.model.parameters()).data[1, 0, 0, 0] = float("inf")


def spoil_average(state: TrainState) -> None:
    next(state.ema.module.parameters())[1, 0, 0, 0] = float("nan")


def spoil_size(state: TrainState) -> None:
    for parameter in state.model.parameters():
        parameter.data.mul_(1e25)


def spoil_average_size(state: TrainState) -> None:
    for parameter in state.ema.module.parameters():
        parameter.mul_(1e25)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (spoil_loss, "the loss is no finite number"),
        (spoil_row, "8 steps in a row had no finite loss and gradient"),
        (spoil_share, "9 of 17 steps had no finite loss and gradient"),
        (spoil_weights, "the weights are no finite numbers"),
        (spoil_average, "the weights are no finite numbers"),
        (spoil_size, "the weights are too large to compute with"),
        (spoil_average_size, "the weights are too large to compute with"),
    ],
)
def test_what_is_wrong_is_said(spoil: Callable[[TrainState], None], cause: str) -> None:
    state, _ = make_state()
    spoil(state)
    assert unsound(state) == cause


@pytest.fixture(scope="module")
def half_way() -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """A state with a loss scale, what it was at an epoch's start, and after a step."""
    config = TrainConfig(batch=8, imgsz=32, model="yolov8n.yaml")
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    state = build_state(config, module, CPU, fresh_share=None, amp=True)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1024.0})
    settings = StepSettings(
        device=CPU, strides=(8, 16, 32), reg_max=16, amp=True, ema_decay=0.9, ema_tau=10.0
    )
    state.position = Position(1, 0)
    state.loss_sums[5] = 3  # the epoch before ended with skipped steps
    start = copy.deepcopy(state.to_payload())
    transaction = Transaction(state)
    transaction.begin()
    batches = make_batches([8], imgsz=32)
    train_step(state, batches, settings=settings, lr=0.01, transaction=transaction)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0})
    state.epoch_s, state.elapsed_s, state.loss_sums[5] = 7.0, 9.0, 20
    state.recoveries.append({"rung": {"imgsz": 32}})
    torch.rand(1)
    return state, start, copy.deepcopy(state.to_payload())


def returned(half_way: tuple[TrainState, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    state, start, later = half_way
    state.load_payload(copy.deepcopy(start))
    watch = Guard(state, NOWHERE)
    watch.begin(state)
    state.load_payload(copy.deepcopy(later))
    watch.due = "as a test"
    watch.go_back(state)
    return copy.deepcopy(state.to_payload())


def expected(half_way: tuple[TrainState, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """The epoch's start, but for what the run has learnt since."""
    _, start, later = half_way
    learnt = {name: later[name] for name in ("elapsed_s", "recoveries")}
    scaler = {**start["scaler"], "scale": 64.0}
    event = RolledBack(
        cause="as a test", number=1, most=3, step=1, epoch=0, sample=0, lr_scale=0.5, loss_scale=64
    )
    loss_sums = torch.cat((start["loss_sums"][:5], torch.zeros(1)))
    return {
        **start,
        **learnt,
        "loss_sums": loss_sums,
        "scaler": scaler,
        "lr_scale": 0.5,
        "rollbacks": [event.to_json()],
    }


def test_going_back_restores_all_that_an_epoch_moves(half_way: Any) -> None:
    assert_same(expected(half_way), returned(half_way))


@pytest.mark.parametrize("forgotten", [name for name in MOVED if name != "cuda_rng"])
def test_forgetting_any_of_it_shows(
    forgotten: str, half_way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "MOVED", tuple(n for n in MOVED if n != forgotten))
    try:
        end = returned(half_way)
    except KeyError:  # the guard itself looks at it
        return
    assert differences(expected(half_way), end) != []


def test_memory_that_runs_out_on_the_way_back_is_no_matter(
    half_way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, start, later = half_way
    state.load_payload(copy.deepcopy(start))
    watch = Guard(state, NOWHERE)
    watch.begin(state)
    state.load_payload(copy.deepcopy(later))
    watch.due = "as a test"
    with monkeypatch.context() as patched:
        patched.setattr(type(state.optimizer), "load_state_dict", _out_of_memory)
        with pytest.raises(Exception, match="does not fit"):
            watch.go_back(state)
    assert watch.due == "as a test" and state.rollbacks == []
    watch.go_back(state)
    assert_same(expected(half_way), state.to_payload())


def _out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("sample", [0, 8])
def test_what_is_remembered_is_not_trained_and_serves_three_times(
    sample: int, half_way: Any
) -> None:
    state, start, later = half_way
    state.load_payload(copy.deepcopy({**start, "position": [1, sample]}))
    watch = Guard(state, NOWHERE)
    watch.begin(state)
    scales = []
    for _ in range(3):
        state.load_payload({**copy.deepcopy(later), "lr_scale": state.lr_scale})
        watch.due = "as a test"
        state.rollbacks = state.rollbacks[-1:]
        watch.go_back(state)
        watch.begin(state)  # as the epoch that starts again does
        assert_same({**start["model"]}, {**state.model.state_dict()})
        scales.append((state.lr_scale, state.scaler.get_scale()))
        with torch.no_grad():
            for entry in state.optimizer.state.values():
                entry["exp_avg"].fill_(3.0)
    assert scales == [(0.5, 64.0), (0.25, 4.0), (0.125, 0.25)]


# 8 images in batches of 2 and one validation batch: an epoch asks five times whether to stop.
SHAPE = {"epochs": 2, "batch": 2, "imgsz": 32}
HOW_IT_GOT_THERE = {"rollbacks"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("numbers") / "tiny", train=8, val=2)


@pytest.fixture(scope="module")
def settings(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Resolved]]:
    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(guard_module, "IN_A_ROW", 2)
        yield lambda **changes: run_settings(dataset, output, **{**SHAPE, **changes})


def second_epoch(what: str, sample: int) -> Callable[[TrainState], str | None]:
    """Poison from a sample of the second epoch on, at the full learning rate only."""

    def rule(state: TrainState) -> str | None:
        here = state.position.epoch == 1 and state.position.sample >= sample
        return what if here and state.lr_scale == 1 else None

    return rule


@pytest.fixture(scope="module")
def planned(settings: Callable[..., Resolved]) -> Path:
    """Return the run that was told to have half the learning rate from the second epoch on."""
    real = TrainState.load_payload

    def halved(state: TrainState, payload: Any) -> None:
        real(state, {**payload, "lr_scale": 0.5})

    with pytest.MonkeyPatch.context() as patched:
        poisoner(patched)(lambda state: None)
        stopped = train(settings(), stop=StopAfter(4))  # asked in the first validation
        patched.setattr(TrainState, "load_payload", halved)
        # The first validation is repeated; its epoch was trained at the full rate.
        train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    return stopped.run_dir


@pytest.mark.parametrize(
    ("what", "sample", "cause", "step"),
    [
        ("gradient", 2, "2 steps in a row had no finite loss and gradient", 7),
        ("loss", 4, "2 steps in a row had no finite loss and gradient", 8),
        ("weights", 6, "the weights are no finite numbers", 8),
    ],
)
def test_the_end_is_that_of_the_run_planned_to_go_slower(
    what: str,
    sample: int,
    cause: str,
    step: int,
    settings: Callable[..., Resolved],
    planned: Path,
    poison: Poison,
    recorder: Recorder,
) -> None:
    poison(second_epoch(what, sample))
    outcome = train(settings(), sinks=[recorder])
    (event,) = recorder.of(RolledBack)
    assert (event.cause, event.step, event.number) == (cause, step, 1)
    assert (event.epoch, event.sample, event.lr_scale) == (1, 0, 0.5)
    rates = [done.lr["biases"] for done in recorder.of(EpochDone)]
    config = settings().config
    assert rates == [learning_rate(config, 3, 4), learning_rate(config, 7, 4) / 2]
    ours, theirs = (
        {k: v for k, v in state_of(run).items() if k not in HOW_IT_GOT_THERE}
        for run in (outcome.run_dir, planned)
    )
    assert differences(ours, theirs) == []
    assert rows(outcome.run_dir) == rows(planned)
    assert outcome.result is not None
    assert [row["lr_scale"] for row in outcome.result["rollbacks"]] == [0.5]


def test_a_row_of_skipped_steps_goes_on_in_the_next_epoch(
    settings: Callable[..., Resolved], poison: Poison, recorder: Recorder
) -> None:
    places = (Position(0, 6), Position(1, 0))
    poison(lambda state: "gradient" if state.position in places and state.lr_scale == 1 else None)
    train(settings(), sinks=[recorder])
    (event,) = recorder.of(RolledBack)
    assert (event.step, event.epoch, event.sample) == (5, 1, 0)


def test_single_steps_are_skipped_and_counted_without_going_back(
    settings: Callable[..., Resolved], poison: Poison, recorder: Recorder
) -> None:
    poison(lambda state: "gradient" if state.position == Position(1, 2) else None)
    train(settings(), sinks=[recorder])
    assert [event.skipped_steps for event in recorder.of(EpochDone)] == [0, 1]
    assert recorder.of(RolledBack) == []


@pytest.fixture(scope="module")
def rolled_back(settings: Callable[..., Resolved]) -> Path:
    """Return the run that goes back in its second epoch and is never stopped."""
    with pytest.MonkeyPatch.context() as patched:
        poisoner(patched)(second_epoch("gradient", 2))
        return train(settings()).run_dir


# Seven questions to the rollback: 5 of the first epoch, 1 sound step, 1 skipped one.
@pytest.mark.parametrize("questions", [7, 9])
def test_stopped_after_it_went_back_it_ends_the_same(
    questions: int, settings: Callable[..., Resolved], rolled_back: Path, poison: Poison
) -> None:
    poison(second_epoch("gradient", 2))
    stopped = train(settings(), stop=StopAfter(questions))
    assert stopped.reason == "interrupted"
    train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    assert differences(state_of(rolled_back), state_of(stopped.run_dir)) == []
    assert rows(rolled_back) == rows(stopped.run_dir)


@pytest.mark.parametrize("forgotten", ["lr_scale", "rollbacks"])
def test_forgetting_that_it_went_back_shows(
    forgotten: str,
    settings: Callable[..., Resolved],
    rolled_back: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poisoner(monkeypatch)(second_epoch("gradient", 2))
    stopped = train(settings(), stop=StopAfter(9))
    real, other = TrainState.load_payload, {"lr_scale": 1.0, "rollbacks": []}

    def forgetful(state: TrainState, payload: Any) -> None:
        real(state, {**payload, forgotten: other[forgotten]})

    with monkeypatch.context() as patched:
        patched.setattr(TrainState, "load_payload", forgetful)
        train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    assert differences(state_of(rolled_back), state_of(stopped.run_dir)) != []


def test_a_row_of_skipped_steps_goes_on_after_a_stop(
    settings: Callable[..., Resolved], poison: Poison, recorder: Recorder
) -> None:
    """What can be gone back to is then the place where it stopped."""
    poison(second_epoch("gradient", 2))
    stopped = train(settings(), stop=StopAfter(6))  # after the first skipped step
    train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt", sinks=[recorder])
    (event,) = recorder.of(RolledBack)
    assert (event.step, event.epoch, event.sample) == (7, 1, 4)


def test_asked_to_stop_with_spoilt_weights_it_goes_back_and_saves_what_was_sound(
    settings: Callable[..., Resolved], poison: Poison, recorder: Recorder
) -> None:
    poison(second_epoch("weights", 0))
    stopped = train(settings(), stop=StopAfter(5), sinks=[recorder])
    assert stopped.reason == "interrupted" and len(recorder.of(RolledBack)) == 1
    saved = state_of(stopped.run_dir)
    assert saved["position"] == [1, 0] and saved["lr_scale"] == 0.5
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())


def test_it_goes_back_three_times_and_no_more(
    settings: Callable[..., Resolved], poison: Poison, recorder: Recorder
) -> None:
    poison(lambda state: "gradient" if state.position.epoch == 1 else None)
    with pytest.raises(DivergedError, match=r"in epoch 2: .*It went back 3 times, to 0\.125"):
        train(settings(), sinks=[recorder])
    assert [event.lr_scale for event in recorder.of(RolledBack)] == [0.5, 0.25, 0.125]
    assert [event.number for event in recorder.of(RolledBack)] == [1, 2, 3]
    assert len(recorder.of(EpochDone)) == 1


@pytest.mark.parametrize("lag", [0, 2])
def test_losses_are_those_of_the_newest_step_that_is_over(lag: int) -> None:
    class Event:
        def __init__(self) -> None:
            self.over = False

        def record(self) -> None:
            self.over = False

        def query(self) -> bool:
            return self.over

        def synchronize(self) -> None:
            self.over = True

    state, _ = make_state()
    watch = Guard(state, NOWHERE, lag=lag)
    events: list[Event] = [Event() for _ in range(lag + 1)]
    watch._events = [*events] if lag else [None]
    state.loss_sums.copy_(torch.tensor([8.0, 4.0, 2.0, 2.0, 1.0, 0.0]))
    assert watch.losses(state) == state.mean_losses()  # no step yet: waits
    for step in range(1, 7):
        state.loss_sums.copy_(torch.tensor([step, 0, 0, 1, 0, 0]))
        watch.persists(state)
        assert watch.losses(state)["box_loss"] == max(1, step - lag) or step <= lag
        if step <= lag:
            assert watch.losses(state) == state.mean_losses()
    if lag:
        events[5 % 3].over = True  # of the newest step
        assert watch.losses(state)["box_loss"] == 6
    watch.begin(state)
    state.loss_sums[0] = 9
    assert watch.losses(state)["box_loss"] == 9  # nothing of an earlier epoch
