"""A run from its settings to its result: build the runtime at a position, loop, report."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hsrloop.config import AUTO, Resolved
from hsrloop.data.scenes.synthesis import Synthesis
from hsrloop.data.sets.dataset import DatasetSpec
from hsrloop.events import Event, Note, RunFinished, RunStarted, RunStopped, Sink
from hsrloop.hardware.contention import SpinGovernor
from hsrloop.hardware.power import Power
from hsrloop.hardware.pressure import watch, without_spilling
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.model.base import load_base
from hsrloop.model.export import check_export
from hsrloop.model.groups import groups_table
from hsrloop.ops.nvrtc import compile_ahead
from hsrloop.records import DeviceInfo, Rung
from hsrloop.report.csv import CsvSink
from hsrloop.report.telemetry import TelemetrySink
from hsrloop.report.tensorboard import Server, TensorBoardSink, start_server
from hsrloop.train import checkpoint, folder
from hsrloop.train.build import (
    KERNELS,
    Built,
    carried_over,
    dataset_of,
    load_data,
    load_model,
)
from hsrloop.train.checkpoint import LAST, RunIdentity, Saved
from hsrloop.train.guard import Guard
from hsrloop.train.hub import Hub
from hsrloop.train.ignored import ignored_elsewhere, ignored_synthesis
from hsrloop.train.images import check_augment_device
from hsrloop.train.loop import run_to_end
from hsrloop.train.precision import set_kernels
from hsrloop.train.profile import StepProfiler
from hsrloop.train.recovery import find_first_rung, must_fit, sizes_trained, with_recovery
from hsrloop.train.rehearsal import Rehearsal
from hsrloop.train.resume import (
    Wishes,
    check_same,
    identity_of,
    read_newest,
    restore,
    resumed_settings,
)
from hsrloop.train.runtime import Runtime
from hsrloop.train.saver import Saver
from hsrloop.train.state import METRIC_NAMES, TrainState
from hsrloop.train.step import Transaction

REPORTS_BYTES = 16 * 2**20  # tables, event files, pictures: a guess, from above


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended; `result` is training_result.json's content, None when interrupted."""

    run_dir: Path
    reason: str  # "completed", "patience" or "interrupted"
    rung: Rung  # where it ended
    peak_memory_bytes: int
    result: Mapping[str, Any] | None


