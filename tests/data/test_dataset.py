"""data.yaml as users write it, labels with faults, and one clear message for each hopeless case."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from hsrloop.data.doctor.check import check_dataset
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.alike import group_alike
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.sets.labels import label_path, parse_labels
from hsrloop.data.sets.manifest import read_manifest
from hsrloop.data.sets.split import hold_out
from hsrloop.errors import DatasetError


def rewrite(file: Path, **changes: object) -> Path:
    """Change keys of a data.yaml; None removes one."""
    data = yaml.safe_load(file.read_text())
    data.update(changes)
    file.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return file


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def scene(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return cv2.resize(small, (90, 80), interpolation=cv2.INTER_NEAREST)


def test_a_plain_set_loads_and_is_not_written_to(tiny_dataset: Path) -> None:
    before = listing(tiny_dataset.parent)
    spec = load_dataset(tiny_dataset)
    assert (len(spec.train), len(spec.val), spec.nc, spec.val_held_out) == (8, 4, 3, False)
    assert spec.names == ("square", "disc", "bar")
    ref = spec.train[0]
    assert (ref.height, ref.width) == (160, 128)
    assert ref.boxes_cxcywh.dtype == np.float32 and ref.labels.dtype == np.int64
    assert listing(tiny_dataset.parent) == before


@pytest.mark.parametrize(
    "path", ["", None, ".", "../tiny", "/content/gone/tiny", r"C:\Users\me\tiny", "elsewhere"]
)
def test_path_is_found_from_the_yaml_not_the_current_folder(
    tiny_dataset: Path, path: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    spec = load_dataset(rewrite(tiny_dataset, path=path))
    assert len(spec.train) == 8


def test_an_absolute_path_is_used(tiny_dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "yamls" / "data.yaml"
    other.parent.mkdir()
    shutil.copy(tiny_dataset, other)
    assert len(load_dataset(rewrite(other, path=str(tiny_dataset.parent))).train) == 8


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("../images/train", "../images/val"),
        ("/content/tiny/images/train", "/content/tiny/images/val"),
        (r"D:\sets\tiny\images\train", r"D:\sets\tiny\images\val"),
        (["images/train"], ["./images/val"]),
    ],
)
def test_moved_and_roboflow_entries_are_found_and_said(
    tiny_dataset: Path, train: object, val: object, caplog: pytest.LogCaptureFixture
) -> None:
    spec = load_dataset(rewrite(tiny_dataset, train=train, val=val))
    assert (len(spec.train), len(spec.val)) == (8, 4)
    assert ("using" in caplog.text) == isinstance(train, str)


def test_txt_lists_with_every_kind_of_path(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny_dataset.parent
    lines = [
        "./images/train/train_00.png", "images/train/train_01.png",
        str(root / "images/train/train_02.png"), "/old/tiny/images/train/train_03.png",
        "images/train/missing.png", "images/train/train_01.png", "",
    ]  # fmt: skip
    (root / "train.txt").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    spec = load_dataset(rewrite(tiny_dataset, train="train.txt"))
    assert [ref.path.stem for ref in spec.train] == [f"train_0{i}" for i in range(4)]
    assert "train.txt:5: images/train/missing.png does not exist" in caplog.text


def test_names_as_map_list_or_only_nc(tiny_dataset: Path) -> None:
    names = {2: "bar", "0": "square", 1: "disc"}
    assert load_dataset(rewrite(tiny_dataset, names=names)).names == ("square", "disc", "bar")
    nc = load_dataset(rewrite(tiny_dataset, names=None, nc=3))
    assert nc.names == ("class_0", "class_1", "class_2")
    assert load_dataset(rewrite(tiny_dataset, names=["a", "b", 7], nc="3")).names[2] == "7"


def test_download_is_never_run(tiny_dataset: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    load_dataset(rewrite(tiny_dataset, download=f"open({str(mark)!r}, 'w').close()"))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist. Give the path of a data.yaml with --dataset."),
        ("train: [", ":1: not valid YAML"),
        ('path: "C:\\data"\ntrain: x', "forward slashes"),
        ("", "holds nothing; it must map train, val and names"),
        ("- a\n", "holds a list"),
        ("train: x\n", "has neither 'names' nor 'nc'"),
        ("names: [a]\n", "no 'train'; add the folder"),
        ("names: [a]\nnc: 2\ntrain: x\n", "nc is 2, but names has 1 entries"),
        ("nc: two\ntrain: x\n", "nc is 'two'; it must be a whole number"),
        ("names: {0: a, 2: b}\ntrain: x\n", "keys [0, 2]; they must be 0 to 1 without gaps"),
        ("names: {a: b}\ntrain: x\n", "names has the key 'a'"),
        ("names: a b\ntrain: x\n", "names is 'a b'; it must be a list or a map"),
        ("names: [yes, no]\ntrain: x\n", "names[0] is True; it must be text. Put it in quotes."),
        ("names: [a]\ntrain: 3\n", "train is 3; it must be a path or a list of paths"),
        ("names: [a]\ntrain: x\npath: 3\n", "path is 3; it must be a folder"),
        ("names: [a]\ntrain: gone/train\n", "gone/train does not exist"),
        ("names: [a]\ntrain: empty\n", "no images in train (empty). Known kinds: "),
        ("names: [a]\ntrain: note.md\n", "is neither a folder, a .txt list nor an image"),
    ],
)
def test_every_broken_yaml_gets_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.md").touch()
    file = tmp_path / "data.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DatasetError) as caught:
        load_dataset(file)
    assert message in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_val_folder_says_what_to_do(tiny_dataset: Path) -> None:
    with pytest.raises(DatasetError, match="Without a 'val' line, a tenth of train is held out"):
        load_dataset(rewrite(tiny_dataset, val="images/valid"))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_bytes(b"names: [\xff\xfe]")
    with pytest.raises(DatasetError, match="is not UTF-8 text"):
        load_dataset(tmp_path)


def test_a_bad_row_costs_only_itself_and_is_located(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    label = tiny_dataset.parent / "labels/train/train_00.txt"
    label.write_bytes(
        b"\xef\xbb\xbf0 0.5 0.5 0.2 0.2\r\n7 0.5 0.5 0.2 0.2\r\n-1 0.5 0.5 0.2 0.2\r\n"
        b"0.5 .5 .5 .2 .2\r\n0 nan 0.5 0.2 0.2\r\n0 a 0.5 0.2 0.2\r\n0 320 240 50 50\r\n"
        b"1 0.5 0.5 0 0.2\r\n1 0.5 0.5\r\n0 0.5 0.5 0.2 0.2\r\n1 0.1 0.1 0.3 0.1 0.3 0.3\r\n"
        b"1 .1 .1 .3 .3 .2 .2 .9\r\n2.0 1.005 .5 .2 .2\r\n"
    )
    ref = load_dataset(tiny_dataset).train[0]
    assert ref.labels.tolist() == [0, 1, 2]
    np.testing.assert_allclose(ref.boxes_cxcywh[1], [0.2, 0.2, 0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(ref.boxes_cxcywh[2], [0.9525, 0.5, 0.095, 0.2], atol=1e-6)
    assert ref.polygons[0] is None and ref.polygons[1] is not None
    assert "train: 9 bad label rows left out:" in caplog.text
    assert f"{label}:2: class 7, but data.yaml names 3 classes (0-2)." in caplog.text
    assert "... and 4 more" in caplog.text and "1 duplicate label rows" in caplog.text


def test_row_faults_are_named() -> None:
    rows = {
        "0 .5 .5 .2": "4 columns; a box has 5, a polygon 7, 9, 11, ...",
        "0 .5 .5 .2 .2 .9": "6 columns",
        "x .5 .5 .2 .2": "is not all finite numbers",
        "0 inf .5 .2 .2": "is not all finite numbers",
        "1.5 .5 .5 .2 .2": "class 1.5 is not a whole number",
        "0 1.2 .5 .2 .2": "coordinate 1.2 is outside 0 to 1; write fractions of the image",
        "0 .5 .5 -0.005 .2": "a box of size -0.005 x 0.2; both sides must be above 0",
        "0 .5 .5 0 -.2": "a box of size 0 x -0.2; both sides must be above 0",
        "0 .5 .5 .2 .2 .4 .4 2 .6 .6 2 .1 .1 0": "14 columns; a box has 5, a polygon 7, 9, 11, "
        "... (keypoints after the box? data.yaml must say so: kpt_shape: [number, 3])",
        "0 .5 .5 .2 .2 .4 .4 2 .6 .6 2": "coordinate 2 is outside 0 to 1; write fractions of the "
        "image, not pixels (keypoints after the box?",
        "0 .1 .1 .1 .2 .1 .3": "both sides must be above 0",
    }
    for row, message in rows.items():
        found = parse_labels(row, Path("a.txt"), 2)
        assert len(found.labels) == 0 and message in found.problems[0].text, row
        assert str(found.problems[0]).startswith("a.txt:1: ")
    pose = parse_labels("0 .5 .5 .2 .2 .4 .4 2 .6 .6 2", Path("a.txt"), 1, keypoint_columns=6)
    assert pose.polygons == (None,) and not pose.problems


def test_a_box_inside_keeps_its_digits() -> None:
    text = "0 0.123457 0.5 0.246914 0.999999"
    assert parse_labels(text, Path("a"), 1).boxes_cxcywh[0].tolist() == pytest.approx(
        np.float32([0.123457, 0.5, 0.246914, 0.999999]).tolist(), abs=0
    )


def test_labels_are_found_by_the_last_images_folder_and_beside_a_link(tmp_path: Path) -> None:
    given = tmp_path / "images" / "a" / "images" / "b.c.JPG"
    assert label_path(given) == tmp_path / "images" / "a" / "labels" / "b.c.txt"
    assert label_path(tmp_path / "x" / "y.png") == tmp_path / "x" / "y.txt"


def test_links_capitals_and_labels_beside_images(tiny_dataset: Path, tmp_path: Path) -> None:
    root, flat = tiny_dataset.parent, tmp_path / "flat"
    (flat / "images").mkdir(parents=True)
    (flat / "labels").mkdir()
    (flat / "plain").mkdir()
    os.symlink(root / "images/train/train_00.png", flat / "images" / "Link.PNG")
    (flat / "labels" / "Link.txt").write_text("1 .5 .5 .1 .1\n")
    shutil.copy(root / "images/train/train_01.png", flat / "plain" / "one.png")
    (flat / "plain" / "one.txt").write_text("2 .5 .5 .1 .1\n")
    os.symlink(flat / "images", flat / "images" / "loop")
    file = flat / "data.yaml"
    file.write_text("train: images\nval: plain\nnames: [a, b, c]\n")
    spec = load_dataset(file)
    by_name = {ref.path.name: ref.labels.tolist() for ref in spec.train}
    assert by_name["Link.PNG"] == [1] and spec.val[0].labels.tolist() == [2]


def test_backgrounds_stay_and_classes_without_images_are_named(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = tiny_dataset.parent / "labels/train"
    (labels / "train_00.txt").unlink()
    (labels / "train_01.txt").write_text("\n\n")
    spec = load_dataset(rewrite(tiny_dataset, names=["square", "disc", "bar", "cone"]))
    assert len(spec.train) == 8 and len(spec.train[0].labels) == len(spec.train[1].labels) == 0
    assert "no training image of 1 class: cone." in caplog.text
    assert "train: 1 of 8 images have no label file and count as background" in caplog.text
    assert "val:" not in caplog.text


def test_unreadable_images_are_left_out_with_their_name(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tiny_dataset.parent / "images/train"
    photo = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    jpeg = cv2.imencode(".jpg", photo)[1].tobytes()
    (images / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (images / "whole.jpg").write_bytes(jpeg)
    (images / "trailer.jpg").write_bytes(jpeg + b"maker notes" * 1000)
    (images / "train_00.png").write_bytes((images / "train_00.png").read_bytes()[:-900])
    (images / "train_01.png").write_bytes(b"")
    (images / "train_02.png").write_text("<html>not an image</html>")
    spec = load_dataset(tiny_dataset)
    names = {ref.path.name for ref in spec.train}
    assert {"whole.jpg", "trailer.jpg", "train_03.png"} <= names
    assert not names & {"cut.jpg", "train_00.png", "train_01.png", "train_02.png"}
    assert "train: 4 unreadable images left out:" in caplog.text
    assert f"{images / 'train_01.png'}: the file is empty" in caplog.text


def test_sizes_are_those_of_the_pixels_for_every_kind_and_turn(tiny_dataset: Path) -> None:
    from PIL import Image

    from hsrloop.data.sets.scan import decode

    images = tiny_dataset.parent / "images/train"
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    for kind in ("jpg", "png", "webp", "tif", "bmp"):
        named = {} if kind == "bmp" else {"exif": exif}
        picture.save(images / f"turned.{kind}", **named)
    xmp = (
        b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF "
        b"xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description rdf:about='' "
        b"xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation='6'/></rdf:RDF></x:xmpmeta>"
    )
    picture.save(images / "xmp.jpg", "JPEG")
    plain = (images / "xmp.jpg").read_bytes()
    block = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    (images / "xmp.jpg").write_bytes(plain[:2] + block + plain[2:])
    picture.convert("CMYK").save(images / "cmyk.jpg")
    picture.convert("L").save(images / "grey.png")
    picture.convert("RGBA").save(images / "alpha.png")
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(images / "deep.png")
    for ref in load_dataset(tiny_dataset).train:
        assert decode(ref.path).shape == (ref.height, ref.width, 3), ref.path
    sizes = {ref.path.name: (ref.height, ref.width) for ref in load_dataset(tiny_dataset).train}
    assert sizes["turned.jpg"] == (30, 20) and sizes["alpha.png"] == (20, 30)
    assert sizes["xmp.jpg"] == (20, 30)


def test_want_of_memory_is_no_damage(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image left out or grey for it would be so for the whole run."""
    spec = load_dataset(tiny_dataset)

    def too_much(*_: object) -> np.ndarray:
        error = cv2.error("Failed to allocate 9 bytes")
        error.code = cv2.Error.StsNoMem
        raise error

    monkeypatch.setattr(cv2, "imdecode", too_much)
    store = ImageStore(spec.train, imgsz=64)
    with pytest.raises(MemoryError, match="Failed to allocate"):
        store[0]
    assert not store.broken


