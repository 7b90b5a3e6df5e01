"""SIGKILL at any instant: the run goes on, and ends bit-identical to one that was left alone.

`pytest -m slow tests/faults/test_kill.py -s` kills two hundred runs and prints the row of
docs/reliability.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hsrloop.errors import CheckpointError
from hsrloop.model.weights import read_checkpoint
from hsrloop.train.folder import RESULT, newest_unfinished
from tests.conftest import write_tiny_dataset
from tests.faults import warmed
from tests.train.conftest import run_settings
from tests.train.test_resume import differences, kinds, rows, state_of

AGAIN = 0.3  # how often a run that goes on is killed too
LIMIT_S = 300.0  # no run takes so long, however busy the machine


@dataclass(slots=True)
class Tally:
    """What a series of kills found."""

    kills: int = 0
    unsaved: int = 0  # kills before the first last.pt: such a run starts anew
    lost_s: list[float] = field(default_factory=list)  # from the last save, or the start, to a kill

    def __str__(self) -> str:
        lost = sorted(self.lost_s)
        return (
            f"{self.kills} kills, {self.unsaved} of them before anything was saved; runs lost: 0; "
            f"work lost: median {lost[len(lost) // 2]:.1f} s, at most {lost[-1]:.1f} s"
        )


class Forks:
    """Starts runs as forks of a warmed process."""

    def __init__(self, dataset: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([warmed.__name__])
        self._dataset = dataset

    def start(self, output: Path, resume: Path | None = None) -> BaseProcess:
        # A save every 0.2 s: kills fall into writing as often as elsewhere.
        settings = run_settings(self._dataset, output, checkpoint_minutes=0.2 / 60, epochs=2)
        resumed = str(resume) if resume else None
        process = self._context.Process(
            target=warmed.run, args=(settings.config.to_json(), resumed)
        )
        process.start()
        return process


def ended(process: BaseProcess, within_s: float) -> bool:
    """Wait so long; return whether the run came to its end meanwhile, else kill it."""
    process.join(within_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        return False
    assert process.exitcode == 0
    return True


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Forks(write_tiny_dataset(tmp_path_factory.mktemp("kill") / "tiny"))


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run left alone, and the seconds it takes."""
    output = tmp_path_factory.mktemp("whole")
    assert ended(forks.start(output), LIMIT_S)  # the process they are forked from warms up
    began = time.monotonic()
    assert ended(forks.start(output), LIMIT_S)
    return max(output.iterdir()), time.monotonic() - began


def await_save(output: Path, process: BaseProcess) -> None:
    """Return when a run has its first last.pt, or has ended."""
    until = time.monotonic() + LIMIT_S
    while process.exitcode is None and not list(output.glob("*/weights/last.pt")):
        assert time.monotonic() < until, "nothing was saved"
        time.sleep(0.01)


def kill_series(
    forks: Forks, whole: tuple[Path, float], folder: Path, *, kills: int, seed: int
) -> Tally:
    """Kill so many runs and let each come to its end after.

    The instants are spread evenly over a run's duration, that of the quickest so far; every
    other one counts from the first save on, since a short run spends most of its time before it.
    """
    reference, takes_s = whole
    rng, tally = random.Random(seed), Tally()
    for i in range(kills):
        output = folder / f"{i}"
        instant = (i + rng.random()) / kills * takes_s
        began, last, before, process = time.time(), None, tally.kills, forks.start(output)
        if i % 2:
            await_save(output, process)
            instant /= 3
        while not ended(process, instant):
            tally.kills += 1
            killed = time.time()
            if list(output.glob(f"*/{RESULT}")):  # it was complete, and about to exit
                tally.lost_s.append(0.0)
                break
            try:
                last = newest_unfinished(output)
            except CheckpointError:
                assert not list(output.glob("*/weights/last.pt")), "a run lost"
                tally.unsaved += 1
                last, since = None, began
            else:
                since = max(began, last.stat().st_mtime)
            tally.lost_s.append(killed - since)
            instant = rng.random() * takes_s if rng.random() < AGAIN else LIMIT_S
            began, process = time.time(), forks.start(output, last)
        if tally.kills == before:  # the machine has become faster
            takes_s = min(takes_s, time.time() - began)
        (run_dir,) = [path.parent for path in output.glob(f"*/{RESULT}")]
        check_equal(run_dir, reference)
        if (i + 1) % 20 == 0:
            print(f"\n{i + 1} runs: {tally}", flush=True)
    return tally


def check_equal(run_dir: Path, reference: Path) -> None:
    assert differences(state_of(reference), state_of(run_dir)) == []
    assert rows(run_dir) == rows(reference)
    assert kinds(run_dir) == kinds(reference)
    assert read_checkpoint(run_dir / "weights" / "best.pt")["hsrloop"]["names"]
    left = {path.name for path in (run_dir / "weights").iterdir()}
    assert left - {"last_previous.pt"} == {"best.pt", "last.pt"}
    assert not list(run_dir.glob("*.tmp"))


def test_twenty_runs_killed_at_any_instant(
    forks: Forks, whole: tuple[Path, float], tmp_path: Path
) -> None:
    tally = kill_series(forks, whole, tmp_path, kills=20, seed=0)
    assert tally.kills >= 10  # a run may end a little before its time


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_two_hundred_runs_killed_at_any_instant(
    forks: Forks, whole: tuple[Path, float], tmp_path: Path
) -> None:
    tally = kill_series(forks, whole, tmp_path, kills=200, seed=1)
    print(f"\nSIGKILL, forks of a warmed process: {tally}")
    assert tally.kills >= 100


def command(*arguments: str) -> subprocess.Popen[bytes]:
    """Start the real command line."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hsrloop", "train", *arguments],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def command_line(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    values = run_settings(
        forks._dataset, Path("."), checkpoint_minutes=0.2 / 60, epochs=2
    ).config.to_json()
    file = tmp_path_factory.mktemp("settings") / "settings.json"  # which is YAML too
    file.write_text(json.dumps({k: v for k, v in values.items() if k != "output"}))
    return ("--config", str(file))


@pytest.mark.parametrize("seed", range(3))
def test_command_lines_killed_and_resumed(
    seed: int, command_line: tuple[str, ...], whole: tuple[Path, float], tmp_path: Path
) -> None:
    wait_s = random.Random(seed).random() * whole[1] / 2
    process = command(*command_line, "-o", str(tmp_path))
    until = time.monotonic() + LIMIT_S
    while not list(tmp_path.glob("*/weights/last.pt")) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(wait_s)
    process.kill()
    process.wait()
    if not list(tmp_path.glob(f"*/{RESULT}")):
        resumed = command("--resume", "-o", str(tmp_path))
        assert resumed.wait(LIMIT_S) == 0
    (run_dir,) = tmp_path.iterdir()
    check_equal(run_dir, whole[0])
