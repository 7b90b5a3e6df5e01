"""Machine code kept between runs, so that a start does not wait for a compiler."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hsrloop.paths import cache_folder

MOST = 64  # files; what was used longest ago goes first
_SEAL = hashlib.sha256().digest_size  # bytes


def kept(made_of: Sequence[str], make: Callable[[], bytes]) -> bytes:
    """Return what `make` gave for the same texts before, or gives now.

    What cannot be read, is damaged or cannot be kept is made again.

    Args:
        made_of: all that the code depends on.

    Raises:
        Exception: as `make` does.
    """
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    path = cache_folder() / "kernels" / f"{name}.cubin"
    code = _read(path)
    if code is None:
        code = make()
        with suppress(OSError):
            _write(path, code)
    return code


def _read(path: Path) -> bytes | None:
    with suppress(OSError):
        data = path.read_bytes()
        if len(data) > _SEAL and hashlib.sha256(data[:-_SEAL]).digest() == data[-_SEAL:]:
            os.utime(path)
            return data[:-_SEAL]
    return None


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(code + hashlib.sha256(code).digest())
    os.replace(draft, path)
    by_use = sorted(path.parent.glob("*.cubin"), key=lambda file: file.stat().st_mtime)
    for file in by_use[:-MOST]:
        file.unlink()
