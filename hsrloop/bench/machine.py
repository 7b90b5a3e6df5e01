"""What figures depend on: processor, cores, memory, GPU, versions, commit, and who else works."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
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


class OthersWork:
    """Tells how many cores other programs kept busy since it was made.

    Ours are this process and those it has started, once they ended. 0 where only some of the
    machine's cores may be used, and on other systems than Linux, which do not tell what ended
    processes took.
    """

    def __init__(self) -> None:
        self._before = _busy_s()

    def cores(self) -> float:
        """Return the mean; at least 0."""
        (all_then, ours_then, then), (all_now, ours_now, now) = self._before, _busy_s()
        others = (all_now - all_then) - (ours_now - ours_then)
        return max(0.0, others / max(now - then, 1e-9))


def _busy_s() -> tuple[float, float, float]:
    """Return the seconds of cores at work, of which ours, and the time."""
    if os.cpu_count() != usable_cores() or sys.platform != "linux":
        return 0.0, 0.0, time.monotonic()
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(getattr(machine, kind, 0.0) for kind in ("user", "nice", "system"))
    return busy, sum(own[:4]), time.monotonic()


def _processor() -> str:
    """Return the name, with the family, which virtual machines leave to tell generations apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {told['cpu family']})" if "cpu family" in told else name


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
