"""A contact sheet of training images, made by the code that training uses."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from hsrloop.cli.layers import Request, resolve_explicit
from hsrloop.cli.run import check_outside, need_dataset, places_of, prepare
from hsrloop.config import TrainConfig
from hsrloop.data.sets.manifest import read_manifest
from hsrloop.errors import OutputError

_COLUMNS = 6


def write_preview(request: Request, sheet: Path, *, images: int) -> int:
    """Write a sheet of the first epoch's images, real ones first; return the exit code.

    Raises:
        HsrloopError: anything the user can mend.
    """
    resolved = resolve_explicit(request)
    config, dataset = resolved.config.check_together(), need_dataset(resolved)
    if sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise OutputError(f"--output {sheet}: it must end in .png or .jpg.")
    manifest = read_manifest(dataset, train_optional=True)
    check_outside(sheet, "--output", places_of(manifest))  # it would be trained on
    prepare()

    from hsrloop.report.plots import contact_sheet, save_picture

    tiles, text = preview_tiles(config, dataset, images=images)
    save_picture(sheet, contact_sheet(tiles, columns=min(_COLUMNS, len(tiles))))
    click.echo(text)
    click.echo(f"Written: {sheet}")
    return 0


def preview_tiles(
    config: TrainConfig, dataset: str, *, images: int
) -> tuple[list[np.ndarray], str]:
    """Return (S, S, 3) uint8 RGB pictures with boxes and class names, and what there is."""
    from hsrloop.data.pixels.render import Renderer, without_broken
    from hsrloop.data.pixels.store import ImageStore
    from hsrloop.data.scenes.cutouts import CutoutStore
    from hsrloop.data.stream import TrainStream
    from hsrloop.report.plots import draw_boxes
    from hsrloop.train.build import load_data

    spec, synthesis = load_data(config, dataset)
    stream = TrainStream.of(spec.train, config, synthesis.scenes)
    store = ImageStore(stream.images, imgsz=config.imgsz)
    cutouts = CutoutStore(stream.cutouts, imgsz=config.imgsz)
    renderer = Renderer(config.imgsz)
    tiles = []
    for index in chosen(len(spec.train), stream.n_samples, images=images):
        plan = stream.plan(0, index, mosaic=True)
        picture = np.empty((config.imgsz, config.imgsz, 3), np.uint8)
        renderer.pixels(plan, store, stream.images, picture, cutouts)
        boxes, labels = without_broken(stream.labels(plan, config.imgsz), store.broken)
        tiles.append(draw_boxes(picture, boxes, labels, spec.names))
    return tiles, synthesis.text


def chosen(real: int, total: int, *, images: int) -> list[int]:
    """Return indices of real and of synthetic samples, half of each where there are enough."""
    synthetic = total - real
    first = min(real, max(images // 2, images - synthetic))
    return [*range(first), *range(real, real + min(synthetic, images - first))]
