"""The command `hsrloop`: the only place where an error becomes one line and exit code 2.

Importing this module loads neither torch nor numpy, so that --help answers at once; each command
imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import io
import logging
import sys
from pathlib import Path
from typing import Any

import click

from hsrloop import __version__
from hsrloop.cli.options import (
    SectionedCommand,
    bench_options,
    given_settings,
    preview_options,
    setting_options,
    validation_options,
)
from hsrloop.cli.stop import Interrupted
from hsrloop.errors import HsrloopError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_NEWEST = "newest"
BENCH_PARTS = ("step", "loader", "validate", "train", "tiers")
_CTRL_C = 130
_REFUSALS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT)
    + (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
)

_file = click.Path(path_type=Path, dir_okay=False)
_folder = click.Path(path_type=Path, file_okay=False)
_file_option = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file of settings.",
)
_set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting by its name; may be repeated.",
)


class _OneLine(click.ClickException):
    """An error that the user can mend: its message on stderr, exit code 2."""

    exit_code = 2

    def format_message(self) -> str:
        """Return the message; names in it come from files."""
        return _harmless(self.message)


def _harmless(text: str) -> str:
    """Return a text that cannot steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class _Doors(click.Group):
    """The group of commands; turns every HsrloopError into `_OneLine`, and Ctrl-C into its code.

    So too what the system refuses to do with a named file: it is for the user to mend.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except HsrloopError as error:
            raise _OneLine(str(error)) from error
        except KeyboardInterrupt as error:
            click.echo(f"\n{error or 'Stopped.'}", err=True)
            ctx.exit(error.exit_code if isinstance(error, Interrupted) else _CTRL_C)
        except OSError as error:
            if error.filename is None or error.errno not in _REFUSALS:
                raise
            raise _OneLine(f"{error.filename}: {error.strerror}.") from error


class _StderrHandler(logging.Handler):
    """Shows warnings; looks stderr up each time, so that a live bar is not torn."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.capitalize()}: {_harmless(record.getMessage())}", err=True)


@click.group(cls=_Doors, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="hsrloop")
def main() -> None:
    """Fine-tune YOLOv8 on a robot team's objects, before the match starts."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    log = logging.getLogger("hsrloop")
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler(logging.INFO))
        log.setLevel(logging.INFO)
        log.propagate = False


@main.command(cls=SectionedCommand)
@click.option(
    "--fast",
    is_flag=True,
    help="Fast settings: yolov8s (yolov8n at 320 on the CPU), "
    "imgsz 480, 30 epochs, patience 5; never more than the tier's.",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value=_NEWEST,
    metavar="[CHECKPOINT]",
    help="Go on, exactly, in the same run folder: from this weights/last.pt, or the newest "
    "unfinished run.",
)
@click.option("--validate-only", is_flag=True, help="Only validate, as `hsrloop validate` does.")
@_file_option
@_set_option
@setting_options()
def train(
    fast: bool,
    resume: str | None,
    validate_only: bool,
    file: Path | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune a model on a data set.

    Settings come from, each over the one before: defaults, the machine's tier, --fast, --config,
    this command line.
    """
    from hsrloop.cli.layers import Request
    from hsrloop.cli.run import start, start_validation

    request = Request(
        options=given_settings(options), assignments=assignments, file=file, fast=fast
    )
    if validate_only:
        if resume is not None:
            raise click.UsageError("--validate-only and --resume exclude each other.")
        code = start_validation(request, json_file=None)
    else:
        code = start(request, resume=resume, newest=resume == _NEWEST)
    click.get_current_context().exit(code)


@main.command(cls=SectionedCommand)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the scores as JSON.",
)
@_file_option
@_set_option
@validation_options
def validate(
    json_file: Path | None, file: Path | None, assignments: tuple[str, ...], **options: Any
) -> None:
    """Validate weights: AP by class, worst first, and the confidence of best F1.

    Without --model, the best weights of the newest run; without --imgsz, the size they were
    trained at.
    """
    from hsrloop.cli.layers import Request
    from hsrloop.cli.run import start_validation

    request = Request(options=given_settings(options), assignments=assignments, file=file)
    click.get_current_context().exit(start_validation(request, json_file=json_file))


@main.command()
@click.option("--dataset", "-d", required=True, metavar="FILE", help="data.yaml, or its folder.")
@click.option(
    "--imgsz",
    type=click.IntRange(min=32),
    default=640,
    show_default=True,
    help="Size training would use; boxes are measured at it.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also draw classes, box sizes and box centres as one PNG.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead.")
def check(dataset: str, imgsz: int, plot: Path | None, as_json: bool) -> None:
    """Look a data set over: counts, and what would hurt training.

    The data set is only read. The exit code is 0 when it is ready, 1 when training would fail or
    suffer.
    """
    from hsrloop.cli.check import run_check

    code = run_check(dataset, imgsz=imgsz, plot=plot, as_json=as_json)
    click.get_current_context().exit(code)


