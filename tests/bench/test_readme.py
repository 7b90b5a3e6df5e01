"""The README's figures are those of the committed results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme as module

    yield module
    for name in ("readme", "vs_ultralytics", "reporting"):
        sys.modules.pop(name, None)


def test_the_readme_says_what_the_results_say(readme: Any) -> None:
    text = readme.README.read_text()
    assert readme.written(text, readme.block()) == text, "run python benchmarks/readme.py"


def test_what_was_not_measured_says_so_and_what_was_is_linked(readme: Any, tmp_path: Path) -> None:
    on_gpu = [line for line in readme.block() if line.startswith("| on a GPU")]
    assert len(on_gpu) == len(readme.ON_A_GPU)
    (tmp_path / "gpu_suite_CARD.md").write_text("")
    readme.README = tmp_path / "README.md"
    assert all("[CARD](gpu_suite_CARD.md)" in row[1] for row in readme._gpu(tmp_path))


def test_other_results_make_another_table(readme: Any, tmp_path: Path) -> None:
    shutil.copytree(readme.RESULTS, tmp_path / "results")
    file = tmp_path / "results" / "loader.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "ratio": 9.87}))
    before, after = readme.block(), readme.block(tmp_path / "results")
    changed = [line for line, old in zip(after, before, strict=True) if line != old]
    assert len(changed) == 1 and "9.87x" in changed[0]
