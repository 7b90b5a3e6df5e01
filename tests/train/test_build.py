"""Which layers learn how fast, and how much is validated at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hsrloop.config import HEAD_LR_SCALE, KNOWN_LR_SCALE, PRETRAINED_LR_SCALE, TrainConfig, resolve
from hsrloop.data.doctor.check import check_dataset
from hsrloop.data.scenes.synthesis import find_folders
from hsrloop.data.sets.manifest import read_manifest
from hsrloop.train.build import carried_over, layer_rates, load_data
from hsrloop.train.ignored import ignored_elsewhere
from tests.conftest import write_material

MIDDLE = (KNOWN_LR_SCALE + PRETRAINED_LR_SCALE) / 2


@pytest.mark.parametrize(
    ("given", "kind", "scratch", "lines"),
    [
        ({}, "cpu", True, []),
        ({"amp": False, "cuda_graphs": False}, "cpu", False, []),  # so it is there
        ({"amp_dtype": "bf16"}, "cuda", False, []),
        ({"amp_dtype": "bf16"}, "cpu", False, ["amp_dtype is ignored: training runs on the CPU"]),
        (
            {"amp": True, "cuda_graphs": True, "head_lr_scale": 2.0}, "cpu", True,
            [
                "amp, cuda_graphs are ignored: training runs on the CPU",
                "head_lr_scale is ignored: the network starts from scratch",
            ],
        ),
        ({"head_lr_scale": 2.0}, "cuda", False, []),
    ],
)  # fmt: skip
def test_what_has_no_effect_here_is_named(
    given: dict[str, object], kind: str, scratch: bool, lines: list[str]
) -> None:
    resolved = resolve([("tier cpu", {"amp": True}), ("command line", given)])
    assert ignored_elsewhere(resolved, kind, scratch=scratch) == lines


@pytest.mark.parametrize(
    ("settings", "fresh_share", "rates"),
    [
        ({}, None, (1.0, 1.0)),  # from scratch
        ({}, 1.0, (PRETRAINED_LR_SCALE, HEAD_LR_SCALE)),
        ({}, 0.0, (KNOWN_LR_SCALE, KNOWN_LR_SCALE)),  # day two, the same objects
        ({}, 0.5, (MIDDLE, (MIDDLE + HEAD_LR_SCALE) / 2)),
        ({"pretrained_lr_scale": 0.1}, 0.0, (0.1, 0.1)),
        ({"llrd": True}, 1.0, (1.0, 1.0)),  # the decay decides alone
        ({"llrd": True, "head_lr_scale": 3.0}, 1.0, (1.0, 3.0)),  # unless told otherwise
        ({"pretrained_lr_scale": 1.0, "head_lr_scale": 1.0}, 1.0, (1.0, 1.0)),
    ],
)
def test_layer_rates(
    settings: dict[str, object], fresh_share: float | None, rates: tuple[float, float]
) -> None:
    config = TrainConfig.from_json(settings)
    assert layer_rates(config, fresh_share) == pytest.approx(rates)


@pytest.mark.parametrize(
    ("fresh", "said"),
    [
        ((False, False), "the weights know every class (2)"),
        ((False, True), "the weights know 1 of 2 classes; new: Buter"),
    ],
)
def test_what_weights_know_is_said(fresh: tuple[bool, ...], said: str) -> None:
    """A name spelled otherwise starts its class afresh."""
    base: Any = SimpleNamespace(fresh_classes=fresh)
    assert carried_over(base, ("Cup", "Buter")) == said


def test_a_class_that_is_pasted_is_not_missed(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut-outs are of square and disc; labels here are of bars, and nothing shows a cup."""
    write_material(tiny_dataset.parent)
    for label in (tiny_dataset.parent / "labels/train").iterdir():
        label.write_text("2 .5 .5 .2 .2\n")
    splits = "train: images/train\nval: images/val\n"
    names = "names: [square, disc, bar, cup]\n"
    tiny_dataset.write_text(splits + names)
    load_data(TrainConfig(), str(tiny_dataset))
    assert "no training image or cut-out of 1 class: cup." in caplog.text
    caplog.clear()
    load_data(TrainConfig(dynamic_synthetic=False), str(tiny_dataset))
    assert "no training image of 3 classes: square, disc, cup." in caplog.text
    assert _untrained(tiny_dataset) == ["cup (class 3)"]
    tiny_dataset.write_text("train:\nval: images/val\n" + names)
    assert _untrained(tiny_dataset) == ["bar (class 2)", "cup (class 3)"]


def _untrained(dataset: Path) -> list[str]:
    """Return what `hsrloop check` says."""
    folders = find_folders(TrainConfig(), dataset)
    manifest = read_manifest(dataset, train_optional=folders.suffice)
    found = {f.kind: f for f in check_dataset(manifest, folders=folders).findings}
    return [problem.text for problem in found["class-untrained"].problems]
