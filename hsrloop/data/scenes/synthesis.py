"""Gather what synthetic images are made of: cut-outs, backgrounds, distractors."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsrloop.config import TrainConfig
from hsrloop.data.scenes.cutout_files import (
    LAYOUT,
    Source,
    annotated_sources,
    distractor_sources,
    read_all,
)
from hsrloop.data.scenes.cutouts import Cutout
from hsrloop.data.scenes.palette import small_versions
from hsrloop.data.scenes.same_picture import also_in
from hsrloop.data.scenes.scene import Scenes, SceneSettings, odds_of, usual_sizes
from hsrloop.data.sets.dataset import DatasetSpec, ImageRef
from hsrloop.data.sets.manifest import yaml_file
from hsrloop.data.sets.places import SUFFIXES, UNREAD_SUFFIXES, files_below, summary
from hsrloop.data.sets.scan import Unreadable, image_size
from hsrloop.errors import DatasetError
from hsrloop.paths import expanded, is_folder
from hsrloop.words import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where the material lies; None: nowhere."""

    annotated: Path | None = None
    backgrounds: Path | None = None
    distractors: Path | None = None

    @property
    def suffice(self) -> bool:
        """Return whether training can do without real images."""
        return self.annotated is not None and self.backgrounds is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """The scenes of a run, if there are any, and what to say about them."""

    scenes: Scenes | None
    text: str  # one line: what there is, or why there is none
    digest: str = ""  # of all files used and how they count


def find_folders(config: TrainConfig, dataset: str | Path) -> Folders:
    """Return the folders given, and of those not given the ones beside data.yaml.

    Raises:
        DatasetError: a folder given does not exist.
    """
    if not config.dynamic_synthetic:
        return Folders()
    beside = yaml_file(dataset).parent
    found: dict[str, Path] = {}
    for name in Folders.__dataclass_fields__:
        given = getattr(config, f"{name}_dir")
        place = expanded(given).absolute() if given is not None else beside / name
        if is_folder(place):
            found[name] = place
        elif given is not None:
            option = f"--{name}-dir"
            wanted = LAYOUT if name == "annotated" else "a folder of images"
            raise DatasetError(f"{option} {given} is no folder. Give {wanted}, or drop {option}.")
    return Folders(**found)


def load_synthesis(
    config: TrainConfig, folders: Folders, spec: DatasetSpec, *, threads: int = 1
) -> Synthesis:
    """Read cut-outs and backgrounds; what validation also holds is left out with a warning.

    Raises:
        DatasetError: a class folder is unknown, or there is nothing at all to train on.
    """
    real = len(spec.train)
    count = round(config.synthetic_ratio * real) if real else config.synthetic_images
    why = _why_off(config, folders, count)
    scenes = None if why else _scenes(config, folders, spec, count, max(1, threads))
    if scenes is not None:
        return Synthesis(
            scenes=scenes, text=_describe(scenes, spec), digest=_digest(scenes, folders)
        )
    why = why or f"nothing in {folders.annotated} can be used"
    if not real:
        raise DatasetError(f"{spec.yaml}: no training images, and no synthetic ones: {why}.")
    return Synthesis(scenes=None, text=f"no synthetic images: {why}")


def _scenes(
    config: TrainConfig, folders: Folders, spec: DatasetSpec, count: int, threads: int
) -> Scenes | None:
    """Read what scenes are made of; None when no cut-out of a class is left."""
    assert folders.annotated is not None
    sources = annotated_sources(folders.annotated, spec.names)
    if folders.distractors is not None:
        sources += distractor_sources(folders.distractors, spec.names)
    backgrounds = _backgrounds_below(folders.backgrounds) if folders.backgrounds else []
    sources, backgrounds = _without_leaks(sources, backgrounds, spec, threads)
    cutouts = read_all(sources, threads=threads)
    distractors = sum(cutout.label < 0 for cutout in cutouts)
    if len(cutouts) == distractors:
        return None
    refs = _background_refs(backgrounds)
    below = refs or spec.train
    if not below:
        raise DatasetError(f"{spec.yaml}: no training images, and no background can be used.")
    rows = [np.zeros(0, np.int64), *(ref.labels for ref in spec.train)]
    return Scenes(
        cutouts=tuple(cutouts),
        backgrounds=refs,
        palette=small_versions([ref.path for ref in below], threads=threads),
        odds=odds_of(cutouts, np.bincount(np.concatenate(rows), minlength=spec.nc)),
        sizes=usual_sizes(cutouts),
        settings=SceneSettings.from_config(config),
        count=count,
        distractors=distractors,
    )


