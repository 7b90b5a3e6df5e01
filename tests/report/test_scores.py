"""Validation by class."""

from __future__ import annotations

import dataclasses
import io
import json

from rich.console import Console

from hsrloop.records import ClassScore, Metrics
from hsrloop.report.scores import scores_json, scores_table, worst_first


def score(name: str, ap: float) -> ClassScore:
    return ClassScore(
        name=name, images=2, boxes=5, precision=0.5, recall=0.5, ap50=ap, ap50_95=ap, best_conf=0.31
    )


METRICS = Metrics(
    ap50=0.5,
    ap50_95=0.4,
    precision=0.6,
    recall=0.7,
    best_conf=0.42,
    classes=(score("cup", 0.9), score("fork", 0.1), score("bowl", 0.1)),
)


def shown(metrics: Metrics) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120, highlight=False).print(scores_table(metrics))
    return stream.getvalue()


def test_worst_first_then_by_name() -> None:
    assert [s.name for s in worst_first(METRICS.classes)] == ["bowl", "fork", "cup"]


def test_the_table_names_thresholds_and_what_to_photograph() -> None:
    text = shown(METRICS)
    assert text.index("bowl") < text.index("fork") < text.index("cup")
    assert "Photograph these again: bowl, fork" in text
    assert "confidence 0.42" in text
    assert "0.31" in text


def test_no_class_with_ground_truth_is_a_table_of_one_row() -> None:
    empty = Metrics(ap50=0.0, ap50_95=0.0, precision=0.0, recall=0.0, best_conf=0.0)
    assert "Photograph" not in shown(empty)


def test_json_holds_the_same() -> None:
    data = json.loads(json.dumps(scores_json(METRICS)))
    assert data["metrics"] == {"mAP50": 0.5, "mAP50-95": 0.4, "precision": 0.6, "recall": 0.7}
    assert data["best_conf"] == 0.42
    assert [row["name"] for row in data["classes"]] == ["bowl", "fork", "cup"]
    assert data["classes"][0]["mAP50-95"] == 0.1


def test_a_class_that_is_never_found_has_no_confidence_to_use() -> None:
    lost = dataclasses.replace(
        METRICS.classes[0], name="lost", ap50=0.0, ap50_95=0.0, best_conf=0.0
    )
    metrics = dataclasses.replace(METRICS, classes=(lost, *METRICS.classes))
    (row,) = [line for line in shown(metrics).splitlines() if line.startswith("lost")]
    assert row.split()[-1] == "-"
    by_name = {row["name"]: row for row in scores_json(metrics)["classes"]}
    assert by_name["lost"]["best_conf"] is None
    assert by_name[METRICS.classes[0].name]["best_conf"] == METRICS.classes[0].best_conf
