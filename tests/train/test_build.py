"""Which layers learn how fast, and how much is validated at once."""

from __future__ import annotations

import pytest

from hsrloop.config import HEAD_LR_SCALE, KNOWN_LR_SCALE, PRETRAINED_LR_SCALE, TrainConfig
from hsrloop.train.build import layer_rates

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
