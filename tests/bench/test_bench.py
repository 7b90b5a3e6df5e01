"""The benchmark's arithmetic on a clock of our own, and one tiny run of the command."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from hsrloop.bench import machine, meters, tiers
from hsrloop.bench.measures import MEASURES, Effort
from hsrloop.bench.meters import (
    LAG_S,
    PowerReading,
    in_turn,
    nvml_reader,
    power,
    rates,
    shares,
    stopwatch_of,
)
from hsrloop.bench.picture import draw_bars
from hsrloop.bench.results import Report, Row, Spread, cells, markdown, table, tables
from hsrloop.bench.scratch import scratch
from hsrloop.bench.workbench import workbench
from hsrloop.cli.bench import disturbance, unevenness
from hsrloop.cli.main import main
from hsrloop.config import Resolved, resolve
from hsrloop.errors import OutputError
from hsrloop.hardware.contention import SpinGovernor
from hsrloop.hardware.memory import usable_cores
from hsrloop.report.console import make_console

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_works_take_turns_and_are_measured_by_the_step() -> None:
    clock, calls = Clock(), []

    def work(name: str, seconds: float, steps: int) -> None:
        calls.append((name, steps))
        clock.now += seconds * steps

    times = in_turn(
        {"a": lambda n: work("a", 0.5, n), "b": lambda n: work("b", 0.125, n)},
        rounds=3,
        seconds=2.0,
        device=CPU,
        clock=clock,
    )
    assert times == {"a": [0.5] * 3, "b": [0.125] * 3}
    assert calls[-6:] == [("a", 4), ("b", 16), ("b", 16), ("a", 4), ("a", 4), ("b", 16)]


def test_a_slow_work_makes_three_steps_a_round() -> None:
    clock, steps = Clock(), []

    def work(count: int) -> None:
        steps.append(count)
        clock.now += 60.0 * count

    in_turn({"slow": work}, rounds=1, seconds=1.0, device=CPU, clock=clock)
    assert steps[-1] == 3


def test_rates_and_shares() -> None:
    assert rates([0.5, 0.25, 1.0], 8) == Spread(16.0, 8.0, 32.0, 3)
    assert shares([2.0, 4.0], [1.0, 3.0]) == Spread(0.625, 0.5, 0.75, 2)


def test_power_is_kept_while_it_is_on_and_no_longer_tells_of_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    reading = PowerReading()
    for number in range(60):
        if number == 10:
            reading.resume()
        if number == 12:
            reading.resume()  # it is on already
        if number == 30:
            reading.pause()
        reading.take(float(number), 0.5)
        clock.now += 0.125
    assert reading.watts == [float(n) for n in range(10 + int(LAG_S / 0.125), 30)]


def test_power_is_the_mean_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "LAG_S", 0.0)
    seen = threading.Event()
    answers = iter([(100.0, 0.5), (200.0, 1.0)])

    def read() -> tuple[float, float]:
        answer = next(answers, None)
        if answer is None:
            seen.set()
            return 150.0, 0.75
        return answer

    with power(read) as reading:
        reading.resume()
        assert seen.wait(30)
    watts, busy = reading.means()
    assert watts == pytest.approx(150.0) and busy == pytest.approx(0.75)


def test_without_a_card_there_is_no_power_to_read() -> None:
    assert nvml_reader("GPU-none-of-that-name") is None
    with power(None) as reading:
        pass
    assert reading.means() == (None, None)


ROWS = (
    Row(
        name="train",
        images_per_s=Spread(90.0, 88.0, 91.5, 7),
        bare_images_per_s=Spread(100.0, 99.0, 101.0, 7),
        efficiency=Spread(0.9, 0.89, 0.92, 7),
        peak_memory_bytes=3 * 2**30,
        host_waits=0,
        data_wait=Spread.of([0.02]),
    ),
    Row(name="workstation", note="skipped: no GPU"),
)


def test_a_table_shows_what_is_there() -> None:
    console = make_console()
    with console.capture() as captured:
        console.print(table(ROWS))
    text = captured.get()
    assert "90.0 (88.0-91.5)" in text and "0.90 (0.89-0.92)" in text and "11.1" in text
    assert "3.00" in text and "2%" in text and "skipped: no GPU" in text
    assert "watts" not in text, "nothing has watts"
    assert [text for text in cells(ROWS[1]) if text] == ["skipped: no GPU"]


def test_a_report_as_markdown_and_json() -> None:
    report = Report(host="this machine", rows=ROWS, settings={"imgsz": 640})
    lines = markdown(report)
    assert lines[0] == "this machine" and lines[2] == "imgsz 640"
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1
    data = json.loads(json.dumps(report.to_json()))
    assert data["rows"][0]["images_per_s"]["n"] == 7
    assert data["rows"][0]["s_per_1000"] == pytest.approx(1000 / 90)
    assert data["rows"][1]["images_per_s"] is None


def test_settings_of_rows_are_shown_before_the_figures() -> None:
    rows = (
        Row(name="low", note="skipped: no GPU", settings={"model": "yolov8s.pt", "batch": 8}),
        Row(
            name="medium",
            note="imgsz 640 -> 576",
            settings={"model": "yolov8m.pt", "batch": 16, "micro_batch": 4},
        ),
    )
    head, rule, low, medium = markdown(Report(host="this machine", rows=rows))[2:]
    assert head == "| | model | batch | micro_batch |  |" and rule.count("|") == head.count("|")
    assert low == "| low | yolov8s.pt | 8 |  | skipped: no GPU |"
    assert medium == "| medium | yolov8m.pt | 16 | 4 | imgsz 640 -> 576 |"
    console = make_console()
    with console.capture() as captured:
        console.print(table(rows))
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["model", "yolov8s.pt", "yolov8m.pt"] in lines and ["micro_batch", "4"] in lines


def test_tiers_beside_parts_fit_a_terminal_of_80_columns_and_lose_nothing() -> None:
    wide = Spread.of([1234.5, 1230.1, 1240.2])
    asked = {"model": "yolov8m.pt", "imgsz": 640, "micro_batch": 4}
    names = ("low", "medium", "high", "workstation", "cpu")
    tried = [Row(name=name, images_per_s=wide, note="fits", settings=asked) for name in names]
    measured = [replace(ROWS[0], name=name) for name in ("step", "train")]
    console = Console(width=80, file=io.StringIO())
    console.print(tables([*measured, *tried]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    first, second = (next(i for i, x in enumerate(lines) if name in x) for name in ("step", "low"))
    assert first < second and "train" in lines[first] and "workstation" in lines[second]
    assert any(line.split() == ["micro_batch", *["4"] * 5] for line in lines)


def test_bars_are_as_long_as_the_speeds() -> None:
    axes = draw_bars(Report(host="this machine", rows=ROWS)).axes[0]
    assert sorted(bar.get_width() for bar in axes.patches) == [90.0, 100.0]


def test_a_bar_beside_no_bare_step_is_cut_off_where_it_would_hide_the_others() -> None:
    loader = Row(name="loader", images_per_s=Spread.of([9000.0]))
    axes = draw_bars(Report(host="this machine", rows=[*ROWS, loader])).axes[0]
    assert axes.get_xlim()[1] < 300
    assert any("9000.0 (the bar is cut off)" in text.get_text() for text in axes.texts)
    alone = draw_bars(Report(host="this machine", rows=[loader])).axes[0]
    assert alone.get_xlim()[1] > 9000 and "cut off" not in alone.texts[0].get_text()


@pytest.mark.parametrize(("second", "warned"), [(110.0, False), (150.0, True)])
def test_a_machine_that_was_busy_meanwhile_is_noticed(second: float, warned: bool) -> None:
    rows = [
        Row(name="step", bare_images_per_s=Spread.of([100.0])),
        Row(name="validation", bare_images_per_s=Spread.of([900.0])),
        Row(name="train", bare_images_per_s=Spread.of([second])),
    ]
    said = unevenness(rows)
    assert (said is not None) is warned and unevenness(rows[:2]) is None
    assert said is None or "100.0 and 150.0 images/s" in said


def test_other_programs_beside_a_comparison_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted by the second of core: all that is at work, less what is ours."""
    times = iter([(100.0, 10.0, 5.0), (130.0, 25.0, 15.0)])
    monkeypatch.setattr(machine, "_busy_s", lambda: next(times))
    assert machine.OthersWork().cores() == 1.5
    assert disturbance(0.3, True) is None
    for against, effect in ((True, "the ratios cannot be used"), (False, "speeds are lower")):
        text = disturbance(1.5, against)
        assert text is not None and text.startswith("other programs kept 1.5 cores busy")
        assert effect in text


