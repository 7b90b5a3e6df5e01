"""A run's state in main memory: checkpoints are written from it, and it can be gone back to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsrloop.train.state import TrainState

_Place = tuple[str | int, ...]  # keys and indices that lead to a tensor of the payload


class Snapshot:
    """A copy of a `TrainState` between two steps, in memory that is allocated once.

    From CUDA the copies run on the current stream into pinned memory: `take` returns before they
    are done, `payload` waits for them.
    """

    def __init__(self) -> None:
        self._held: dict[_Place, Tensor] = {}
        self._payload: dict[str, Any] | None = None
        self._done: torch.cuda.Event | None = None

    def take(self, state: TrainState) -> None:
        """Copy the state as it is now over what was held before.

        Nobody may read the earlier payload any more. The first call allocates; when it fails, the
        next one goes on where it stopped.

        Raises:
            RuntimeError, MemoryError: no memory; nothing is held then.
        """
        assert state.commit is None, "a step is in progress"
        self._payload = None
        tensors: list[Tensor] = []
        copies: list[Tensor] = []

        def held(place: _Place, tensor: Tensor) -> Tensor:
            tensors.append(tensor.detach())
            copies.append(self._room_for(place, tensor))
            return copies[-1]

        payload = _mapped(state.to_payload(), held)
        copy_into(copies, tensors)
        self._done = None
        if state.device.type == "cuda":
            self._done = torch.cuda.current_stream(state.device).record_event()
        self._payload = payload

    @property
    def payload(self) -> dict[str, Any]:
        """What `TrainState.to_payload` gave, as copies on the CPU; any thread may read it."""
        assert self._payload is not None, "nothing was taken"
        if self._done is not None:
            self._done.synchronize()
        return self._payload

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def restore(self, state: TrainState, *, only: Collection[str] = ()) -> None:
        """Bring `state`, the one that was taken, back to what is held, which stays as it is.

        Args:
            only: the parts of the payload that go back; none named: all.
        """

        def apart(place: _Place, tensor: Tensor) -> Tensor:
            # Optimizers keep the tensors they are given when these are on their device.
            return tensor.clone() if place[0] == "optimizer" else tensor

        held = _mapped(self.payload, apart)
        wanted = {key: value for key, value in held.items() if not only or key in only}
        state.load_payload({**state.to_payload(), **wanted})

    def _room_for(self, place: _Place, tensor: Tensor) -> Tensor:
        held = self._held.get(place)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            # Strides are kept: channels_last stays so, and copies run at full speed.
            held = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._held[place] = held
        return held


@torch.no_grad()
def copy_into(held: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors into as many on the CPU of their shapes and dtypes, without waiting for CUDA."""
    far = [(own, tensor) for own, tensor in zip(held, tensors, strict=True) if tensor.is_cuda]
    if far:
        owns, sources = zip(*far, strict=True)
        torch._foreach_copy_(owns, sources, non_blocking=True)
    for own, tensor in zip(held, tensors, strict=True):
        if tensor.is_cuda:
            continue
        if tensor.stride() != own.stride():
            own.copy_(tensor)
            continue
        # One thread, one memcpy: 3 times as fast as copy_ on two cores, and ten times where other
        # processes keep them busy (yolov8m: 60 ms against 200, measured).
        np.copyto(_bytes(own), _bytes(tensor))


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of a tensor without gaps, in the order they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def _mapped(value: Any, leaf: Callable[[_Place, Tensor], Tensor], place: _Place = ()) -> Any:
    """Copy nested dicts, lists and tuples with each tensor replaced; other leaves are shared."""
    match value:
        case Tensor():
            return leaf(place, value)
        case dict():
            return {key: _mapped(item, leaf, (*place, key)) for key, item in value.items()}
        case list() | tuple():
            return type(value)(_mapped(x, leaf, (*place, i)) for i, x in enumerate(value))
    return value
