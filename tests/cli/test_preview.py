"""The contact sheet shows what training sees."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from hsrloop.cli import preview as preview_module
from hsrloop.cli.preview import chosen, preview_tiles
from hsrloop.config import TrainConfig
from tests.cli.conftest import Invoke
from tests.conftest import write_material


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_module, "prepare", lambda: None)


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sheet_of_real_and_synthetic_images_and_nothing_else_is_written(
    invoke: Invoke, tiny_dataset: Path, tmp_path: Path
) -> None:
    write_material(tmp_path / "material")
    before, sheet = files_below(tmp_path), tmp_path / "out" / "sheet.png"
    result = invoke(
        "preview", "-d", tiny_dataset, "-o", sheet, "--imgsz", "96", "--images", "12",
        "--annotated-dir", tmp_path / "material/annotated",
        "--backgrounds-dir", tmp_path / "material/backgrounds",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "16 synthetic images an epoch beside 8 real ones: 4 cut-outs of 2 of 3" in result.output
    assert "on 3 backgrounds" in result.output
    image = cv2.imread(str(sheet))
    assert image.shape == (2 * 96, 6 * 96, 3)
    after = files_below(tmp_path)
    assert after.pop(sheet) and after == before


def test_tiles_are_the_streams_images(tiny_dataset: Path) -> None:
    write_material(tiny_dataset.parent)
    config = TrainConfig(imgsz=96, mosaic=0)
    tiles, _ = preview_tiles(config, str(tiny_dataset), images=8)
    again, _ = preview_tiles(config, str(tiny_dataset), images=8)
    real, _ = preview_tiles(config.replace(dynamic_synthetic=False), str(tiny_dataset), images=4)
    assert len(tiles) == 8 and all(np.array_equal(a, b) for a, b in zip(tiles, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(tiles, real, strict=False))


def test_half_are_real_where_there_are_enough() -> None:
    assert chosen(8, 24, images=6) == [0, 1, 2, 8, 9, 10]
    assert chosen(2, 24, images=6) == [0, 1, 2, 3, 4, 5]
    assert chosen(8, 9, images=6) == [0, 1, 2, 3, 4, 8]
    assert chosen(0, 9, images=3) == [0, 1, 2]
    assert chosen(3, 3, images=8) == [0, 1, 2]


def test_without_a_data_set_it_says_so(invoke: Invoke) -> None:
    result = invoke("preview")
    assert result.exit_code == 2 and "Use --dataset path/to/data.yaml." in result.stderr


def test_a_name_that_is_no_pictures_is_refused_before_the_work(
    invoke: Invoke, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_module, "preview_tiles", None)
    result = invoke("preview", "-d", tiny_dataset, "-o", tmp_path / "sheet.txt")
    assert result.exit_code == 2 and "it must end in .png or .jpg." in result.stderr
    sheet = tiny_dataset.parent / "images/train/sheet.png"
    result = invoke("preview", "-d", tiny_dataset, "-o", sheet)
    assert result.exit_code == 2 and "lies inside the data set" in result.stderr


def test_a_broken_image_is_shown_without_its_boxes(tiny_dataset: Path) -> None:
    image = sorted((tiny_dataset.parent / "images/train").iterdir())[0]
    whole = image.read_bytes()
    image.write_bytes(whole[:60] + bytes(20) + whole[80:])  # its chunks are whole, not what is in
    tiles, _ = preview_tiles(TrainConfig(imgsz=96, mosaic=0, hsv_v=0), str(tiny_dataset), images=8)
    flat = [tile for tile in tiles if (tile == tile[0, 0]).all()]
    assert len(flat) == 1
