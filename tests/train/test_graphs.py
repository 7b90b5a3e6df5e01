"""Recorded steps train as others do, to the bit; what is not recorded is trained all the same."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hsrloop.config import Resolved, TrainConfig
from hsrloop.events import Event, Note, Recovered
from hsrloop.hardware.peak import peak_bytes
from hsrloop.model.base import load_base
from hsrloop.ops import loss
from hsrloop.ops.loss_gpu import SOURCE
from hsrloop.ops.nvrtc import counted_launches
from hsrloop.ops.paths import as_on_a_gpu
from hsrloop.train import checkpoint, graphs
from hsrloop.train import step as step_module
from hsrloop.train.build import build_state
from hsrloop.train.detector import KeptDetector
from hsrloop.train.graphs import StepGraphs
from hsrloop.train.precision import set_kernels
from hsrloop.train.recording import CudaRecorder, reason_of
from hsrloop.train.run import train
from hsrloop.train.snapshot import Snapshot
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, Transaction, train_step
from tests.kernels import host_kernels
from tests.train.conftest import Recorder as Listener
from tests.train.test_step import NAMES, make_batches, step_settings

T = TypeVar("T")
LR = 2.0**-9  # a float32 as it is
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
Settings = Callable[..., Resolved]


class Rerun:
    """Stands for CUDA graphs: a replay does the work again, into the tensors of the recording."""

    def __init__(self, *, room: bool = True, error: Exception | None = None) -> None:
        self.room, self.error = room, error
        self.fails_at = 1  # the forward pass; then the backward pass, the commit, the beginning
        self.out_of_memory_at = 0  # which replay; 0: none
        self.replays = self.recordings = 0

    def has_room(self) -> bool:
        return self.room

    def held_bytes(self) -> int:
        return 1000

    def warm(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        self.recordings += 1
        if self.error is not None and self.recordings == self.fails_at:
            work()
            raise self.error
        result = work()
        held = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

        def replay() -> None:
            self.replays += 1
            if self.replays == self.out_of_memory_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            again = [leaf for leaf in tree_leaves(work()) if isinstance(leaf, Tensor)]
            for old, new in zip(held, again, strict=True):
                old.copy_(new)

        return replay, result


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> Rerun:
    recorder = Rerun()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: recorder)
    return recorder


def make(
    device: torch.device = CPU, *, micro_batch: int = 8, amp: bool = True, **changes: Any
) -> tuple[TrainState, StepSettings, Transaction]:
    """State, settings and transaction of a run of batch 8 at 64 px."""
    values = {"batch": 8, "micro_batch": micro_batch, "imgsz": 64, **changes}
    config = TrainConfig().replace(**values)
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    state = build_state(config, module, device, fresh_share=None, amp=amp)
    settings = step_settings(device, amp=amp and device.type == "cuda")
    return state, settings, Transaction(state)


def take(
    state: TrainState,
    settings: StepSettings,
    transaction: Transaction,
    steps: list[list[int]],
    *,
    recorded: StepGraphs | None,
) -> None:
    """Take steps of given micro-batches, by `recorded` or as ever."""
    for number, sizes in enumerate(steps):
        batches = make_batches(sizes, seed=number)
        options: dict[str, Any] = {"settings": settings, "lr": LR / 2**number}
        if recorded is None:
            transaction.begin()
            train_step(state, batches, transaction=transaction, **options)
        else:
            recorded.begin(transaction)
            recorded.train_step(state, batches, transaction=transaction, **options)


def contents(state: TrainState) -> list[Any]:
    """All that a checkpoint would hold, in a fixed order."""
    payload = state.to_payload() | {"torch_rng": 0, "cuda_rng": 0}
    leaves = tree_leaves(payload)
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def prepared(
    state: TrainState,
    settings: StepSettings,
    transaction: Transaction,
    sizes: Collection[int] = (8,),
) -> tuple[StepGraphs, list[Event]]:
    said: list[Event] = []
    recorded = StepGraphs()
    recorded.prepare(state, settings, transaction, sizes, said.append)
    return recorded, said


WHOLE = [[8]] * 4
CASES: dict[str, tuple[int, list[list[int]], set[int]]] = {
    "whole steps": (8, WHOLE, {8}),
    "two passes a step": (4, [[4, 4]] * 4, {4}),
    "an epoch's last step is smaller": (8, [[8], [3], [8]], {8, 3}),
    "its last pass is smaller": (4, [[4, 4], [4, 1], [4, 4]], {4, 1}),
    "a step of another size": (8, [[8], [3], [8]], {8}),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return host_kernels(SOURCE, tmp_path_factory.mktemp("kernels"), together={"search": 1})


@pytest.fixture(params=["operators", "kernels"])
def criterion(
    request: pytest.FixtureRequest, host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> str:
    """What computes the criterion: torch's operators, which are not recorded, or kernels."""
    if request.param == "kernels":
        for module in (loss, step_module):
            monkeypatch.setattr(module, "loss_kernels", lambda device: host)
    return str(request.param)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("criterion")
