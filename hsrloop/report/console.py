"""What a person sees while a run goes: tables, a live bar on a terminal, a line per epoch."""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from hsrloop.events import (
    Climbed,
    EpochDone,
    Event,
    Note,
    Recovered,
    RolledBack,
    RunFinished,
    RunStarted,
    RunStopped,
    StepDone,
)
from hsrloop.events import Progress as TaskProgress
from hsrloop.report.scores import class_scores, worst_first
from hsrloop.report.settings import groups_table, settings_table
from hsrloop.words import counted

# With the mark of the best epoch a row has 79 columns, so that it fits a terminal's 80.
_LOG = logging.getLogger(__name__)
_WIDTHS = (7, 6, 6, 6, 6, 8, 5, 5, 5, 5, 5)
_TITLES = ("epoch", "box", "cls", "dfl", "mAP50", "mAP50-95", "P", "R", "img/s", "train", "val")
_HEADER_EVERY = 20
_SHOWN_WORST = 5
_BAR_WIDTH, _SHORT_BAR = 12, 6
_LEAST_CONF = 0.001  # of what is said to use; 0 would keep everything


class _PlainConsole(Console):
    """Takes text as it is, and goes silent, rather than ending the run, when nobody reads it."""

    def on_broken_pipe(self) -> None:
        """Let what is printed from now on go nowhere."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        _LOG.warning("Nobody reads the output any more; the run goes on without it.")


def make_console() -> Console:
    """Return a console on stdout; lines are not folded when it is no terminal."""
    width = None if sys.stdout.isatty() else 120
    return _PlainConsole(highlight=False, markup=False, emoji=False, width=width)


class ConsoleSink:
    """Tells a run's events to a person.

    On a terminal a bar at the bottom shows the step's losses, images/s and the time left of the
    epoch and of the run; elsewhere there is one line an epoch.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._bar: Progress | None = None
        self._blocks = BarColumn(bar_width=_BAR_WIDTH)
        self._tasks: dict[str, TaskID] = {}
        self._rows = 0
        self._told: set[str] = set()
        self._stepped = False

    def handle(self, event: Event) -> None:
        """Show one event; those without anything to show are skipped."""
        match event:
            case RunStarted():
                self._start(event)
            case TaskProgress():
                self._task(event)
            case StepDone():
                self._step(event)
            case EpochDone():
                self._epoch(event)
            case Note():
                self._note(event)
            case Recovered():
                self._note(Note(text=_recovered(event), level="warning"))
            case Climbed():
                self._note(Note(text=f"There is room to spare again: {event.change} is tried."))
            case RolledBack():
                self._drop("epoch")
                self._note(Note(text=_rollback_sentence(event), level="warning"))
            case RunStopped():
                self._hide_bar()
                self._console.print(f"Stopped ({event.reason}). {event.text}", soft_wrap=True)
            case RunFinished():
                self._hide_bar()
                self._finish(event)

    def close(self) -> None:
        """Take the bar down and give the terminal back."""
        self._hide_bar()

    def _start(self, event: RunStarted) -> None:
        self._hide_bar()
        self._print(settings_table(event.config, event.sources))
        self._print()
        self._print(groups_table(event.groups, lr0=float(event.config["lr0"])))
        self._print()
        verb = "Going on" if event.resumed else "Starting"
        if event.epoch > event.epochs:
            done = f"{event.epochs} of {counted(int(event.config['epochs']), 'epoch')} trained"
            self._print(f"Nothing is left to train: {done}.")
        else:
            self._print(
                f"{verb} at epoch {event.epoch} on {event.device}: {event.train_images} training "
                f"and {counted(event.val_images, 'validation image')}, "
                f"{counted(len(event.names), 'class')}, {event.parameters / 1e6:.1f} M parameters."
            )
        self._console.print(f"Run folder: {event.run_dir}", soft_wrap=True)
        self._print()

    def _task(self, event: TaskProgress) -> None:
        if not self._console.is_terminal:
            if event.task not in self._told and not self._stepped:
                self._print(f"{event.task}: {event.total}")
                self._told.add(event.task)
            return
        bar = self._show_bar()
        if event.done >= event.total:
            self._drop(event.task)
            return
        text = f"{event.done}/{event.total}"
        self._update(bar, event.task, done=event.done, total=event.total, text=text)

    def _step(self, event: StepDone) -> None:
        self._stepped = True
        if not self._console.is_terminal:
            return
        label = f"{event.epoch}/{event.epochs}"
        bar = self._show_bar()
        text = _step_text(event, room=self._console.width - len(label) - 2)
        left = self._console.width - len(label) - len(text) - 2
        self._blocks.bar_width = max(1, min(_BAR_WIDTH, left))
        self._update(
            bar, "epoch", done=event.samples, total=event.epoch_samples, text=text, label=label
        )

    def _epoch(self, event: EpochDone) -> None:
        self._drop("epoch")
        if not self._console.is_terminal:
            self._line(Text(_epoch_sentence(event)))
            return
        if self._rows % _HEADER_EVERY == 0:
            self._print(Text(_row(_TITLES) + " best", style="bold"))
        self._rows += 1
        self._line(Text(_epoch_row(event), style="green" if event.best else ""))
        if event.skipped_steps:
            self._line(Text(f"        {_skipped(event)}: no finite loss or gradient", style="dim"))

    def _note(self, event: Note) -> None:
        if event.level == "warning":
            line = Text.assemble(("Warning: ", "bold yellow"), event.text)
            self._console.print(line, soft_wrap=True)
        else:
            self._console.print(Text(event.text), soft_wrap=True)

    def _finish(self, event: RunFinished) -> None:
        result = event.result
        best = Path(event.run_dir) / str(result["best_model_path"])
        shell = shlex.quote(str(best))
        why = ", no better result since" if event.reason == "patience" else ""
        self._print()
        self._print(
            f"Done: {counted(int(result['epochs_completed']), 'epoch')} in "
            f"{duration(60 * float(result['training_time_minutes']))}{why}."
        )
        metrics: dict[str, Any] = result["metrics"]
        self._print(
            Text(
                f"mAP50 {metrics['mAP50']:.3f}   mAP50-95 {metrics['mAP50-95']:.3f}   "
                f"precision {metrics['precision']:.3f}   recall {metrics['recall']:.3f}",
                style="bold",
            )
        )
        self._worst(event)
        self._line(Text.assemble("Best weights: ", (str(best), "bold")))
        self._print("On the robot:")
        self._line(Text("    from ultralytics import YOLO", style="cyan"))
        conf = result.get("best_confidence")
        threshold = f", conf={max(conf, _LEAST_CONF):.2g}" if conf is not None else ""
        self._line(Text(f'    YOLO("{best}").predict("image.jpg"{threshold})', style="cyan"))
        self._line(Text(f"By class, with thresholds: hsrloop validate -d DATA.yaml -m {shell}"))

    def _worst(self, event: RunFinished) -> None:
        scores = worst_first(class_scores(event.classes))[:_SHOWN_WORST]
        if scores:
            shown = ", ".join(f"{score.name} {score.ap50_95:.2f}" for score in scores)
            self._line(Text(f"Worst classes by mAP50-95 (photograph these again): {shown}"))

    def _print(self, *renderables: Any) -> None:
        self._console.print(*renderables)

    def _line(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)  # so that paths and code can be copied

    def _show_bar(self) -> Progress:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                self._blocks,
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._bar.start()
        return self._bar

    def _update(
        self, bar: Progress, name: str, *, done: int, total: int, text: str, label: str = ""
    ) -> None:
        if name not in self._tasks:
            self._tasks[name] = bar.add_task(label or name, total=total, text=text)
        bar.update(
            self._tasks[name], description=label or name, completed=done, total=total, text=text
        )

    def _drop(self, name: str) -> None:
        if self._bar is not None and name in self._tasks:
            self._bar.remove_task(self._tasks.pop(name))

    def _hide_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks.clear()


