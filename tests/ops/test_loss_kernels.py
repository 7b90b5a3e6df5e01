"""The loss as `loss.cu` computes it is the loss; compiled for the host, threads and all."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hsrloop.ops import loss as loss_module
from hsrloop.ops import loss_gpu
from hsrloop.ops.loss import GAINS, detection_loss, pad_targets
from hsrloop.ops.loss_gpu import SOURCE, kernel_loss
from hsrloop.ops.nvrtc import compile_source, kernel_names
from hsrloop.records import RawPredictions
from tests.kernels import DEVICES, host_kernels
from tests.ops.peer import STRIDES, Scene, ours, scene
from tests.ops.test_loss import CASES

Launch = Callable[..., None]
MORE = {
    "crowd": scene([150, 20], imgsz=96, nc=3, size=0.3, seed=1),
    "more slots than points": scene([150], imgsz=64, nc=3, size=0.3, seed=2),
    "many classes": scene([20, 3, 0], nc=80, imgsz=256, seed=3),
}
# Sums are added up in another order, and exponentials may differ in their last bit: a card's by
# more than another library's on the CPU.
RTOL = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}
RTOL_GPU = {**RTOL, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kernels")
    return host_kernels(SOURCE, folder, together={"search": 8}, warp=4)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Mapping[str, Launch]:
    """Compiled for the device of the test."""
    if request.getfixturevalue("device") == "cpu":
        host: dict[str, Any] = request.getfixturevalue("host")
        return host
    found = loss_module.loss_kernels(torch.device("cuda", 0))
    assert found is not None
    return found


def theirs(
    s: Scene, kernels: Mapping[str, Launch], device: str, *, places: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What `ours` gives, by kernels; sums as a list."""
    logits = (s.box_logits, s.class_logits)
    box, cls = (x.to(device, copy=True).requires_grad_() for x in logits)
    targets = pad_targets(
        s.boxes,
        s.labels,
        s.image,
        images=len(box),
        imgsz=s.imgsz,
        places=places,
        segments=False,
    ).to(torch.device(device))
    raw = RawPredictions(box, cls, s.shapes)
    sums = loss_module.LossSums(*kernel_loss(raw, STRIDES, targets, reg_max=16, kernels=kernels))
    (GAINS.weigh(sums) / sums.target_scores.clamp(min=1)).backward()
    assert box.grad is not None and cls.grad is not None
    return [part.detach().cpu() for part in sums.parts], box.grad.cpu(), cls.grad.cpu()


def of_kind(s: Scene, kind: torch.dtype) -> Scene:
    return dataclasses.replace(
        s, box_logits=s.box_logits.to(kind), class_logits=s.class_logits.to(kind)
    )


def assert_alike(s: Scene, kernels: Mapping[str, Launch], device: str, **options: int) -> None:
    expected, expected_box, expected_class = ours(s)
    sums, box, cls = theirs(s, kernels, device, **options)
    for own, other in zip(sums, expected.parts, strict=True):
        torch.testing.assert_close(own, other.detach(), rtol=1e-5, atol=1e-6)
    rtol = (RTOL_GPU if device == "cuda" else RTOL)[s.box_logits.dtype]
    # Boxes that hardly overlap anything, to the sixth power, weigh as good as nothing.
    least = 1e-9 * expected_class.double().norm()
    for gradient, other in ((box, expected_box), (cls, expected_class)):
        assert gradient.dtype == other.dtype
        difference = (gradient.double() - other.double()).norm()
        assert difference <= rtol * other.double().norm().clamp(min=least)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_sums_and_gradients_are_those_of_the_loss(
    name: str, device: str, kernels: Mapping[str, Launch]
) -> None:
    assert_alike({**CASES, **MORE}[name], kernels, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["320", "crowd", "no boxes at all"])
def test_half_precision_is_read_and_written(
    name: str, kind: torch.dtype, device: str, kernels: Mapping[str, Launch]
) -> None:
    assert_alike(of_kind({**CASES, **MORE}[name], kind), kernels, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(20))
def test_many_random_batches(seed: int, device: str, kernels: Mapping[str, Launch]) -> None:
    g = torch.Generator().manual_seed(2000 + seed)
    counts = torch.randint(0, 25, (3,), generator=g).tolist()
    size = 0.02 + 0.5 * float(torch.rand((), generator=g))
    assert_alike(scene(counts, size=size, nc=1 + seed, seed=seed), kernels, device)


