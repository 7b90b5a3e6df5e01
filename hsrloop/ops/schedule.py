"""Schedules: pure functions of progress or of a counter."""

from __future__ import annotations

import math


def linear(progress: float, *, lrf: float) -> float:
    """Fall in a straight line from 1 at progress 0 to `lrf` at 1; progress is clamped to [0, 1]."""
    return 1 + (lrf - 1) * min(max(progress, 0.0), 1.0)


def cosine(progress: float, *, lrf: float) -> float:
    """Fall along half a cosine from 1 at progress 0 to `lrf` at 1; progress is clamped to [0, 1].

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, one period.
    """
    return lrf + (1 - lrf) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def warmup(step: int, *, warmup_steps: int) -> float:
    """Rise in a straight line over the first `warmup_steps` steps, then stay at 1.

    The first step is taken at 1 / (warmup_steps + 1) rather than at 0, which would waste it; the
    first one at 1 is step `warmup_steps`. Always 1 for warmup_steps 0.
    """
    return min((step + 1) / (warmup_steps + 1), 1.0)


def lr_factor(step: int, *, steps: int, warmup_steps: int, lrf: float, cosine: bool) -> float:
    """Return what a group's highest learning rate is multiplied with at one optimizer step.

    Args:
        step: of the whole run, from 0; the last is steps - 1, any later one counts as it.
        steps: optimizer steps of the run, at least 1.
        warmup_steps: 0 for none.
        lrf: factor of the last step, in [0, 1].
        cosine: half a cosine instead of a line.

    Returns:
        In [0, 1]. The decay runs from step 0 on, below the warm-up, and reaches lrf at the last
        step (a run of one step is taken at 1).
    """
    progress = step / max(steps - 1, 1)
    decay = _cosine(progress, lrf=lrf) if cosine else linear(progress, lrf=lrf)
    return decay * warmup(step, warmup_steps=warmup_steps)


_cosine = cosine  # `lr_factor` has an argument of that name


def ema_decay(updates: int, *, decay: float = 0.9999, tau: float = 2000.0) -> float:
    """Return how much of the averaged weights stays at one update.

    Args:
        updates: number of this update, from 1 (at 0 nothing would stay).
        decay: approached from below, in [0, 1).
        tau: updates after which 63% of `decay` is reached; 0 for `decay` from the first on.

    Source: ultralytics@8.4.190, ModelEMA.
    """
    return decay * (1 - math.exp(-updates / tau)) if tau > 0 else decay
