"""Tiers on this machine: what is skipped and why, what is measured, what recovery changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.bench import tiers
from hsrloop.bench.meters import PowerReading, Stopwatch
from hsrloop.bench.suite import SMOKE, TIGHT, cells_of
from hsrloop.bench.tiers import WARM, StepWatch, measure_tiers, memory_of, why_not
from hsrloop.config import Resolved, resolve
from hsrloop.errors import DeviceError
from hsrloop.events import Climbed, EpochDone, Note, Progress, Recovered
from hsrloop.hardware.memory import GIB, gpu_memory
from hsrloop.hardware.tiers import CPU, TIERS, tier_named
from hsrloop.paths import cache_folder
from hsrloop.records import DeviceInfo, Rung, Tier
from hsrloop.train import fits, step
from tests.bench.test_bench import Clock
from tests.conftest import CardMemory

TINY = {"model": "yolov8n.yaml", "imgsz": 64, "batch": 4}


def recovered(change: str) -> Recovered:
    return Recovered(cause="GPU memory", change=change, rung={}, epoch=0, sample=0, reason="")


class By(Stopwatch):
    """A stopwatch by a clock of the test's own."""

    def __init__(self, clock: Clock) -> None:
        self.stamp = clock  # type: ignore[method-assign]


def epoch_done() -> EpochDone:
    values = dict.fromkeys((f.name for f in dataclasses.fields(EpochDone)), 0)
    return EpochDone(**values)  # type: ignore[arg-type]


def test_steps_are_timed_after_warm_up_and_again_after_a_recovery() -> None:
    clock = Clock()
    watch = StepWatch(4, stopwatch=By(clock))
    for _ in range(WARM + 2):
        clock.now += 10.0
        assert not watch()
    watch.handle(recovered("micro_batch 8 -> 4"))
    watch.handle(Note(text="of no matter"))
    answers = []
    for _ in range(WARM + 4):
        clock.now += 0.5
        answers.append(watch())
    assert answers == [False] * (WARM + 3) + [True]
    assert watch.step_s == pytest.approx(0.5)
    assert watch.changes == ["micro_batch 8 -> 4"]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_validation_is_neither_counted_nor_timed(steps: int) -> None:
    """Nor is the start of the next epoch, but where a small set is a single step of it."""
    clock, reading = Clock(), PowerReading()
    watch = StepWatch(4, reading=reading, stopwatch=By(clock))
    timed = 0
    for epoch in range(20):
        for number in range(steps):
            taken = epoch * steps + number
            timed += taken >= WARM and (number > 0 or steps == 1)
            clock.now += 0.5 if number or steps == 1 else 7.0
            ended = watch()
            assert ended == (timed == 4)
            assert (reading._since < math.inf) == (taken >= WARM - 1)
            if ended:
                assert watch.step_s == pytest.approx(0.5)
                return
        for done in range(3):  # batches of its validation
            clock.now += 10.0
            watch.handle(Progress(task="validating", done=done, total=3))
            assert not watch() and reading._since == math.inf
        watch.handle(epoch_done())
    raise AssertionError("it never ended")


def test_a_larger_micro_batch_is_timed_anew_too() -> None:
    clock = Clock()
    watch = StepWatch(1, stopwatch=By(clock))
    for seconds in (10.0,) * WARM:
        clock.now += seconds
        watch()
    watch.handle(Climbed(change="micro_batch 4 -> 8", rung={}, epoch=2))
    for _ in range(WARM + 1):
        clock.now += 0.5
        ended = watch()
    assert ended and watch.step_s == pytest.approx(0.5)
    assert watch.changes == ["micro_batch 4 -> 8"]


def test_a_run_that_ends_before_has_no_speed() -> None:
    watch = StepWatch(4, stopwatch=By(Clock()))
    watch()
    assert watch.step_s == 0.0


def card(gib: float) -> DeviceInfo:
    return DeviceInfo(kind="cuda", name="Card", total_bytes=int(gib * GIB))


def test_which_tiers_a_machine_can_try() -> None:
    no_gpu = DeviceInfo(kind="cpu")
    assert {why_not(tier, no_gpu) for tier in TIERS if tier is not CPU} == {"skipped: no GPU"}
    assert why_not(CPU, no_gpu) == why_not(CPU, card(8)) == ""
    assert why_not(tier_named("medium"), card(7.8)) == ""
    assert why_not(tier_named("high"), card(7.8)) == "skipped: it takes 12 GiB, the card has 8"
    assert not any(why_not(tier, card(79.1)) for tier in TIERS)


def test_a_smaller_card_is_emulated_and_the_whole_card_comes_back(
    card_memory: CardMemory,
) -> None:
    device = torch.device("cuda:0")
    with pytest.raises(KeyError), memory_of(tier_named("medium"), device, 80 * GIB):
        assert gpu_memory(device).free_bytes == pytest.approx(6 * GIB, abs=1)
        raise KeyError
    assert card_memory.shares == [pytest.approx(6 / 80), 1.0]
    with memory_of(CPU, torch.device("cpu"), 0):
        pass
    assert len(card_memory.shares) == 2


@pytest.fixture
def asked(tiny_dataset: Path) -> Any:
    return resolve([("test", {"dataset": str(tiny_dataset), "device": "cpu"})])


