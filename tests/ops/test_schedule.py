"""Schedules at their ends and in between."""

from __future__ import annotations

import itertools

import pytest

from hsrloop.ops.schedule import cosine, ema_decay, linear, lr_factor, warmup


@pytest.mark.parametrize("decay", [linear, cosine])
def test_decays_fall_from_one_to_lrf(decay: object) -> None:
    values = [decay(i / 20, lrf=0.01) for i in range(21)]  # type: ignore[operator]
    assert values[0] == 1 and values[-1] == pytest.approx(0.01)
    assert values[10] == pytest.approx(0.505)
    assert all(b < a for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("cos", [False, True])
def test_lr_factor_warms_up_and_ends_at_lrf(cos: bool) -> None:
    values = [lr_factor(i, steps=100, warmup_steps=9, lrf=0.1, cosine=cos) for i in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.1)
    assert max(values) == values[9]
    assert lr_factor(150, steps=100, warmup_steps=9, lrf=0.1, cosine=cos) == values[-1]
    assert lr_factor(0, steps=1, warmup_steps=0, lrf=0.1, cosine=cos) == 1


def test_warmup() -> None:
    assert [warmup(i, warmup_steps=3) for i in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert warmup(0, warmup_steps=0) == 1


def test_ema_decay_rises_to_its_bound() -> None:
    assert ema_decay(0) == 0
    assert ema_decay(2000) == pytest.approx(0.9999 * (1 - 1 / 2.718281828), rel=1e-6)
    assert ema_decay(10**6) == pytest.approx(0.9999)
    assert ema_decay(1, decay=0.5, tau=0) == 0.5
