"""The CPU's loop and the GPU's kernels give the same points to the same boxes."""

from __future__ import annotations

import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hsrloop.ops import assign as assign_module
from hsrloop.ops import assign_cpu
from hsrloop.ops.anchors import anchor_table
from hsrloop.ops.assign import TOPK, Assignment, assign
from hsrloop.ops.boxes import Columns
from hsrloop.ops.loss import _decoded_columns, pad_targets
from hsrloop.ops.paths import as_on_a_gpu
from tests.ops.peer import STRIDES, Scene, scene


def assigned(s: Scene) -> Assignment:
    cells = anchor_table(s.shapes, STRIDES, device="cpu", dtype=s.box_logits.dtype)
    boxes = _decoded_columns(s.box_logits, cells, reg_max=16)
    targets = pad_targets(s.boxes, s.labels, s.image, images=len(s.box_logits), imgsz=s.imgsz)
    return assign(boxes, s.class_logits, targets)


def used(a: Assignment) -> tuple[Tensor, Tensor]:
    """Return (image, anchor, box, logit) of the slots in use, in order, and their weights."""
    rows = torch.stack((a.image, a.anchor, a.box, a.logit))[:, a.weight > 0]
    order = (rows[0] * 10**6 + rows[1]).argsort()
    return rows[:, order], a.weight[a.weight > 0][order]


def assert_same(s: Scene) -> int:
    ours, weights = used(assigned(s))
    with as_on_a_gpu():
        theirs, expected = used(assigned(s))
    assert torch.equal(ours, theirs)
    # A weight is an overlap to the power of six, and each way rounds it in its own.
    torch.testing.assert_close(weights, expected, rtol=5e-6, atol=1e-12)
    return ours.shape[1]


