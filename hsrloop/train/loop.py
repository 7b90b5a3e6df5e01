"""The loop over epochs: train, validate, keep the best, stop early, leave a usable file behind."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from hsrloop.config import TrainConfig
from hsrloop.events import EpochDone, Note, Progress
from hsrloop.hardware.pressure import memory_use
from hsrloop.model.yolo import set_train_mode
from hsrloop.ops.ranges import named
from hsrloop.ops.schedule import lr_factor
from hsrloop.records import Batch, Metrics, Rung
from hsrloop.train.capsule import diverged
from hsrloop.train.checkpoint import LAST
from hsrloop.train.compiled import consider
from hsrloop.train.evaluate import evaluate
from hsrloop.train.guard import LastStep, unsound
from hsrloop.train.ladder import SOUND_MICRO_BATCH, rung_above
from hsrloop.train.meter import Meter
from hsrloop.train.runtime import Runtime
from hsrloop.train.state import LOSS_NAMES, METRIC_NAMES, TrainState

ROOM = "room"


def tail_epochs(config: TrainConfig) -> int:
    """Return how many last epochs run without mosaic and mixup."""
    return min(config.close_mosaic, config.epochs // 3)


def warmup_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of warm-up: `warmup_epochs`, at most a tenth of the run."""
    asked = config.warmup_epochs * steps_per_epoch
    return math.ceil(min(asked, 0.1 * config.epochs * steps_per_epoch))


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of 0-based `step` of the planned run, before groups' lr_scale."""
    return config.lr0 * lr_factor(
        step,
        steps=config.epochs * steps_per_epoch,
        warmup_steps=warmup_steps(config, steps_per_epoch),
        lrf=config.lrf,
        cosine=config.cos_lr,
    )


def run_to_end(state: TrainState, runtime: Runtime) -> str:
    """Train until the run is complete.

    Returns:
        "completed", "patience" (early stopping ended it), "interrupted" (`runtime.stop`; the
        state is saved and can go on exactly) or ROOM: the next epoch could use more GPU memory.
    """
    config = runtime.config
    while True:
        _go_back_if_due(state, runtime)
        validated = len(state.history)
        runtime.saver.save(state)  # what memory ran out for when it was due
        if validated < state.position.epoch:
            runtime.guard.due = unsound(state)
            if runtime.guard.due is None and not validate_epoch(state, runtime):
                return _interrupt(state, runtime)
        elif state.position.epoch + state.epochs_skipped >= config.epochs:
            runtime.saver.finish(state)
            return "patience" if state.epochs_skipped else "completed"
        elif next_larger(state, config) is not None:
            return ROOM
        elif not train_epoch(state, runtime):
            return _interrupt(state, runtime)


def next_larger(state: TrainState, config: TrainConfig) -> Rung | None:
    """Return the rung to climb to before the epoch that begins now; None: stay on this one."""
    if state.climbed or not state.recoveries or state.position.sample:
        return None
    epochs = state.position.epoch - int(state.recoveries[-1]["epoch"]) - 1
    memory = memory_use(str(state.device))
    if memory is not None:
        peak = state.with_recorded(memory.peak_bytes)
        memory = dataclasses.replace(memory, peak_bytes=peak)
    return rung_above(config, state.rung, epochs=epochs, memory=memory)


def train_epoch(state: TrainState, runtime: Runtime) -> bool:
    """Train from the state's position to the end of its epoch, or until the guard must go back.

    Returns:
        False when asked to stop.
    """
    config, loader, guard = runtime.config, runtime.train_loader, runtime.guard
    epoch = state.position.epoch
    planned = epoch + state.epochs_skipped
    if state.position.sample == 0:
        state.begin_epoch()
    guard.begin(state)
    set_modes(state, config)
    consider(
        runtime.settings.compiled,
        micro_batch=state.rung.micro_batch,
        steps_left=(config.epochs - planned) * len(loader),
        step_s=state.epoch_s / len(loader),
        emit=runtime.emit,
    )
    transaction, graphs = runtime.transaction, runtime.graphs
    mosaic = planned < config.epochs - tail_epochs(config)
    batches = loader.batches(state.position, mosaic=mosaic)
    with Meter(state, runtime) as meter:
        graphs.prepare(state, runtime.settings, transaction, loader.sizes, runtime.emit)
        for micro_batches in by_step(batches):
            step = planned * len(loader) + state.position.sample // config.batch
            lr = state.lr_scale * learning_rate(config, step, len(loader))
            guard.last = LastStep(state.position, micro_batches, mosaic, lr)
            graphs.begin(transaction)
            try:
                samples = graphs.train_step(
                    state, micro_batches, settings=runtime.settings, lr=lr, transaction=transaction
                )
            except BaseException:
                if state.commit is None:  # else the weights have moved: the step is to be finished
                    transaction.roll_back()
                raise
            persists = guard.persists(state)
            meter.count(samples)
            if persists:
                guard.due = unsound(state)
                break
            if runtime.governor is not None:
                runtime.governor.observe()
            if runtime.profiler is not None:
                meter.apart(runtime.profiler.step)
            if runtime.stop():
                return False
            if runtime.saver.due(state):
                meter.settle()
                runtime.saver.save(state)
            meter.judge()
    return True


