"""Paths as people write them: asking about one never raises, whatever it holds.

A name that is too long, a folder that may not be entered, the home of no user: not there.
"""

from __future__ import annotations

import os
from pathlib import Path


def expanded(text: str | Path) -> Path:
    """Return a path with ~ replaced by the home folder where there is one."""
    return Path(os.path.expanduser(text))


def exists(path: str | Path) -> bool:
    """Return whether there is such a file or folder."""
    return os.path.exists(path)


def is_file(path: str | Path) -> bool:
    """Return whether there is such a file."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Return whether there is such a folder."""
    return os.path.isdir(path)


def has_folder(text: str) -> bool:
    """Return whether a text is a path, not a bare name: it has a folder part, of any system."""
    return "/" in text or "\\" in text or text.startswith("~")


def cache_folder() -> Path:
    """Return where things are kept between runs: $XDG_CACHE_HOME/hsrloop, or ~/.cache/hsrloop."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hsrloop"
