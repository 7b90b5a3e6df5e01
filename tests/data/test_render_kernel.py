"""The one-pass kernel: compiled for any card without one, and right to the byte.

Its source is compiled for the host, where each of its threads is a turn of a loop, and compared
with torch's operators; on a GPU NVRTC's code is compared with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hsrloop.config import resolve
from hsrloop.data.pixels.bank import Bank, DeviceBank, Sources, TileBank
from hsrloop.data.pixels.kernel import SOURCE, RenderKernel
from hsrloop.data.pixels.render_torch import TorchRenderer
from hsrloop.data.plan import AugmentPlan
from hsrloop.ops import nvrtc
from hsrloop.ops.nvrtc import KernelError, compile_source
from hsrloop.train import images as images_module
from hsrloop.train.images import train_images
from tests.data.test_render_torch import (
    ALL,
    PLAIN,
    SIDE,
    SIZES,
    PaintedCutouts,
    made_of,
    pasted,
    plans_of,
    smooth,
)
from tests.kernels import host_kernels

CPU = torch.device("cpu")
BANKS = [DeviceBank, TileBank]


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory: pytest.TempPathFactory) -> RenderKernel:
    made = RenderKernel.__new__(RenderKernel)
    folder = tmp_path_factory.mktemp("kernel")
    made._kernels = host_kernels(SOURCE, folder)  # type: ignore[assignment]
    return made


@dataclasses.dataclass(frozen=True)
class Scene:
    """Sources, and plans of every kind."""

    refs: Sequence[Any]
    sources: Sources
    plans: dict[str, list[AugmentPlan]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    images = [smooth(i, *size) for i, size in enumerate(SIZES)]
    refs, store = made_of(images, tmp_path_factory.mktemp("scene"))
    cutouts, rng = PaintedCutouts(), np.random.default_rng(1)
    plain, full = plans_of(refs, PLAIN, 8), plans_of(refs, ALL, 24)
    pastes = [pasted(plan, rng, len(cutouts)) for plan in plans_of(refs, ALL, 24)]
    assert any(plan.mix for plan in pastes) and any(len(plan.pastes) > 3 for plan in pastes)
    kinds = {"as they are": plain, "augmented": full, "with cut-outs": pastes}
    return Scene(refs, Sources(store, cutouts), kinds)


def rendered(
    scene: Scene,
    plans: Sequence[AugmentPlan],
    kind: type[Bank],
    device: torch.device,
    kernel: Any = None,
    scratch_bytes: int = 2**24,
) -> Tensor:
    bank = kind(scene.sources, device)  # type: ignore[call-arg]
    renderer = TorchRenderer(
        bank, scene.refs, imgsz=SIDE, device=device, scratch_bytes=scratch_bytes, kernel=kernel
    )
    return renderer.pixels(plans).cpu()


@pytest.mark.parametrize("scratch_bytes", [0, 2**30])
@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("what", ["as they are", "augmented", "with cut-outs"])
def test_it_gives_the_bytes_of_torchs_operators(
    scene: Scene, host_kernel: RenderKernel, what: str, kind: type[Bank], scratch_bytes: int
) -> None:
    plans = scene.plans[what]
    expected = rendered(scene, plans, kind, CPU, scratch_bytes=scratch_bytes)
    kernel: Any = host_kernel._kernels["render"]
    before = kernel.calls
    found = rendered(scene, plans, kind, CPU, host_kernel, scratch_bytes)
    in_pieces = kind is TileBank and not scratch_bytes  # a bank on the device takes no more
    assert (kernel.calls - before > 1) is in_pieces
    assert expected.float().std() > 20
    assert torch.equal(found, expected)


def test_every_byte_of_the_output_is_written(scene: Scene, host_kernel: RenderKernel) -> None:
    plans = scene.plans["with cut-outs"]
    bank = DeviceBank(scene.sources, CPU)
    renderer = TorchRenderer(bank, scene.refs, imgsz=SIDE, device=CPU, kernel=host_kernel)
    layout = renderer.lay_out(plans)
    ends = []
    for poison in (0, 255):
        filled = torch.full((len(plans), SIDE, SIDE, 3), poison, dtype=torch.uint8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", _first(torch.empty, filled))
            ends.append(renderer.draw(layout))
    assert torch.equal(*ends)


def _first(real: Any, filled: Tensor) -> Any:
    """Return `filled` in place of the tensor of its shape, else what `real` makes."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return filled if args and args[0] == filled.shape else real(*args, **kwargs)

    return empty


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0), (12, 0)])
def test_it_compiles_for_cards_that_are_not_here(capability: tuple[int, int]) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is made without CUDA")
    code = compile_source(SOURCE.read_text(), capability)
    assert code[:4] == b"\x7fELF" and b"render" in code


def test_what_does_not_compile_says_why() -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is made without CUDA")
    with pytest.raises(KernelError, match='identifier "nothing" is undefined'):
        compile_source('extern "C" __global__ void f() { nothing(); }', (9, 0))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_nvrtc_files", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    with pytest.raises(KernelError, match=r"none of libnvrtc.so.13 can be loaded"):
        compile_source("", (9, 0))


def test_where_it_cannot_be_compiled_torchs_operators_render(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> None:
        raise KernelError("none of libnvrtc.so.13 can be loaded")

    monkeypatch.setattr(images_module, "RenderKernel", refuse)
    said: list[Any] = []
    assert images_module._kernel(torch.device("cuda"), said.append) is None
    (note,) = said
    assert note.level == "warning" and "libnvrtc.so.13" in note.text
    assert images_module._kernel(CPU, said.append) is None and len(said) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("what", ["as they are", "augmented", "with cut-outs"])
def test_on_a_gpu_it_gives_the_bytes_of_torchs_operators_on_the_cpu(
    scene: Scene, what: str, kind: type[Bank]
) -> None:
    device = torch.device("cuda", 0)
    plans = scene.plans[what]
    expected = rendered(scene, plans, kind, CPU)
    found = rendered(scene, plans, kind, device, RenderKernel(device))
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_run_renders_with_it(scene: Scene, tmp_path: Path) -> None:
    config = resolve([("test", {"imgsz": SIDE, "batch": 4, "device": "cuda"})]).config
    made = train_images(
        config,
        scene.refs,
        None,
        torch.device("cuda", 0),
        micro_batch=4,
        budget_bytes=2**30,
        emit=lambda event: None,
    )
    assert made.renderer is not None and made.renderer._kernel is not None
