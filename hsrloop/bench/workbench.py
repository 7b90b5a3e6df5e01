"""Everything a run stands on, built as a run builds it, to be measured piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hsrloop.config import AUTO, Resolved, TrainConfig
from hsrloop.data.sets.dataset import DatasetSpec
from hsrloop.errors import WeightsError
from hsrloop.events import Event, Note
from hsrloop.hardware.contention import SpinGovernor
from hsrloop.hardware.probe import probe, torch_device
from hsrloop.model.weights import OFFICIAL, find_weights
from hsrloop.model.yolo import class_outputs
from hsrloop.ops.nvrtc import compile_ahead
from hsrloop.records import Batch, DeviceInfo, Position
from hsrloop.train.build import (
    KERNELS,
    Built,
    Loaders,
    dataset_of,
    load_data,
    load_model,
)
from hsrloop.train.graphs import StepGraphs
from hsrloop.train.guard import Guard
from hsrloop.train.loop import set_modes
from hsrloop.train.precision import set_kernels
from hsrloop.train.recovery import find_first_rung, must_fit, with_recovery
from hsrloop.train.rehearsal import Rehearsal
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, Transaction

Emit = Callable[[Event], None]
_QUIETER = 3.0  # logits
LR = 1e-6  # steps that are only timed must not lead anywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """State, settings and loaders of a run that has not begun."""

    config: TrainConfig
    info: DeviceInfo
    spec: DatasetSpec
    state: TrainState
    settings: StepSettings
    transaction: Transaction
    graphs: StepGraphs
    guard: Guard
    loaders: Loaders
    governor: SpinGovernor | None
    emit: Emit

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.settings.device

    def step(self, batches: list[Batch], *, lr: float = LR) -> None:
        """Take one optimizer step as the loop takes it."""
        self.graphs.begin(self.transaction)
        self.graphs.train_step(
            self.state, batches, settings=self.settings, lr=lr, transaction=self.transaction
        )
        self.guard.persists(self.state)
        self.observe()

    def observe(self) -> None:
        """Let threads spin as the machine allows; to be called after each thing that is timed."""
        if self.governor is not None:
            self.governor.observe()

    def first_step(self) -> list[Batch]:
        """Return the micro-batches of the first step, their images on the device already."""
        batches = []
        for batch in self.loaders.train.batches(Position(0, 0)):
            batches.append(dataclasses.replace(batch, images=batch.images.to(self.device)))
            if batch.ends_step:
                break
        return batches

    def resident(self) -> Iterator[Tensor]:
        """Yield every tensor of the run that lies on the device between steps."""
        state = self.state
        for module in (state.model, state.ema.module):
            yield from module.parameters()
            yield from module.buffers()
        for entry in state.optimizer.state.values():
            yield from (value for value in entry.values() if isinstance(value, Tensor))
        yield state.loss_sums
        yield from self.transaction.shadow


@contextmanager
def workbench(resolved: Resolved, emit: Emit) -> Iterator[Workbench]:
    """Build it, and release it afterwards.

    Weights that are not on this machine are replaced by an untrained network of the same shape,
    which costs the same: its head is made to be as sure of nothing as a trained one is of most.

    Memory that runs out is answered as a run answers it: what is measured is what would train.

    Raises:
        HsrloopError: as a run would raise; also when memory runs out later.
    """
    resolved = at_hand(resolved, emit)
    config = resolved.config
    info = probe(config.device)
    device = torch.device(torch_device(info))
    set_kernels(device, deterministic=config.deterministic)
    compile_ahead(KERNELS, device)
    spec, synthesis = load_data(config, dataset_of(resolved))
    resolved, base = load_model(resolved, spec.names, emit)
    config = resolved.config
    if config.model.endswith(".yaml"):
        _quieten(base.module)
    with must_fit(info):
        built = Built.of(resolved, spec, synthesis, info, base.module, fresh_share=1.0, emit=emit)
    state, settings = built.state, built.settings
    transaction, graphs = Transaction(state), StepGraphs()
    governor = SpinGovernor() if device.type == "cpu" else None
    try:
        with must_fit(info, when="while measuring"), _settled(built, transaction, emit) as loaders:
            graphs.prepare(state, settings, transaction, loaders.train.sizes, emit)
            yield Workbench(
                config=config,
                info=info,
                spec=spec,
                state=state,
                settings=settings,
                transaction=transaction,
                graphs=graphs,
                guard=Guard(state, Path()),  # no step is bad enough to be kept
                loaders=loaders,
                governor=governor,
                emit=emit,
            )
    finally:
        if governor is not None:
            governor.close()


def _settled(built: Built, transaction: Transaction, emit: Emit) -> Loaders:
    """Return loaders on the rung that a run would come to before its first step."""
    config = built.resolved.config
    rehearsal = Rehearsal.of(built, transaction, emit)
    find_first_rung(rehearsal, built.images, choose=config.micro_batch == AUTO)
    fitting: list[Loaders] = []

    def attempt() -> str:
        with ExitStack() as closing:
            loaders = closing.enter_context(built.loaders(emit))
            rehearsal.run()
            closing.pop_all()
        fitting.append(loaders)
        return "fits"

    with_recovery(attempt, built.state, transaction, config=config, info=built.info, emit=emit)
    set_modes(built.state, config)  # which depends on the micro-batch
    if built.settings.compiled is not None:
        built.settings.compiled.micro_batch = built.state.rung.micro_batch
    return fitting[0]


def _quieten(module: nn.Module) -> None:
    """Lower class scores below what counts as a detection.

    Of an untrained network all of some levels' points lie just above it: ten times as many
    candidates as a trained network has.
    """
    with torch.no_grad():
        for out in class_outputs(module):
            assert out.bias is not None
            out.bias.sub_(_QUIETER)


def at_hand(resolved: Resolved, emit: Emit) -> Resolved:
    """Return the settings, an official model that is not on this machine replaced by its .yaml."""
    model = resolved.config.model
    if model not in OFFICIAL:
        return resolved
    try:
        find_weights(model, download=False)
    except WeightsError:
        untrained = model.replace(".pt", ".yaml")
        emit(Note(text=f"{model} is not at hand: measuring an untrained {untrained}"))
        return Resolved(resolved.config.replace(model=untrained), resolved.sources)
    return resolved
