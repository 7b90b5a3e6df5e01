"""Loops compiled to machine code, for the CPU."""

from __future__ import annotations

from collections.abc import Callable
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
