"""Checkpoint files: written whole or not at all, loadable by Ultralytics, enough to go on exactly.

`last.pt` is an Ultralytics checkpoint (the averaged weights under "model") with one more key,
"hsrloop": the whole `TrainState` and what else a resumed run needs. `best.pt` and `epochN.pt`
carry names, config and metrics there, without the state; `last_previous.pt`
is the `last.pt` before, until a run is complete.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
from torch import nn

from hsrloop.config import TrainConfig
from hsrloop.errors import CheckpointError, ConfigError, OutputError
from hsrloop.model.published import to_ultralytics_checkpoint
from hsrloop.model.weights import read_checkpoint
from hsrloop.paths import is_file
from hsrloop.report.files import SPELLED_OUT
from hsrloop.train.kinds import misfit
from hsrloop.train.state import TrainState

_LOG = logging.getLogger(__name__)
FORMAT = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)  # giving another file up helps
KEY = "hsrloop"
_KINDS = {"config": {}, "sources": {}, "names": [""], "fingerprint": "", "threads": 0}
LAST = "last.pt"
PREVIOUS = "last_previous.pt"


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
        OutputError: the disk is full or not writable; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # again, if somebody took it away
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        refused = _refusal(error)
        if refused is None:
            raise
        reason = refused.strerror or str(refused)
        remedy = " Free space." if refused.errno in (*_FULL, errno.EFBIG) else ""
        raise OutputError(f"cannot write {path}: {reason}.{remedy}") from refused


def _refusal(error: BaseException) -> OSError | None:
    """Return what the disk said; torch.save turns it into a RuntimeError, its context."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno != errno.ENOMEM:
            return link
        link = link.__context__ if isinstance(link, RuntimeError) else None
    return None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, what UTF-8 cannot hold spelled out.

    Raises:
        OutputError: as `write_atomically`.
    """
    write_atomically(path, lambda file: file.write(text.encode(errors=SPELLED_OUT)))


def content(
    network: nn.Module,
    identity: RunIdentity,
    *,
    metrics: Mapping[str, float],
    epochs: int,
    run: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what a checkpoint holds, for `write`.

    Args:
        network: of `half_network`.
        metrics: ap50, ap50_95, precision, recall of the network, as far as known.
        epochs: completed.
        run: the payload of a `TrainState` that a run can go on from; None: weights alone.
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
        "epochs_completed": epochs,
        "metrics": dict(metrics),
    }
    if run is not None:
        extra["state"] = run
    return to_ultralytics_checkpoint(
        network,
        config=identity.config.to_json(),
        metrics=metrics,
        epoch=epochs - 1,
        extra={KEY: extra},
    )


def write(path: Path, whole: Mapping[str, Any], *, previous: Path | None) -> None:
    """Write a checkpoint; the file before goes once the new one was read back.

    Args:
        previous: the name that a last.pt keeps when a new one takes its place, where the disk
            knows hard links; it makes room when the disk is full. None: it is not touched.

    Raises:
        OutputError: as `write_atomically`, or what is read back differs from what was written.
    """

    def check(temporary: Path) -> None:
        _read_back(temporary)
        if previous is not None and path.name == LAST:
            _keep(path, previous)

    def attempt() -> None:
        write_atomically(path, lambda file: torch.save(whole, file), check=check)

    try:
        attempt()
    except OutputError as error:
        cause = error.__cause__
        full = isinstance(cause, OSError) and cause.errno in _FULL
        if not full or previous is None or not is_file(previous):
            raise
        with contextlib.suppress(OSError):
            previous.unlink()
        attempt()


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name, also when another has it; without links it goes."""
    draft = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError as error:  # nothing there yet, or a disk such as exFAT
        _LOG.debug("%s is not kept: %s", path, error)
        return
    os.replace(draft, name)
    draft.unlink(missing_ok=True)  # it stays when both were names of one file


def drop_previous(weights_dir: Path) -> None:
    """Give back the room of the last.pt before, when a run is complete."""
    with contextlib.suppress(OSError):  # it harms nobody
        (weights_dir / PREVIOUS).unlink(missing_ok=True)


def bytes_needed(state: TrainState, config: TrainConfig) -> int:
    """Return the bytes that all checkpoints of a run take on the disk, at their most."""
    weights: int = 2 * sum(t.numel() for t in state.ema.module.state_dict().values())
    run = weights + _tensor_bytes(state.to_payload())
    kept = config.epochs // config.save_period if config.save_period else 0
    # last.pt, the one before, the one being written; best.pt, twice for as long.
    return 3 * run + (2 + kept) * weights


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(item) for item in value)
    return 0


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

    `torch.save` writes a checksum with each tensor; `torch.load` does not look at them.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


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
    if extra.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was written by another version of hsrloop. To start from its weights use "
            f"--model {path}."
        )
    try:
        odd = next((o for k, like in _KINDS.items() if (o := misfit(extra[k], like, k))), None)
        if odd is None and extra["fresh_share"] is not None:
            odd = misfit(extra["fresh_share"], 0.0, "fresh_share")
        if odd is not None:
            raise TypeError(odd)
        identity = RunIdentity(
            config=TrainConfig.from_json(extra["config"]),
            sources=dict(extra["sources"]),
            names=tuple(extra["names"]),
            fingerprint=extra["fingerprint"],
            versions=dict(extra["versions"]),
            threads=extra["threads"],
            fresh_share=extra["fresh_share"],
        )
        len(extra["state"]["history"])
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
