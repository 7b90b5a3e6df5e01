"""What the commands do once their options are read; loads torch only after a request is sound."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from hsrloop.cli.layers import Request, add_machine, check_asked, resolve_explicit
from hsrloop.cli.options import VALIDATION_SETTINGS
from hsrloop.cli.stop import Stop
from hsrloop.config import Resolved
from hsrloop.data.sets.manifest import Manifest
from hsrloop.errors import CheckpointError, ConfigError, OutputError
from hsrloop.model.export import check_export
from hsrloop.paths import exists, expanded, has_folder, is_file, is_folder
from hsrloop.report.console import ConsoleSink, make_console
from hsrloop.report.files import SPELLED_OUT, json_text, replace_text
from hsrloop.report.scores import scores_json, scores_table

_LOG = logging.getLogger(__name__)
DATA_PATHS = ("dataset", "annotated_dir", "backgrounds_dir", "distractors_dir")


def start(request: Request, *, resume: str | None, newest: bool) -> int:
    """Train, or go on with a run; return the exit code.

    Args:
        request: the settings asked for.
        resume: a checkpoint or a run folder; None for a new run.
        newest: go on with the newest unfinished run instead.
    """
    stop = Stop()
    stop.listen()
    resolved = resolve_explicit(request)
    check_export(resolved.config.export)
    if resume is None:
        need_dataset(resolved)
        check_asked(resolved)
    elif request.fast:
        _LOG.warning("--fast is ignored: the run goes on with the settings it started with.")
    # What a run that goes on is on is not known before its checkpoint is read.
    known = resume is None or resolved.sources["device"] != "default"
    prepare(resolved.config.device if known else "cpu")
    if resume is None:
        resolved = add_machine(request, resolved)
    resolved = from_anywhere(resolved)
    with loading():
        from hsrloop.train.folder import newest_unfinished, output_of
        from hsrloop.train.run import train

    checkpoint: Path | None = None
    if resume is not None:
        output = output_of(resolved.config)
        checkpoint = newest_unfinished(output) if newest else _checkpoint(Path(resume))
    console = make_console()
    outcome = train(resolved, resume=checkpoint, sinks=[ConsoleSink(console)], stop=stop)
    if outcome.reason == "interrupted":
        return stop.exit_code
    if outcome.result is not None:
        config = outcome.result["config"]
        if config["export"] is not None:
            best = outcome.run_dir / str(outcome.result["best_model_path"])
            exported = _export(best, config["export"], imgsz=int(config["imgsz"]))
            console.print(f"Exported: {exported}", soft_wrap=True)
    return 0


def start_validation(request: Request, *, json_file: Path | None) -> int:
    """Validate, print the scores by class, write them as JSON if asked; return the exit code."""
    stop = Stop()
    stop.listen()
    resolved = resolve_explicit(request)
    need_dataset(resolved)
    if request.fast:
        _LOG.warning("--fast is ignored: nothing is trained.")
    given = [key for key in resolved.sources if resolved.meant(key)]
    ignored = [key for key in given if key not in VALIDATION_SETTINGS]
    if ignored:
        _LOG.warning("%s: ignored, nothing is trained.", ", ".join(ignored))
    if json_file is not None:
        check_file_place(json_file, "--json")
    prepare(resolved.config.device)
    with loading():
        from hsrloop.train.folder import newest_best, output_of
        from hsrloop.train.validation import validate

    if resolved.sources["model"] == "default":
        best = newest_best(output_of(resolved.config))
        sources = {**resolved.sources, "model": "newest run"}
        resolved = Resolved(dataclasses.replace(resolved.config, model=str(best)), sources)
    console = make_console()
    metrics = validate(resolved, sinks=[ConsoleSink(console)], stop=stop)
    if metrics is None:
        return stop.exit_code
    console.print(scores_table(metrics))
    if json_file is not None:
        write_json(json_file, {"model": resolved.config.model, **scores_json(metrics)})
        console.print(f"Written: {json_file}", soft_wrap=True)
    return 0


def check_file_place(file: Path, option: str) -> None:
    """Check that a file can be written, before anyone waits for what is to stand in it.

    Raises:
        OutputError: it cannot.
    """
    if str(file) == "-":
        raise OutputError(f"{option} -: name a file. Standard output is for the tables.")
    new = not exists(file)
    try:
        with file.open("ab"):
            pass
    except FileNotFoundError:
        raise OutputError(f"{option} {file}: its folder does not exist. Make it first.") from None
    except OSError as error:
        raise OutputError(f"{option} {file} cannot be written ({error.strerror}).") from None
    if new:
        file.unlink()


def write_json(file: Path, value: Any) -> None:
    """Write what --json asks for.

    Raises:
        OutputError: the disk does not take it; what the file held is still there.
    """
    text, target = json_text(value, indent=2) + "\n", file.resolve()
    try:
        if is_file(target) or not exists(target):
            replace_text(target, text)
        else:  # a pipe or a device
            target.write_text(text, encoding="utf-8", errors=SPELLED_OUT)
    except OSError as error:
        raise OutputError(f"--json {file} cannot be written ({error.strerror}).") from None


def check_png(file: Path, option: str) -> None:
    """Check that a picture's name ends in .png.

    Raises:
        OutputError: it does not.
    """
    if file.suffix.lower() != ".png":
        raise OutputError(f"{option} {file}: it must end in .png.")


def check_outside(file: Path, option: str, places: Iterable[Path]) -> None:
    """Check that an output will not lie inside a data set.

    Raises:
        OutputError: it would, in one of the places.
    """
    for place in places:
        if file.resolve().is_relative_to(place.resolve()):
            raise OutputError(
                f"{option} {file} lies inside the data set {place}, which is never written to. "
                "Choose another folder."
            )


def places_of(manifest: Manifest) -> list[Path]:
    """Return the folders, lists and images that a data.yaml names."""
    entries = [entry for split in manifest.splits.values() for entry in split]
    return [manifest.root / expanded(entry) for entry in entries]


def fetch_weights(names: Sequence[str], *, dest: Path) -> int:
    """Download weights and say for each what came of it; return 1 when one is missing."""
    from hsrloop.model.weights import OFFICIAL, fetch

    fetched = fetch(tuple(names) or OFFICIAL, dest=dest)
    for item in fetched:
        click.echo(f"{item.name}: {item.message}")
    return 0 if all(item.path is not None for item in fetched) else 1


def serve_tensorboard(logdir: Path, port: int, *, host: str) -> int:
    """Serve the event files of all runs below `logdir` until a signal comes."""
    from hsrloop.report.tensorboard import start_server

    server = start_server(port, host=host)
    server.serve(logdir)
    try:
        if server.url is None:
            return 1
        click.echo(f"TensorBoard: {server.url} (Ctrl-C ends it)")
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0


def prepare(device: str = "cpu") -> None:
    """Set what must be set before torch is loaded, and let CUDA start where a GPU may be used.

    Raises:
        ConfigError: `device` is none.
    """
    from hsrloop.hardware.threads import keep_freed_memory, prepare_environment
    from hsrloop.hardware.waking import wake

    prepare_environment()
    keep_freed_memory()
    wake(device)


@contextmanager
def loading() -> Iterator[None]:
    """Load modules without looking for garbage: neither meanwhile nor among them ever after.

    Python's collector would look through all of them again and again, a fifth of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # some libraries call what is left over at the end a leak