def test_recorded_steps_train_as_others_do(
    case: str, amp: bool, optimizer: str, rerun: Rerun
) -> None:
    micro_batch, steps, sizes = CASES[case]
    start, ends = None, []
    for use in (False, True):
        parts = make(micro_batch=micro_batch, amp=amp, optimizer=optimizer)
        start = contents(parts[0])
        recorded = prepared(*parts, sizes)[0] if use else None
        take(*parts, steps, recorded=recorded)
        ends.append(contents(parts[0]))
    assert rerun.replays > 0
    assert start is not None and not same(start, ends[0])
    assert same(*ends)


@pytest.mark.parametrize("freeze", [0, 5])
@pytest.mark.parametrize("case", ["whole steps", "its last pass is smaller"])
def test_weights_cast_at_once_train_as_those_cast_one_by_one(
    case: str, freeze: int, rerun: Rerun
) -> None:
    micro_batch, steps, sizes = CASES[case]
    ends = []
    for use in (False, True):
        state, settings, transaction = make(micro_batch=micro_batch, freeze=freeze)
        settings = dataclasses.replace(settings, amp=True, amp_dtype=torch.bfloat16)
        recorded = prepared(state, settings, transaction, sizes)[0] if use else None
        take(state, settings, transaction, steps, recorded=recorded)
        ends.append(contents(state))
    assert rerun.replays > 0
    assert same(*ends)


@pytest.mark.usefixtures("criterion")
def test_nothing_reads_memory_that_nothing_wrote(rerun: Rerun) -> None:
    """So that deterministic runs need not fill it first, which torch does unless told."""
    ends = []
    torch.use_deterministic_algorithms(True)
    try:
        for fill in (False, True):
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            with as_on_a_gpu():
                parts = make()
                recorded = prepared(*parts)[0]
                take(*parts, WHOLE, recorded=recorded)
                kept = KeptDetector().of(parts[0].ema.module, CPU, half=False)
                found = kept.find(make_batches([8])[0].images)
            ends.append([*contents(parts[0]), found.rows, found.settled])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert same(*ends)


@pytest.mark.usefixtures("criterion")
def test_recording_leaves_the_state_as_it_is(rerun: Rerun) -> None:
    state, settings, transaction = make()
    take(state, settings, transaction, WHOLE, recorded=None)
    before = contents(state)
    recorded, said = prepared(state, settings, transaction)
    assert same(before, contents(state))
    assert recorded.gradients and not said
    assert state.recorded_bytes == 1000
    assert state.peak_bytes >= peak_bytes(CPU) + 1000
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert all(type(group["lr"]) is float for group in state.optimizer.param_groups)
    assert not any(group.get("capturable") for group in state.optimizer.param_groups)


def test_a_step_is_four_replays_and_three_where_the_criterion_has_operators(
    criterion: str, rerun: Rerun
) -> None:
    parts = make()
    recorded = prepared(*parts)[0]
    take(*parts, WHOLE[:1], recorded=recorded)
    assert rerun.replays == (5 if criterion == "kernels" else 4)  # the beginning is one, too


