"""Loops compiled to machine code, for the CPU, and threads that share them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba


def compiled(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """Compile a function of arrays and numbers; without the GIL, dividing as NumPy does.

    The code is kept beside the function's file or in the user's cache folder. Where neither can be
    written it takes seconds at every start.
    """
    for keep in (True, False):
        try:
            made: Callable[..., Any] = numba.njit(
                signature, error_model="numpy", nogil=True, cache=keep
            )(function)
            return made
        except (RuntimeError, OSError):
            if not keep:
                raise
    raise AssertionError("not reached")


def share(work: Callable[[int, int], None], count: int, *, threads: int) -> None:
    """Do work on the things from one number to another, without the latter, for all `count`.

    Args:
        threads: at most so many do a part each, at the same time.
    """
    parts = max(1, min(threads, count))
    ends = [count * i // parts for i in range(parts + 1)]
    if parts == 1:
        work(0, count)
        return
    with ThreadPoolExecutor(parts - 1) as pool:
        others = [pool.submit(work, *part) for part in zip(ends[1:-1], ends[2:], strict=True)]
        work(*ends[:2])
        for other in others:
            other.result()
