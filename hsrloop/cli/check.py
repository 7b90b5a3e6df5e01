"""`hsrloop check`: look a data set over before anyone waits for a training."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from hsrloop.cli.run import check_outside, check_png, places_of
from hsrloop.config import TrainConfig
from hsrloop.data.doctor.check import check_dataset
from hsrloop.data.scenes.synthesis import find_folders
from hsrloop.data.sets.manifest import Manifest, read_manifest
from hsrloop.errors import OutputError
from hsrloop.hardware.threads import prepare_environment
from hsrloop.paths import is_folder
from hsrloop.report.checkup import CheckBar, checkup, checkup_json, clean
from hsrloop.report.console import make_console

_INTERRUPTED = 130


def run_check(dataset: str, *, imgsz: int, plot: Path | None, as_json: bool) -> int:
    """Check a data set and say what was found; return 1 when training would suffer, else 0."""
    folders = find_folders(TrainConfig(), dataset)  # as `train` finds them beside data.yaml
    manifest = read_manifest(dataset, train_optional=folders.suffice)
    if plot is not None:
        _check_place(plot, manifest)
    try:
        with CheckBar(Console(stderr=True)) as bar:
            report = check_dataset(manifest, imgsz=imgsz, folders=folders, progress=bar)
    except KeyboardInterrupt:
        return _INTERRUPTED
    if plot is not None:
        prepare_environment()

        from hsrloop.report.sheet import save_sheet

        save_sheet(report, plot)
    if as_json:
        click.echo(json.dumps(checkup_json(report), indent=2))
        return 1 if report.suffers else 0
    console = make_console()
    console.print(clean(str(report.yaml)), soft_wrap=True, markup=False, style="bold")
    console.print()
    console.print(checkup(report))
    if plot is not None:
        console.print(f"Written: {clean(str(plot))}", soft_wrap=True, markup=False)
    return 1 if report.suffers else 0


def _check_place(plot: Path, manifest: Manifest) -> None:
    """Refuse a place for the picture before the work: none, or one inside the data set."""
    check_png(plot, "--plot")
    if is_folder(plot):
        raise OutputError(f"--plot {plot} is a folder. Give a file.")
    if not is_folder(plot.absolute().parent):
        raise OutputError(f"--plot {plot}: its folder does not exist. Make it first.")
    check_outside(plot, "--plot", (manifest.root, *places_of(manifest)))
