"""What to do when memory runs out: recognise it, and say which settings to try next.

Both are pure. Who rebuilds the runtime and repeats the samples is `train.run`.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from hsrloop.config import TrainConfig
from hsrloop.data.loader import WorkerDied
from hsrloop.errors import raised_from
from hsrloop.hardware.pressure import MemoryUse
from hsrloop.records import Rung

SIZES = (1280, 1024, 960, 800, 640, 512, 416, 320)
"""Image sizes that recovery shrinks to; an image that is smaller already stays as it is."""

SOUND_MICRO_BATCH = 4
"""Smaller ones leave BatchNorm too few images, so a smaller image is tried first."""


class MemoryThrashing(RuntimeError):
    """The GPU's memory is too full to work with, though nothing failed yet."""


class Cause(enum.Enum):
    """What ran out; the value is how it is called in messages."""

    GPU_MEMORY = "GPU memory"
    HOST_MEMORY = "main memory"
    WORKER = "a loader process"


# As torch 2.11 to 2.15, cuBLAS, cuDNN, OpenCV and numpy spell it; lower case.
_GPU = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
)
# cuDNN says this when it finds no room for its workspace, and also when a call is wrong.
_GPU_AFTER_FAILED_ALLOCATION = (
    "cudnn_status_not_supported",
    "cudnn_status_internal_error",
    "cudnn_status_execution_failed",
    "unable to find an engine to execute this computation",
)
_HOST = (
    "defaultcpuallocator",
    "not enough memory: you tried to allocate",
    "insufficient memory",
    "unable to allocate",
    "cannot allocate memory",
    "memoryerror",
)
_WORKER = (
    "dataloader worker",
    "pin memory thread exited",
    "bus error",
    "unable to open shared memory object",
    "/dev/shm",
)


def cause_of(error: BaseException, *, allocation_failed: bool = False) -> Cause | None:
    """Return what ran out, or None when an error is of another kind.

    Args:
        error: as it was raised; the errors it was raised from are looked at too.
        allocation_failed: whether the GPU's allocator had to refuse or retry since the last good
            step; only then do cuDNN's vaguer errors count.
    """
    for link in _chain(error):
        if isinstance(link, torch.OutOfMemoryError | MemoryThrashing):
            return Cause.GPU_MEMORY
        if isinstance(link, WorkerDied):
            return Cause.WORKER
        if isinstance(link, MemoryError):
            return Cause.HOST_MEMORY
        if isinstance(link, OSError):
            if link.errno == errno.ENOMEM:
                return Cause.HOST_MEMORY
            continue  # a full disk is no lack of memory
        if isinstance(link, RuntimeError) or type(link).__module__.startswith("cv2"):
            found = _by_text(str(link).lower(), allocation_failed)
            if found is not None:
                return found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = raised_from(link)


def _by_text(text: str, allocation_failed: bool) -> Cause | None:
    gpu = _GPU + (_GPU_AFTER_FAILED_ALLOCATION if allocation_failed else ())
    for cause, spellings in (
        (Cause.GPU_MEMORY, gpu),
        (Cause.WORKER, _WORKER),
        (Cause.HOST_MEMORY, _HOST),
    ):
        if any(spelling in text for spelling in spellings):
            return cause
    return None


def next_rung(config: TrainConfig, cause: Cause) -> TrainConfig | None:
    """Return the next configuration that needs less of what ran out, or None when none is left.

    What costs the result least comes first. A smaller micro-batch costs nothing down to the size
    that BatchNorm can stand, a smaller image costs small objects; giving up the cache and workers
    costs time, and helps only against a lack of main memory and dying processes, which take those
    two first.
    """
    image: tuple[_Step, ...] = (_halve_to_sound, _shrink, _halve)
    host: tuple[_Step, ...] = (_drop_cache, _fewer_workers)
    order = image if cause is Cause.GPU_MEMORY else host + image
    for step in order:
        smaller = step(config)
        if smaller is not None:
            return smaller
    return None


_Step = Callable[[TrainConfig], TrainConfig | None]


def _halve_to_sound(config: TrainConfig) -> TrainConfig | None:
    now = config.largest_micro_batch
    if now <= SOUND_MICRO_BATCH:
        return None
    return config.replace(micro_batch=max(SOUND_MICRO_BATCH, now // 2))


def _shrink(config: TrainConfig) -> TrainConfig | None:
    smaller = next((size for size in SIZES if size < config.imgsz), None)
    return None if smaller is None else config.replace(imgsz=smaller)


def _halve(config: TrainConfig) -> TrainConfig | None:
    now = config.largest_micro_batch
    return None if now == 1 else config.replace(micro_batch=now // 2)


def _drop_cache(config: TrainConfig) -> TrainConfig | None:
    return config.replace(cache=False) if config.cache == "ram" else None


def _fewer_workers(config: TrainConfig) -> TrainConfig | None:
    return config.replace(workers=config.workers // 2) if config.workers else None


CLIMB_AFTER_EPOCHS = 2
"""Whole epochs on a smaller rung before a larger micro-batch is tried (a guess)."""

ROOMY_SHARE, CLIMB_SHARE = 0.6, 0.9
"""Of the card: what the peak must stay under, and what is expected one rung up (guesses)."""


def rung_above(
    config: TrainConfig, rung: Rung, *, epochs: int, memory: MemoryUse | None
) -> Rung | None:
    """Return a rung with twice the micro-batch if there is room for it, else None.

    Only the micro-batch goes up again: it costs nothing but time.

    Args:
        config: as asked for.
        epochs: since memory ran out, the one in which it did not counted.
        memory: since then; None on the CPU.
    """
    larger = min(2 * rung.micro_batch, config.largest_micro_batch)
    if memory is None or larger <= rung.micro_batch or epochs < CLIMB_AFTER_EPOCHS:
        return None
    activations = (memory.peak_bytes - memory.fixed_bytes) * larger / rung.micro_batch
    roomy = memory.peak_bytes <= ROOMY_SHARE * memory.capacity_bytes
    if not roomy or memory.fixed_bytes + activations > CLIMB_SHARE * memory.capacity_bytes:
        return None
    return dataclasses.replace(rung, micro_batch=larger)


def describe_change(before: Rung, after: Rung) -> str:
    """Return what a step down changes, in words: "micro_batch 8 -> 4"."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return ", ".join(f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key])


def given_up(recoveries: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return what steps down changed of a `Rung`, by name.

    Args:
        recoveries: `events.Recovered`, as dicts.
    """
    changes = [str(row.get("change", "")).split(", ") for row in recoveries]
    return {part.partition(" ")[0] for change in changes for part in change}