@main.command(cls=SectionedCommand)
@click.option(
    "--output",
    "-o",
    "sheet",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("preview.png"),
    show_default=True,
    help="Picture to write.",
)
@click.option(
    "--images",
    type=click.IntRange(1, 100),
    default=24,
    show_default=True,
    help="Training images to show: half real, half synthetic, where there are both.",
)
@_file_option
@_set_option
@preview_options
def preview(
    sheet: Path, images: int, file: Path | None, assignments: tuple[str, ...], **options: Any
) -> None:
    """Show training images as the network will see them, with their boxes."""
    from hsrloop.cli.layers import Request
    from hsrloop.cli.preview import write_preview

    request = Request(options=given_settings(options), assignments=assignments, file=file)
    click.get_current_context().exit(write_preview(request, sheet, images=images))


@main.command(cls=SectionedCommand)
@click.argument("parts", nargs=-1, type=click.Choice(BENCH_PARTS), metavar="[PART]...")
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    help="Interleaved rounds; the table shows median, lowest and highest.  [default: 7; 3 with "
    "--against]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 600, min_open=True),
    help="Length of each part of a round, but at least three steps.  [default: 2]",
)
@click.option(
    "--against",
    type=click.Choice(["ultralytics"]),
    help="Train side by side with Ultralytics' own trainer instead: speed, and mAP at equal "
    "epochs and in equal time. Seven trainings of five epochs; less with --rounds 1, --epochs or "
    "--imgsz.",
)
@click.option("--json", "json_file", type=_file, metavar="FILE", help="Also write JSON.")
@click.option("--plot", type=_file, metavar="FILE", help="Also draw bars as one PNG.")
@click.option("--profile", type=_folder, metavar="FOLDER", help="Also profile a few steps.")
@_file_option
@_set_option
@bench_options
def bench(
    parts: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    against: str | None,
    json_file: Path | None,
    plot: Path | None,
    profile: Path | None,
    file: Path | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure how fast this machine trains, and where the time goes.

    Parts: step, loader, validate, train (loader and step together), all four when none is named;
    tiers: a short run with each tier's defaults, on a large card with a smaller one's memory.
    Efficiency is the share of the bare step's speed (forward, loss, backward, optimizer; median of
    the rounds' own); host waits is how often the processor waits for the GPU in a step.
    Without --dataset a small one is painted; without weights at hand the network is untrained.
    """
    from hsrloop.cli.bench import Wanted, run_bench
    from hsrloop.cli.layers import Request

    request = Request(options=given_settings(options), assignments=assignments, file=file)
    once = tuple(dict.fromkeys(parts))
    wanted = Wanted(once, against is not None, rounds, seconds, profile)
    code = run_bench(request, wanted, json_file=json_file, plot=plot)
    click.get_current_context().exit(code)


@main.command()
@click.argument("capsule", type=click.Path(path_type=Path))
@click.option("--device", help="auto, cpu, cuda or cuda:N; the kind it was written on by default.")
@click.option("--float32", is_flag=True, help="Without mixed precision.")
@click.option(
    "--sheet",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Picture of the batch; beside the capsule by default.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write everything but the weights as JSON: plans, boxes, settings, numbers.",
)
def replay(
    capsule: Path, device: str | None, float32: bool, sheet: Path | None, json_file: Path | None
) -> None:
    """Take the step again at which a diverged run gave up (RUN/capsule_N.pt).

    Needs no data set. The exit code is 0 when the same happens again, 1 when not.
    """
    from hsrloop.cli.replay import run_replay

    code = run_replay(capsule, device=device, float32=float32, sheet=sheet, json_file=json_file)
    click.get_current_context().exit(code)


@main.group()
def weights() -> None:
    """Pretrained weights."""


@weights.command()
@click.argument("names", nargs=-1)
@click.option(
    "--dest",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/pretrained"),
    show_default=True,
    help="Folder to fill.",
)
def fetch(names: tuple[str, ...], dest: Path) -> None:
    """Download the five YOLOv8 models, or those named, while there is a network."""
    from hsrloop.cli.run import fetch_weights

    click.get_current_context().exit(fetch_weights(names, dest=dest))


@main.command()
@click.option(
    "--logdir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/finetuned"),
    show_default=True,
    help="Folder of the runs.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=6006,
    show_default=True,
    help="The next free one if taken.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
def tensorboard(logdir: Path, port: int, host: str) -> None:
    """Show all runs in TensorBoard, until Ctrl-C."""
    from hsrloop.cli.run import serve_tensorboard

    click.get_current_context().exit(serve_tensorboard(logdir, port, host=host))


@main.command()
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/demo"),
    show_default=True,
    help="Folder for the data set, the run and the picture.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the scenes and of the run.",
)
def demo(output: Path, device: str, seed: int) -> None:
    """Paint a small tabletop data set, fine-tune on it, show what the model sees."""
    from hsrloop.cli.demo import run_demo

    click.get_current_context().exit(run_demo(output, device=device, seed=seed))


if __name__ == "__main__":
    main()
