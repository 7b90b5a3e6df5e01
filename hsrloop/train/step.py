"""One optimizer step: micro-batches in, a committed change of the weights out, or no change at all.

The gradient of a step is a sum over its samples, normalised once: un-normalised loss sums are
accumulated over micro-batches, and before clipping the gradient is multiplied by
n / (k * max(S, 1)), where n counts the samples, S is the sum of target scores over all of them and
k the constant that keeps fp16 gradients in range. How a batch is split changes nothing but
BatchNorm's statistics and rounding.

A step whose loss or gradient is no finite number moves the position and nothing else. On CUDA that
is decided on the device, so that the host need not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.model.yolo import forward_train, norms_in_eval
from hsrloop.ops.loss import (
    GAINS,
    LossSums,
    PaddedTargets,
    detection_loss,
    loss_kernels,
    pad_targets,
)
from hsrloop.ops.loss_gpu import suits
from hsrloop.ops.ranges import named
from hsrloop.ops.schedule import ema_decay
from hsrloop.records import Batch, Position, RawPredictions
from hsrloop.train.compiled import Compiled
from hsrloop.train.state import Commit, TrainState

PLACES = 512
"""For boxes in an image, where the criterion is computed by kernels: its shapes do not follow the
boxes then, and sums are added up in one order. Denser batches have as many as they need."""

MAX_GRADIENT_NORM = 10.0  # Source: ultralytics@8.4.190, trainer's optimizer_step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What a step needs to know that does not change while the runtime stands."""

    device: torch.device
    strides: tuple[int, ...]
    reg_max: int
    amp: bool  # autocast to `amp_dtype`; in fp16 gradients are scaled too
    ema_decay: float
    ema_tau: float
    dtype: torch.dtype = torch.float32  # of inputs and weights; float64 in tests of exactness
    amp_dtype: torch.dtype = torch.float16
    compiled: Compiled | None = None

    @property
    def input_dtype(self) -> torch.dtype:
        """What images are given as: the first convolution's type, whose bits a cast would give."""
        return self.amp_dtype if self.amp else self.dtype

    @property
    def network(self) -> Callable[[nn.Module, Tensor], RawPredictions]:
        """`forward_train`, compiled where that is wanted."""
        return forward_train if self.compiled is None else self.compiled.forward

    @property
    def criterion(self) -> Callable[..., LossSums]:
        """`detection_loss`, compiled where that is wanted."""
        return detection_loss if self.compiled is None else self.compiled.loss


@dataclass(frozen=True, slots=True)
class _Block:
    """Buffers of one type, and twice as much memory in one piece: few kernels move all of them."""

    buffers: list[Tensor]
    kept: Tensor  # (n,)
    kept_views: list[Tensor]
    now: Tensor  # (n,)
    now_views: list[Tensor]

    @classmethod
    def of(cls, buffers: list[Tensor]) -> _Block:
        sizes = [b.numel() for b in buffers]
        kept, now = (buffers[0].new_empty(sum(sizes)) for _ in range(2))
        kept_views, now_views = (
            [v.view(b.shape) for v, b in zip(torch.split(m, sizes), buffers, strict=True)]
            for m in (kept, now)
        )
        return cls(buffers, kept, kept_views, now, now_views)


