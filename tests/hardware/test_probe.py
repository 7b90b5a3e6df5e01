"""Which device is taken, and what is said when a GPU cannot be used."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from hsrloop.errors import ConfigError, DeviceError
from hsrloop.hardware import probe as p
from hsrloop.hardware.memory import GIB
from tests.conftest import CardMemory

CU132 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def card(name: str, capability: tuple[int, int], gib: float = 8) -> p.Card:
    return p.Card(name=name, capability=capability, total_bytes=int(gib * GIB), uuid=f"GPU-{name}")


def driver(*cards: p.Card, version: str = "595.10", cuda: tuple[int, int] = (13, 2)):
    return lambda: p.DriverView(cards=cards, driver=version, cuda=cuda)


def torch_sees(*cards: p.Card, arch: tuple[str, ...] = CU132, cuda: str = "13.2"):
    return lambda: p.TorchView(cards=cards, arch_list=arch, cuda=cuda, version="2.15.0")


RTX = card("RTX 4070", (8, 9), 12)
BIG = card("RTX 6000", (8, 9), 48)
GTX = card("GTX 1080", (6, 1), 8)


def never():
    raise AssertionError("the GPU was looked at")


def test_cpu_looks_at_no_gpu() -> None:
    info = p.probe("cpu", see_driver=never, see_torch=never)
    assert info.kind == "cpu" and info.cores >= 1
    assert p.torch_device(info) == "cpu"


def test_auto_without_gpu_is_the_cpu() -> None:
    assert p.probe("auto", see_driver=driver(), see_torch=torch_sees()).kind == "cpu"


@pytest.mark.parametrize(
    ("device", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("0", 0), ("1", 1)]
)
def test_the_largest_or_the_numbered_gpu(device: str, index: int) -> None:
    info = p.probe(device, see_driver=driver(RTX, BIG), see_torch=torch_sees(RTX, BIG))
    assert (info.kind, info.index, info.name) == ("cuda", index, (RTX, BIG)[index].name)
    assert info.driver == "595.10" and p.torch_device(info) == f"cuda:{index}"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_of_equal_cards_the_emptiest(device: str) -> None:
    """NVML writes "GPU-" before what identifies a card, counts otherwise and sees hidden ones."""
    mine = [dataclasses.replace(BIG, uuid=uuid) for uuid in ("a", "b", "c")]
    free = {"hidden": 40, "c": 30, "b": 31, "a": 2}
    cards = [
        dataclasses.replace(BIG, uuid=f"GPU-{uuid}", free_bytes=gib * GIB)
        for uuid, gib in free.items()
    ]
    info = p.probe(device, see_driver=driver(*cards), see_torch=torch_sees(RTX, *mine))
    assert (info.index, info.uuid) == (2, "b")
    assert p.probe(device, see_driver=driver(), see_torch=torch_sees(RTX, *mine)).index == 1
    started = dataclasses.replace(torch_sees(*mine)(), started=lambda index: index == 2)
    assert p.probe(device, see_driver=driver(*cards), see_torch=lambda: started).index == 2
    ecc = [dataclasses.replace(mine[0], total_bytes=BIG.total_bytes + 3 * 2**20), *mine[1:]]
    found = p.probe(device, see_driver=driver(*cards), see_torch=torch_sees(RTX, *ecc))
    assert found.uuid == "b", "a few MiB more are no larger card"
    smaller = dataclasses.replace(RTX, free_bytes=12 * GIB)
    full = p.probe(device, see_driver=driver(smaller, BIG), see_torch=torch_sees(smaller, BIG))
    assert full.index == 1  # it is the larger one


def test_auto_passes_over_a_card_without_kernels() -> None:
    old = card("Titan V", (7, 0), 48)
    info = p.probe("auto", see_driver=driver(old, RTX), see_torch=torch_sees(old, RTX))
    assert info.name == "RTX 4070"


def failure(device: str = "auto", **seams) -> str:
    with pytest.raises(DeviceError) as caught:
        p.probe(device, **seams)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_card_too_old_for_the_build() -> None:
    text = failure(see_driver=driver(GTX), see_torch=torch_sees(GTX))
    for words in ("GTX 1080", "6.1", "driver 595.10", "sm_75", "2.15.0", "--device cpu"):
        assert words in text
    assert '"torch>=2.11,<2.15"' in text and "download.pytorch.org/whl/cu126" in text
    assert "no build of torch" in failure(
        see_driver=driver(card("GTX 780", (3, 5))), see_torch=torch_sees(card("GTX 780", (3, 5)))
    )


def test_driver_too_old_for_the_build() -> None:
    old = driver(RTX, version="535.54", cuda=(12, 2))
    text = failure(see_driver=old, see_torch=torch_sees())
    for words in ("RTX 4070", "535.54", "CUDA up to 12.2", "too old", "13.2", "580", "cu126"):
        assert words in text
    blackwell = card("RTX 5090", (12, 0))
    text = failure(see_driver=driver(blackwell, cuda=(12, 8)), see_torch=torch_sees())
    assert "cu126" not in text and "after an update to driver 580" in text


def test_cpu_build_and_unknown_failure() -> None:
    assert "is a CPU build" in failure(see_driver=driver(RTX), see_torch=torch_sees(cuda=""))
    assert "cannot start it" in failure(see_driver=driver(RTX), see_torch=torch_sees())


def test_asked_for_and_absent() -> None:
    text = failure("cuda", see_driver=driver(), see_torch=torch_sees())
    assert "device is cuda, but no NVIDIA GPU" in text
    text = failure("cuda:3", see_driver=driver(RTX), see_torch=torch_sees(RTX))
    assert "there are 1 CUDA devices" in text and "cuda:0" in text


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus(monkeypatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert p.probe("auto", see_driver=driver(RTX), see_torch=torch_sees()).kind == "cpu"
    assert "CUDA_VISIBLE_DEVICES" in failure("0", see_driver=driver(RTX), see_torch=torch_sees())


@pytest.mark.parametrize("word", ["gpu", "cuda:x", "mps", "-1", "0,1"])
def test_other_words_for_a_device(word: str) -> None:
    with pytest.raises(ConfigError, match=f"device is {re.escape(word)}; it must be"):
        p.probe(word, see_driver=never, see_torch=never)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True)]
    + [((10, 3), True), ((12, 1), True), ((13, 0), True), ((6, 1), False)],
)
def test_which_cards_a_build_runs_on(capability: tuple[int, int], runs: bool) -> None:
    assert p.runs_on(capability, CU132) is runs


def test_exact_and_broken_architectures() -> None:
    assert p.runs_on((9, 0), ("sm_90a",)) and not p.runs_on((9, 1), ("sm_90a",))
    assert not p.runs_on((9, 0), ("gfx90a", "")) and not p.runs_on((9, 0), ())


def test_this_machine() -> None:
    """The real views answer without error, whatever the machine has."""
    assert isinstance(p._see_driver(), p.DriverView)
    view = p._see_torch()
    assert view.version and len(view.cards) >= 0


def test_cuda_starts_on_no_other_card(caplog: pytest.LogCaptureFixture) -> None:
    """It takes memory there, and fails where another program has left none."""
    asked: list[int] = []

    def free_bytes(index: int) -> int:
        asked.append(index)
        if index == 1:
            raise torch.AcceleratorError("CUDA error: out of memory\nSearch for it somewhere")
        return 3 * GIB

    sees = dataclasses.replace(torch_sees(RTX, BIG)(), free_bytes=free_bytes)
    seams = {"see_driver": driver(RTX, BIG), "see_torch": lambda: sees}
    assert p.probe("cuda:0", **seams).free_bytes == 3 * GIB and asked == [0]
    text = failure("cuda:1", **seams)
    for words in ("cuda:1, RTX 6000 (CUDA error: out of memory). ", "nvidia-smi", "--device cpu"):
        assert words in text
    assert "Search" not in text and asked == [0, 1] and not caplog.records
    info = p.probe("auto", **seams)  # the largest that starts
    assert (info.index, info.free_bytes) == (0, 3 * GIB) and asked == [0, 1, 1, 0]
    (record,) = caplog.records
    assert record.getMessage().startswith("CUDA does not start on cuda:1, RTX 6000")


def test_free_memory_is_what_this_process_may_take(
    card_memory: CardMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name="H100", uuid="GPU-1", total_memory=80 * GIB, major=9, minor=0)
    for name, answer in (
        ("is_available", True),
        ("device_count", 2),
        ("get_arch_list", ["sm_90"]),
        ("get_device_properties", properties),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    card_memory.share, card_memory.reserved = 6 / 80, 1
    looked_at, real = [], torch.cuda.mem_get_info
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: looked_at.append(i) or real(i))
    info = p.probe("cuda:1", see_driver=driver())
    assert looked_at == [1]
    assert info.total_bytes == 80 * GIB and info.free_bytes == pytest.approx(5 * GIB, abs=1)
