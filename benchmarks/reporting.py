"""What every benchmark says about itself: host, versions, commit; and where it writes."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "ultralytics", "numpy", "opencv-python")


def describe_host() -> str:
    """Return one line: date, processor, cores, memory, GPU, versions, commit."""
    parts = [
        datetime.date.today().isoformat(),
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB",
        _gpu(),
        f"Python {platform.python_version()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        f"commit {_commit()}",
    ]
    return "; ".join(parts)


def results_folder(given: Path | None = None) -> Path:
    """Return the folder of committed results, or the one asked for; it exists afterwards."""
    folder = given or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_markdown(path: Path, lines: Sequence[str]) -> None:
    """Write the lines and print them."""
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    print(text)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
