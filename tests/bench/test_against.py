"""The contest with Ultralytics, its processes replaced: who is asked for what, in which order."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hsrloop.bench.against import SHARED, against_ultralytics, copy_set
from hsrloop.bench.results import Spread
from hsrloop.config import Resolved, resolve
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.errors import ConfigError, DependencyError


@pytest.fixture
def asked(tiny_dataset: Path) -> Resolved:
    values = {"dataset": str(tiny_dataset), "model": "yolov8n.yaml", "epochs": 4, "imgsz": 64}
    return resolve(
        [("test", {**values, "degrees": 3.0, "cos_lr": True, "compile": "off", "cache": "disk"})]
    )


class Processes:
    """Answers in place of both trainers: ours takes 1 s an epoch, the peer 2 s."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.ours: list[dict[str, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.failing = False

    def start(self, command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        said = ""
        assert Path(env["TMPDIR"]).is_dir()
        assert not {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF"} & set(env)
        if "hsrloop.bench.peer" in command:
            request = json.loads(command[-1])
            self.requests.append(request)
            row: dict[str, Any] = {"mAP50-95": 0.25, "peak_memory_bytes": 3 << 30}
            if "train" in request:
                self.order.append("peer")
                epochs = request["train"]["epochs"]
                row |= {
                    "mAP50-95": 0.2,
                    "train_s": [9.0] + [2.0] * (epochs - 1),
                    "val_s": [1.0] * epochs,
                }
            said = f"noise\nROW {json.dumps(row)}\n"
        else:
            self.order.append("ours")
            given = dict(command[i + 1].split("=") for i, a in enumerate(command) if a == "--set")
            self.ours.append(given)
            run_dir = Path(command[command.index("-o") + 1]) / "run"
            run_dir.mkdir()
            times = {"event": "EpochDone", "train_s": 1.0, "val_s": 0.5}
            lines = [json.dumps(times)] * int(given["epochs"])
            (run_dir / "events.jsonl").write_text("\n".join(lines))
            (run_dir / "training_result.json").write_text('{"peak_memory_bytes": 2147483648}')
        done = SimpleNamespace(
            returncode=int(self.failing), communicate=lambda timeout: (said, "last words")
        )
        return contextlib.nullcontext(done)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    made = Processes()
    monkeypatch.setattr(subprocess, "Popen", made.start)
    return made


def test_both_take_turns_with_the_same_settings(asked: Resolved, processes: Processes) -> None:
    rows = against_ultralytics(asked, pairs=2, device="cuda:1", emit=lambda _: None)
    assert processes.order == ["ours", "peer", "peer", "ours", "ours"]
    trained = [request for request in processes.requests if "train" in request]
    for ours, theirs in zip(processes.ours[:2], trained, strict=True):
        for name in SHARED:
            assert ours[name] == str(theirs["train"][name]).replace("T", "t").replace("F", "f"), (
                name
            )
    assert [request["train"]["seed"] for request in trained] == [0, 1]
    # Of four epochs one is without mosaic on both sides, though 10 are asked for.
    assert {ours["close_mosaic"] for ours in processes.ours} == {"10"}
    assert [request["train"]["close_mosaic"] for request in trained] == [1, 1]
    assert processes.ours[0]["compile"] == "off" and processes.ours[0]["cache"] == "disk"
    assert {request["device"] for request in processes.requests} == {"1"}
    assert all(Path(request["data"]).name == "data.yaml" for request in processes.requests)
    assert asked.config.dataset not in {request["data"] for request in processes.requests}
    ours, peer, longer = rows
    assert ours.ratios["training"] == ours.ratios["validation"] == Spread.of([2.0, 2.0])
    assert (ours.mean_ap, peer.mean_ap) == (Spread.of([0.25] * 2), Spread.of([0.2] * 2))
    # The peer's whole run took 9 + 3 * 2 + 4 = 19 s, ours 6 s: 3.17 times as many epochs fit.
    assert processes.ours[-1]["epochs"] == "12" and "12 epochs" in longer.note
    assert ours.images_per_s is not None and ours.images_per_s.median == 8.0
    assert (ours.peak_memory_bytes, peer.peak_memory_bytes) == (2 << 30, 3 << 30)
    assert ours.note == "2 pairs" and "in 18 s, the peer 19 s" in longer.note


def test_what_only_ours_knows_is_handed_on_where_it_is_meant(
    tiny_dataset: Path, processes: Processes
) -> None:
    given = {"dataset": str(tiny_dataset), "model": "yolov8n.yaml", "epochs": 1, "imgsz": 64}
    meant = {"llrd": True, "ema_decay": 0.5, "trust_checkpoint": True, "patience": 3}
    asked = resolve([("command line", {**given, **meant})])
    against_ultralytics(asked, pairs=1, device="cpu", emit=lambda _: None, judged=False)
    (ours,) = processes.ours
    assert (ours["llrd"], ours["ema_decay"], ours["trust_checkpoint"]) == ("true", "0.5", "true")
    assert ours["patience"] == "0" and "checkpoint_minutes" not in ours


def test_without_judging_there_is_one_process_a_side(asked: Resolved, processes: Processes) -> None:
    rows = against_ultralytics(asked, pairs=1, device="cpu", emit=lambda _: None, judged=False)
    assert processes.order == ["ours", "peer"]
    assert [request["judged"] for request in processes.requests] == [False]
    assert [row.name for row in rows] == ["hsrloop", "Ultralytics"]
    assert rows[0].ratios["training"].median == 2 and rows[0].mean_ap is rows[1].mean_ap is None
    assert all(row.images_per_s and row.peak_memory_bytes for row in rows)


def test_what_ultralytics_cannot_do_is_refused(asked: Resolved, processes: Processes) -> None:
    bf16 = Resolved(asked.config.replace(amp_dtype="bf16"), asked.sources)
    with pytest.raises(ConfigError, match="trains in fp16. Use --amp-dtype fp16"):
        against_ultralytics(bf16, pairs=1, device="cuda:0", emit=lambda _: None)
    assert not processes.order


def test_a_failed_process_is_an_error_with_its_last_words(
    asked: Resolved, processes: Processes
) -> None:
    processes.failing = True
    with pytest.raises(DependencyError, match="failed: last words"):
        against_ultralytics(asked, pairs=1, device="cpu", emit=lambda _: None)


def test_a_process_that_hangs_is_ended(asked: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: real(sleeps, **options))
    with pytest.raises(DependencyError, match="-m hsrloop train took more than 0 s"):
        against_ultralytics(asked, pairs=1, device="cpu", emit=lambda _: None, limit_s=0.2)


def test_the_peer_is_given_a_copy_that_reads_the_same(tiny_dataset: Path, tmp_path: Path) -> None:
    path, images = copy_set(str(tiny_dataset), tmp_path / "copy", seed=0)
    ours, copy = load_dataset(tiny_dataset), load_dataset(path)
    assert images == len(ours.train) == len(copy.train)
    assert yaml.safe_load(path.read_text())["names"] == dict(enumerate(ours.names))
    for split in ("train", "val"):
        for a, b in zip(getattr(ours, split), getattr(copy, split), strict=True):
            assert a.path.read_bytes() == b.path.read_bytes()
            assert (a.boxes_cxcywh == b.boxes_cxcywh).all() and (a.labels == b.labels).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [("step", "name no part with it"), ("--seconds=3", "--seconds is nothing to --against")],
)
def test_what_has_no_meaning_with_it_is_refused(given: str, said: str) -> None:
    from click.testing import CliRunner

    from hsrloop.cli.main import main

    done = CliRunner().invoke(main, ["bench", given, "--against", "ultralytics"])
    assert done.exit_code == 2 and said in done.output
