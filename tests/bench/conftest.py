"""One run of the suite on a machine without a GPU, for all who read what it wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def smoke_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with gpu_suite_smoke.json and .md."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--smoke"]
    done = subprocess.run(
        [*command, "--output", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
