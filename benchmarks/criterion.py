"""Assignment and loss beside Ultralytics' criterion, on the CPU: same logits, boxes, threads.

    python benchmarks/criterion.py

Claims, for 16 images of 640 px with 80 classes, in float32, at the same loss: with 100 objects
each, forward and backward take less than a third of the peer's time; with 300 they take at most
1.5 times as long as with 10. In turn, with freed memory kept, as a training keeps it; processor
time of one thread, and the clock's where there are several. On a GPU `gpu_suite.py` measures both.
Operators are counted with the work cut as for a GPU without `loss.cu`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting import describe_host, results_folder, write_markdown

from hsrloop.hardware.threads import keep_freed_memory, prepare_environment

OBJECTS = (10, 100, 300)
WHO = ("ours", "theirs")


def measure(options: argparse.Namespace, *, threads: int, classes: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of objects an image: seconds of a run in each round."""
    import torch

    from hsrloop.bench.criterion import CriterionInput, PeersCriterion, kernels_of
    from hsrloop.bench.meters import in_turn, repeat

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    works, apart = {}, {}
    for objects in OBJECTS:
        ours = CriterionInput.of_noise(
            cpu, images=options.images, objects=objects, imgsz=options.imgsz, classes=classes
        )
        theirs = PeersCriterion(ours)
        apart[objects] = abs(float(ours.run() / theirs.run()) - 1)
        works |= {("ours", objects): ours, ("theirs", objects): theirs}
    times = in_turn(
        {f"{who} {objects}": repeat(work.run) for (who, objects), work in works.items()},
        rounds=options.rounds,
        seconds=0,
        device=cpu,
        clock=time.process_time if threads == 1 else time.perf_counter,
    )
    for objects in OBJECTS:
        yield {
            "threads": threads,
            "classes": classes,
            "objects": objects,
            "s": {who: times[f"{who} {objects}"] for who in WHO},
            "kernels": {who: kernels_of(works[who, objects]) for who in WHO},
            "loss_apart": apart[objects],
        }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines of Markdown; growth is that of a round's time from the fewest objects."""
    from hsrloop.bench.results import Spread

    yield (
        "| threads | classes | objects an image | hsrloop, ms | Ultralytics, ms | ratio | "
        "growth, both | operators on a GPU, both |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        s, kernels = row["s"], row["kernels"]
        ours, theirs = (Spread.of([1000 * v for v in s[who]]).text(0) for who in WHO)
        ratio = Spread.of([b / a for a, b in zip(s["ours"], s["theirs"], strict=True)])
        if row["objects"] == OBJECTS[0]:
            first = s
        growth = (
            Spread.of([b / a for a, b in zip(first[who], s[who], strict=True)]).text(2)
            for who in WHO
        )
        yield (
            f"| {row['threads']} | {row['classes']} | {row['objects']} | {ours} | {theirs} | "
            f"{ratio.text(1)}x | {', '.join(growth)} | {kernels['ours']}, {kernels['theirs']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--classes", type=int, nargs="+", default=[80, 20])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    prepare_environment(cores=max(options.threads))
    keep_freed_memory()
    rows = []
    for threads in options.threads:
        for classes in options.classes:
            for row in measure(options, threads=threads, classes=classes):
                rows.append(row)
                print(json.dumps(row), flush=True)

    folder = results_folder(options.output)
    sizes = {name: getattr(options, name) for name in ("images", "imgsz", "rounds")}
    text = json.dumps({"host": describe_host(), **sizes, "rows": rows}, indent=1)
    (folder / "criterion.json").write_text(text + "\n")
    lines = ["# Assignment and loss", "", describe_host(), ""]
    lines += [
        f"{options.images} images of {options.imgsz} px; forward and backward, float32; median "
        f"(lowest to highest), n = {options.rounds}, in turn; processor time of one thread, the "
        "clock's of several. Growth is the time as a multiple of that with "
        f"{OBJECTS[0]} objects. Both losses differ by at most "
        f"{max(row['loss_apart'] for row in rows):.0e} of their value. Operators are counted "
        "with the work cut as for a GPU on which `loss.cu` cannot be compiled; with it 14 "
        "operators and 7 kernels do all, however many objects (`tests/bench/test_criterion.py`).",
        "",
        *table(rows),
    ]
    write_markdown(folder / "criterion.md", lines)


if __name__ == "__main__":
    main()
