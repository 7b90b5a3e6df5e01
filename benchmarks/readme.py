"""Write the README's table of figures from benchmarks/results.

    python benchmarks/readme.py            # rewrite it
    python benchmarks/readme.py --check    # exit code 1 when it is not what the results say

A figure is in the table with its spread, how often it was measured, and where; what has no results
says "not measured". Figures of a GPU are medians: their spread is in gpu_suite_CARD.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from criterion import OBJECTS
from gpu_figures import ABSENT, gpu_rows
from vs_ultralytics import PEER_SETTINGS

from hsrloop.words import counted

README = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
CRITERION_CLASSES, CRITERION_OBJECTS = 80, 100
BEGIN, END = "<!-- benchmarks/readme.py writes from here -->", "<!-- to here -->"
COLUMNS = "| measured | hsrloop | Ultralytics | ratio | n | where |"
ON_A_GPU = """### Speed on a GPU

By `scripts/bench gpu_suite`: 640 px, batch 16, untrained networks, painted images; the last row by
`scripts/bench first_step`. Medians; what nobody has measured says so, and of what was measured
again the newest is here. Where memory is short, images move from GPU memory to RAM (`bank device ->
pinned`), the CPU augments (`cv2`), and a batch is computed in smaller steps (`micro_batch`)."""
ON_THE_CPU = """### Speed on two CPU cores

yolov8n pretrained on COCO; side by side: three epochs of ycb_household (on Zen 5 of a part of it),
320 px, batch 8. "As installed" Ultralytics computes with one thread; with two, the network, the
same for both, is nearly all of a training step."""
ACCURACY = """### Accuracy

mAP50-95 of `best.pt`, yolov8n pretrained on COCO, 320 px, judged by Ultralytics' own validator;
Ultralytics with the best of three settings (`auto`; AdamW 0.001; AdamW 0.001 without bias warm-up).
The recipe was chosen on kitchen_containers among others, not on ycb_household."""
WHERE = """### Where