def test_work_of_this_process_and_of_those_it_ended_is_its_own() -> None:
    """Whatever else runs here, ours is no part of it, nor more than all there is."""
    code = "import time\nwhile time.process_time() < 0.5: pass"
    before = machine._busy_s()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = machine._busy_s()
    everything, ours = after[0] - before[0], after[1] - before[1]
    told = os.cpu_count() == usable_cores() and sys.platform == "linux"
    assert ours >= 0.4 if told else ours == everything == 0
    assert ours <= everything + 0.1  # a clock tick of each core and process


@pytest.mark.parametrize("against", [False, True])
def test_a_comparison_asks_what_others_did_meanwhile(
    against: bool, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.OthersWork, "cores", lambda self: 1.5)
    monkeypatch.setattr("hsrloop.cli.bench._measured", lambda *_: (ROWS, {}))
    monkeypatch.setattr("hsrloop.cli.bench.prepare", lambda *_: None)
    arguments = ["bench", "-d", str(tiny_dataset), "--device", "cpu"]
    more = ["--against", "ultralytics"] if against else []
    done = CliRunner().invoke(main, [*arguments, *more])
    assert done.exit_code == 0, done.output
    assert "other programs kept 1.5 cores busy" in done.output
    assert ("ratios cannot be used" in done.output) is against


