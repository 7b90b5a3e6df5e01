"""The ladder's properties over a grid of configurations, and what counts as running out."""

from __future__ import annotations

import dataclasses
import errno
import itertools

import pytest
import torch

from hsrloop.config import TrainConfig
from hsrloop.data.loader import WorkerDied
from hsrloop.records import Rung
from hsrloop.train.build import first_rung
from hsrloop.train.ladder import SIZES, SOUND_MICRO_BATCH, Cause, cause_of, next_rung
from hsrloop.train.recovery import _Failure, _next

GRID = [
    TrainConfig(batch=batch, micro_batch=micro, imgsz=imgsz, cache=cache, workers=workers)
    for batch, micro, imgsz, cache, workers in itertools.product(
        (1, 2, 3, 4, 6, 16, 64),
        (None, 1, 3, 16),
        (64, 320, 352, 640, 800, 1280, 1536),
        ("ram", "disk", False),
        (0, 1, 8),
    )
    if micro is None or micro <= batch
]


def walk(config: TrainConfig, cause: Cause) -> list[TrainConfig]:
    steps = [config]
    while (smaller := next_rung(steps[-1], cause)) is not None:
        steps.append(smaller)
        assert len(steps) < 100, "the ladder must end"
    return steps


def needs(config: TrainConfig) -> tuple[int, int, bool, int]:
    micro = config.micro_batch or config.batch
    return micro, config.imgsz, config.cache == "ram", config.workers


def test_the_grid_is_large() -> None:
    assert len(GRID) >= 500


@pytest.mark.parametrize("cause", Cause)
def test_every_rung_needs_less_and_nothing_ever_grows(cause: Cause) -> None:
    for config in GRID:
        for before, after in itertools.pairwise(walk(config, cause)):
            old, new = needs(before), needs(after)
            assert all(b >= a for b, a in zip(old, new, strict=True)), (config, old, new)
            assert sum(b != a for b, a in zip(old, new, strict=True)) == 1
            gpu = old[0] * old[1] ** 2 > new[0] * new[1] ** 2
            host = old[2:] != new[2:]
            assert gpu or (host and cause is not Cause.GPU_MEMORY)


@pytest.mark.parametrize("cause", Cause)
def test_only_what_recovery_may_change_changes(cause: Cause) -> None:
    for config in GRID:
        last = walk(config, cause)[-1]
        kept = last.replace(
            micro_batch=config.micro_batch,
            imgsz=config.imgsz,
            cache=config.cache,
            workers=config.workers,
        )
        assert kept == config


@pytest.mark.parametrize("cause", Cause)
def test_the_ladder_ends_at_one_image_of_the_smallest_size(cause: Cause) -> None:
    for config in GRID:
        micro, imgsz, cached, workers = needs(walk(config, cause)[-1])
        assert micro == 1 and imgsz == min(config.imgsz, SIZES[-1])
        if cause is not Cause.GPU_MEMORY:
            assert not cached and workers == 0


def test_the_order_is_the_users() -> None:
    config = TrainConfig(batch=16, imgsz=640, workers=2)
    steps = [needs(c)[:2] for c in walk(config, Cause.GPU_MEMORY)]
    assert steps == [
        (16, 640), (8, 640), (4, 640), (4, 512), (4, 416), (4, 320), (2, 320), (1, 320),
    ]  # fmt: skip
    host = [needs(c)[2:] for c in walk(config, Cause.HOST_MEMORY)]
    assert host[:4] == [(True, 2), (False, 2), (False, 1), (False, 0)]


def test_below_the_sound_micro_batch_the_image_shrinks_first() -> None:
    for config in GRID:
        steps = [needs(c) for c in walk(config, Cause.GPU_MEMORY)]
        for before, after in itertools.pairwise(steps):
            if after[0] < before[0] <= SOUND_MICRO_BATCH:
                assert before[1] <= SIZES[-1]


