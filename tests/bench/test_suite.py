"""The suite's order, its patience, and one run of it on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hsrloop.bench.results import Row
from hsrloop.bench.suite import FULL, Cell, cells_of, run_suite
from hsrloop.config import resolve
from tests.bench.test_bench import Clock

ROOT = Path(__file__).resolve().parents[2]


def collected(cells: list[Cell], clock: Clock, *, minutes: float, has_gpu: bool) -> list[Row]:
    rows: list[Row] = []
    run_suite(cells, minutes=minutes, has_gpu=has_gpu, on_row=rows.append, clock=clock)
    return rows


def test_what_fails_or_has_no_time_or_no_gpu_says_so_and_the_rest_goes_on() -> None:
    clock = Clock()

    def work(seconds: float, *names: str) -> Iterator[Row]:
        for name in names:
            clock.now += seconds
            yield Row(name=name)

    def fail() -> Iterator[Row]:
        yield Row(name="half")
        raise RuntimeError("no kernel image\nand more")

    cells = [
        Cell("a", 30, lambda: work(30, "a1", "a2")),
        Cell("gpu", 1, lambda: work(0, "never"), needs_gpu=True),
        Cell("broken", 1, fail),
        Cell("long", 70, lambda: work(70, "never")),
        Cell("short", 50, lambda: work(50, "short")),
    ]
    rows = collected(cells, clock, minutes=2, has_gpu=False)
    assert [(row.name, row.note) for row in rows] == [
        ("a1", ""),
        ("a2", ""),
        ("gpu", "skipped: no GPU"),
        ("half", ""),
        ("broken", "failed: RuntimeError: no kernel image"),
        ("long", "skipped: no time left"),
        ("short", ""),
    ]


def test_the_full_suite_has_every_part_and_the_most_telling_first(tiny_dataset: Path) -> None:
    asked = resolve([("test", {"dataset": str(tiny_dataset), "device": "cpu"})])
    names = [cell.name for cell in cells_of(asked, FULL, lambda _: None)]
    assert names[0] == "train, m, fp16, rendered on the GPU"
    expected = [
        *(f"step, {scale}, {kind}" for scale in "nsmlx" for kind in ("fp16", "bf16", "compiled")),
        *("train, m, fp16, rendered on the CPU", "criterion", "validation, m", "exactness"),
        *("step, m, deterministic", "recovery", "tiers", "against Ultralytics"),
        *("loader, rendered on the GPU", "loader, rendered on the CPU"),
    ]
    assert sorted(names[1:]) == sorted(expected)
    assert len(names) == len(set(names))


def test_the_suite_works_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--smoke"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_suite_smoke.json").read_text())
    notes = {row["name"]: row["note"] for row in report["rows"]}
    assert not [note for note in notes.values() if note.startswith("failed")]
    assert notes["exactness under --deterministic"] == "4 steps twice: equal bit for bit"
    assert notes["recovery"] == notes["tier medium"] == "skipped: no GPU"
    assert notes["tier cpu"] == "fits"
    measured = [row["name"] for row in report["rows"] if row["images_per_s"]]
    assert len(measured) == 14
    page = (tmp_path / "gpu_suite_smoke.md").read_text()
    assert all(f"| {name} |" in page for name in notes)
    assert not list(tmp_path.glob("*.new"))
