"""This process on a few of its CPU cores, as on a machine that has no more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from hsrloop.errors import DeviceError

_THREADS = Path("/proc/self/task")


@contextlib.contextmanager
def pinned(count: int) -> Iterator[int]:
    """Keep all threads of this process on at most `count` of its logical cores for the time being.

    What is started meanwhile inherits the cores, and torch computes with as many threads; how many
    they are is yielded. Afterwards every thread may go where it might before, those started
    meanwhile where the calling thread may.

    Raises:
        DeviceError: the system does not let a process choose its cores.
    """
    if not hasattr(os, "sched_setaffinity"):  # absent on Windows and macOS
        raise DeviceError("this system does not let a process choose its cores")
    own = os.sched_getaffinity(0)
    chosen = set(sorted(own)[:count])
    before = {thread: _cores_of(thread) or own for thread in _threads()}
    computing = torch.get_num_threads()
    try:
        _allow(dict.fromkeys(before, chosen))
        torch.set_num_threads(min(computing, len(chosen)))
        yield len(chosen)
    finally:
        torch.set_num_threads(computing)
        _allow({thread: before.get(thread, own) for thread in _threads()})


def _threads() -> list[int]:
    return [int(folder.name) for folder in _THREADS.iterdir()]


def _cores_of(thread: int) -> set[int] | None:
    """Return where a thread may run; None when it has ended."""
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:
        return None


def _allow(cores: Mapping[int, set[int]]) -> None:
    """Let each thread run on its cores only; those that have ended are passed over."""
    for thread, allowed in cores.items():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, allowed)
