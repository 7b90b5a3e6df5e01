"""Take the step of a capsule again, and find where its numbers stop being finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hsrloop.errors import CheckpointError
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.model.blueprint import from_blueprint
from hsrloop.train.build import build_state, step_settings
from hsrloop.train.capsule import Capsule, Measured, measure
from hsrloop.train.guard import computes
from hsrloop.train.loop import set_modes
from hsrloop.train.precision import set_kernels
from hsrloop.train.resume import current_versions
from hsrloop.train.state import TrainState
from hsrloop.train.trace import traced


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of a step's second life."""

    recorded: Measured
    measured: Measured
    norms: dict[str, float]  # of the gradient, by parameter group
    first_in_eval: str  # module whose output is no finite number in eval mode; empty: none
    differences: tuple[str, ...]  # why it need not be equal bit by bit

    @property
    def equal(self) -> bool:
        """Return whether every number is the recorded one, to the last bit."""
        return self.measured.same(self.recorded)

    @property
    def reproduces(self) -> bool:
        """Return whether the same happened: bit by bit where that can be asked for."""
        return self.measured.like(self.recorded) if self.differences else self.equal


def replay(capsule: Capsule, *, device_name: str | None = None, float32: bool = False) -> Replayed:
    """Compute a capsule's step up to its gradient.

    Args:
        device_name: "cpu", "cuda" or "cuda:N"; None: the kind it was written on.
        float32: without mixed precision.

    Raises:
        DeviceError: no such device here.
        CheckpointError: the capsule's parts do not fit each other.
    """
    info = probe(device_name or capsule.device)
    device = torch.device(torch_device(info))
    set_kernels(device, deterministic=capsule.config.deterministic)
    torch.set_num_threads(capsule.threads)  # sums on the CPU depend on it
    module = from_blueprint(capsule.network, names=capsule.names)
    amp_dtype = None if float32 else _amp_dtype(capsule)
    state = build_state(
        capsule.config,
        module,
        device,
        fresh_share=capsule.fresh_share,
        amp=amp_dtype is torch.float16,
    )
    state.load_file(capsule.state)
    set_modes(state, capsule.config)
    as_written = capsule.config.replace(compile="off")  # so that layers can be looked at
    settings = step_settings(as_written, module, device, amp_dtype=amp_dtype)
    try:
        measured = measure(state, capsule.batches, settings)
    except (ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"the capsule's batch cannot be trained on ({error}).") from error
    return Replayed(
        recorded=capsule.measured,
        measured=measured,
        norms=_norms(state),
        first_in_eval=_first_in_eval(state),
        differences=_differences(capsule, device, float32=amp_dtype is None),
    )


def _amp_dtype(capsule: Capsule) -> torch.dtype | None:
    """Return the type of mixed precision that the step was computed in; None: float32."""
    if capsule.amp:
        return torch.float16
    config = capsule.config
    bf16 = capsule.device == "cuda" and config.amp and config.amp_dtype == "bf16"
    return torch.bfloat16 if bf16 else None


def _first_in_eval(state: TrainState) -> str:
    for whose, module in (("weights", state.model), ("averaged weights", state.ema.module)):
        with traced(module) as trace:
            if not computes(module):
                return f"{trace.output}, of the {whose}"
    return ""


def _norms(state: TrainState) -> dict[str, float]:
    norms = {}
    for group in state.optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norms[str(group["name"])] = float(nn.utils.get_total_norm(gradients))
    return norms


def _differences(capsule: Capsule, device: torch.device, *, float32: bool) -> tuple[str, ...]:
    """Return what keeps the numbers from being equal bit by bit."""
    found: list[str] = []
    if device.type != capsule.device:
        found.append(f"device {capsule.device} then, {device.type} now")
    elif device.type == "cuda" and not capsule.config.deterministic:
        found.append("kernels on CUDA were not deterministic")
    if float32 and _amp_dtype(capsule) is not None:
        found.append("mixed precision then, float32 now")
    versions, _ = current_versions()
    found += [
        f"{name} {value} then, {versions.get(name)} now"
        for name, value in capsule.versions.items()
        if versions.get(name) != value
    ]
    return tuple(found)
