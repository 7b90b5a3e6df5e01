"""A whole run of the command line on a file system of its own that fills up under it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.train.run import train
from tests.conftest import write_tiny_dataset
from tests.faults.test_kill import check_equal
from tests.train.conftest import run_settings

MOUNT = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
SIZE_MB = 512
LIMIT_S = 200

# Fills the disk once a first checkpoint is on it, holding the run so that it cannot be faster;
# gives the room back when the run asks for it; brings what is left out of the namespace, with which
# the disk goes.
DRIVE = """
import errno, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

disk, kept, *command = sys.argv[1:]
ballast = Path(disk) / "ballast"


def fill_after_first():
    while not list(Path(disk).glob("runs/*/weights/last.pt")):
        time.sleep(0.005)
    run.send_signal(signal.SIGSTOP)
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    run.send_signal(signal.SIGCONT)


run = subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True, bufsize=1)
threading.Thread(target=fill_after_first, daemon=True).start()
for line in run.stdout:
    print(line, end="", flush=True)
    if "Waiting for room" in line:
        ballast.unlink()
code = run.wait()
shutil.copytree(Path(disk) / "runs", kept)
sys.exit(code)
"""


def can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    attempt = [*MOUNT, 'mount -t tmpfs tmpfs "$0"', str(folder)]
    return subprocess.run(attempt, capture_output=True, timeout=60).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("no file system can be mounted here: user namespaces are not allowed")
    return folder


def test_a_disk_that_fills_under_a_run_loses_nothing(tmp_path: Path, disk: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "tiny")
    resolved = run_settings(dataset, tmp_path / "whole", epochs=3)
    whole = train(resolved).run_dir
    values: dict[str, Any] = {**resolved.config.to_json(), "output": str(disk / "runs")}
    settings = tmp_path / "settings.json"  # which is YAML too
    settings.write_text(json.dumps(values))
    run = [sys.executable, "-m", "hsrloop", "train", "--config", str(settings)]
    command = [*MOUNT, f'mount -t tmpfs -o size={SIZE_MB}m tmpfs "$0"; exec "$@"', str(disk)]
    command += [sys.executable, "-c", DRIVE, str(disk), str(tmp_path / "kept"), *run]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left on device" in done.stdout and "Training goes on" in done.stdout
    assert done.stdout.count("Waiting for room") == 1
    (run_dir,) = (tmp_path / "kept").iterdir()
    check_equal(run_dir, whole)
