"""The suite's parts and their order, and one run of it on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsrloop.bench import suite
from hsrloop.bench.measures import MEASURES, Effort
from hsrloop.bench.results import Row
from hsrloop.bench.suite import FEW_CORES, FULL, SMOKE, cells_of
from hsrloop.bench.visit import Cell, run_suite
from hsrloop.bench.workbench import Workbench
from hsrloop.config import resolve
from hsrloop.errors import DependencyError
from hsrloop.train.rehearsal import Rehearsal

ROOT = Path(__file__).resolve().parents[2]

VISIT_S = 480
START_S = 20  # torch loaded, CUDA started, the data set painted (a guess)
TWO_CORES = "{} on two CPU cores"
ESSENTIAL = (
    *(TWO_CORES.format("m"), "criterion"),
    *(f"against Ultralytics, {scale}" for scale in "nsm"),
    *("recovery", "tier low", "tier medium", "tier high", "tier workstation"),
    *("exactness under --deterministic", *(TWO_CORES.format(scale) for scale in "nslx")),
)


@pytest.fixture
def full(tiny_dataset: Path) -> list[Cell]:
    asked = resolve([("test", {"dataset": str(tiny_dataset), "device": "cpu"})])
    return cells_of(asked, FULL, lambda _: None)


def ran(cell: Cell) -> list[Row]:
    rows: list[Row] = []
    run_suite([cell], minutes=60, began=0, has_gpu=True, on_row=rows.append, clock=lambda: 0.0)
    return rows


def test_every_scale_has_every_part_of_the_goals_once(full: list[Cell]) -> None:
    names = [cell.name for cell in full]
    expected = {
        *ESSENTIAL,
        *(TWO_CORES.format(scale) for scale in "nsmlx"),
        *(
            f"step, {scale}, {kind}"
            for scale in "nsmlx"
            for kind in ("without graphs", "bf16", "compiled")
        ),
        *(f"against Ultralytics, {scale}" for scale in "nsmlx"),
        *(f"train, m, fp16, rendered on the {place}, all CPU cores" for place in ("GPU", "CPU")),
        *(f"loader, rendered on the {place}" for place in ("GPU", "CPU")),
        *("step, m, deterministic", "tier cpu"),
    }
    assert len(names) == len(set(names))
    assert set(names) == expected


def test_one_visit_has_time_for_what_is_essential(full: list[Cell]) -> None:
    names = [cell.name for cell in full]
    last = max(names.index(name) for name in ESSENTIAL)
    assert names[0] == ESSENTIAL[0]
    assert START_S + sum(cell.seconds for cell in full[: last + 1]) <= VISIT_S


def test_what_is_compiled_or_bf16_comes_last(full: list[Cell]) -> None:
    names = [cell.name for cell in full]
    against = max(names.index(f"against Ultralytics, {scale}") for scale in "nsmlx")
    bf16 = [names.index(f"step, {scale}, bf16") for scale in "nsmlx"]
    compiled = [names.index(f"step, {scale}, compiled") for scale in "nslx"]
    assert against < min(bf16) and max(bf16) < min(compiled)


def test_a_training_keeps_to_two_cores_and_lets_them_go(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.sched_getaffinity(0)
    seen: list[tuple[int, int]] = []

    def measure(bench: Workbench, _: Any) -> Row:
        seen.append((len(os.sched_getaffinity(0)), bench.info.cores))
        if len(seen) > 1:
            raise ZeroDivisionError("broken")
        return Row(name="train")

    for name in ("measure_step", "measure_validation"):
        monkeypatch.setattr(suite, name, lambda bench, effort: Row(name="other"))
    monkeypatch.setattr(suite, "measure_training", measure)
    asked = resolve([("test", {"dataset": str(tiny_dataset), "device": "cpu"})])
    cell = cells_of(asked, replace(SMOKE, effort=FULL.effort), lambda _: None)[0]
    rows = ran(cell)
    cores = min(FEW_CORES, len(own))
    assert cell.name == TWO_CORES.format("n")
    names = ["train, n, fp16, rendered on the GPU", "step, n, fp16", "validation, n"]
    assert [row.name for row in rows] == names
    assert all(row.note.startswith(f"{cores} CPU core") for row in rows)
    assert os.sched_getaffinity(0) == own
    assert [row.note for row in ran(cell)] == ["failed: ZeroDivisionError: broken"]
    assert os.sched_getaffinity(0) == own
    assert [at for at, _ in seen] == [cores, cores]
    assert all(counted <= cores for _, counted in seen)  # a run's loader processes follow from it


def test_a_system_that_cannot_keep_to_cores_is_skipped(
    full: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    (row,) = ran(full[0])
    assert row.name == full[0].name
    assert row.note == "skipped: this system does not let a process choose its cores"


def test_without_ultralytics_it_is_skipped_and_a_training_that_breaks_off_failed(
    full: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = [cell for cell in full if cell.name == "against Ultralytics, n"]

    def breaks_off(*_: Any, **__: Any) -> Iterator[Row]:
        raise DependencyError("-m hsrloop.bench.peer failed: Traceback\n  line\nValueError: no\n")

    monkeypatch.setattr(suite, "against_ultralytics", breaks_off)
    assert [row.note for row in ran(cell)] == ["failed: RuntimeError: ValueError: no"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [row.note for row in ran(cell)] == ["skipped: ultralytics is not installed"]


def test_the_suite_works_without_a_gpu(smoke_results: Path) -> None:
    report = json.loads((smoke_results / "gpu_suite_smoke.json").read_text())
    notes = {row["name"]: row["note"] for row in report["rows"]}
    assert not [note for note in notes.values() if note.startswith("failed")]
    assert notes["exactness under --deterministic"] == "4 steps twice: equal bit for bit"
    assert notes["recovery"] == notes["tier medium"] == "skipped: no GPU"
    assert notes["tier cpu"] == "fits"
    cores = f"{min(2, len(os.sched_getaffinity(0)))} CPU core"
    assert notes["train, n, fp16, rendered on the GPU"].startswith(cores)
    assert notes["validation, n"].startswith(cores)
    measured = [row["name"] for row in report["rows"] if row["images_per_s"]]
    assert len(measured) == 15
    page = (smoke_results / "gpu_suite_smoke.md").read_text()
    assert all(f"| {name} |" in page for name in notes)
    assert not list(smoke_results.glob("*.new"))


def test_chosen_parts_alone_go_into_a_file_beside(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--smoke"]
    only = ["--only", "criterion|^recovery", "--output", str(tmp_path)]
    subprocess.run([*command, *only], capture_output=True, check=True)
    rows = json.loads((tmp_path / "gpu_suite_smoke_criterion_recovery.json").read_text())["rows"]
    assert {row["name"].split(",")[0] for row in rows} == {
        *("criterion", "Ultralytics' criterion", "recovery"),
    }


def test_an_earlier_visit_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import reporting

    stem = tmp_path / "gpu_suite_nvidia_h200"
    for expected in ("", "_2", "_3"):
        free = reporting.unused(stem)
        assert free == tmp_path / f"gpu_suite_nvidia_h200{expected}"
        free.with_suffix(".json").touch()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--smoke", "--minutes", "nan"], "'nan' are no minutes"),
        (["--smoke", "--minutes", "0"], "'0' are no minutes"),
        (["--smoke", "--output", __file__], "File exists"),
        pytest.param(
            ["--only", "criterion"],
            "there is no GPU here; --smoke tries the suite on the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("tier [", "is no regular expression: unterminated character set"),
        ("nothing", "--only nothing is found in no part's name: n on two CPU cores; criterion;"),
    ],
)
def test_parts_that_cannot_be_chosen_are_said_in_one_line(
    only: str, words: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--smoke"]
    done = subprocess.run(
        [*command, "--only", only, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_minutes_count_from_before_torch_is_loaded(tmp_path: Path) -> None:
    """Loading torch takes longer than a second, so not one is left for the first cell."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--smoke"]
    subprocess.run(
        [*command, "--minutes", f"{1 / 60}", "--output", str(tmp_path)],
        capture_output=True,
        check=True,
    )
    rows = json.loads((tmp_path / "gpu_suite_smoke.json").read_text())["rows"]
    assert rows[0]["note"] == "skipped: no time left (18 s expected, 0 s left)"


def test_nothing_is_rehearsed_where_time_is_short(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a suite measures either fits or says that it does not."""

    def rehearsed(*_: Any) -> None:
        raise AssertionError("a step was rehearsed")

    monkeypatch.setattr(Rehearsal, "rehearse", rehearsed)
    given = {"dataset": str(tiny_dataset), "device": "cpu", "rehearsal": "always"}
    asked = resolve([("test", {**given, "model": "yolov8n.yaml", "imgsz": 64, "batch": 2})])
    effort = Effort(rounds=1, seconds=0.01)
    measures = {"step": MEASURES["step"]}
    (row,) = suite._measured(measures, asked, effort, lambda _: None)
    assert row.name == "step"
    assert len(list(suite._exactness("exact", asked, lambda _: None))) == 1
