"""Checkpoint files: written whole or not at all, loadable by Ultralytics, enough to go on exactly.

`last.pt` is an Ultralytics checkpoint (the averaged weights under "model") with one more key,
"hsrloop": the whole `TrainState` and what else a resumed run needs. `best.pt` and `epochN.pt`
carry names, config and metrics there, without the state.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch

from hsrloop.config import TrainConfig
from hsrloop.errors import CheckpointError, ConfigError, OutputError
from hsrloop.model.published import to_ultralytics_checkpoint
from hsrloop.model.weights import read_checkpoint
from hsrloop.paths import is_file
from hsrloop.report.files import SPELLED_OUT
from hsrloop.train.state import TrainState

FORMAT = 1
KEY = "hsrloop"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What must stay the same for a run to go on exactly; kept in every checkpoint."""

    config: TrainConfig
    sources: Mapping[str, str]
    names: tuple[str, ...]
    fingerprint: str  # of the data set
    versions: Mapping[str, str]
    threads: int
    fresh_share: float | None  # of the classes when the run started; None: from scratch


def write_atomically(
    path: Path, write: Callable[[Any], None], *, check: Callable[[Path], None] | None = None
) -> None:
    """Write a file so that `path` is at every instant the old content or the new, whole.

    Args:
        path: the final name.
        write: called with an open binary file in the same folder.
        check: called with the new file's name for now, once it is on the disk and before the old
            one goes; raises OSError when it is not as it should be.

    Raises:
        OutputError: the disk is full or not writable, or memory ran out; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, MemoryError) as error:  # torch says RuntimeError of a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"cannot write {path}: {reason}. Free space or choose --output."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, what UTF-8 cannot hold spelled out.

    Raises:
        OutputError: as `write_atomically`.
    """
    write_atomically(path, lambda file: file.write(text.encode(errors=SPELLED_OUT)))


def content(
    state: TrainState,
    identity: RunIdentity,
    *,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Return what a checkpoint holds, none of it shared with the state, and without the state.

    Args:
        metrics: ap50, ap50_95, precision, recall of the averaged weights, as far as known.
    """
    extra: dict[str, Any] = {
        "format": FORMAT,
        "config": identity.config.to_json(),
        "sources": dict(identity.sources),
        "names": list(identity.names),
        "fingerprint": identity.fingerprint,
        "versions": dict(identity.versions),
        "threads": identity.threads,
        "fresh_share": identity.fresh_share,
        "epochs_completed": len(state.history),
        "metrics": dict(metrics),
    }
    return to_ultralytics_checkpoint(
        state.ema.module,
        names=identity.names,
        config=identity.config.to_json(),
        metrics=metrics,
        epoch=len(state.history) - 1,
        extra={KEY: extra},
    )


def with_run(whole: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Add the payload of a `Snapshot` to `content` of the same state: a run can go on from it."""
    return {**whole, KEY: {**whole[KEY], "state": run}}


def write(path: Path, whole: Mapping[str, Any]) -> None:
    """Write a checkpoint; the file before goes once the new one was read back.

    Raises:
        OutputError: as `write_atomically`, or what is read back differs from what was written.
    """
    write_atomically(path, lambda file: torch.save(whole, file), check=_read_back)


def _read_back(path: Path) -> None:
    """Read a file from its disk, not from memory, and compare its checksums.

    Raises:
        OSError: it is not what was written.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        damaged = damaged_part(file)
    if damaged is not None:
        raise OSError(errno.EIO, f"the disk gave back other bytes than were written ({damaged})")


def damaged_part(file: IO[bytes]) -> str | None:
    """Return the first part of a checkpoint that does not match its CRC-32, or None.

    `torch.save` writes a checksum with each tensor; `torch.load` does not look at them. A file that
    is no archive at all has none: whoever reads it says so.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except zipfile.BadZipFile:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint read back for resuming."""

    path: Path
    identity: RunIdentity
    state: Mapping[str, Any]


def read(path: Path, *, trust: bool = False) -> Saved:
    """Read a resumable checkpoint.

    Raises:
        CheckpointError: not there, not one of ours, or without the state of a run.
        WeightsError: damaged, or holding what is not safe to open.
    """
    if not is_file(path):
        raise CheckpointError(f"{path} is not a file; --resume takes weights/last.pt of a run.")
    whole = read_checkpoint(path, trust=trust)
    with path.open("rb") as file:
        damaged = damaged_part(file)
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged ({damaged} does not match its checksum). To start anew from the "
            f"best weights use --model {path.with_name('best.pt')}."
        )
    extra = whole.get(KEY)
    if not isinstance(extra, dict) or not isinstance(extra.get("state"), dict):
        raise CheckpointError(
            f"{path} holds weights but no run to go on with; --resume takes weights/last.pt "
            f"of a run. To start from these weights use --model {path}."
        )
    try:
        identity = RunIdentity(
            config=TrainConfig.from_json(extra["config"]),
            sources=dict(extra["sources"]),
            names=tuple(extra["names"]),
            fingerprint=extra["fingerprint"],
            versions=dict(extra["versions"]),
            threads=extra["threads"],
            fresh_share=extra["fresh_share"],
        )
        list(extra["state"]["history"])
    except ConfigError as error:
        raise CheckpointError(
            f"{path} was written by another version of hsrloop: {error}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is incomplete ({error}): no run can go on with it. To start from its weights "
            f"use --model {path}."
        ) from error
    return Saved(path=path, identity=identity, state=extra["state"])


def versions() -> dict[str, str]:
    """Return the versions that exactness depends on."""
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
