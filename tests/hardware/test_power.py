"""The system is kept awake as long as a run lasts, however it ends; batteries are watched."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hsrloop.events import EpochDone, Event, Note, StepDone
from hsrloop.hardware import power
from hsrloop.hardware.power import Battery, Power, discharging, inhibitor_command
from tests.train.conftest import Recorder

LISTENS = "exec cat"  # as the real one, until its stdin closes
DEAF = "exec sleep 600"
Inhibitor = Callable[[str], Path]


@pytest.fixture
def inhibitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inhibitor:
    """Return a function that installs a systemd-inhibit; its file holds process id and options."""

    def install(then: str) -> Path:
        program, told = tmp_path / "systemd-inhibit", tmp_path / "told"
        program.write_text(
            f'#!/bin/sh\necho $$ "$@" > {told}.part; mv {told}.part {told}\n{then}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(power.sys, "platform", "linux")
        return told

    return install


def process_in(told: Path) -> psutil.Process:
    """Wait until the inhibitor has said who it is."""
    until = time.monotonic() + 30
    while not told.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    return psutil.Process(int(told.read_text().split()[0]))


def lasts(process: psutil.Process) -> bool:
    time.sleep(0.3)  # so long, at least
    return process.status() != psutil.STATUS_ZOMBIE


def gone(process: psutil.Process) -> bool:
    psutil.wait_procs([process], timeout=30)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("then", [LISTENS, DEAF])
def test_held_until_the_end(inhibitor: Inhibitor, then: str) -> None:
    told = inhibitor(then)
    with Power(Recorder().handle, battery=lambda: None):
        process = process_in(told)
        assert lasts(process)
    assert gone(process)
    assert "--what=sleep:idle --mode=block --who=hsrloop" in told.read_text()
    assert told.read_text().split()[-1] == "cat"


def test_released_when_the_run_fails(inhibitor: Inhibitor) -> None:
    told = inhibitor(LISTENS)
    with pytest.raises(ZeroDivisionError), Power(Recorder().handle, battery=lambda: None):
        process = process_in(told)
        raise ZeroDivisionError
    assert gone(process)


CODE = """
import time
from hsrloop.hardware.power import Power
with Power(lambda event: None):
    time.sleep(600)
"""


def test_released_when_the_run_is_killed(inhibitor: Inhibitor) -> None:
    told = inhibitor(LISTENS)
    with subprocess.Popen([sys.executable, "-c", CODE]) as run:
        process = process_in(told)
        assert lasts(process)
        run.send_signal(signal.SIGKILL)
    assert gone(process)


def test_a_system_that_refuses_is_no_matter(
    inhibitor: Inhibitor, caplog: pytest.LogCaptureFixture
) -> None:
    told = inhibitor("exit 1")
    caplog.set_level(logging.DEBUG, "hsrloop")
    with Power(Recorder().handle, battery=lambda: None) as held:
        process_in(told)
        assert held._inhibitor is not None and held._inhibitor.wait() == 1
    assert [r.getMessage() for r in caplog.records] == [
        "the system was not kept awake (exit code 1)"
    ]
    assert caplog.records[0].levelno == logging.DEBUG


def test_without_an_inhibitor_a_run_goes_its_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Power(Recorder().handle, battery=lambda: None) as held:
        assert held._inhibitor is None


def test_each_system_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power.shutil, "which", lambda name: f"/bin/{name}")
    assert inhibitor_command("darwin", 42) == ["caffeinate", "-i", "-w", "42"]
    assert inhibitor_command("win32", 42) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (None, None),
        (SimpleNamespace(percent=50, secsleft=-2, power_plugged=True), None),
        (SimpleNamespace(percent=50, secsleft=-1, power_plugged=None), None),
        (SimpleNamespace(percent=50.4, secsleft=-1, power_plugged=False), "50 %"),
        (
            SimpleNamespace(percent=50, secsleft=4000, power_plugged=False),
            "50 %, for about 67 minutes",
        ),
    ],
)
def test_what_the_system_says_of_its_battery(
    shown: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power.psutil, "sensors_battery", lambda: shown)
    found = discharging()
    assert (str(found) if found else None) == expected


def test_a_battery_that_cannot_be_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError("/sys/class/power_supply/BAT0/status")

    monkeypatch.setattr(power.psutil, "sensors_battery", fail)
    assert discharging() is None
    monkeypatch.delattr(power.psutil, "sensors_battery")
    assert discharging() is None


def event(kind: type[Event]) -> Event:
    """An event whose content does not matter."""
    return object.__new__(kind)


@pytest.fixture(autouse=True)
def nothing_to_inhibit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power.sys, "platform", "none")


def watched(charges: list[Battery | None]) -> tuple[list[str], list[Battery | None]]:
    """Run as many epochs as there are charges after the first; return warnings, and charges."""
    heard, left = Recorder(), list(charges)
    with Power(heard.handle, battery=lambda: left.pop(0)) as held:
        for _ in charges[1:]:
            held.emit(event(StepDone))
            held.emit(event(EpochDone))
    assert len(heard.events) - len(heard.of(Note)) == 2 * len(charges[1:])
    assert all(note.level == "warning" for note in heard.of(Note))
    return [note.text for note in heard.of(Note)], left


def test_on_battery_is_said_at_the_start_and_low_once_more() -> None:
    said, left = watched([Battery(63), Battery(21), Battery(19, 12), Battery(18)])
    assert said == [
        "running on battery (63 %): plug in, or it may end the run",
        "the battery is low (19 %, for about 12 minutes): plug in. --resume goes on with a run",
    ]
    assert left == [Battery(18)]  # not looked at any more


def test_plugged_in_nothing_is_said_until_it_is_pulled() -> None:
    assert watched([None, None, None]) == ([], [])
    said, _ = watched([None, None, Battery(19)])
    assert [text[:18] for text in said] == ["the battery is low"]


def test_low_from_the_start_is_said_once() -> None:
    said, left = watched([Battery(12), Battery(11)])
    assert len(said) == 1 and "12 %" in said[0] and left == [Battery(11)]
