"""Which layers learn how fast, and how much is validated at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hsrloop.config import HEAD_LR_SCALE, KNOWN_LR_SCALE, PRETRAINED_LR_SCALE, TrainConfig
from hsrloop.train.build import first_rung, layer_rates, validated_at_once

MIDDLE = (KNOWN_LR_SCALE + PRETRAINED_LR_SCALE) / 2


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


def test_a_gpu_validates_more_at_once_than_it_trains_until_memory_runs_out() -> None:
    config, gpu = TrainConfig(batch=16, micro_batch=8), torch.device("cuda", 1)
    rung = first_rung(config)
    assert validated_at_once(config, rung, torch.device("cpu")) == 8
    assert validated_at_once(config, rung, gpu) == 16
    for less in (4, 2, 1):
        for micro_batch in (8, less):
            smaller = dataclasses.replace(rung, val_batch=less, micro_batch=micro_batch)
            assert validated_at_once(config, smaller, gpu) == less
    single = TrainConfig(batch=16, micro_batch=1)
    assert validated_at_once(single, first_rung(single), gpu) == 1
