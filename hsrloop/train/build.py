"""Build what a run stands on: data, network, optimizer, state, loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from hsrloop.data.loader import TrainLoader
from hsrloop.data.pixels import kernel
from hsrloop.data.pixels.bank import BankPlace
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.scenes.cutouts import CutoutStore
from hsrloop.data.scenes.synthesis import Synthesis, find_folders, load_synthesis
from hsrloop.data.sets.dataset import DatasetSpec, ImageRef, load_dataset, warn_about_classes
from hsrloop.data.val_loader import ValLoader
from hsrloop.errors import ConfigError, WeightsError
from hsrloop.events import Event, Note
from hsrloop.hardware.memory import cache_budget, host_memory, usable_cores
from hsrloop.hardware.probe import torch_device
from hsrloop.model.base import BaseModel, load_base
from hsrloop.model.ema import Ema
from hsrloop.model.groups import build_optimizer, materialise_state, parameter_groups
from hsrloop.model.weights import find_weights, largest_smaller
from hsrloop.model.yolo import reg_max, strides
from hsrloop.ops import averaging, detections, loss_gpu, matching, norm, silu
from hsrloop.records import DeviceInfo, Rung
from hsrloop.train.compiled import compiled_for
from hsrloop.train.images import train_images, val_image_store
from hsrloop.train.precision import autocast_dtype, place
from hsrloop.train.state import TrainState, initial_grad_scale
from hsrloop.train.step import StepSettings
from hsrloop.words import few

Emit = Callable[[Event], None]
KERNELS = (
    *(kernel.SOURCE, norm.SOURCE, loss_gpu.SOURCE, averaging.SOURCE),
    *(silu.SOURCE, detections.SOURCE, matching.MATCH),
)
"""Sources of a run's own CUDA kernels, in the order in which it needs them."""

VAL_THREADS = 4
"""At most, that letterbox for a GPU: one makes 4,000 images of 640 px a second (measured)."""


@dataclass(frozen=True, slots=True)
class Loaders:
    """The two streams of a run and the images behind them."""

    train: TrainLoader
    val: ValLoader
    stores: tuple[ImageStore, ...]
    bank: BankPlace  # where training images are rendered from

    def __enter__(self) -> Loaders:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop workers, release the cache."""
        self.train.close()
        self.val.close()
        for store in self.stores:
            store.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a run stands on, but for its loaders, which recovery builds anew."""

    resolved: Resolved
    spec: DatasetSpec
    synthesis: Synthesis
    info: DeviceInfo
    state: TrainState
    settings: StepSettings

    @classmethod
    def of(
        cls,
        resolved: Resolved,
        spec: DatasetSpec,
        synthesis: Synthesis,
        info: DeviceInfo,
        module: nn.Module,
        *,
        fresh_share: float | None,
        emit: Emit,
    ) -> Built:
        """Put a network on the device, with the state and the settings of its first step.

        Args:
            module: is moved, not copied.
            fresh_share: see `build_state`.

        Raises:
            DeviceError: as `autocast_dtype`.
            DependencyError: as `step_settings`.
        """
        config, device = resolved.config, torch.device(torch_device(info))
        amp_dtype = autocast_dtype(config, info, module, device, emit)
        half = amp_dtype is torch.float16
        state = build_state(config, module, device, fresh_share=fresh_share, amp=half)
        settings = step_settings(config, module, device, amp_dtype=amp_dtype)
        return cls(
            resolved=resolved,
            spec=spec,
            synthesis=synthesis,
            info=info,
            state=state,
            settings=settings,
        )

    @property
    def images(self) -> Sequence[ImageRef]:
        """What `Layer.source` counts in: training images, then backgrounds."""
        scenes = self.synthesis.scenes
        return (*self.spec.train, *scenes.backgrounds) if scenes else self.spec.train

    def loaders(self, emit: Emit) -> Loaders:
        """Return loaders on the state's rung, which is told where the images came to lie."""
        loaders = build_loaders(self, emit)
        self.state.rung = dataclasses.replace(
            self.state.rung, bank=loaders.bank, workers=loaders.train.workers
        )
        return loaders


def dataset_of(resolved: Resolved) -> str:
    """Return the path of data.yaml.

    Raises:
        ConfigError: none is given.
    """
    if resolved.config.dataset is None:
        raise ConfigError("no data set given. Use --dataset path/to/data.yaml.")
    return resolved.config.dataset


