"""The loss against the peer's, its gradients, its invariants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hsrloop.ops import assign as assign_module
from hsrloop.ops.loss import GAINS, LossSums, detection_loss, pad_targets, sparse_bce_sum
from hsrloop.ops.paths import as_on_a_gpu
from hsrloop.records import RawPredictions
from tests.ops.peer import STRIDES, Scene, ours, peers, scene

CASES = {
    "no boxes at all": scene([0, 0]),
    "one box": scene([1], seed=1),
    "images without boxes": scene([0, 7, 0, 3, 0], seed=2),
    "tiny": scene([20, 20], size=0.015, seed=3),
    "large and overlapping": scene([25, 25], size=0.6, seed=4),
    "tiny at 320": scene([30, 5], size=0.01, imgsz=320, nc=80, seed=5),
    "one class": scene([12, 12], nc=1, seed=6),
    "320": scene([3, 40, 11], imgsz=320, nc=80, seed=7),
    "640": scene([10, 25], imgsz=640, nc=20, seed=8),
    "300 boxes": scene([300, 2], imgsz=320, nc=30, size=0.08, seed=9),
    "64 px": scene([4, 4], imgsz=64, seed=11),
}


@pytest.fixture(params=["CPU's way", "GPU's way"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of this for both ways that assignment and loss can go."""
    with as_on_a_gpu() if request.param == "GPU's way" else nullcontext():
        yield


def terms(sums: LossSums) -> Tensor:
    raw = torch.stack((GAINS.box * sums.box, GAINS.cls * sums.cls, GAINS.dfl * sums.dfl))
    return raw.detach() / sums.target_scores.clamp(min=1)


def assert_parity(s: Scene, *, settle_zeros: bool = False) -> None:
    sums, box_grad, class_grad = ours(s)
    expected, expected_box, expected_class = peers(s, settle_zeros=settle_zeros)
    torch.testing.assert_close(terms(sums).float(), expected.float(), rtol=1e-5, atol=1e-7)
    for mine, other in ((box_grad, expected_box), (class_grad, expected_class)):
        assert (mine - other).norm() <= 1e-5 * other.norm() + 1e-9


@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_equal_the_peers(name: str) -> None:
    assert_parity(CASES[name])


@pytest.mark.parametrize("seed", range(20))
def test_parity_on_many_random_batches(seed: int) -> None:
    g = torch.Generator().manual_seed(1000 + seed)
    counts = torch.randint(0, 25, (3,), generator=g).tolist()
    size = 0.02 + 0.5 * float(torch.rand((), generator=g))
    assert_parity(scene(counts, size=size, nc=1 + seed, seed=seed))


def test_parity_when_predictions_are_good() -> None:
    s = scene([8, 8], imgsz=320, nc=4, seed=20)
    for _ in range(30):  # descend: overlaps and scores rise, boxes compete
        _, box_grad, class_grad = ours(s)
        s = dataclasses.replace(
            s,
            box_logits=s.box_logits - 200 * box_grad,
            class_logits=s.class_logits - 20 * class_grad,
        )
    assert ours(s)[0].target_scores > 20
    assert_parity(s)


def test_duplicate_boxes_go_to_the_first_as_in_the_peer() -> None:
    s = scene([6], seed=21)
    s = dataclasses.replace(s, boxes=s.boxes[[0, 1, 0, 2, 1, 0]])
    assert_parity(s)


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    s = CASES["320"]
    whole = ours(s)
    for pairs in (1, 300, 1 << 30):
        monkeypatch.setattr(assign_module, "_BLOCK", pairs)
        for mine, other in zip(ours(s)[1:], whole[1:], strict=True):
            torch.testing.assert_close(mine, other)


def test_blocks_cover_every_segment_once() -> None:
    cells = (900, 850, 400, 50, 12, 3, 1)
    blocks = list(assign_module._blocks(cells, 1000))
    assert [i for block, _ in blocks for i in range(block.start, block.stop)] == list(range(7))
    for block, longest in blocks:
        rows = block.stop - block.start
        assert longest == max(cells[block.start], 10)
        assert rows == 1 or rows * longest <= 1000


def test_sums_add_up_over_images() -> None:
    s = scene([3, 0, 9, 2], seed=12, dtype=torch.float64)
    whole, first, second = ours(s)[0], ours(s.part(0, 2))[0], ours(s.part(2, 4))[0]
    for field in ("box", "cls", "dfl", "target_scores"):
        total = getattr(first, field) + getattr(second, field)
        torch.testing.assert_close(total, getattr(whole, field), rtol=1e-12, atol=0)


def test_float64_stays_float64_and_half_becomes_float32() -> None:
    s = scene([4, 4], seed=13, dtype=torch.float64)
    exact, box_grad, _ = ours(s)
    assert exact.cls.dtype == box_grad.dtype == torch.float64
    halved = dataclasses.replace(
        s, box_logits=s.box_logits.half(), class_logits=s.class_logits.half()
    )
    rough, box_grad, class_grad = ours(halved)
    assert rough.cls.dtype == rough.box.dtype == rough.target_scores.dtype == torch.float32
    assert box_grad.dtype == class_grad.dtype == torch.float16
    torch.testing.assert_close(rough.cls.double(), exact.cls, rtol=1e-3, atol=0)