def test_a_crowd_has_its_criterion_computed_as_ever(
    host: dict[str, Any], criterion: str, rerun: Rerun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "PLACES", 2)
    steps = [[8], [8]]
    assert max(torch.bincount(batch.image_index).max() for batch in make_batches([8])) > 2
    ends = []
    for use in (False, True):
        parts = make()
        recorded = prepared(*parts)[0] if use else None
        rerun.replays = 0
        take(*parts, steps, recorded=recorded)
        ends.append(contents(parts[0]))
    assert rerun.replays == 8
    assert same(*ends)


def test_a_recorded_step_that_is_no_number_moves_the_position_alone(rerun: Rerun) -> None:
    ends = []
    for use in (False, True):
        state, settings, transaction = make()
        recorded = prepared(state, settings, transaction)[0] if use else None
        before = [p.detach().clone() for p in state.model.parameters()]
        state.grad_scale = float("inf")
        take(state, settings, transaction, [[8]], recorded=recorded)
        assert all(map(torch.equal, before, state.model.parameters()))
        assert state.steps == 1 and state.loss_sums[4:].tolist() == [1, 1]
        ends.append(contents(state))
    assert same(*ends)


def test_a_recording_is_made_anew_when_its_tensors_are_replaced(rerun: Rerun) -> None:
    """As by going back to an earlier state, in the middle of a run."""
    ends = []
    for use in (False, True):
        state, settings, transaction = make()
        recorded = prepared(state, settings, transaction)[0] if use else None
        held = Snapshot()
        held.take(state)
        take(state, settings, transaction, WHOLE, recorded=recorded)
        held.restore(state)
        if recorded is not None:
            recorded.prepare(state, settings, transaction, {8}, lambda event: None)
        take(state, settings, transaction, WHOLE[:2], recorded=recorded)
        ends.append(contents(state))
    assert same(*ends)


def test_recorded_once_for_a_rung_and_sizes(rerun: Rerun, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(graphs, "recorder_for", lambda device: made.append(device) or rerun)
    state, settings, transaction = make()
    recorded = StepGraphs()
    for _ in range(3):
        recorded.prepare(state, settings, transaction, {8}, lambda event: None)
    assert len(made) == 1
    state.renew_scaler(state.scaler.state_dict())
    recorded.prepare(state, settings, transaction, {8}, lambda event: None)
    assert len(made) == 2
    state.rung = dataclasses.replace(state.rung, imgsz=96)
    recorded.prepare(state, settings, transaction, {8}, lambda event: None)
    assert len(made) == 3
    recorded.prepare(state, settings, transaction, {8, 3}, lambda event: None)
    assert len(made) == 4


def test_what_has_one_cell_in_all_is_not_recorded(rerun: Rerun) -> None:
    """BatchNorm is in eval for that pass alone."""
    state, settings, transaction = make(imgsz=32)
    recorded, _ = prepared(state, settings, transaction, (8, 1))
    assert recorded.covers(make_batches([8], imgsz=32))
    assert not recorded.covers(make_batches([1], imgsz=32))
    assert not recorded.covers(make_batches([8], imgsz=64))


def test_what_has_no_room_is_not_tried_in_every_epoch(
    rerun: Rerun, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun.room, made = False, []
    monkeypatch.setattr(graphs, "recorder_for", lambda device: made.append(device) or rerun)
    state, settings, transaction = make()
    recorded = StepGraphs()
    for _ in range(3):
        recorded.prepare(state, settings, transaction, {8}, lambda event: None)
        take(state, settings, transaction, [[8]], recorded=recorded)
    assert len(made) == 1


def test_without_room_or_where_it_is_not_wanted_nothing_is_recorded(rerun: Rerun) -> None:
    rerun.room = False
    state, settings, transaction = make()
    before = contents(state)
    assert not prepared(state, settings, transaction)[0].gradients
    assert same(before, contents(state))
    rerun.room = True
    wanted = state.rung
    state.rung = dataclasses.replace(wanted, cuda_graphs=False)
    assert not prepared(state, settings, transaction)[0].gradients
    assert state.recorded_bytes == 0
    state.rung = wanted
    assert prepared(state, settings, transaction)[0].gradients


def test_what_cannot_be_recorded_is_said_once_and_trained_all_the_same(rerun: Rerun) -> None:
    rerun.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    state, settings, transaction = make()
    before = contents(state)
    recorded, said = prepared(state, settings, transaction)
    recorded.prepare(state, settings, transaction, {8}, said.append)
    (note,) = said
    assert isinstance(note, Note) and note.level == "warning"
    assert "not permitted when stream is capturing)" in note.text
    assert same(before, contents(state))
    plain = make()
    take(*plain, WHOLE, recorded=None)
    take(state, settings, transaction, WHOLE, recorded=recorded)
    assert same(contents(state), contents(plain[0]))


@pytest.mark.usefixtures("criterion")
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), AssertionError()])
def test_what_fails_half_way_leaves_nothing(error: Exception, fails_at: int, rerun: Rerun) -> None:
    rerun.error, rerun.fails_at = error, fails_at
    state, settings, transaction = make()
    take(state, settings, transaction, WHOLE, recorded=None)
    before = contents(state)
    recorded, said = prepared(state, settings, transaction)
    assert not recorded.gradients and len(said) == 1
    assert same(before, contents(state))
    assert state.recorded_bytes == 0
    assert all(parameter.grad is None for parameter in state.model.parameters())


