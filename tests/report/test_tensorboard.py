"""TensorBoard's files and server."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hsrloop.events import EpochDone, Note, RolledBack, RunStarted
from hsrloop.report import tensorboard
from hsrloop.report.tensorboard import TensorBoardSink, start_server

Make = Callable[..., EpochDone]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_losses_metrics_and_rates(
    tmp_path: Path, epoch_done: Make, run_started: RunStarted
) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.handle(run_started)
    sink.handle(epoch_done(1))
    sink.handle(Note(text="careful", level="warning"))
    sink.handle(epoch_done(2))
    sink.close()
    points = scalars(tmp_path)
    assert points["train/box_loss"] == [(1, 1.0), (2, 0.5)]
    assert points["metrics/mAP50-95"] == [(1, 0.25), (2, 0.25)]
    assert [value for _, value in points["lr/biases"]] == pytest.approx([0.002, 0.002])


def test_going_back_is_a_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.handle(
        RolledBack(
            cause="the loss is no finite number", number=1, most=3, step=70, epoch=2, sample=0,
            lr_scale=0.5, loss_scale=1.0,
        )
    )  # fmt: skip
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("run/rollbacks")
    assert text.step == 2
    (words,) = text.tensor_proto.string_val
    assert words == b"the loss is no finite number: learning rate x 0.5 from here on"


def test_resuming_hides_the_points_that_are_run_again(tmp_path: Path, epoch_done: Make) -> None:
    first = TensorBoardSink(tmp_path)
    for epoch in (1, 2, 3):
        first.handle(epoch_done(epoch, ap50=0.1))
    first.close()
    time.sleep(1.1)  # event files are told apart by the second they were made in
    second = TensorBoardSink(tmp_path, purge_step=2)
    second.handle(epoch_done(2, ap50=0.9))
    second.close()
    assert [step for step, _ in scalars(tmp_path)["metrics/mAP50"]] == [1, 2]


def test_the_server_takes_the_next_free_port_and_ends(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start_server(port)
        assert not server.answered
        server.serve(tmp_path)
        try:
            assert server.url is not None and server.answered
            assert server.url.startswith("http://127.0.0.1:")
            assert not server.url.endswith(f":{port}/")
            with urllib.request.urlopen(server.url, timeout=20) as answer:
                assert answer.status == 200
        finally:
            server.close()
            server.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url, timeout=5)


@pytest.mark.parametrize("serves", [False, True])
def test_the_server_does_not_outlive_a_killed_run(serves: bool, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from hsrloop.report.tensorboard import start_server; "
        f"s = start_server(0); {serves} and s.serve(pathlib.Path({str(tmp_path)!r})); "
        "sys.stdout.write(f'{s._process.pid}\\n'); sys.stdout.flush(); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.1)
    assert not _alive(pid)


def test_nobody_waits_for_a_server_that_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(0)
    process = server._process
    assert process is not None
    done: list[str] = []
    for name in ("kill", "wait"):
        own = getattr(process, name)
        monkeypatch.setattr(
            process, name, lambda *a, own=own, name=name, **k: (done.append(name), own(*a, **k))[1]
        )
    server.close()
    assert done[0] == "kill" and process.poll() is not None


def test_processes_of_plugins_end_with_the_server(tmp_path: Path) -> None:
    server = start_server(0)
    server.serve(tmp_path)
    assert server.url is not None and server._process is not None
    leader = psutil.Process(server._process.pid)
    until = time.monotonic() + 30
    while not (family := leader.children(recursive=True)) and time.monotonic() < until:
        time.sleep(0.1)
    server.close()
    _, outliving = psutil.wait_procs(family, timeout=30)
    assert family and outliving == []


def test_failing_to_start_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tensorboard.sys, "executable", str(tmp_path / "no-python"))
    with caplog.at_level(logging.WARNING):
        server = start_server(0)
        server.serve(tmp_path)
        assert server.answered
        assert server.url is None
        assert server.url is None
        server.close()
    assert len(caplog.records) == 1
    assert "--no-tensorboard" in caplog.text


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