def load_data(config: TrainConfig, dataset: str) -> tuple[DatasetSpec, Synthesis]:
    """Return the data set and what is synthesised beside it.

    Raises:
        DatasetError: either cannot be used.
    """
    folders = find_folders(config, dataset)
    pasted = folders.annotated is not None
    spec = load_dataset(
        dataset, seed=config.seed, train_optional=folders.suffice, cutouts_follow=pasted
    )
    synthesis = load_synthesis(config, folders, spec, threads=usable_cores())
    if pasted:
        cutouts = synthesis.scenes.cutouts if synthesis.scenes else ()
        warn_about_classes(spec, {cutout.label for cutout in cutouts if cutout.label >= 0})
    return spec, synthesis


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


def carried_over(base: BaseModel, names: Sequence[str]) -> str:
    """Return which of the classes pretrained weights know."""
    new = [name for name, fresh in zip(names, base.fresh_classes, strict=True) if fresh]
    if not new:
        return f"the weights know every class ({len(names)})"
    return f"the weights know {len(names) - len(new)} of {len(names)} classes; new: {few(new)}"


def locate(resolved: Resolved, emit: Emit) -> Path:
    """Find the base weights; what the user did not name may be replaced by a smaller model."""
    try:
        return find_weights(resolved.config.model)
    except WeightsError:
        if not resolved.chosen_here("model"):
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
        loss_sums=torch.zeros(6, dtype=torch.float64, device=device),
    )


def step_settings(
    config: TrainConfig,
    module: nn.Module,
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None,
) -> StepSettings:
    """Return what steps of a run need to know.

    Args:
        amp_dtype: of mixed precision; None computes in float32.

    Raises:
        DependencyError: compiling is asked for, and there is nothing to compile with.
    """
    return StepSettings(
        device=device,
        strides=strides(module),
        reg_max=reg_max(module),
        amp=amp_dtype is not None,
        amp_dtype=amp_dtype or torch.float16,
        compiled=compiled_for(config, device),
        ema_decay=config.ema_decay,
        ema_tau=config.ema_tau,
    )


def first_rung(config: TrainConfig) -> Rung:
    """Return the settings that were asked for, as the ladder's first rung."""
    micro_batch = config.largest_micro_batch
    return Rung(
        micro_batch=micro_batch,
        imgsz=config.imgsz,
        cache=config.cache,
        workers=config.workers,
        val_batch=micro_batch,
        bank="device",
        cuda_graphs=config.cuda_graphs,
    )


def at(config: TrainConfig, rung: Rung) -> TrainConfig:
    """Return a run's settings as they are on a rung."""
    return config.replace(
        micro_batch=rung.micro_batch, imgsz=rung.imgsz, cache=rung.cache, workers=rung.workers
    )


def layer_rates(config: TrainConfig, fresh_share: float | None) -> tuple[float, float]:
    """Return the learning-rate factors of the network's body and of its class outputs.

    Pretrained layers move slowly, or the first steps undo what they know, the more so the more
    classes they know. New class rows have far to go, known ones have not: the outputs' factor lies
    between both by the share that is new.
    With layer-wise decay the decay decides alone, unless factors are given. From scratch no layer
    is behind another: both are 1.

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


def build_loaders(built: Built, emit: Emit) -> Loaders:
    """Decode what fits into the caches and return both loaders.

    The state's rung replaces what the settings say; validation keeps their imgsz.

    Raises:
        DeviceError: augmentation is to run on a GPU, and training does not.
    """
    asked, rung, spec = built.resolved.config, built.state.rung, built.spec
    config, scenes = at(asked, rung), built.synthesis.scenes
    cutouts = None
    if scenes is not None:
        cutouts = CutoutStore(scenes.cutouts, imgsz=config.imgsz, threads=usable_cores())
    budget = cache_budget(host_memory().free_bytes)
    device = torch.device(torch_device(built.info))
    made = train_images(
        config,
        built.images,
        cutouts,
        device,
        micro_batch=rung.micro_batch,
        at_best=rung.bank,
        budget_bytes=budget,
        emit=emit,
    )
    val_store = val_image_store(
        config.replace(imgsz=asked.imgsz),
        spec.val,
        budget_bytes=max(0, budget - made.store.cached_bytes),
        emit=emit,
    )
    train = TrainLoader(
        spec.train,
        made.store,
        config,
        workers=worker_count(config.workers, built.info, meant=built.resolved.meant("workers")),
        device=device,
        scenes=scenes,
        cutouts=cutouts,
        renderer=made.renderer,
    )
    threads = min(VAL_THREADS, usable_cores()) if device.type == "cuda" else 1
    val = ValLoader(spec.val, val_store, batch=rung.val_batch, device=device, threads=threads)
    return Loaders(train, val, (made.store, val_store), made.place)


def worker_count(workers: int, info: DeviceInfo, *, meant: bool) -> int:
    """Return the loader processes: none on the CPU unless `meant`, else at most cores - 1."""
    if info.kind == "cpu" and not meant:
        return 0  # measured: on two cores a worker takes time from the network
    return max(0, min(workers, info.cores - 1))
