"""Spinning is shortened while others hold the cores, and only then."""

from __future__ import annotations

import threading

import pytest
import torch

from hsrloop.hardware import contention
from hsrloop.hardware.contention import SpinGovernor, open_second_pool, run_delay_s


class Machine:
    """A clock and a scheduler that say what the test wants."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0
        self.pools = self.opened = 0

    def pass_time(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.waited += share * seconds

    def hold(self):
        self.pools += 1
        self.opened += 1

        def close() -> None:
            self.pools -= 1

        return close


def governor(machine: Machine) -> SpinGovernor:
    return SpinGovernor(delay=lambda: machine.waited, clock=lambda: machine.now, hold=machine.hold)


def test_an_idle_machine_is_left_alone() -> None:
    machine = Machine()
    watch = governor(machine)
    for _ in range(20):
        machine.pass_time(1.0, 0.03)
        watch.observe()
    assert machine.opened == 0 and not watch.engaged


def test_a_neighbour_engages_it_and_its_end_releases_it() -> None:
    machine = Machine()
    watch = governor(machine)
    machine.pass_time(1.0, 0.9)
    watch.observe()
    assert watch.engaged and machine.pools == 1
    for share in (0.65, 0.65, 0.15):  # shortened, but the neighbour is still there
        machine.pass_time(1.0, share)
        watch.observe()
        assert watch.engaged
    machine.pass_time(1.0, 0.03)
    watch.observe()
    assert not watch.engaged and machine.pools == 0 and machine.opened == 1


def test_it_looks_at_intervals_only() -> None:
    machine = Machine()
    watch = governor(machine)
    machine.pass_time(0.1, 0.9)
    watch.observe()
    assert not watch.engaged


def test_close_releases_and_may_be_called_twice() -> None:
    machine = Machine()
    watch = governor(machine)
    machine.pass_time(1.0, 0.9)
    watch.observe()
    watch.close()
    watch.close()
    assert machine.pools == 0


def test_the_second_pool_is_a_sleeping_thread_that_ends() -> None:
    before = threading.active_count()
    close = open_second_pool()
    assert threading.active_count() == before + 1
    x = torch.arange(1 << 20, dtype=torch.float64)
    assert float(x.sum()) == float((1 << 20) * ((1 << 20) - 1) / 2)
    close()
    assert threading.active_count() == before


def test_the_delay_of_this_process_never_falls() -> None:
    first = run_delay_s()
    assert 0.0 <= first <= run_delay_s()


def test_what_is_governed_is_the_cpu_and_spins_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine()
    watch = governor(machine)
    monkeypatch.setattr(contention, "SpinGovernor", lambda: watch)
    machine.pass_time(1.0, 0.9)
    with contention.governed("cuda") as observe:
        assert not observe() and not watch.engaged
    with contention.governed("cpu") as observe:
        assert observe() and watch.engaged
    assert not watch.engaged and machine.pools == 0
