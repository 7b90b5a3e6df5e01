"""Find base weights by path or name, fetch the official ones, and say what is missing and where."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsrloop.errors import OutputError, WeightsError
from hsrloop.model.safe_load import check_file, read_checkpoint
from hsrloop.model.yolo import SCALES
from hsrloop.paths import exists, expanded, has_folder, is_file, is_folder

__all__ = ["OFFICIAL", "Fetched", "fetch", "find_weights", "largest_smaller", "read_checkpoint"]

log = logging.getLogger(__name__)

OFFICIAL = tuple(f"yolov8{scale}.pt" for scale in SCALES)
DOWNLOADS = Path("models/pretrained")
URL = "https://github.com/ultralytics/assets/releases/download/v8.4.0/"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)  # not the network
WAIT_S = 5.0  # longest wait for the network before it counts as absent, also between two pieces
SHA256 = {  # assets v8.3 and v8.4, then v0.0.0
    "yolov8n.pt": (
        "f59b3d833e2ff32e194b5bb8e08d211dc7c5bdf144b90d2c8412c47ccfc83b36",
        "31e20dde3def09e2cf938c7be6fe23d9150bbbe503982af13345706515f2ef95",
    )
}
_PIECE_BYTES = 1 << 18
_HOW_OFFLINE = (
    "Run `hsrloop weights fetch` while there is a network, or copy the file into models/pretrained."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What became of one file of `hsrloop weights fetch`."""

    name: str
    path: Path | None  # None: not there
    verified: bool | None  # None: its sha256 is not known here
    message: str


def find_weights(name: str, *, download: bool = True) -> Path:
    """Return the file for a path or a name such as "yolov8m.pt".

    A name is looked for in $HSRLOOP_WEIGHTS_DIR, models/pretrained, models/finetuned and the
    current directory; then an official one is downloaded to models/pretrained.

    Args:
        download: False keeps off the network.

    Raises:
        WeightsError: found nowhere, with the places; or only found damaged, with the damage.
    """
    if has_folder(name):
        path = expanded(name)
        if is_folder(path):
            raise WeightsError(f"{name} is a folder. Give a file in it, or a name: {_names()}.")
        if not is_file(path):
            raise WeightsError(f"{name} does not exist. Give another path, or a name: {_names()}.")
        check_file(path)
        return path
    file = name if Path(name).suffix else f"{name}.pt"
    path_or_faults = _look(file)
    if isinstance(path_or_faults, Path):
        return path_or_faults
    places = ", ".join(str(place) for place in _places())
    reason = "not downloaded"
    if file not in OFFICIAL:
        reason = f"not one of the official names ({_names()})"
    elif download:
        try:
            fetched = _get(file, DOWNLOADS, _mute)
        except OutputError as error:
            reason = f"not downloaded: {error}".rstrip(".")
        else:
            if fetched.path is not None:
                return fetched.path
            reason = fetched.message
    damaged = "".join(f" {fault}" for fault in path_or_faults)
    raise WeightsError(f"{file} was not found in {places}; {reason}.{damaged} {_HOW_OFFLINE}")


def largest_smaller(name: str) -> tuple[Path, str] | None:
    """Return the largest YOLOv8 at hand that is smaller than `name`, and a sentence that says so.

    None when there is none, or when `name` is no official model. Does not touch the network.
    """
    file = Path(name).name
    file = file if Path(file).suffix else f"{file}.pt"
    if file not in OFFICIAL:
        return None
    for smaller in reversed(OFFICIAL[: OFFICIAL.index(file)]):
        path = _look(smaller)
        if isinstance(path, Path):
            return path, (
                f"{file} is not at hand and could not be downloaded: training {smaller} ({path}) "
                f"instead, a smaller model with a lower mAP. {_HOW_OFFLINE}"
            )
    return None


def fetch(
    names: Sequence[str] = OFFICIAL,
    *,
    dest: Path = DOWNLOADS,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Fetched]:
    """Bring official weights into `dest`, each whole or not at all; never raises for the network.

    Args:
        progress: called with (name, bytes done, bytes in all or 0 when unknown).

    Raises:
        WeightsError: a name that is not official.
        OutputError: `dest` cannot be written.
    """
    unknown = [name for name in names if name not in OFFICIAL]
    if unknown:
        raise WeightsError(f"{', '.join(unknown)}: not official weights; they are {_names()}.")
    results = []
    for name in names:
        at_hand = _at_hand(name, dest)
        report = (lambda done, total, name=name: progress(name, done, total)) if progress else _mute
        results.append(at_hand or _get(name, dest, report))
    return results


