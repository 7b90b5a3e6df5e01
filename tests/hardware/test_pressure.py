"""When a card is too full to work with, and when it only looks so."""

from __future__ import annotations

import pytest
import torch

from hsrloop.hardware import pressure
from hsrloop.hardware.pressure import (
    GROWING,
    SETTLING,
    Pressure,
    Reading,
    memory_use,
    spill_cap,
    watch,
    without_spilling,
)
from hsrloop.records import DeviceInfo
from tests.conftest import GIB, CardMemory


class Watched:
    """A pressure gauge over a card that the test fills."""

    def __init__(self) -> None:
        self.retries, self.full = 0, 0.5
        self.gauge = Pressure(lambda: Reading(self.retries, self.full))
        self.gauge.resume()

    def window(self, seconds: float = 1.0, *, retries: int = 0, samples: int = 10) -> str | None:
        self.retries += retries
        return self.gauge.observe(samples, seconds)

    def settle(self, windows: int = 10) -> None:
        assert [self.window() for _ in range(windows)] == [None] * windows


def test_retries_in_several_windows_in_a_row_are_thrashing() -> None:
    watched = Watched()
    watched.settle()
    said = [watched.window(retries=1) for _ in range(GROWING)]
    assert said[:-1] == [None] * (GROWING - 1) and "empty its cache again" in str(said[-1])


def test_single_retries_are_not() -> None:
    watched = Watched()
    for _ in range(5):
        assert watched.window(retries=2) is None
        assert watched.window() is None


def test_kernels_may_be_chosen_in_peace() -> None:
    watched = Watched()
    for _ in range(SETTLING):
        assert watched.window(60.0, retries=9) is None
    assert all(watched.window(retries=1) is None for _ in range(GROWING - 1))


def test_retries_of_a_validation_do_not_count() -> None:
    watched = Watched()
    watched.settle()
    for _ in range(10):
        watched.retries += 5
        watched.gauge.resume()
        assert watched.window() is None


def test_slow_on_a_full_card_is_spilling() -> None:
    watched = Watched()
    watched.settle()
    watched.full = 0.99
    assert watched.window(3.5) is None
    said = watched.window(4.0)
    assert said == "steps became 4.0 times slower with 99% of the memory taken"


@pytest.mark.parametrize(
    ("full", "windows"),
    [
        (0.90, [9.0] * 6),  # slow for another reason: a hot card, a busy host
        (0.99, [2.9] * 6),
        (0.99, [60.0, 1.0, 60.0, 1.0]),  # the process was paused
    ],
)
def test_slow_alone_or_full_alone_is_not(full: float, windows: list[float]) -> None:
    watched = Watched()
    watched.settle()
    watched.full = full
    assert [watched.window(seconds) for seconds in windows] == [None] * len(windows)


def test_the_first_window_after_something_else_is_not_timed() -> None:
    watched = Watched()
    watched.settle()
    watched.full = 0.99
    for _ in range(4):
        watched.gauge.resume()
        assert watched.window(9.0) is None
        assert watched.window(1.0) is None


def test_time_is_counted_by_the_image() -> None:
    watched = Watched()
    watched.settle()
    watched.full = 0.99
    assert all(watched.window(10.0, samples=100) is None for _ in range(4))


def test_the_cpu_is_not_watched() -> None:
    assert watch("cpu") is None and memory_use("cpu") is None


CARD = DeviceInfo(kind="cuda", total_bytes=8 * 2**30, free_bytes=4 * 2**30)


@pytest.mark.parametrize(
    ("info", "system", "release", "cap"),
    [
        (CARD, "Linux", "6.8.0-45-generic", None),
        (CARD, "Linux", "5.15.153.1-microsoft-standard-WSL2", 0.485),
        (CARD, "Windows", "10", 0.485),
        (DeviceInfo(kind="cpu"), "Windows", "10", None),
    ],
)
def test_torch_is_capped_where_drivers_lend_main_memory(
    info: DeviceInfo, system: str, release: str, cap: float | None
) -> None:
    assert spill_cap(info, system=system, release=release) == cap


@pytest.mark.parametrize(("before", "meanwhile"), [(1.0, 0.485), (0.25, 0.25)])
def test_against_spilling_a_smaller_cap_stays_and_the_one_before_comes_back(
    card_memory: CardMemory, monkeypatch: pytest.MonkeyPatch, before: float, meanwhile: float
) -> None:
    monkeypatch.setattr(pressure, "spill_cap", lambda info: 0.485)
    card_memory.share = before
    with without_spilling(CARD):
        assert card_memory.share == meanwhile
    assert card_memory.share == before


def test_where_nothing_spills_no_cap_is_set(
    card_memory: CardMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "spill_cap", lambda info: None)
    with without_spilling(CARD):
        pass
    assert card_memory.shares == []


def test_a_card_is_as_full_and_as_large_as_the_cap_makes_it(
    card_memory: CardMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * GIB)
    card_memory.reserved = 5.9
    shares = []
    monkeypatch.setattr(pressure, "Pressure", lambda read: read)
    for cap in (80, 6):
        card_memory.share = cap / 80
        shares.append(watch("cuda:0")().full_share)
        use = memory_use("cuda:0")
        assert use is not None and use.capacity_bytes == pytest.approx(cap * GIB)
    assert shares == [pytest.approx(5.9 / 80), pytest.approx(5.9 / 6)]