def set_modes(state: TrainState, config: TrainConfig) -> None:
    """Put the network in train mode; BatchNorm in eval when recovery left it too few images."""
    small = state.rung.micro_batch < min(SOUND_MICRO_BATCH, config.largest_micro_batch)
    set_train_mode(state.model, freeze=config.freeze, norms_eval=small)


def by_step(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group micro-batches into optimizer steps."""
    source = iter(batches)
    while True:
        step: list[Batch] = []
        with named("data"):
            for batch in source:
                step.append(batch)
                if batch.ends_step:
                    break
        if not step:
            return
        yield step


def validate_epoch(state: TrainState, runtime: Runtime) -> bool:
    """Validate the averaged weights, keep the best, save; False when asked to stop meanwhile."""

    def on_progress(done: int, total: int) -> None:
        runtime.emit(Progress(task="validating", done=done, total=total))
        if runtime.governor is not None:
            runtime.governor.observe()

    started = time.monotonic()
    try:
        metrics = evaluate(
            state.ema.module,
            runtime.val_loader,
            names=runtime.identity.names,
            device=state.device,
            half=runtime.settings.amp,
            on_progress=on_progress,
            stop=runtime.stop,
            kept=runtime.detector,
            recorded=runtime.graphs.detections,
        )
        runtime.graphs.count(state)
    finally:
        val_s = time.monotonic() - started
        state.elapsed_s += val_s
    if metrics is None:
        return False
    state.val_s_per_epoch = val_s
    best = metrics.ap50_95 > state.best_ap50_95
    _append_history(state, metrics)
    if best:
        state.best_ap50_95, state.best_epoch = metrics.ap50_95, len(state.history)
    _add_due(state, runtime.config, best=best)
    _apply_patience(state, runtime)
    runtime.emit(_epoch_event(state, runtime, val_s, best))
    runtime.saver.save(state)
    return True


def _add_due(state: TrainState, config: TrainConfig, *, best: bool) -> None:
    """Note what the epoch just validated has to leave behind."""
    done, period = len(state.history), config.save_period
    due = ["best.pt"] if best else []
    if period and done % period == 0:
        due.append(f"epoch{done}.pt")
    state.due = list(dict.fromkeys([*state.due, *due, LAST]))


def _append_history(state: TrainState, metrics: Metrics) -> None:
    losses = state.mean_losses()
    row: dict[str, Any] = {name: losses[name] for name in (*LOSS_NAMES, "skipped_steps")}
    row.update({name: getattr(metrics, name) for name in METRIC_NAMES})
    row["best_conf"] = metrics.best_conf
    row["classes"] = [dataclasses.asdict(c) for c in metrics.classes]
    state.history.append(row)


def _apply_patience(state: TrainState, runtime: Runtime) -> None:
    """When nothing got better for long enough, jump to the planned run's tail."""
    config = runtime.config
    done, tail = len(state.history), tail_epochs(config)
    waited = done - state.best_epoch
    in_tail = done + state.epochs_skipped >= config.epochs - tail
    if not config.patience or waited < config.patience or in_tail:
        return
    state.epochs_skipped = config.epochs - tail - done
    what = f"the last {tail} epochs run without mosaic, then it stops" if tail else "stopping"
    runtime.emit(Note(text=f"no better mAP50-95 for {waited} epochs: {what}"))


def _epoch_event(state: TrainState, runtime: Runtime, val_s: float, best: bool) -> EpochDone:
    row = state.history[-1]
    train_s = state.epoch_s
    return EpochDone(
        epoch=len(state.history),
        epochs=runtime.config.epochs - state.epochs_skipped,
        **{name: row[name] for name in (*LOSS_NAMES, *METRIC_NAMES)},
        skipped_steps=int(row["skipped_steps"]),
        lr={g["name"]: g["lr"] for g in state.optimizer.param_groups},
        images_per_s=runtime.train_loader.n_samples / train_s if train_s else 0.0,
        train_s=train_s,
        val_s=val_s,
        micro_batch=state.rung.micro_batch,
        imgsz=state.rung.imgsz,
        best=best,
    )


def _go_back_if_due(state: TrainState, runtime: Runtime) -> None:
    """Do what the guard asks for.

    Raises:
        DivergedError: it was done too often; the last step lies in a capsule then.
    """
    guard = runtime.guard
    if guard.due is None:
        return
    if guard.can_go_back(state):
        runtime.emit(guard.go_back(state))
        return
    raise diverged(
        state,
        runtime.transaction,
        guard.last,
        cause=guard.due,
        run_dir=guard.run_dir,
        identity=runtime.identity,
        settings=runtime.settings,
        loader=runtime.train_loader,
    )


def _interrupt(state: TrainState, runtime: Runtime) -> str:
    runtime.guard.due = unsound(state)
    _go_back_if_due(state, runtime)
    state.due.append(LAST)
    runtime.saver.finish(state)
    return "interrupted"
