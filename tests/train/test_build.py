"""Which layers learn how fast, and how much is validated at once."""

from __future__ import annotations

import pytest

from hsrloop.config import HEAD_LR_SCALE, KNOWN_LR_SCALE, PRETRAINED_LR_SCALE, TrainConfig, resolve
from hsrloop.train.build import ignored_elsewhere, layer_rates

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
