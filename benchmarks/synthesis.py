"""Does pasting pay? A few real images with and without synthetic ones, at equal optimizer steps.

    python benchmarks/synthesis.py --data data.yaml --annotated-dir cut --backgrounds-dir photos \\
        --model yolov8n.pt

Three arms for each seed, which also picks the real images: `real` (they alone, for as many more
epochs as make the steps equal), `real + synthetic`, and `synthetic` (no real image at all). All are
validated on the set's own validation images; the arm without real images is judged by the classes
that have cut-outs. best.pt is chosen on those images too, and `real` chooses among more epochs:
that favours `real`. Each finished cell is written at once; a second call goes on where the first
was ended.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from reporting import describe_host, results_folder, write_markdown
from vs_ultralytics import Cells

from hsrloop.data.sets.dataset import load_dataset

ARMS = ("real", "real + synthetic", "synthetic")
# Student's t, 97.5%, by degrees of freedom 1 to 9.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def write_subset(options: argparse.Namespace, folder: Path, *, arm: str, seed: int) -> Path:
    """Write a data.yaml with this seed's few real images, or none; nothing is copied."""
    spec = load_dataset(options.data)
    picked = random.Random(seed).sample([str(ref.path) for ref in spec.train], options.real)
    content = {"names": list(spec.names), "val": "val.txt"}
    (folder / "val.txt").write_text("\n".join(str(ref.path) for ref in spec.val) + "\n")
    if arm != "synthetic":
        content["train"] = "train.txt"
        (folder / "train.txt").write_text("\n".join(sorted(picked)) + "\n")
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def run_arm(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with the command line, as a user would, and validate its best.pt."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = write_subset(options, folder, arm=arm, seed=seed)
        more = 1 + options.ratio
        given = {
            "seed": seed, "imgsz": options.imgsz, "batch": options.batch, "patience": 0,
            "epochs": options.epochs * (more if arm == "real" else 1),
            "dynamic_synthetic": arm != "real",
        }  # fmt: skip
        if arm != "real":
            given |= {
                "annotated_dir": options.annotated_dir,
                "backgrounds_dir": options.backgrounds_dir,
                "synthetic_ratio": options.ratio,
                "synthetic_images": options.real * more,
            }
        shared = ["-m", options.model, "--device", options.device]
        command = ["train", "-d", str(data), *shared, "-o", str(folder / "runs")]
        command += [
            "--no-tensorboard",
            *(a for k, v in given.items() for a in ("--set", f"{k}={v}")),
        ]
        started = time.monotonic()
        _call(command)
        wall = time.monotonic() - started
        (run_dir,) = (folder / "runs").iterdir()
        scores = folder / "scores.json"
        best = str(run_dir / "weights" / "best.pt")
        _call(["validate", "-d", str(data), "-m", best, "--json", str(scores), "--imgsz",
               str(options.imgsz), "--device", options.device])  # fmt: skip
        return {"wall_s": wall, **judge(options, json.loads(scores.read_text()))}


def judge(options: argparse.Namespace, scores: Mapping[str, Any]) -> dict[str, float]:
    """Return mAP over all classes and over those that have cut-outs and validation boxes."""
    with_cutouts = {p.name for p in Path(options.annotated_dir).iterdir() if p.is_dir()}
    own = [c for c in scores["classes"] if c["name"] in with_cutouts and c["boxes"]]
    return {
        "mAP50": scores["metrics"]["mAP50"],
        "mAP50-95": scores["metrics"]["mAP50-95"],
        "mAP50, cut-outs": statistics.mean(c["mAP50"] for c in own),
        "mAP50-95, cut-outs": statistics.mean(c["mAP50-95"] for c in own),
        "classes with cut-outs": len(own),
    }


def _call(arguments: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hsrloop", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the report: each arm, then the paired difference that pasting makes."""
    metrics = ("mAP50-95", "mAP50", "mAP50-95, cut-outs", "mAP50, cut-outs")
    lines = [describe_host(), "", "Mean over seeds (each seed).", ""]
    for size in sorted({json.dumps(row["size"]) for row in rows}):
        mine = [row for row in rows if json.dumps(row["size"]) == size]
        lines += [f"`{size}`", "", f"| arm | {' | '.join(metrics)} | n |"]
        lines += ["|---" * (len(metrics) + 2) + "|"]
        for arm in ARMS:
            own = sorted((row for row in mine if row["arm"] == arm), key=lambda r: r["seed"])
            if own:
                cells = [_mean([row[metric] for row in own]) for metric in metrics]
                lines.append(f"| {arm} | {' | '.join(cells)} | {len(own)} |")
        arms = ({r["seed"]: r for r in mine if r["arm"] == arm} for arm in ARMS[:2])
        without, with_ = arms
        seeds = sorted(without.keys() & with_.keys())
        if len(seeds) > 1:
            cells = [_gain([with_[s][m] - without[s][m] for s in seeds]) for m in metrics]
            lines.append(f"| gain by pasting, 95% | {' | '.join(cells)} | {len(seeds)} |")
        lines.append("")
    return lines


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"


def _gain(differences: Sequence[float]) -> str:
    """Return the mean of paired differences with its t-interval."""
    n = len(differences)
    half = T[min(n - 1, len(T)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    return f"{statistics.mean(differences):+.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="data.yaml")
    parser.add_argument("--annotated-dir", required=True)
    parser.add_argument("--backgrounds-dir", required=True)
    parser.add_argument("--model", required=True, help="pretrained YOLOv8 weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--real", type=int, default=20, help="real images; a multiple of batch")
    parser.add_argument("--ratio", type=int, default=9, help="synthetic images per real one")
    parser.add_argument("--epochs", type=int, default=5, help="of the arms with synthetic images")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=ARMS, help="just this arm; may repeat")
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    if options.real % options.batch:
        parser.error("--real must be a multiple of --batch, or steps are not equal")
    for name in ("data", "annotated_dir", "backgrounds_dir", "model"):
        setattr(options, name, str(Path(getattr(options, name)).resolve()))
    folder = results_folder(options.output)
    cells = Cells(folder / "synthesis.jsonl")
    size = {k: getattr(options, k) for k in ("real", "ratio", "epochs", "imgsz", "batch")}
    size |= {"data": Path(options.data).parent.name, "model": Path(options.model).name}
    for seed in range(options.seeds):
        for arm in options.only or ARMS:
            key = {"arm": arm, "seed": seed, "size": size}
            if not cells.find(key):
                cells.add(key, run_arm(options, arm, seed))
    write_markdown(folder / "synthesis.md", report(cells.rows))


if __name__ == "__main__":
    main()
