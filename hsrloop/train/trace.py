"""Find where in a network numbers stop being finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Trace:
    """Where numbers first stopped being finite: names of modules or parameters; empty: nowhere."""

    output: str = ""
    gradient: str = ""  # on its way down from the loss
    before: float = 0.0  # sum of all outputs before `output`: equal for equal computations


@contextmanager
def traced(module: nn.Module) -> Iterator[Trace]:
    """Yield a trace that fills while `module` runs forward and backward."""
    trace = Trace()

    def watch(name: str) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if not trace.output and is_finite(output):
                trace.before += float(output.detach().double().sum())
            trace.output = trace.output or ("" if is_finite(output) else name)
            if output.requires_grad:
                output.register_hook(backward)  # type: ignore[no-untyped-call]

        def backward(gradient: Tensor) -> None:
            trace.gradient = trace.gradient or ("" if is_finite(gradient) else name)

        return after

    hooks = [
        part.register_forward_hook(watch(f"{name} ({type(part).__name__})"))
        for name, part in module.named_modules()
        if not list(part.children())
    ]
    try:
        yield trace
        trace.gradient = trace.gradient or _first_parameter(module)
    finally:
        for hook in hooks:
            hook.remove()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are numbers; reads the device."""
    return bool(torch.isfinite(tensor).all())


def _first_parameter(module: nn.Module) -> str:
    """Return the parameter nearest to the loss whose gradient is no finite number."""
    wrong = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not is_finite(parameter.grad)
    ]
    return wrong[-1] if wrong else ""
