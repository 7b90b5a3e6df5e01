"""What changes and what must not when a run goes on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hsrloop.config import AUTO, COMMAND_LINE, Resolved, TrainConfig
from hsrloop.data.scenes.synthesis import Synthesis
from hsrloop.data.sets.dataset import DatasetSpec
from hsrloop.errors import CheckpointError, WeightsError
from hsrloop.events import Event, Note
from hsrloop.paths import expanded, has_folder, is_file
from hsrloop.records import Position, Rung
from hsrloop.train import checkpoint
from hsrloop.train.build import first_rung
from hsrloop.train.checkpoint import LAST, PREVIOUS, RunIdentity, Saved, versions
from hsrloop.train.ladder import given_up
from hsrloop.train.state import TrainState

# What may change when a run goes on; everything else was decided when it started.
CHANGEABLE = frozenset(
    {"epochs", "patience", "micro_batch", "workers", "cache", "device", "dataset"}
    | {"augment_device"}
    | {"annotated_dir", "backgrounds_dir", "distractors_dir"}
    | {"save_period", "checkpoint_minutes", "tensorboard", "tensorboard_port", "export", "profile"}
    | {"trust_checkpoint", "oom_recovery", "rehearsal", "compile", "cuda_graphs"}
)


def read_newest(path: Path, emit: Callable[[Event], None], *, trust: bool) -> Saved:
    """Read the checkpoint to go on from; in place of a damaged last.pt the one before it.

    Raises:
        CheckpointError, WeightsError: as `checkpoint.read`.
    """
    try:
        return checkpoint.read(path, trust=trust)
    except (CheckpointError, WeightsError) as error:
        previous = path.with_name(PREVIOUS)
        if path.name != LAST or not is_file(previous):
            raise
        try:
            saved = checkpoint.read(previous, trust=trust)
        except (CheckpointError, WeightsError):
            raise error from None
        text = f"{error} The run goes on from the one before, {previous.name}."
    emit(Note(text=text, level="warning"))
    return saved


def resumed_settings(given: Resolved, saved: Saved, emit: Callable[[Event], None]) -> Resolved:
    """Return the saved run's settings with what the user may change, changed.

    Args:
        given: what the user gave now, over the defaults.
        saved: the checkpoint.
        emit: hears about what was given but cannot be changed.

    Raises:
        CheckpointError: fewer epochs asked for than are done, or another model.
    """
    config, sources = saved.identity.config, dict(saved.identity.sources)
    explicit = {k: v for k, v in given.sources.items() if v != "default"}
    changes: dict[str, Any] = {}
    for key, source in explicit.items():
        value = getattr(given.config, key)
        if value == getattr(config, key):
            if source == COMMAND_LINE:
                sources[key] = source  # it is meant now, if it was not before
            continue
        if key == "output":
            _say_where(saved, value, emit)
        elif key == "model":
            if _same_model(value, config.model):
                continue
            raise CheckpointError(
                f"{saved.path} is a run of {config.model}, not of {value}. "
                "Drop --model to go on with it, or drop --resume to start anew."
            )
        elif key in CHANGEABLE:
            changes[key] = value
            sources[key] = source
        else:
            emit(
                Note(
                    text=f"{key} stays {getattr(config, key)}: it was decided when the run started",
                    level="warning",
                )
            )
    done = len(saved.state["history"])
    if changes.get("epochs", config.epochs) < done:
        raise CheckpointError(
            f"--epochs {changes['epochs']} is less than the {done} epochs this run has done."
        )
    return Resolved(config.replace(**changes), sources)


def _same_model(one: str, other: str) -> bool:
    """Return whether two spellings mean one model; a bare name fits a path that ends in it."""
    paths = [text if os.path.splitext(text)[1] else f"{text}.pt" for text in (one, other)]
    if not all(has_folder(path) for path in paths):
        paths = [os.path.basename(path) for path in paths]
    return len({os.path.realpath(expanded(path)) for path in paths}) == 1


def _say_where(saved: Saved, output: str, emit: Callable[[Event], None]) -> None:
    """Warn that a run goes on where it is, when another folder is asked for."""
    run_dir = saved.path.absolute().parents[1]
    if os.path.realpath(expanded(output)) != os.path.realpath(run_dir.parent):
        text = f"output {output} is ignored: the run goes on in its own folder, {run_dir}"
        emit(Note(text=text, level="warning"))


def plans_anew(before: TrainConfig, now: TrainConfig) -> bool:
    """Return whether early stopping, if it ended the run, no longer holds."""
    patient = now.patience == 0 or now.patience > before.patience > 0
    return now.epochs != before.epochs or (patient and now.patience != before.patience)


def replace_best(state: TrainState, emit: Callable[[Event], None]) -> None:
    """Make up for a best.pt that is gone: by the weights as they are if they are validated.

    Else the next epoch is the best one.
    """
    if not state.history:
        return
    text = "weights/best.pt is gone: the next epoch takes its place"
    state.best_ap50_95, state.best_epoch = -1.0, len(state.history)
    if state.position == Position(len(state.history), 0):
        text = f"weights/best.pt is gone: epoch {len(state.history)}, the last one, takes its place"
        state.best_ap50_95 = float(state.history[-1]["ap50_95"])
        state.due.append("best.pt")
    emit(Note(text=text, level="warning"))


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a run that goes on was asked for before, and what now."""

    before: TrainConfig
    now: TrainConfig
    said: frozenset[str]  # settings on the command line now, changed or not

    @classmethod
    def of(cls, saved: Saved, given: Resolved, now: TrainConfig) -> Wishes:
        """Compare a checkpoint with what the user gave now; `now` is what became of both."""
        said = frozenset(key for key, source in given.sources.items() if source == COMMAND_LINE)
        return cls(saved.identity.config, now, said)

    def anew(self, name: str) -> bool:
        """Return whether the user wants a setting to hold from now on."""
        return name in self.said or self._changed(name)

    @property
    def choose(self) -> bool:
        """Return whether the micro-batch is to be chosen: not again if it was."""
        return self.now.micro_batch == AUTO and self.anew("micro_batch")

    def rung(self, state: TrainState) -> Rung:
        """Return the rung to go on from: the one that the run was on, with what is wanted anew.

        Where images are rendered, and by how many processes, follows from the machine: it is found
        out again, but for what memory ran out for.
        """
        rung, first, lost = state.rung, first_rung(self.now), given_up(state.recoveries)
        if not state.recoveries:  # another machine may have other cores
            chosen = not self.choose and self.now.micro_batch == AUTO
            size = rung.micro_batch if chosen else first.micro_batch
            return dataclasses.replace(first, micro_batch=size, val_batch=size)
        anew = {n for n in ("micro_batch", "cache", "workers", "cuda_graphs") if self.anew(n)}
        if "micro_batch" in anew:
            anew.add("val_batch")
        if self.anew("augment_device") or self._changed("device"):
            anew.add("bank")
        anew |= {"bank", "workers"} - lost
        return dataclasses.replace(rung, **{name: getattr(first, name) for name in anew})

    def _changed(self, name: str) -> bool:
        return bool(getattr(self.now, name) != getattr(self.before, name))


