"""Process settings: set before torch, never over the user's own, without loading it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hsrloop.hardware import threads

KEYS = (
    *("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE"),
    *("CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "KINETO_LOG_LEVEL"),
)


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> None:
    """Start from an environment without these variables, and restore it afterwards."""
    for key in KEYS:
        monkeypatch.setenv(key, "x")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(key)


def test_unset_variables_are_set() -> None:
    threads.prepare_environment(cores=3)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["GOMP_SPINCOUNT"] == "100000"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    if sys.platform == "linux":
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_the_users_own_stay(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    threads.prepare_environment(cores=3)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_other_programs_find_none_of_it_but_what_the_user_set(monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    before = dict(os.environ)
    threads.prepare_environment()
    assert dict(os.environ) != before
    assert threads.as_found(os.environ) == before


SCRIPT = """
import sys
from hsrloop.hardware import memory, probe, threads, tiers
threads.prepare_environment()
print(threads.keep_freed_memory())
probe.probe("cpu")
assert "torch" not in sys.modules and "ultralytics" not in sys.modules
"""


def test_hardware_loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    assert done.stdout.strip() == str(glibc)


@pytest.mark.parametrize("home", ["a file", "/proc"])
def test_where_nothing_can_be_kept_torch_is_not_told_to(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", home if home == "/proc" else str(tmp_path / "file"))
    assert not kept & set(threads._settings(2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kept <= set(threads._settings(2))
    monkeypatch.setattr(threads.os, "access", lambda *_: False)  # somebody else's
    assert not kept & set(threads._settings(2))
