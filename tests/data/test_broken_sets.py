"""Broken data sets: each ends in a right result or in one clear message, and stays as it was."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml as yaml_package
from PIL import Image
from rich.console import Console

from hsrloop.config import TrainConfig
from hsrloop.data.doctor.check import check_dataset
from hsrloop.data.loader import TrainLoader
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import DatasetSpec, load_dataset
from hsrloop.data.sets.manifest import read_manifest
from hsrloop.errors import DatasetError
from hsrloop.records import CheckReport, Position
from hsrloop.report.checkup import checkup, checkup_json

SIDE = 32
ROW = "0 .5 .5 .4 .4\n"
YAML = "train: images/train\nval: images/val\nnames: [cup, fork]\n"
IMAGE, PNG_IMAGE = "images/train/x.jpg", "images/train/x.png"
LABEL = "labels/train/x.txt"
Break = Callable[[Path], object]


def scene(seed: int) -> np.ndarray:
    """Return a picture (48, 64, 3) like no other."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (64, 48), interpolation=cv2.INTER_NEAREST)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sound set: 4 images to train on, 2 to validate, a box of each of 2 classes."""
    root = tmp_path_factory.mktemp("pristine")
    for seed, place in enumerate(("train/a", "train/b", "train/c", "train/d", "val/e", "val/f")):
        for kind in ("images", "labels"):
            (root / kind / place).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "images" / f"{place}.png"), scene(seed))
        (root / "labels" / f"{place}.txt").write_text(f"{seed % 2} .5 .5 .4 .4\n")
    (root / "data.yaml").write_text(YAML)
    return root


@dataclass(frozen=True)
class Case:
    """One way to break the set, and what must come of it."""

    name: str
    damage: Break
    images: int = 4  # usable for training
    boxes: int = 4  # in them
    error: str = ""  # in the message of load_dataset; empty when it must succeed
    kinds: str = ""  # of findings that the doctor must have
    says: str = ""  # in a line of them
    hopeless: bool = False  # the doctor raises the same error: nothing can be made of data.yaml


