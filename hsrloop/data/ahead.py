"""Make batches one ahead of their use: in a thread, and on CUDA on a stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Made = Generator[tuple[Tensor, T], None, None]


def ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield what a generator gives, made one item ahead in a thread.

    Closed half-way, it waits for the item being made, and closes `items`.
    """
    end = object()
    with (
        closing(items),
        ThreadPoolExecutor(1, thread_name_prefix="hsrloop-loader") as thread,
    ):
        due = thread.submit(next, items, end)
        while (item := due.result()) is not end:
            due = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def arriving(made: Made[T], device: torch.device) -> Made[T]:
    """Yield (images, rest) as given, made one ahead, the images on `device`.

    On CUDA they are made, or sent from page-locked memory, on a stream of their own. They may be
    used on the stream that is current when they are yielded: it waits for them, the host does not.
    """
    if device.type != "cuda":
        yield from ahead(made)
        return
    side_stream = _side_stream(device)
    side_stream.wait_stream(torch.cuda.current_stream(device))  # the bank may still be filling
    with closing(ahead(_on_stream(side_stream, made, device))) as sent:
        for images, ready, rest in sent:
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            # Without this the memory could be given out again on the side stream while in use.
            images.record_stream(current)
            yield images, rest


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all: what its memory pool has freed serves the next epoch again.

    Of low priority, and recordings are made on one of high priority: torch hands out few streams of
    each priority in turn, so that one could be both.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _on_stream(
    stream: torch.cuda.Stream, made: Made[T], device: torch.device
) -> Generator[tuple[Tensor, torch.cuda.Event, T], None, None]:
    """Make each item on a stream; with it comes the event that says it is there."""
    with closing(made):
        while True:
            with torch.cuda.stream(stream):  # not across a yield: the thread would keep it
                item = next(made, None)
                if item is None:
                    return
                images = item[0].to(device, non_blocking=True)
                ready = stream.record_event()
            yield images, ready, item[1]