def train(
    resolved: Resolved,
    *,
    resume: Path | None = None,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
    fits: Path | None = None,
) -> Outcome:
    """Run a training from its settings, or go on with one.

    Args:
        resolved: the settings; when resuming, only those the user gave now count.
        resume: weights/last.pt of the run to go on with.
        sinks: listeners beside the run folder's own; closed at the end, as those are.
        stop: asked after every step; once it says True the run saves and returns.
        fits: file of what is known to fit in GPU memory; None: the user's.

    Raises:
        HsrloopError: anything the user can mend, before the run starts where that can be known.
    """
    hub = Hub(list(sinks))
    with contextlib.ExitStack() as closing:
        closing.callback(hub.close)
        if resume is not None:  # before it is read, since who holds it may write it anew
            closing.enter_context(folder.held(folder.of_checkpoint(resume)))
        given = resolved
        trust = given.config.trust_checkpoint
        saved = read_newest(resume, hub.emit, trust=trust) if resume else None
        if saved is not None:
            resolved = resumed_settings(given, saved, hub.emit)
        check_export(resolved.config.export)
        return _train(resolved, given, saved, hub, stop, fits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """What a run has before its folder is made: all that can be wrong was looked at."""

    built: Built
    identity: RunIdentity
    choose: bool  # the micro-batch is still to be chosen


def _train(
    resolved: Resolved,
    given: Resolved,
    saved: Saved | None,
    hub: Hub,
    stop: Callable[[], bool],
    fits: Path | None,
) -> Outcome:
    run_dir = folder.of_checkpoint(saved.path) if saved else None
    with contextlib.ExitStack() as closing:
        server = None
        if resolved.config.tensorboard:  # it gets ready while the run does
            server = start_server(resolved.config.tensorboard_port)
            closing.callback(server.close)
        info = probe(resolved.config.device)
        closing.enter_context(without_spilling(info))
        ready = _prepare(resolved, given, saved, run_dir, info, hub)
        state, resolved = ready.built.state, ready.built.resolved
        if run_dir is None:
            run_dir = folder.make_run_folder(folder.output_of(resolved.config))
            closing.enter_context(folder.held(run_dir))
        else:
            folder.cut_back(run_dir, state)
        _open_reports(hub, run_dir, resolved, state, server)
        hub.emit(_started(run_dir, ready.built, resumed=saved is not None))
        governor = SpinGovernor() if state.device.type == "cpu" else None
        if governor is not None:
            closing.callback(governor.close)
        profiler = None
        if resolved.config.profile:
            profiler = StepProfiler(run_dir, state.device, hub.emit)
            closing.callback(profiler.close)
        saver = closing.enter_context(
            Saver(
                run_dir / "weights",
                ready.identity,
                hub.emit,
                minutes=resolved.config.checkpoint_minutes,
                last_is_good=saved is None or saved.path.name == LAST,
            )
        )
        guard = Guard(state, run_dir)
        power = closing.enter_context(Power(hub.emit))
        runtime = partial(
            Runtime,
            config=ready.built.resolved.config,
            identity=ready.identity,
            saver=saver,
            settings=ready.built.settings,
            guard=guard,
            emit=power.emit,
            stop=stop,
            governor=governor,
            profiler=profiler,
        )
        reason = _go(ready, runtime, power.emit, fits)
    return _finish(state, resolved, run_dir, reason, server, hub)


def _prepare(
    resolved: Resolved,
    given: Resolved,
    saved: Saved | None,
    run_dir: Path | None,
    info: DeviceInfo,
    hub: Hub,
) -> _Ready:
    """Load data and model, check what can be checked, and stand at the position to start from."""
    config = resolved.config
    device = torch.device(torch_device(info))
    set_kernels(device, deterministic=config.deterministic)
    compile_ahead(KERNELS, device)
    check_augment_device(config, info.kind)
    spec, synthesis = _data(resolved, hub)
    place = run_dir or folder.output_of(config)
    folder.check_writable(place)
    if saved is None:
        resolved, base = load_model(resolved, spec.names, hub.emit)
        config = resolved.config
        if base.source_names:
            hub.emit(Note(text=carried_over(base, spec.names)))
    else:
        trust = given.config.trust_checkpoint
        base = load_base(saved.path, names=spec.names, seed=0, trust=trust)
    fresh_share = saved.identity.fresh_share if saved else base.fresh_share
    for line in ignored_elsewhere(resolved, info.kind, scratch=fresh_share is None):
        hub.emit(Note(text=line, level="warning"))
    identity = identity_of(resolved, spec, synthesis, fresh_share)
    torch.manual_seed(config.seed)  # v8 draws nothing; whatever one day does, does so repeatably
    with must_fit(info):
        built = Built.of(
            *(resolved, spec, synthesis, info, base.module),
            fresh_share=identity.fresh_share,
            emit=hub.emit,
        )
    state = built.state
    choose = config.micro_batch == AUTO
    if saved is not None:
        check_same(saved, identity, hub.emit)
        wishes = Wishes.of(saved, given, config)
        restore(state, saved, wishes, hub.emit)
        choose = wishes.choose
    needed = checkpoint.bytes_needed(state, config) + REPORTS_BYTES
    folder.check_writable(place, needed - folder.checkpoint_bytes(run_dir))
    return _Ready(built=built, identity=identity, choose=choose)


def _go(
    ready: _Ready, runtime: partial[Runtime], emit: Callable[[Event], None], fits: Path | None
) -> str:
    """Run to the end, on smaller settings where memory runs out; return how it ended.

    Args:
        runtime: lacks what is made anew for each attempt.
    """
    built, config = ready.built, ready.built.resolved.config
    state, transaction = built.state, Transaction(built.state)
    rehearsal = Rehearsal.of(built, transaction, emit, fits)
    find_first_rung(rehearsal, built.images, choose=ready.choose)

    def attempt() -> str:
        with built.loaders(emit) as loaders:
            own = runtime(
                train_loader=loaders.train,
                val_loader=loaders.val,
                transaction=transaction,
                pressure=watch(str(state.device)),
            )
            rehearsal.run()
            own.saver.reserve(state)
            return run_to_end(state, own)

    return with_recovery(attempt, state, transaction, config=config, info=built.info, emit=emit)


def _finish(
    state: TrainState,
    resolved: Resolved,
    run_dir: Path,
    reason: str,
    server: Server | None,
    hub: Hub,
) -> Outcome:
    peak = state.peak_bytes
    ended = partial(
        Outcome, run_dir=run_dir, reason=reason, rung=state.rung, peak_memory_bytes=peak
    )
    if reason == "interrupted":
        last = shlex.quote(str(run_dir / "weights" / "last.pt"))
        text = f"Go on with: hsrloop train --resume {last}"
        hub.emit(RunStopped(reason=reason, text=text))
        return ended(result=None)
    best = state.history[state.best_epoch - 1]
    names = {"ap50": "mAP50", "ap50_95": "mAP50-95"}
    result = {
        "best_model_path": "weights/best.pt",
        "last_model_path": "weights/last.pt",
        "metrics": {names.get(key, key): best[key] for key in METRIC_NAMES},
        "best_epoch": state.best_epoch,
        "best_confidence": best["best_conf"],
        "training_time_minutes": round(state.elapsed_s / 60, 3),
        "epochs_completed": len(state.history),
        "stopped_by": reason,
        "recoveries": state.recoveries,
        "rollbacks": state.rollbacks,
        "imgsz_trained": sizes_trained(resolved.config, state),
        "peak_memory_bytes": peak,
        "tensorboard_url": server.url if server and server.answered else None,
        "config": resolved.config.to_json(),
    }
    checkpoint.drop_previous(run_dir / "weights")
    folder.write_result(run_dir, result)
    hub.emit(
        RunFinished(run_dir=str(run_dir), reason=reason, result=result, classes=best["classes"])
    )
    return ended(result=result)


def _open_reports(
    hub: Hub, run_dir: Path, resolved: Resolved, state: TrainState, server: Server | None
) -> None:
    config = resolved.config
    folder.write_config(run_dir, config.to_json(), resolved.sources)
    hub.add(TelemetrySink(run_dir / "events.jsonl"))
    hub.add(CsvSink(run_dir / "results.csv"))
    if server is not None:
        logs = run_dir / "tensorboard"
        first = len(state.history) + 1
        hub.add(TensorBoardSink(logs, purge_step=first if first > 1 else None))
        server.serve(logs)

        def say_where() -> None:
            if server.url is not None:
                hub.emit(Note(text=f"TensorBoard: {server.url}"))

        hub.when(lambda: server.answered, say_where)
    hub.complete()


def _started(run_dir: Path, built: Built, *, resumed: bool) -> RunStarted:
    state, spec = built.state, built.spec
    return RunStarted(
        run_dir=str(run_dir),
        config=built.resolved.config.to_json(),
        sources=dict(built.resolved.sources),
        names=list(spec.names),
        device=built.info.name,
        train_images=len(spec.train),
        val_images=len(spec.val),
        parameters=sum(p.numel() for p in state.model.parameters()),
        groups=groups_table(state.optimizer.param_groups),
        epoch=state.position.epoch + 1,
        epochs=built.resolved.config.epochs - state.epochs_skipped,
        resumed=resumed,
    )


def _data(resolved: Resolved, hub: Hub) -> tuple[DatasetSpec, Synthesis]:
    """Load what to train on, and say what is synthesised; a folder given in vain is a warning."""
    config = resolved.config
    spec, synthesis = load_data(config, dataset_of(resolved))
    given = config.annotated_dir or config.backgrounds_dir or config.distractors_dir
    vain = given is not None and synthesis.scenes is None
    hub.emit(Note(text=synthesis.text, level="warning" if vain else "info"))
    for line in ignored_synthesis(resolved, spec, synthesis):
        hub.emit(Note(text=line, level="warning"))
    return spec, synthesis
