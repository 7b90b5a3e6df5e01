"""Who renders training images, and where they lie meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hsrloop.config import Resolved, TrainConfig
from hsrloop.data.pixels.bank import BankPlace, Sources
from hsrloop.data.pixels.render_torch import gpu_bytes
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.errors import ConfigError, DeviceError
from hsrloop.events import Progress
from hsrloop.train import images
from hsrloop.train.images import render_place, train_images
from hsrloop.train.run import train
from tests.conftest import CardMemory
from tests.train.conftest import Recorder

GIB = 2**30


@pytest.mark.parametrize(
    ("settings", "kind", "gpu_gib", "place"),
    [
        ({}, "cpu", 0, "cv2"),
        ({}, "cuda", 8, "device"),
        ({}, "cuda", 1, "pinned"),
        ({}, "cuda", 0, "cv2"),
        ({"augment_device": "gpu"}, "cuda", 8, "device"),
        ({"augment_device": "cpu"}, "cuda", 8, "cv2"),
        ({"augment_device": "cpu"}, "cpu", 0, "cv2"),
        ({"cache": False}, "cuda", 8, "device"),
        ({"cache": False}, "cuda", 1, "cv2"),  # the images would have to lie in RAM
        ({"cache": "disk"}, "cuda", 1, "pinned"),
    ],
)
def test_the_gpu_renders_when_it_trains(
    tiny_dataset: Path, settings: dict[str, object], kind: str, gpu_gib: int, place: str
) -> None:
    config = TrainConfig.from_json({"imgsz": 64, **settings})
    sources = Sources(ImageStore(load_dataset(tiny_dataset).train, imgsz=64))
    found = render_place(
        config,
        kind,
        sources,
        scratch_bytes=GIB // 4,
        gpu_free_bytes=gpu_gib * GIB,
        ram_free_bytes=0 if config.cache == "disk" else GIB,
    )
    assert found == place


def test_a_gpu_asked_for_and_absent_is_an_error(tiny_dataset: Path) -> None:
    refs, device = load_dataset(tiny_dataset).train, torch.device("cpu")
    with pytest.raises(DeviceError, match="augment_device is gpu, but training runs on the CPU"):
        train_images(
            TrainConfig(augment_device="gpu"),
            refs,
            None,
            device,
            micro_batch=2,
            budget_bytes=GIB,
            emit=lambda event: None,
        )
    with pytest.raises(ConfigError, match="augment_device is cuda; it must be one of auto"):
        TrainConfig(augment_device="cuda")


def test_on_the_cpu_images_are_cached_and_nothing_is_said(tiny_dataset: Path) -> None:
    said: list[object] = []
    made = train_images(
        TrainConfig(imgsz=64),
        load_dataset(tiny_dataset).train,
        None,
        torch.device("cpu"),
        micro_batch=2,
        budget_bytes=GIB,
        emit=said.append,
    )
    assert made.renderer is None and made.store.cached_images == 8
    assert {type(event).__name__ for event in said} == {"Progress"}


@pytest.mark.parametrize(("cap_gib", "place"), [(80, "device"), (0.5, "pinned"), (0.1, "cv2")])
def test_images_lie_where_the_cap_leaves_room(
    tiny_dataset: Path,
    card_memory: CardMemory,
    monkeypatch: pytest.MonkeyPatch,
    cap_gib: float,
    place: str,
) -> None:
    """The card has 80 GiB; where the tiny set is to lie is found, and not acted upon."""
    card_memory.share = cap_gib / 80
    monkeypatch.setattr(Sources, "bytes", GIB // 8)
    monkeypatch.setattr(images, "_kernel", lambda device, emit: None)
    found = []

    def placed(*args: object, **kwargs: int) -> str:
        found.append(render_place(*args, **kwargs))
        return "cv2"

    monkeypatch.setattr(images, "render_place", placed)
    train_images(
        TrainConfig(imgsz=64),
        load_dataset(tiny_dataset).train,
        None,
        torch.device("cuda:0"),
        micro_batch=2,
        budget_bytes=GIB,
        emit=lambda event: None,
    )
    assert found == [place]


def test_a_kernel_needs_less_beside_the_images() -> None:
    whole, kernel = (gpu_bytes(640, 16, GIB // 4, kernel=one) for one in (False, True))
    assert kernel < whole - GIB // 32
    assert kernel > 3 * 16 * 3 * 640**2, "three batches"


@pytest.mark.parametrize("place", ["device", "pinned"])
def test_the_loop_does_not_care_who_renders(
    settings: Callable[..., Resolved],
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    place: BankPlace,
) -> None:
    """A run on the CPU that takes its device for a GPU with room; left half-way and resumed."""
    monkeypatch.setattr(images, "render_place", lambda *_, **__: place)
    whole = train(settings(epochs=2), sinks=[recorder])
    calls = iter([False, False, True])
    part = train(settings(epochs=2), stop=lambda: next(calls))
    train(settings(epochs=2), resume=part.run_dir / "weights" / "last.pt")
    losses = [
        (run.run_dir / "results.csv").read_text().splitlines()[2].split(",")[1:8]
        for run in (whole, part)
    ]
    assert losses[0] == losses[1]
    tasks = {event.task for event in recorder.of(Progress)}
    assert ("loading training images onto the GPU" in tasks) == (place == "device")
