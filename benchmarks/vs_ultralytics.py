"""Side by side with Ultralytics: the same data, model, epochs and machine, in one run.

    python benchmarks/vs_ultralytics.py speed    --data data.yaml --model yolov8n.pt
    python benchmarks/vs_ultralytics.py accuracy --data a/data.yaml --data b/data.yaml ...

`speed` runs short trainings in turn (ours, the peer as installed, the peer with our number of
threads) and reports images/s in training and in validation as ratios pair by pair. `accuracy`
trains with paired seeds: the peer's three settings and ours at equal epochs, then ours with as many
epochs as fit into the peer's wall time (by `--speedup`, the whole-run ratio that `speed` reports).
Every best.pt is judged by the peer's own validator (rect=False). Each finished cell is written at
once; a second call goes on where the first was ended.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting import describe_host, results_folder, write_markdown

PEER_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "auto": {"optimizer": "auto"},
    "AdamW 0.001": {"optimizer": "AdamW", "lr0": 0.001},
    "AdamW 0.001, no bias warm-up": {
        "optimizer": "AdamW",
        "lr0": 0.001,
        "warmup_bias_lr": 0.0,
    },
}
SPEED_NOTES = """\
Trainings in turn, the first epoch of each not counted; yolov8n, 320 px, batch 8. The peer's time
over ours: median of the pairs (smallest to largest). As installed the peer computes with
min(8, cores - 1) threads and loads in one worker process. Mosaic is off for the last third of
both. Its validation inside a training is
rectangular, ours square, so it computes fewer pixels."""
ACCURACY_NOTES = """\
yolov8n pretrained on COCO, 320 px, batch 8, mosaic 1, degrees 10, mixup 0.1, RAM cache, otherwise
each trainer's defaults. mAP50-95 of best.pt, judged by Ultralytics' validator with `rect=False`:
mean over seeds (each seed). The peer's NMS time limit is lifted in its favour. "Equal time" is as
many epochs as fit into the wall time of the peer's run, by the whole-run ratio of the speed
benchmark."""
SHARED = {"imgsz": 320, "batch": 8, "degrees": 10.0, "mixup": 0.1, "mosaic": 1.0}


def run_peer(options: argparse.Namespace, data: str, **settings: Any) -> dict[str, Any]:
    """Train the peer in a process of its own and return its row."""
    threads = settings.pop("threads", None)
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    request = {
        "data": data,
        "model": options.model,
        "threads": threads,
        "train": {**SHARED, "workers": options.workers, "close_mosaic": 2, **settings},
    }
    return _call([sys.executable, "-m", "hsrloop.bench.peer", json.dumps(request)], env)


def run_ours(options: argparse.Namespace, data: str, **settings: Any) -> dict[str, Any]:
    """Train with the command line, as a user would, and read the run folder."""
    with tempfile.TemporaryDirectory() as output:
        given = {**SHARED, "seed": 0, **settings}
        command = [sys.executable, "-m", "hsrloop", "train", "-d", data, "-m", options.model]
        command += ["-o", output, "--no-tensorboard", "--device", options.device]
        command += [a for k, v in given.items() for a in ("--set", f"{k}={v}")]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - started
        (run_dir,) = Path(output).iterdir()
        lines = (run_dir / "events.jsonl").read_text().splitlines()
        epochs = [e for e in map(json.loads, lines) if e["event"] == "EpochDone"]
        row: dict[str, Any] = {
            "wall_s": wall,
            "train_s": [e["train_s"] for e in epochs],
            "val_s": [e["val_s"] for e in epochs],
        }
        if options.what == "accuracy":
            row |= judge(options, data, run_dir / "weights" / "best.pt")
        return row


def judge(options: argparse.Namespace, data: str, weights: Path) -> dict[str, Any]:
    """Let the peer's validator measure a best.pt."""
    request = {"data": data, "model": str(weights), "validate": {"imgsz": SHARED["imgsz"]}}
    return _call([sys.executable, "-m", "hsrloop.bench.peer", json.dumps(request)], os.environ)


def _call(command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False)
    rows = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or len(rows) != 1:
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    if "NMS time limit" in done.stdout + done.stderr:
        raise SystemExit("the peer's NMS ran into its time limit: the cell is void")
    row: dict[str, Any] = json.loads(rows[0])
    return row


class Cells:
    """Finished cells in a JSON-lines file: a cell that is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        full = {**key, **row}
        self.rows.append(full)
        with self.path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        print(json.dumps(full), flush=True)
        return full


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Interleave short trainings; the first epoch of each is a warm-up and not counted."""
    cells = Cells(folder / "vs_ultralytics_speed.jsonl")
    ours_threads = len(os.sched_getaffinity(0))
    for pair in range(options.pairs):
        for data in options.data:
            key = {"data": Path(data).parent.name, "pair": pair}
            for trainer in ("peer as installed", "ours", f"peer, {ours_threads} threads"):
                cell = {**key, "trainer": trainer}
                if cells.find(cell):
                    continue
                if trainer == "ours":
                    row = run_ours(options, data, epochs=options.epochs)
                else:
                    threads = ours_threads if "threads" in trainer else None
                    settings = {
                        "epochs": options.epochs,
                        "close_mosaic": options.epochs // 3,  # as ours
                        **PEER_SETTINGS["AdamW 0.001"],
                    }
                    row = run_peer(options, data, threads=threads, **settings)
                cells.add(cell, row)
    write_markdown(folder / "vs_ultralytics_speed.md", speed_report(cells.rows))


