"""Candidates and suppression by kernels: what torch's operators find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hsrloop.ops import detections, nms
from hsrloop.ops.detections import detect_kernels, detections_ahead
from hsrloop.ops.nms import Found
from hsrloop.ops.targets import STRIDES
from hsrloop.records import LevelLogits
from tests.kernels import DEVICES, HostKernel, host_kernels

Kernels = Mapping[str, Callable[..., None]]
CPU = torch.device("cpu")
SIDES = (10, 5, 3)  # 134 anchors, an odd number in the last two
KINDS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostKernel]:
    together = {"candidates": None, "suppress": None}
    return host_kernels(detections.SOURCE, tmp_path_factory.mktemp("kernels"), together=together)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of threads that run at the same time, on the host."""
    monkeypatch.setattr(detections, "_THREADS", 6)


def kernels_on(device: str, host: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The host's with small blocks, a GPU's as they are."""
    if device == "cpu":
        monkeypatch.setattr(detections, "_THREADS", 6)
        return host
    found = detect_kernels(torch.device("cuda", 0))
    assert found is not None
    return found


def head_of(
    classes: int,
    *,
    shift: float,
    images: int = 3,
    kind: torch.dtype = torch.float32,
    sides: Sequence[int] = SIDES,
) -> LevelLogits:
    """Return logits of which few are close to each other."""
    g = torch.Generator().manual_seed(0)

    def noise(channels: int, side: int) -> Tensor:
        numbers = (2 * torch.randn(images, channels, side, side, generator=g)).bfloat16()
        return numbers.to(kind).contiguous(memory_format=torch.channels_last)

    boxes = [noise(64, side) for side in sides]
    return LevelLogits(boxes, [noise(classes, side) + shift for side in sides])


def on(device: str, levels: LevelLogits) -> LevelLogits:
    return LevelLogits(*([t.to(device) for t in kind] for kind in (levels.boxes, levels.classes)))


def assert_same(found: Found, expected: Found, *, settled: list[bool] | None = None) -> None:
    assert found.rows.shape == expected.rows.shape
    assert torch.equal(found.settled, expected.settled)
    assert settled is None or found.settled.tolist() == settled
    ours, theirs = (f.rows[f.settled] for f in (found, expected))
    torch.testing.assert_close(ours[..., :4], theirs[..., :4], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours[..., 4:], theirs[..., 4:], rtol=1e-6, atol=0)


def both(
    kernels: Kernels, levels: LevelLogits, device: str = "cpu", **more: Any
) -> tuple[Found, Found]:
    given = on(device, levels)
    found = detections_ahead(given, STRIDES, kernels=kernels, **more)
    return found, detections_ahead(given, STRIDES, kernels=None, **more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "shift"), [(1, 0.0), (5, -4.0), (20, -9.0)])
@pytest.mark.parametrize("tried", [60, 900])
def test_they_find_what_operators_find(
    tried: int,
    classes: int,
    shift: float,
    kind: torch.dtype,
    device: str,
    host: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = head_of(classes, shift=shift, kind=kind)
    kernels = kernels_on(device, host, monkeypatch)
    found, expected = both(kernels, levels, device, candidates=tried, max_det=40, rounds=900)
    assert_same(found, expected)
    assert bool(found.settled.any()) and bool((found.rows[..., 4] > 0).any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [-6.0, -13.0])
def test_more_logits_than_a_block_reads_at_a_time(
    shift: float, device: str, host: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = head_of(20, shift=shift, images=2, kind=torch.float16, sides=(80, 40, 20))
    found, expected = both(kernels_on(device, host, monkeypatch), levels, device, rounds=900)
    assert_same(found, expected, settled=[True, True])


@pytest.mark.parametrize("levels", [2, 40])
def test_equal_scores_come_in_the_order_of_their_places(
    levels: int, host: Kernels, small_blocks: None
) -> None:
    given = head_of(4, shift=0.0)
    few = [(x * levels / 8).round() * 8 / levels for x in given.classes]
    found, expected = both(host, LevelLogits(given.boxes, few), candidates=600)
    assert_same(found, expected, settled=[True] * 3)
    scores = found.rows[0, :, 4]
    assert len(set(scores.tolist())) < 0.8 * len(scores)


def test_an_image_is_not_settled_while_as_good_candidates_are_missing(
    host: Kernels, small_blocks: None
) -> None:
    given = head_of(1, shift=0.0)
    far = [torch.full_like(x, -20.0) for x in given.classes]
    for image, better in enumerate((0, 30, 60)):  # of the first level's cells, the others alike
        far[0][image] = 0.5
        far[0][image].view(-1)[:better] = 1.0
    # Boxes of a cell each: nobody overlaps.
    boxes = [torch.zeros_like(x) for x in given.boxes]
    for x in boxes:
        x[:, ::16] = 30.0
    found, expected = both(
        host, LevelLogits(boxes, [x.clone(memory_format=torch.preserve_format) for x in far]),
        candidates=70, max_det=40,
    )  # fmt: skip
    assert_same(found, expected, settled=[False, False, True])


def test_of_nothing_and_of_what_is_no_number_nothing_is_found(
    host: Kernels, small_blocks: None
) -> None:
    levels = head_of(3, shift=-30.0)
    levels.classes[1][0, 1, 2, 2] = float("nan")
    levels.classes[1][1, 1, 2, 2] = float("inf")
    found, expected = both(host, levels, candidates=50)
    assert_same(found, expected, settled=[True] * 3)
    assert (found.rows[..., 4] > 0).sum(1).tolist() == [0, 1, 0]
    assert found.rows[1, 0, 4:].tolist() == [1, 1]


def test_confidence_and_overlap_are_asked_for(host: Kernels, small_blocks: None) -> None:
    levels = head_of(2, shift=0.0)
    for more in ({"conf": 0.5}, {"conf": 0.9}, {"iou": 0.1}, {"iou": 0.95}):
        found, expected = both(host, levels, candidates=300, **more)
        assert_same(found, expected)


@pytest.mark.parametrize("enough", [1, 20, 300])
@pytest.mark.parametrize(("rows", "spread"), [(1, 9.0), (150, 20.0), (600, 90.0)])
def test_suppression_keeps_what_rounds_keep(
    rows: int, spread: float, enough: int, host: Kernels
) -> None:
    g = torch.Generator().manual_seed(rows)
    low = spread * torch.rand(6, rows, 2, generator=g)
    boxes = torch.cat((low, low + 30 * torch.rand(6, rows, 2, generator=g)), 2)
    boxes[:, 5::7] = boxes[:, 4:-1:7][:, : boxes[:, 5::7].shape[1]]  # some alike
    boxes[:, 6::11, 2:] = boxes[:, 6::11, :2]  # some without area
    counts = torch.randint(0, rows + 1, (6,), generator=g, dtype=torch.int32)
    kept, decided = nms._survivors(boxes, torch.arange(rows) < counts[:, None], 0.45, rows + 1)
    assert bool(decided.all())
    given = torch.cat((boxes, torch.linspace(1, 0.5, rows).expand(6, -1)[..., None]), 2)
    given = torch.cat((given, torch.zeros(6, rows, 1)), 2)
    found, settled = torch.full((6, enough, 6), -1.0), torch.zeros(6, dtype=torch.bool)
    host["suppress"](
        (6, 1, 1), (5, 1, 1), CPU, given, counts, found, settled, rows, enough, 0.45, 7680.0
    )
    assert bool(settled.all())
    for own, among, which in zip(found, given, kept, strict=True):
        first = among[which][:enough]
        assert torch.equal(own[: len(first)], first) and not own[len(first) :].any()


def test_a_batch_takes_two_launches(host: dict[str, HostKernel], small_blocks: None) -> None:
    before = {name: kernel.calls for name, kernel in host.items()}
    detections_ahead(head_of(3, shift=0.0), STRIDES, kernels=host)
    assert {name: kernel.calls - before[name] for name, kernel in host.items()} == {
        "candidates": 1,
        "suppress": 1,
    }


def test_what_they_cannot_take_goes_the_other_way(
    host: dict[str, HostKernel], caplog: pytest.LogCaptureFixture
) -> None:
    detections._say_otherwise.cache_clear()
    levels = head_of(3, shift=0.0)
    before = host["candidates"].calls
    planes = LevelLogits([x.contiguous() for x in levels.boxes], levels.classes)
    mixed = LevelLogits([x.double() for x in levels.boxes], levels.classes)
    many = LevelLogits([*levels.boxes] * 2, [*levels.classes] * 2)
    for given, strides in ((planes, STRIDES), (mixed, STRIDES), (many, STRIDES * 2)):
        assert detections_ahead(given, strides, kernels=host).rows.shape == (3, 300, 6)
    detections_ahead(levels, STRIDES, kernels=host, candidates=5000)
    detections_ahead(head_of(3, shift=0.0, images=0), STRIDES, kernels=host)
    assert host["candidates"].calls == before
    assert caplog.text.count("detect.cu is not used") == 1


@pytest.mark.parametrize("name", ["candidates", "suppress"])
@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_they_are_proved_before_they_are_used(
    error: float, name: str, host: dict[str, HostKernel], small_blocks: None
) -> None:
    def wrong(*args: Any) -> None:
        host[name](*args)
        rows = next(a for a in args[::-1] if isinstance(a, Tensor) and a.dtype == torch.float32)
        rows[1, 3, 0] += error

    assert not detections._proves({**host, name: wrong}, CPU)


def test_what_is_right_is_proved(host: dict[str, HostKernel], small_blocks: None) -> None:
    assert detections._proves(host, CPU)


@pytest.mark.parametrize("said", [False, True])
def test_it_is_proved_that_they_know_what_is_settled(
    said: bool, host: dict[str, HostKernel], small_blocks: None
) -> None:
    def suppress(*args: Any) -> None:
        host["suppress"](*args)
        args[6].fill_(said)

    assert not detections._proves({**host, "suppress": suppress}, CPU)