@pytest.mark.parametrize("size", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("seed", range(8))
def test_both_ways_choose_the_same_points(size: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 60, (4,), generator=g).tolist()
    assert assert_same(scene(counts, size=size, imgsz=320, nc=1 + 7 * seed, seed=seed)) > 10


@pytest.mark.parametrize("shift", [-30.0, 20.0])
def test_scores_may_be_nearly_0_and_nearly_1(shift: float) -> None:
    s = scene([30, 40], size=0.3, imgsz=320, seed=9)
    assert assert_same(replace(s, class_logits=s.class_logits + shift)) > 50


def test_a_score_of_0_wants_nothing() -> None:
    s = scene([30, 40], size=0.3, imgsz=320, seed=9)
    assert assert_same(replace(s, class_logits=s.class_logits - 200)) == 0


def test_nothing_to_assign() -> None:
    assert assert_same(scene([0, 0])) == 0


def test_equal_boxes_are_told_apart_by_their_place() -> None:
    s = scene([6], seed=21)
    assert assert_same(replace(s, boxes=s.boxes[[0, 1, 0, 2, 1, 0]])) > 10


def test_half_precision_scores_go_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scene([20, 20], seed=3)
    halved = replace(s, class_logits=s.class_logits.half())
    assert assert_same(halved) > 50
    monkeypatch.setattr(assign_module, "_candidates", None)
    assigned(halved)  # by the loop, then


def test_a_single_class_may_lie_scattered_in_memory() -> None:
    s = scene([5, 5], nc=1, seed=4)
    wide = torch.zeros(2, s.class_logits.shape[2], 65)
    wide[..., 64] = s.class_logits[:, 0]
    assert assert_same(replace(s, class_logits=wide.transpose(1, 2)[:, 64:])) > 10


@pytest.mark.parametrize("way", ["CPU's", "GPU's"])
def test_targets_of_other_predictions_are_refused(way: str) -> None:
    small, large = scene([3, 3], seed=6), scene([3, 3], imgsz=320, seed=6)
    targets = pad_targets(large.boxes, large.labels, large.image, images=2, imgsz=320)
    more = pad_targets(small.boxes, small.labels, small.image, images=4, imgsz=160)
    with as_on_a_gpu() if way == "GPU's" else nullcontext():
        for wrong in (targets, more):
            with pytest.raises(ValueError, match="points each, the predictions of 2"):
                assign(torch.zeros(4, 2, 525), small.class_logits, wrong)


@pytest.mark.parametrize("label", [-1, 5, 10**7])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    s = scene([3, 3], nc=5, seed=6)
    s.labels[4] = label
    with pytest.raises(ValueError, match="none of 5 classes"):
        assigned(s)


@pytest.mark.parametrize("near", [0.02, 0.3, 3.0])
def test_the_loop_scores_as_closely_as_operators_do(near: float) -> None:
    """Both are held to float64, of boxes that overlap by much, by little and not at all."""
    g = torch.Generator().manual_seed(5)
    images, anchors, places, classes = 3, 500, 40, 7
    low = 100 * torch.rand(2, images * places, generator=g)
    truth = torch.cat((low, low + 5 + 60 * torch.rand(2, images * places, generator=g)))
    point = torch.randperm(images * anchors, generator=g)[:900].sort().values
    box = torch.randint(0, places, (900,), generator=g) + point // anchors * places
    size = (truth[2:] - truth[:2])[:, box].repeat(2, 1)
    predicted = 50 * torch.rand(4, images * anchors, generator=g).sort(0).values
    predicted[:, point] = truth[:, box] + near * size * torch.randn(4, 900, generator=g)
    predicted[2:] = torch.maximum(predicted[2:], predicted[:2])
    logits = 4 * torch.randn(images * classes * anchors, generator=g)
    labels = torch.randint(0, classes, (images * places,), generator=g)

    def by_operators(kind: torch.dtype) -> list[Tensor]:
        own = [Columns.of(t.to(kind)) for t in (predicted, truth)]
        scene = assign_module._Scene(
            own[0], logits.to(kind), own[1], labels, images, classes, anchors, places
        )
        used = torch.ones(900, dtype=torch.bool)
        found = assign_module._scored(scene, point // anchors, point % anchors, box, used)
        return [found.ciou, found.slope, found.weight]

    exact, rounded = by_operators(torch.float64), by_operators(torch.float32)
    found = assign_cpu.scored_pairs(
        Columns.of(predicted).table.numpy(),
        logits.numpy(),
        Columns.of(truth).table.numpy(),
        *(t.numpy() for t in (labels, point // anchors, point % anchors, box % places)),
        images=images,
        threads=1,
    )
    for ours, theirs, true in zip(map(torch.from_numpy, found), rounded, exact, strict=True):
        wrong, allowed = (ours - true).norm(), (theirs - true).norm()
        assert wrong < 1.5 * allowed and allowed < 1e-5 * true.norm()


def test_memory_of_the_loop_grows_with_boxes_and_with_points_but_not_with_their_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted in Python, where NumPy's memory is seen, with loops that are not compiled."""
    monkeypatch.setattr(assign_cpu, "search", assign_cpu._search)
    most = {}
    for boxes in (1, 20, 400):  # the first compiles what the loop calls
        s = scene([boxes], size=0.01, imgsz=320, seed=2)
        targets = pad_targets(s.boxes, s.labels, s.image, images=1, imgsz=320)
        points = s.class_logits.shape[2]
        predicted = Columns.of(torch.rand(4, points)).table.numpy()
        given = (predicted, s.class_logits.reshape(-1).numpy(), targets.table.numpy())
        tracemalloc.start()
        assign_cpu.settled_pairs(
            *given,
            targets.segments.table.numpy(),
            images=1,
            topk=TOPK,
            threads=1,
        )
        most[boxes] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most[400] - most[20] < 380 * 500, "bytes a box"
    assert most[20] < 100 * points, most


@pytest.mark.parametrize("counts", [[40, 0, 25, 3, 60], [0, 0, 50], [7]])
def test_threads_share_the_images_and_change_nothing(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = scene(counts, imgsz=320, nc=5, seed=7)
    looked: list[tuple[int, ...]] = []
    search = assign_cpu.search

    def spy(*args: Any) -> None:
        looked.append(tuple(args[4][1:].tolist()))
        search(*args)

    alone = assigned(s)
    monkeypatch.setattr(assign_cpu, "search", spy)
    monkeypatch.setattr(assign_cpu, "_PAIRS_OF_A_THREAD", 1)
    for threads in (1, 2, 4, 64):
        looked.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        shared = assigned(s)
        assert len(looked) == min(threads, len(counts))
        assert [i for part in sorted(looked) for i in range(*part)] == list(range(len(counts)))
        assert torch.equal(shared.anchor, alone.anchor) and torch.equal(shared.box, alone.box)
