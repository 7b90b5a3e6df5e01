"""What the doctor counts, and where it draws its lines."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from hsrloop.data.doctor.advice import ADVICE
from hsrloop.data.doctor.check import check_dataset
from hsrloop.data.doctor.names import ros_name
from hsrloop.data.sets.alike import NEAR, Groups, difference_hash, group_alike, hash_of
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.sets.manifest import read_manifest
from hsrloop.records import CheckReport, Finding
from tests.conftest import write_tiny_dataset


def check(yaml: Path, imgsz: int = 160) -> CheckReport:
    return check_dataset(read_manifest(yaml), imgsz=imgsz)


def found(report: CheckReport, kind: str, split: str = "") -> Finding:
    (finding,) = (f for f in report.findings if f.kind == kind and f.split == split)
    return finding


def places(finding: Finding) -> list[tuple[str, int]]:
    return [(problem.file.name, problem.line) for problem in finding.problems]


def photo(seed: int, *, height: int = 240, width: int = 320) -> np.ndarray:
    small = np.random.default_rng(seed).integers(30, 220, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def add(root: Path, place: str, pixels: np.ndarray, rows: str | None = "0 .5 .5 .4 .4\n") -> None:
    cv2.imwrite(str(root / "images" / place), pixels)
    if rows is not None:
        (root / "labels" / place).with_suffix(".txt").write_text(rows)


def test_counts_are_those_of_the_loaded_set(tiny_dataset: Path) -> None:
    spec, report = load_dataset(tiny_dataset), check(tiny_dataset)
    for split, refs in (("train", spec.train), ("val", spec.val)):
        count = next(c for c in report.splits if c.split == split)
        assert count.images == len(refs) and count.unreadable == count.backgrounds == 0
        assert count.boxes == sum(len(ref.labels) for ref in refs)
        for i, cls in enumerate(report.classes):
            assert cls.boxes[split] == sum(int((ref.labels == i).sum()) for ref in refs)
            assert cls.images[split] == sum(i in ref.labels for ref in refs)
    assert [cls.name for cls in report.classes] == list(spec.names)
    assert len(report.boxes_cxcywh) == len(report.sides_px)
    assert len(report.sides_px) == sum(count.boxes for count in report.splits)
    # The set's long sides are 160, so at imgsz 160 sizes are those of the file.
    ref = spec.train[0]
    expected = ref.boxes_cxcywh[:, 2:] * (ref.width, ref.height)
    np.testing.assert_allclose(report.sides_px[: len(ref.labels)], expected, rtol=1e-6)


def test_progress_reaches_the_total_of_each_task(tiny_dataset: Path) -> None:
    last: dict[str, tuple[int, int]] = {}
    check_dataset(
        read_manifest(tiny_dataset),
        progress=lambda task, done, total: last.update({task: (done, total)}),
    )
    assert last == {
        "train labels": (8, 8), "train images": (8, 8), "val labels": (4, 4), "val images": (4, 4),
    }  # fmt: skip


def test_one_problem_does_not_hide_the_next(tiny_dataset: Path) -> None:
    root = tiny_dataset.parent
    shutil.rmtree(root / "images/val")
    (root / "images/train/train_00.png").write_bytes(b"")
    for path in (root / "labels/train").iterdir():
        path.write_text("0 .5 .5 .1 .1 7\n9 .5 .5 .1 .1\n")
    tiny_dataset.write_text(tiny_dataset.read_text() + "nc: 7\n")
    report = check(tiny_dataset)
    kinds = {finding.kind for finding in report.findings}
    assert {"yaml", "unusable", "unreadable", "columns", "class-unknown"} <= kinds
    yaml = [p.text for f in report.findings if f.kind == "yaml" for p in f.problems]
    assert any("nc is 7" in text for text in yaml) and any("images/val" in text for text in yaml)
    assert report.suffers and report.findings[0].severity == "error"


def test_the_same_picture_in_val_in_every_guise(tmp_path: Path) -> None:
    yaml = write_tiny_dataset(tmp_path)
    for i in range(6):
        add(tmp_path, f"train/shot_{i * 10:03}.png", photo(i))
    add(tmp_path, "val/copy.png", photo(0))
    add(tmp_path, "val/small.jpg", cv2.resize(photo(1), (160, 120), interpolation=cv2.INTER_AREA))
    add(tmp_path, "val/bright.jpg", cv2.add(photo(2), (25, 25, 25, 0)))
    noise = np.random.default_rng(0).integers(0, 9, photo(3).shape, dtype=np.uint8)
    add(tmp_path, "val/noisy.png", cv2.add(photo(3), noise))
    near = cv2.addWeighted(photo(4), 0.8, photo(77), 0.2, 0)
    add(tmp_path, "val/shot_041.png", near)
    add(tmp_path, "val/other.png", photo(50))
    report = check(yaml)
    assert places(found(report, "copy-across", "val")) == [("copy.png", 0)]
    alike = places(found(report, "alike-across", "val"))
    assert alike == [("bright.jpg", 0), ("noisy.png", 0), ("small.jpg", 0)]
    burst = found(report, "burst-across", "val")
    assert places(burst) == [("shot_041.png", 0)] and burst.severity == "note"
    assert burst.problems[0].text.endswith("shot_040.png")
    assert burst.title.startswith("1 of 10 images in val")


def test_a_moved_object_before_a_fixed_camera_is_another_picture(tmp_path: Path) -> None:
    yaml = write_tiny_dataset(tmp_path)
    for place, x in (("train/left", 40), ("val/right", 200)):
        table = photo(5)
        cv2.circle(table, (x, 120), 12, (0, 0, 0), -1)
        add(tmp_path, f"{place}.png", table)
    kinds = {finding.kind for finding in check(yaml).findings}
    assert not kinds & {"copy-across", "alike-across", "burst-across"}
    pictures = [tmp_path / "images/train/left.png", tmp_path / "images/val/right.png"]
    assert bin(hash_of(pictures[0]) ^ hash_of(pictures[1])).count("1") <= NEAR
    assert group_alike(pictures) == [[0], [1]]


def test_roboflows_versions_of_a_picture_belong_together(tmp_path: Path) -> None:
    yaml = write_tiny_dataset(tmp_path)
    for i, split in enumerate(("train", "train", "val")):
        add(tmp_path, f"{split}/cup_jpg.rf.{i:032x}.png", photo(20 + i))
    report = check(yaml)
    assert len(found(report, "alike-across", "val").problems) == 1
    (group,) = found(report, "alike", "train").problems
    assert group.text.startswith("with cup_jpg.rf.")


def test_labels_of_a_split_that_is_not_named_are_found(tmp_path: Path) -> None:
    """In folders as Roboflow writes them too; those of a set beside this one are none of it."""
    beside = write_tiny_dataset(tmp_path / "beside")
    (tmp_path / "near/labels").mkdir(parents=True)
    (tmp_path / "near/labels/lost.txt").write_text("0 .5 .5 .4 .4\n")
    for number, place in enumerate(("one/train", "one/valid", "one/test", "two/train")):
        for kind in ("images", "labels"):
            (tmp_path / place / kind).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / place / "images/a.png"), photo(number))
        (tmp_path / place / "labels/a.txt").write_text("0 .5 .5 .4 .4\n")
    (tmp_path / "one/test/labels/b.txt").write_text("0 .5 .5 .4 .4\n")
    yaml = tmp_path / "one/data.yaml"
    yaml.write_text("train: train/images\nval: valid/images\nnames: [cup]\n")
    for kind, name in (("labels-unused", "a.txt"), ("labels-alone", "b.txt")):
        (problem,) = found(check(yaml), kind).problems
        assert problem.file == tmp_path / "one/test/labels" / name
    assert not {f.kind for f in check(beside).findings} & {"labels-unused", "labels-alone"}


def test_look_alikes_in_a_split_are_one_group(tmp_path: Path) -> None:
    yaml = write_tiny_dataset(tmp_path)
    for i in range(6):
        light = cv2.add(photo(8), (i, i, i, 0))
        add(tmp_path, f"train/burst_{i:03}.png", light)
    (group,) = found(check(yaml), "alike", "train").problems
    assert group.file.name == "burst_000.png"
    assert group.text == "with burst_001.png, burst_002.png, burst_003.png and 2 more"
    folder = tmp_path / "images/train"
    (folder / "a").mkdir()
    (folder / "burst_001.png").rename(folder / "a" / "burst_001.png")
    (group,) = found(check(yaml), "alike", "train").problems
    assert group.file.parent.name == "a" and "../burst_000.png" in group.text


def test_groups_of_all_alike_cost_no_pairs() -> None:
    groups = Groups(5000)
    for i in range(5000):
        groups.join(i, groups.apart(i, np.arange(i + 1, 5000)))
    assert groups.lists() == [list(range(5000))]


def test_a_hash_of_one_pixel() -> None:
    assert difference_hash(np.zeros((1, 1), np.uint8)) == 0


@pytest.mark.parametrize(("without", "severity"), [(1, "note"), (2, "warning")])
def test_few_images_without_labels_are_a_note(tmp_path: Path, without: int, severity: str) -> None:
    yaml = write_tiny_dataset(tmp_path, train=15)
    for path in sorted((tmp_path / "labels/train").iterdir())[:without]:
        path.unlink()
    finding = found(check(yaml), "unlabelled", "train")
    assert finding.severity == severity and len(finding.problems) == without
    assert finding.title == f"{without} of 15 images in train: no label file"


def test_tiny_boxes_depend_on_imgsz_and_weigh_by_class(tmp_path: Path) -> None:
    yaml = write_tiny_dataset(tmp_path)
    rows = "".join(f"2 .{i} .5 .02 .02\n" for i in range(10, 40))
    add(tmp_path, "train/crumbs.png", photo(1), rows)  # 6.4 x 4.8 px
    finding = found(check(yaml, imgsz=320), "tiny", "train")
    assert finding.severity == "warning" and places(finding)[1] == ("crumbs.txt", 2)
    assert finding.problems[0].text == "bar, 6.4 x 4.8 px at 320"
    assert "tiny" not in {f.kind for f in check(yaml, imgsz=640).findings}


def test_large_photographs_depend_on_imgsz(tmp_path: Path) -> None:
    yaml = write_tiny_dataset(tmp_path)
    add(tmp_path, "train/phone.jpg", photo(1, height=960, width=1290))
    assert places(found(check(yaml, imgsz=320), "large", "train")) == [("phone.jpg", 0)]
    assert "large" not in {f.kind for f in check(yaml, imgsz=640).findings}


def test_a_test_set_is_no_reason_not_to_train(tmp_path: Path) -> None:
    yaml = write_tiny_dataset(tmp_path)
    (tmp_path / "images/test").mkdir()
    (tmp_path / "labels/test").mkdir()
    add(tmp_path, "test/a.png", photo(1), "7 .5 .5 .1 .1\n")
    yaml.write_text(yaml.read_text() + "test: images/test\n")
    report = check(yaml)
    finding = found(report, "class-unknown", "test")
    assert finding.severity == "note" and finding.effect.startswith("None on training")
    assert not report.suffers


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("tea cup", "tea_cup"), ("7up", "obj_7up"), ("crème-brûlée", "creme_brulee"),
        ("湯呑み", "class_3"), ("__", "class_3"), (" a ", "a"), ("a/b", "a/b"),
    ],
)  # fmt: skip
def test_safe_names(name: str, safe: str) -> None:
    assert ros_name(name, 3) == safe
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_/]*", safe)


def test_all_advice_says_what_it_does_and_what_helps() -> None:
    for advice in ADVICE.values():
        assert advice.effect.endswith(".") and advice.remedy.endswith(".") and advice.what


def test_real_sets_are_counted(real_data: Path) -> None:
    counts = {"ycb_household": (3841, 1096), "kitchen_containers": (403, 99)}
    for name, (train, val) in counts.items():
        report = check(real_data / "data" / name / "data.yaml", imgsz=640)
        assert [count.boxes for count in report.splits] == [train, val]
        assert not any(finding.severity == "error" for finding in report.findings)
