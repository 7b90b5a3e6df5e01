"""Ctrl-C once, and twice."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hsrloop.cli.stop import Stop


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Let children hear of a terminal that closes, also where `nohup` started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


CODE = """
import sys, time
from hsrloop.cli.stop import Stop
stop = Stop()
stop.listen()
stop()
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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


CACHING = """
import sys, time
from hsrloop.cli import main, run
from hsrloop.train import run as train_run
def train(*args, **kwargs):
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    time.sleep(30)
train_run.train = train
main.main(["train", "-d", "data.yaml", "--no-auto-scale"])
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_a_signal_ends_it_at_once(signum: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CACHING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    _, shown = process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert shown.strip() == "Stopped before the first step: nothing had to be saved."


def test_the_second_signal_gives_the_cursor_back() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(polite=False)], stdout=subprocess.PIPE, stderr=theirs
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    shown = b""
    for expected in (b"Once more ends it at once.", b"\x1b[?25h"):
        process.send_signal(signal.SIGINT)
        while expected not in shown:
            shown += os.read(ours, 1000)
    process.communicate(timeout=20)
    assert process.returncode == 130
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves_the_run(
    signum: signal.Signals, tiny_dataset: Path, tmp_path: Path
) -> None:
    """As a terminal or a batch system sends it: loader processes receive it too."""
    options = "-m yolov8n.yaml --imgsz 64 --batch 4 --epochs 500 --workers 1 --device cpu"
    process = subprocess.Popen(
        [sys.executable, "-m", "hsrloop", "train", "-d", str(tiny_dataset), *options.split()]
        + ["--no-tensorboard", "--no-auto-scale", "-o", str(tmp_path / "my runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("my runs/*/results.csv")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signum)
    shown, complaints = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, complaints
    assert "Error" not in complaints and "Traceback" not in complaints
    (last,) = tmp_path.glob("my runs/*/weights/last.pt")
    hint = next(line for line in shown.splitlines() if "Go on with:" in line)
    assert shlex.split(hint)[-2:] == ["--resume", str(last)]


def test_a_terminal_that_closes_saves_the_run(tiny_dataset: Path, tmp_path: Path) -> None:
    """The system says so, the shell may too, and nothing can be written to it any more."""
    options = "-m yolov8n.yaml --imgsz 64 --batch 4 --epochs 500 --workers 1 --device cpu"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hsrloop", "train", "-d", str(tiny_dataset), *options.split()]
        + ["--no-tensorboard", "--no-auto-scale", "-o", str(tmp_path / "runs")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    reader = threading.Thread(target=_drain, args=(ours,), daemon=True)
    reader.start()
    until = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/results.csv")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGHUP)  # as a shell does
    os.close(ours)  # and the system: its other end is gone
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    (last,) = tmp_path.glob("runs/*/weights/last.pt")
    (events,) = tmp_path.glob("runs/*/events.jsonl")
    assert '"interrupted"' in events.read_text().splitlines()[-1]


def _drain(stream: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(stream, 10_000):
            pass


def test_under_nohup_a_terminal_that_closes_is_no_matter() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kept = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        stop = Stop()
        stop.listen()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == stop._receive
    finally:
        signal.signal(signal.SIGHUP, before)
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), kept, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_benchmark_and_all_it_made(
    signum: signal.Signals, tiny_dataset: Path, tmp_path: Path
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    command = [sys.executable, "-m", "hsrloop", "bench", "--against", "ultralytics", "-d"]
    command += [str(tiny_dataset), "-m", "yolov8n.yaml", "--imgsz", "64", "--epochs", "500"]
    env = {**os.environ, "TMPDIR": str(place)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list(place.glob("hsrloop-against-*/*/*/results.csv")):  # ours trains
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signum)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and b"Stopped: nothing is written." in said
    assert children and not psutil.wait_procs(children, timeout=10)[1]
    assert not list(place.iterdir())
