"""Kernels of assignment and loss, counted beside the peer's criterion by one watch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ultralytics.utils.loss import v8DetectionLoss

from hsrloop.bench.counting import DeviceWatch
from hsrloop.bench.criterion import CriterionInput, kernels_of, measure_criterion
from hsrloop.ops import assign, loss
from tests.ops.peer import scene

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work as on a GPU: into few pieces, since no cache is to be fitted."""
    monkeypatch.setattr(assign, "_limits", lambda device: assign._BLOCK_GPU)
    monkeypatch.setattr(loss, "_CHUNK_CPU", 1 << 40)


def peers_kernels(objects: int) -> int:
    """Count those of Ultralytics' criterion on one image of 640 px with 20 classes."""
    s = scene([objects], imgsz=640, nc=20, size=0.1)
    box, cls = s.box_logits.requires_grad_(), s.class_logits.requires_grad_()
    head, model = torch.nn.Module(), torch.nn.Module()
    head.nc, head.reg_max, head.stride = 20, 16, torch.tensor([8.0, 16.0, 32.0])
    model.weight = torch.nn.Parameter(torch.zeros(1))
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    model.model = torch.nn.ModuleList([head])
    feats = [torch.zeros(1, 1, *shape) for shape in s.shapes]
    batch = {"batch_idx": s.image.float(), "cls": s.labels.float(), "bboxes": s.boxes}
    criterion = v8DetectionLoss(model)
    here = [box, cls, *feats, head.stride, criterion.proj, *batch.values()]
    with DeviceWatch(CPU, here) as watch:
        total, _ = criterion({"boxes": box, "scores": cls, "feats": feats}, batch)
        total.sum().backward()
    assert sum(watch.waits.values()) >= 5, "it waits for the device as well"
    return sum(watch.kernels.values())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_criterion_needs_half_the_kernels_of_the_peers_and_hardly_more_in_a_crowd() -> None:
    counts = {n: kernels_of(CriterionInput.of_noise(CPU, images=1, objects=n)) for n in (10, 300)}
    assert 2 * counts[10] <= peers_kernels(10)
    assert counts[300] <= 1.5 * counts[10]


def test_it_is_measured_by_the_image() -> None:
    rows = measure_criterion(CPU, rounds=1, seconds=0.001, images=2, imgsz=64, objects=(2, 5))
    assert [row.name for row in rows] == [f"criterion, {n} objects an image" for n in (2, 5)]
    assert all(row.images_per_s is not None and "kernels" in row.note for row in rows)
