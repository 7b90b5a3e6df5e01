"""What the CPU computes of the loss in loops of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from hsrloop.ops import assign_cpu, loss_cpu, native
from hsrloop.ops.loss import detection_loss, pad_targets
from hsrloop.records import RawPredictions
from tests.ops.peer import STRIDES, ours, scene

COUNTS = [40, 0, 25, 3, 60]


@numba.njit
def exponentials(x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for i in range(len(x)):
        out[i] = native.exp(x[i])
    return out


def test_exponentials_are_right_to_the_last_bit_or_so() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(exponentials(x) / exact - 1).max() < 1.2e-7
    assert exponentials(np.zeros(1, np.float32))[0] == 1


def test_exponentials_of_numbers_far_below_0_and_of_what_is_no_number() -> None:
    given = np.array([-88, -1e30, -np.inf, np.nan], np.float32)
    *small, none = exponentials(given)
    assert all(0 <= number < 1e-37 for number in small) and np.isnan(none)


def found(counts: list[int]) -> list[Tensor]:
    sums, *gradients = ours(scene(counts, imgsz=320, nc=5, seed=7))
    return [*(part.detach() for part in sums.parts), *gradients]


@pytest.mark.parametrize("counts", [COUNTS, [7], [0, 0]])
def test_threads_share_the_images_and_change_no_bit(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = found(counts)
    parts: list[int] = []
    share = loss_cpu.share

    def counted(work: Any, count: int, *, threads: int) -> None:
        parts.append(min(threads, count))
        share(work, count, threads=threads)

    for module in (loss_cpu, assign_cpu):
        monkeypatch.setattr(module, "share", counted)
    monkeypatch.setattr(loss_cpu, "_NUMBERS_OF_A_THREAD", 1)
    monkeypatch.setattr(assign_cpu, "_PAIRS_OF_A_THREAD", 1)
    monkeypatch.setattr(assign_cpu, "_POINTS_OF_A_THREAD", 1)
    for threads in (1, 2, 3, 64):
        parts.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(map(torch.equal, found(counts), alone))
        most = min(threads, len(counts))
        assert parts == [most if sum(counts) else 0] * 3 + [most]  # of nothing: zeros to write


def test_no_image_has_no_loss() -> None:
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    box, cls = (torch.zeros(0, channels, 2100, requires_grad=True) for channels in (64, 5))
    raw = RawPredictions(box, cls, ((40, 40), (20, 20), (10, 10)))
    sums = detection_loss(raw, STRIDES, pad_targets(*nothing, images=0, imgsz=320))
    assert [float(part.detach()) for part in sums.parts] == [0, 0, 0, 0]
    (sums.box + sums.cls + sums.dfl).backward()
    assert box.grad is not None and box.grad.shape == box.shape


def test_class_logits_may_lie_scattered_in_memory() -> None:
    s = scene([5, 5], nc=3, seed=4)
    expected = ours(s)
    wide = s.class_logits.transpose(1, 2).contiguous().transpose(1, 2)
    cls = wide.detach().requires_grad_()
    raw = RawPredictions(s.box_logits.detach().requires_grad_(), cls, s.shapes)
    targets = pad_targets(s.boxes, s.labels, s.image, images=2, imgsz=s.imgsz)
    sums = detection_loss(raw, STRIDES, targets)
    (gradient,) = torch.autograd.grad(sums.cls, cls)
    assert torch.equal(sums.cls, expected[0].cls) and torch.isfinite(gradient).all()


WITHIN_BOUNDS = """
import torch
from tests.ops.peer import ours, scene
for imgsz, size in ((32, 0.9), (64, 0.3), (96, 0.02), (320, 0.1)):
    s = scene([30, 0, 7], imgsz=imgsz, nc=5, size=size, seed=3)
    s.boxes[0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    s.boxes[1] = torch.tensor([1.0, 1.0, 0.1, 0.1])
    s.boxes[-1] = torch.tensor([1.0, 1.0, 0.5, 0.5])  # to the last cell of the last image
    s.boxes[-2] = torch.tensor([-3.0, 2.0, 0.5, 0.5])
    ours(s)
"""


def test_loops_stay_within_bounds(tmp_path: Path) -> None:
    """Compiled to look: otherwise they do not."""
    root = Path(__file__).resolve().parents[2]
    own = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WITHIN_BOUNDS]
    done = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
