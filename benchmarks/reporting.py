"""Where a benchmark writes what it found."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hsrloop.bench.machine import describe_host  # noqa: E402
from hsrloop.errors import HsrloopError  # noqa: E402

__all__ = ["describe_host", "results_folder", "unused", "write_markdown"]


def _said(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line what the user can mend."""
    if issubclass(kind, HsrloopError):
        print(f"Error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _said


def results_folder(given: Path | None = None) -> Path:
    """Return the folder of committed results, or the one asked for; it exists afterwards."""
    folder = given or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unused(stem: Path) -> Path:
    """Return it, or with a number what no earlier run wrote: its JSON would be lost."""
    numbers = itertools.count(2)
    free = stem
    while free.with_suffix(".json").exists():
        free = stem.with_name(f"{stem.name}_{next(numbers)}")
    return free


def write_markdown(path: Path, lines: Sequence[str]) -> None:
    """Write the lines and print them."""
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    print(text)
