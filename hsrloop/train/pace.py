"""Choose the micro-batch that trains fastest on this machine, by trying, before the run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsrloop.data.pixels.bank import BANK_SHARE, BYTES_PER_PIXEL
from hsrloop.data.pixels.store import stored_size
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.events import Note, Progress
from hsrloop.hardware.contention import governed
from hsrloop.hardware.memory import gpu_memory, release_gpu_memory
from hsrloop.train.ladder import SOUND_MICRO_BATCH, cause_of
from hsrloop.train.loop import set_modes
from hsrloop.train.rehearsal import Rehearsal, worst_batch
from hsrloop.train.step import forward_backward

TIMED_S = 0.5  # of passes for each size, at least two of them (a guess: 3% apart at worst)
AS_FAST = 0.97  # of the best rate: nobody sees the difference, BatchNorm sees more images
TASK = "trying micro-batches"
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Pace:
    """What trying came to: images/s by micro-batch, None where memory ran out."""

    rates: Mapping[int, float | None]

    @property
    def best(self) -> int:
        """Return the largest micro-batch that is as fast as any; the smallest if none fits."""
        fitting = {size: rate for size, rate in self.rates.items() if rate is not None}
        if not fitting:
            return min(self.rates)
        return max(n for n, rate in fitting.items() if rate >= AS_FAST * max(fitting.values()))

    def __str__(self) -> str:
        said = [
            f"{size}: {'does not fit' if rate is None else f'{rate:.1f} images/s'}"
            for size, rate in self.rates.items()
        ]
        return f"micro_batch {self.best} is chosen ({', '.join(said)})"


def sizes_to_try(batch: int) -> tuple[int, ...]:
    """Return the powers of two below `batch`, from what BatchNorm can stand, and `batch`."""
    sizes, size = [], SOUND_MICRO_BATCH
    while size < batch:
        sizes.append(size)
        size *= 2
    return (*sizes, batch)


def measure(sizes: Sequence[int], rate_of: Callable[[int], float]) -> Pace:
    """Try micro-batches in rising order until one does not fit.

    Args:
        rate_of: images/s of one; raises what `ladder.cause_of` knows when memory runs out.
    """
    rates: dict[int, float | None] = {}
    for size in sizes:
        rates[size] = _rate_or_none(size, rate_of)
        release_gpu_memory()
        if rates[size] is None:
            break
    return Pace(rates)


def _rate_or_none(size: int, rate_of: Callable[[int], float]) -> float | None:
    try:
        return rate_of(size)
    except Exception as error:
        if cause_of(error) is None:
            raise
        return None


def choose_micro_batch(
    rehearsal: Rehearsal, images: Sequence[ImageRef], *, clock: Clock = time.perf_counter
) -> None:
    """Put the state on the rung of the fastest micro-batch, and say what was measured.

    A choice that an earlier run made on the same machine is taken over.

    Args:
        images: that will lie in GPU memory beside the training.
    """
    state, batch = rehearsal.state, rehearsal.config.batch
    known = rehearsal.fits.known() if rehearsal.wanted else None
    if known is not None:
        chosen = min(known.micro_batch, batch)
        text = f"micro_batch {chosen}, as chosen by an earlier run on this machine"
    else:
        sizes = sizes_to_try(batch)
        pace = _tried(rehearsal, images, sizes, clock) if len(sizes) > 1 else None
        chosen = sizes[0] if pace is None else pace.best
        text = str(pace or f"micro_batch {chosen}: a batch of {batch} leaves no other to try")
    state.rung = dataclasses.replace(state.rung, micro_batch=chosen, val_batch=chosen)
    rehearsal.emit(Note(text=text))


def _tried(
    rehearsal: Rehearsal, images: Sequence[ImageRef], sizes: Sequence[int], clock: Clock
) -> Pace:
    state, emit = rehearsal.state, rehearsal.emit
    taken = _room_for(images, rehearsal)
    with governed(state.device.type) as observe:

        def tried(size: int) -> float:
            emit(Progress(task=TASK, done=sizes.index(size), total=len(sizes)))
            return rate(rehearsal, size, clock, observe)

        pace = measure(sizes, tried)
    state.forget_peak()
    del taken
    emit(Progress(task=TASK, done=len(sizes), total=len(sizes)))
    return pace


def rate(
    rehearsal: Rehearsal, size: int, clock: Clock, observe: Callable[[], bool] = lambda: False
) -> float:
    """Return the images/s of training passes of `size` images; the state stays as it was.

    Args:
        observe: of `governed`. Passes before it reacted do not count.
    """
    state, before = rehearsal.state, rehearsal.state.rung
    state.rung = dataclasses.replace(before, micro_batch=size)
    batch = worst_batch(
        images=size, imgsz=before.imgsz, boxes=rehearsal.boxes, classes=rehearsal.classes
    )
    batch = dataclasses.replace(batch, images=batch.images.to(state.device))
    try:
        with rehearsal.unchanged():
            set_modes(state, rehearsal.config)
            rehearsal.accumulate()  # kernels are chosen, and memory is taken as in a real step
            _wait(state.device)
            started, passes = clock(), 0
            while passes < 2 or clock() - started < TIMED_S:
                forward_backward(state, batch, rehearsal.settings)
                _wait(state.device)
                passes += 1
                if observe():
                    started, passes = clock(), 0
            return size * passes / (clock() - started)
    finally:
        state.rung = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _room_for(images: Sequence[ImageRef], rehearsal: Rehearsal) -> Tensor | None:
    """Take the GPU memory that training images will take later."""
    device = rehearsal.state.device
    if device.type != "cuda" or rehearsal.config.augment_device == "cpu":
        return None
    imgsz = rehearsal.config.imgsz
    pixels = sum(h * w for h, w in (stored_size(r.height, r.width, imgsz) for r in images))
    size = min(BYTES_PER_PIXEL * pixels, int(BANK_SHARE * gpu_memory(device).free_bytes))
    return torch.empty(size, dtype=torch.uint8, device=device)
