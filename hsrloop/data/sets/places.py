"""Find image files below folders, also where a path was written on another machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from hsrloop.paths import exists

SUFFIXES = frozenset(
    {".avif", ".bmp", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
)

# Pictures too, as phones and cameras write them, but not read here.
UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".gif", ".jfif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".svg"}
)


def read_regular(path: Path) -> bytes:
    """Return a file's bytes; a pipe or a device, which might never end, is refused.

    Raises:
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError(None, "not a regular file")
    return path.read_bytes()


def _parts(text: str) -> list[str]:
    """Split a POSIX or Windows path; without the root, the drive and leading dots."""
    parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
    if parts and parts[0].endswith(":"):
        parts = parts[1:]
    while parts and parts[0] == "..":
        parts = parts[1:]
    return parts


def moved(text: str, bases: list[Path]) -> Path | None:
    """Look for the longest tail of a path below each base; None when there is none."""
    parts = _parts(text)
    for start in range(len(parts)):
        for base in bases:
            candidate = base.joinpath(*parts[start:])
            if exists(candidate):
                return candidate
    return None


def files_below(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """Yield files below a folder, also through symlinks; each folder once, hidden ones never."""
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(where, name)


def summary(title: str, problems: Sequence[object], shown: int = 5) -> str:
    """Return a title, the first few problems, and a count of the rest, a line each."""
    lines = [f"{title}:", *(f"  {problem}" for problem in problems[:shown])]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return "\n".join(lines)
