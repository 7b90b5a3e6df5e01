"""Make batches one ahead of their use: in a thread, and on CUDA on a stream of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from hsrloop.data.pixels.render_torch import TorchRenderer
from hsrloop.data.plan import AugmentPlan
from hsrloop.ops.ranges import named

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield what an iterable gives, made one item ahead in a thread."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="hsrloop-loader") as thread:
        due = thread.submit(next, source, end)
        while (item := due.result()) is not end:
            due = thread.submit(next, source, end)
            yield item  # type: ignore[misc]


def rendered_ahead(
    renderer: TorchRenderer, planned: Iterable[tuple[Sequence[AugmentPlan], T]]
) -> Iterator[tuple[Tensor, T]]:
    """Yield (images, rest) for each (plans, rest); both are made one batch ahead.

    Images may be used on the stream that is current when they are yielded: it waits for them, the
    host does not.
    """
    device = renderer.device
    if device.type != "cuda":
        yield from ahead((_render(renderer, plans), rest) for plans, rest in planned)
        return
    side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream(device))  # the bank may still be filling

    def render(plans: Sequence[AugmentPlan]) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(side_stream):
            return _render(renderer, plans), side_stream.record_event()

    for (images, ready), rest in ahead((render(plans), rest) for plans, rest in planned):
        current = torch.cuda.current_stream(device)
        current.wait_event(ready)
        # Without this the memory could be given out again on the side stream while still in use.
        images.record_stream(current)
        yield images, rest


def _render(renderer: TorchRenderer, plans: Sequence[AugmentPlan]) -> Tensor:
    with named("render"):
        return renderer.pixels(plans)
