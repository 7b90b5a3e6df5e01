"""A process kept on a few cores, all of its threads, and let go again."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hsrloop.bench.cores import pinned
from hsrloop.errors import DeviceError
from hsrloop.hardware.memory import usable_cores

OWN = os.sched_getaffinity(0)


@contextmanager
def other_thread() -> Iterator[int]:
    """Yield the system's number of a thread that lives on for the time being."""
    number: queue.Queue[int] = queue.Queue()
    done = threading.Event()

    def live() -> None:
        number.put(threading.get_native_id())
        done.wait()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield number.get()
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("count", [1, 2])
def test_all_threads_are_kept_on_the_cores_and_let_go(count: int) -> None:
    cores = min(count, len(OWN))
    threads = torch.get_num_threads()
    with other_thread() as old:
        with pinned(count) as counted, other_thread() as new:
            inside = [os.sched_getaffinity(thread) for thread in (0, old, new)]
            assert counted == len(inside[0]) == cores
            assert inside[0] == inside[1] == inside[2] <= OWN
            assert usable_cores() <= cores  # what loader processes are counted from
            assert torch.get_num_threads() == min(threads, cores)
        assert os.sched_getaffinity(old) == os.sched_getaffinity(0) == OWN
    assert torch.get_num_threads() == threads


def test_what_was_started_meanwhile_is_let_go_too_and_what_had_its_own_cores_keeps_them() -> None:
    one = {min(OWN)}
    with other_thread() as bound:
        os.sched_setaffinity(bound, one)
        kept = pinned(1)
        kept.__enter__()
        with other_thread() as new:
            assert len(os.sched_getaffinity(new)) == 1
            kept.__exit__(None, None, None)
            assert os.sched_getaffinity(new) == OWN
        assert os.sched_getaffinity(bound) == one


def test_they_are_let_go_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == OWN
    assert torch.get_num_threads() == threads


def test_a_system_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(DeviceError, match="does not let a process choose its cores"), pinned(2):
        raise AssertionError
