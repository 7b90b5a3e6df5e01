"""Runs with synthetic images: exact resume, no real images, an untouched data set."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from hsrloop.config import resolve
from hsrloop.data.scenes.synthesis import Synthesis
from hsrloop.errors import CheckpointError
from hsrloop.events import Note
from hsrloop.train.build import load_data
from hsrloop.train.ignored import ignored_synthesis
from hsrloop.train.run import train
from tests.conftest import write_material, write_tiny_dataset
from tests.train.conftest import Recorder, run_settings
from tests.train.test_resume import StopAfter, differences, rows, state_of

QUICK = {"epochs": 2, "synthetic_ratio": 0.5, "close_mosaic": 1}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A set with annotated/ and backgrounds/ beside data.yaml."""
    yaml = write_tiny_dataset(tmp_path / "tiny")
    write_material(yaml.parent)
    return yaml


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("questions", [1, 4])
def test_stopped_mid_epoch_it_ends_the_same(dataset: Path, tmp_path: Path, questions: int) -> None:
    before = contents(dataset.parent)
    whole = train(run_settings(dataset, tmp_path / "whole", **QUICK))
    stopped = train(
        run_settings(dataset, tmp_path / "stopped", **QUICK, workers=1), stop=StopAfter(questions)
    )
    assert stopped.reason == "interrupted"
    train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")
    assert differences(state_of(whole.run_dir), state_of(stopped.run_dir)) == []
    assert rows(whole.run_dir) == rows(stopped.run_dir)
    assert contents(dataset.parent) == before


def test_an_epoch_has_real_and_synthetic_samples(
    dataset: Path, tmp_path: Path, recorder: Recorder
) -> None:
    outcome = train(run_settings(dataset, tmp_path / "runs", **QUICK), sinks=[recorder])
    # Two epochs of 8 real and 4 synthetic images in batches of 4.
    assert state_of(outcome.run_dir)["steps"] == 6
    assert any(n.text.startswith("4 synthetic images an epoch") for n in recorder.of(Note))


@pytest.mark.parametrize("changed", ["backgrounds/b1.jpg", "annotated/disc/masks/o0_mask.png"])
def test_other_cutouts_or_backgrounds_are_refused(
    dataset: Path, tmp_path: Path, changed: str
) -> None:
    stopped = train(run_settings(dataset, tmp_path / "runs", **QUICK), stop=StopAfter(1))
    file = dataset.parent / changed
    image = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    image[:40] = 0
    cv2.imwrite(str(file), image)
    with pytest.raises(CheckpointError, match="cut-outs or backgrounds, changed since"):
        train(resolve([]), resume=stopped.run_dir / "weights" / "last.pt")


def test_moved_material_goes_on(dataset: Path, tmp_path: Path) -> None:
    material = tmp_path / "material"
    for name in ("annotated", "backgrounds"):
        material.mkdir(exist_ok=True)
        (dataset.parent / name).rename(material / name)
    given = {f"{name}_dir": str(material / name) for name in ("annotated", "backgrounds")}
    stopped = train(run_settings(dataset, tmp_path / "runs", **QUICK, **given), stop=StopAfter(1))
    moved = material.rename(tmp_path / "moved")
    given = {f"{name}_dir": str(moved / name) for name in ("annotated", "backgrounds")}
    last = stopped.run_dir / "weights" / "last.pt"
    assert train(resolve([("command line", given)]), resume=last).reason == "completed"


def test_without_real_images_it_trains(dataset: Path, tmp_path: Path) -> None:
    dataset.write_text("train:\nval: images/val\nnames: [square, disc, bar]\n")
    settings = run_settings(dataset, tmp_path / "runs", epochs=1, synthetic_images=6)
    outcome = train(settings)
    assert outcome.reason == "completed" and state_of(outcome.run_dir)["steps"] == 2


