"""Networks and checkpoint files for the tests of hsrloop.model."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from hsrloop.model import published, yolo

NAMES = ("mug", "bowl", "spoon")


def scrambled(module: nn.Module, seed: int = 1) -> nn.Module:
    """Give BatchNorm and outputs values that no initialisation has, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and "dfl" not in name and value.ndim == 1:
            value.add_(torch.rand(value.shape, generator=generator) * 0.5)
    return module


def checkpoint(module: nn.Module, names: tuple[str, ...] = NAMES, **extra: object) -> dict:
    """Return what hsrloop saves for a module."""
    config = {"model": "yolov8n.pt", "epochs": 2, "imgsz": 64, "dataset": "data.yaml"}
    return published.to_ultralytics_checkpoint(
        published.half_network(module, names=names, config=config),
        config=config,
        metrics={"mAP50": 0.5},
        epoch=2,
        extra=extra,
    )


@pytest.fixture(scope="session")
def nano() -> nn.Module:
    """Return a YOLOv8n of three classes; tests must not change it."""
    return scrambled(yolo.build("yolov8n.yaml", names=NAMES, seed=0))


@pytest.fixture(scope="session")
def nano_file(nano: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of `nano` as hsrloop writes it."""
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    torch.save(checkpoint(nano), path)
    return path


@contextmanager
def flat_pickles(module: nn.Module) -> Iterator[None]:
    """Let classes of the network pickle as Ultralytics 8.0 did: all in one flat module."""
    kinds = {type(m) for m in module.modules() if type(m).__module__.startswith("ultralytics.nn.m")}
    origins = {kind: kind.__module__ for kind in kinds}
    try:
        for kind in kinds:
            kind.__module__ = "ultralytics.nn.modules"
        yield
    finally:
        for kind, origin in origins.items():
            kind.__module__ = origin


@pytest.fixture
def old_settings_class() -> Iterator[Callable[[], object]]:
    """Give a class pickled as ultralytics.yolo.utils.IterableSimpleNamespace, which is gone now."""
    kind = type("IterableSimpleNamespace", (types.SimpleNamespace,), {})
    kind.__module__ = "ultralytics.yolo.utils"
    ghosts = {"ultralytics.yolo": types.ModuleType("ultralytics.yolo")}
    ghosts["ultralytics.yolo.utils"] = types.ModuleType("ultralytics.yolo.utils")
    ghosts["ultralytics.yolo.utils"].IterableSimpleNamespace = kind  # type: ignore[attr-defined]
    sys.modules.update(ghosts)
    yield kind
    for name in ghosts:
        del sys.modules[name]