def _mute(done: int, total: int) -> None:
    """Report nothing."""


def _names() -> str:
    return ", ".join(OFFICIAL)


def _places() -> list[Path]:
    own = os.environ.get("HSRLOOP_WEIGHTS_DIR")
    return [*([expanded(own)] if own else []), DOWNLOADS, Path("models/finetuned"), Path()]


def _look(file: str) -> Path | list[str]:
    """Return the first sound file of that name, else what is wrong with the unsound ones."""
    faults = []
    for place in _places():
        path = place / file
        if not is_file(path):
            continue
        try:
            check_file(path)
        except WeightsError as error:
            log.warning("%s", error)
            faults.append(str(error))
        else:
            return path
    return faults


def _at_hand(name: str, dest: Path) -> Fetched | None:
    path = dest / name
    try:
        check_file(path)
    except WeightsError:
        return None
    verified = _verified(name, _sha256(path))
    if verified is False:
        return None
    return Fetched(
        name=name, path=path, verified=verified, message="already there" + _said(verified)
    )


def _said(verified: bool | None) -> str:
    return ", sha256 right" if verified else ", sha256 not known here, so not checked"


def _verified(name: str, digest: str) -> bool | None:
    return digest in SHA256[name] if name in SHA256 else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _get(name: str, dest: Path, report: Callable[[int, int], None]) -> Fetched:
    """Download one file next to its place, check it, and move it there."""
    made = [place for place in (dest, *dest.parents) if not exists(place)]
    try:
        dest.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{name}.", dir=dest)
    except OSError as error:
        raise OutputError(f"{dest} cannot be written ({error.strerror}).") from error
    temporary = Path(part)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in _pieces(URL + name, report):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        check_file(temporary)
        verified = _verified(name, _sha256(temporary))
        if verified is False:
            return _failed(name, "what arrived has another sha256 than the official file")
        temporary.chmod(0o644)
        temporary.replace(dest / name)
    except WeightsError as error:
        return _failed(name, f"what arrived is not the file: {error}")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in _DISK:
            raise OutputError(f"{dest} cannot be written ({_reason(error)}).") from error
        return _failed(name, f"{URL}{name} could not be reached ({_reason(error)})")
    finally:
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: it holds what was fetched
            for place in made:
                place.rmdir()
    return Fetched(
        name=name, path=dest / name, verified=verified, message="fetched" + _said(verified)
    )


def _failed(name: str, message: str) -> Fetched:
    return Fetched(name=name, path=None, verified=None, message=message)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    inner = getattr(error, "reason", None)
    return str(inner or error or type(error).__name__)


def _pieces(url: str, report: Callable[[int, int], None]) -> Iterator[bytes]:
    """Yield the body of a page in pieces.

    Raises:
        OSError: no answer within WAIT_S, or the connection broke.
    """
    with _open_within(url, WAIT_S) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        done = 0
        while piece := answer.read(_PIECE_BYTES):
            done += len(piece)
            report(done, total)
            yield piece
        if total and done < total:
            raise OSError(f"broke off after {done} of {total} bytes")


def _open_within(url: str, wait_s: float) -> Any:
    """Open a URL, waiting at most `wait_s` in all: a socket's timeout leaves name lookup out."""
    outcome: list[Any] = []
    late = threading.Event()

    def attempt() -> None:
        try:
            answer = _open(url, wait_s)
        except (OSError, http.client.HTTPException) as error:
            outcome.append(error)
            return
        outcome.append(answer)
        if late.is_set():
            answer.close()

    thread = threading.Thread(target=attempt, daemon=True, name="download")
    thread.start()
    thread.join(wait_s)
    if not outcome:
        late.set()
        raise TimeoutError(f"no answer within {wait_s:g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _open(url: str, wait_s: float) -> Any:
    """Open a URL; the one place where this package uses the network."""
    return urllib.request.urlopen(url, timeout=wait_s)
