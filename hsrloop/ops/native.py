"""Loops compiled to machine code, for the CPU: what they are made of, and threads that share them.

Indices in them are unsigned, or of a row cut out before, where that matters: one that might be
negative keeps a loop from being vectorised.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_HALF, _ONE, _LOG2_E = (np.float32(number) for number in (0.5, 1, 1.4426950408889634))
_LN2 = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has few bits
# 1 / 7!, 1 / 6!, ... 1 / 2!, but for what comes after them.
_TERMS = tuple(
    np.float32(term)
    for term in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
_LOWEST, _LOWEST_POWER = np.float32(-87), np.float32(-126)
_AS_TORCH = 0  # threads: as many as operators have


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


def _bitcast(_: Any, bits: Any) -> tuple[Any, Callable[..., Any]]:
    """Tell numba how to turn the bits of an int32 into the float32 that is written with them."""

    def build(_: Any, builder: Any, __: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.FloatType())

    return types.float32(types.int32), build


_float_of_bits: Any = intrinsic(_bitcast)


@numba.njit(inline="always", error_model="numpy")
def exp(x: Any) -> Any:
    """Return the exponential of a float32 of at most 88, to 1e-7 of it; of less than -87: of that.

    `np.exp` is called for one number after another; a loop of this is vectorised. It becomes part
    of the loops that use it: code of theirs that was kept is not compiled anew when this changes.

    Source: Moshier, Cephes 2.8, expf.
    """
    x = _LOWEST if x < _LOWEST else x
    power = np.floor(x * _LOG2_E + _HALF)
    x = x - power * _LN2[0]
    x = x - power * _LN2[1]
    a, b, c, d, e, f = _TERMS
    y = ((((a * x + b) * x + c) * x + d) * x + e) * x + f
    bits = (np.int32(max(_LOWEST_POWER, power)) + 127) << 23
    return (y * (x * x) + x + _ONE) * _float_of_bits(bits)


def share(work: Callable[[int, int], None], count: int, *, threads: int) -> None:
    """Do work on the things from one number to another, without the latter, for all `count`.

    They are done by the threads that torch's operators use, where these are OpenMP's. Others would
    compete with them for the cores, since between two operators they wait busily: two threads of
    our own were no faster than one.

    Args:
        threads: at most so many do a part each, at the same time.
    """
    parts = max(1, min(threads, count))
    if parts == 1:
        work(0, count)
        return
    ends = pairwise(count * i // parts for i in range(parts + 1))
    team = _openmp() or _threads
    team([partial(work, *part) for part in ends])


_Team = Callable[[list[Callable[[], None]]], None]


def _threads(parts: list[Callable[[], None]]) -> None:
    """Do all parts by new threads and the caller's."""
    with ThreadPoolExecutor(len(parts) - 1) as pool:
        others = [pool.submit(part) for part in parts[1:]]
        parts[0]()
        for other in others:
            other.result()


@cache
def _openmp() -> _Team | None:
    """Return what does parts by the threads that torch's operators use; None: they are others.

    As many are asked for as operators have: for another number libgomp would end threads and make
    new ones, each time.

    Source: libgomp's ABI, GOMP_parallel, which LLVM's OpenMP has too; torch@2.15,
    ParallelOpenMP.h, for why no other number.
    """
    made_by = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    try:
        begin = ctypes.CDLL(None).GOMP_parallel  # as torch finds it
    except (AttributeError, OSError, TypeError):
        return None
    begin.argtypes = made_by, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    begin.restype = None

    def team(parts: list[Callable[[], None]]) -> None:
        left, failures = iter(parts), list[BaseException]()

        def take(_: object) -> None:
            """Do parts while there are any: more or fewer threads may come than there are parts."""
            try:
                for part in left:
                    part()
            except BaseException as error:  # raised below: C code has no use for it
                failures.append(error)

        begin(made_by(take), None, _AS_TORCH, 0)
        if failures:
            raise failures[0]
        for part in left:  # an interrupt may have kept a thread from beginning
            part()

    return team
