"""The bare step: forward, criterion, backward and optimizer on images that lie on the device.

It is computed in the way that is fastest here, recorded as CUDA graphs where a run's steps are; so
is the forward pass of a validation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hsrloop.bench.meters import Work, repeat
from hsrloop.bench.workbench import Workbench
from hsrloop.model.yolo import forward_levels
from hsrloop.ops.loss import GAINS
from hsrloop.records import Batch
from hsrloop.train.recording import rates_on_device, recorder_for
from hsrloop.train.step import to_input, to_targets, trained_parameters


def bare_step(bench: Workbench, batches: list[Batch]) -> Work:
    """Return what takes bare steps on these micro-batches."""
    if bench.graphs.covers(batches):
        return repeat(_recorded(bench, batches))
    return repeat(_plain(bench, batches))


def bare_forward(bench: Workbench, module: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """Return what takes a bare forward pass of a validation."""

    def once() -> object:
        return forward_levels(module, inputs)

    recorder = None if bench.graphs.detections is None else recorder_for(bench.device)
    if recorder is None:
        return once
    recorder.warm(once)
    return recorder.record(once)[0]


def _plain(bench: Workbench, batches: list[Batch]) -> Callable[[], None]:
    device, state, settings = bench.device, bench.state, bench.settings
    prepared = [
        (to_input(batch.images, device, settings.input_dtype), to_targets(batch, settings))
        for batch in batches
    ]

    def once() -> None:
        for inputs, targets in prepared:
            with torch.autocast(settings.device.type, settings.amp_dtype, enabled=settings.amp):
                raw = settings.network(state.model, inputs)
            sums = settings.criterion(raw, settings.strides, targets, reg_max=settings.reg_max)
            loss = GAINS.weigh(sums) / sums.target_scores.clamp(min=1)
            torch.autograd.backward(state.scaler.scale(loss))
        for group in state.optimizer.param_groups:
            group["lr"] = 0.0
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)

    return once


def _recorded(bench: Workbench, batches: list[Batch]) -> Callable[[], None]:
    graphs, state, settings = bench.graphs, bench.state, bench.settings
    recorder = recorder_for(bench.device)
    assert recorder is not None, "what records steps was there"
    still = torch.zeros(len(state.optimizer.param_groups), device=bench.device)

    def optimize() -> None:
        for parameter, gradient in zip(trained_parameters(state), graphs.gradients, strict=True):
            parameter.grad = gradient
        with rates_on_device(state.optimizer, list(still.unbind())):
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        torch._foreach_zero_(graphs.gradients)

    graphs.accumulate(state, batches, settings)
    recorder.warm(optimize)
    replay, _ = recorder.record(optimize)

    def once() -> None:
        graphs.accumulate(state, batches, settings)
        replay()

    return once