def test_what_is_given_twice_in_data_yaml_is_an_error(tiny_dataset: Path) -> None:
    text = "train: images/train\nval: images/val\n"
    for names, said in (
        ("names:\n  0: cup\n  1: banana\n  1: apple\n", r"yaml:6: '1' is given twice in names"),
        ("names: [a, b, c]\ntrain: images/val\n", r"yaml:4: 'train' is given twice, the first"),
    ):
        tiny_dataset.write_text(text + names)
        with pytest.raises(DatasetError, match=said):
            load_dataset(tiny_dataset)


def test_what_a_mapping_overrides_of_a_merged_one_is_given_once(tiny_dataset: Path) -> None:
    merged = "base: &b {train: nowhere, val: images/val}\nmore: &m {nc: 3}\n<<: *b\n<<: *m\n"
    tiny_dataset.write_text(f"{merged}train: images/train\nnames: [square, disc, bar]\n")
    assert len(load_dataset(tiny_dataset).train) == 8


def test_nothing_usable_is_an_error_that_says_why(tiny_dataset: Path) -> None:
    root = tiny_dataset.parent
    for file in (root / "labels/train").iterdir():
        file.write_text("9 .5 .5 .1 .1\n")
    with pytest.raises(DatasetError, match="no usable box in train: all 8 label rows are bad"):
        load_dataset(tiny_dataset)
    for file in (root / "labels/train").iterdir():
        file.write_text("")
    with pytest.raises(DatasetError, match="all 8 label files are empty"):
        load_dataset(tiny_dataset)
    shutil.rmtree(root / "labels/train")
    with pytest.raises(DatasetError, match=r"there is no label file; for train_00.png it would be"):
        load_dataset(tiny_dataset)
    for file in (root / "images/train").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DatasetError, match="none of the 8 images in train can be read"):
        load_dataset(tiny_dataset)


