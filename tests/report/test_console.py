"""What a person sees."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from hsrloop.events import (
    CheckpointSaved,
    EpochDone,
    Event,
    Note,
    Progress,
    RolledBack,
    RunFinished,
    RunStarted,
    RunStopped,
    StepDone,
)
from hsrloop.report.console import ConsoleSink, duration, make_console

Make = Callable[..., EpochDone]


def step(samples: int) -> StepDone:
    return StepDone(
        epoch=1, epochs=3, step=1, samples=samples, epoch_samples=80, box_loss=1.25, cls_loss=2.5,
        dfl_loss=1.5, images_per_s=40.0, epoch_left_s=61.0, run_left_s=3700.0, memory_bytes=2**31,
    )  # fmt: skip


def show(*events: Event, terminal: bool = False, width: int = 120) -> str:
    """Return what a console sink writes for events."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, highlight=False)
    sink = ConsoleSink(console)
    for event in events:
        sink.handle(event)
    sink.close()
    return stream.getvalue()


@pytest.mark.parametrize(
    ("sample", "scale", "sentence"),
    [
        (0, 1.0, "the loss is no finite number (step 70): back to the start of epoch 3, learning "
         "rate x 0.5 (1 of at most 3 times)."),
        (24, 4096.0, "the loss is no finite number (step 70): back to sample 24 of epoch 3, "
         "learning rate x 0.5, loss scale 4096 (1 of at most 3 times)."),
    ],
)  # fmt: skip
def test_going_back_is_said_with_its_reason(sample: int, scale: float, sentence: str) -> None:
    event = RolledBack(
        cause="the loss is no finite number", number=1, most=3, step=70, epoch=2, sample=sample,
        lr_scale=0.5, loss_scale=scale,
    )  # fmt: skip
    assert show(step(24), event, width=300) == f"Warning: {sentence}\n"


def test_the_settings_table_names_each_value_and_its_origin(run_started: RunStarted) -> None:
    shown = show(run_started)
    rows = [line.split() for line in shown.splitlines()]
    assert ["batch", "8", "tier", "low"] in rows
    assert ["lr0", "0.002", "command", "line"] in rows
    for name in run_started.config:
        assert name in shown
    assert "patience 10" in shown.partition("defaults")[2]


def test_the_groups_table_shows_the_rate_of_each_group(run_started: RunStarted) -> None:
    rows = [line.split() for line in show(run_started).splitlines()]
    assert ["weights", "0.5", "0.001", "0.0005", "3,100,000"] in rows


def test_a_resumed_run_says_so(run_started: RunStarted) -> None:
    import dataclasses

    resumed = dataclasses.replace(run_started, resumed=True, epoch=7)
    assert "Going on at epoch 7" in show(resumed)
    epochs = int(run_started.config["epochs"])
    over = dataclasses.replace(run_started, resumed=True, epoch=41, epochs=40)
    assert f"Nothing is left to train: 40 of {epochs} epochs trained." in show(over)


def test_one_line_an_epoch_when_not_on_a_terminal(epoch_done: Make) -> None:
    validating = [Progress(task="validating", done=d, total=2) for d in (1, 2)]
    shown = show(step(8), step(80), *validating, epoch_done(1, best=True), step(8), epoch_done(2))
    lines = shown.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/3: box 1.000 cls 2.000 dfl 1.500 mAP50 0.500")
    assert lines[0].endswith("train 1:01 val 0:03  best")
    assert "\x1b" not in shown


def test_a_long_task_is_announced_once_when_not_on_a_terminal() -> None:
    shown = show(*[Progress(task="caching", done=d, total=500) for d in range(0, 501, 50)])
    assert shown == "caching: 500\n"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_bar_shows_losses_speed_and_both_times(width: int) -> None:
    shown = show(step(8), terminal=True, width=width)
    for part in ("1/3", "box 1.250", "cls 2.500", "dfl 1.500", "40 img/s", "1:01 of 1:01:40 left"):
        assert part in shown


def test_skipped_steps_are_mentioned(epoch_done: Make) -> None:
    assert "2 steps skipped" in show(epoch_done(1, skipped_steps=2))


def test_warnings_are_marked_and_not_read_as_markup() -> None:
    shown = show(Note(text="labels/[bold]a.txt:3: class 7", level="warning"), Note(text="[x] ok"))
    assert shown == "Warning: labels/[bold]a.txt:3: class 7\n[x] ok\n"


def test_stopping_says_how_to_go_on() -> None:
    text = "Go on with: hsrloop train --resume runs/a/weights/last.pt"
    assert text in show(RunStopped(reason="interrupted", text=text))


def test_the_end_says_what_a_team_needs(run_finished: RunFinished) -> None:
    shown = show(run_finished)
    best = "runs/competition_20260101_000000/weights/best.pt"
    assert f'YOLO("{best}").predict("image.jpg", conf=0.37)' in shown
    assert "mAP50 0.900" in shown
    assert "12:30" in shown
    assert "fork 0.10, plate 0.30, cup 0.70" in shown


@pytest.mark.parametrize(("conf", "shown"), [(0.004, "0.004"), (0.0, "0.001"), (0.5, "0.5")])
def test_a_threshold_that_is_said_is_never_0(
    conf: float, shown: str, run_finished: RunFinished
) -> None:
    result = {**run_finished.result, "best_confidence": conf, "epochs_completed": 1}
    text = show(dataclasses.replace(run_finished, result=result))
    assert f"conf={shown})" in text and "Done: 1 epoch in" in text


def test_events_without_a_face_are_silent() -> None:
    assert show(CheckpointSaved(path="weights/last.pt", epoch=1, sample=0), Event()) == ""


def test_closing_twice_and_without_events_is_harmless() -> None:
    sink = ConsoleSink(Console(file=io.StringIO(), force_terminal=True))
    sink.handle(step(8))
    sink.close()
    sink.close()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3700, "1:01:40"), (float("inf"), "?"), (-1, "?")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_an_epochs_row_fits_80_columns(epoch_done: Make) -> None:
    shown = show(epoch_done(1, best=True), epoch_done(50), terminal=True, width=80)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.splitlines()]
    assert [max(map(len, lines)) <= 80, len(lines)] == [True, 3]
    assert "mAP50-95" in lines[0] and lines[1].endswith("*")


@pytest.mark.parametrize("epochs", [3, 100])
@pytest.mark.parametrize("left_s", [61.0, 36000.0])
def test_the_bar_fits_80_columns_with_memory(epochs: int, left_s: float) -> None:
    event = dataclasses.replace(
        step(40), epoch=epochs, epochs=epochs, run_left_s=left_s, images_per_s=1234.0
    )
    shown = show(event, terminal=True, width=80)
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]", shown)]
    line = next(line for line in lines if "box 1.250" in line)
    assert len(line) <= 80 and "\u2501" in line and "2.0 GiB" in line


def test_text_of_users_is_shown_as_it_is(
    run_started: RunStarted, run_finished: RunFinished, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ConsoleSink(make_console())
    config = {**run_started.config, "dataset": "/data [x]/a :smile: [/x]"}
    sources = {**run_started.sources, "dataset": "[/x]"}
    sink.handle(dataclasses.replace(run_started, config=config, sources=sources, device="[/gpu]"))
    sink.handle(dataclasses.replace(run_finished, run_dir="/my runs/[x]"))
    shown = capsys.readouterr().out
    assert "/data [x]/a :smile: [/x]" in shown and "on [/gpu]" in shown
    assert "-m '/my runs/[x]/weights/best.pt'" in shown