@pytest.mark.parametrize("other", [("tiers",), ("--against", "ultralytics")])
def test_there_is_nothing_to_profile_where_runs_are_measured(
    other: tuple[str, ...], tmp_path: Path
) -> None:
    done = CliRunner().invoke(main, ["bench", *other, "--profile", str(tmp_path / "profile")])
    assert done.exit_code == 2 and "--profile records steps" in done.output


def test_a_profile_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["bench", "--profile", str(tmp_path / "file" / "below")])
    assert done.exit_code == 2 and "Not a directory" in done.output


def test_the_command_measures_all_parts(tiny_dataset: Path, tmp_path: Path) -> None:
    arguments = [
        *("bench", "--dataset", tiny_dataset, "--model", "yolov8n.yaml", "--device", "cpu"),
        *("--imgsz", 64, "--batch", 4, "--micro-batch", 2, "--rounds", 2, "--seconds", 0.01),
        *("--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.png"),
        *("--profile", tmp_path / "new" / "profile"),
    ]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["step", "loader", "validation", "train"]
    profiled = (tmp_path / "new" / "profile" / "profile.txt").read_text()
    ranges = ("step", "data", "  of it render", "forward", "optimizer")
    assert all(f"\n{name} " in profiled for name in ranges)
    assert "Written: " in done.output and "profile.txt" in done.output
    assert list((tmp_path / "new" / "profile" / "tensorboard").glob("*.pt.trace.json"))
    assert all(row["images_per_s"]["median"] > 0 for row in rows.values())
    assert rows["step"]["host_waits"] == rows["train"]["host_waits"] == 0
    assert rows["validation"]["host_waits"] == 1
    for name in ("step", "validation", "train"):
        assert rows[name]["efficiency"]["n"] == 2
    assert 0 < rows["train"]["data_wait"]["median"] < 1
    assert report["settings"]["micro_batch"] == 2 and report["settings"]["batch"] == 4
    assert report["settings"]["deterministic"] is False
    picture = cv2.imread(str(tmp_path / "bench.png"))
    assert picture is not None and picture.std() > 5
    assert "images/s" in done.output and "measuring training: 2" in done.output


def test_only_the_parts_named_are_measured(tiny_dataset: Path, tmp_path: Path) -> None:
    named = ("loader", "loader")  # once is enough
    arguments = ["bench", *named, "--dataset", tiny_dataset, "--model", "yolov8n.yaml"]
    arguments += ["--device", "cpu", "--imgsz", 64, "--rounds", 1, "--seconds", 0.01]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "measuring the loader" in done.output and done.output.count("cv2, ") == 1
    others = ("step", "validation", "training")
    assert not any(f"measuring {what}" in done.output.replace("the ", "") for what in others)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "nan"], "--seconds is nan; it must be a number up to 600."),
        (["--plot", "bars.jpg"], "--plot bars.jpg: it must end in .png."),
        (["--json", "a.png", "--plot", "./a.png"], "--json and --plot are both a.png."),
    ],
)
def test_odd_values_are_refused_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["bench", "step", *arguments])
    assert done.exit_code == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "yolov8n.yaml"], "model is yolov8n.yaml, but bench tiers tries every tier"),
        (["--batch", "4", "--imgsz", "64"], "batch is 4 and imgsz is 64, but bench tiers"),
        (["--set", "imgsz=64"], "Drop imgsz, or name other parts than tiers."),
        (["--gpu-tier", "low", "step"], "gpu_tier is low, but bench tiers"),
    ],
)
def test_what_each_tier_decides_cannot_be_given_beside_tiers(
    arguments: list[str], said: str
) -> None:
    done = CliRunner().invoke(main, ["bench", "tiers", *arguments])
    assert done.exit_code == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--rounds", "--seconds"])
