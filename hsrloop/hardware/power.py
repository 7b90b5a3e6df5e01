"""Laptops: keep the system from falling asleep during a run, and say when the battery runs low."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import psutil

from hsrloop.events import EpochDone, Event, Note

_LOG = logging.getLogger(__name__)
LOW_PERCENT = 20.0  # a guess: time to find a socket


class Battery(NamedTuple):
    """A battery that the machine runs on now; `minutes_left` is the system's guess, 0: none."""

    percent: float
    minutes_left: int = 0

    def __str__(self) -> str:
        left = f", for about {self.minutes_left} minutes" if self.minutes_left else ""
        return f"{self.percent:.0f} %{left}"


def discharging() -> Battery | None:
    """Return the battery if the machine runs on it; None: it is plugged in, or nobody knows."""
    try:
        found = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError, ValueError):
        # Unknown on this system, or its files hold what psutil does not expect.
        return None
    if found is None or found.power_plugged is not False:
        return None
    seconds = max(found.secsleft, 0)  # negative: unknown
    return Battery(percent=float(found.percent), minutes_left=round(seconds / 60))


def inhibitor_command(platform: str, pid: int) -> list[str] | None:
    """Return the command that keeps a system awake, and ends with this process; None: no such.

    `cat` ends when our end of its pipe closes, which the kernel sees to when we are killed.
    """
    commands = {
        "linux": [
            *("systemd-inhibit", "--what=sleep:idle", "--mode=block", "--who=hsrloop"),
            *("--why=A training is running", "cat"),
        ],
        "darwin": ["caffeinate", "-i", "-w", str(pid)],
    }
    command = commands.get(platform)
    return command if command and shutil.which(command[0]) else None


class Power:
    """Looks after the machine's power from `__enter__` to `__exit__`.

    Args:
        emit: hears what the user should know.
        battery: what the machine runs on; replaced in tests.
    """

    def __init__(
        self,
        emit: Callable[[Event], None],
        *,
        battery: Callable[[], Battery | None] = discharging,
    ) -> None:
        self._emit, self._battery = emit, battery
        self._said_low = False
        self._inhibitor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Power:
        """Keep the system awake, without waiting for its answer; warn when on battery."""
        self._inhibitor = _start_inhibitor()
        battery = self._battery()
        if battery is not None:
            self._said_low = battery.percent < LOW_PERCENT
            self._warn(f"running on battery ({battery}): plug in, or it may end the run")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the system sleep again."""
        inhibitor, self._inhibitor = self._inhibitor, None
        if inhibitor is not None:
            _end(inhibitor)

    def emit(self, event: Event) -> None:
        """Pass an event on; after an epoch look at the battery."""
        self._emit(event)
        if self._said_low or not isinstance(event, EpochDone):
            return
        battery = self._battery()
        if battery is not None and battery.percent < LOW_PERCENT:
            self._said_low = True
            self._warn(f"the battery is low ({battery}): plug in. --resume goes on with a run")

    def _warn(self, text: str) -> None:
        self._emit(Note(text=text, level="warning"))


def _start_inhibitor() -> subprocess.Popen[bytes] | None:
    command = inhibitor_command(sys.platform, os.getpid())
    if command is None:
        _LOG.debug("nothing here keeps the system awake")
        return None
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run; and no password can be asked for
        )
    except OSError as error:
        _LOG.debug("%s: %s", command[0], error)
        return None


def _end(inhibitor: subprocess.Popen[bytes]) -> None:
    """End the inhibitor and all of its process group."""
    ended = inhibitor.poll()
    assert inhibitor.stdin is not None
    inhibitor.stdin.close()
    if ended is not None:  # no system to ask, or it refused
        _LOG.debug("the system was not kept awake (exit code %d)", ended)
        return
    with contextlib.suppress(OSError):  # it ended just now
        os.killpg(inhibitor.pid, signal.SIGKILL)
    inhibitor.wait()
