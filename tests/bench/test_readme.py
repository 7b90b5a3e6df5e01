"""The README's figures are those of the committed results."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hsrloop.bench.against import rows_of
from hsrloop.bench.results import Report, Row, Spread
from hsrloop.hardware.memory import GIB

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme as module

    yield module
    for name in ("readme", "criterion", "gpu_figures", "vs_ultralytics", "reporting"):
        sys.modules.pop(name, None)


def test_the_readme_says_what_the_results_say(readme: Any) -> None:
    text = readme.README.read_text()
    assert readme.written(text, readme.block()) == text, "run python benchmarks/readme.py"


def gpu_lines(readme: Any, results: Path) -> dict[str, list[str]]:
    """Return the rows of a GPU's figures, their cells by the words they begin with.

    But for those that say what parts of it nobody measured.
    """
    lines = [line for line in readme.block(results) if ": not measured" not in line]
    start = lines.index(readme.COLUMNS, lines.index("### Speed on a GPU")) + 2
    rows = [line.split("|")[1:-1] for line in lines[start : lines.index("", start)]]
    return {words.strip(): [cell.strip() for cell in cells] for words, *cells in rows}


@pytest.fixture
def results(readme: Any, tmp_path: Path) -> Path:
    """A copy of the committed results, without those of a GPU."""
    folder: Path = tmp_path / "results"
    shutil.copytree(readme.RESULTS, folder)
    for file in (*folder.glob("gpu_suite_*"), *folder.glob("first_step*")):
        file.unlink()
    return folder


GOALS = {
    "training": "training on two CPU cores, images/s (share of the bare step's speed)",
    "against": "training side by side, images/s",
    "validation": "validation, images/s (share of the network's speed); side by side",
    "memory": "peak memory, GiB",
    "waits": "waits of the host",
    "steps": "optimizer step alone, images/s",
    "criterion": "loss and gradient, images/s",
    "deterministic": "time of a step with `--deterministic`, over that without",
    "tiers": "each tier's defaults in its card's memory",
    "recovery": "settings that do not fit",
    "exactness": "trained twice with `--deterministic`",
    "first step": "from the command to the first step, s",
}


def write_suite(
    results: Path, rows: Sequence[Row], card: str = "card", *, time: str = "", file: str = ""
) -> None:
    host = f"2026-12-01; 8 cores; {card}; commit abc{time}"
    settings = {"device": card, **({"time": time} if time else {})}
    report = Report(host=host, rows=rows, settings=settings)
    (results / f"gpu_suite_{file or card}.json").write_text(json.dumps(report.to_json()))


def once(value: float) -> Spread:
    return Spread.of([value])


def test_every_goal_on_a_gpu_is_not_measured_before_anybody_did(
    readme: Any, results: Path, smoke_results: Path
) -> None:
    for name in ("smoke", "cpu_criterion"):
        shutil.copy(smoke_results / "gpu_suite_smoke.json", results / f"gpu_suite_{name}.json")
    (results / "first_step.json").write_text(
        json.dumps({"host": "h", "device": "cpu", "seen_s": [9.0]})
    )
    lines = gpu_lines(readme, results)
    assert list(lines) == list(GOALS.values())
    assert all(cells == ["not measured", "", "", "", ""] for cells in lines.values())


def test_parts_that_nobody_measured_are_named(readme: Any, results: Path) -> None:
    speed = once(100.0)
    rows = [
        Row(name="step, s, fp16", images_per_s=speed, host_waits=0),
        Row(name="step, n, fp16", note="skipped: no time left"),
        Row(name="step, x, compiled", images_per_s=speed),
    ]
    write_suite(results, rows)
    said = [line for line in readme.block(results) if ": not measured" in line]
    assert said == [
        "| waits of the host | n, m, l, x: not measured |  |  |  |  |",
        f"| {GOALS['steps']} | without graphs, bf16: not measured |  |  |  |  |",
    ]


def test_what_the_suite_wrote_is_in_the_table(
    readme: Any, results: Path, smoke_results: Path
) -> None:
    file = results / "gpu_suite_card.json"
    shutil.copy(smoke_results / "gpu_suite_smoke.json", file)
    report = json.loads(file.read_text())
    report["settings"]["device"] = "card"
    file.write_text(json.dumps(report))
    rows = {row["name"]: row for row in report["rows"]}
    lines = gpu_lines(readme, results)
    train, step, exact, val = (
        rows[name]
        for name in (
            "train, n, fp16, rendered on the GPU",
            *("step, n, fp16", "step, n, deterministic", "validation, n"),
        )
    )

    def speed(row: Any, digits: int = 0) -> str:
        return f"{row['images_per_s']['median']:.{digits}f}"

    def with_share(row: Any) -> str:
        return f"n {speed(row)} ({row['efficiency']['median']:.2f})"

    assert lines[GOALS["training"]][:4] == [with_share(train), "", "", "rounds: 1"]
    assert lines[GOALS["validation"]][0] == with_share(val)
    assert lines[GOALS["memory"]][0] == f"n {train['peak_memory_bytes'] / 2**30:.2f}"
    assert lines[GOALS["waits"]][0] == "a step: n 0; a validation: n 1"
    assert lines[GOALS["steps"]][0] == f"fp16: n {speed(step)}"
    criterion = rows["criterion, 100 objects an image"]
    assert f"100 objects {speed(criterion)}, 300" in lines[GOALS["criterion"]][0]
    assert lines[GOALS["criterion"]][3] == "rounds: 1"
    ratio = step["images_per_s"]["median"] / exact["images_per_s"]["median"]
    assert lines[GOALS["deterministic"]][0] == f"n {ratio:.2f}x"
    assert lines[GOALS["exactness"]][0] == "4 steps twice: equal bit for bit"
    for goal in ("against", "tiers", "recovery", "first step"):  # skipped: no GPU
        assert lines[GOALS[goal]] == ["not measured", "", "", "", ""], goal
    letter = lines[GOALS["training"]][4]
    (host,) = [line for line in readme.block(results) if line.startswith(f"- {letter}: ")]
    assert host == f"- {letter}: {report['host']}"


def test_of_what_was_measured_again_the_newest_is_in_the_table(readme: Any, results: Path) -> None:
    def step(scale: str, speed: float) -> Row:
        return Row(name=f"step, {scale}, fp16", images_per_s=once(speed))

    lost = Row(name="step, m, fp16", note="failed: RuntimeError: lost")
    write_suite(results, [step("n", 30.0), lost], time="2026-12-01T10:05", file="a")
    write_suite(results, [step("n", 10.0), step("m", 5.0)], time="2026-12-01T10:00", file="b")
    write_suite(results, [step("n", 7.0)], card="other")
    said = [line for line in readme.block(results) if GOALS["steps"] in line]
    lines = [line.split("|")[1:-1] for line in said if ": not measured" not in line]
    assert [cells[1].strip() for cells in lines] == ["fp16: n 7", "fp16: m 5", "fp16: n 30"]
    assert len({cells[-1] for cells in lines}) == 3  # hosts


def test_rows_that_belong_together_are_of_one_visit(readme: Any, results: Path) -> None:
    def both(step: float, exact: float | None, time: str) -> None:
        rows = [Row(name="step, n, fp16", images_per_s=once(step))]
        if exact is not None:
            rows.append(Row(name="step, n, deterministic", images_per_s=once(exact)))
        write_suite(results, rows, time=f"2026-12-01T10:{time}", file=time)

    both(30.0, 20.0, "00")
    both(44.0, None, "05")
    lines = gpu_lines(readme, results)
    assert lines[GOALS["steps"]][0] == "fp16: n 44"
    assert lines[GOALS["deterministic"]][0] == "n 1.50x"
    both(44.0, 40.0, "07")
    assert gpu_lines(readme, results)[GOALS["deterministic"]][0] == "n 1.10x"


def test_figures_beside_ultralytics_are_those_of_the_contest(readme: Any, results: Path) -> None:
    same = {"mAP50-95": 0.1, "peak_memory_bytes": GIB}
    ours = {"train_s": [9.0, 2.0], "val_s": [3.0, 0.5], **same}
    theirs = {"train_s": [9.0, 5.0], "val_s": [3.0, 2.0], **same}
    rows = [
        dataclasses.replace(row, name=f"against Ultralytics, {scale}: {row.name}")
        for scale in "nx"
        for row in rows_of([ours], [theirs], ours, images=512, epochs=(2, 4))
    ]
    write_suite(results, [dataclasses.replace(row, peak_memory_bytes=None) for row in rows])
    lines = gpu_lines(readme, results)
    assert lines[GOALS["against"]][:4] == [
        *("n 256, x 256", "n 102, x 102", "n 2.50x, x 2.50x", "1 pair"),
    ]
    assert lines[GOALS["validation"]][2] == "n 4.00x, x 4.00x"
    assert lines[GOALS["memory"]][0] == "not measured"
    peaks = {"hsrloop": 4 * GIB, "Ultralytics": 5 * GIB, "hsrloop, in the peer's time": 4 * GIB}
    told = [
        dataclasses.replace(row, peak_memory_bytes=peaks[row.name.partition(": ")[2]])
        for row in rows
    ]
    write_suite(results, told)
    assert gpu_lines(readme, results)[GOALS["memory"]][:4] == [
        *("n 4.00, x 4.00", "n 5.00, x 5.00", "n 1.25x, x 1.25x", "1 pair"),
    ]


def test_what_a_card_found_stands_beside_its_name(readme: Any, results: Path) -> None:
    tiers = [
        Row(name="tier low", note="fits"),
        Row(name="tier high", note="micro_batch 32 | 16"),
        Row(name="tier workstation", note="skipped: it takes 25 GiB, the card has 16"),
        Row(name="tier cpu", note="fits"),
    ]
    write_suite(results, [*tiers, Row(name="recovery", note="failed: RuntimeError: no")], "a")
    steps = [Row(name="step, m, fp16", images_per_s=once(200.0), host_waits=0)]
    write_suite(results, [*steps, Row(name="step, s, compiled", images_per_s=once(300.0))], "b")
    start = {"host": "card c; commit d", "device": "cuda:0", "seen_s": [8.0, 7.0, 9.5]}
    (results / "first_step_card.json").write_text(json.dumps(start))
    lines = gpu_lines(readme, results)
    assert lines[GOALS["tiers"]][0] == "low: fits; high: micro_batch 32 / 16"
    assert lines[GOALS["recovery"]][0] == "failed: RuntimeError: no"
    assert lines[GOALS["steps"]][0] == "fp16: m 200; compiled: s 300"
    assert lines[GOALS["first step"]][:4] == ["8.0 (7.0 to 9.5)", "", "", "3"]
    letters = {lines[GOALS[goal]][4] for goal in ("tiers", "steps", "first step")}
    assert len(letters) == 3  # three hosts


def test_other_results_make_another_table(readme: Any, tmp_path: Path) -> None:
    shutil.copytree(readme.RESULTS, tmp_path / "results")
    file = tmp_path / "results" / "loader.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "ratio": 9.87}))
    before, after = readme.block(), readme.block(tmp_path / "results")
    changed = [line for line, old in zip(after, before, strict=True) if line != old]
    assert len(changed) == 1 and "9.87x" in changed[0]
