"""Tiers on this machine: what is skipped and why, what is measured, what recovery changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.bench.tiers import WARM, StepWatch, measure_tiers, memory_of, why_not
from hsrloop.config import resolve
from hsrloop.events import Note, Recovered
from hsrloop.hardware.memory import GIB
from hsrloop.hardware.tiers import CPU, TIERS, tier_named
from hsrloop.records import DeviceInfo
from hsrloop.train import step
from tests.bench.test_bench import Clock

TINY = {"model": "yolov8n.yaml", "imgsz": 64, "batch": 4}


def recovered(change: str) -> Recovered:
    return Recovered(cause="GPU memory", change=change, rung={}, epoch=0, sample=0, reason="")


def test_steps_are_timed_after_warm_up_and_again_after_a_recovery() -> None:
    clock, settled = Clock(), []
    watch = StepWatch(4, settle=lambda: settled.append(clock.now), clock=clock)
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
    assert len(settled) == 3, "the device is waited for whenever the clock is read"


def test_a_run_that_ends_before_has_no_speed() -> None:
    watch = StepWatch(4, clock=Clock())
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(KeyError), memory_of(tier_named("medium"), torch.device("cuda"), 80 * GIB):
        raise KeyError
    assert shares == [pytest.approx(6 / 80), 1.0]
    with memory_of(CPU, torch.device("cpu"), 0):
        pass
    assert len(shares) == 2


@pytest.fixture
def asked(tiny_dataset: Path) -> Any:
    return resolve([("test", {"dataset": str(tiny_dataset), "device": "cpu"})])


def test_the_tier_of_this_machine_is_run(asked: Any) -> None:
    rows = list(measure_tiers(asked, steps=1, emit=lambda _: None, changes=TINY))
    assert [row.name for row in rows] == [tier.name for tier in TIERS]
    assert [row.note for row in rows] == ["skipped: no GPU"] * 4 + ["fits"]
    assert rows[-1].images_per_s is not None and rows[-1].images_per_s.median > 0
    assert rows[-1].settings == TINY


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


def test_a_tier_that_cannot_run_says_so_and_the_next_one_goes_on(asked: Any) -> None:
    broken = {**TINY, "model": "nowhere/of_that_name.pt"}
    rows = list(measure_tiers(asked, steps=1, emit=lambda _: None, tiers=[CPU], changes=broken))
    assert len(rows) == 1 and "does not exist" in rows[0].note and rows[0].images_per_s is None
