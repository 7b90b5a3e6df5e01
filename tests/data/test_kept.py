"""Decoded images kept between runs: found by content, within a bound, never wrong."""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hsrloop.data.pixels import kept as kept_module
from hsrloop.data.pixels import store as store_module
from hsrloop.data.pixels.kept import KeptImages
from hsrloop.data.pixels.store import GREY, ImageStore
from hsrloop.data.sets.dataset import DatasetSpec, load_dataset

SIDE = 96


@pytest.fixture
def spec(tiny_dataset: Path) -> DatasetSpec:
    return load_dataset(tiny_dataset)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of image files in the order they are decoded."""
    names: list[str] = []
    real = ImageStore._pixels

    def counted(store: ImageStore, index: int, data: np.ndarray) -> np.ndarray:
        names.append(store._refs[index].path.name)
        return real(store, index, data)

    monkeypatch.setattr(ImageStore, "_pixels", counted)
    return names


CACHES = [False, "ram", "disk"]


def pixels_of(spec: DatasetSpec, cache: bool | str, folder: Path | None) -> list[np.ndarray]:
    store = ImageStore(spec.train, imgsz=SIDE, cache=cache, cache_dir=folder)
    return [store[i].copy() for i in range(len(store))]


@pytest.mark.parametrize("cache", CACHES)
def test_a_second_start_decodes_only_what_is_new(
    cache: bool | str, spec: DatasetSpec, tmp_path: Path, decoded: list[str]
) -> None:
    folder, other = tmp_path / "kept", CACHES[(CACHES.index(cache) + 1) % 3]
    first = pixels_of(spec, other, folder)
    assert sorted(decoded) == sorted(ref.path.name for ref in spec.train)
    path = spec.train[2].path
    cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    (tmp_path / "new").mkdir()
    moved = spec.train[4].path.replace(tmp_path / "new" / "elsewhere.png")
    refs = [*spec.train[:4], dataclasses.replace(spec.train[4], path=moved), *spec.train[5:]]
    decoded.clear()
    second = pixels_of(dataclasses.replace(spec, train=tuple(refs)), cache, folder)
    assert decoded == [path.name]  # by content: the one that moved is found
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert np.array_equal(a, b) == (i != 2)
    assert np.array_equal(second[2], ImageStore(spec.train, imgsz=SIDE)[2])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of image files in the order they are read; all count as unchanged for long."""
    monkeypatch.setattr(kept_module, "SETTLED_S", -1)
    names: list[str] = []
    real = store_module.read_bytes

    def counted(path: Path) -> np.ndarray:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(store_module, "read_bytes", counted)
    return names


@pytest.mark.parametrize("cache", CACHES)
def test_files_that_did_not_change_are_not_even_read(
    cache: bool | str, spec: DatasetSpec, tmp_path: Path, read: list[str], decoded: list[str]
) -> None:
    expected = pixels_of(spec, "ram", tmp_path / "kept")
    assert len(read) == 8
    changed, touched = spec.train[2].path, spec.train[5].path
    before = changed.stat()
    content = bytearray(changed.read_bytes())
    changed.write_bytes(spec.train[0].path.read_bytes().ljust(len(content), b"\0")[: len(content)])
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # only its ctime tells
    os.utime(touched)
    read.clear()
    decoded.clear()
    found = pixels_of(spec, cache, tmp_path / "kept")
    assert set(read) == {changed.name, touched.name} and set(decoded) == {changed.name}
    changed.write_bytes(content)
    (tmp_path / "kept" / "index.json").write_text('{"a": [1, 2]}')
    read.clear()
    decoded.clear()
    again = pixels_of(spec, cache, tmp_path / "kept")
    assert len(read) == 8 and decoded == []
    for i in range(8):
        assert np.array_equal(found[i], expected[i]) == (i != 2)
        assert np.array_equal(again[i], expected[i])