def test_the_tier_of_this_machine_is_run(asked: Any) -> None:
    rows = list(measure_tiers(asked, steps=1, emit=lambda _: None, changes=TINY))
    assert [row.name for row in rows] == [tier.name for tier in TIERS]
    assert [row.note for row in rows] == ["skipped: no GPU"] * 4 + ["fits"]
    assert rows[-1].images_per_s is not None and rows[-1].images_per_s.median > 0
    assert rows[-1].settings == {**TINY, "micro_batch": 4}
    assert all(row.settings == TINY for row in rows[:-1]), "nothing ended anywhere"


def test_what_recovery_made_of_a_tier_is_told(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass runs out of memory whenever it is given more than four images."""
    real = step.forward_train

    def limited(module: Any, images: torch.Tensor) -> Any:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(module, images)

    monkeypatch.setattr(step, "forward_train", limited)
    changes = {**TINY, "batch": 8}
    (row,) = measure_tiers(asked, steps=1, emit=lambda _: None, tiers=[CPU], changes=changes)
    assert row.note.endswith("micro_batch 8 -> 4") and row.images_per_s is not None
    assert row.settings == {**changes, "micro_batch": 4}


def test_a_tier_that_cannot_run_says_so_and_the_next_one_goes_on(asked: Any) -> None:
    broken = {**TINY, "model": "nowhere/of_that_name.pt"}
    rows = list(measure_tiers(asked, steps=1, emit=lambda _: None, tiers=[CPU], changes=broken))
    assert len(rows) == 1 and "does not exist" in rows[0].note and rows[0].images_per_s is None
    assert rows[0].settings == broken


def test_a_micro_batch_too_large_for_a_tier_costs_that_tier_only(asked: Any) -> None:
    larger = Resolved(asked.config.replace(micro_batch=8), asked.sources)
    rows = list(measure_tiers(larger, steps=1, emit=lambda _: None, changes=TINY))
    assert [row.note for row in rows[:-1]] == ["skipped: no GPU"] * 4
    assert "micro_batch is 8; it must be at most batch (4)" in rows[-1].note


def test_the_cpu_has_its_threads_after_a_gpu_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    try:
        torch.set_num_threads(1)
        with tiers.threads_of(torch.device("cuda")):
            assert torch.get_num_threads() == 1
        with tiers.threads_of(torch.device("cpu")):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_tier_of_the_cpu_is_trained_with_all_of_them(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, had = torch.get_num_threads(), list[int]()

    def trained(*_: Any, **__: Any) -> None:
        had.append(torch.get_num_threads())
        raise DeviceError("enough")

    monkeypatch.setattr(tiers, "train", trained)
    monkeypatch.setattr(tiers, "threads_at_start", lambda: 3)
    list(measure_tiers(asked, steps=1, emit=lambda _: None, tiers=[CPU], changes=TINY))
    assert had == [3] and torch.get_num_threads() == before


MEDIUM = tier_named("medium")
REHEARSED = {**TINY, "batch": 8, "rehearsal": "always"}


@pytest.fixture
def small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiers run on the CPU: a card trains two images at once for each GiB it has."""
    room: list[float] = []
    real = step.forward_train

    @contextmanager
    def memory_of(tier: Tier, device: torch.device, total_bytes: int) -> Iterator[None]:
        room.append(2 * tier.from_gib)
        try:
            yield
        finally:
            room.pop()

    def limited(module: Any, images: torch.Tensor) -> Any:
        if len(images) > room[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(module, images)

    monkeypatch.setattr(tiers, "why_not", lambda tier, info: "")
    monkeypatch.setattr(tiers, "memory_of", memory_of)
    monkeypatch.setattr(step, "forward_train", limited)


@pytest.fixture(params=["absent", "present"])
def users_file(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """What the user's own runs found to fit must be there afterwards, as it was, or not at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = cache_folder() / fits.FILE
    if request.param == "present":
        rung = Rung(micro_batch=2, imgsz=64, cache=False, workers=0, val_batch=2, bank="cv2")
        fits.Fits.of("a key").remember(rung)
    before = path.read_bytes() if path.exists() else None
    yield
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("order", [(TIGHT, MEDIUM), (MEDIUM, TIGHT)])
@pytest.mark.usefixtures("small_cards", "users_file")
def test_what_fits_a_card_is_not_taken_for_what_fits_another(
    asked: Any, order: tuple[Tier, ...]
) -> None:
    rows = measure_tiers(asked, steps=1, emit=lambda _: None, tiers=order, changes=REHEARSED)
    found = {row.name: (row.note, row.settings["micro_batch"]) for row in rows}
    assert found == {TIGHT.name: ("micro_batch 8 -> 4", 4), "medium": ("fits", 8)}


@pytest.mark.usefixtures("small_cards", "users_file")
def test_recovery_in_the_suite_leaves_the_users_file_alone(asked: Any) -> None:
    scope = replace(SMOKE, tier_changes=REHEARSED)
    (cell,) = [c for c in cells_of(asked, scope, lambda _: None) if c.name == "recovery"]
    (row,) = cell.run()
    assert row.note == "micro_batch 8 -> 4"