def _why_off(config: TrainConfig, folders: Folders, count: int) -> str:
    """Return why there are no synthetic images; empty when there are."""
    if not config.dynamic_synthetic:
        return "--no-dynamic-synthetic"
    if count == 0:
        return f"synthetic_ratio is {config.synthetic_ratio:g}"
    if folders.annotated is None:
        return "no cut-outs (no annotated/ beside data.yaml; give --annotated-dir)"
    return ""


def _without_leaks(
    sources: list[Source], backgrounds: list[Path], spec: DatasetSpec, threads: int
) -> tuple[list[Source], list[Path]]:
    """Leave out cut-outs' photographs and backgrounds that are validation images."""
    held = [ref.path for ref in spec.val]
    leaks = also_in([*(s.path for s in sources), *backgrounds], held, threads=threads)
    if leaks:
        lines = [f"{path} is {twin}" for path, twin in leaks.items()]
        title = f"{len(leaks)} pictures left out of synthesis: validation holds them too"
        logger.warning("%s", summary(title, lines))
    return (
        [source for source in sources if source.path not in leaks],
        [path for path in backgrounds if path not in leaks],
    )


def _backgrounds_below(folder: Path) -> list[Path]:
    """Return the images below a folder; a warning tells of pictures that are not read."""
    pictures = sorted(files_below(folder, SUFFIXES | UNREAD_SUFFIXES))
    images = [path for path in pictures if path.suffix.lower() in SUFFIXES]
    unread = [path for path in pictures if path.suffix.lower() not in SUFFIXES]
    if unread:
        title = f"{counted(len(unread), 'background')} of kinds that are not read left out"
        logger.warning("%s", summary(title, unread))
    elif not images:
        logger.warning("%s: there are no images in it.", folder)
    return images


def _background_refs(paths: Sequence[Path]) -> tuple[ImageRef, ...]:
    """Return photographs as images without objects."""
    boxes, labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    refs, problems = [], []
    for path in paths:
        try:
            refs.append(ImageRef(path, *image_size(path), boxes, labels, ()))
        except Unreadable as error:
            problems.append(f"{path}: {error}")
    if problems:
        logger.warning("%s", summary(f"{len(problems)} bad backgrounds left out", problems))
    return tuple(refs)


def _describe(scenes: Scenes, spec: DatasetSpec) -> str:
    classes = len({cutout.label for cutout in scenes.cutouts if cutout.label >= 0})
    objects = len(scenes.cutouts) - scenes.distractors
    ground = f"{len(scenes.backgrounds)} backgrounds" if scenes.backgrounds else "training images"
    more = f" and {scenes.distractors} distractors" if scenes.distractors else ""
    return (
        f"{scenes.count} synthetic images an epoch beside {len(spec.train)} real ones: {objects} "
        f"cut-outs of {classes} of {spec.nc} classes{more}, on {ground}; none from validation"
    )


def _digest(scenes: Scenes, folders: Folders) -> str:
    """Return a digest of all files used, by content and by path below their folder."""
    digest = hashlib.sha256()
    cutouts: Sequence[Cutout] = scenes.cutouts
    for cutout in cutouts:
        digest.update(f"\ncutout {cutout.label} ".encode())
        top = folders.annotated if cutout.label >= 0 else folders.distractors
        _add(digest, cutout.path, top)
        if cutout.mask is not None:
            _add(digest, cutout.mask, top)
    for ref in scenes.backgrounds:
        digest.update(b"\nbackground ")
        _add(digest, ref.path, folders.backgrounds)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, path: Path, top: Path | None) -> None:
    relative = Path(os.path.relpath(path, top)).as_posix()
    digest.update(relative.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
