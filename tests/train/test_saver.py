"""What the saver writes, when, and what it does about a disk that is full or damaged."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hsrloop.config import TrainConfig
from hsrloop.errors import CheckpointError, OutputError, WeightsError
from hsrloop.events import CheckpointSaved, Note
from hsrloop.model.weights import read_checkpoint
from hsrloop.ops.paths import as_on_a_gpu
from hsrloop.records import Position
from hsrloop.train import checkpoint, saver
from hsrloop.train.checkpoint import LAST, PREVIOUS, RunIdentity
from hsrloop.train.resume import read_newest
from hsrloop.train.saver import RETRY_S, Saver
from hsrloop.train.snapshot import Snapshot
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, train_step
from tests.faults.conftest import Clock, no_file_beyond
from tests.train.conftest import Recorder
from tests.train.test_resume import differences
from tests.train.test_step import NAMES, make_batches, make_state

ONLY_WEIGHTS = 20 * 2**20  # room for a best.pt of yolov8n, 6 MiB, not for its last.pt, 54 MiB


class Bench:
    """A state, and a saver of it on a clock that moves when told."""

    def __init__(self, folder: Path, *, minutes: float = 0.0, last_is_good: bool = True) -> None:
        self.state, self.settings = make_state()
        self.folder, self.clock, self.heard = folder, Clock(), Recorder()
        self.slept: list[Callable[[], None]] = []
        self.saver = Saver(
            folder,
            RunIdentity(
                config=TrainConfig(batch=8, imgsz=64, model="yolov8n.yaml"),
                sources={},
                names=NAMES,
                fingerprint="f",
                versions={},
                threads=1,
                fresh_share=None,
            ),
            self.heard.handle,
            minutes=minutes,
            last_is_good=last_is_good,
            clock=self.clock,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.clock.now += seconds
        if self.slept:
            self.slept.pop(0)()

    def step(self) -> None:
        train(self.state, self.settings)

    def epoch(self, *due: str) -> None:
        """Pretend that an epoch was validated, and save what is due."""
        row = dict.fromkeys(("ap50", "ap50_95", "precision", "recall"), 0.5)
        self.state.history.append(row)
        self.state.position = Position(len(self.state.history), 0)
        self.state.due.extend(due)
        self.saver.save(self.state)

    def settle(self) -> None:
        """Wait for the writer, and hear what it did."""
        self.saver._wait()

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def warnings(self) -> list[str]:
        return [note.text for note in self.heard.of(Note) if note.level == "warning"]

    def epoch_of(self, name: str) -> int:
        return int(read_checkpoint(self.folder / name)["hsrloop"]["epochs_completed"])


def train(state: TrainState, settings: StepSettings) -> None:
    train_step(state, make_batches([2], seed=state.steps), settings=settings, lr=0.01)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    with made.saver:
        yield made


def test_beside_a_gpu_the_writer_hands_the_interpreter_over_quickly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickling holds it; each kernel of a step that is started meanwhile would wait 5 ms for it."""
    usual, seen, write = sys.getswitchinterval(), [], checkpoint.write

    def watched(path: Path, *args: Any, **kwargs: Any) -> None:
        seen.append(sys.getswitchinterval())
        if path.name == LAST:
            raise OutputError("the disk is full.")
        write(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", watched)
    with as_on_a_gpu():
        bench.epoch("best.pt", LAST)
    bench.settle()
    assert seen == [pytest.approx(saver.HANDOVER_S)] * 2
    assert usual > saver.HANDOVER_S
    assert sys.getswitchinterval() == usual
    bench.clock.now += RETRY_S
    bench.epoch("best.pt")
    bench.settle()
    assert seen[2:] == [usual] * 2  # on the CPU a step seldom needs it


def test_two_that_write_at_once_leave_the_interpreter_as_it_was() -> None:
    usual, first, second = sys.getswitchinterval(), saver._quick_handover, saver._quick_handover
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert sys.getswitchinterval() < usual
    second.__exit__()
    assert sys.getswitchinterval() == usual


def test_files_hold_the_state_as_it_was_when_they_were_due(bench: Bench) -> None:
    bench.step()
    frozen = Snapshot()
    frozen.take(bench.state)
    bench.epoch("best.pt", "epoch1.pt", LAST)
    frozen.take(bench.state)
    bench.step()  # while the writer writes
    bench.settle()
    assert bench.files() == ["best.pt", "epoch1.pt", LAST]
    saved = checkpoint.read(bench.folder / LAST)
    assert differences(dict(saved.state), frozen.payload) == []
    assert saved.identity == bench.saver._identity
    averages = frozen.payload["ema"]["module"]
    for name in bench.files():
        content = torch.load(bench.folder / name, weights_only=False)
        for key, tensor in content["model"].state_dict().items():
            assert torch.equal(tensor, averages[key].to(tensor.dtype)), key
        assert content["train_metrics"]["ap50_95"] == 0.5
    assert [(e.path, e.epoch) for e in bench.heard.of(CheckpointSaved)] == [
        ("weights/best.pt", 1),
        ("weights/epoch1.pt", 1),
        ("weights/last.pt", 1),
    ]


def test_within_an_epoch_no_metrics_are_claimed(bench: Bench) -> None:
    bench.epoch(LAST)
    bench.settle()
    bench.state.position = Position(1, 2)
    bench.state.due.append(LAST)
    bench.saver.finish(bench.state)
    assert read_checkpoint(bench.folder / LAST)["train_metrics"] == {}
    assert bench.heard.of(CheckpointSaved)[-1].sample == 2


def test_the_last_one_before_is_kept(bench: Bench) -> None:
    for _ in range(3):
        bench.epoch(LAST)
        bench.settle()
    assert bench.files() == [LAST, PREVIOUS]
    assert (bench.epoch_of(PREVIOUS), bench.epoch_of(LAST)) == (2, 3)


def test_where_there_are_no_links_there_is_only_the_last_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    for _ in range(2):
        bench.epoch(LAST)
        bench.settle()
    assert bench.files() == [LAST] and bench.epoch_of(LAST) == 2
    assert not bench.warnings()


@pytest.mark.parametrize("refuses", [False, True])
def test_the_writer_gives_way_and_goes_on_where_it_may_not(
    refuses: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's priority is its own: the others of the process keep theirs."""
    real = os.setpriority
    asked: list[tuple[int, int]] = []

    def noting(which: int, who: int, priority: int) -> None:
        asked.append((who, priority))
        if refuses:
            raise PermissionError(13, "not allowed")
        real(which, who, priority)

    monkeypatch.setattr(os, "setpriority", noting)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    bench.epoch("best.pt", LAST)
    bench.settle()
    assert bench.files() == ["best.pt", LAST]
    ((thread, priority),) = asked
    assert thread != threading.get_native_id() and priority == max(saver.NICE, before)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_time_makes_a_save_due_but_not_while_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, minutes=5)
    assert not bench.saver.due(bench.state)
    bench.clock.now = 299
    assert not bench.saver.due(bench.state)
    bench.clock.now = 300
    assert bench.saver.due(bench.state)
    with monkeypatch.context() as patch:  # a write that ends when told
        import threading

        go = threading.Event()
        real = checkpoint.write
        patch.setattr(checkpoint, "write", lambda *a, **k: (go.wait(60), real(*a, **k)))
        with bench.saver:
            bench.saver.save(bench.state)
            bench.clock.now = 900
            assert not bench.saver.due(bench.state)
            bench.step()
            bench.state.due.append(LAST)  # waits for the writer
            bench.saver.save(bench.state)
            assert bench.state.due == [LAST]
            go.set()
            bench.saver.finish(bench.state)
    assert checkpoint.read(tmp_path / LAST).state["steps"] == 1


def test_without_minutes_time_makes_nothing_due(bench: Bench) -> None:
    bench.clock.now = 1e9
    assert not bench.saver.due(bench.state)


def test_a_full_disk_is_said_once_and_tried_again(bench: Bench) -> None:
    bench.epoch("best.pt", LAST)
    bench.settle()
    before = (bench.folder / LAST).read_bytes()
    with no_file_beyond(ONLY_WEIGHTS):
        bench.epoch("best.pt", LAST)
        bench.settle()
        bench.clock.now += RETRY_S - 1
        bench.epoch(LAST)  # not yet
        assert bench.saver._writing is None and not bench.saver.due(bench.state)
        bench.clock.now += 1
        assert bench.saver.due(bench.state)
        bench.saver.save(bench.state)
        bench.settle()
    (warning,) = bench.warnings()
    assert "last.pt: File too large. Free space. It needs 5" in warning
    assert "MiB free. Training goes on" in warning
    assert (bench.folder / LAST).read_bytes() == before
    assert bench.epoch_of("best.pt") == 2  # what there is room for is written
    bench.clock.now += RETRY_S
    bench.saver.save(bench.state)
    bench.settle()
    assert bench.heard.of(Note)[-1].text == "checkpoints are written again"
    assert bench.epoch_of(LAST) == 3 and not bench.saver.due(bench.state)
    assert bench.files() == ["best.pt", LAST, PREVIOUS]  # no half-written file


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_whatever_the_disk_says_the_best_weights_are_kept_for_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    best = {k: v.clone() for k, v in bench.state.ema.module.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", refuse)
        bench.epoch("best.pt", "epoch1.pt", LAST)
        bench.settle()
    assert bench.files() == []
    assert len(bench.warnings()) == 1 and os.strerror(number) in bench.warnings()[0]
    bench.step()
    bench.epoch("epoch2.pt", LAST)
    bench.clock.now += RETRY_S
    bench.saver.save(bench.state)
    bench.settle()
    assert bench.files() == ["best.pt", "epoch2.pt", LAST]
    assert bench.epoch_of("best.pt") == 1
    assert "epoch1.pt is given up" in bench.warnings()[-1]
    content = torch.load(bench.folder / "best.pt", weights_only=False)
    written = content["model"].state_dict()
    assert all(torch.equal(written[k], v.to(written[k].dtype)) for k, v in best.items())


def test_the_one_before_makes_room_on_a_full_disk(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        bench.epoch(LAST)
        bench.settle()
    real = os.fsync

    def full_while_there_are_two(descriptor: int) -> None:
        if (bench.folder / PREVIOUS).exists() and list(bench.folder.glob(".last.pt.*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full_while_there_are_two)
        bench.epoch(LAST)
        bench.settle()
    assert not bench.warnings()
    assert bench.epoch_of(LAST) == 3


def test_the_end_waits_for_room(bench: Bench) -> None:
    limit = no_file_beyond(0)
    limit.__enter__()
    bench.slept = [lambda: None, lambda: limit.__exit__(None, None, None)]
    bench.state.due.extend(["best.pt", LAST])
    bench.saver.finish(bench.state)
    assert bench.files() == ["best.pt", LAST] and bench.state.due == []
    assert "Waiting for room for 120 s" in bench.warnings()[-1]


def test_what_cannot_be_written_at_the_end_is_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "END_PATIENCE_S", 10.0)
    with no_file_beyond(0):
        bench.state.due.extend(["best.pt", LAST])
        with pytest.raises(OutputError, match=r"Not on the disk: the newest best\.pt, last\.pt\."):
            bench.saver.finish(bench.state)
    assert bench.clock.now == pytest.approx(10.0)
    assert bench.files() == []


def test_after_an_error_of_the_run_the_best_weights_get_one_more_chance(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(ZeroDivisionError), bench.saver:
        with no_file_beyond(0):
            bench.epoch("best.pt", LAST)
            bench.settle()
        raise ZeroDivisionError
    assert bench.files() == ["best.pt"]
    other = Bench(tmp_path / "best.pt")  # no folder at all
    with pytest.raises(ZeroDivisionError), other.saver:
        other.epoch("best.pt", LAST)
        raise ZeroDivisionError
    assert "best.pt could not be written: " in other.warnings()[-1]


def test_a_diverged_state_is_not_written_over_a_good_one(bench: Bench) -> None:
    bench.epoch(LAST)
    bench.settle()
    with torch.no_grad():
        next(bench.state.ema.module.parameters())[0] = float("nan")
    bench.epoch(LAST)
    bench.settle()
    assert bench.epoch_of(LAST) == 1 and not bench.warnings()


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize("damage", [flip, cut])
def test_what_the_disk_does_not_give_back_is_not_put_in_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    bench.epoch(LAST)
    bench.settle()
    real = os.fsync

    def lossy(descriptor: int) -> None:
        real(descriptor)
        for draft in bench.folder.glob(".*.tmp"):
            damage(draft)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", lossy)
        bench.epoch(LAST)
        bench.settle()
    assert "the disk gave back other bytes" in bench.warnings()[0]
    assert bench.epoch_of(LAST) == 1 and bench.files() == [LAST]


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bench = Bench(tmp_path_factory.mktemp("weights"))
    with bench.saver:
        for _ in range(2):
            bench.epoch(LAST)
            bench.settle()
    return bench.folder


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")])
def test_in_place_of_a_damaged_one_the_one_before_is_read(
    two_saves: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(two_saves, tmp_path / "weights"))
    heard = Recorder()
    assert read_newest(folder / LAST, heard.handle, trust=False).path == folder / LAST
    assert not heard.events
    damage(folder / LAST)
    saved = read_newest(folder / LAST, heard.handle, trust=False)
    assert saved.path == folder / PREVIOUS and len(saved.state["history"]) == 1
    (note,) = heard.of(Note)
    assert note.level == "warning" and f"{folder / LAST} is " in note.text
    damage(folder / PREVIOUS)
    with pytest.raises((CheckpointError, WeightsError), match=r"last\.pt is "):
        read_newest(folder / LAST, heard.handle, trust=False)


def test_a_damaged_file_does_not_become_the_one_before(two_saves: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_saves, tmp_path / "weights"))
    flip(folder / LAST)
    bench = Bench(folder, last_is_good=False)
    with bench.saver:
        bench.epoch(LAST)
        bench.settle()
        assert bench.epoch_of(PREVIOUS) == 1
        bench.epoch(LAST)
        bench.settle()
    assert (bench.epoch_of(PREVIOUS), bench.epoch_of(LAST)) == (1, 2)
    assert checkpoint.read(folder / PREVIOUS).state["history"] == bench.state.history[:1]


# What a write calls in the system, in its order; a kill may come before each.
CALLS = ("fsync", "posix_fadvise", "link", "replace", "replace", "open")


@pytest.mark.parametrize("at", range(len(CALLS)))
def test_killed_while_writing_there_is_always_a_whole_file(
    two_saves: Path, tmp_path: Path, at: int
) -> None:
    folder = Path(shutil.copytree(two_saves, tmp_path / "weights"))
    whole = {"hsrloop": {"epochs_completed": 3}, "tensor": torch.ones(1000)}
    child = os.fork()
    if child == 0:  # no thread and no parallel kernel is needed for writing
        killed_at(at)
        checkpoint.write(folder / LAST, whole, previous=folder / PREVIOUS)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    epochs = [read_checkpoint(folder / n)["hsrloop"]["epochs_completed"] for n in (LAST, PREVIOUS)]
    assert epochs in ([2, 1], [2, 2], [3, 2])
    for name in (LAST, PREVIOUS):
        with (folder / name).open("rb") as file:
            assert checkpoint.damaged_part(file) is None
    assert (epochs[0] == 3) == (at == len(CALLS) - 1)


def killed_at(number: int) -> None:
    """Make the system call of that number in `CALLS` a kill of this process."""
    seen: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(seen) == number and name == CALLS[number]:
                os.kill(os.getpid(), 9)
            if len(seen) < len(CALLS) and name == CALLS[len(seen)]:
                seen.append(name)
            return real(*args, **kwargs)

        return call

    for name in set(CALLS):
        setattr(os, name, wrapped(name, getattr(os, name)))


def test_the_writer_ends_whatever_waiting_for_it_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)

    def broken(_: Saver) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Saver, "_wait", broken)
    with pytest.raises(ZeroDivisionError), bench.saver:
        raise ValueError("of the run")
    with pytest.raises(RuntimeError, match="after shutdown"):
        bench.saver._writer.submit(print)


def test_a_checkpoint_of_another_format_is_not_guessed_at(bench: Bench) -> None:
    bench.epoch(LAST)
    bench.settle()
    last = bench.folder / LAST
    checkpoint.read(last)
    content = torch.load(last, weights_only=False)
    content[checkpoint.KEY]["format"] = checkpoint.FORMAT + 1
    torch.save(content, last)
    with pytest.raises(CheckpointError, match="another version of hsrloop") as raised:
        checkpoint.read(last)
    assert "--model" in str(raised.value)


def test_a_folder_that_was_taken_away_is_made_again(bench: Bench) -> None:
    shutil.rmtree(bench.folder)
    bench.epoch(LAST)
    bench.settle()
    assert bench.files() == [LAST]


def test_room_is_the_remedy_for_a_full_disk_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, ends in ((errno.ENOSPC, "Free space."), (errno.EACCES, "denied.")):
        said = OSError(code, os.strerror(code))

        def fail(_: Any, said: OSError = said) -> None:
            raise said

        with pytest.raises(OutputError) as raised:
            checkpoint.write_atomically(tmp_path / "x.pt", fail)
        assert str(raised.value).endswith(ends)
    disk = SimpleNamespace(free=int(54.49 * 2**20))
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: disk)
    assert "It needs 55 MiB, the disk has 54" in saver._room(tmp_path, int(54.51 * 2**20))
