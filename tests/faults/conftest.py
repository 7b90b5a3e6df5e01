"""Ways to make memory or room on the disk run out at a chosen place."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hsrloop.model.ema import Ema
from hsrloop.train import checkpoint, detector, saver, step
from tests.train.conftest import Recorder

# Where a run can need memory: the object and the attribute that is called there.
PLACES: dict[str, tuple[Any, str]] = {
    "forward": (step, "forward_train"),
    "backward": (torch.autograd, "backward"),
    "unscale": (torch.amp.GradScaler, "unscale_"),
    "optimizer": (torch.optim.AdamW, "step"),
    "scaler update": (torch.amp.GradScaler, "update"),
    "ema": (Ema, "update"),
    "validation": (detector.Detector, "detect"),
    "best.pt": (saver, "averages_of"),
    "last.pt": (saver.Saver, "_start"),
    "reserve": (saver.Saver, "reserve"),
    "writer": (checkpoint, "content"),
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


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let the kernel refuse every write beyond `size` bytes of any file (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


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


class Card:
    """A GPU of so many bytes: forward passes fail as on one that is too small.

    A training pass needs bytes in proportion to its pixels, a validating one a share of that.
    Neighbours may come and take some before a training pass of a given number (from 0).
    """

    FIXED_BYTES = 50_000_000
    BYTES_PER_PIXEL = 1_000

    def __init__(
        self,
        total_bytes: float,
        neighbours: Mapping[int, float] | None = None,
        *,
        eval_share: float = 1 / 64,
    ) -> None:
        self.total_bytes = total_bytes
        self.neighbours = dict(neighbours or {})
        self.eval_share = eval_share
        self.trained: list[tuple[int, int]] = []  # (images, side) of each pass that fitted
        self.refused: list[tuple[int, int]] = []

    @classmethod
    def needs(cls, images: int, side: int, *, share: float = 1.0) -> float:
        """Return the bytes of one pass."""
        return cls.FIXED_BYTES + cls.BYTES_PER_PIXEL * images * side**2 * share

    def allocate(self, images: torch.Tensor, *, training: bool) -> None:
        """Refuse a pass that does not fit beside the neighbours."""
        shape = (len(images), images.shape[-1])
        passes = len(self.trained) + len(self.refused)
        held = sum(size for come, size in self.neighbours.items() if come <= passes)
        free = self.total_bytes - held
        fits = self.needs(*shape, share=1.0 if training else self.eval_share) <= free
        if training:
            (self.trained if fits else self.refused).append(shape)
        if not fits:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. GPU 0 has a total capacity of {self.total_bytes / 2**30:.2f} "
                f"GiB of which {free / 2**30:.2f} GiB is free."
            )


@pytest.fixture
def insert(monkeypatch: pytest.MonkeyPatch) -> Callable[[Card], Card]:
    """Return a function that lets a run compute on a card."""

    def put(card: Card) -> Card:
        for owner, name, training in (
            (step, "forward_train", True),
            (detector, "forward_eval", False),
        ):
            real = getattr(owner, name)

            def forward(
                module: Any, images: torch.Tensor, real: Any = real, training: bool = training
            ) -> Any:
                card.allocate(images, training=training)
                return real(module, images)

            monkeypatch.setattr(owner, name, forward)
        return card

    return put
