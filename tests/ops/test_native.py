"""Loops in machine code, and the threads that share them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from hsrloop.ops import native
from hsrloop.ops.native import share


@numba.njit
def exponentials(x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for i in range(len(x)):
        out[i] = native.exp(x[i])
    return out


def test_exponentials_are_right_to_the_last_bit_or_so() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(exponentials(x) / exact - 1).max() < 1.2e-7
    assert exponentials(np.zeros(1, np.float32))[0] == 1


def test_exponentials_of_numbers_far_below_0_and_of_what_is_no_number() -> None:
    given = np.array([-88, -1e30, -np.inf, np.nan], np.float32)
    *small, none = exponentials(given)
    assert all(0 <= number < 1e-37 for number in small) and np.isnan(none)


@pytest.fixture(params=["torch's threads", "new threads"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "new threads":
        monkeypatch.setattr(native, "_openmp", lambda: None)
    elif native._openmp() is None:
        pytest.skip("torch's threads are not OpenMP's here")


both_ways = pytest.mark.usefixtures("_both_ways")


@both_ways
@pytest.mark.parametrize("threads", [1, 2, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 7, 16])
def test_everything_is_done_once(count: int, threads: int) -> None:
    done: list[range] = []
    share(lambda start, stop: done.append(range(start, stop)), count, threads=threads)
    assert sorted(i for part in done for i in part) == list(range(count))
    assert len(done) == max(1, min(count, threads))


@both_ways
def test_two_threads_work_at_the_same_time() -> None:
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
def test_threads_are_those_of_torchs_operators() -> None:
    """In a thread of this test, whose team of threads is then its own."""
    seen: list[set[int]] = []

    def work(start: int, stop: int) -> None:
        time.sleep(0.05)  # so that the other part is the other thread's
        seen.append({threading.get_native_id()})

    def look() -> None:
        torch.ones(1 << 20).sigmoid_()  # large enough to be divided
        seen.append({int(task) for task in os.listdir("/proc/self/task")})
        share(work, 2, threads=2)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = threading.Thread(target=look)
        other.start()
        other.join()
    finally:
        torch.set_num_threads(before)
    there, *workers = seen
    assert len(set.union(*workers)) == 2 and set.union(*workers) <= there
