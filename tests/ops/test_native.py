"""Loops in machine code, and the threads that share them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hsrloop.ops import native
from hsrloop.ops.native import share


@pytest.fixture(params=["torch's threads", "new threads"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "new threads":
        monkeypatch.setattr(native, "_openmp", lambda: None)
    elif native._openmp() is None:
        pytest.skip("torch's threads are not OpenMP's here")


both_ways = pytest.mark.usefixtures("_both_ways")


@pytest.fixture
def torchs_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many torch has."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@both_ways
@pytest.mark.parametrize("threads", [1, 2, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 7, 16])
def test_everything_is_done_once(count: int, threads: int) -> None:
    done: list[range] = []
    share(lambda start, stop: done.append(range(start, stop)), count, threads=threads)
    assert sorted(i for part in done for i in part) == list(range(count))
    assert len(done) == max(1, min(count, threads))


@both_ways
def test_two_threads_work_at_the_same_time(torchs_threads: Callable[[int], None]) -> None:
    torchs_threads(2)
    both = threading.Barrier(2, timeout=30)

    def work(start: int, stop: int) -> None:
        both.wait()

    share(work, 2, threads=2)


@both_ways
def test_what_a_thread_raises_reaches_the_caller() -> None:
    def work(start: int, stop: int) -> None:
        if start == 1:
            raise KeyError("the second part")

    for _ in range(3):
        with pytest.raises(KeyError, match="second"):
            share(work, 3, threads=3)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads cannot be listed here")
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_threads_are_those_of_torchs_operators(
    parts: int, torchs_threads: Callable[[int], None]
) -> None:
    """In a thread of this test, whose team of threads is then its own."""
    seen: list[set[int]] = []
    torchs_threads(3)

    def work(start: int, stop: int) -> None:
        time.sleep(0.02)  # so that other parts are other threads'
        seen.append({threading.get_native_id()})

    def threads() -> set[int]:
        return {int(task) for task in os.listdir("/proc/self/task")}

    def look() -> None:
        torch.ones(1 << 20).sigmoid_()  # large enough to be divided
        before = threads()
        for _ in range(3):
            share(work, parts, threads=parts)
            torch.ones(1 << 20).sigmoid_()
        after = threads()  # those of a test before may still end
        assert set.union(*seen) <= before & after and after <= before, "no thread began or ended"

    failures: list[BaseException] = []

    def catch() -> None:
        try:
            look()
        except BaseException as error:
            failures.append(error)

    other = threading.Thread(target=catch)
    other.start()
    other.join()
    assert not failures, failures
    assert len(set.union(*seen)) >= 2