@pytest.mark.parametrize("val", [None, "images/train", "./images/../images/train"])
def test_without_val_a_tenth_is_held_out_loudly(
    tiny_dataset: Path, val: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = rewrite(tiny_dataset, val=val)
    spec = load_dataset(file, seed=1)
    assert spec.val_held_out and len(spec.val) == 1 and len(spec.train) == 7
    assert "1 of 8 images are held out for validation (seed 1)" in caplog.text
    assert any(r.levelno == logging.WARNING for r in caplog.records)
    again = load_dataset(file, seed=1)
    assert again.val[0].path == spec.val[0].path and again.fingerprint == spec.fingerprint
    assert len({load_dataset(file, seed=s).val[0].path for s in range(8)}) > 1
    assert all(len(load_dataset(file, seed=s).val[0].labels) for s in range(8))


def test_look_alikes_are_held_out_together(tmp_path: Path) -> None:
    paths = []
    for i in range(40):  # bursts of four, slightly noisy
        noise = np.random.default_rng(100 + i).integers(0, 3, (80, 90, 3), dtype=np.uint8)
        paths.append(tmp_path / f"shot_{i:03d}.png")
        cv2.imwrite(str(paths[-1]), cv2.add(scene(i // 4), noise))
    groups = {tuple(group) for group in group_alike(paths)}
    assert groups == {tuple(range(4 * k, 4 * k + 4)) for k in range(10)}
    held = hold_out(paths, seed=0)
    assert len(held) == 4 and {i // 4 for i in held} == {held[0] // 4}


def test_one_giant_group_is_still_split(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path in paths:
        cv2.imwrite(str(path), scene(0))
    assert len(hold_out(paths, seed=0)) == 2
    assert hold_out(paths[:1], seed=0) == []


@pytest.mark.parametrize("seed", range(4))
def test_of_a_film_and_many_backgrounds_both_splits_show_objects(seed: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(50)]
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), scene(0 if i < 30 else i))
    held = hold_out(paths, seed=seed, shown=[{0} if i < 30 else () for i in range(50)])
    assert len(held) == 5 and held[:3] == [27, 28, 29]  # a tenth of each
    few = hold_out(paths, seed=seed, shown=[{0} if i in (3, 7) else () for i in range(50)])
    assert len({3, 7}.intersection(few)) == 1
    assert not hold_out(paths, seed=seed, shown=[{0} if i == 3 else () for i in range(50)])


@pytest.mark.parametrize("seed", range(4))
def test_every_class_keeps_an_image_to_train_on(seed: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), scene(i))
    shown = [{0, i} if i < 12 else {0, 12 + i % 2} for i in range(20)]  # eleven are there once
    held = hold_out(paths, seed=seed, shown=shown)
    assert len(held) == 2 and (min(held) == 0 or min(held) >= 12)
    assert not hold_out(paths, seed=seed, shown=[{i} for i in range(20)])


def test_the_fingerprint_follows_content_and_not_place(tiny_dataset: Path, tmp_path: Path) -> None:
    first = load_dataset(tiny_dataset).fingerprint
    shutil.copytree(tiny_dataset.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / "data.yaml"
    assert load_dataset(moved).fingerprint == first
    label = moved.parent / "labels/train/train_03.txt"
    label.write_text(label.read_text() + "0 .5 .5 .25 .25\n")
    second = load_dataset(moved).fingerprint
    assert second != first
    renamed = rewrite(moved, names=["square", "disc", "pole"])
    assert load_dataset(renamed).fingerprint not in (first, second)


def test_shared_images_are_pointed_out(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = load_dataset(rewrite(tiny_dataset, train=["images/train", "images/val"]))
    assert not spec.val_held_out and len(spec.train) == 12
    assert "4 images are in both train and val" in caplog.text


def test_real_sets_load(real_data: Path) -> None:
    counts = {"ycb_household": (360, 99), "kitchen_containers": (166, 45), "coco8": (4, 4)}
    for name, (train, val) in counts.items():
        spec = load_dataset(real_data / "data" / name / "data.yaml")
        assert (len(spec.train), len(spec.val)) == (train, val)
    assert len(load_dataset(real_data / "data/coco8/coco8.yaml").train) == 4


def test_a_relative_path_in_the_current_folder(tiny_dataset, monkeypatch) -> None:
    monkeypatch.chdir(tiny_dataset.parent)
    for given in ("data.yaml", "./data.yaml", "."):
        spec = load_dataset(given)
        assert len(spec.train) == 8 and sum(len(ref.labels) for ref in spec.train) > 0


def test_pictures_of_kinds_that_are_not_read_are_counted(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.HEIC", "b.gif", "notes.txt"):
        (tiny_dataset.parent / "images" / "train" / name).write_bytes(b"x")
    spec = load_dataset(tiny_dataset)
    assert len(spec.train) == 8
    assert "train: 2 pictures of kinds that are not read left out" in caplog.text
    assert "a.HEIC" in caplog.text and "notes.txt" not in caplog.text
    found = {f.kind: f for f in check_dataset(read_manifest(tiny_dataset)).findings}
    assert len(found["kind-unread"].problems) == 2


def test_the_only_labelled_picture_is_not_held_out(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_dataset.write_text("train: images/train\nnames: [square, disc, bar]\n")
    for label in sorted((tiny_dataset.parent / "labels" / "train").iterdir())[1:]:
        label.write_text("")
    spec = load_dataset(tiny_dataset)
    assert len(spec.train) == len(spec.val) == 8
    assert "too few pictures with objects to hold some out" in caplog.text


@pytest.mark.parametrize("val", ["", "val: images/train\n"])
def test_a_single_picture_is_trained_and_validated_on(
    val: str, tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_dataset.write_text(f"train: images/train\n{val}names: [square, disc, bar]\n")
    for image in sorted((tiny_dataset.parent / "images" / "train").iterdir())[1:]:
        image.unlink()
    spec = load_dataset(tiny_dataset)
    assert spec.train == spec.val and len(spec.train) == 1
    assert "all 1 are used for both" in caplog.text


def test_labels_of_pictures_that_are_not_read_wait_for_these_to_be_converted(
    tiny_dataset: Path,
) -> None:
    folder = tiny_dataset.parent / "images" / "train"
    (folder / "train_00.png").rename(folder / "train_00.HEIC")
    found = {f.kind for f in check_dataset(read_manifest(tiny_dataset)).findings}
    assert "kind-unread" in found and "labels-alone" not in found
    (folder / "train_00.HEIC").unlink()
    found = {f.kind for f in check_dataset(read_manifest(tiny_dataset)).findings}
    assert "labels-alone" in found
