"""Build what a run stands on: data, network, optimizer, state, loaders."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hsrloop.config import (
    HEAD_LR_SCALE,
    KNOWN_LR_SCALE,
    PRETRAINED_LR_SCALE,
    Resolved,
    TrainConfig,
)
from hsrloop.data.dataset import DatasetSpec, ImageRef
from hsrloop.data.loader import TrainLoader, ValLoader
from hsrloop.data.store import ImageStore
from hsrloop.errors import WeightsError
from hsrloop.events import Event, Note, Progress
from hsrloop.hardware.memory import cache_budget, host_memory, usable_cores
from hsrloop.model.base import BaseModel, load_base
from hsrloop.model.ema import Ema
from hsrloop.model.groups import build_optimizer, materialise_state, parameter_groups
from hsrloop.model.weights import find_weights, largest_smaller
from hsrloop.records import DeviceInfo, Rung
from hsrloop.train.precision import place
from hsrloop.train.state import TrainState, initial_grad_scale

Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Loaders:
    """The two streams of a run and the images behind them."""

    train: TrainLoader
    val: ValLoader
    stores: tuple[ImageStore, ...]

    def __enter__(self) -> Loaders:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop workers, release the cache."""
        self.train.close()
        self.val.close()
        for store in self.stores:
            store.close()


def load_model(
    resolved: Resolved, names: tuple[str, ...], emit: Emit
) -> tuple[Resolved, BaseModel]:
    """Return the base network for `names`; a tier's model falls back to a smaller one at hand.

    The settings come back with the model that is really used.

    Raises:
        WeightsError: not found, or not usable.
    """
    config = resolved.config
    if config.model.endswith((".yaml", ".yml")):
        return resolved, load_base(config.model, names=names, seed=config.seed)
    path = locate(resolved, emit)
    if path.name != Path(config.model).name:
        sources = {**resolved.sources, "model": "at hand"}
        resolved = Resolved(config.replace(model=path.name), sources)
    base = load_base(path, names=names, seed=config.seed, trust=config.trust_checkpoint)
    return resolved, base


def locate(resolved: Resolved, emit: Emit) -> Path:
    """Find the base weights; what the user did not name may be replaced by a smaller model."""
    try:
        return find_weights(resolved.config.model)
    except WeightsError:
        chosen_here = resolved.sources["model"] in ("default", "preset fast")
        if not (chosen_here or resolved.sources["model"].startswith("tier")):
            raise
        smaller = largest_smaller(resolved.config.model)
        if smaller is None:
            raise
        path, text = smaller
        emit(Note(text=text, level="warning"))
        return path


def build_state(
    config: TrainConfig,
    module: nn.Module,
    device: torch.device,
    *,
    fresh_share: float | None,
    amp: bool,
) -> TrainState:
    """Return the state of a run that has not begun; optimizer state exists already.

    Args:
        fresh_share: share of the classes that pretrained weights do not know, in [0, 1]; None from
            scratch. See `layer_rates`.
    """
    module = place(module, device)
    body, outputs = layer_rates(config, fresh_share)
    groups = parameter_groups(
        module,
        lr0=config.lr0,
        weight_decay=config.weight_decay,
        llrd_rate=config.llrd_decay_rate if config.llrd else None,
        freeze=config.freeze,
        lr_scale=body,
        head_lr_scale=outputs if outputs != body else None,
    )
    optimizer = build_optimizer(config.optimizer, groups, momentum=config.momentum)
    materialise_state(optimizer)
    return TrainState(
        model=module,
        ema=Ema(module),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=amp),
        grad_scale=initial_grad_scale(config.batch) if amp else 1.0,
        batch=config.batch,
        rung=first_rung(config),
        loss_sums=torch.zeros(5, dtype=torch.float64, device=device),
    )


def first_rung(config: TrainConfig) -> Rung:
    """Return the settings that were asked for, as the ladder's first rung."""
    micro_batch = config.micro_batch or config.batch
    return Rung(
        micro_batch=micro_batch,
        imgsz=config.imgsz,
        cache=config.cache,
        workers=config.workers,
        val_batch=micro_batch,
    )


def layer_rates(config: TrainConfig, fresh_share: float | None) -> tuple[float, float]:
    """Return the learning-rate factors of the network's body and of its class outputs.

    Pretrained layers move slowly, or the first steps undo what they know, the more so the more
    classes they know. New class rows have far to go, known ones have not: the outputs' factor lies
    between both by the share that is new.
    From scratch no layer is behind another, and with layer-wise decay the decay decides alone,
    unless factors are given.

    Args:
        fresh_share: see `build_state`.
    """
    if fresh_share is None:
        return 1.0, 1.0
    body, head = config.pretrained_lr_scale, config.head_lr_scale
    if body is None:
        between = KNOWN_LR_SCALE + (PRETRAINED_LR_SCALE - KNOWN_LR_SCALE) * fresh_share
        body = 1.0 if config.llrd else between
    if head is None:
        head = 1.0 if config.llrd else HEAD_LR_SCALE
    return body, body + (head - body) * fresh_share


def build_loaders(
    resolved: Resolved, spec: DatasetSpec, info: DeviceInfo, *, rung: Rung, emit: Emit
) -> Loaders:
    """Decode what fits into the cache and return both loaders.

    Args:
        rung: replaces what the settings say; validation keeps their imgsz.
    """
    asked = resolved.config
    config = asked.replace(
        micro_batch=rung.micro_batch, imgsz=rung.imgsz, cache=rung.cache, workers=rung.workers
    )
    resolved = Resolved(config, resolved.sources)
    budget = cache_budget(host_memory().free_bytes)
    train_store = _store(config, spec.train, budget, "caching training images", emit)
    val_store = val_image_store(
        config.replace(imgsz=asked.imgsz),
        spec.val,
        budget_bytes=max(0, budget - train_store.cached_bytes),
        emit=emit,
    )
    train = TrainLoader(
        spec.train,
        train_store,
        config,
        workers=worker_count(resolved, info),
        pin_memory=info.kind == "cuda",
    )
    val = ValLoader(spec.val, val_store, batch=rung.val_batch, pin_memory=info.kind == "cuda")
    return Loaders(train, val, (train_store, val_store))


def val_image_store(
    config: TrainConfig, refs: tuple[ImageRef, ...], *, budget_bytes: int, emit: Emit
) -> ImageStore:
    """Return validation images resized as Ultralytics does, so that metrics agree with its own."""
    return _store(config, refs, budget_bytes, "caching validation images", emit, "linear")


def worker_count(resolved: Resolved, info: DeviceInfo) -> int:
    """Return the loader processes: none on the CPU unless asked for, else at most cores - 1."""
    config = resolved.config
    if info.kind == "cpu" and resolved.sources["workers"] == "default":
        return 0  # measured: on two cores a worker takes time from the network
    return max(0, min(config.workers, info.cores - 1))


def cache_folder() -> Path:
    """Return the folder for decoded images: $XDG_CACHE_HOME/hsrloop, or ~/.cache/hsrloop."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hsrloop"


def _store(
    config: TrainConfig,
    refs: tuple[ImageRef, ...],
    budget_bytes: int,
    task: str,
    emit: Emit,
    interpolation: str = "area",
) -> ImageStore:
    return ImageStore(
        refs,
        imgsz=config.imgsz,
        cache=config.cache,
        budget_bytes=None if config.cache == "disk" else budget_bytes,
        interpolation=interpolation,
        cache_dir=cache_folder(),
        threads=usable_cores(),
        progress=lambda done, total: emit(Progress(task=task, done=done, total=total)),
    )
