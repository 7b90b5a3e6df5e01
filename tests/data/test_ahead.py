"""Batches made ahead: in order, one at a time, and on a GPU by the book of its streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hsrloop.data import ahead
from hsrloop.data.ahead import arriving

CPU = torch.device("cpu")


def numbered(count: int, log: list[Any]) -> Generator[tuple[Tensor, int], None, None]:
    for i in range(count):
        log.append(("made", i, threading.current_thread().name))
        yield torch.full((2,), i), i


def test_all_come_in_order_made_in_a_thread() -> None:
    log: list[Any] = []
    got = [(int(images[0]), rest) for images, rest in arriving(numbered(4, log), CPU)]
    assert got == [(i, i) for i in range(4)]
    assert all("hsrloop-loader" in name for _, _, name in log)


def test_what_fails_while_it_is_made_is_raised_where_it_is_wanted() -> None:
    def made() -> Generator[tuple[Tensor, int], None, None]:
        yield torch.zeros(1), 0
        raise ValueError("broken")

    items = arriving(made(), CPU)
    assert next(items)[1] == 0
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_closed_half_way_it_ends_what_makes_them() -> None:
    begun, ended = threading.Event(), threading.Event()

    def made() -> Generator[tuple[Tensor, int], None, None]:
        try:
            yield torch.zeros(1), 0
            begun.set()
            time.sleep(0.1)
            yield torch.zeros(1), 1
        finally:
            ended.set()

    items = arriving(made(), CPU)
    next(items)
    assert begun.wait(30) and not ended.is_set()
    items.close()
    assert ended.is_set()
    assert not any("hsrloop-loader" in thread.name for thread in threading.enumerate())


class _Gpu:
    """Streams as CUDA has them, written down in place of doing anything."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current: dict[str, str] = {}
        self.streams = 0

    def Stream(self, device: torch.device) -> Any:
        self.streams += 1
        return SimpleNamespace(
            name="side",
            wait_stream=lambda other: self.log.append(f"side waits for {other.name}"),
            record_event=lambda: self.log.append(f"event on {self.on()}") or "event",
        )

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(
            name=self.on(), wait_event=lambda e: self.log.append(f"{self.on()} waits for the event")
        )

    def on(self) -> str:
        return self.current.get(threading.current_thread().name, "main")

    def stream(self, stream: Any) -> Any:
        gpu = self

        class Within:
            def __enter__(self) -> None:
                gpu.current[threading.current_thread().name] = stream.name

            def __exit__(self, *_: object) -> None:
                del gpu.current[threading.current_thread().name]

        return Within()


class _Images:
    """Stands for a batch in page-locked memory."""

    def __init__(self, gpu: _Gpu) -> None:
        self._gpu = gpu
        self.device = CPU

    def to(self, device: torch.device, *, non_blocking: bool) -> _Images:
        assert non_blocking, "the host would wait"
        self._gpu.log.append(f"sent on {self._gpu.on()}")
        return self

    def record_stream(self, stream: Any) -> None:
        self._gpu.log.append(f"kept for {stream.name}")


def test_on_a_gpu_they_are_sent_on_a_side_stream_that_the_user_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = _Gpu()
    ahead._side_stream.cache_clear()
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    made: Any = ((_Images(gpu), i) for i in range(2))
    items = arriving(made, torch.device("cuda"))
    assert next(items)[1] == 0
    assert gpu.log[:3] == ["side waits for main", "sent on side", "event on side"]
    assert gpu.log[-2:] == ["main waits for the event", "kept for main"]
    assert [rest for _, rest in items] == [1]
    assert not gpu.current, "no thread is left on the side stream"
    assert gpu.log.count("sent on side") == gpu.log.count("kept for main") == 2
    again: Any = (item for item in [(_Images(gpu), 2)])
    assert [rest for _, rest in arriving(again, torch.device("cuda"))] == [2]
    assert gpu.streams == 1, "the next epoch uses the same, and its memory"
    ahead._side_stream.cache_clear()
