"""What a checkpoint costs the training: time taken from it, and steps beside the writer.

    python benchmarks/saving.py --model yolov8m.yaml

Claim: copying the state of yolov8m, AdamW's moments included, takes at most 200 ms between two
steps; everything else happens on the writer's thread. Random weights, random images; the state is
copied as at an epoch's end with a new best (best.pt and last.pt) and as within one (last.pt alone).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from reporting import describe_host, results_folder, write_markdown

from hsrloop.config import TrainConfig
from hsrloop.model.base import load_base
from hsrloop.model.yolo import reg_max, strides
from hsrloop.records import Position
from hsrloop.train.build import build_state
from hsrloop.train.checkpoint import LAST, RunIdentity
from hsrloop.train.rehearsal import worst_batch
from hsrloop.train.saver import Saver
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, train_step

NAMES = ("cup", "can", "box")


def identity_of(config: TrainConfig) -> RunIdentity:
    """Return an identity that means nothing."""
    return RunIdentity(
        config=config,
        sources={},
        names=NAMES,
        fingerprint="",
        versions={},
        threads=torch.get_num_threads(),
        fresh_share=None,
    )


class Bench:
    """A state that is trained on noise, and its saver."""

    def __init__(self, model: str, imgsz: int, batch: int, weights_dir: Path) -> None:
        config = TrainConfig(model=model, imgsz=imgsz, batch=batch)
        base = load_base(model, names=NAMES, seed=0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.state: TrainState = build_state(
            config, base.module, device, fresh_share=None, amp=device.type == "cuda"
        )
        self.settings = StepSettings(
            device=device,
            strides=strides(base.module),
            reg_max=reg_max(base.module),
            amp=device.type == "cuda",
            ema_decay=config.ema_decay,
            ema_tau=config.ema_tau,
        )
        self.batch = worst_batch(images=batch, imgsz=imgsz, boxes=8, classes=len(NAMES))
        self.saver = Saver(weights_dir, identity_of(config), lambda _: None, minutes=0)

    def step(self) -> float:
        """Train one step; return its seconds."""
        started = time.perf_counter()
        train_step(self.state, [self.batch], settings=self.settings, lr=1e-5)
        self._wait()
        self.state.position = Position(0, 8)
        return time.perf_counter() - started

    def save(self, due: list[str]) -> tuple[float, float]:
        """Save what is due; return the seconds taken from training, on the clock and of a core."""
        self.state.due.extend(due)
        self._wait()
        clock, core = time.perf_counter(), time.thread_time()
        self.saver.save(self.state)
        self._wait()
        return time.perf_counter() - clock, time.thread_time() - core

    def busy(self) -> bool:
        """Return whether the writer writes."""
        return not self.saver.due(self.state)

    def _wait(self) -> None:
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="yolov8m.yaml")
    parser.add_argument("--imgsz", type=int, default=96)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results")
    options = parser.parse_args()
    found: dict[str, list[float]] = {
        name: []
        for name in ("within", "within_core", "best", "best_core", "alone", "beside", "write")
    }
    with tempfile.TemporaryDirectory() as weights:
        bench = Bench(options.model, options.imgsz, options.batch, Path(weights))
        bench.saver.reserve(bench.state)
        for _ in range(3):
            bench.step()
        for _ in range(options.rounds):
            for kind, due in (("within", [LAST]), ("best", ["best.pt", LAST])):
                found["alone"] += [bench.step() for _ in range(3)]
                clock, core = bench.save(due)
                found[kind].append(clock)
                found[f"{kind}_core"].append(core)
                begun = time.perf_counter()
                while bench.busy():
                    found["beside"].append(bench.step())
                found["write"].append(time.perf_counter() - begun)
                bench.saver.finish(bench.state)
    rows = {
        "last.pt within an epoch, ms": [1e3 * t for t in found["within"]],
        "the same, of a core": [1e3 * t for t in found["within_core"]],
        "best.pt and last.pt at its end, ms": [1e3 * t for t in found["best"]],
        "the same, of a core ": [1e3 * t for t in found["best_core"]],
        "a step alone, ms": [1e3 * t for t in found["alone"]],
        "a step beside the writer, ms": [1e3 * t for t in found["beside"]],
        "the writer, s": found["write"],
    }
    lines = [f"# Saving {options.model}", "", f"{describe_host()}.", ""]
    lines += ["| | n | median | least | most |", "|---|---|---|---|---|"]
    for name, values in rows.items():
        middle = statistics.median(values)
        lines.append(
            f"| {name} | {len(values)} | {middle:.3g} | {min(values):.3g} | {max(values):.3g} |"
        )
    folder = results_folder(options.output)
    (folder / "saving.json").write_text(json.dumps(found, indent=1))
    write_markdown(folder / "saving.md", lines)


if __name__ == "__main__":
    main()