def speed_report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the report: ratios of the peer's time to ours, pair by pair."""
    lines = ["# Speed against Ultralytics", "", describe_host(), "", SPEED_NOTES, ""]
    trainers = sorted({r["trainer"] for r in rows} - {"ours"})
    lines += [
        "| set | against | training | validation | whole run | n |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted({r["data"] for r in rows}):
        for trainer in trainers:
            pairs = _pairs(rows, name, trainer)
            cells = [
                _spread([_sum(p, k) / _sum(o, k) for p, o in pairs]) for k in ("train_s", "val_s")
            ]
            whole = _spread([p["wall_s"] / o["wall_s"] for p, o in pairs])
            lines.append(f"| {name} | {trainer} | {' | '.join(cells)} | {whole} | {len(pairs)} |")
    lines += ["", "| set | trainer | training, s an epoch | validation, s | whole run, s |"]
    lines += ["|---|---|---|---|---|"]
    for name in sorted({r["data"] for r in rows}):
        for trainer in ("ours", *trainers):
            mine = [r for r in rows if r["data"] == name and r["trainer"] == trainer]
            cells = [
                _seconds([statistics.mean(r[k][1:]) for r in mine]) for k in ("train_s", "val_s")
            ]
            whole = _seconds([r["wall_s"] for r in mine])
            lines.append(f"| {name} | {trainer} | {' | '.join(cells)} | {whole} |")
    return lines


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _pairs(
    rows: Sequence[Mapping[str, Any]], data: str, trainer: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    mine = {r["pair"]: r for r in rows if r["data"] == data and r["trainer"] == "ours"}
    theirs = {r["pair"]: r for r in rows if r["data"] == data and r["trainer"] == trainer}
    return [(theirs[i], mine[i]) for i in sorted(mine.keys() & theirs.keys())]


def _sum(row: Mapping[str, Any], key: str) -> float:
    return float(sum(row[key][1:]))


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def accuracy(options: argparse.Namespace, folder: Path) -> None:
    """Paired seeds; the peer's three settings, ours at equal epochs and at equal wall time."""
    cells = Cells(folder / "vs_ultralytics_accuracy.jsonl")
    longer = max(options.epochs, int(options.epochs * options.speedup))
    for seed in range(options.seeds):
        for data in options.data:
            name = Path(data).parent.name
            for trainer, epochs in (
                ("ours", options.epochs),
                ("ours, equal time", longer),
                *((setting, options.epochs) for setting in PEER_SETTINGS),
            ):
                key = {"data": name, "trainer": trainer, "seed": seed, "epochs": epochs}
                wanted = not options.only or trainer in options.only
                if not wanted or cells.find(key):
                    continue
                if trainer.startswith("ours"):
                    row = run_ours(options, data, epochs=epochs, seed=seed)
                else:
                    settings = {"epochs": epochs, "seed": seed, **PEER_SETTINGS[trainer]}
                    row = run_peer(options, data, **settings)
                cells.add(key, row)
    write_markdown(folder / "vs_ultralytics_accuracy.md", accuracy_report(cells.rows))


def accuracy_report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the report: mAP50-95 by set and trainer, ratios to the peer's best."""
    lines = ["# Accuracy against Ultralytics, short fine-tunes", "", describe_host(), ""]
    lines += [ACCURACY_NOTES, ""]
    lines += [
        "| set | trainer | epochs | mAP50-95 | to the peer's best | n |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted({r["data"] for r in rows}):
        mine = [r for r in rows if r["data"] == name]
        groups: dict[tuple[str, int], list[float]] = {}
        for row in mine:
            groups.setdefault((row["trainer"], row["epochs"]), []).append(row["mAP50-95"])
        peers = [statistics.mean(v) for (t, _), v in groups.items() if t in PEER_SETTINGS]
        for (trainer, epochs), values in groups.items():
            mean = statistics.mean(values)
            each = ", ".join(f"{v:.3f}" for v in values)
            ratio = f"{mean / max(peers):.2f}x" if peers and trainer not in PEER_SETTINGS else ""
            lines.append(
                f"| {name} | {trainer} | {epochs} | {mean:.3f} ({each}) | {ratio} | {len(values)} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("speed", "accuracy"))
    parser.add_argument("--data", action="append", required=True, help="data.yaml; may repeat")
    parser.add_argument("--model", required=True, help="pretrained YOLOv8 weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5, help="speed: interleaved repetitions")
    parser.add_argument("--seeds", type=int, default=3, help="accuracy: paired seeds")
    parser.add_argument("--workers", type=int, default=1, help="the peer's loader processes")
    parser.add_argument("--speedup", type=float, default=1.8, help="accuracy: from `speed`")
    parser.add_argument("--only", action="append", help="accuracy: just this trainer; may repeat")
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    options.data = [str(Path(d).resolve()) for d in options.data]
    options.model = str(Path(options.model).resolve())
    folder = results_folder(options.output)
    {"speed": speed, "accuracy": accuracy}[options.what](options, folder)


if __name__ == "__main__":
    main()
