"""What keeps a run from going on with numbers that are none: where it was sound, and the way back.

A step without a finite gradient is skipped (`train.step`). When that persists, or when an epoch
ends with weights or losses that are no numbers, the run returns to the start of the epoch with half
the learning rate, and trains the same samples again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hsrloop.events import RolledBack
from hsrloop.model.yolo import forward_eval, norms_in_eval
from hsrloop.records import Batch, Position
from hsrloop.train.precision import untuned
from hsrloop.train.snapshot import Snapshot
from hsrloop.train.state import TrainState, mean_losses

# Steps in a row that must be skipped to go back. Loss scaling skips some by itself: sixteen bring
# its scale from 65536 to 1.
IN_A_ROW = 8
IN_A_ROW_SCALED = 20
MOST_ROLLBACKS = 3
LESS_LR = 0.5
LESS_SCALE = 1 / 16  # of the loss in fp16
LAG = 4  # steps; by then the device has long finished, and the host waits for nothing (a guess)
TRIAL_PX = 64  # side of the picture that shows whether a network still gives numbers

# What training moves within an epoch; the rest of the state is what the run has learnt about itself
# and its machine, and stays.
MOVED = (
    *("model", "ema", "optimizer", "scaler", "loss_sums", "position", "steps", "epoch_s"),
    *("torch_rng", "cuda_rng"),
)


@dataclass(frozen=True, slots=True)
class LastStep:
    """The samples of the newest step and where it began: what a capsule is made of."""

    start: Position
    micro_batches: Sequence[Batch]
    mosaic: bool
    lr: float


class Guard:
    """Watches the steps of a run, and holds the state it last was sound in, in host memory.

    It lives as long as the run; runtimes come and go.

    Args:
        run_dir: where the step that ends a run is kept.
        lag: steps after which the device's count is looked at; by default as the device needs.
    """

    def __init__(self, state: TrainState, run_dir: Path, *, lag: int | None = None) -> None:
        self.run_dir = run_dir
        cuda = state.device.type == "cuda"
        self.lag = (LAG if cuda else 0) if lag is None else lag
        self.last: LastStep | None = None
        self.due: str | None = None  # why the run must go back before anything else
        self._good = Snapshot()
        self._good_at: Position | None = None  # None: nothing is remembered
        sums = state.loss_sums
        self._seen = torch.zeros((self.lag + 1, *sums.shape), dtype=sums.dtype, pin_memory=cuda)
        self._events = [_event() if cuda else None for _ in self._seen]
        self._steps = self._begun = 0  # steps taken, and those before `begin`

    def begin(self, state: TrainState) -> None:
        """Remember the state, when an epoch starts or nothing is remembered yet.

        Memory is taken by the first call only.
        """
        self._begun = self._steps
        if self._good_at is None or state.position.sample == 0:
            self._take(state)

    def persists(self, state: TrainState) -> bool:
        """Look whether steps have been skipped for too long; called after each step.

        On CUDA it sees the count of LAG steps ago, and waits only if that is too high.
        """
        slot = self._steps % len(self._seen)
        self._seen[slot].copy_(state.loss_sums, non_blocking=True)
        if (event := self._events[slot]) is not None:
            event.record()
        self._steps += 1
        oldest = self._steps % len(self._seen)
        if (event := self._events[oldest]) is not None:
            event.synchronize()
        most = most_in_a_row(state)
        return float(self._seen[oldest, 5]) >= most and float(state.loss_sums[5]) >= most

    def losses(self, state: TrainState) -> dict[str, float]:
        """Return what `TrainState.mean_losses` does, as of the newest step known to be over.

        That may be LAG steps ago. The device is waited for when no step since `begin` is over yet.
        """
        recent = range(self._steps - 1, max(self._begun, self._steps - len(self._seen)) - 1, -1)
        for slot in (step % len(self._seen) for step in recent):
            event = self._events[slot]
            if event is None or event.query():  # type: ignore[no-untyped-call]
                return mean_losses(self._seen[slot])
        return state.mean_losses()

    def can_go_back(self, state: TrainState) -> bool:
        """Return whether there is somewhere to go back to, and it was not tried too often."""
        return self._good_at is not None and len(state.rollbacks) < MOST_ROLLBACKS

    def go_back(self, state: TrainState) -> RolledBack:
        """Return to where the run was sound, with a lower scale; what is `due` is done then.

        Memory may run out on the way: nothing but what `MOVED` names has changed then, and a second
        call does it all.
        """
        assert self.due is not None
        step = state.steps
        self._good.restore(state, only=MOVED)
        scaler = state.scaler.state_dict()
        if scaler:
            scaler["scale"] *= LESS_SCALE
            state.renew_scaler(scaler)
        state.loss_sums[5] = 0
        state.lr_scale *= LESS_LR
        event = RolledBack(
            cause=self.due,
            number=len(state.rollbacks) + 1,
            most=MOST_ROLLBACKS,
            step=step,
            epoch=len(state.history),
            sample=state.position.sample,
            lr_scale=state.lr_scale,
            loss_scale=float(scaler.get("scale", 1.0)),
        )
        state.rollbacks.append(event.to_json())
        self.due = self.last = None
        self._take(state)  # with the lower scales
        return event

    def _take(self, state: TrainState) -> None:
        self._good_at = None
        self._good.take(state)
        self._good_at = state.position


def _event() -> torch.cuda.Event:
    # The host sleeps until it is due; waiting busily it would take a core from the loader.
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def most_in_a_row(state: TrainState) -> int:
    """Return how many skipped steps in a row are too many."""
    return IN_A_ROW_SCALED if state.amp else IN_A_ROW


def unsound(state: TrainState) -> str | None:
    """Return what is wrong with a state that must not be validated or saved; None: nothing.

    Reads the device. Weights can be finite and too large to compute with: so a picture is tried.
    """
    *losses, steps, skipped, in_a_row = state.loss_sums.tolist()
    most = most_in_a_row(state)
    if in_a_row >= most:
        return f"{in_a_row:.0f} steps in a row had no finite loss and gradient"
    if skipped >= most and skipped > steps:
        return f"{skipped:.0f} of {steps + skipped:.0f} steps had no finite loss and gradient"
    if not all(math.isfinite(value) for value in losses):
        return "the loss is no finite number"
    for module in (state.model, state.ema.module):
        floats = [t for t in module.state_dict().values() if t.is_floating_point()]
        # A sum of magnitudes is no finite number if one of them is none; few kernels add all up.
        if not bool(torch.isfinite(torch.stack(torch._foreach_norm(floats, 1))).all()):
            return "the weights are no finite numbers"
        if not computes(module):
            return "the weights are too large to compute with"
    return None


def computes(module: nn.Module) -> bool:
    """Return whether a network gives finite numbers for a fixed picture, in eval mode."""
    like = next(module.parameters())
    ramp = torch.linspace(0, 1, 3 * TRIAL_PX**2, dtype=like.dtype, device=like.device)
    with norms_in_eval(module, when=True), untuned():
        raw = forward_eval(module, ramp.view(1, 3, TRIAL_PX, TRIAL_PX))
    return bool(torch.isfinite(raw.class_logits).all() & torch.isfinite(raw.box_logits).all())