@pytest.mark.parametrize("device", DEVICES)
def test_good_predictions_compete_for_points(device: str, kernels: Mapping[str, Launch]) -> None:
    s = scene([8, 8], imgsz=320, nc=4, seed=20)
    for _ in range(30):  # descend: overlaps and scores rise
        _, box, cls = ours(s)
        s = dataclasses.replace(
            s, box_logits=s.box_logits - 200 * box, class_logits=s.class_logits - 20 * cls
        )
    assert ours(s)[0].target_scores > 20
    assert_alike(s, kernels, device)
    again = dataclasses.replace(s, boxes=s.boxes[[0, 1, 0, 2, 1, 0, *range(6, 16)]])
    assert_alike(again, kernels, device)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_places_change_nothing(device: str, kernels: Mapping[str, Launch]) -> None:
    s = CASES["320"]
    few, many = (theirs(s, kernels, device, places=places) for places in (0, 100))
    torch.testing.assert_close(few[0], many[0], rtol=1e-6, atol=0)
    for own, other in zip(few[1:], many[1:], strict=True):
        # A card adds up longer rows in another order; single numbers may be what is left of two.
        assert (own - other).norm() <= 1e-6 * other.norm()
    assert_alike(CASES["no boxes at all"], kernels, device, places=16)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_twice_to_the_bit(device: str, kernels: Mapping[str, Launch]) -> None:
    first, second = (theirs(MORE["crowd"], kernels, device) for _ in range(2))
    assert all(map(torch.equal, first[0], second[0]))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["box_logits", "class_logits"])
def test_what_is_no_number_is_never_assigned(
    which: str, device: str, kernels: Mapping[str, Launch]
) -> None:
    s = scene([5, 5], seed=5)
    broken = getattr(s, which).clone()
    broken[0, :, ::2] = torch.nan
    s = dataclasses.replace(s, **{which: broken})
    sums, box, cls = theirs(s, kernels, device)
    assert sums[1].isnan().item() is (which == "class_logits")
    assert not sums[0].isnan() and not sums[2].isnan() and not box[1].isnan().any()


@pytest.mark.parametrize("name", kernel_names(SOURCE.read_text()))
def test_the_proof_notices_a_kernel_that_does_nothing(name: str, host: dict[str, Any]) -> None:
    def idle(grid: Any, block: Any, device: Any, work: Any) -> None:
        """Leave what was there before: no slots that the others would stumble over."""
        points, slots = work.images * work.anchors, work.images * work.places * loss_gpu.TOPK
        sizes = {"wanted": 4 * slots, "given": 4 * slots, "parts": 16 * slots}
        sizes |= {"predicted": 24 * points, "sums": 4 * work.threads, "class_gradient": 2 * points}
        writes = {"decode": "predicted", "terms": "parts", "softplus": "sums"}
        writes |= {"search": "wanted", "settle": "given", "background": "class_gradient"}
        if (written := writes.get(name)) is not None:
            ctypes.memset(getattr(work, written), 255, sizes[written])

    assert loss_module._proves(host, torch.device("cpu"))
    assert not loss_module._proves({**host, name: idle}, torch.device("cpu"))


def test_detection_loss_goes_by_the_kernels_where_there_are_some(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = CASES["tiny"]
    targets = pad_targets(s.boxes, s.labels, s.image, images=2, imgsz=s.imgsz, segments=False)
    raw = RawPredictions(s.box_logits, s.class_logits, s.shapes)
    with pytest.raises(AssertionError, match="leave the segments out"):
        detection_loss(raw, STRIDES, targets)
    monkeypatch.setattr(loss_module, "loss_kernels", lambda device: host)
    before = host["terms"].calls
    sums = detection_loss(raw, STRIDES, targets)
    assert host["terms"].calls == before + 1
    torch.testing.assert_close(sums.box, ours(s)[0].box.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_it_compiles_for_cards_that_are_not_here(capability: tuple[int, int]) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is made without CUDA")
    code = compile_source(SOURCE.read_text(), capability)
    assert all(name.encode() in code for name in kernel_names(SOURCE.read_text()))


def test_constants_are_those_of_the_source() -> None:
    text = SOURCE.read_text()
    constants = {
        "TOPK": loss_gpu.TOPK,
        "LANES": loss_gpu._LANES,
        "MANY": loss_gpu._MANY,
        "MOST_LEVELS": loss_gpu._MOST_LEVELS,
    }
    for name, value in constants.items():
        assert f"#define {name} {value}\n" in text
    fields = text[text.index("struct Pass {") : text.index("};\n")]
    words = [
        word.strip("*,;") for line in fields.splitlines() for word in line.split("//")[0].split()
    ]
    named = [word for word in words if word in {name for name, *_ in loss_gpu._Pass._fields_}]
    assert named == [name for name, *_ in loss_gpu._Pass._fields_]