def test_a_folder_given_in_vain_is_a_warning(
    tiny_dataset: Path, tmp_path: Path, recorder: Recorder
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    train(
        run_settings(tiny_dataset, tmp_path / "runs", epochs=1, backgrounds_dir=str(photos)),
        sinks=[recorder],
    )
    (note,) = [n for n in recorder.of(Note) if "no synthetic images: no cut-outs" in n.text]
    assert note.level == "warning"


@pytest.mark.parametrize(
    ("given", "material", "real", "says"),
    [
        ({"max_objects": 3, "degrees": 5.0}, False, True, "max_objects is ignored: no synthetic"),
        (
            {"max_objects": 3, "negative_share": 0.1, "dynamic_synthetic": False}, True, True,
            "max_objects, negative_share are ignored: no synthetic images: --no-dynamic-synthetic",
        ),
        ({"synthetic_ratio": 0.0, "max_objects": 3}, True, True, "max_objects is ignored"),
        ({"synthetic_ratio": 0.0}, True, True, None),
        ({"synthetic_ratio": 1.0, "max_objects": 3}, True, True, None),
        ({"synthetic_images": 9}, True, True, "with 8 real images, synthetic_ratio counts"),
        ({"synthetic_ratio": 1.0}, True, False, "with 0 real images, synthetic_images counts"),
        ({}, False, True, None),
    ],
)  # fmt: skip
def test_settings_of_synthesis_given_in_vain_are_named(
    tmp_path: Path, given: dict[str, object], material: bool, real: bool, says: str | None
) -> None:
    dataset = write_tiny_dataset(tmp_path / "tiny")
    if material:
        write_material(dataset.parent)
    if not real:
        dataset.write_text("train:\nval: images/val\nnames: [square, disc, bar]\n")
    defaults = ("tier high", {"max_objects": 8, "synthetic_ratio": 2.0})
    resolved = resolve([defaults, ("command line", given)])
    spec, synthesis = load_data(resolved.config, str(dataset))
    lines = ignored_synthesis(resolved, spec, synthesis)
    assert (lines == []) if says is None else (len(lines) == 1 and says in lines[0])


def test_what_is_ignored_is_warned_of_once(
    tiny_dataset: Path, tmp_path: Path, recorder: Recorder
) -> None:
    train(run_settings(tiny_dataset, tmp_path / "runs", epochs=1, max_objects=3), sinks=[recorder])
    (note,) = [n for n in recorder.of(Note) if "max_objects" in n.text]
    assert note.level == "warning"


def test_backgrounds_that_are_not_read_are_named(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Phones write HEIC: objects would be pasted onto training images without a word."""
    write_material(tiny_dataset.parent, backgrounds=2)
    folder = tiny_dataset.parent / "backgrounds"
    kept, other = sorted(folder.iterdir())
    other.rename(folder / "hall.HEIC")
    resolved = resolve([("command line", {"negative_share": 0.1, "synthetic_images": 5})])

    def load() -> tuple[Synthesis, list[str]]:
        caplog.clear()
        spec, synthesis = load_data(resolved.config, str(tiny_dataset))
        return synthesis, ignored_synthesis(resolved, spec, synthesis)

    synthesis, ignored = load()
    assert synthesis.scenes is not None and len(synthesis.scenes.backgrounds) == 1
    assert "1 background of kinds that are not read left out" in caplog.text
    assert "hall.HEIC" in caplog.text and len(ignored) == 1

    kept.unlink()
    synthesis, ignored = load()
    assert "hall.HEIC" in caplog.text and "on training images" in synthesis.text
    assert ignored == [
        "synthetic_images is ignored: with 8 real images, synthetic_ratio counts",
        "negative_share is ignored: without backgrounds, every image shows an object",
    ]

    (folder / "hall.HEIC").unlink()
    load()
    assert "there are no images in it" in caplog.text
    none = resolve([("command line", {"negative_share": 0.0})])
    spec, synthesis = load_data(none.config, str(tiny_dataset))
    assert ignored_synthesis(none, spec, synthesis) == [], "so it is"
