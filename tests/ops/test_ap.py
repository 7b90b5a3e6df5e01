"""Average precision against the peer's, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils.metrics import ap_per_class, box_iou, compute_ap, smooth

from hsrloop.ops import matching
from hsrloop.ops.ap import Evaluator, average_precision
from hsrloop.ops.matching import IOUS, match
from hsrloop.ops.nms import Found


def images(count: int, nc: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return ground truth with shifted copies as detections, some missing, some invented."""
    g = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        m = 0 if i % 5 == 0 else int(torch.randint(1, 9, (), generator=g))
        low = 300 * torch.rand(m, 2, generator=g)
        truth = torch.cat((low, low + 20 + 80 * torch.rand(m, 2, generator=g)), 1)
        labels = torch.randint(0, nc, (m,), generator=g)
        pick = torch.randint(0, m, (3 * m,), generator=g) if m else torch.zeros(0).long()
        boxes = truth[pick] + 6 * torch.randn(len(pick), 4, generator=g)
        noise = 300 * torch.rand(4, 2, generator=g)
        boxes = torch.cat((boxes, torch.cat((noise, noise + 50), 1)))
        classes = torch.cat((labels[pick], torch.randint(0, nc + 2, (4,), generator=g)))
        conf = torch.rand(len(boxes), generator=g).sort(descending=True).values
        result.append((torch.cat((boxes, conf[:, None], classes[:, None]), 1), truth, labels))
    return result


def add(
    evaluator: Evaluator,
    *given: tuple[Tensor, Tensor, Tensor],
    places: list[int] | None = None,
) -> None:
    """Add images as one batch: detections, boxes and labels of each."""
    detections, boxes, labels = zip(*given, strict=True)
    index = torch.arange(len(given)).repeat_interleave(torch.tensor([len(c) for c in labels]))
    evaluator.add(
        Found.of(list(detections)), torch.cat(boxes), torch.cat(labels), index, places=places
    )


def as_bits(right: np.ndarray) -> np.ndarray:
    """Pack (n, 10) of what is right into numbers."""
    return (right << np.arange(10)).sum(1).astype(np.uint16)


def match_one(detections: Tensor, truth: Tensor, labels: Tensor) -> np.ndarray:
    return match(detections[None], truth[None], labels[None])[0].numpy()


def peer_match(detections: Tensor, truth: Tensor, labels: Tensor) -> np.ndarray:
    validator = BaseValidator.__new__(BaseValidator)
    validator.iouv = torch.linspace(0.5, 0.95, 10)
    if not len(truth) or not len(detections):
        return np.zeros((len(detections), 10), dtype=bool)
    iou = box_iou(truth, detections[:, :4])
    return validator.match_predictions(detections[:, 5], labels, iou).numpy()


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_the_peers(seed: int) -> None:
    nc = 1 + 3 * seed
    data = images(30, nc, seed)
    names = [f"c{i}" for i in range(nc + 2)]  # the last two are predicted, never labelled
    evaluator = Evaluator(names)
    for image in data:
        assert (match_one(*image) == peer_match(*image)).all()
    for start in range(0, len(data), 7):  # padded to different lengths
        add(evaluator, *data[start : start + 7])
    assert evaluator.settle() == []
    got = evaluator.compute()

    detections = torch.cat([d for d, _, _ in data]).numpy()
    right = np.concatenate([peer_match(*image) for image in data])
    labels = torch.cat([c for _, _, c in data]).numpy()
    result = ap_per_class(right, detections[:, 4], detections[:, 5], labels)
    p, r, ap, present, f1_curve, x = (result[i] for i in (2, 3, 5, 6, 9, 10))
    close = {"rel": 1e-6, "abs": 1e-9}
    assert [c.name for c in got.classes] == [names[i] for i in present]
    assert [c.ap50 for c in got.classes] == pytest.approx(ap[:, 0].tolist(), **close)
    assert [c.ap50_95 for c in got.classes] == pytest.approx(ap.mean(1).tolist(), **close)
    assert [c.precision for c in got.classes] == pytest.approx(p.tolist(), **close)
    assert [c.recall for c in got.classes] == pytest.approx(r.tolist(), **close)
    assert got.ap50 == pytest.approx(ap[:, 0].mean(), **close)
    assert got.ap50_95 == pytest.approx(ap.mean(), **close)
    assert (got.precision, got.recall) == pytest.approx((p.mean(), r.mean()), **close)
    assert got.best_conf == x[smooth(f1_curve.mean(0), 0.1).argmax()]
    assert [c.best_conf for c in got.classes] == [x[smooth(f, 0.1).argmax()] for f in f1_curve]
    assert [c.boxes for c in got.classes] == [int((labels == i).sum()) for i in present]
    per_image = [sum(int((c == i).any()) for _, _, c in data) for i in present]
    assert [c.images for c in got.classes] == per_image


BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def row(x2: float, conf: float, label: int = 0) -> list[float]:
    return [0.0, 0.0, x2, 10.0, conf, label]


def test_match_by_hand() -> None:
    # IoU 0.8 comes first and takes the box up to 0.8; the exact one gets it above
    detections = torch.tensor([row(8.0, 0.9), row(10.0, 0.8), row(10.0, 0.7, 1)])
    right = match_one(detections, BOX, torch.tensor([0]))
    reached = [i for i, t in enumerate(IOUS) if t <= 0.8 + 1e-9]
    assert right[0].nonzero()[0].tolist() in (reached, reached[:-1])  # 0.8 itself is rounding
    assert (right[1] == ~right[0]).all()
    assert not right[2].any()


