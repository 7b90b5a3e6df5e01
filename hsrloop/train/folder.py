"""The run folder: its name, what is checked before it is made, what is found in it again."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hsrloop.config import TrainConfig
from hsrloop.errors import CheckpointError, OutputError
from hsrloop.paths import exists, expanded, is_file, is_folder
from hsrloop.report import csv, telemetry
from hsrloop.report.files import json_text
from hsrloop.train.checkpoint import write_text
from hsrloop.train.state import TrainState

try:
    import fcntl
except ImportError:  # no POSIX: two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

PREFIX = "competition_"
RESULT = "training_result.json"
ORPHANS_END_S = 3.0  # a micro-batch is made in less than a second (a guess for slow machines)


def output_of(config: TrainConfig) -> Path:
    """Return the folder that receives run folders, absolute."""
    return expanded(config.output).absolute()


def check_writable(output: Path, needed_bytes: int = 0) -> None:
    """Check that a run folder can be made below `output`, and that its disk has room.

    Raises:
        OutputError: not a folder, not writable, or less than `needed_bytes` free.
    """
    try:
        output.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is there of it is looked at below
    except OSError as error:
        raise OutputError(f"{output}: {error.strerror}. Choose another --output.") from None
    existing = output.absolute()
    while not exists(existing) and existing != existing.parent:
        existing = existing.parent
    if not is_folder(existing):
        raise OutputError(f"{existing} is a file; --output needs a folder.")
    probe = existing / f".hsrloop-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{existing} cannot be written ({error.strerror}). Choose another --output."
        ) from None
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OutputError(
            f"{existing} has {free / 2**20:.0f} MiB free; the run needs about "
            f"{needed_bytes / 2**20:.0f} MiB. Free space or choose another --output."
        )


def make_run_folder(output: Path) -> Path:
    """Create `<output>/competition_YYYYMMDD_HHMMSS/weights` and return the run folder.

    Raises:
        OutputError: it cannot be made.
    """
    name = PREFIX + time.strftime("%Y%m%d_%H%M%S")
    for attempt in range(1, 1000):
        folder = output / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            folder.mkdir(parents=True)
            (folder / "weights").mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(
                f"cannot make {folder} ({error.strerror}). Choose another --output."
            ) from None
        return folder
    raise OutputError(f"{output} already holds a thousand runs of this second; choose another.")


def of_checkpoint(path: Path) -> Path:
    """Return the run folder that a checkpoint lies in.

    Raises:
        CheckpointError: it lies elsewhere, where nothing of a run may be written.
    """
    weights = path.absolute().parent
    if weights.name != "weights":
        raise CheckpointError(
            f"{path} does not lie in the weights/ folder of a run. Put it back there, or start a "
            f"new run from it with --model {path}."
        )
    return weights.parent


def checkpoint_bytes(run_dir: Path | None) -> int:
    """Return the bytes that a run's checkpoints take already; 0 for a new run."""
    if run_dir is None:
        return 0
    files = {(s.st_ino, s.st_size) for s in (f.stat() for f in (run_dir / "weights").glob("*.pt"))}
    return sum(size for _, size in files)


def newest_unfinished(output: Path) -> Path:
    """Return weights/last.pt of the newest run below `output` that has no result yet.

    Raises:
        CheckpointError: there is none.
    """
    found = [path for path in _in_runs(output, "last.pt") if not exists(path.parents[1] / RESULT)]
    resting = [path for path in found if not _is_running(path.parents[1])]
    if not resting:
        but = f", but {len(found)} still training" if found else ""
        raise CheckpointError(
            f"no unfinished run below {output}{but}. Give the checkpoint: "
            "--resume RUN/weights/last.pt, or the folder of the runs: --output."
        )
    return max(resting, key=lambda path: path.stat().st_mtime)


def newest_best(output: Path) -> Path:
    """Return weights/best.pt of the newest run below `output`.

    Raises:
        CheckpointError: there is none.
    """
    found = _in_runs(output, "best.pt")
    if not found:
        raise CheckpointError(f"no run with weights/best.pt below {output}. Give --model.")
    return max(found, key=lambda path: path.stat().st_mtime)


def _in_runs(output: Path, name: str) -> list[Path]:
    """Return that file of the weights of every run below a folder which has it."""
    if not is_folder(output):
        return []
    return [path for path in output.glob(f"{PREFIX}*/weights/{name}") if is_file(path)]


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other processes from writing to a run while this one does.

    The kernel lets go of the lock however this process ends. Where it knows no locks, as on some
    network disks, there is none.

    Raises:
        CheckpointError: another process writes to the run.
    """
    try:
        descriptor = os.open(run_dir, os.O_RDONLY)
    except OSError:  # no such run: whoever reads its checkpoint says so
        yield
        return
    try:
        if not _locked(descriptor):
            raise CheckpointError(
                f"{run_dir} is still training, in another process. Wait for its end, or stop that "
                "process first."
            )
        yield
    finally:
        # Closing would not do: forked loader processes have it open too.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Take the lock; False when another process has it.

    Loader processes of a run that was killed end with their task, and have it until then.
    """
    until = time.monotonic() + ORPHANS_END_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.05)
    except (OSError, AttributeError):  # this disk, or this system, knows no locks
        return True


def _is_running(run_dir: Path) -> bool:
    try:
        with held(run_dir):
            return False
    except CheckpointError:
        return True


def cut_back(run_dir: Path, state: TrainState) -> None:
    """Drop what the reports say beyond a checkpoint, so that a resumed run writes it once."""
    (run_dir / RESULT).unlink(missing_ok=True)  # the run is unfinished again
    for place in (run_dir, run_dir / "weights"):
        for stale in place.glob("*.tmp"):
            stale.unlink()
    epochs, sample = len(state.history), state.position.sample
    csv.cut_back(run_dir / "results.csv", epochs)
    rollbacks = len(state.rollbacks)
    telemetry.cut_back(run_dir / "events.jsonl", epochs, sample, rollbacks=rollbacks)


def write_config(run_dir: Path, config: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Write config.yaml: every setting as resolved, with where it came from as a comment."""
    lines = []
    for key, value in config.items():
        text = yaml.safe_dump({key: value}, default_flow_style=False, allow_unicode=True).strip()
        lines.append(f"{text}  # {sources[key]}")
    write_text(run_dir / "config.yaml", "\n".join(lines) + "\n")


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write training_result.json."""
    write_text(run_dir / RESULT, json_text(result, indent=2) + "\n")
