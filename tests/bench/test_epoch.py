"""The benchmark that says where an epoch goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "epoch.py"
TINY = ["--train", "4", "--val", "2", "--imgsz", "32", "--batch", "2", "--epochs", "3"]


def test_one_epoch_is_too_few() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--epochs", "1"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--epochs must be at least 2" in done.stderr


def test_parts_of_an_epoch_are_no_more_than_the_epoch(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *TINY, "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "epoch.json").read_text())
    times = found["ms"]
    whole = times.pop("an epoch in all")
    assert len(whole) == 3 - 1 and all(len(own) == 2 for own in times.values())
    within = ("validation: the detector", "validation: waiting, matching")
    apart = [own for name, own in times.items() if name not in within and "average" not in name]
    for number, total in enumerate(whole):
        assert sum(own[number] for own in apart) < total
    for name in ("starting steps", "waiting for data", "validation in all", within[0]):
        assert min(times[name]) > 0
    text = (tmp_path / "epoch.md").read_text()
    assert "| starting steps |" in text and "n = 2" in text
