"""`hsrloop validate` and `hsrloop train --validate-only`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsrloop.records import ClassScore, Metrics
from tests.cli.conftest import Calls, Invoke

SCORE = ClassScore(
    name="cup", images=1, boxes=2, precision=0.5, recall=0.5, ap50=0.6, ap50_95=0.3, best_conf=0.2
)
METRICS = Metrics(
    ap50=0.6, ap50_95=0.3, precision=0.5, recall=0.5, best_conf=0.44, classes=(SCORE,)
)


@pytest.mark.parametrize("command", [["validate"], ["train", "--validate-only"]])
def test_both_spellings_show_the_classes(invoke: Invoke, calls: Calls, command: list[str]) -> None:
    calls.metrics = METRICS
    result = invoke(*command, "-d", "d.yaml", "-m", "best.pt")
    assert result.exit_code == 0
    assert not calls.trained
    assert "Photograph these again: cup" in result.stdout
    assert "0.44" in result.stdout
    (resolved,) = calls.validated
    assert resolved.sources["imgsz"] == "default"


def test_json(invoke: Invoke, calls: Calls, tmp_path: Path) -> None:
    calls.metrics = METRICS
    file = tmp_path / "scores.json"
    assert invoke("validate", "-d", "d.yaml", "-m", "best.pt", "--json", file).exit_code == 0
    assert json.loads(file.read_text())["metrics"]["mAP50-95"] == 0.3


def test_a_json_file_without_a_folder_is_an_error_before_the_work(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    result = invoke("validate", "-d", "d", "-m", "b.pt", "--json", tmp_path / "no" / "s.json")
    assert result.exit_code == 2
    assert not calls.validated


def test_without_a_model_the_newest_run_is_taken(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    calls.metrics = METRICS
    best = tmp_path / "competition_20260101_000000" / "weights" / "best.pt"
    best.parent.mkdir(parents=True)
    best.touch()
    assert invoke("validate", "-d", "d.yaml", "-o", tmp_path).exit_code == 0
    assert calls.validated[0].config.model == str(best)


def test_without_a_model_and_a_run_it_is_an_error(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    result = invoke("validate", "-d", "d.yaml", "-o", tmp_path)
    assert result.exit_code == 2
    assert "--model" in result.stderr


def test_a_data_set_is_needed(invoke: Invoke, calls: Calls) -> None:
    assert invoke("validate", "-m", "best.pt").exit_code == 2


def test_resuming_and_validating_exclude_each_other(invoke: Invoke, calls: Calls) -> None:
    assert invoke("train", "--resume", "--validate-only").exit_code == 2


def test_a_json_file_that_cannot_be_written_is_an_error_before_the_work(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    file = tmp_path / ("x" * 300)
    result = invoke("validate", "-d", "d.yaml", "-m", "a.pt", "--json", file)
    assert result.exit_code == 2 and "cannot be written (File name too long)" in result.stderr
    result = invoke("validate", "-d", "d.yaml", "-m", "a.pt", "--json", "-")
    assert result.exit_code == 2 and "--json -: name a file" in result.stderr
    assert not calls.validated