Family 26 is Zen 5, with AVX-512; family 25, here without AVX-512, is Zen 3; family 6 is Intel's,
here with AVX-512."""


class Hosts:
    """Letters for the machines, commits and days that figures come from."""

    def __init__(self) -> None:
        self._seen: list[str] = []

    def letter(self, file: Path) -> str:
        """Return the letter of the host that a results file (Markdown) names."""
        lines = file.read_text().splitlines()
        (host,) = [line for line in lines if "; commit " in line]
        return self.letter_of(host)

    def letter_of(self, host: str) -> str:
        """Return the letter of a host that is described in one line."""
        host = host.partition("; load")[0].rstrip(".")
        if host not in self._seen:
            self._seen.append(host)
        return chr(ord("A") + self._seen.index(host))

    def lines(self) -> Iterator[str]:
        """Return a line for each, in the order of the letters."""
        for i, host in enumerate(self._seen):
            yield f"- {chr(ord('A') + i)}: {host}"


def block(results: Path = RESULTS) -> list[str]:
    """Return the lines between the marks."""
    hosts = Hosts()
    on_a_gpu = tuple(gpu_rows(results, hosts.letter_of))
    on_the_cpu = (
        *_speed(results, hosts),
        *_loader(results, hosts),
        *_found(results / "criterion.json", _criterion, hosts, "loss and gradient"),
        *_found(results / "bench_cpu.json", _shares, hosts, "share of the bare step"),
        *_found(results / "first_step.json", _start, hosts, "until the first step"),
        *_saving(results, hosts),
    )
    tables = {
        ON_A_GPU: on_a_gpu,
        ON_THE_CPU: on_the_cpu,
        ACCURACY: (*_accuracy(results, hosts), *_synthesis(results, hosts)),
    }
    lines: list[str] = []
    for title, rows in tables.items():
        lines += [*title.splitlines(), "", COLUMNS, re.sub("[^|]+", "---", COLUMNS)]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return [*lines, *WHERE.splitlines(), "", *hosts.lines()]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    middle, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def _accuracy(results: Path, hosts: Hosts) -> Iterator[Sequence[str]]:
    rows, where = (
        _rows(results / "vs_ultralytics_accuracy.jsonl"),
        hosts.letter(results / "vs_ultralytics_accuracy.md"),
    )
    for name in sorted({row["data"] for row in rows}):
        scores: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            if row["data"] == name:
                scores.setdefault((row["trainer"], row["epochs"]), []).append(row["mAP50-95"])
        theirs, epochs = max(
            (statistics.mean(values), epochs)
            for (trainer, epochs), values in scores.items()
            if trainer in PEER_SETTINGS
        )
        for (trainer, own), values in scores.items():
            if trainer in PEER_SETTINGS:
                continue
            ours = statistics.mean(values)
            what = f"{epochs} epochs each"
            if own != epochs:
                what = f"{own} epochs against {epochs}: {trainer.replace('ours, ', 'about ')}"
            yield (
                f"mAP50-95, {name}, {what}",
                f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}x", f"{len(values)} seeds",
                where,
            )  # fmt: skip


def _speed(results: Path, hosts: Hosts) -> Iterator[Sequence[str]]:
    kinds = {"train_s": "training, s an epoch", "val_s": "validation, s", "wall_s": "whole run, s"}
    for file in sorted(results.glob("vs_ultralytics_speed*.jsonl")):
        rows, where = _rows(file), hosts.letter(file.with_suffix(".md"))
        processor = file.stem.rpartition("_")[2].capitalize().replace("Zen", "Zen ")
        ours = {row["pair"]: row for row in rows if row["trainer"] == "ours"}
        for trainer in sorted({row["trainer"] for row in rows} - {"ours"}, reverse=True):
            theirs = {row["pair"]: row for row in rows if row["trainer"] == trainer}
            pairs = sorted(ours.keys() & theirs.keys())
            for kind, words in kinds.items():
                a, b = ([_seconds(side[i], kind) for i in pairs] for side in (ours, theirs))
                ratios = [y / x for x, y in zip(a, b, strict=True)]
                yield (
                    f"{words}; {trainer.replace('peer', 'Ultralytics')}; {processor}",
                    f"{statistics.median(a):.2f}", f"{statistics.median(b):.2f}", _times(ratios),
                    f"{len(pairs)} pairs", where,
                )  # fmt: skip


def _seconds(row: Mapping[str, Any], kind: str) -> float:
    value = row[kind]
    return float(value) if kind == "wall_s" else statistics.mean(value[1:])  # the first warms up


def _times(ratios: Sequence[float]) -> str:
    return f"{_spread(ratios)}x" if len(ratios) == 1 else _spread(ratios).replace(" (", "x (")


def _loader(results: Path, hosts: Hosts) -> Iterator[Sequence[str]]:
    found = json.loads((results / "loader.json").read_text())
    ours, theirs = (found["ms_per_image"][name] for name in ("hsrloop", "Ultralytics"))
    yield (
        "an augmented training image of 640 px, ms of one core", f"{statistics.median(ours):.2f}",
        f"{statistics.median(theirs):.2f}",
        f"{found['ratio']:.2f}x ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})",
        f"{found['n']} pairs", hosts.letter(results / "loader.md"),
    )  # fmt: skip


def _synthesis(results: Path, hosts: Hosts) -> Iterator[Sequence[str]]:
    rows, where = _rows(results / "synthesis.jsonl"), hosts.letter(results / "synthesis.md")
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    real, pasted = by_arm["real"], by_arm["real + synthetic"]
    gain = statistics.mean(row["mAP50-95"] for row in pasted)
    before = statistics.mean(row["mAP50-95"] for row in real)
    words = "mAP50-95, 20 real images with pasted scenes; without them"
    yield words, f"{gain:.3f}; {before:.3f}", "", "", f"{len(real)} seeds", where
    none = [row["mAP50, cut-outs"] for row in by_arm["synthetic"]]
    words = "mAP50 of the classes with cut-outs, no real image"
    yield words, f"{statistics.mean(none):.3f}", "", "", f"{len(none)} seeds", where


def _saving(results: Path, hosts: Hosts) -> Iterator[Sequence[str]]:
    found, where = json.loads((results / "saving.json").read_text()), results / "saving.md"
    for kind, words in (("within", "within an epoch"), ("best", "at its end, with a new best")):
        values = [1000 * value for value in found[kind]]
        yield (
            f"what a checkpoint of yolov8m takes from training {words}, ms",
            _spread(values, "{:.0f}"), "", "", f"{len(values)}", hosts.letter(where),
        )  # fmt: skip


Figures = Callable[[Mapping[str, Any], Hosts], Iterator[Sequence[str]]]


def _found(file: Path, rows: Figures, hosts: Hosts, words: str) -> Iterator[Sequence[str]]:
    """Return the rows made of a file, or one that says it is not there."""
    if file.exists():
        yield from rows(json.loads(file.read_text()), hosts)
    else:
        yield words, ABSENT, "", "", "", ""


def _criterion(found: Mapping[str, Any], hosts: Hosts) -> Iterator[Sequence[str]]:
    where = hosts.letter_of(found["host"])
    times: dict[int, tuple[list[float], list[float]]] = {}
    for row in found["rows"]:
        if row["classes"] != CRITERION_CLASSES:
            continue
        threads = counted(row["threads"], "thread")
        ours, theirs = ([1000 * s for s in row["s"][name]] for name in ("ours", "theirs"))
        pairs = f"{len(ours)} pairs"
        if row["objects"] == CRITERION_OBJECTS:
            yield (
                f"loss and gradient of {found['images']} images of {found['imgsz']} px with "
                f"{row['objects']} objects each, {threads}, ms",
                f"{statistics.median(ours):.0f}", f"{statistics.median(theirs):.0f}",
                _times([b / a for a, b in zip(ours, theirs, strict=True)]), pairs, where,
            )  # fmt: skip
        times[row["objects"]] = ours, theirs
        if row["objects"] == OBJECTS[-1]:
            grown = (
                [b / a for a, b in zip(*both, strict=True)]
                for both in zip(times[OBJECTS[0]], times[OBJECTS[-1]], strict=True)
            )
            words = f"the same, with {OBJECTS[-1]} objects as a multiple of that with {OBJECTS[0]}"
            yield f"{words}, {threads}", *map(_spread, grown), "", pairs, where


def _shares(found: Mapping[str, Any], hosts: Hosts) -> Iterator[Sequence[str]]:
    words = {
        "step": "a step as a share of the bare step's speed",
        "train": "training, data included, as a share of the bare step's speed",
        "validation": "validation as a share of the network's speed",
    }
    for row in found["rows"]:
        share = row["efficiency"]
        if share is not None:
            yield (
                words[row['name']],
                f"{share['median']:.2f} ({share['low']:.2f} to {share['high']:.2f})", "", "",
                f"{share['n']} pairs", hosts.letter_of(found["host"]),
            )  # fmt: skip


def _start(found: Mapping[str, Any], hosts: Hosts) -> Iterator[Sequence[str]]:
    if found["device"] == "cpu":  # else it is among the figures of a GPU
        yield (
            "from the command to the end of the first step, a set seen before, s",
            _spread(found["seen_s"], "{:.1f}"), "", "", f"{len(found['seen_s'])}",
            hosts.letter_of(found["host"]),
        )  # fmt: skip


def written(text: str, lines: Sequence[str]) -> str:
    """Return the README with other lines between its marks.

    Raises:
        SystemExit: it has no marks.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{README} has no part between {BEGIN} and {END}")
    content = "\n".join((BEGIN, *lines, END))
    return pattern.sub(lambda _: content, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if old")
    options = parser.parse_args()
    before = README.read_text()
    after = written(before, block())
    if options.check:
        sys.exit(before != after)
    README.write_text(after)


if __name__ == "__main__":
    main()
