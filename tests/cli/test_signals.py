"""Ctrl-C once, and twice."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

CODE = """
import sys, time
from hsrloop.cli.stop import Stop
stop = Stop()
stop.listen()
sys.stdout.write("ready\\n"); sys.stdout.flush()
while not (stop() and {polite}):
    time.sleep(0.01)
sys.exit(stop.exit_code)
"""


def start(*, polite: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(polite=polite)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(signum: signal.Signals) -> None:
    process = start(polite=True)
    process.send_signal(signum)
    _, shown = process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert "being saved" in shown


def test_the_second_signal_ends_at_once() -> None:
    process = start(polite=False)
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert "being saved" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
