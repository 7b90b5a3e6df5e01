"""Cut-outs: what is found, what is left out and why, and what is made of their pixels."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest

from hsrloop.data.plan import Paste
from hsrloop.data.scenes.cutout_files import annotated_sources, distractor_sources, read_all
from hsrloop.data.scenes.cutouts import CHANNELS, Cutout, CutoutStore, read_cutout
from hsrloop.data.scenes.paste import draw_paste
from hsrloop.errors import DatasetError
from tests.conftest import SHAPES, write_material, write_object


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    write_material(tmp_path)
    return tmp_path / "annotated"


def read(folder: Path) -> list[Cutout]:
    return read_all(annotated_sources(folder, SHAPES), threads=2)


def test_masks_of_both_names_and_transparency_are_found(annotated: Path) -> None:
    (annotated / "square/masks/o1_mask.png").rename(annotated / "square/masks/o1.png")
    write_object(annotated / "disc/images/c.png", None, seed=5)
    write_object(annotated / "bar/alone.png", None, seed=6)
    found = read(annotated)
    assert [(c.label, c.path.name, c.mask is None) for c in found] == [
        (0, "o0.png", False), (0, "o1.png", False), (1, "c.png", True),
        (1, "o0.png", False), (1, "o1.png", False), (2, "alone.png", True),
    ]  # fmt: skip


def test_an_unknown_class_folder_names_both_sides(annotated: Path) -> None:
    (annotated / "circle").mkdir()
    with pytest.raises(DatasetError, match=r"no class is named circle\. .* square, disc, bar"):
        read(annotated)


def test_what_cannot_be_used_is_counted_and_located(
    annotated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = annotated / "square/masks"
    cv2.imwrite(str(masks / "o0_mask.png"), np.ones((120, 160), np.uint8))
    cv2.imwrite(str(masks / "o1_mask.png"), np.full((60, 80), 255, np.uint8))
    (annotated / "disc/images/o0.png").write_bytes(b"no image")
    cv2.imwrite(str(annotated / "disc/images/bare.jpg"), np.zeros((9, 9, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        found = read(annotated)
    assert [c.path.name for c in found] == ["o1.png"]
    assert "4 bad cut-outs left out" in caplog.text
    assert "square/images/o0.png: its mask is empty" in caplog.text
    assert "(largest value 1)" in caplog.text
    assert "its mask is 80 x 60 px, the image 160 x 120" in caplog.text
    assert "bare.jpg: it has neither a mask nor transparency" in caplog.text
    assert "its mask would be masks/bare_mask.png or masks/bare.png" in caplog.text
    (annotated / "disc/masks/o1_mask.png").write_bytes(b"no mask")
    assert read(annotated) == []
    assert "its mask o1_mask.png: it cannot be decoded" in caplog.text


def test_odd_files_are_left_out_like_others(
    annotated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = annotated / "square/images"
    (images / "link.png").symlink_to(images / "gone.png")
    (images / "folder.png").mkdir()
    specks = np.zeros((1600, 1600), np.uint8)
    specks[::400, ::400] = 255
    cv2.imwrite(str(images / "specks.jpg"), np.zeros((1600, 1600, 3), np.uint8))
    cv2.imwrite(str(annotated / "square/masks/specks.png"), specks)
    (annotated / "square/masks/o1_mask.png").rename(annotated / "square/masks/o1_mask.PNG")
    with caplog.at_level(logging.WARNING):
        found = read(annotated)
    assert [c.path.name for c in found if c.label == 0] == ["o0.png", "o1.png"]
    assert "3 bad cut-outs left out" in caplog.text
    assert "specks.jpg: its mask has only specks" in caplog.text
    assert "link.png: [Errno 2]" in caplog.text and "folder.png: [Errno 21]" in caplog.text


def test_an_object_that_the_frame_cuts_is_used_only_where_there_is_no_other(
    annotated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("square/masks/o0_mask.png", "disc/masks/o0_mask.png", "disc/masks/o1_mask.png"):
        mask = cv2.imread(str(annotated / name), cv2.IMREAD_GRAYSCALE)
        cv2.rectangle(mask, (0, 50), (80, 70), 255, -1)
        cv2.imwrite(str(annotated / name), mask)
    with caplog.at_level(logging.WARNING):
        found = read(annotated)
    assert [(c.label, c.path.name) for c in found] == [(0, "o1.png"), (1, "o0.png"), (1, "o1.png")]
    assert "1 cut-outs left out: the frame" in caplog.text
    assert "2 cut-outs are cut by the frame, and used" in caplog.text
    corner = np.zeros((40, 60, 4), np.uint8)
    corner[:30, :50] = 255
    cv2.imwrite(str(annotated / "square/images/corner.png"), corner)
    assert read_cutout(annotated / "square/images/corner.png", None, 0).cut
    tight = np.full((40, 60, 4), 255, np.uint8)
    cv2.imwrite(str(annotated / "square/images/tight.png"), tight)
    assert not read_cutout(annotated / "square/images/tight.png", None, 0).cut


def test_distractors_have_no_label_and_no_class_among_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_object(tmp_path / "a.png", None, seed=1)
    write_object(tmp_path / "pen/images/b.png", tmp_path / "pen/masks/b.png", seed=2)
    write_object(tmp_path / "disc/c.png", None, seed=3)
    with caplog.at_level(logging.WARNING):
        sources = distractor_sources(tmp_path, SHAPES)
    assert [(s.path.name, s.label) for s in sources] == [("a.png", -1), ("b.png", -1)]
    assert "disc left out" in caplog.text


def test_prepared_pixels_go_on_beyond_the_mask_and_edges_fall_on_the_outline(
    annotated: Path,
) -> None:
    found = read(annotated)
    store = CutoutStore(found, imgsz=160, threads=2)
    for i, cutout in enumerate(found):
        pixels = store[i]
        height, width = pixels.shape[:2]
        assert pixels.shape[2] == CHANNELS and not pixels.flags.writeable
        assert max(height, width) <= 96 and pixels.dtype == np.uint8
        colour = pixels[height // 2, width // 2, :3].astype(int)
        np.testing.assert_allclose(pixels[..., :3].reshape(-1, 3), [colour] * (height * width))
        outline = np.zeros((height, width), np.uint8)
        scale = np.array([width, height]) / cutout.extent
        fixed = [np.rint((p * scale - 0.5) * 64).astype(np.int32) for p in cutout.contours]
        cv2.fillPoly(outline, fixed, 1, shift=6)
        for channel in (3, 4, 5):
            assert (pixels[[0, -1]][..., channel] == 0).all()
            apart = (pixels[..., channel] > 127) != (outline > 0)
            near = cv2.dilate(outline, np.ones((3, 3))) != cv2.erode(outline, np.ones((3, 3)))
            assert not (apart & ~near).any()  # they differ on the outline alone
        assert 0.9 < np.count_nonzero(outline) / (cutout.area * max(height, width) ** 2) < 1.15
        assert cutout.mean_rgb == pytest.approx(colour, abs=1)


def test_specks_and_pinholes_are_mended_and_real_holes_stay(tmp_path: Path) -> None:
    mask = np.zeros((200, 200), np.uint8)
    cv2.circle(mask, (100, 100), 60, 255, -1)
    cv2.circle(mask, (100, 100), 30, 0, -1)
    mask[100, 55] = 0
    mask[10:12, 10:12] = 255
    cv2.imwrite(str(tmp_path / "a.png"), np.full((200, 200, 3), 99, np.uint8))
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    ring = read_cutout(tmp_path / "a.png", tmp_path / "m.png", 0)
    assert len(ring.contours) == 2
    assert ring.area * ring.width**2 == pytest.approx(np.pi * (59**2 - 31**2), rel=0.03)


def test_small_objects_are_drawn_from_averages(tmp_path: Path) -> None:
    """A fine chequer drawn small is grey; a few of its pixels would be black or white."""
    chequer = np.indices((240, 240)).sum(0) % 2 * 255
    image = np.dstack([chequer] * 3 + [np.full((240, 240), 255)]).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    cutout = read_cutout(tmp_path / "a.png", None, 0)
    store = CutoutStore([cutout], imgsz=640)
    assert [max(store.level(0, k).shape) for k in range(4)] == [298, 149, 75, 38]
    assert [store.level_for(0, px) for px in (600, 298, 150, 149, 74, 30, 2)] == [
        0,
        0,
        0,
        1,
        2,
        3,
        3,
    ]
    canvas = np.zeros((64, 64, 4), np.uint8)
    affine = (0.8, 0.0, 0.1, 0.0, 0.8, 0.1)
    draw_paste(canvas, Paste(0, affine, 0, 0, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), store)
    np.testing.assert_allclose(canvas[22:42, 22:42, :3], 127, atol=6)


def test_gains_and_shadows_show(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((100, 100, 4), (60, 80, 100, 255), np.uint8))
    store = CutoutStore([read_cutout(tmp_path / "a.png", None, 0)], imgsz=320)
    canvas = np.full((100, 100, 4), 200, np.uint8)
    affine = (0.5, 0.0, 0.25, 0.0, 0.5, 0.25)
    draw_paste(canvas, Paste(0, affine, 0, 1, (3.0, 0.5, 1.0), (0.0, 0.2, 0.5)), store)
    np.testing.assert_allclose(canvas[50, 50, :3], (255, 40, 60), atol=1)
    np.testing.assert_allclose(canvas[80, 50, :3], 100, atol=3)  # below it lies its shadow
    assert (canvas[5] == 200).all() and (canvas[:, 5] == 200).all()