def from_anywhere(resolved: Resolved) -> Resolved:
    """Return the settings with paths to read absolute, so that --resume works anywhere."""
    given = {name: getattr(resolved.config, name) for name in DATA_PATHS}
    absolute: dict[str, Any] = {
        k: str(expanded(v).absolute()) for k, v in given.items() if v is not None
    }
    if has_folder(resolved.config.model):
        absolute["model"] = str(expanded(resolved.config.model).absolute())
    return Resolved(dataclasses.replace(resolved.config, **absolute), resolved.sources)


def need_dataset(resolved: Resolved) -> str:
    """Return the path of data.yaml.

    Raises:
        ConfigError: none is given.
    """
    if resolved.config.dataset is None:
        raise ConfigError("No data set is given. Use --dataset path/to/data.yaml.")
    return resolved.config.dataset


def _checkpoint(given: Path) -> Path:
    given = expanded(given)
    path = given / "weights" / "last.pt" if is_folder(given) else given
    if not is_file(path):
        raise CheckpointError(
            f"--resume {given}: no checkpoint there. Give RUN/weights/last.pt, or --resume alone "
            "for the newest unfinished run."
        )
    return path


def _export(best: Path, form: str, *, imgsz: int) -> Path:
    from hsrloop.model.export import export

    return export(best, form, imgsz=imgsz)