@pytest.mark.parametrize("validating", [False, True])
def test_on_a_gpu_the_host_renders_only_after_the_micro_batch_has_shrunk(validating: bool) -> None:
    """It costs a run speed to its end, and frees little."""
    config = TrainConfig(batch=16, imgsz=640)
    failure = _Failure(Cause.GPU_MEMORY, "", validating=validating, rehearsed=True, recorded=False)
    rung: Rung | None = first_rung(config)
    steps = []
    while rung is not None:
        steps.append((rung.bank, rung.val_batch, rung.micro_batch, rung.imgsz))
        rung = _next(config, rung, failure)
    smallest = 1 if validating else 16
    assert steps[:2] == [("device", 16, 16, 640), ("pinned", 16, 16, 640)]
    assert [step for step in steps[2:] if step[1] == smallest or not validating] == [
        *([("pinned", 1, 16, 640)] if validating else []),
        *(("pinned", smallest, micro_batch, 640) for micro_batch in (8, 4)),
        *(("cv2", smallest, 4, imgsz) for imgsz in (640, 512, 416, 320)),
        *(("cv2", smallest, micro_batch, 320) for micro_batch in (2, 1)),
    ]


@pytest.mark.parametrize(("bank", "counts"), [("cv2", [4, 2, 1, 0]), ("device", [0])])
def test_a_gpu_that_renders_has_one_process_to_give_up(bank: str, counts: list[int]) -> None:
    """Fewer of those that it does not start would change nothing."""
    config = TrainConfig(batch=1, imgsz=64, workers=8)
    failure = _Failure(Cause.WORKER, "", validating=False, rehearsed=False, recorded=False)
    rung = dataclasses.replace(first_rung(config), bank=bank)
    after = _next(config, rung, failure)
    assert after == dataclasses.replace(rung, cache=False), "the workers asked for are kept"
    found = []
    while (after := _next(config, after, failure)) is not None:
        found.append(after.workers)
    assert found == counts


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("validating", [False, True])
def test_recorded_steps_go_first_and_only_where_that_helps(cause: Cause, validating: bool) -> None:
    config = TrainConfig(batch=16, imgsz=640)
    first = first_rung(config)
    for recorded in (False, True):
        failure = _Failure(cause, "", validating=validating, rehearsed=False, recorded=recorded)
        after = _next(config, first, failure)
        assert after is not None and after != first
        gone = recorded and cause is Cause.GPU_MEMORY
        assert after.cuda_graphs is not gone
        assert not gone or dataclasses.replace(after, cuda_graphs=True) == first
    unwanted = dataclasses.replace(first, cuda_graphs=False)
    assert _next(config, unwanted, failure) != unwanted


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, cause",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "GPU_MEMORY"),
        (RuntimeError("CUDA error: out of memory"), "GPU_MEMORY"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "GPU_MEMORY",
        ),
        (MemoryError(), "HOST_MEMORY"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate"),
            "HOST_MEMORY",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "HOST_MEMORY"),
        (RuntimeError("a loader process failed:\n ... MemoryError"), "HOST_MEMORY"),
        (WorkerDied("loader process 7 ended by itself (exit code -9)."), "WORKER"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "WORKER"),
        (RuntimeError("Pin memory thread exited unexpectedly"), "WORKER"),
        (raised_from(RuntimeError("while training"), MemoryError()), "HOST_MEMORY"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (KeyboardInterrupt(), None),
        (ValueError("out of memory"), None),
    ],
)
def test_what_counts_as_running_out(error: BaseException, cause: str | None) -> None:
    found = cause_of(error)
    assert (found.name if found else None) == cause


def test_vague_cudnn_errors_count_only_after_a_failed_allocation() -> None:
    for text in ("CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_INTERNAL_ERROR"):
        error = RuntimeError(f"cuDNN error: {text}")
        assert cause_of(error) is None
        assert cause_of(error, allocation_failed=True) is Cause.GPU_MEMORY
