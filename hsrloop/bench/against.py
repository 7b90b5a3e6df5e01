"""Side by side with Ultralytics' own trainer: same model, data, batch, size and augmentations.

Both train in turn, each in a process of its own, as a user would start them. The first epoch of a
training warms up and is not counted. Ratios are the peer's time over ours, pair by pair. Where the
weights are to be judged, ours then trains once more with as many epochs as fit into the peer's
time, and Ultralytics' own validator judges all of them. Peak memory of ours contains the worst
step of the run, which is tried before the first.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hsrloop.bench.peer import ROW
from hsrloop.bench.results import Row, Spread
from hsrloop.bench.scratch import scratch
from hsrloop.config import Resolved, TrainConfig
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.data.sets.labels import label_path
from hsrloop.errors import ConfigError, DependencyError
from hsrloop.events import Event, Progress
from hsrloop.hardware.memory import usable_cores
from hsrloop.hardware.threads import as_found
from hsrloop.model.weights import find_weights
from hsrloop.train.build import dataset_of
from hsrloop.train.loop import tail_epochs
from hsrloop.words import counted

Cell = Mapping[str, Any]
_PATIENCE_S = 10  # for a process to save and end
_LAST_WORDS = 2000  # characters of a failed process' output that are shown

# What both call by the same name, and mean alike.
SHARED = (
    *("imgsz", "batch", "epochs", "seed", "deterministic", "optimizer", "lr0", "lrf", "momentum"),
    *("weight_decay", "warmup_epochs", "cos_lr", "hsv_h", "hsv_s", "hsv_v", "degrees", "translate"),
    *("scale", "shear", "flipud", "fliplr", "mosaic", "mixup", "amp", "freeze", "workers"),
)
# What only ours knows, passed on as it was asked for.
_OURS = (
    *("cache", "close_mosaic", "compile", "cuda_graphs", "augment_device", "micro_batch"),
    "trust_checkpoint",
)
# What the contest decides, or what other settings follow from.
_DECIDED = (
    *("dataset", "model", "device", "output", "tensorboard", "dynamic_synthetic", "patience"),
    *("gpu_tier", "auto_scale", "amp_dtype"),
)


@dataclass(frozen=True, slots=True)
class Contest:
    """What both sides are given."""

    config: TrainConfig
    data: Path  # a copy, since the peer writes into it
    device: str  # "cpu" or "cuda:N"
    threads: int
    judged: bool  # its validator looks at the weights too
    limit_s: float | None = None  # of one training
    meant: tuple[str, ...] = ()  # settings that the user wants and that only ours knows

    def ours(self, *, epochs: int, seed: int) -> dict[str, Any]:
        """Train with our command line and return its times and metrics."""
        with tempfile.TemporaryDirectory(dir=self.data.parent) as output:
            names = (*SHARED, *_OURS, *self.meant)
            given = {k: getattr(self.config, k) for k in names} | {"epochs": epochs, "seed": seed}
            command = [sys.executable, "-m", "hsrloop", "train", "-d", str(self.data)]
            command += ["-m", self.config.model, "-o", output, "--device", self.device]
            command += ["--no-tensorboard", "--no-dynamic-synthetic", "--set", "patience=0"]
            command += [a for k, v in given.items() for a in ("--set", f"{k}={_spelled(v)}")]
            self._run(command)
            (run_dir,) = Path(output).iterdir()
            lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
            epochs_done = [e for e in map(json.loads, lines) if e["event"] == "EpochDone"]
            seconds = {k: [float(e[k]) for e in epochs_done] for k in ("train_s", "val_s")}
            result = json.loads((run_dir / "training_result.json").read_text(encoding="utf-8"))
            row = {**seconds, "peak_memory_bytes": result["peak_memory_bytes"]}
            if not self.judged:
                return row
            best = str(run_dir / "weights" / "best.pt")
            return {**self.peer(model=best, validate={"imgsz": self.config.imgsz}), **row}

    def theirs(self, *, seed: int) -> dict[str, Any]:
        """Train with Ultralytics and return its times and metrics."""
        given = {k: getattr(self.config, k) for k in SHARED}
        # It has no limit of its own to how much of a short run goes without mosaic.
        closed = {"close_mosaic": tail_epochs(self.config)}
        train = {**given, **closed, "seed": seed, "patience": 0}
        return self.peer(
            model=self.config.model, train=train, threads=self.threads, judged=self.judged
        )

    def peer(self, **request: Any) -> dict[str, Any]:
        """Ask `hsrloop.bench.peer`."""
        device = self.device.removeprefix("cuda:")
        whole = {"data": str(self.data), "device": device, **request}
        said = self._run([sys.executable, "-m", "hsrloop.bench.peer", json.dumps(whole)])
        if "NMS time limit" in said:
            raise DependencyError("Ultralytics' NMS ran into its time limit: its metrics are void.")
        lines = [line for line in said.splitlines() if line.startswith(ROW)]
        row: dict[str, Any] = json.loads(lines[-1].removeprefix(ROW))
        return row

    def _run(self, command: Sequence[str]) -> str:
        """Run a process and return all it said; what it leaves behind goes with the data."""
        return _run(command, self.limit_s, self.data.parent)


def against_ultralytics(
    resolved: Resolved,
    *,
    pairs: int,
    device: str,
    emit: Callable[[Event], None],
    judged: bool = True,
    limit_s: float | None = None,
) -> list[Row]:
    """Run the contest; return a row for ours, for the peer, and for ours in the peer's time.

    Args:
        judged: with mAP, and the third row; without it only times and memory are compared, in less
            than half the time.
        limit_s: that one training may take.

    Raises:
        DependencyError: a process failed, with its last words, or took too long.
        ConfigError: bf16 is asked for.
        HsrloopError: as a run would raise.
    """
    config = resolved.config
    if config.amp and config.amp_dtype != "fp16":
        raise ConfigError(
            f"amp_dtype is {config.amp_dtype}, but Ultralytics trains in fp16. "
            "Use --amp-dtype fp16."
        )
    if not config.model.endswith((".yaml", ".yml")):
        config = config.replace(model=str(find_weights(config.model, download=False).absolute()))
    total = 2 * pairs + judged

    def tell(done: int) -> None:
        emit(Progress(task="trainings, Ultralytics' and ours", done=done, total=total))

    others = (*SHARED, *_OURS, *_DECIDED)
    meant = tuple(
        name
        for name in resolved.sources
        if name not in others and resolved.meant(name) and getattr(config, name) is not None
    )
    with scratch("against") as folder:
        data, images = copy_set(dataset_of(resolved), folder, seed=config.seed)
        contest = Contest(config, data, device, usable_cores(), judged, limit_s, meant)
        mine: list[Cell] = []
        peers: list[Cell] = []
        tell(0)
        for pair in range(pairs):
            turns: list[tuple[list[Cell], Callable[[], Cell]]] = [
                (mine, partial(contest.ours, epochs=config.epochs, seed=config.seed + pair)),
                (peers, partial(contest.theirs, seed=config.seed + pair)),
            ]
            for cells, turn in turns if pair % 2 == 0 else turns[::-1]:
                cells.append(turn())
                tell(len(mine) + len(peers))
        epochs = max(1, int(config.epochs * statistics.median(_ratios(peers, mine, _whole))))
        longer = contest.ours(epochs=epochs, seed=config.seed) if judged else None
        tell(total)
    return rows_of(mine, peers, longer, images=images, epochs=(config.epochs, epochs))


def rows_of(
    mine: Sequence[Cell],
    peers: Sequence[Cell],
    longer: Cell | None,
    *,
    images: int,
    epochs: tuple[int, int],
) -> list[Row]:
    """Return what came of it.

    Args:
        images: in an epoch.
        epochs: of both, and of ours in the peer's time.
    """
    parts = {"training": _training, "validation": _validation, "whole": _whole}
    ratios = {part: Spread.of(_ratios(peers, mine, seconds)) for part, seconds in parts.items()}

    def row(name: str, cells: Sequence[Cell], **more: Any) -> Row:
        speeds = [images * len(_counted(cell["train_s"])) / _training(cell) for cell in cells]
        scores = [float(cell["mAP50-95"]) for cell in cells] if longer is not None else []
        return Row(
            name=name,
            images_per_s=Spread.of(speeds),
            peak_memory_bytes=max(cell["peak_memory_bytes"] for cell in cells),
            mean_ap=Spread.of(scores) if scores else None,
            **more,
        )

    rows = [
        row("hsrloop", mine, ratios=ratios, note=counted(len(mine), "pair")),
        row("Ultralytics", peers, note=f"{counted(epochs[0], 'epoch')} each"),
    ]
    if longer is None:
        return rows
    taken = _whole(longer), statistics.median(map(_whole, peers))
    equal = f"{counted(epochs[1], 'epoch')} in {taken[0]:.0f} s, the peer {taken[1]:.0f} s"
    return [*rows, row("hsrloop, in the peer's time", [longer], note=equal)]


def copy_set(dataset: str, folder: Path, *, seed: int) -> tuple[Path, int]:
    """Copy a data set as both read it; return its data.yaml and the number of training images."""
    spec = load_dataset(dataset, seed=seed)
    for split, refs in (("train", spec.train), ("val", spec.val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number, ref in enumerate(refs):
            target = folder / "images" / split / f"{number:06d}{ref.path.suffix}"
            shutil.copyfile(ref.path, target)
            labels = label_path(ref.path)
            if labels.exists():
                shutil.copyfile(labels, label_path(target))
    content = {"train": "images/train", "val": "images/val", "names": dict(enumerate(spec.names))}
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(folder), **content}), encoding="utf-8")
    return path, len(spec.train)


def _run(command: Sequence[str], limit_s: float | None, temporary: Path) -> str:
    """Run a process and return all it said; it does not outlive an interrupt."""
    env = as_found(os.environ) | {"TMPDIR": str(temporary)}
    env.pop("OMP_NUM_THREADS", None)
    what = " ".join(word for word in command[1:4] if not word.startswith("{"))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said = "".join(process.communicate(timeout=limit_s))
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said = "".join(_text(part) for part in (error.stdout, error.stderr))
            text = f"{what} took more than {limit_s:.0f} s: {said[-_LAST_WORDS:]}"
            raise DependencyError(text) from error
    if process.returncode:
        raise DependencyError(f"{what} failed: {said[-_LAST_WORDS:]}")
    return said


def _end(process: subprocess.Popen[str]) -> None:
    """Ask a process to end, with those it has started; insist if it does not."""
    process.terminate()
    try:
        process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _text(said: bytes | str | None) -> str:
    """Return what a process that was ended had said: bytes on some systems, whatever is asked."""
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _counted(seconds: Sequence[float]) -> Sequence[float]:
    """Leave the first epoch out, which warms up; it is kept when it is the only one."""
    return seconds[1:] or seconds


def _training(cell: Cell) -> float:
    return sum(_counted(cell["train_s"]))


def _validation(cell: Cell) -> float:
    return sum(_counted(cell["val_s"]))


def _whole(cell: Cell) -> float:
    return sum(cell["train_s"]) + sum(cell["val_s"])


def _ratios(
    peers: Sequence[Cell], mine: Sequence[Cell], seconds: Callable[[Cell], float]
) -> list[float]:
    return [seconds(a) / seconds(b) for a, b in zip(peers, mine, strict=True)]