def restore(state: TrainState, saved: Saved, wishes: Wishes, emit: Callable[[Event], None]) -> None:
    """Let a run's state be that of its checkpoint, with what the user wants anew.

    Raises:
        CheckpointError: the checkpoint does not fit the state.
    """
    state.load_file(saved.state)
    state.rung = wishes.rung(state)
    if plans_anew(wishes.before, wishes.now):
        state.epochs_skipped = 0  # another plan, with another tail
    if not is_file(saved.path.with_name("best.pt")):
        replace_best(state, emit)


def check_same(saved: Saved, now: RunIdentity, emit: Callable[[Event], None]) -> None:
    """Compare what exactness depends on.

    Raises:
        CheckpointError: other classes or other data.
    """
    before = saved.identity
    if before.names != now.names:
        raise CheckpointError(
            f"{saved.path} was trained on the classes {', '.join(before.names)}; the data set has "
            f"{', '.join(now.names)}. Drop --resume and use --model to carry the weights over."
        )
    if before.fingerprint != now.fingerprint:
        raise CheckpointError(
            f"the images or labels of {now.config.dataset}, its cut-outs or backgrounds, changed "
            f"since {saved.path} was written. Restore them, or start a new run with --model on "
            "the new set."
        )
    differences = [
        f"{name} {value} then, {now.versions.get(name)} now"
        for name, value in before.versions.items()
        if now.versions.get(name) != value
    ]
    if before.threads != now.threads:
        differences.append(f"{before.threads} threads then, {now.threads} now")
    if differences:
        text = "not bit-identical to a run that was never stopped: " + "; ".join(differences)
        emit(Note(text=text, level="warning"))


def current_versions() -> tuple[dict[str, str], int]:
    """Return the versions and the thread count that exactness depends on."""
    return versions(), torch.get_num_threads()


def identity_of(
    resolved: Resolved, spec: DatasetSpec, synthesis: Synthesis, fresh_share: float | None
) -> RunIdentity:
    """Return what a run is, for its checkpoints."""
    found, threads = current_versions()
    return RunIdentity(
        config=resolved.config,
        sources=resolved.sources,
        names=spec.names,
        fingerprint=spec.fingerprint + synthesis.digest,
        versions=found,
        threads=threads,
        fresh_share=fresh_share,
    )