def test_autocast_changes_nothing() -> None:
    s = scene([4, 4], seed=14)
    plain = ours(s)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ours(s)[0]
    assert all(torch.equal(getattr(plain, f), getattr(cast, f)) for f in ("box", "cls", "dfl"))


GOLDEN = [9.03089656585868, 1457.6833959319015, 36.628316351503734, 11.8045236223231]


def test_golden_sums() -> None:
    """Frozen values: a change of the loss shows here even where no peer is installed."""
    s = scene([5, 0, 12], seed=15, dtype=torch.float64)
    sums = ours(s)[0]
    got = torch.stack((sums.box, sums.cls, sums.dfl, sums.target_scores)).tolist()
    assert got == pytest.approx(GOLDEN, rel=1e-6)


def test_no_boxes_gives_background_only_and_zero_gradient_to_boxes() -> None:
    s = scene([0, 0], seed=16)
    sums, box_grad, class_grad = ours(s)
    assert not sums.box.any() and not sums.dfl.any() and not sums.target_scores.any()
    assert not box_grad.any()
    torch.testing.assert_close(class_grad, 0.5 * s.class_logits.sigmoid())


def test_targets_of_another_size_are_refused() -> None:
    s = scene([1], imgsz=160)
    targets = pad_targets(s.boxes, s.labels, s.image, images=1, imgsz=192)
    with pytest.raises(ValueError, match="call pad_targets with the imgsz"):
        detection_loss(RawPredictions(s.box_logits, s.class_logits, s.shapes), STRIDES, targets)


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in {
            "_local_scalar_dense", "item", "nonzero", "masked_select", "unique_dim", "_unique2",
            "repeat_interleave", "bincount", "is_nonzero", "equal",
        }, name  # fmt: skip
        if name in {"index", "index_put", "index_put_", "_index_put_impl_"}:
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype not in (torch.bool, torch.uint8) for i in indices), name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    s = scene([3, 0, 40], seed=17)
    targets = pad_targets(s.boxes, s.labels, s.image, images=3, imgsz=s.imgsz)
    box, cls = s.box_logits.clone().requires_grad_(), s.class_logits.clone().requires_grad_()
    with _NoWaiting():
        sums = detection_loss(RawPredictions(box, cls, s.shapes), STRIDES, targets)
        GAINS.weigh(sums).backward()


def test_pad_targets_places_boxes_and_counts_cells() -> None:
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.5, 0.5]])
    t = pad_targets(boxes, torch.tensor([2, 0, 1]), torch.tensor([0, 2, 2]), images=3, imgsz=64)
    assert t.table.shape == (6, 3 * 2)
    assert t.segments is not None
    assert t.segments.rows.tolist() == [0, 4, 5]
    assert t.labels.tolist() == [[2, -1], [-1, -1], [0, 1]]
    assert t.table[:5, 0].tolist() == [0, 0, 64, 64, 64 * 64]
    assert t.table[:, 1].tolist() == [0] * 6, "padding"
    # whole image: 64 + 16 + 4 cells; a point, enlarged to 16 px: 4 + 0 + 0; a quarter: 16 + 4 + 1
    assert t.segments.cells == (64, 16, 16, 4, 4, 4, 1)


def test_sparse_bce_equals_dense_and_passes_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(2, 3, 5, generator=g, dtype=torch.float64)).requires_grad_()
    index, target = torch.tensor([0, 7, 7, 29]), torch.tensor([0.5, 0.25, 0.5, 1.0]).double()
    dense = torch.zeros(30, dtype=torch.float64).index_add_(0, index, target).view_as(x)
    expected = F.binary_cross_entropy_with_logits(x, dense, reduction="sum")
    torch.testing.assert_close(sparse_bce_sum(x, index, target), expected)
    assert torch.autograd.gradcheck(lambda v: sparse_bce_sum(v, index, target), (x,))


def test_sparse_bce_keeps_precision_of_confident_background() -> None:
    x = torch.full((1, 4, 70000), -11.0)
    none = torch.zeros(0, dtype=torch.int64)
    got = sparse_bce_sum(x, none, torch.zeros(0))
    torch.testing.assert_close(got.double(), F.softplus(x.double()).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_crowds_and_more_slots_than_anchor_points(seed: int) -> None:
    """Where the peer's choice among points of metric 0 is arbitrary, ours takes none of them."""
    assert_parity(scene([150, 20], imgsz=96, nc=3, size=0.3, seed=seed), settle_zeros=True)
    assert_parity(scene([150], imgsz=64, nc=3, size=0.3, seed=seed), settle_zeros=True)