@pytest.fixture
def rounded_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates as on CUDA, where both ways of taking a step read a float32."""

    def set_rates(state: TrainState, lr: float) -> list[float]:
        for group in state.optimizer.param_groups:
            group["lr"] = float(torch.tensor(lr * group["lr_scale"]))
        return [group["lr"] for group in state.optimizer.param_groups]

    for module in (graphs, step_module):
        monkeypatch.setattr(module, "set_rates", set_rates)


@pytest.mark.usefixtures("rounded_rates")
def test_a_run_ends_alike_with_recorded_steps_and_without(settings: Settings, rerun: Rerun) -> None:
    ends = []
    for use in (False, True):
        outcome = train(settings(epochs=2, batch=4, micro_batch=2, llrd=True, cuda_graphs=use))
        assert bool(rerun.replays) is use
        ends.append(checkpoint.read(outcome.run_dir / "weights" / "last.pt").state)
    for name in ("model", "ema", "optimizer", "scaler", "loss_sums", "steps", "position"):
        assert same(tree_leaves(ends[0][name]), tree_leaves(ends[1][name])), name


def test_a_run_that_has_no_memory_to_record_goes_on_at_the_same_settings(
    settings: Settings, rerun: Rerun, recorder: Listener
) -> None:
    rerun.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    outcome = train(settings(epochs=2, batch=8), sinks=[recorder])
    assert outcome.reason == "completed"
    assert not recorder.of(Recovered) and not rerun.replays
    (warning,) = [note for note in recorder.of(Note) if note.level == "warning"]
    assert "out of memory" in warning.text


@pytest.mark.usefixtures("rounded_rates")
def test_recorded_steps_are_the_first_to_go_when_memory_runs_out_beside_them(
    settings: Settings, rerun: Rerun, recorder: Listener
) -> None:
    rerun.out_of_memory_at = 9  # amid the second step
    outcome = train(settings(epochs=2, batch=4, micro_batch=2), sinks=[recorder])
    (event,) = recorder.of(Recovered)
    assert (event.change, event.sample) == ("cuda_graphs True -> False", 4)
    assert outcome.rung.micro_batch == 2 and rerun.replays == 9
    plain = train(settings(epochs=2, batch=4, micro_batch=2, cuda_graphs=False))
    ends = [checkpoint.read(run.run_dir / "weights" / "last.pt").state for run in (outcome, plain)]
    for name in ("model", "ema", "optimizer", "scaler", "loss_sums", "steps", "position"):
        assert same(tree_leaves(ends[0][name]), tree_leaves(ends[1][name])), name


def test_smaller_steps_are_recorded_where_memory_ran_out_for_larger_ones(
    settings: Settings, rerun: Rerun, recorder: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StepGraphs.prepare

    def prepare(self: StepGraphs, state: TrainState, *args: Any) -> None:
        if state.rung.micro_batch == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        real(self, state, *args)

    monkeypatch.setattr(StepGraphs, "prepare", prepare)
    outcome = train(settings(epochs=1, batch=8), sinks=[recorder])
    assert [event.change for event in recorder.of(Recovered)] == ["micro_batch 8 -> 4"]
    assert outcome.rung.cuda_graphs and rerun.replays


def test_why_work_cannot_be_recorded_is_what_failed_first() -> None:
    found: list[BaseException] = []
    try:
        try:
            try:
                raise KeyError("a place where it is handled")
            except KeyError:
                raise RuntimeError("operation not permitted\nmore") from ValueError("by hand")
        except RuntimeError:
            raise RuntimeError("a previous error during capture") from None
    except RuntimeError as error:
        found.append(error)
    assert reason_of(found[0]) == "a previous error during capture"  # told to leave it at that
    found[0].__suppress_context__ = False
    assert reason_of(found[0]) == "operation not permitted"
    assert reason_of(RuntimeError()) == "RuntimeError"


@pytest.fixture
def card() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    set_kernels(CUDA, deterministic=True)
    yield CUDA
    set_kernels(CUDA, deterministic=False)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_recorded_steps_train_as_others_do(
    case: str, optimizer: str, card: torch.device
) -> None:
    micro_batch, steps, sizes = CASES[case]
    ends = []
    for use in (False, True):
        parts = make(card, micro_batch=micro_batch, optimizer=optimizer)
        recorded = prepared(*parts, sizes)[0] if use else None
        assert recorded is None or recorded.gradients
        take(*parts, steps, recorded=recorded)
        ends.append(contents(parts[0]))
    assert same(*ends)


@pytest.mark.gpu
def test_on_a_gpu_detections_are_recorded_too_and_leave_the_steps_alone(
    card: torch.device,
) -> None:
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, device=card)
    ends = []
    for use in (False, True):
        parts = make(card)
        recorded = prepared(*parts)[0] if use else None
        kept = KeptDetector()
        for _ in range(4):
            take(*parts, WHOLE[:1], recorded=recorded)
            own = kept.of(parts[0].ema.module, card, half=True)
            detections = None if recorded is None else recorded.detections
            found = own.find(images, recorded=detections)
            assert torch.equal(found.rows, own.find(images).rows)
        ends.append(contents(parts[0]))
    assert same(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
def test_on_a_gpu_two_kernels_find_a_batch(half: bool, card: torch.device) -> None:
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, device=card)
    found = KeptDetector().of(make(card)[0].ema.module, card, half=half)
    found.find(images)  # the first proves them
    with counted_launches() as launches:
        found.find(images)
    assert (launches["candidates"], launches["suppress"]) == (1, 1)


@pytest.mark.gpu
def test_on_a_gpu_a_recording_keeps_what_it_reads(card: torch.device) -> None:
    given = torch.ones(4, device=card)
    alive = weakref.ref(given)
    recorder = CudaRecorder(card)
    replay, result = recorder.record(lambda given=given: given + 1)
    del given
    replay()
    assert alive() is not None and result.tolist() == [2.0] * 4
    del replay
    assert alive() is None


@pytest.mark.gpu
def test_on_a_gpu_a_dropped_recording_gives_its_memory_back(card: torch.device) -> None:
    parts = make(card)
    take(*parts, WHOLE, recorded=None)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    recorded, said = prepared(*parts)
    assert not said and recorded.gradients
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - before
    assert held > 2**25
    recorded.drop()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < held / 4
    assert held / 4 < parts[0].recorded_bytes < held  # gradients lie beside


@pytest.mark.gpu
def test_on_a_gpu_a_full_card_records_nothing(card: torch.device) -> None:
    from hsrloop.hardware.memory import capped

    recorder = CudaRecorder(card)
    assert recorder.has_room()
    with capped(card, 0.01):
        held = torch.empty(
            int(0.005 * torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device=card
        )
        assert not recorder.has_room()
        del held
