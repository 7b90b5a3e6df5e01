"""The doctor's report on a terminal, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from hsrloop.errors import OutputError
from hsrloop.records import CheckReport, ClassCount, Finding, Problem, SplitCount
from hsrloop.report import sheet
from hsrloop.report.checkup import CheckBar, checkup, checkup_json, clean
from hsrloop.report.sheet import draw_sheet, save_sheet

ROOT = Path("/data/set")
LOST = Finding(
    kind="class-unknown",
    severity="warning",
    split="train",
    title="7 label rows in train: class beyond names",
    effect="The row is left out.",
    remedy="Correct the number.",
    problems=tuple(
        Problem("class-unknown", ROOT / f"labels/train/{i}.txt", "class 7", i + 1) for i in range(7)
    ),
)


def report(*findings: Finding, classes: int = 3, boxes: int = 4) -> CheckReport:
    rng = np.random.default_rng(0)
    return CheckReport(
        yaml=ROOT / "data.yaml",
        root=ROOT,
        imgsz=640,
        splits=(
            SplitCount(split="train", images=5, backgrounds=1, unreadable=0, boxes=3, classes=2),
            SplitCount(split="val", images=2, backgrounds=0, unreadable=0, boxes=1, classes=1),
        ),
        classes=tuple(
            ClassCount(
                name=f"cup {i}",
                boxes={"train": i, "val": 1},
                images={"train": i, "val": 1},
                median_px=40.0,
            )
            for i in range(classes)
        ),
        findings=findings,
        boxes_cxcywh=rng.random((boxes, 4), dtype=np.float32),
        sides_px=200 * rng.random((boxes, 2), dtype=np.float32) + 1,
    )


def shown(result: CheckReport, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(checkup(result))
    return stream.getvalue()


def test_a_finding_names_its_first_places_its_effect_and_its_remedy() -> None:
    text = shown(report(LOST))
    assert "WARNING 7 label rows in train: class beyond names" in text
    assert "labels/train/0.txt:1: class 7" in text and "labels/train/4.txt:5" in text
    assert "labels/train/5.txt" not in text and "... and 2 more" in text
    assert "Effect  The row is left out." in text and "Remedy  Correct the number." in text


@pytest.mark.parametrize(
    ("severity", "last"),
    [
        ("error", "1 error. Training would not start."),
        ("warning", "1 warning. Training would suffer."),
        ("note", "1 note. Ready to train."),
    ],
)
def test_the_last_line_is_the_verdict(severity: str, last: str) -> None:
    graded = dataclasses.replace(LOST, severity=severity)
    assert shown(report(graded)).rstrip().endswith(last)
    assert shown(report()).rstrip().endswith("Ready to train.")


def test_many_classes_are_shortened_to_those_with_the_fewest_boxes() -> None:
    text = shown(report(classes=90))
    assert "cup 39" in text and "cup 40" not in text
    assert "... and 50 more classes, each with at least 39 boxes in train" in text


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal(width: int) -> None:
    text = " ".join(["word"] * 60)
    long = dataclasses.replace(LOST, effect=text, remedy=text)
    lines = shown(report(long), width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


def test_control_characters_are_spelled_out() -> None:
    assert clean("a\x1b[31m\udcff\n") == "a\\x1b[31m\\udcff\\n"
    assert clean("湯呑み") == "湯呑み"


def test_json_holds_every_place() -> None:
    data = json.loads(json.dumps(checkup_json(report(LOST))))
    assert data["ready"] is False and data["splits"]["train"]["backgrounds"] == 1
    (finding,) = data["findings"]
    assert finding["count"] == len(finding["places"]) == 7
    assert finding["places"][2] == {
        "file": "/data/set/labels/train/2.txt", "line": 3, "text": "class 7",
    }  # fmt: skip
    assert checkup_json(report(boxes=0))["box_sides_px"]["p50"] is None


def test_a_bar_is_silent_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with CheckBar(Console(file=stream)) as bar:
        bar("train images", 1, 2)
        bar("train images", 2, 2)
    assert stream.getvalue().strip() == ""


@pytest.mark.parametrize(("classes", "boxes"), [(1, 0), (3, 1), (90, 500)])
def test_the_picture_is_drawn_for_any_set(tmp_path: Path, classes: int, boxes: int) -> None:
    save_sheet(report(classes=classes, boxes=boxes), tmp_path / "sheet.png")
    pixels = cv2.imread(str(tmp_path / "sheet.png"))
    assert pixels is not None and pixels.shape[1] == 1440
    assert (pixels != 255).any(axis=2).mean() > 0.01


def test_the_picture_has_a_bar_for_each_class_and_sums_up_the_rest() -> None:
    few = draw_sheet(report(classes=3)).axes[0]
    assert [label.get_text() for label in few.get_yticklabels()] == ["cup 2", "cup 1", "cup 0"]
    assert [bar.get_width() for bar in few.patches[:3]] == [2, 1, 0]
    many = draw_sheet(report(classes=90)).axes[0]
    labels = [label.get_text() for label in many.get_yticklabels()]
    assert len(labels) == 60 and labels[-1] == "31 more classes"


@pytest.mark.parametrize(("name", "warned"), [("湯呑み $x_1$", True), ("tasse à thé", False)])
def test_names_no_font_has_are_drawn_as_boxes_and_a_line_says_so(
    name: str,
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sheet, "_installed_fonts", lambda: ["DejaVu Sans"])
    odd = report(classes=1)
    cup = dataclasses.replace(odd.classes[0], name=name)
    save_sheet(dataclasses.replace(odd, classes=(cup,)), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert ("no font here has them" in caplog.text) == warned
    assert len(caplog.records) == warned


def test_fonts_that_have_more_letters_come_after_the_one_for_latin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.font_manager import fontManager

    here = ["Zapf", "Noto Sans CJK JP", "DejaVu Sans", "Noto Sans Mono", "IPAexGothic"]
    monkeypatch.setattr(fontManager, "get_font_names", lambda: here)
    assert sheet._installed_fonts() == ["DejaVu Sans", "IPAexGothic", "Noto Sans CJK JP"]


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        save_sheet(report(), tmp_path / "sheet.png")
