"""Assignment and loss beside Ultralytics' criterion, on the CPU: same logits, boxes, one thread.

    python benchmarks/criterion.py

Claim: forward and backward take less than a third of the peer's time at 16 images of 640 px with
100 objects each and 80 classes, in float32, at the same loss. Processor time, in turn, with freed
memory kept, as a training keeps it; on a GPU `gpu_suite.py` measures both. Operators are
counted with the work cut as for a GPU without `loss.cu`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from reporting import describe_host, results_folder, write_markdown

from hsrloop.hardware.threads import keep_freed_memory

OBJECTS = (10, 100, 300)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of objects an image: seconds of a run in each round."""
    import torch

    from hsrloop.bench.criterion import CriterionInput, PeersCriterion, kernels_of, repeat
    from hsrloop.bench.meters import in_turn

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    rows: list[dict[str, Any]] = []
    for objects in OBJECTS:
        ours = CriterionInput.of_noise(
            cpu,
            images=options.images,
            objects=objects,
            imgsz=options.imgsz,
            classes=options.classes,
        )
        theirs = PeersCriterion(ours)
        apart = abs(float(ours.run() / theirs.run()) - 1)
        times = in_turn(
            {"ours": repeat(ours), "theirs": repeat(theirs)},
            rounds=options.rounds,
            seconds=0,
            device=cpu,
            clock=time.process_time,
        )
        kernels = {"ours": kernels_of(ours), "theirs": kernels_of(theirs)}
        rows.append({"objects": objects, "s": times, "kernels": kernels, "loss_apart": apart})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    keep_freed_memory()
    rows = measure(options)

    from hsrloop.bench.results import Spread

    sizes = {name: getattr(options, name) for name in ("images", "imgsz", "classes", "rounds")}
    folder = results_folder(options.output)
    text = json.dumps({"host": describe_host(), **sizes, "rows": rows}, indent=1)
    (folder / "criterion.json").write_text(text + "\n")
    lines = ["# Assignment and loss", "", describe_host(), ""]
    lines += [
        f"{options.images} images of {options.imgsz} px, {options.classes} classes; forward and "
        f"backward, float32, one thread; ms of one core, median (lowest to highest), "
        f"n = {options.rounds}, in turn. Both losses differ by at most "
        f"{max(row['loss_apart'] for row in rows):.0e} of their value. Operators are counted "
        "with the work cut as for a GPU on which `loss.cu` cannot be compiled; with it 14 "
        "operators and 7 kernels do all, however many objects (`tests/bench/test_criterion.py`).",
        "",
        "| objects an image | hsrloop, ms | Ultralytics, ms | ratio | operators on a GPU, both |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        s, kernels = row["s"], row["kernels"]
        ours, theirs = (Spread.of([1000 * v for v in s[name]]) for name in ("ours", "theirs"))
        ratio = Spread.of([b / a for a, b in zip(s["ours"], s["theirs"], strict=True)])
        lines.append(
            f"| {row['objects']} | {ours.text(0)} | {theirs.text(0)} | {ratio.text(1)}x | "
            f"{kernels['ours']}, {kernels['theirs']} |"
        )
    write_markdown(folder / "criterion.md", lines)


if __name__ == "__main__":
    main()
