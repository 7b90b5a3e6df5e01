"""`hsrloop check`: what it prints where, and how it exits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsrloop.cli import check
from tests.cli.conftest import Invoke
from tests.conftest import write_material


def test_a_sound_set_exits_with_0(invoke: Invoke, tiny_dataset: Path) -> None:
    result = invoke("check", "-d", tiny_dataset)
    assert result.exit_code == 0
    assert result.stdout.startswith(str(tiny_dataset)) and "Ready to train." in result.stdout
    assert "train        8" in result.stdout


def test_a_set_that_would_suffer_exits_with_1(invoke: Invoke, tiny_dataset: Path) -> None:
    label = tiny_dataset.parent / "labels/train/train_00.txt"
    label.write_text("0 .5 .5 .2 .2\n5 .5 .5 .1 .1\n")
    result = invoke("check", "-d", tiny_dataset.parent)
    assert result.exit_code == 1
    assert "labels/train/train_00.txt:2: class 5, but data.yaml names 3 classes" in result.stdout


@pytest.mark.parametrize("train", ["", "images/none"])
def test_cutouts_and_backgrounds_make_up_for_training_images(
    invoke: Invoke, tiny_dataset: Path, train: str
) -> None:
    """As `train` sees it."""
    (tiny_dataset.parent / "images/none").mkdir()
    tiny_dataset.write_text(f"train: {train}\nval: images/val\nnames: [square, disc, bar]\n")
    assert invoke("check", "-d", tiny_dataset).exit_code == 1
    write_material(tiny_dataset.parent)
    result = invoke("check", "-d", tiny_dataset)
    assert result.exit_code == 1 and "bar (class 2)" in result.output
    shutil.copytree(tiny_dataset.parent / "annotated/disc", tiny_dataset.parent / "annotated/bar")
    result = invoke("check", "-d", tiny_dataset)
    assert result.exit_code == 0, result.output
    (tiny_dataset.parent / "annotated/square").rename(tiny_dataset.parent / "annotated/sqare")
    result = invoke("check", "-d", tiny_dataset)
    assert result.exit_code == 1 and "no class is named sqare" in result.output
    (tiny_dataset.parent / "annotated/sqare").rename(tiny_dataset.parent / "annotated/square")
    for background in (tiny_dataset.parent / "backgrounds").iterdir():
        background.unlink()
    result = invoke("check", "-d", tiny_dataset)
    assert result.exit_code == 1 and "no background can be used" in result.output
    tiny_dataset.write_text(f"train: {train}\nnames: [square, disc, bar]\n")
    result = invoke("check", "-d", tiny_dataset)
    assert result.exit_code == 1 and "neither training nor validation images" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "gone.yaml"], "does not exist"),
        ([], "--dataset"),
        (["-d", ".", "--imgsz", "3"], "--imgsz"),
    ],
)
def test_a_mistake_of_the_user_exits_with_2(
    invoke: Invoke, tiny_dataset: Path, arguments: list[str], message: str
) -> None:
    result = invoke("check", *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_json_is_alone_on_stdout(tiny_dataset: Path) -> None:
    images = tiny_dataset.parent / "images/train"
    (images / "train_00.png").write_bytes(b"")
    damaged = (images / "train_01.png").read_bytes()
    (images / "train_01.png").write_bytes(damaged[:80] + b"\0" * 40 + damaged[120:])
    command = [sys.executable, "-m", "hsrloop", "check", "-d", str(tiny_dataset), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    (finding,) = (f for f in data["findings"] if f["kind"] == "unreadable")
    assert [Path(place["file"]).name for place in finding["places"]] == [
        "train_00.png", "train_01.png",
    ]  # fmt: skip
    assert "Traceback" not in done.stderr


def test_a_picture_on_request(invoke: Invoke, tiny_dataset: Path, tmp_path: Path) -> None:
    result = invoke("check", "-d", tiny_dataset, "--plot", tmp_path / "sheet.png")
    assert result.exit_code == 0 and f"Written: {tmp_path / 'sheet.png'}" in result.stdout
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("tiny/sheet.png", "lies inside the data set"),
        ("tiny/images/train/sheet.png", "lies inside the data set"),
        ("link/sheet.png", "lies inside the data set"),
        ("no/sheet.png", "its folder does not exist"),
        ("sheet.jpg", "must end in .png"),
        ("folder.png", "is a folder"),
    ],
)
def test_a_bad_place_for_the_picture_is_an_error_before_the_work(
    invoke: Invoke,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plot: str,
    message: str,
) -> None:
    monkeypatch.setattr(check, "check_dataset", lambda *_, **__: pytest.fail("worked"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to("tiny")
    before = sorted(tiny_dataset.parent.rglob("*"))
    result = invoke("check", "-d", tiny_dataset, "--plot", tmp_path / plot)
    assert result.exit_code == 2 and message in result.stderr
    assert sorted(tiny_dataset.parent.rglob("*")) == before


def test_ctrl_c_is_no_verdict(
    invoke: Invoke, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_dataset", interrupted)
    assert invoke("check", "-d", tiny_dataset).exit_code == 130
