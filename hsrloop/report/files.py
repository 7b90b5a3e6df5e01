"""Files that are whole at every moment."""

from __future__ import annotations

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
    """Write `text` to `path` so that a reader, or a power cut, sees the old content or the new."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8", errors=SPELLED_OUT, newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
