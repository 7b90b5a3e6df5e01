"""A network's weights in half precision, cast all at once.

Autocast casts each weight by itself, and each gradient back: two launches a weight, which cost a
small network more than what they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_NAMES = ("weight", "bias")  # of a convolution's parameters


class Halves:
    """Casts of what autocast would cast: weights and biases of convolutions.

    Args:
        module: its parameters must stay where they are.
        kind: float16 or bfloat16.
    """

    def __init__(self, module: nn.Module, kind: torch.dtype) -> None:
        convolutions = [own for own in module.modules() if isinstance(own, nn.Conv2d)]
        found = [(own, name, own._parameters[name]) for own in convolutions for name in _NAMES]
        self._places = [(own, name, p) for own, name, p in found if p is not None]
        self._wide = [p.detach() for _, _, p in self._places]
        self._halves = [
            torch.empty_like(p, dtype=kind).requires_grad_(p.requires_grad)
            for _, _, p in self._places
        ]
        self._of = {id(p): half for (_, _, p), half in zip(self._places, self._halves, strict=True)}

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Cast them as they are now, and let the network compute with the casts meanwhile."""
        with torch.no_grad():
            torch._foreach_copy_(self._halves, self._wide)
        try:
            for (own, name, _), half in zip(self._places, self._halves, strict=True):
                own._parameters[name] = half  # type: ignore[assignment]
            yield
        finally:
            for own, name, parameter in self._places:
                own._parameters[name] = parameter

    def leaves(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return by what gradients are to be asked for in place of these parameters."""
        return [self._of.get(id(parameter), parameter) for parameter in parameters]

    @staticmethod
    def widened(gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients in the types of others of the same shapes, in the same order."""
        pairs = list(zip(gradients, like, strict=True))
        narrow = [own for own, other in pairs if own.dtype is not other.dtype]
        wide = [torch.empty_like(other) for own, other in pairs if own.dtype is not other.dtype]
        torch._foreach_copy_(wide, narrow)
        rest = iter(wide)
        return [own if own.dtype is other.dtype else next(rest) for own, other in pairs]