def test_ap_by_hand() -> None:
    # two boxes; hits at ranks 1 and 3: precision 1 to recall 0.5, then 2/3 to recall 1;
    # at the next threshold one hit, at rank 2: precision 1/2 to recall 0.5; at the others none
    right = np.zeros((3, 10), dtype=bool)
    right[[0, 2], 0], right[1, 1] = True, True
    # read at 0, 0.01, ... 1 and joined by lines: 1 up to recall 0.49, 2/3 from 0.5 to 0.99, then 0;
    # 1/2 up to 0.49, then 0
    assert average_precision(as_bits(right), 2) == pytest.approx(
        [
            0.49 + 0.01 * (1 + 2 / 3) / 2 + 0.49 * 2 / 3 + 0.01 * (2 / 3) / 2,
            0.49 * 0.5 + 0.01 * 0.5 / 2,
            *[0.0] * 8,
        ]
    )
    assert average_precision(as_bits(np.ones((1, 10), dtype=bool)), 1) == pytest.approx(
        [0.995] * 10
    )
    assert (average_precision(as_bits(np.zeros((1, 10), dtype=bool)), 1) == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 400])
def test_ap_is_the_peers(count: int, share: float) -> None:
    rng = np.random.default_rng(count)
    right = rng.random((count, 10)) < share * np.linspace(1, 0.5, 10)
    boxes = max(1, int(right.sum(0).max()) + count % 3)
    found = average_precision(as_bits(right), boxes)
    for level, of in zip(found, right.T, strict=True):
        hits = of.cumsum()
        expected, _, _ = compute_ap(hits / (boxes + 1e-16), hits / np.arange(1, count + 1))
        assert level == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_perfect_detections_score_as_high_as_the_definition_allows() -> None:
    evaluator = Evaluator(["cup", "fork"])
    add(evaluator, (torch.tensor([row(10.0, 0.9)]), BOX, torch.tensor([0])))
    metrics = evaluator.compute()
    assert (metrics.ap50, metrics.ap50_95) == pytest.approx((0.995, 0.995))
    assert (metrics.precision, metrics.recall) == pytest.approx((1.0, 1.0))
    assert [c.name for c in metrics.classes] == ["cup"]


def test_no_ground_truth_is_all_zeros() -> None:
    evaluator = Evaluator(["cup"])
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert evaluator.compute().classes == ()
    add(evaluator, (torch.tensor([row(10.0, 0.9)]), *none))
    metrics = evaluator.compute()
    assert (metrics.ap50, metrics.ap50_95, metrics.precision, metrics.recall) == (0, 0, 0, 0)


def test_no_detections_is_zero_with_the_class_listed() -> None:
    evaluator = Evaluator(["cup"])
    add(evaluator, (torch.zeros(0, 6), BOX, torch.tensor([0])))
    metrics = evaluator.compute()
    assert metrics.ap50 == 0 and metrics.classes[0].boxes == 1


def test_images_that_are_not_settled_count_once_they_are_added_again() -> None:
    data = images(12, nc=3, seed=1)
    whole, in_two = Evaluator(["a", "b", "c", "d", "e"]), Evaluator(["a", "b", "c", "d", "e"])
    add(whole, *data)
    expected = whole.compute()
    detections, boxes, labels = zip(*data, strict=True)
    found = Found.of(list(detections))
    settled = torch.arange(12) % 5 != 2
    found = Found(torch.where(settled[:, None, None], found.rows, found.rows.flip(0)), settled)
    index = torch.arange(12).repeat_interleave(torch.tensor([len(c) for c in labels]))
    in_two.add(found, torch.cat(boxes), torch.cat(labels), index)
    again = in_two.settle()
    assert again == [2, 7]
    add(in_two, *(data[place] for place in again), places=again)
    assert in_two.compute() == expected


def test_of_equal_confidences_the_image_that_came_first_counts_first() -> None:
    right, wrong = row(10.0, 0.5), row(3.0, 0.5)
    scores = []
    for first, second in ((right, wrong), (wrong, right)):
        evaluator = Evaluator(["cup"])
        settled = torch.tensor([False, True])  # the first is looked at again
        found = Found(torch.tensor([[first], [second]]), settled)
        evaluator.add(found, BOX.repeat(2, 1), torch.tensor([0, 0]), torch.tensor([0, 1]))
        (place,) = evaluator.settle()
        add(evaluator, (torch.tensor([first]), BOX, torch.tensor([0])), places=[place])
        scores.append(evaluator.compute().ap50)
    assert scores[0] > scores[1]


def test_metrics_are_refused_while_an_image_is_not_settled() -> None:
    evaluator = Evaluator(["cup"])
    found = Found(torch.zeros(1, 3, 6), torch.zeros(1, dtype=torch.bool))
    evaluator.add(found, BOX, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(AssertionError, match="added again"):
        evaluator.compute()


def test_images_without_boxes_are_matched_in_groups_too() -> None:
    groups = matching._groups(np.zeros(matching._PAIRS // 100, dtype=np.int64), detections=300)
    assert all(300 * (g.stop - g.start) <= matching._PAIRS for g in groups)


@pytest.mark.parametrize("pairs", [1, 300, 1 << 20])
def test_the_size_of_groups_changes_nothing(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(30, nc=4, seed=2)
    whole, cut = (Evaluator([f"c{i}" for i in range(6)]) for _ in range(2))
    add(whole, *data)
    expected = whole.compute()
    monkeypatch.setattr(matching, "_PAIRS", pairs)
    add(cut, *data)
    assert cut.compute() == expected
