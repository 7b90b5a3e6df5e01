"""Files that are whole at every moment, also on a disk that is full."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# How text that UTF-8 cannot hold, as from file names of another encoding, is written: in JSON that
# is its escape, so that it comes back the same.
SPELLED_OUT = "backslashreplace"


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON that every reader takes: what is no finite number becomes null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a power cut, sees the old content or the new.

    Raises:
        OSError: the disk does not take it; the old content is still there.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("w", encoding="utf-8", errors=SPELLED_OUT, newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def append(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Add `data` to the end of a file, made when it is not there: all of it, or nothing.

    Args:
        sync: wait until it is on the disk.

    Raises:
        OSError: the disk does not take it; `filename` is `path`.
    """
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:  # a disk that fills takes the first part
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # a disk that became read-only keeps the part
                file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from error
