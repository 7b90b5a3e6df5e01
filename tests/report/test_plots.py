"""Pictures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from hsrloop.errors import OutputError
from hsrloop.report.plots import class_colour, contact_sheet, draw_predictions, save_picture


def test_a_box_is_drawn_in_its_class_colour_and_the_input_is_kept() -> None:
    image = np.zeros((80, 120, 3), np.uint8)
    found = np.array([[20, 30, 90, 70, 0.8, 1]], np.float32)
    drawn = draw_predictions(image, found, ("cup", "fork"))
    assert not image.any()
    assert tuple(drawn[70, 50]) == class_colour(1, 2)
    assert tuple(drawn[50, 50]) == (0, 0, 0)


def test_nothing_found_is_the_same_picture() -> None:
    image = np.full((40, 40, 3), 7, np.uint8)
    assert (draw_predictions(image, np.zeros((0, 6), np.float32), ("cup",)) == image).all()


def test_classes_have_colours_of_their_own() -> None:
    assert len({class_colour(label, 30) for label in range(30)}) == 30


def test_a_sheet_is_filled_with_white() -> None:
    sheet = contact_sheet([np.zeros((10, 20, 3), np.uint8)] * 5, columns=4)
    assert sheet.shape == (20, 80, 3)
    assert (sheet[10:, 20:] == 255).all() and not sheet[10:, :20].any()


def test_a_picture_keeps_its_colours_on_disk(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    save_picture(tmp_path / "new" / "red.png", red)
    assert tuple(cv2.imread(str(tmp_path / "new" / "red.png"))[0, 0]) == (0, 0, 255)


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "red.png").mkdir()
    with pytest.raises(OutputError):
        save_picture(tmp_path / "red.png", np.zeros((8, 8, 3), np.uint8))
