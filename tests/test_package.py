"""What is around the code: metadata, pinned versions, scripts, container files."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hsrloop

ROOT = Path(hsrloop.__file__).parent.parent
SCRIPTS = [ROOT / "scripts" / n for n in ("install", "demo", "check", "test", "bench")]


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in rows}


def test_pinned_versions_satisfy_the_ranges(setup: configparser.ConfigParser) -> None:
    extras = setup["options.extras_require"]
    text = "\n".join([setup["options"]["install_requires"], extras["dev"], extras["export"]])
    wanted = [Requirement(line) for line in text.splitlines() if line and line[0] != "#"]
    versions = pinned()
    assert wanted
    for requirement in wanted:
        version = versions[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is pinned"


def test_constraints_name_no_place_to_download_from() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|@ |--|\.whl", text)


def test_pyproject_holds_only_what_setup_cfg_cannot() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(tables) == {"build-system", "tool"} and set(tables["tool"]) == {"ruff"}


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_scripts_are_sound_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ") and "set -euo pipefail" in text
    assert len(text.splitlines()) <= 40
    subprocess.run(["bash", "-n", script], check=True)


def test_ci_fails_where_the_test_data_is_missing(tmp_path: Path) -> None:
    (tmp_path / "clone" / ".ci").mkdir(parents=True)
    copy = tmp_path / "clone" / ".ci" / "run"
    copy.write_text((ROOT / ".ci" / "run").read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run(["bash", copy], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"expected the folder {tmp_path}/shared" in done.stderr


def test_the_container_service() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["hsr-perception"]
    assert service["command"][0] == "train"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert ["/work/data" in v or "/work/models" in v for v in service["volumes"]] == [True, True]


def test_the_image_copies_only_what_the_build_context_holds() -> None:
    copied = {
        source
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY")
        for source in line.split()[1:-1]
    }
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_the_license_is_the_agpl(setup: configparser.ConfigParser) -> None:
    assert setup["metadata"]["license"] == "AGPL-3.0-or-later"
    assert "GNU AFFERO GENERAL PUBLIC LICENSE" in (ROOT / "LICENSE").read_text(encoding="utf-8")
