"""What figures depend on: processor, cores, memory, GPU, versions, commit, and who else works."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hsrloop.hardware.memory import GIB, host_memory, usable_cores

PACKAGES = ("torch", "torchvision", "ultralytics", "numpy", "opencv-python")


def describe_host() -> str:
    """Return one line: date, processor, cores, memory, GPU, versions, commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    parts = [
        datetime.date.today().isoformat(),
        f"{_processor()}, {usable_cores()} cores, {host_memory().total_bytes / GIB:.0f} GiB",
        gpu,
        f"Python {platform.python_version()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        f"commit {_commit()}",
    ]
    return "; ".join(parts)


def load_average() -> float:
    """Return how many processes wanted a core in the last minute; 0 where nobody tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    """Return the commit of the folder this package lies in; "unknown" once it is installed."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
