"""Go on at smaller settings when memory runs out, with the same samples, as if nothing had been.

Recovery happens outside the `except` block, when the exception, its frames and the graph are gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hsrloop.config import TrainConfig
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.errors import ResourceError, first_line
from hsrloop.events import Climbed, Event, Recovered
from hsrloop.hardware.memory import GIB, gpu_neighbours, release_gpu_memory
from hsrloop.records import DeviceInfo, Rung
from hsrloop.train.build import at
from hsrloop.train.fits import Fits, at_most
from hsrloop.train.ladder import (
    SOUND_MICRO_BATCH,
    Cause,
    MemoryThrashing,
    cause_of,
    describe_change,
    next_rung,
)
from hsrloop.train.loop import ROOM, next_larger
from hsrloop.train.pace import choose_micro_batch
from hsrloop.train.rehearsal import Rehearsal, RehearsalFailed
from hsrloop.train.state import TrainState
from hsrloop.train.step import Transaction, finish_commit


@dataclass(frozen=True, slots=True)
class _Failure:
    """What is remembered of an exception: nothing that keeps its frames alive."""

    cause: Cause
    reason: str
    validating: bool
    rehearsed: bool
    recorded: bool  # there were recorded steps, whose memory comes back


def with_recovery(
    attempt: Callable[[], str],
    state: TrainState,
    transaction: Transaction,
    *,
    config: TrainConfig,
    info: DeviceInfo,
    emit: Callable[[Event], None],
) -> str:
    """Call `attempt` until it returns, stepping down the ladder each time memory runs out.

    Args:
        attempt: builds a runtime at the state's position and rung, and runs it to its end.
        transaction: the one that steps are taken in.
        info: the device, for the message when the ladder has ended.

    Raises:
        ResourceError: no smaller settings are left, or recovery is off.
    """
    while True:
        outcome = _outcome(attempt, state)
        if outcome == ROOM:
            _climb(state, config, emit)
            release_gpu_memory()
            state.forget_peak()
            continue
        if isinstance(outcome, str):
            return outcome
        release_gpu_memory()
        state.forget_peak()
        if state.commit is not None:
            finish_commit(state, transaction)
        _step_down(state, outcome, config, info, emit)


def _outcome(attempt: Callable[[], str], state: TrainState) -> str | _Failure:
    refused = refused_allocations()
    try:
        return attempt()
    except Exception as error:
        cause = cause_of(error, allocation_failed=refused_allocations() > refused)
        if cause is None:
            raise
        rehearsal = error if isinstance(error, RehearsalFailed) else None
        first = error.__cause__ or error if rehearsal else error
        return _Failure(
            cause,
            reason=first_line(first),
            validating=_was_validating(error, state),
            rehearsed=rehearsal is not None,
            recorded=state.recorded_bytes > 0,
        )


def _was_validating(error: Exception, state: TrainState) -> bool:
    if isinstance(error, RehearsalFailed):
        return error.validating
    unvalidated = len(state.history) < state.position.epoch
    return unvalidated and not isinstance(error, MemoryThrashing)  # training, up to its last step


def refused_allocations() -> int:
    """Return how often the GPU's allocator found no memory, or only after freeing its cache."""
    if not torch.cuda.is_available():
        return 0
    stats = torch.cuda.memory_stats()
    return int(stats.get("num_ooms", 0)) + int(stats.get("num_alloc_retries", 0))


def _step_down(
    state: TrainState,
    failure: _Failure,
    config: TrainConfig,
    info: DeviceInfo,
    emit: Callable[[Event], None],
) -> None:
    after = _next(config, state.rung, failure) if config.oom_recovery else None
    if after is None:
        raise ResourceError(_last_words(state, failure, config, info))
    _go_on_at(state, after, failure, emit)


def _go_on_at(
    state: TrainState, after: Rung, failure: _Failure, emit: Callable[[Event], None]
) -> None:
    """Take a smaller rung, and say so."""
    event = Recovered(
        cause=failure.cause.value,
        change=describe_change(state.rung, after),
        rung=dataclasses.asdict(after),
        epoch=len(state.history),
        sample=state.position.sample,
        reason=failure.reason,
        rehearsed=failure.rehearsed,
    )
    state.rung = after
    state.recoveries.append(event.to_json())
    emit(event)


def find_first_rung(rehearsal: Rehearsal, images: Sequence[ImageRef], *, choose: bool) -> None:
    """Put the state on the rung that a run can start on, as far as that is known.

    Args:
        images: that will lie in GPU memory beside the training.
        choose: the fastest micro-batch is to be found out.
    """
    if choose:
        choose_micro_batch(rehearsal, images)
    if rehearsal.wanted:
        _start_where_it_fitted(rehearsal.state, rehearsal.fits, rehearsal.config, rehearsal.emit)


