"""Make batches one ahead of their use: in a thread, and on CUDA on a stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield what an iterable gives, made one item ahead in a thread."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="hsrloop-loader") as thread:
        due = thread.submit(next, source, end)
        while (item := due.result()) is not end:
            due = thread.submit(next, source, end)
            yield item  # type: ignore[misc]


def arriving(made: Iterable[tuple[Tensor, T]], device: torch.device) -> Iterator[tuple[Tensor, T]]:
    """Yield (images, rest) as given, made one ahead, the images on `device`.

    On CUDA they are made, or sent from page-locked memory, on a stream of their own. They may be
    used on the stream that is current when they are yielded: it waits for them, the host does not.
    """
    if device.type != "cuda":
        for images, rest in ahead(made):
            yield images.to(device), rest
        return
    side_stream = _side_stream(device)
    side_stream.wait_stream(torch.cuda.current_stream(device))  # the bank may still be filling
    for images, ready, rest in ahead(_on_stream(side_stream, made, device)):
        current = torch.cuda.current_stream(device)
        current.wait_event(ready)
        # Without this the memory could be given out again on the side stream while still in use.
        images.record_stream(current)
        yield images, rest


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all: what its memory pool has freed serves the next epoch again."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _on_stream(
    stream: torch.cuda.Stream, made: Iterable[tuple[Tensor, T]], device: torch.device
) -> Iterator[tuple[Tensor, torch.cuda.Event, T]]:
    """Make each item on a stream; with it comes the event that says it is there."""
    source = iter(made)
    while True:
        with torch.cuda.stream(stream):  # not across a yield: the thread would keep it
            item = next(source, None)
            if item is None:
                return
            images = item[0].to(device, non_blocking=True)
            ready = stream.record_event()
        yield images, ready, item[1]
