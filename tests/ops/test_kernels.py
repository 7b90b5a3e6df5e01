"""Kernels of our own find what torch's operators find, to the bit, and are proved before use."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hsrloop.ops import averaging, detections, matching, norm, nvrtc, silu
from hsrloop.ops.matching import IOUS
from hsrloop.ops.nvrtc import KernelError, compile_source, kernel_names, proved_kernels
from hsrloop.train.build import KERNELS
from tests.kernels import DEVICES, HostKernel, host_kernels

SOURCES = [detections.SOURCE, matching.MATCH, norm.SOURCE, silu.SOURCE, averaging.SOURCE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def kernel_on(device: str, folder: Path) -> Any:
    """What matches: NVRTC's on a GPU, the host compiler's on the CPU."""
    if device == "cpu":
        return on_the_host(folder)
    found = proved_kernels(matching.MATCH, torch.device("cuda", 0), matching._proves)
    assert found is not None
    return found["match"]


def on_the_host(folder: Path) -> HostKernel:
    return host_kernels(matching.MATCH, folder, together={"match": 4}, warp=4)["match"]


def crowd(images: int, rows: int, seed: int, *, spread: float) -> tuple[Tensor, Tensor]:
    """(B, K, 4) boxes, some of them alike or without area, and which are wanted: the first ones."""
    generator = torch.Generator().manual_seed(seed)
    low = spread * torch.rand(images, rows, 2, generator=generator)
    boxes = torch.cat((low, low + 30 * torch.rand(images, rows, 2, generator=generator)), 2)
    boxes[:, 5::7] = boxes[:, 4:-1:7][:, : boxes[:, 5::7].shape[1]]
    boxes[:, 6::11, 2:] = boxes[:, 6::11, :2]
    counts = torch.randint(0, rows + 1, (images,), generator=generator)
    return boxes, torch.arange(rows) < counts[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boxes", [1, 3, 33, 200])
def test_matching_finds_what_turns_find(boxes: int, device: str, folder: Path) -> None:
    kernel = kernel_on(device, folder)
    generator = torch.Generator().manual_seed(boxes)
    iou = torch.rand(7, boxes, 60, generator=generator)
    iou = torch.where(iou > 0.4, iou, 0.0)
    iou[:, :, 7] = iou[:, :, 6]  # alike
    iou, thresholds = iou.to(device), torch.from_numpy(IOUS).to(device)
    expected = matching._in_turn(iou, thresholds)
    assert 0 < expected.float().mean() < 1
    assert torch.equal(matching._greedy(kernel, iou, thresholds), expected)


def test_a_validation_matched_by_the_kernel_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, _ = crowd(5, 80, seed=3, spread=40.0)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (5, 80)))
    detections = torch.cat((boxes, torch.rand(5, 80, 1), labels[..., None].float()), 2)
    truth = boxes[:, 10:40] + 1.5
    expected = matching.match(detections, truth, labels[:, 10:40])
    kernel = on_the_host(folder)
    monkeypatch.setattr(matching, "_kernel_for", lambda iou: kernel)
    assert torch.equal(matching.match(detections, truth, labels[:, 10:40]), expected)
    assert kernel.calls == 1 and bool(expected.any())
    assert not matching.match(detections, truth[:, :0], labels[:, :0]).any()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_they_compile_for_cards_that_are_not_here(
    source: Path, capability: tuple[int, int]
) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is made without CUDA")
    text = source.read_text()
    code = compile_source(text, capability)
    assert kernel_names(text) and all(name.encode() in code for name in kernel_names(text))


@pytest.mark.parametrize(
    ("card", "code"), [((9, 0), 90), ((8, 99), 89), ((7, 5), 75), ((99, 1), 991)]
)
def test_a_card_newer_than_the_compiler_runs_the_newest_code_of_its_kind(
    card: tuple[int, int], code: int
) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is made without CUDA")
    assert nvrtc._architecture(nvrtc._library(tuple(nvrtc._nvrtc_files())), card) == code


def test_a_warp_is_as_wide_as_the_source_says() -> None:
    assert f"#define WARP {matching._WARP}\n" in nvrtc._BEFORE[0].read_text()


@pytest.mark.parametrize(("card", "code"), [((10, 3), 100), ((10, 1), 101), ((12, 1), 120)])
def test_code_of_an_embedded_card_is_for_that_alone(card: tuple[int, int], code: int) -> None:
    known = (90, 100, 101, 120)

    def count(place: Any) -> int:
        place._obj.value = len(known)
        return 0

    def fill(places: Any) -> int:
        places[:] = known
        return 0

    library: Any = SimpleNamespace(nvrtcGetNumSupportedArchs=count, nvrtcGetSupportedArchs=fill)
    assert nvrtc._architecture(library, card) == code


def test_a_kernel_is_proved_before_it_is_used(folder: Path) -> None:
    kernel = on_the_host(folder)
    assert matching._proves({"match": kernel}, torch.device("cpu"))

    def wrong(*args: Any) -> None:
        kernel(*args)
        filled = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.bool][-1]
        filled.view(-1)[3] ^= True

    assert not matching._proves({"match": wrong}, torch.device("cpu"))


def test_one_that_fails_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(source: str, device: torch.device) -> None:
        raise KernelError("none of libnvrtc.so.13 can be loaded")

    device = torch.device("cuda", 7)
    monkeypatch.setattr(nvrtc, "kernels_in", refuse)
    with caplog.at_level(logging.WARNING):
        assert proved_kernels(detections.SOURCE, device, lambda kernels, device: True) is None
    assert "detect.cu is not used" in caplog.text and "libnvrtc.so.13" in caplog.text
    caplog.clear()
    monkeypatch.setattr(nvrtc, "kernels_in", lambda source, device: {})
    with caplog.at_level(logging.WARNING):
        assert proved_kernels(matching.MATCH, device, lambda kernels, device: False) is None
    assert "match.cu is not used" in caplog.text and "something else" in caplog.text


def test_the_cpu_takes_its_own_way() -> None:
    assert detections.detect_kernels(torch.device("cpu")) is None
    assert matching._kernel_for(torch.zeros(1, 2, 4)) is None


def test_a_run_compiles_every_source_ahead() -> None:
    package = Path(nvrtc.__file__).parents[1]
    assert sorted(KERNELS) == sorted(package.rglob("*.cu"))


def test_sources_are_compiled_ahead_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_one(source: str, capability: tuple[int, int]) -> bytes:
        compiled.append(source)
        if source == "broken":
            raise KernelError("expected a declaration")
        return source.encode()

    files = [tmp_path / name for name in ("first.cu", "broken.cu", "last.cu")]
    for file in files:
        file.write_text(file.stem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_compiled", compile_one)
    monkeypatch.setattr(nvrtc, "_CODE", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert nvrtc.compile_ahead(files, torch.device("cpu")) is None and not compiled
    thread = nvrtc.compile_ahead(files, torch.device("cuda", 0))
    assert thread is not None
    thread.join()
    assert compiled == ["first", "broken"]
    assert compile_source("first", (9, 0)) == b"first" and len(compiled) == 2
    with pytest.raises(KernelError, match="expected a declaration"):
        compile_source("broken", (9, 0))
    assert compile_source("first", (8, 6)) == b"first" and len(compiled) == 4
    monkeypatch.setattr(nvrtc, "_CODE", {})  # as in the next process
    assert compile_source("first", (9, 0)) == b"first" and len(compiled) == 4
    monkeypatch.setattr(nvrtc, "_BEFORE", files[:1])  # what every source is compiled after
    assert compile_source("first", (8, 6)) == b"first" and len(compiled) == 5