def test_what_tiers_would_ignore_is_refused(option: str) -> None:
    done = CliRunner().invoke(main, ["bench", "tiers", option, "2"])
    assert done.exit_code == 2 and "are nothing to tiers" in done.stderr


@pytest.mark.parametrize("place", ["data.yaml", "images/train/x.png"])
def test_no_output_lands_in_the_data_set(place: str, tiny_dataset: Path) -> None:
    before = tiny_dataset.read_bytes()
    file = tiny_dataset.parent / place
    done = CliRunner().invoke(main, ["bench", "-d", str(tiny_dataset), "--json", str(file)])
    assert done.exit_code == 2 and "lies inside the data set" in done.stderr
    assert tiny_dataset.read_bytes() == before and (file == tiny_dataset or not file.exists())


def test_a_full_disk_costs_neither_the_old_json_nor_the_picture(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsrloop.cli.bench._measured", lambda *_: (ROWS, {"imgsz": 64}))
    monkeypatch.setattr("hsrloop.cli.bench.prepare", lambda *_: None)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    file, picture = tmp_path / "old.json", tmp_path / "bars.png"
    file.write_text("old")
    done = CliRunner().invoke(
        main, ["bench", "-d", str(tiny_dataset), "--json", str(file), "--plot", str(picture)]
    )
    assert done.exit_code == 2
    assert f"--json {file} cannot be written (No space left on device)." in done.stderr
    assert (
        file.read_text() == "old" and picture.stat().st_size and len(list(tmp_path.iterdir())) == 3
    )


def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is full\. Set TMPDIR"), scratch("bench") as folder:
        (folder / "some").touch()
        raise OSError(errno.ENOSPC, "No space left on device", "photograph.jpg")
    assert not folder.exists()
    with pytest.raises(FileNotFoundError), scratch("bench") as folder:
        (folder / "some").read_bytes()


def test_threads_are_governed_in_every_part(tiny_dataset: Path, monkeypatch: Any) -> None:
    """Beside a busy neighbour threads that spin are ten times slower; also what is compared."""
    seen: list[str] = []
    asked = {"dataset": str(tiny_dataset), "model": "yolov8n.yaml", "device": "cpu"}
    resolved = resolve([("test", {**asked, "imgsz": 64, "batch": 2})])
    for part in ("validate", "loader", "step"):
        with workbench(resolved, lambda _: None) as bench:
            monkeypatch.setattr(SpinGovernor, "observe", lambda _, part=part: seen.append(part))
            MEASURES[part](bench, Effort(rounds=1, seconds=0.001))
    # Finding out how many steps a round has takes two turns of each work; then there is one.
    assert seen.count("validate") == 6 and seen.count("loader") == 3
    assert seen.count("step") > 6, "each step of training too"


def test_a_file_cannot_either(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: yolov8n.yaml\ngpu_tier: null\n")
    done = CliRunner().invoke(main, ["bench", "tiers", "--config", str(tmp_path / "config.yaml")])
    assert done.exit_code == 2 and "model is yolov8n.yaml, but" in done.stderr


def test_tiers_are_shown_with_their_settings(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tier does not decide is handed on, as `--batch auto` is, which is no batch."""
    asked = []

    def measured(resolved: Resolved, **_: object) -> list[Row]:
        asked.append(resolved.config.micro_batch)
        return [Row(name="low", settings={"model": "yolov8s.pt", "micro_batch": 8})]

    monkeypatch.setattr(tiers, "measure_tiers", measured)
    arguments = ["bench", "tiers", "-d", str(tiny_dataset), "--device", "cpu", "--batch", "auto"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert asked == ["auto"] and "yolov8s.pt" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_stopwatch_times_the_gpu_and_does_not_wait() -> None:
    stopwatch = stopwatch_of(torch.device("cuda", 0))
    x = torch.rand(4096, 4096, device="cuda")
    x @ x
    torch.cuda.synchronize()
    began = time.perf_counter()
    first = stopwatch.stamp()
    for _ in range(20):
        x @ x
    last = stopwatch.stamp()
    asked = time.perf_counter() - began
    seconds = stopwatch.seconds(first, last)
    assert asked < seconds < time.perf_counter() - began
