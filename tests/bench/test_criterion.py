"""Kernels of assignment and loss, counted beside the peer's criterion by one watch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hsrloop.bench import criterion
from hsrloop.bench.criterion import (
    CriterionInput,
    PeersCriterion,
    kernels_of,
    measure_criterion,
    watched,
)
from hsrloop.ops import loss
from hsrloop.ops.loss_gpu import SOURCE
from tests.kernels import host_kernels

CPU = torch.device("cpu")


def of_noise(objects: int) -> CriterionInput:
    """Return one image of 640 px with 20 classes."""
    return CriterionInput.of_noise(CPU, images=1, objects=objects)


def test_the_criterion_needs_half_the_kernels_of_the_peers_and_hardly_more_in_a_crowd() -> None:
    counts = {n: kernels_of(of_noise(n)) for n in (10, 300)}
    peers = watched(PeersCriterion(of_noise(10)))
    assert 2 * counts[10] <= sum(peers.kernels.values())
    assert counts[300] <= 1.5 * counts[10]
    assert sum(peers.waits.values()) >= 5, "the peer's waits for the device as well"
    ours = watched(of_noise(10))
    assert not ours.waits and not ours.mixed


def test_by_kernels_of_its_own_it_takes_few_launches_however_many_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = host_kernels(SOURCE, tmp_path, together={"search": 1})
    for module in (criterion, loss):
        monkeypatch.setattr(module, "loss_kernels", lambda device: kernels)
    counts = []
    for objects in (10, 300):
        watch = watched(of_noise(objects))
        assert not watch.waits and not watch.mixed and not watch.sent
        started = sum(kernel.calls for kernel in kernels.values())
        counts.append(sum(watch.kernels.values()) + started - 7 * len(counts))
    assert started == 14
    assert counts == [14 + 7] * 2
    assert 2 * max(counts) <= 421, "kernels of Ultralytics' criterion on a GPU"


class _Calls(TorchDispatchMode):
    """Counts operators that compute something, whatever way they are part of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_on_the_cpu_too_it_makes_half_the_calls_of_the_peer_however_many_objects() -> None:
    counts = []
    for objects in (10, 300):
        given = CriterionInput.of_noise(CPU, images=8, objects=objects, imgsz=320, classes=80)
        for work in (given, PeersCriterion(given)):
            with _Calls() as calls:
                work.run()
            counts.append(calls.count)
    few, peers, many, _ = counts
    assert 2 * few <= peers and many == few


@pytest.mark.parametrize("objects", [3, 60])
def test_both_measure_the_same_loss(objects: int) -> None:
    given = of_noise(objects)
    assert given.run().item() == pytest.approx(PeersCriterion(given).run().item(), rel=1e-5)


def test_it_is_measured_by_the_image() -> None:
    rows = measure_criterion(CPU, rounds=1, seconds=0.001, images=2, imgsz=64, objects=(2, 5))
    whose = ("criterion", "Ultralytics' criterion")
    assert [row.name for row in rows] == [
        f"{w}, {n} objects an image" for n in (2, 5) for w in whose
    ]
    assert all(row.images_per_s is not None and "kernels" in row.note for row in rows)


def test_without_ultralytics_its_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion.importlib.util, "find_spec", lambda name: None)
    rows = measure_criterion(CPU, rounds=1, seconds=0.001, images=1, imgsz=64, objects=(2,))
    assert [row.note for row in rows][1:] == ["skipped: ultralytics is not installed"]