def test_a_file_just_changed_is_read_again(
    spec: DatasetSpec, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tick of the file system's clock it could change twice with one stamp."""
    monkeypatch.setattr(kept_module, "SETTLED_S", 60.0)
    for _ in range(2):
        pixels_of(spec, "ram", tmp_path / "kept")
    assert len(read) == 16


@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_changes_while_it_is_read_is_kept_as_it_was_read(
    cache: bool | str, spec: DatasetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spec.train[0].path
    before, after = path.read_bytes(), path.with_name("after.png")
    cv2.imwrite(str(after), 255 - cv2.imread(str(path)))
    expected = pixels_of(spec, False, None)[0]
    real = store_module.read_bytes

    def overtaken(asked: Path) -> np.ndarray:
        data = real(asked)
        if asked == path:
            path.write_bytes(after.read_bytes())
        return data

    with monkeypatch.context() as patch:
        patch.setattr(kept_module, "SETTLED_S", -1)
        patch.setattr(store_module, "read_bytes", overtaken)
        assert np.array_equal(pixels_of(spec, cache, tmp_path / "kept")[0], expected)
    assert not np.array_equal(pixels_of(spec, cache, tmp_path / "kept")[0], expected)
    path.write_bytes(before)
    assert np.array_equal(pixels_of(spec, cache, tmp_path / "kept")[0], expected)


def test_reading_and_decoding_are_told_apart(spec: DatasetSpec, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_module, "SETTLED_S", -1)
        for count in (6, 8):
            ImageStore(
                spec.train[:count], imgsz=SIDE, cache="ram", cache_dir=tmp_path / "kept",
                progress=lambda *part: said.append(part),
            )  # fmt: skip
    assert said == [
        *(("decoding", i + 1, 6) for i in range(6)),
        *(("reading", i + 1, 6) for i in range(6)),
        *(("decoding", i + 1, 2) for i in range(2)),
    ]


def test_mapped_images_hold_no_file_open(spec: DatasetSpec, tmp_path: Path) -> None:
    """A process may have 1,024 open files; a data set has more images."""
    before = len(os.listdir("/proc/self/fd"))
    store = ImageStore(spec.train, imgsz=SIDE, cache="disk", cache_dir=tmp_path / "kept")
    assert store.cached_images == 8 and len(os.listdir("/proc/self/fd")) == before


def test_images_beyond_the_mappings_of_a_process_are_read_each_time(
    spec: DatasetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setattr(store_module, "MOST_MAPPED", 5)
    store = ImageStore(spec.train, imgsz=SIDE, cache="disk", cache_dir=tmp_path / "kept")
    assert store.cached_images == 5
    for _ in range(2):
        for i in range(8):
            assert np.array_equal(store[i], ImageStore(spec.train, imgsz=SIDE)[i])
    assert all(decoded.count(ref.path.name) == 3 for ref in spec.train)  # two of them by others


def test_runs_that_start_together_share_the_folder(spec: DatasetSpec, tmp_path: Path) -> None:
    expected = pixels_of(spec, False, None)
    with ThreadPoolExecutor(4) as pool:
        starts = [
            pool.submit(pixels_of, spec, cache, tmp_path / "kept")
            for _ in range(5)
            for cache in CACHES
        ]
    for start in starts:
        assert all(map(np.array_equal, start.result(), expected))
    assert len(list((tmp_path / "kept").glob("*/*"))) == 8


def test_a_cache_folder_inside_the_data_set_is_not_used(
    spec: DatasetSpec, caplog: pytest.LogCaptureFixture
) -> None:
    ImageStore(spec.train, imgsz=SIDE, cache="ram", cache_dir=spec.root / "kept")
    assert caplog.text.count("lies inside the data set") == 1
    assert not (spec.root / "kept").exists()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "a folder"])
def test_a_damaged_entry_is_decoded_anew(
    cache: bool | str, damage: str, spec: DatasetSpec, tmp_path: Path, decoded: list[str]
) -> None:
    expected = pixels_of(spec, "ram", tmp_path / "kept")
    decoded.clear()
    entry = sorted((tmp_path / "kept").glob("*/*"))[3]
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.unlink()
    if damage == "a folder":
        entry.mkdir()
    else:
        entry.write_bytes({"flipped": content, "cut": content[:-1], "empty": b""}[damage])
    assert all(map(np.array_equal, pixels_of(spec, cache, tmp_path / "kept"), expected))
    assert len(set(decoded)) == 1
    decoded.clear()
    assert all(map(np.array_equal, pixels_of(spec, cache, tmp_path / "kept"), expected))
    assert bool(decoded) == (damage == "a folder")


def test_an_image_that_cannot_be_decoded_is_not_kept(spec: DatasetSpec, tmp_path: Path) -> None:
    spec.train[1].path.write_bytes(b"gone")
    for cache in ("ram", "disk"):
        store = ImageStore(spec.train, imgsz=SIDE, cache=cache, cache_dir=tmp_path / "kept")
        assert store.broken == {1} and (store[1] == GREY).all()
    assert len(list((tmp_path / "kept").glob("*/*"))) == len(spec.train) - 1


def test_the_folder_keeps_within_its_bound_and_drops_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image, shape = np.arange(3000, dtype=np.uint8).reshape(10, 100, 3), (10, 100, 3)
    monkeypatch.setattr(kept_module, "LIMIT_BYTES", 4 * 3004)
    first = KeptImages(tmp_path)
    for age, name in enumerate(("aa1", "ab2", "ac3")):
        first.keep(name, image)
        os.utime(tmp_path / name[:2] / name, (age, age))
    second = KeptImages(tmp_path)
    held = second.find("aa1", shape)  # the oldest, but used again
    assert held is not None and np.array_equal(held, image)
    for name in ("ad4", "ae5", "af6"):
        second.keep(name, image)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["aa1", "ad4", "ae5", "af6"]
    assert not caplog.records
    for _ in range(2):
        second.keep("ba7", image)  # all that is there is in use
    assert caplog.text.count("is full") == 1 and second.find("ba7", shape) is None
    KeptImages(tmp_path).keep("ba7", image)  # used within the hour, by another run for all it knows
    assert second.find("aa1", shape) is not None
    for path in tmp_path.glob("*/*"):
        os.utime(path, (0, 0))
    third = KeptImages(tmp_path)
    for name in ("bb8", "bc9", "bd0", "be1"):
        third.keep(name, image)
    assert second.find("aa1", shape) is None and np.array_equal(held, image)


def test_cache_disk_may_take_more_than_the_bound(
    spec: DatasetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_module, "LIMIT_BYTES", 100_000)
    pixels_of(spec, "ram", tmp_path / "kept")
    few = set((tmp_path / "kept").glob("*/*"))
    assert 0 < len(few) < len(spec.train)
    pixels_of(spec, "disk", tmp_path / "kept")
    assert few < set((tmp_path / "kept").glob("*/*")) and len(spec.train) == 8
    assert len(list((tmp_path / "kept").glob("*/*"))) == 8


def test_a_disk_that_refuses_is_warned_of_once(
    spec: DatasetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_module.os, "replace", full)
    expected = pixels_of(spec, False, None)
    for cache in ("ram", "disk"):
        caplog.clear()
        found = pixels_of(spec, cache, tmp_path / "kept")
        assert all(map(np.array_equal, found, expected))
        assert caplog.text.count("No space left on device") == 1
    assert not list((tmp_path / "kept").glob("*/*"))


def test_without_a_folder_to_write_to_ram_goes_on(
    spec: DatasetSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found = pixels_of(spec, "ram", tmp_path / "file" / "x")
    assert all(map(np.array_equal, found, pixels_of(spec, False, None)))
    assert caplog.text.count("cannot be written") == 1


def test_drafts_of_a_killed_run_go_after_a_day(tmp_path: Path) -> None:
    shelf = tmp_path / "aa"
    shelf.mkdir()
    for name, age in (("aa1.7.8.draft", 90_000), ("aa1.7.9.draft", 10)):
        (shelf / name).write_bytes(b"half")
        os.utime(shelf / name, (time.time() - age,) * 2)
    KeptImages(tmp_path)
    assert [path.name for path in shelf.iterdir()] == ["aa1.7.9.draft"]
