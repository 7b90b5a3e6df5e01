"""A run from its settings to its result: build the runtime at a position, loop, report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hsrloop.config import Resolved
from hsrloop.data.dataset import DatasetSpec, load_dataset
from hsrloop.data.loader import ValLoader
from hsrloop.errors import ConfigError
from hsrloop.events import Note, RunFinished, RunStarted, RunStopped, Sink
from hsrloop.hardware.contention import SpinGovernor
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.model.base import BaseModel, load_base
from hsrloop.model.groups import groups_table
from hsrloop.model.weights import read_checkpoint
from hsrloop.model.yolo import reg_max, strides
from hsrloop.records import DeviceInfo, Metrics
from hsrloop.report.csv import CsvSink
from hsrloop.report.telemetry import TelemetrySink
from hsrloop.report.tensorboard import Server, TensorBoardSink, start_server
from hsrloop.train import checkpoint, folder
from hsrloop.train.build import (
    Loaders,
    build_loaders,
    build_state,
    load_model,
    locate,
    val_image_store,
)
from hsrloop.train.checkpoint import KEY, RunIdentity, Saved
from hsrloop.train.evaluate import evaluate
from hsrloop.train.hub import Hub
from hsrloop.train.loop import METRIC_NAMES, Runtime, run_to_end
from hsrloop.train.precision import fp16_is_sound, set_kernels
from hsrloop.train.recovery import sizes_trained, with_recovery
from hsrloop.train.resume import check_same, current_versions, resumed_rung, resumed_settings
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, Transaction

CHECKPOINT_BYTES_PER_PARAMETER = 20  # weights, average and two moments in float32, half weights
CHECKPOINTS_ON_DISK = 3  # last, the one being written, best


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended; `result` is training_result.json's content, None when interrupted."""

    run_dir: Path
    reason: str  # "completed", "patience" or "interrupted"
    result: Mapping[str, Any] | None


