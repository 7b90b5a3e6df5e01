"""Validation by class, worst first: which objects need more photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hsrloop.records import ClassScore, Metrics

# Below this AP a class is called out. A guess: half of what a usable class reaches.
_WEAK_AP = 0.4


def worst_first(classes: Iterable[ClassScore]) -> list[ClassScore]:
    """Return the classes by rising mAP50-95, then by name."""
    return sorted(classes, key=lambda score: (score.ap50_95, score.name))


def scores_table(metrics: Metrics) -> RenderableType:
    """Return the table that `hsrloop validate` prints."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("class", overflow="fold")
    for title in ("images", "boxes", "mAP50-95", "mAP50", "precision", "recall", "best conf"):
        table.add_column(title, justify="right")
    for score in worst_first(metrics.classes):
        table.add_row(
            score.name,
            str(score.images),
            str(score.boxes),
            *_numbers(score.ap50_95, score.ap50, score.precision, score.recall),
            f"{score.best_conf:.2f}" if score.ap50 else "-",  # found at no confidence
            style="yellow" if score.ap50_95 < _WEAK_AP else None,
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        str(sum(score.boxes for score in metrics.classes)),
        *_numbers(metrics.ap50_95, metrics.ap50, metrics.precision, metrics.recall),
        f"{metrics.best_conf:.2f}",
        style="bold",
    )
    return Group(table, "", *advice(metrics))


def advice(metrics: Metrics) -> list[RenderableType]:
    """Return what to do with the scores: photograph again, and which threshold to use."""
    lines: list[RenderableType] = []
    weak = [score.name for score in worst_first(metrics.classes) if score.ap50_95 < _WEAK_AP]
    if weak:
        lines.append(Text.assemble(("Photograph these again: ", "yellow"), ", ".join(weak)))
    lines.append(
        f"The best F1 over all classes is at confidence {metrics.best_conf:.2f}; "
        "a class of special interest may use its own."
    )
    return lines


def scores_json(metrics: Metrics) -> dict[str, Any]:
    """Return validation as plain values, classes worst first."""
    return {
        "metrics": {
            "mAP50": metrics.ap50,
            "mAP50-95": metrics.ap50_95,
            "precision": metrics.precision,
            "recall": metrics.recall,
        },
        "best_conf": metrics.best_conf,
        "classes": [_class_json(score) for score in worst_first(metrics.classes)],
    }


def class_scores(rows: Iterable[Mapping[str, Any]]) -> list[ClassScore]:
    """Return the scores that an event carries as plain dicts."""
    return [ClassScore(**row) for row in rows]


def _class_json(score: ClassScore) -> dict[str, Any]:
    row = dataclasses.asdict(score)
    row["best_conf"] = score.best_conf if score.ap50 else None
    row["mAP50"] = row.pop("ap50")
    row["mAP50-95"] = row.pop("ap50_95")
    return row


def _numbers(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]