def put(name: str, content: bytes | str) -> Break:
    """Return a damage that writes a file."""

    def damage(root: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return damage


def both(*damages: Break) -> Break:
    return lambda root: [damage(root) for damage in damages]


def picture(name: str, image: Image.Image | None = None, kind: str = "", **how: object) -> Break:
    """Return a damage that adds a labelled image of some kind."""

    def damage(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (image or Image.fromarray(scene(99))).save(path, kind or None, **how)
        label = Path(str(path.with_suffix(".txt")).replace("/images/", "/labels/"))
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(ROW)

    return damage


def file(name: str, content: bytes | str) -> Break:
    """Return a damage that adds a labelled image made of these bytes."""
    return both(put(name, content), put(LABEL, ROW))


def rows(text: bytes | str) -> Break:
    """Return a damage that replaces the label rows of the first image."""
    return put("labels/train/a.txt", text)


def yaml(text: bytes | str) -> Break:
    return put("data.yaml", text)


def train_is(entry: str) -> Break:
    return yaml(YAML.replace("images/train", entry))


def val_is(entry: str) -> Break:
    return yaml(YAML.replace("images/val", entry))


def names_are(names: str) -> Break:
    return yaml(YAML.replace("[cup, fork]", names))


def listed(lines: bytes | str) -> Break:
    """Return a damage that names the training images in a list."""
    return both(put("t.txt", lines), train_is("t.txt"))


def link(name: str, target: str) -> Break:
    return lambda root: os.symlink(target, root / name)


def instead(name: str, make: Break) -> Break:
    """Return a damage that takes a file away and makes something of its name."""
    return lambda root: [(root / name).unlink(), make(root / name)]


def labels_are(text: str, stems: str = "abcd") -> Break:
    """Return a damage that writes the same rows for several training images."""
    return both(*(put(f"labels/train/{stem}.txt", text) for stem in stems))


def added(name: str, image: np.ndarray) -> Break:
    return picture(name, Image.fromarray(image))


def copied(source: str, target: str) -> Break:
    return lambda root: shutil.copy(root / source, root / target)


def renamed_to_bytes(root: Path) -> None:
    """Give an image and its labels a name that is no UTF-8."""
    for kind, suffix in (("images", b".png"), ("labels", b".txt")):
        folder = os.fsencode(root / kind / "train")
        os.rename(folder + b"/a" + suffix, folder + b"/\xff\xfe" + suffix)


def re_encoded(root: Path) -> None:
    """Put a training image into val in another format."""
    Image.open(root / "images/train/a.png").save(root / "images/val/z.jpg", quality=80)


def encoded(suffix: str) -> bytes:
    return cv2.imencode(suffix, scene(99))[1].tobytes()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


RGB = Image.fromarray(scene(99))
JPEG, PNG = encoded(".jpg"), encoded(".png")
MANY_ROWS = "".join(
    f"{i % 2} {x:.4f} {y:.4f} .01 .01\n"
    for i, (x, y) in enumerate(
        (0.01 + 0.0138 * (i % 71), 0.01 + 0.0138 * (i // 71)) for i in range(5000)
    )
)
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
# From 6.0.4 on PyYAML itself merges each key once.
_MERGES_ONCE = tuple(map(int, yaml_package.__version__.split(".")[:3])) >= (6, 0, 4)
_TOO_LARGE = "" if _MERGES_ONCE else "merged aliases grow without bound"

IMAGES = [
    Case("jpeg-without-its-tail", file(IMAGE, JPEG[: len(JPEG) // 2]), kinds="unreadable",
        says="truncated"),
    Case("jpeg-without-its-last-two-bytes", file(IMAGE, JPEG[:-2]), kinds="unreadable",
        says="truncated"),
    Case("jpeg-of-its-header-only", file(IMAGE, JPEG[:20]), kinds="unreadable"),
    Case("png-without-its-tail", file(PNG_IMAGE, PNG[:-200]), kinds="unreadable"),
    Case("png-with-damaged-pixels", file(PNG_IMAGE, PNG[:80] + b"\0" * 40 + PNG[120:]), 5, 5,
        kinds="unreadable", says="decoded"),
    Case("png-that-claims-far-too-much", file(IMAGE, png_header(60_000, 60_000)),
        kinds="unreadable", says="178 million"),
    Case("png-that-claims-much", file(IMAGE, png_header(12_000, 9_000)), 5, 5, kinds="unreadable"),
    Case("empty-file", file(IMAGE, b""), kinds="unreadable", says="the file is empty"),
    Case("zeros", file(IMAGE, b"\0" * 5000), kinds="unreadable",
        says="not an image of a known kind"),
    Case("text-named-jpg", file(IMAGE, "<html>404 Not Found</html>"), kinds="unreadable",
        says="x.jpg"),
    Case("git-lfs-pointer", file(IMAGE, "version https://git-lfs.github.com/spec/v1\n"),
        kinds="unreadable"),
    Case("png-named-jpg", file(IMAGE, PNG), 5, 5),
    Case("jpeg-named-png", file(PNG_IMAGE, JPEG), 5, 5),
    Case("16-bit-png", added(PNG_IMAGE, noise((48, 64)).astype(np.uint16) * 256), 5, 5),
    Case("grey-png", picture(PNG_IMAGE, RGB.convert("L")), 5, 5),
    Case("one-bit-png", picture(PNG_IMAGE, RGB.convert("1")), 5, 5),
    Case("rgba-png", picture(PNG_IMAGE, RGB.convert("RGBA")), 5, 5),
    Case("palette-png", picture(PNG_IMAGE, RGB.convert("P")), 5, 5),
    Case("palette-png-with-transparency",
        picture(PNG_IMAGE, RGB.convert("P"), transparency=b"\0\x80"), 5, 5),
    Case("grey-jpeg", picture(IMAGE, RGB.convert("L")), 5, 5),
    Case("cmyk-jpeg", picture(IMAGE, RGB.convert("CMYK")), 5, 5),
    Case("progressive-jpeg", picture(IMAGE, progressive=True), 5, 5),
    Case("exif-quarter-turn", picture(IMAGE, exif=turned(6)), 5, 5),
    Case("exif-nonsense-turn", picture(IMAGE, exif=turned(77)), 5, 5),
    Case("damaged-exif",
        file(IMAGE, JPEG[:2] + b"\xff\xe1\0\x20Exif\0\0MM\0*" + b"\xff" * 18 + JPEG[2:]),
        5, 5),
    Case("gif-named-png", picture(PNG_IMAGE, kind="GIF"), 5, 5),
    Case("animated-webp",
        picture("images/train/x.webp", save_all=True, append_images=[RGB.rotate(90)]), 5, 5),
    Case("many-page-tiff",
        picture("images/train/x.tif", save_all=True, append_images=[RGB.rotate(90)]), 5, 5),
    Case("bmp", picture("images/train/x.bmp"), 5, 5),
    Case("jpeg-2000", picture("images/train/x.jp2"), 5, 5),
    Case("capital-suffix", picture("images/train/X.JPG", kind="JPEG"), 5, 5),
    Case("one-pixel", picture(PNG_IMAGE, Image.new("RGB", (1, 1), "red")), 5, 5),
    Case("one-row-of-pixels", added(PNG_IMAGE, noise((1, 5000, 3))), 5, 5, kinds="large"),
    Case("one-column-of-pixels", added(PNG_IMAGE, noise((3000, 1, 3))), 5, 5, kinds="large"),
    Case("flat-colour", picture(IMAGE, Image.new("RGB", (64, 48), "white")), 5, 5),
    Case("folder-called-x.jpg", lambda root: (root / IMAGE).mkdir(), 4, 4),
    Case("folder-called-x.jpg-in-a-list",
        both(lambda root: (root / IMAGE).mkdir(), listed(f"{IMAGE}\nimages/train/a.png\n")), 1, 1,
        kinds="unreadable class-untrained"),
    Case("pipe-called-x.jpg", lambda root: os.mkfifo(root / IMAGE), kinds="unreadable",
        says="not a regular file"),
    Case("dangling-link", link(IMAGE, "gone.jpg"), kinds="unreadable", says="No such file"),
    Case("link-to-itself", link(IMAGE, "x.jpg"), kinds="unreadable", says="symbolic links"),
    Case("folder-link-to-its-parent", link("images/train/up", ".."), 6, 4, kinds="copy-across"),
    Case("link-to-a-device", link(IMAGE, "/dev/zero"), kinds="unreadable"),
    Case("hidden-mac-file", file("images/train/._x.jpg", b"\0\5\x16\7" + b"\0" * 99),
        kinds="labels-alone"),
    Case("space-and-umlaut-in-name", picture("images/train/so ein Küchenbild (1).jpg"), 5, 5),
    Case("japanese-name", picture("images/train/写真.jpg"), 5, 5),
    Case("name-that-is-no-utf-8", renamed_to_bytes),
    Case("escape-sequence-in-name", file("images/train/\x1b[31m.jpg", b""),
        kinds="unreadable labels-alone"),
    Case("copy-in-the-same-split", both(copied("images/train/a.png", PNG_IMAGE), put(LABEL, ROW)),
        5, 5, kinds="copy", says="x.png: see"),
    Case("copy-with-other-labels",
        both(copied("images/train/a.png", PNG_IMAGE), put(LABEL, "1 .5 .5 .2 .2\n")), 5, 5,
        kinds="copy-contradicts"),
    Case("copy-in-val", copied("images/train/a.png", "images/val/z.png"),
        kinds="copy-across unlabelled", says="z.png: see"),
    Case("re-encoded-in-val", re_encoded, kinds="alike-across", says="z.jpg: see"),
    Case("same-name-twice", both(picture("images/train/a.jpg"), rows(ROW)), 5, 5),
]  # fmt: skip

LABELS = [
    Case("missing", lambda root: (root / "labels/train/a.txt").unlink(), boxes=3,
        kinds="unlabelled", says="a.txt does not exist"),
    Case("empty", rows(b""), boxes=3),
    Case("zero-bytes-inside", rows(b"\0" * 64), boxes=3, kinds="columns"),
    Case("nan", rows("0 nan .5 .4 .4\n"), boxes=3, kinds="not-numbers", says="a.txt:1: '0 nan"),
    Case("inf", rows("0 .5 inf .4 .4\n"), boxes=3, kinds="not-numbers"),
    Case("words", rows("cup .5 .5 .4 .4\n"), boxes=3, kinds="not-numbers"),
    Case("class-minus-1", rows("-1 .5 .5 .4 .4\n"), boxes=3, kinds="class-unknown",
        says="class -1, but"),
    Case("class-1.5", rows("1.5 .5 .5 .4 .4\n"), boxes=3, kinds="class-fraction", says="class 1.5"),
    Case("class-beyond-names", rows(ROW + "2 .5 .5 .4 .4\n"), kinds="class-unknown",
        says="a.txt:2: class 2, but data.yaml names 2 classes (0-1)"),
    Case("class-beyond-any-integer", rows("1e300 .5 .5 .4 .4\n"), boxes=3, kinds="class-unknown"),
    Case("5000-boxes", rows(MANY_ROWS), boxes=5003, kinds="tiny"),
    Case("pixels", rows("0 320 240 100 80\n"), boxes=3, kinds="outside", says="not pixels"),
    Case("outside", rows("0 1.4 .5 .2 .2\n"), boxes=3, kinds="outside", says="1.4 is outside"),
    Case("a-little-outside", rows("0 .5 1.004 .2 .2\n")),
    Case("beyond-the-edge-is-clipped", rows("0 .95 .5 .4 .2\n")),
    Case("beside-the-image", rows("0 1.009 .5 .001 .2\n"), boxes=3, kinds="no-area"),
    Case("negative-width", rows("0 .5 .5 -.005 .4\n"), boxes=3, kinds="no-area"),
    Case("no-width", rows("0 .5 .5 0 .4\n"), boxes=3, kinds="no-area"),
    Case("next-to-no-width", rows("0 .5 .5 1e-50 .4\n"), boxes=3, kinds="no-area"),
    Case("four-columns", rows("0 .5 .5 .4\n"), boxes=3, kinds="columns", says="4 columns"),
    Case("confidence-as-sixth-column", rows("0 .5 .5 .4 .4 .9\n"), boxes=3, kinds="columns"),
    Case("polygon-of-two-points-reads-as-box", rows("0 .2 .2 .4 .4\n")),
    Case("polygon", rows("0 .2 .2 .6 .2 .4 .6\n")),
    Case("polygon-of-a-point-and-a-half", rows("0 .2 .2 .6 .2 .4 .6 .5\n"), boxes=3,
        kinds="columns"),
    Case("polygon-on-a-line", rows("0 .2 .2 .4 .2 .6 .2\n"), boxes=3, kinds="no-area"),
    Case("boxes-polygons-and-nonsense", rows("0 .2 .2 .6 .2 .4 .6\nno\n1 .5 .5 .1 .1\n"), boxes=5,
        kinds="columns", says="a.txt:2:"),
    Case("row-twice", rows(ROW + ROW), kinds="row-twice", says="a.txt:2: the same as line 1"),
    Case("box-drawn-twice", rows(ROW + "0 .501 .5 .4 .4\n"), boxes=5, kinds="box-twice",
        says="a.txt:2: cup, overlaps line 1"),
    Case("box-of-two-classes", rows(ROW + "1 .5 .5 .4 .4\n"), boxes=5, kinds="box-two-classes",
        says="a.txt:2: fork, overlaps line 1 (cup) by 1.00"),
    Case("commas", rows("0,.5,.5,.4,.4\n"), boxes=3, kinds="columns", says="has commas"),
    Case("decimal-commas", rows("0 0,5 0,5 0,4 0,4\n"), boxes=3, kinds="columns",
        says="has commas"),
    Case("tabs", rows("0\t.5\t.5\t.4\t.4\n")),
    Case("crlf", rows("0 .5 .5 .4 .4\r\n1 .2 .2 .1 .1\r\n"), boxes=5),
    Case("old-mac-line-ends", rows("0 .5 .5 .4 .4\r1 .2 .2 .1 .1\r"), boxes=5),
    Case("bom", rows(b"\xef\xbb\xbf" + ROW.encode())),
    Case("utf-16", rows(ROW.encode("utf-16"))),
    Case("utf-16-without-bom", rows(ROW.encode("utf-16-le")), boxes=3, kinds="not-numbers"),
    Case("utf-16-cut-in-half", rows(ROW.encode("utf-16")[:-1]), boxes=3, kinds="not-numbers"),
    Case("binary", rows(PNG[:300]), boxes=3, kinds="columns"),
    Case("comment-line", rows("# cup\n" + ROW), kinds="columns", says="a.txt:1: 2 columns"),
    Case("folder", instead("labels/train/a.txt", Path.mkdir), 3, 3, kinds="unreadable",
        says="Is a directory"),
    Case("pipe", instead("labels/train/a.txt", os.mkfifo), 3, 3, kinds="unreadable",
        says="not a regular file"),
    Case("link-to-itself", instead("labels/train/a.txt", lambda path: path.symlink_to("a.txt")), 3,
        3, kinds="unreadable"),
    Case("without-image", put("labels/train/lost.txt", ROW), kinds="labels-alone", says="lost.txt"),
    Case("without-image-in-a-folder-of-their-own", put("labels/train/day2/lost.txt", ROW),
        kinds="labels-alone", says="day2/lost.txt"),
    Case("without-image-in-a-split-of-no-name", put("labels/old/lost.txt", ROW),
        kinds="labels-alone", says="old/lost.txt"),
    Case("of-an-image-in-no-split",
        both(put("labels/day2/x.txt", ROW), picture("images/day2/x.jpg")), kinds="labels-unused",
        says="day2/x.txt"),
    Case("classes.txt-is-no-label", put("labels/train/classes.txt", "cup\nfork\n")),
    Case("all-missing", lambda root: shutil.rmtree(root / "labels/train"),
        error="there is no label file; for a.png", kinds="unusable unlabelled"),
    Case("all-empty", labels_are(""), error="all 4 label files are empty", kinds="unusable"),
    Case("all-bad", labels_are("7 .5 .5 .1 .1"), error="all 4 label rows are bad",
        kinds="unusable class-unknown"),
    Case("file-called-labels",
        lambda root: [shutil.rmtree(root / "labels"), (root / "labels").write_text("")],
        error="none of the 4 images in train", kinds="unusable unreadable", says="Not a directory"),
    Case("none-in-val", lambda root: shutil.rmtree(root / "labels/val"),
        error="no usable box in val", kinds="unusable unlabelled"),
    Case("one-class-never-shown", labels_are(ROW, "bd"), kinds="class-untrained",
        says="data.yaml:3: fork (class 1)"),
    Case("one-class-never-validated", put("labels/val/f.txt", ROW), kinds="class-unvalidated",
        says="fork (class 1)"),
]  # fmt: skip

MANIFESTS = [
    Case("empty", yaml(""), error="holds nothing", hopeless=True),
    Case("list-at-the-top", yaml("- a\n- b\n"), error="holds a list", hopeless=True),
    Case("text-at-the-top", yaml("hello"), error="holds a str", hopeless=True),
    Case("missing", lambda root: (root / "data.yaml").unlink(),
        error="does not exist. Give the path", hopeless=True),
    Case("folder", instead("data.yaml", Path.mkdir), error="does not exist", hopeless=True),
    Case("pipe", instead("data.yaml", os.mkfifo), error="not a regular file", hopeless=True),
    Case("binary", yaml(PNG), error="is not UTF-8 text", hopeless=True),
    Case("control-characters", yaml(YAML + "x: \0\n"), error="not valid YAML", hopeless=True),
    Case("utf-16", yaml(YAML.encode("utf-16")), error="Save it as UTF-8", hopeless=True),
    Case("bom", yaml(b"\xef\xbb\xbf" + YAML.encode())),
    Case("crlf", yaml(YAML.replace("\n", "\r\n"))),
    Case("tabs", yaml(YAML + "x:\n\t- a\n"), error="data.yaml:5: not valid YAML", hopeless=True),
    Case("open-bracket", yaml("names: [cup\n"), error="data.yaml:2: not valid YAML", hopeless=True),
    Case("two-documents", yaml(YAML + "---\n" + YAML), error="not valid YAML", hopeless=True),
    Case("a-hundred-megabytes", lambda root: os.truncate(root / "data.yaml", 100_000_000),
        error="has 95 MiB", hopeless=True),
    Case("python-object", yaml(YAML + "x: !!python/object/apply:os.mkdir [ran]\n"),
        error="not valid YAML", hopeless=True),
    Case("python-name", yaml(YAML + "x: !!python/name:os.system\n"), error="not valid YAML",
        hopeless=True),
    Case("many-laughs", yaml(LAUGHS + YAML)),
    Case("many-laughs-as-names", yaml(LAUGHS + YAML.replace("[cup, fork]", "*j")),
        error="names[0] is [", kinds="yaml"),
    Case("merged-laughs", yaml(MERGES + YAML), error=_TOO_LARGE, hopeless=bool(_TOO_LARGE)),
    Case("alias-of-itself", names_are("&n [*n, fork]"), error="names[0] is [", kinds="yaml"),
    Case("nested-too-deep", yaml("x: " + "[" * 600), error="nested too deeply", hopeless=True),
    Case("impossible-date", yaml(YAML + "made: 2026-13-45\n"),
        error="not valid YAML: month must be", hopeless=True),
    Case("empty-integer", yaml(YAML + "x: !!int ''\n"), error="is not valid YAML", hopeless=True),
    Case("download", yaml(YAML + "download: open('ran', 'w').close()\n")),
    Case("no-names-and-no-nc", yaml("train: images/train\n"), error="neither 'names' nor 'nc'",
        hopeless=True),
    Case("only-nc", yaml(YAML.replace("names: [cup, fork]", "nc: 2")), kinds="no-names"),
    Case("nc-mismatch", yaml(YAML + "nc: 3\n"), error="nc is 3, but names has 2 entries",
        kinds="yaml"),
    Case("nc-huge", yaml(YAML + "nc: 1e12\n"), error="1 to 100000", hopeless=True),
    Case("nc-infinite", yaml(YAML + "nc: .inf\n"), error="nc is inf", hopeless=True),
    Case("nc-no-number", yaml(YAML + "nc: .nan\n"), error="nc is nan", hopeless=True),
    Case("names-as-map", names_are("{1: fork, '0': cup}")),
    Case("names-with-a-gap", names_are("{0: cup, 2: fork}"), error="keys [0, 2]",
        kinds="yaml class-untrained", says="without gaps"),
    Case("names-with-infinite-key", names_are("{.inf: cup}"), error="the key inf", hopeless=True),
    Case("names-with-odd-digit", names_are("{'²': cup}"), error="the key '²'", hopeless=True),
    Case("names-empty", names_are("[]"), error="names is []", hopeless=True),
    Case("names-with-null", yaml(YAML.replace("fork", "null")), error="names[1] is None",
        kinds="yaml"),
    Case("names-yes-and-no", names_are("[yes, no]"), error="Put it in quotes", kinds="yaml"),
    Case("name-twice", yaml(YAML.replace("fork", "cup")), kinds="name-twice",
        says="class 0 and of class 1"),
    Case("names-unsafe-for-ros", names_are("[tea cup, 2-fork]"), kinds="ros-name",
        says="data.yaml:3: 'tea cup', better tea_cup"),
    Case("names-in-japanese", yaml(YAML.replace("cup", "湯呑み")), kinds="ros-name",
        says="'湯呑み', better class_0"),
    Case("name-with-escape-sequence", yaml(YAML.replace("cup", '"\\e[31m"')), kinds="ros-name"),
    Case("no-train", yaml("val: images/val\nnames: [cup, fork]\n"), error="no 'train'; add",
        kinds="yaml"),
    Case("train-missing", train_is("images/gone"), error="images/gone does not exist",
        kinds="yaml"),
    Case("train-a-number", train_is("3"), error="train is 3; it must be a path", kinds="yaml"),
    Case("train-empty", both(lambda root: (root / "none").mkdir(), train_is("none")),
        error="no images in train (none)", kinds="yaml"),
    Case("train-longer-than-any-path", train_is("x" * 6000), error="does not exist", kinds="yaml"),
    Case("train-with-a-zero-byte", train_is(r'"a\0b"'), error="does not exist", kinds="yaml"),
    Case("train-a-windows-path", train_is(r"C:\Users\me\set\images\train"), kinds="moved"),
    Case("train-quoted-windows-path", train_is(r'"C:\Users\me\train"'), error="forward slashes",
        hopeless=True),
    Case("train-an-absolute-path-of-elsewhere", train_is("/content/set/images/train"),
        kinds="moved", says="using"),
    Case("train-in-no-users-home", train_is("~no-such-user/train/x"), error="does not exist",
        kinds="yaml"),
    Case("train-a-binary-file", train_is("data.yaml"),
        error="is neither a folder, a .txt list nor an image", kinds="yaml"),
    Case("one-of-two-folders-missing", train_is("[images/train, images/day2]"),
        error="images/day2 does not exist", kinds="yaml"),
    Case("path-of-another-machine", yaml(YAML + "path: /home/somebody/set\n"), kinds="moved"),
    Case("path-a-list", yaml(YAML + "path: [a]\n"), error="it must be a folder", kinds="yaml"),
    Case("path-in-no-users-home", yaml(YAML + "path: ~no-such-user/set\n"), kinds="moved"),
    Case("val-missing", val_is("images/gone"), error="Without a 'val' line", kinds="yaml"),
    Case("val-left-out", yaml(YAML.replace("val: images/val\n", "")), 3, 3, kinds="no-val"),
    Case("val-is-train", val_is("images/train"), 3, 3, kinds="val-is-train"),
    Case("val-is-train-through-a-link",
        both(link("images/valid", "train"), link("labels/valid", "train"), val_is("images/valid")),
        3, 3, kinds="val-is-train"),
    Case("test-missing", yaml(YAML + "test: images/test\n"), kinds="yaml",
        says="there is no test set"),
    Case("list-with-blank-lines-and-missing-entries",
        listed("\n./images/train/a.png\r\n\n  images/train/b.png\nimages/train/gone.png\n# c\n"),
        2, 2, kinds="listed-missing", says="t.txt:5: images/train/gone.png"),
    Case("list-that-is-empty", listed(""), error="no images in train (t.txt)", kinds="yaml"),
    Case("list-that-is-binary", listed(PNG), error="no images in train", kinds="yaml"),
    Case("list-that-is-a-pipe", both(lambda root: os.mkfifo(root / "t.txt"), train_is("t.txt")),
        error="cannot be read", kinds="yaml"),
    Case("list-with-a-line-longer-than-any-path",
        listed("x" * 6000 + ".jpg\nimages/train/a.png\n"), 1, 1, kinds="listed-missing"),
]  # fmt: skip


def snapshot(root: Path) -> dict[str, object]:
    """Return everything that could change below a folder: content, times, links, modes."""
    state: dict[str, object] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        state[os.fsencode(path).hex()] = (status.st_mode, status.st_mtime_ns, content)
    return state


def load(root: Path) -> DatasetSpec | str:
    """Return the data set, rendered once through the real loader, or the message of its error."""
    try:
        spec = load_dataset(root / "data.yaml")
    except DatasetError as error:
        return str(error)
    config = TrainConfig.from_json({"imgsz": SIDE, "batch": 4, "mixup": 0.5, "degrees": 10.0})
    for refs in (spec.train, spec.val):
        store = ImageStore(refs, imgsz=SIDE)
        with TrainLoader(refs, store, config) as loader:
            batches = list(loader.batches(Position(0, 0)))
        assert sum(len(batch.images) for batch in batches) == len(refs)
        for batch in batches:
            assert batch.images.shape[1:] == (3, SIDE, SIDE)
            assert batch.boxes_cxcywh.isfinite().all()
            assert ((batch.boxes_cxcywh >= 0) & (batch.boxes_cxcywh <= 1)).all()
            assert ((batch.labels >= 0) & (batch.labels < spec.nc)).all()
        for ref in refs:
            assert np.isfinite(ref.boxes_cxcywh).all() and (ref.boxes_cxcywh[:, 2:] > 0).all()
    return spec


def doctor(root: Path) -> CheckReport | str:
    """Return the report, shown and written once, or the message of the error."""
    try:
        report = check_dataset(read_manifest(root / "data.yaml"), imgsz=64)
    except DatasetError as error:
        return str(error)
    stream = io.StringIO()
    Console(file=stream, width=80).print(checkup(report))
    shown = stream.getvalue()
    shown.encode()
    assert "\x1b" not in shown and max(map(len, shown.splitlines())) <= 80
    json.dumps(checkup_json(report))
    return report


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{group}-{case.name}")
        for group, cases in (("image", IMAGES), ("labels", LABELS), ("yaml", MANIFESTS))
        for case in cases
    ],
)
def test_a_broken_set_ends_well(
    case: Case, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    shutil.copytree(pristine, root)
    case.damage(root)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = snapshot(root)
    loaded, report = load(root), doctor(root)
    assert snapshot(root) == before
    assert not list((tmp_path / "cwd").iterdir()), "something in data.yaml was executed"

    if isinstance(loaded, str):
        assert case.error and case.error in loaded
        assert "\n" not in loaded and len(loaded) < 1000
    else:
        assert not case.error
        found = (len(loaded.train), sum(len(ref.labels) for ref in loaded.train))
        assert found == (case.images, case.boxes)
    if isinstance(report, str):
        assert case.hopeless and report == loaded
        return
    assert not case.hopeless
    assert {f.kind for f in report.findings} >= set(case.kinds.split())
    assert case.says in "\n".join(str(p) for f in report.findings for p in f.problems)
    refused = any(finding.severity == "error" for finding in report.findings)
    assert refused == isinstance(loaded, str)


def test_the_sound_set_has_no_finding(pristine: Path) -> None:
    report = doctor(pristine)
    assert isinstance(report, CheckReport)
    assert report.findings == () and not report.suffers


def test_an_unreadable_file_is_named(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is forbidden by a patch: the superuser may read anything."""
    shutil.copytree(pristine, tmp_path / "set")
    (tmp_path / "set/labels/train/a.txt").chmod(0)
    plain = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.stat().st_mode & 0o400:
            return plain(path)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    loaded, report = load(tmp_path / "set"), doctor(tmp_path / "set")
    assert isinstance(loaded, DatasetSpec) and len(loaded.train) == 3
    assert isinstance(report, CheckReport)
    (finding,) = report.findings
    assert finding.kind == "unreadable" and "Permission denied" in finding.problems[0].text


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".bmp", ".gif", ".jp2"])
def test_damaged_bytes_never_raise(pristine: Path, tmp_path: Path, suffix: str) -> None:
    shutil.copytree(pristine, tmp_path / "set")
    stream = io.BytesIO()
    kind = {".jpg": "JPEG", ".tif": "TIFF", ".jp2": "JPEG2000"}.get(suffix, suffix[1:].upper())
    Image.fromarray(scene(3)).save(stream, kind)
    rng = np.random.default_rng(zlib.crc32(suffix.encode()))
    for i in range(40):
        data = np.frombuffer(stream.getvalue(), np.uint8).copy()
        places = rng.integers(0, min(len(data), 400 if i % 2 else len(data)), 12)
        data[places] = rng.integers(0, 256, 12)
        (tmp_path / f"set/images/train/x{i}{suffix if suffix != '.gif' else '.png'}").write_bytes(
            data
        )
    before = snapshot(tmp_path / "set")
    assert isinstance(load(tmp_path / "set"), DatasetSpec)
    assert isinstance(doctor(tmp_path / "set"), CheckReport)
    assert snapshot(tmp_path / "set") == before