def _step_text(event: StepDone, *, room: int) -> str:
    """Return what a step says, in the most words that leave room for a short bar."""
    losses = f"box {event.box_loss:.3f} cls {event.cls_loss:.3f} dfl {event.dfl_loss:.3f}"
    speed = f"{event.images_per_s:.0f} img/s"
    left = f"{duration(event.epoch_left_s)} of {duration(event.run_left_s)} left"
    memory = f"{event.memory_bytes / 2**30:.1f} GiB" if event.memory_bytes else ""
    texts = [
        "  ".join(filter(None, (losses, speed, left, memory and f"GPU {memory}"))),
        " ".join(filter(None, (losses, speed, left, memory))),
        " ".join(filter(None, (losses, left, memory))),
        " ".join((losses, left)),
    ]
    return next((text for text in texts if len(text) + _SHORT_BAR <= room), texts[-1])


def _row(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _epoch_row(event: EpochDone) -> str:
    cells = (
        f"{event.epoch}/{event.epochs}",
        f"{event.box_loss:.3f}",
        f"{event.cls_loss:.3f}",
        f"{event.dfl_loss:.3f}",
        f"{event.ap50:.3f}",
        f"{event.ap50_95:.3f}",
        f"{event.precision:.2f}",
        f"{event.recall:.2f}",
        f"{event.images_per_s:.0f}",
        duration(event.train_s),
        duration(event.val_s),
    )
    return _row(cells) + (" *" if event.best else "")


def _epoch_sentence(event: EpochDone) -> str:
    return (
        f"epoch {event.epoch}/{event.epochs}: box {event.box_loss:.3f} cls {event.cls_loss:.3f} "
        f"dfl {event.dfl_loss:.3f} mAP50 {event.ap50:.3f} mAP50-95 {event.ap50_95:.3f} "
        f"precision {event.precision:.3f} recall {event.recall:.3f} "
        f"{event.images_per_s:.1f} images/s "
        f"train {duration(event.train_s)} val {duration(event.val_s)}"
        f"{'  best' if event.best else ''}{_skipped(event)}"
    )


def _recovered(event: Recovered) -> str:
    if event.rehearsed:
        return f"{event.cause} would run out: {event.change}. Found out in a rehearsal."
    return f"{event.cause} ran out: {event.change}. Training goes on from where it stood."


def _rollback_sentence(event: RolledBack) -> str:
    place = f"sample {event.sample} of" if event.sample else "the start of"
    scale = f", loss scale {event.loss_scale:g}" if event.loss_scale != 1 else ""
    return (
        f"{event.cause} (step {event.step}): back to {place} epoch {event.epoch + 1}, learning "
        f"rate x {event.lr_scale:g}{scale} ({event.number} of at most {event.most} times)."
    )


def _skipped(event: EpochDone) -> str:
    return f"  {event.skipped_steps} steps skipped" if event.skipped_steps else ""


def duration(seconds: float) -> str:
    """Return seconds as `m:ss` or `h:mm:ss`; `?` for what is not known yet."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
