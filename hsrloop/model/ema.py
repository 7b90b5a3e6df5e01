"""The averaged weights: what is validated and published."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.ops.averaging import Averager
from hsrloop.ops.ranges import named


class Ema:
    """An exponential moving average of a module, float32, in eval mode.

    Parameters and floating-point buffers are averaged; integer buffers are copied.
    """

    def __init__(self, module: nn.Module, *, updates: int = 0) -> None:
        """Start from a copy of `module` as it is."""
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)
        self.updates = updates
        self._averager = Averager()

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float, *, skipped: Tensor | None = None) -> None:
        """Move the average towards `module`: decay * average + (1 - decay) * module, in place.

        A few kernels do it for all tensors. Counts in `updates`.

        Args:
            module: holds finite numbers only, skipped or not: 0 * NaN would be NaN.
            skipped: () bool on the device: True leaves the averaged floats as they are (a step
                whose gradients overflowed); None means False.
        """
        self.move(module, 1.0 - decay, skipped)
        self.updates += 1

    @torch.no_grad()
    def move(self, module: nn.Module, weight: float | Tensor, skipped: Tensor | None) -> None:
        """Do what `update` does to the tensors.

        Args:
            weight: of the module's, 1 - decay; () float32 on the device where the step is recorded,
                else a number.
        """
        pairs = list(zip(_tensors(self.module), _tensors(module), strict=True))
        floats = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
        others = [(ours, theirs) for ours, theirs in pairs if not ours.is_floating_point()]
        averages = [ours for ours, _ in floats]
        with named("EMA"):
            current = [theirs.detach() for _, theirs in floats]
            if skipped is None:
                kinds = [average.dtype for average in averages]
                alike = [own.to(kind) for own, kind in zip(current, kinds, strict=True)]
                torch._foreach_lerp_(averages, alike, float(weight))
            else:
                self._averager.move(averages, current, weight * ~skipped)
            torch._foreach_copy_([ours for ours, _ in others], [theirs for _, theirs in others])

    def state_dict(self) -> dict[str, Any]:
        """Return {"updates", "module"}; the tensors are the live ones, not copies."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, copying into the existing tensors."""
        self.module.load_state_dict(state["module"], strict=True)
        self.updates = int(state["updates"])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