class Transaction:
    """What undoes an uncommitted step: a shadow copy of BatchNorm's buffers.

    Buffers are copied into memory allocated once. `begin` before a step, `roll_back` after a
    failure; weights, optimizer and EMA need no copy, since they change only once a step commits.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        buffers = list(state.model.buffers())
        kinds = dict.fromkeys(b.dtype for b in buffers)
        self._blocks = [_Block.of([b for b in buffers if b.dtype is kind]) for kind in kinds]
        self.begin()

    @property
    def shadow(self) -> Sequence[Tensor]:
        """Memory that lies on the device for as long as this lives."""
        return [memory for block in self._blocks for memory in (block.kept, block.now)]

    @torch.no_grad()
    def begin(self) -> None:
        """Remember where the next step starts from."""
        for block in self._blocks:
            torch._foreach_copy_(block.kept_views, block.buffers)

    @torch.no_grad()
    def undo_buffers(self, skipped: Tensor) -> None:
        """Where `skipped` (a () bool on the device) is True, put BatchNorm back as it was.

        A forward that overflows leaves NaN in the running statistics.
        """
        for block in self._blocks:
            torch._foreach_copy_(block.now_views, block.buffers)
            torch.where(skipped, block.kept, block.now, out=block.now)
            torch._foreach_copy_(block.buffers, block.now_views)

    @torch.no_grad()
    def roll_back(self) -> None:
        """Return to where `begin` was called; gradients are dropped."""
        for block in self._blocks:
            torch._foreach_copy_(block.buffers, block.kept_views)
        self._state.optimizer.zero_grad(set_to_none=True)
        # The scale changes only after the commit; what must go is the mark "already unscaled".
        self._state.renew_scaler(self._state.scaler.state_dict())


def train_step(
    state: TrainState,
    micro_batches: Iterable[Batch],
    *,
    settings: StepSettings,
    lr: float,
    transaction: Transaction | None = None,
) -> int:
    """Run one optimizer step and commit it.

    Args:
        state: changed in place, from the commit on.
        micro_batches: the samples of this step, the last one with `ends_step`.
        settings: constants of the runtime.
        transaction: begun before this step; needed to undo what a step that is no finite number
            leaves in BatchNorm.
        lr: learning rate of this step, warm-up included; each group multiplies it by its lr_scale.

    Returns:
        The number of samples trained.
    """
    sought = accumulate(state, micro_batches, settings)
    skipped = clip(state, sought.totals)
    set_rates(state, lr)
    commit = Commit(
        samples=sought.samples,
        after=sought.after,
        totals=sought.totals,
        normaliser=sought.normaliser,
        skipped=skipped,
        ema_decay=ema_decay(state.steps + 1, decay=settings.ema_decay, tau=settings.ema_tau),
    )
    with named("optimizer"):
        step_unless(skipped, state.optimizer)  # the commit point
    state.commit = commit
    finish_commit(state, transaction)
    return sought.samples


@dataclass(frozen=True, slots=True)
class Sought:
    """What a step's samples ask for; the gradient itself lies in the parameters' `grad`."""

    samples: int
    after: Position
    totals: LossSums
    normaliser: Tensor  # () max(S, 1)


def trained_parameters(state: TrainState) -> list[nn.Parameter]:
    """Return the parameters that the optimizer moves."""
    return [p for group in state.optimizer.param_groups for p in group["params"]]


def accumulate(state: TrainState, micro_batches: Iterable[Batch], settings: StepSettings) -> Sought:
    """Leave in `grad` the normalised gradient of a step's samples, not clipped yet."""
    totals: LossSums | None = None
    samples = 0
    for batch in micro_batches:
        totals = add_detached(totals, forward_backward(state, batch, settings))
        samples += len(batch.images)
        after = batch.after
    if totals is None:
        raise ValueError("a step needs at least one micro-batch")
    normaliser = normalise(state, totals, samples / state.grad_scale)
    return Sought(samples, after, totals, normaliser)


def normalise(state: TrainState, totals: LossSums, factor: float | Tensor) -> Tensor:
    """Multiply the gradients by factor / max(S, 1), the scaler's scale taken out; return max(S, 1).

    Args:
        factor: samples / k.
    """
    state.scaler.unscale_(state.optimizer)
    normaliser = totals.target_scores.clamp(min=1.0)
    gradients = [p.grad for p in trained_parameters(state) if p.grad is not None]
    # So a number is divided by a tensor; a tensor by a tensor would be rounded otherwise.
    torch._foreach_mul_(gradients, normaliser.reciprocal() * factor)
    return normaliser


def clip(state: TrainState, totals: LossSums) -> Tensor:
    """Clip the gradients; return whether they or the loss are no finite numbers, () bool."""
    with named("optimizer"):
        norm = nn.utils.clip_grad_norm_(trained_parameters(state), MAX_GRADIENT_NORM)
    both = norm + GAINS.weigh(totals)  # no finite number if one of them is none
    return both - both != 0


def set_rates(state: TrainState, lr: float) -> list[float]:
    """Set and return each parameter group's learning rate.

    On CUDA it is the nearest float32: so a recorded step, which reads it on the device, moves
    weights as any other.
    """
    rates = [lr * group["lr_scale"] for group in state.optimizer.param_groups]
    if state.device.type == "cuda":
        rates = torch.tensor(rates).tolist()
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return rates


