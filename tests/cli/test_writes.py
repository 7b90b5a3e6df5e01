"""Whatever a data.yaml says, nothing is written but below the output and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import write_tiny_dataset

# Runs commands one after the other, and notes what is opened to be written, made, moved or removed,
# also by forks; "open" has a mode for Python's open and flags for the system's.
NOTING = r"""
import json, os, sys

noted = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2,
         "os.symlink": 2, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1}
FOLDER = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}  # whose path may be relative to an open one


def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        paths = [path] if (flags or 0) & WRITES else []
    else:
        paths = arguments[:PATHS.get(event, 0)]
    folder = arguments[FOLDER[event]] if event in FOLDER else -1
    base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    for path in paths:
        if not isinstance(path, int):
            line = json.dumps([event, os.path.normpath(os.path.join(base, os.fsdecode(path)))])
            os.write(noted, line.encode() + b"\n")


sys.addaudithook(note)
from hsrloop.cli.main import main
for command in json.loads(sys.argv[2]):
    try:
        main.main(command)
    except SystemExit as end:
        if end.code not in (None, 0, 1):  # 1: the check found something
            raise
"""
NAMES = ["../../escaped", "/etc/passwd", "[bold red]mug[/]", "a\x1b]0;b\x07\nc", "..", "x" * 300]


def tree(root: Path) -> dict[str, str]:
    """Return what lies below a folder: each path with its kind or content's digest."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        else:
            is_file = path.is_file()
            found[str(path)] = (
                hashlib.sha256(path.read_bytes()).hexdigest() if is_file else "folder"
            )
    return found


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A world with a home, a cache, and a data set that wants to be elsewhere."""
    for name in ("home", "cache", "temporary", "here", "runs"):
        (tmp_path / name).mkdir()
    plain = write_tiny_dataset(tmp_path / "elsewhere" / "tiny").parent
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to("../elsewhere/tiny/images")
    # Only three classes have boxes; all six have names.
    content = {
        "path": "../elsewhere/tiny/../tiny",
        "train": ["../../data/link/train", "../" * 20 + str(plain / "images" / "train")[1:]],
        "val": str(plain / "images" / "val"),
        "test": "../../../nowhere",
        "names": NAMES,
        "download": "open('ran', 'w').close()",
        "save_dir": "/tmp/escaped",
        "project": "../../escaped",
    }
    (data / "data.yaml").write_text(yaml.safe_dump(content))
    # A photograph to train on is found by its folder of labels, whatever it is called through.
    shutil.copytree(plain / "labels", data / "labels")
    return tmp_path


def test_nothing_is_written_elsewhere(sandbox: Path) -> None:
    data, runs = str(sandbox / "data" / "data.yaml"), str(sandbox / "runs")
    small = ["--imgsz", "64", "--device", "cpu"]
    commands = [
        ["check", "-d", data, "--plot", f"{runs}/check.png"],
        ["preview", "-d", data, "-o", f"{runs}/preview.png", "--imgsz", "64", "--images", "4"],
        ["train", "-d", data, "-o", runs, "-m", "yolov8n.yaml", "--epochs", "1", "--batch", "4",
         "--workers", "1", "--no-auto-scale", *small],
        ["validate", "-d", data, "-m", "RUN/weights/best.pt", "--json", f"{runs}/a.json", *small],
    ]  # fmt: skip
    others = (
        "MPLCONFIGDIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "YOLO_CONFIG_DIR",
    )  # of the process that tests
    env = {
        **{key: value for key, value in os.environ.items() if key not in others},
        "HOME": str(sandbox / "home"),
        "XDG_CACHE_HOME": str(sandbox / "cache"),
        "XDG_CONFIG_HOME": str(sandbox / "home" / "settings"),
        "TMPDIR": str(sandbox / "temporary"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    before, notes = tree(sandbox), sandbox / "runs" / "notes"
    for some in (commands[:3], commands[3:]):
        (best,) = list(sandbox.glob("runs/*/weights/best.pt")) or (Path(),)
        some = [[a.replace("RUN/weights/best.pt", str(best)) for a in c] for c in some]
        done = subprocess.run(
            [sys.executable, "-c", NOTING, str(notes), json.dumps(some)],
            cwd=sandbox / "here", env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr
    allowed = (f"{runs}/", f"{sandbox}/cache/", "/dev/")
    after = tree(sandbox)
    assert {p: v for p, v in before.items() if after.get(p) != v} == {}
    assert [path for path in after if path not in before and not path.startswith(allowed)] == []
    assert not list((sandbox / "temporary").iterdir()), "what was made for a while is gone"
    # Compiled files beside a module are a cache too.
    allowed += (f"{sandbox}/temporary/",)
    noted = [json.loads(line) for line in notes.read_text().splitlines()]
    assert len(noted) > 20
    strays = [
        (e, p) for e, p in noted if not f"{p}/".startswith(allowed) and "__pycache__" not in p
    ]
    assert strays == []
