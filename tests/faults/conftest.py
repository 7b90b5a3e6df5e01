"""Ways to make memory run out at a chosen place, and runs to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hsrloop.model.ema import Ema
from hsrloop.train import checkpoint, evaluate, step
from tests.train.conftest import Recorder

# Where a run can need memory: the object and the attribute that is called there.
PLACES: dict[str, tuple[Any, str]] = {
    "forward": (step, "forward_train"),
    "backward": (torch.autograd, "backward"),
    "unscale": (torch.amp.GradScaler, "unscale_"),
    "optimizer": (torch.optim.AdamW, "step"),
    "scaler update": (torch.amp.GradScaler, "update"),
    "ema": (Ema, "update"),
    "validation": (evaluate, "detect"),
    "checkpoint": (checkpoint, "save"),
}


@dataclass(slots=True)
class Fault:
    """Raises at the calls of one place whose numbers (from 0) it is given."""

    at: frozenset[int]
    error: Callable[[], Exception]
    calls: int = 0
    raised: int = 0

    def maybe(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if number in self.at:
            self.raised += 1
            raise self.error()


def gpu_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def host_error() -> Exception:
    return MemoryError("Unable to allocate 2.00 GiB")


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fault]:
    """Return a function that arms a place; the real thing runs at all other calls."""

    def arm(place: str, *at: int, error: Callable[[], Exception] = gpu_error) -> Fault:
        owner, name = PLACES[place]
        real = getattr(owner, name)
        made = Fault(frozenset(at), error)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            made.maybe()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)
        return made

    return arm


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
