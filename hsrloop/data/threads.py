"""Do something to many things in threads, and stop at once when nobody waits for it any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int
) -> Iterator[Result]:
    """Yield `work(item)` in the order of the items.

    What has not begun when the consumer leaves, by Ctrl-C for one, is never begun.

    Args:
        threads: 1, or less, is the caller's own.
    """
    with team(threads) as mapped:
        yield from mapped(work, items)


@contextmanager
def team(threads: int) -> Iterator[MapFunction]:
    """Yield a `map` whose work is shared by as many threads, the same ones each time.

    What they have not begun at the end is never begun.

    Args:
        threads: 1, or less, is the caller's own.
    """
    if threads <= 1:
        yield map
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool.map
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