def step_unless(skipped: Tensor, optimizer: Any) -> None:
    """Step, unless `skipped`: fused optimizers look at `found_inf` on the device.

    Source: torch@2.15, amp/grad_scaler.py, which hands it over in the same way.
    """
    optimizer.found_inf = skipped.float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def finish_commit(state: TrainState, transaction: Transaction | None) -> None:
    """Do what is left of `state.commit`, from where it stopped, and forget it."""
    commit = state.commit
    assert commit is not None, "no step is in progress"

    def average() -> None:
        state.ema.update(state.model, commit.ema_decay, skipped=commit.skipped)

    verdict = commit.totals, commit.normaliser, commit.skipped
    for part in after_the_weights(state, transaction, verdict, average)[commit.done :]:
        part()
        commit.done += 1
    state.steps += 1
    state.position = commit.after
    state.commit = None


def after_the_weights(
    state: TrainState,
    transaction: Transaction | None,
    verdict: tuple[LossSums, Tensor, Tensor],
    average: Callable[[], None],
) -> Sequence[Callable[[], None]]:
    """Return the device's work that a step ends with once its weights have moved, in order.

    Args:
        verdict: the step's sums, max(S, 1) and whether it was skipped.
        average: moves the EMA.
    """
    _, _, skipped = verdict

    def restore_norms() -> None:
        if transaction is not None:
            transaction.undo_buffers(skipped)

    return (
        restore_norms,
        lambda: state.scaler.update(),
        lambda: state.optimizer.zero_grad(set_to_none=True),
        average,
        lambda: state.record_losses(*verdict),
    )


def forward_backward(state: TrainState, batch: Batch, settings: StepSettings) -> LossSums:
    """Add one micro-batch's gradient of k times its un-normalised loss; return its sums."""
    images = to_input(batch.images, settings.device, settings.input_dtype)
    targets = to_targets(batch, settings)
    single = is_single(len(images), images.shape[-1], settings)
    with (
        named("forward"),
        torch.autocast(settings.device.type, settings.amp_dtype, enabled=settings.amp),
        norms_in_eval(state.model, when=single),  # one value a channel has no variance
    ):
        raw = settings.network(state.model, images)
    sums = settings.criterion(raw, settings.strides, targets, reg_max=settings.reg_max)
    with named("backward"):
        torch.autograd.backward(_minimised(state, sums))
    return sums


def _minimised(state: TrainState, sums: LossSums) -> Tensor:
    """Return k times a micro-batch's un-normalised loss, scaled; 0-dim, for a backward pass."""
    return state.scaler.scale(GAINS.weigh(sums) * state.grad_scale)


def is_single(images: int, imgsz: int, settings: StepSettings) -> bool:
    """Return whether the coarsest level of a pass has one cell in all: BatchNorm needs more."""
    return images * (imgsz // max(settings.strides)) ** 2 == 1


def to_input(images: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 (B, 3, S, S) images in [0, 1] as `dtype` on `device`, channels_last."""
    moved = images.to(device, non_blocking=True)
    return moved.to(dtype, memory_format=torch.channels_last).div_(255.0)


def to_targets(batch: Batch, settings: StepSettings) -> PaddedTargets:
    """Return a batch's boxes as the criterion takes them, on the device."""
    images, _, _, imgsz = batch.images.shape
    kernels = by_kernels(settings)
    return pad_targets(
        batch.boxes_cxcywh,
        batch.labels,
        batch.image_index,
        images=images,
        imgsz=imgsz,
        places=PLACES if kernels else 0,
        segments=not kernels,
    ).to(settings.device)


def by_kernels(settings: StepSettings) -> bool:
    """Return whether the criterion is computed by kernels of its own."""
    if settings.dtype is torch.float64 or not suits(settings.strides, reg_max=settings.reg_max):
        return False
    return loss_kernels(settings.device) is not None


def back_to_logits(
    raw: RawPredictions, targets: PaddedTargets, state: TrainState, settings: StepSettings
) -> tuple[LossSums, tuple[Tensor, ...]]:
    """Return a micro-batch's sums, and the gradient of k times its un-normalised loss by logits.

    Args:
        raw: without gradient.
    """
    box, cls = (logits.detach().requires_grad_() for logits in (raw.box_logits, raw.class_logits))
    alone = RawPredictions(box, cls, raw.shapes)
    sums = settings.criterion(alone, settings.strides, targets, reg_max=settings.reg_max)
    with named("backward"):
        return sums, torch.autograd.grad(_minimised(state, sums), (box, cls))


def add_detached(total: LossSums | None, sums: LossSums) -> LossSums:
    """Add loss sums without their graphs."""
    parts = [part.detach() for part in sums.parts]
    if total is not None:
        parts = [a + b for a, b in zip(total.parts, parts, strict=True)]
    return LossSums(*parts)
