"""Validate weights on a data set, without a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from hsrloop.config import Resolved
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.val_loader import ValLoader
from hsrloop.errors import first_line
from hsrloop.events import Event, Note, Sink
from hsrloop.hardware.contention import governed
from hsrloop.hardware.memory import release_gpu_memory
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.model.base import load_base
from hsrloop.model.weights import read_checkpoint
from hsrloop.records import Metrics
from hsrloop.train.build import dataset_of, locate
from hsrloop.train.checkpoint import KEY
from hsrloop.train.evaluate import evaluate
from hsrloop.train.hub import Hub
from hsrloop.train.images import val_image_store
from hsrloop.train.ladder import Cause, cause_of
from hsrloop.train.precision import set_kernels
from hsrloop.train.recovery import must_fit, refused_allocations


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
    spec = load_dataset(dataset_of(resolved), seed=config.seed, train_optional=True)
    base = load_base(path, names=spec.names, seed=config.seed, trust=config.trust_checkpoint)
    unknown = [n for n, fresh in zip(spec.names, base.fresh_classes, strict=True) if fresh]
    if unknown:
        text = f"{path} has never seen {', '.join(unknown)}: their AP says nothing"
        hub.emit(Note(text=text, level="warning"))
    store = val_image_store(config.replace(cache=False), spec.val, budget_bytes=0, emit=hub.emit)

    def attempt(batch: int) -> Metrics | None:
        with (
            closing(ValLoader(spec.val, store, batch=batch, device=device)) as loader,
            governed(info.kind) as observe,
        ):

            def asked() -> bool:
                observe()
                return stop()

            return evaluate(
                base.module,
                loader,
                names=spec.names,
                device=device,
                on_progress=hub.progress("validating"),
                stop=asked,
            )

    with closing(store), must_fit(info, when="while validating"):
        return _at_what_fits(attempt, config.batch, hub.emit)


def _at_what_fits(
    attempt: Callable[[int], Metrics | None], batch: int, emit: Callable[[Event], None]
) -> Metrics | None:
    """Call with half the batch again and again while GPU memory runs out; down to one image."""
    while True:
        refused = refused_allocations()
        try:
            return attempt(batch)
        except Exception as error:
            cause = cause_of(error, allocation_failed=refused_allocations() > refused)
            if cause is not Cause.GPU_MEMORY or batch == 1:
                raise
            text = f"GPU memory ran out ({first_line(error)}): batch {batch} -> {batch // 2}"
        release_gpu_memory()  # here, where the exception and its frames are gone
        batch //= 2
        emit(Note(text=text, level="warning"))


def _trained_settings(path: Path, trust: bool) -> dict[str, int]:
    """Return imgsz and seed that weights were trained with, as far as the file says."""
    content = read_checkpoint(path, trust=trust)
    ours = content.get(KEY)
    said = ours.get("config") if isinstance(ours, Mapping) else content.get("train_args")
    if not isinstance(said, Mapping):
        return {}
    return {key: said[key] for key in ("imgsz", "seed") if isinstance(said.get(key), int)}