def _start_where_it_fitted(
    state: TrainState, fits: Fits, config: TrainConfig, emit: Callable[[Event], None]
) -> None:
    """Let a run that has not begun start at the rung that an earlier one had to go down to."""
    known = fits.known()
    if known is None or state.steps or not config.oom_recovery:
        return
    state.rung = dataclasses.replace(state.rung, bank=at_most(state.rung, known).bank)
    after = at_most(state.rung, known)
    if after != state.rung:
        reason = "it did when the same was tried before on this machine"
        failure = _Failure(
            Cause.GPU_MEMORY, reason, validating=False, rehearsed=True, recorded=False
        )
        _go_on_at(state, after, failure, emit)


def _climb(state: TrainState, config: TrainConfig, emit: Callable[[Event], None]) -> None:
    """Try a larger micro-batch, the only time in a run; if it fails, the ladder leads down."""
    larger = next_larger(state, config)
    state.climbed = True
    if larger is None:  # the card filled up in the meantime
        return
    change = describe_change(state.rung, larger)
    state.rung = larger
    emit(Climbed(change=change, rung=dataclasses.asdict(larger), epoch=len(state.history)))


def _next(config: TrainConfig, rung: Rung, failure: _Failure) -> Rung | None:
    """Return the rung below.

    On the GPU, what only buys speed goes first: recorded steps, if there were any, then images in
    its memory; and validation gives way with its own batch. Rendering on the host costs a run speed
    to its end and frees little, so before that the micro-batch shrinks as far as BatchNorm can
    stand.
    """
    # A GPU that renders needs one process, for plans: fewer of the others would change nothing.
    at_work = rung.workers if rung.bank == "cv2" else min(rung.workers, 1)
    smaller = next_rung(at(config, dataclasses.replace(rung, workers=at_work)), failure.cause)
    if failure.cause is Cause.GPU_MEMORY:
        if rung.cuda_graphs and failure.recorded:
            return dataclasses.replace(rung, cuda_graphs=False)
        if rung.bank == "device":
            return dataclasses.replace(rung, bank="pinned")
        if failure.validating and rung.val_batch > 1:
            return dataclasses.replace(rung, val_batch=rung.val_batch // 2)
        if rung.bank == "pinned" and rung.micro_batch <= SOUND_MICRO_BATCH:
            return dataclasses.replace(rung, bank="cv2")
    if smaller is None:
        return None
    return dataclasses.replace(
        rung,
        micro_batch=smaller.largest_micro_batch,
        imgsz=smaller.imgsz,
        cache=smaller.cache,
        workers=smaller.workers if smaller.workers < at_work else rung.workers,
    )


def _last_words(state: TrainState, failure: _Failure, config: TrainConfig, info: DeviceInfo) -> str:
    words = f"{failure.cause.value} ran out ({failure.reason})"
    if not config.oom_recovery:
        return f"{words}, and recovery is off. Use a smaller --micro-batch or --imgsz."
    tried = ", ".join(str(row["change"]) for row in state.recoveries) or "nothing smaller exists"
    words += f" and no smaller settings are left; tried: {tried}."
    return words + _advice(failure.cause, info)


@contextmanager
def must_fit(info: DeviceInfo, *, when: str = "before training began") -> Iterator[None]:
    """Say it in one line when memory runs out where nothing smaller would help.

    Args:
        when: that would be, in words.

    Raises:
        ResourceError: memory ran out meanwhile.
    """
    refused = refused_allocations()
    try:
        yield
    except Exception as error:
        cause = cause_of(error, allocation_failed=refused_allocations() > refused)
        if cause is None:
            raise
        words = f"{cause.value} ran out {when} ({first_line(error)})."
        raise ResourceError(words + _advice(cause, info)) from error


def _advice(cause: Cause, info: DeviceInfo) -> str:
    """Return what a user can do, in sentences that begin with a space."""
    if cause is not Cause.GPU_MEMORY:
        return " End other programs, or use a smaller model (-m yolov8n.pt)."
    words, taken = "", info.total_bytes - info.free_bytes
    others = gpu_neighbours(info.uuid)
    if others:
        held = ", ".join(f"process {pid} {size // 2**20} MiB" for pid, size in others)
        words = f" Others hold memory on {info.name}: {held}; end them."
    elif taken > GIB:  # in a container and under Windows the driver does not tell who
        words = (
            f" When the run started it could take {info.free_bytes / GIB:.1f} of the "
            f"{info.total_bytes / GIB:.1f} GiB of {info.name}; see nvidia-smi for who holds memory."
        )
    return f"{words} Use a smaller model (-m yolov8n.pt), or --device cpu."


def sizes_trained(config: TrainConfig, state: TrainState) -> list[int]:
    """Return the image sizes a run was trained at, the one asked for first."""
    sizes = [config.imgsz, *(int(row["rung"]["imgsz"]) for row in state.recoveries)]
    return list(dict.fromkeys(sizes))
