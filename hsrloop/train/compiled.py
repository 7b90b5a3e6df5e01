"""The network and the criterion as torch.compile makes them, where that is worth its time."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.config import TrainConfig
from hsrloop.errors import DependencyError
from hsrloop.events import Event, Note
from hsrloop.model.yolo import forward_train
from hsrloop.ops.assign import assign
from hsrloop.ops.loss import LossSums, PaddedTargets, detection_loss
from hsrloop.records import RawPredictions

COMPILE_S = 90.0  # until both are compiled (a guess: 31 s to capture yolov8n alone, 2 CPU cores)
GAIN = 0.15  # share of a step's time that it saves on a GPU (a guess)


def worth_compiling(
    *, steps_left: int, step_s: float, compile_s: float = COMPILE_S, gain: float = GAIN
) -> bool:
    """Return whether what is left of a run saves more time than compiling costs."""
    return steps_left * step_s * gain > compile_s


class Compiled:
    """Runs network and criterion compiled from `start` on; a run may decide on it late.

    Batches of another size than the run's, such as an epoch's last, are computed as ever: they are
    not worth a compilation of their own. The assignment is left out, since its shapes change with
    every batch, and so is a criterion that consists of kernels of its own.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, *, backend: str = "inductor") -> None:
        self.micro_batch = 0  # images in an ordinary forward pass, as they are now
        self._backend = backend
        self._network: Callable[[nn.Module, Tensor], RawPredictions] | None = None
        self._criterion: Callable[..., LossSums] | None = None
        self._assigner: Any = assign

    @property
    def started(self) -> bool:
        """Whether forward passes are compiled from now on."""
        return self._network is not None

    def start(self) -> None:
        """Compile at the next use."""
        self._assigner = torch.compiler.disable(assign)  # type: ignore[no-untyped-call]
        self._network = torch.compile(forward_train, backend=self._backend, dynamic=False)
        self._criterion = torch.compile(detection_loss, backend=self._backend, dynamic=True)

    def forward(self, module: nn.Module, images: Tensor) -> RawPredictions:
        """Run the network, as `forward_train`."""
        if self._network is None or len(images) != self.micro_batch:
            return forward_train(module, images)
        return self._network(module, images)

    def loss(
        self, raw: RawPredictions, strides: tuple[int, ...], targets: PaddedTargets, *, reg_max: int
    ) -> LossSums:
        """Run the criterion, as `detection_loss`."""
        unusual = len(raw.class_logits) != self.micro_batch or targets.segments is None
        if self._criterion is None or unusual:
            return detection_loss(raw, strides, targets, reg_max=reg_max)
        return self._criterion(raw, strides, targets, reg_max=reg_max, assigner=self._assigner)


def compiled_for(
    config: TrainConfig,
    device: torch.device,
    *,
    find: Callable[[str], Any] = importlib.util.find_spec,
    which: Callable[[str], str | None] = shutil.which,
) -> Compiled | None:
    """Return what `config.compile` asks for; None where nothing will be compiled.

    "auto" means off on the CPU, where it was slower (12 times, measured), without a compiler, and
    with deterministic kernels: when it starts depends on the clock.

    Raises:
        DependencyError: it is on, and there is nothing to compile with.
    """
    missing = [] if which("cc") or which("gcc") else ["a C compiler (apt install gcc)"]
    if device.type == "cuda" and find("triton") is None:
        missing.append("triton (pip install triton)")
    if config.compile == "on":
        if missing:
            raise DependencyError(f"--compile on needs {' and '.join(missing)}, or drop it.")
        compiled = Compiled()
        compiled.start()
        return compiled
    hopeless = device.type == "cpu" or bool(missing) or config.deterministic
    if config.compile == "off" or hopeless:
        return None
    return Compiled()


def consider(
    compiled: Compiled | None,
    *,
    micro_batch: int,
    steps_left: int,
    step_s: float,
    emit: Callable[[Event], None],
) -> None:
    """Start compiling when it is worth it, and say so.

    Args:
        micro_batch: images in a forward pass from now on.
        step_s: seconds of a step so far; 0: not known yet.
    """
    if compiled is None:
        return
    compiled.micro_batch = micro_batch
    if not compiled.started and worth_compiling(steps_left=steps_left, step_s=step_s):
        compiled.start()
        saved = (steps_left * step_s * GAIN - COMPILE_S) / 60
        emit(Note(text=f"compiling the network: that should save about {saved:.0f} minutes"))
