"""Decide where decoded images lie and who renders the training stream, and set both up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from hsrloop.config import TrainConfig
from hsrloop.data.pixels.bank import (
    PLACES,
    Bank,
    BankPlace,
    DeviceBank,
    Sources,
    TileBank,
    bank_place,
)
from hsrloop.data.pixels.kernel import RenderKernel
from hsrloop.data.pixels.render_torch import TorchRenderer, gpu_bytes
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.scenes.cutouts import CutoutStore
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.errors import DeviceError
from hsrloop.events import Event, Note, Progress
from hsrloop.hardware.memory import GIB, gpu_memory, usable_cores
from hsrloop.ops.nvrtc import KernelError
from hsrloop.paths import cache_folder

Emit = Callable[[Event], None]
SCRATCH_SHARE = 1 / 24  # of the free GPU memory for the renderer's temporaries (a guess)
SCRATCH_LIMITS = (64 * 2**20, 2**30)  # more than the upper one is not faster (a guess)


@dataclass(frozen=True, slots=True)
class TrainImages:
    """Training images, and what renders them on the GPU; None: the host does."""

    store: ImageStore
    renderer: TorchRenderer | None
    place: BankPlace


def train_images(
    config: TrainConfig,
    images: Sequence[ImageRef],
    cutouts: CutoutStore | None,
    device: torch.device,
    *,
    micro_batch: int,
    at_best: str = "device",
    budget_bytes: int,
    emit: Emit,
) -> TrainImages:
    """Decode the training images to where they fit.

    Args:
        images: what `Layer.source` counts in.
        at_best: "pinned" or "cv2" once memory ran out for what is faster.
        budget_bytes: what a cache in RAM may take.

    Raises:
        DeviceError: `config.augment_device` asks for a GPU and `device` is none.
    """
    free = gpu_memory(device).free_bytes if device.type == "cuda" else 0
    scratch = int(min(max(free * SCRATCH_SHARE, SCRATCH_LIMITS[0]), SCRATCH_LIMITS[1]))
    sources = Sources(ImageStore(images, imgsz=config.imgsz), cutouts)
    kernel = None if config.augment_device == "cpu" else _kernel(device, emit)
    place = render_place(
        config,
        device.type,
        sources,
        scratch_bytes=gpu_bytes(config.imgsz, micro_batch, scratch, kernel=kernel is not None),
        gpu_free_bytes=free,
        ram_free_bytes=budget_bytes,
    )
    place = max(place, cast(BankPlace, at_best), key=PLACES.index)
    _say(config, device.type, place, sources, emit)
    if place == "device" and config.cache != "disk":  # each is asked for once, for the bank
        kept = decoded_folder() if config.cache else None
        store = ImageStore(images, imgsz=config.imgsz, cache_dir=kept)
    else:
        store = image_store(
            config, images, budget_bytes=budget_bytes, what="training images", emit=emit
        )
    if place == "cv2":
        return TrainImages(store, None, place)
    renderer = TorchRenderer(
        _bank(place, Sources(store, cutouts), device, emit),
        images,
        imgsz=config.imgsz,
        device=device,
        scratch_bytes=scratch,
        kernel=kernel,
    )
    return TrainImages(store, renderer, place)


def _bank(place: BankPlace, sources: Sources, device: torch.device, emit: Emit) -> Bank:
    """Return the sources where they are to lie, "device" or "pinned"."""
    if place == "pinned":
        return TileBank(sources, device)
    task = "loading training images onto the GPU"
    bank = DeviceBank(
        sources,
        device,
        threads=usable_cores(),
        progress=lambda done, total: emit(Progress(task=task, done=done, total=total)),
    )
    sources.images.remember()
    return bank


def _kernel(device: torch.device, emit: Emit) -> RenderKernel | None:
    """Return the kernel that renders on CUDA; None where torch's operators have to."""
    if device.type != "cuda":
        return None
    try:
        return RenderKernel(device)
    except KernelError as error:
        text = f"augmenting on the GPU takes longer here: its kernel cannot be compiled ({error})"
        emit(Note(text=text, level="warning"))
        return None


def check_augment_device(config: TrainConfig, kind: str) -> None:
    """Check that images can be augmented where the user wants it.

    Args:
        kind: of the training device, "cuda" or "cpu".

    Raises:
        DeviceError: on a GPU, and training runs on the CPU.
    """
    if kind == "cpu" and config.augment_device == "gpu":
        raise DeviceError(
            "augment_device is gpu, but training runs on the CPU. Use --augment-device auto, or "
            "train on a GPU with --device cuda."
        )


def render_place(
    config: TrainConfig,
    kind: str,
    sources: Sources,
    *,
    scratch_bytes: int,
    gpu_free_bytes: int,
    ram_free_bytes: int,
) -> BankPlace:
    """Return who renders, and from where.

    Args:
        kind: of the training device, "cuda" or "cpu".
        scratch_bytes, gpu_free_bytes, ram_free_bytes: as for `bank_place`.

    Raises:
        DeviceError: see `train_images`.
    """
    check_augment_device(config, kind)
    if kind == "cpu" or config.augment_device == "cpu":
        return "cv2"
    return bank_place(
        bank_bytes=sources.bytes,
        scratch_bytes=scratch_bytes,
        gpu_free_bytes=gpu_free_bytes,
        ram_bytes=0 if config.cache == "disk" else sources.images.bytes,
        ram_free_bytes=ram_free_bytes if config.cache else 0,
    )


def image_store(
    config: TrainConfig,
    refs: Sequence[ImageRef],
    *,
    budget_bytes: int,
    what: str,
    emit: Emit,
    interpolation: str = "area",
) -> ImageStore:
    """Return images cached as the configuration asks; `what` they are, for the progress."""
    return ImageStore(
        refs,
        imgsz=config.imgsz,
        cache=config.cache,
        budget_bytes=None if config.cache == "disk" else budget_bytes,
        interpolation=interpolation,
        cache_dir=decoded_folder() if config.cache else None,
        threads=usable_cores(),
        progress=lambda task, done, total: emit(
            Progress(task=f"{task} {what}", done=done, total=total)
        ),
    )


def val_image_store(
    config: TrainConfig, refs: Sequence[ImageRef], *, budget_bytes: int, emit: Emit
) -> ImageStore:
    """Return validation images resized as Ultralytics does, so that metrics agree with its own."""
    return image_store(
        config,
        refs,
        budget_bytes=budget_bytes,
        what="validation images",
        emit=emit,
        interpolation="linear",
    )


def decoded_folder() -> Path:
    """Return the folder of decoded images; see `hsrloop.data.pixels.kept`."""
    return cache_folder() / "images"


def _say(config: TrainConfig, kind: str, place: BankPlace, sources: Sources, emit: Emit) -> None:
    """Tell where images are augmented, as a warning where a wish for the GPU is not met."""
    if kind == "cpu" or config.augment_device == "cpu":
        return
    size = f"{sources.bytes / GIB:.2f} GiB"
    texts: dict[BankPlace, str] = {
        "device": f"augmenting on the GPU, with all images in its memory ({size})",
        "pinned": f"augmenting on the GPU; the images ({size}) stay in RAM, too large for the GPU",
        "cv2": "augmenting on the CPU: GPU memory is short, or RAM for the image cache",
    }
    asked = config.augment_device == "gpu" and place == "cv2"
    emit(Note(text=texts[place], level="warning" if asked else "info"))