def train(
    resolved: Resolved,
    *,
    resume: Path | None = None,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run a training from its settings, or go on with one.

    Args:
        resolved: the settings; when resuming, only those the user gave now count.
        resume: weights/last.pt of the run to go on with.
        sinks: listeners beside the run folder's own; closed at the end, as those are.
        stop: asked after every step; once it says True the run saves and returns.

    Raises:
        HsrloopError: anything the user can mend, before the run starts where that can be known.
    """
    hub = Hub(list(sinks))
    try:
        saved = checkpoint.read(resume, trust=resolved.config.trust_checkpoint) if resume else None
        if saved is not None:
            resolved = resumed_settings(resolved, saved, hub.emit)
        return _train(resolved, saved, hub, stop)
    finally:
        hub.close()


def _train(resolved: Resolved, saved: Saved | None, hub: Hub, stop: Callable[[], bool]) -> Outcome:
    config = resolved.config
    info = probe(config.device)
    device = torch.device(torch_device(info))
    set_kernels(device, deterministic=config.deterministic)
    spec = load_dataset(_dataset(resolved), seed=config.seed)
    run_dir = folder.of_checkpoint(saved.path) if saved else None
    folder.check_writable(run_dir or Path(config.output))
    if saved is None:
        resolved, base = load_model(resolved, spec.names, hub.emit)
        config = resolved.config
    else:
        base = load_base(saved.path, names=spec.names, seed=0, trust=config.trust_checkpoint)
    fresh_share = saved.identity.fresh_share if saved else _fresh_share(base)
    identity = _identity(resolved, spec, fresh_share)
    torch.manual_seed(config.seed)  # v8 draws nothing; whatever one day does, does so repeatably
    amp = config.amp and device.type == "cuda" and fp16_is_sound(base.module, device, hub.emit)
    state = build_state(config, base.module, device, fresh_share=identity.fresh_share, amp=amp)
    if saved is not None:
        check_same(saved, identity, hub.emit)
        state.load_payload(saved.state)
        state.rung = resumed_rung(state.rung, saved.identity.config, config)
        if config.epochs != saved.identity.config.epochs:
            state.epochs_skipped = 0  # another plan, with another tail
    folder.check_writable(run_dir or Path(config.output), _bytes_needed(state))
    with contextlib.ExitStack() as closing:
        if run_dir is None:
            run_dir = folder.make_run_folder(Path(config.output))
        else:
            folder.cut_back(run_dir, epochs=len(state.history), position=state.position)
        server = _open_reports(hub, run_dir, resolved, state)
        if server is not None:
            closing.callback(server.close)
        hub.emit(_started(run_dir, resolved, state, spec, info, resumed=saved is not None))
        governor = SpinGovernor() if device.type == "cpu" else None
        if governor is not None:
            closing.callback(governor.close)
        transaction = Transaction(state)
        settings = StepSettings(
            device=device,
            strides=strides(base.module),
            reg_max=reg_max(base.module),
            amp=amp,
            ema_decay=config.ema_decay,
            ema_tau=config.ema_tau,
        )

        def runtime(loaders: Loaders) -> Runtime:
            return Runtime(
                config=config,
                identity=identity,
                run_dir=run_dir,
                train_loader=loaders.train,
                val_loader=loaders.val,
                settings=settings,
                transaction=transaction,
                emit=hub.emit,
                stop=stop,
                governor=governor,
            )

        def attempt() -> str:
            with build_loaders(resolved, spec, info, rung=state.rung, emit=hub.emit) as loaders:
                return run_to_end(state, runtime(loaders))

        reason = with_recovery(attempt, state, transaction, config=config, info=info, emit=hub.emit)
    return _finish(state, resolved, run_dir, reason, server, hub)


def _finish(
    state: TrainState,
    resolved: Resolved,
    run_dir: Path,
    reason: str,
    server: Server | None,
    hub: Hub,
) -> Outcome:
    if reason == "interrupted":
        text = f"go on with: hsrloop train --resume {run_dir / 'weights' / 'last.pt'}"
        hub.emit(RunStopped(reason=reason, text=text))
        return Outcome(run_dir=run_dir, reason=reason, result=None)
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
        "imgsz_trained": sizes_trained(resolved.config, state),
        "tensorboard_url": server.url if server else None,
        "config": resolved.config.to_json(),
    }
    folder.write_result(run_dir, result)
    hub.emit(
        RunFinished(run_dir=str(run_dir), reason=reason, result=result, classes=best["classes"])
    )
    return Outcome(run_dir=run_dir, reason=reason, result=result)


def _open_reports(hub: Hub, run_dir: Path, resolved: Resolved, state: TrainState) -> Server | None:
    config = resolved.config
    folder.write_config(run_dir, config.to_json(), resolved.sources)
    hub.add(TelemetrySink(run_dir / "events.jsonl"))
    hub.add(CsvSink(run_dir / "results.csv"))
    server = None
    if config.tensorboard:
        logs = run_dir / "tensorboard"
        first = len(state.history) + 1
        hub.add(TensorBoardSink(logs, purge_step=first if first > 1 else None))
        server = start_server(logs, config.tensorboard_port)
        if server.url is not None:
            hub.emit(Note(text=f"TensorBoard: {server.url}"))
    hub.complete()
    return server


def _started(
    run_dir: Path,
    resolved: Resolved,
    state: TrainState,
    spec: DatasetSpec,
    info: DeviceInfo,
    *,
    resumed: bool,
) -> RunStarted:
    return RunStarted(
        run_dir=str(run_dir),
        config=resolved.config.to_json(),
        sources=dict(resolved.sources),
        names=list(spec.names),
        device=info.name,
        train_images=len(spec.train),
        val_images=len(spec.val),
        parameters=sum(p.numel() for p in state.model.parameters()),
        groups=groups_table(state.optimizer.param_groups),
        epoch=state.position.epoch + 1,
        resumed=resumed,
    )


def _identity(resolved: Resolved, spec: DatasetSpec, fresh_share: float | None) -> RunIdentity:
    found, threads = current_versions()
    return RunIdentity(
        config=resolved.config,
        sources=resolved.sources,
        names=spec.names,
        fingerprint=spec.fingerprint,
        versions=found,
        threads=threads,
        fresh_share=fresh_share,
    )


def _fresh_share(base: BaseModel) -> float | None:
    """Return the share of classes that pretrained weights do not know; None from scratch."""
    if not base.source_names:
        return None
    return sum(base.fresh_classes) / len(base.fresh_classes)


def _bytes_needed(state: TrainState) -> int:
    parameters = sum(p.numel() for p in state.model.parameters())
    return CHECKPOINTS_ON_DISK * CHECKPOINT_BYTES_PER_PARAMETER * parameters


def _dataset(resolved: Resolved) -> str:
    if resolved.config.dataset is None:
        raise ConfigError("no data set given. Use --dataset path/to/data.yaml.")
    return resolved.config.dataset


def validate(
    resolved: Resolved,
    *,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Metrics | None:
    """Validate `config.model` on the data set's validation images.

    Returns:
        The metrics with every class, or None when `stop` ended it.

    Raises:
        HsrloopError: anything the user can mend.
    """
    hub = Hub(list(sinks))
    try:
        return _validate(resolved, hub, stop)
    finally:
        hub.close()


def _validate(resolved: Resolved, hub: Hub, stop: Callable[[], bool]) -> Metrics | None:
    config = resolved.config
    info = probe(config.device)
    device = torch.device(torch_device(info))
    set_kernels(device, deterministic=config.deterministic)
    path = locate(resolved, hub.emit)
    trained = _trained_settings(path, config.trust_checkpoint)
    as_trained = {k: v for k, v in trained.items() if resolved.sources[k] == "default"}
    config = config.replace(**as_trained)  # the same seed holds out the same images
    hub.emit(Note(text=f"validating {path} at {config.imgsz} px"))
    spec = load_dataset(_dataset(resolved), seed=config.seed)
    base = load_base(path, names=spec.names, seed=config.seed, trust=config.trust_checkpoint)
    unknown = [n for n, fresh in zip(spec.names, base.fresh_classes, strict=True) if fresh]
    if unknown:
        text = f"{path} has never seen {', '.join(unknown)}: their AP says nothing"
        hub.emit(Note(text=text, level="warning"))
    store = val_image_store(config.replace(cache=False), spec.val, budget_bytes=0, emit=hub.emit)
    loader = ValLoader(spec.val, store, batch=config.batch, pin_memory=info.kind == "cuda")
    try:
        return evaluate(
            base.module,
            loader,
            names=spec.names,
            device=device,
            on_progress=hub.progress("validating"),
            stop=stop,
        )
    finally:
        loader.close()
        store.close()


def _trained_settings(path: Path, trust: bool) -> dict[str, int]:
    """Return imgsz and seed that weights were trained with, as far as the file says."""
    content = read_checkpoint(path, trust=trust)
    ours = content.get(KEY)
    said = ours["config"] if isinstance(ours, Mapping) else content.get("train_args")
    if not isinstance(said, Mapping):
        return {}
    return {key: said[key] for key in ("imgsz", "seed") if isinstance(said.get(key), int)}
