"""A whole run: what it writes, when it stops, and that it learns."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from hsrloop.config import Resolved, TrainConfig, resolve
from hsrloop.errors import ConfigError, DivergedError, OutputError, WeightsError
from hsrloop.events import EpochDone, Note, RunFinished, RunStarted
from hsrloop.model.base import load_base
from hsrloop.ops.loss import GAINS, LossSums
from hsrloop.records import Metrics
from hsrloop.report.files import json_text
from hsrloop.train import build, checkpoint, folder, graphs, loop
from hsrloop.train import run as run_module
from hsrloop.train.build import build_state
from hsrloop.train.run import train
from hsrloop.train.validation import validate
from tests.conftest import write_tiny_dataset

Settings = Callable[..., Resolved]
FIRST_COLUMNS = ["epoch", "box_loss", "cls_loss", "dfl_loss", "mAP50", "mAP50-95", "precision"]


def test_a_laptop_on_battery_is_warned_of(
    settings: Settings, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    percents = iter((63, 21, 19, 18))
    monkeypatch.setattr(
        "psutil.sensors_battery", lambda: SimpleNamespace(
            percent=next(percents), secsleft=3600, power_plugged=False
        )
    )  # fmt: skip
    train(settings(), sinks=[recorder])
    said = [n.text.partition(":")[0] for n in recorder.of(Note) if "battery" in n.text]
    assert said == [
        "running on battery (63 %, for about 60 minutes)",
        "the battery is low (19 %, for about 60 minutes)",
    ]


def test_a_run_writes_what_is_promised(settings: Settings, recorder: Any) -> None:
    outcome = train(settings(save_period=2), sinks=[recorder])
    run_dir = outcome.run_dir
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "config.yaml",
        "events.jsonl",
        "results.csv",
        "training_result.json",
        "weights",
    ]
    names = sorted(p.name for p in (run_dir / "weights").iterdir())
    assert names == ["best.pt", "epoch2.pt", "last.pt"]
    with (run_dir / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:8] == [*FIRST_COLUMNS, "recall"]
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    result = json.loads((run_dir / "training_result.json").read_text())
    assert result["best_model_path"] == "weights/best.pt"
    assert result["last_model_path"] == "weights/last.pt"
    assert set(result["metrics"]) == {"mAP50", "mAP50-95", "precision", "recall"}
    assert result["epochs_completed"] == 3 and result["tensorboard_url"] is None
    assert result["training_time_minutes"] > 0
    assert TrainConfig.from_json(result["config"]) == TrainConfig.from_json(
        yaml.safe_load((run_dir / "config.yaml").read_text())
    )
    events = [
        json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()
    ]
    assert events[0] in ("RunStarted", "Note") and events[-1] == "RunFinished"
    assert len(recorder.of(EpochDone)) == 3 and len(recorder.of(RunStarted)) == 1
    assert recorder.of(RunFinished)[0].result == result
    assert recorder.closed == 1


def test_metrics_of_the_result_are_those_of_best_pt(settings: Settings) -> None:
    outcome = train(settings(epochs=4, lr0=0.01))
    best = outcome.run_dir / "weights" / "best.pt"
    metrics = validate(settings(model=str(best)))
    assert metrics is not None and outcome.result is not None
    assert metrics.ap50_95 == pytest.approx(outcome.result["metrics"]["mAP50-95"], abs=1e-6)


def test_two_runs_are_bit_equal_and_another_seed_differs(settings: Settings) -> None:
    def weights(seed: int, **changes: Any) -> torch.Tensor:
        run = train(settings(epochs=1, seed=seed, **changes))
        saved = checkpoint.read(run.run_dir / "weights" / "last.pt")
        return torch.cat([v.flatten().float() for v in saved.state["model"].values()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert torch.equal(first, weights(0, cache=False))
    assert torch.equal(first, weights(0, workers=1))
    assert not torch.equal(first, weights(1))


def test_it_learns_eight_images_by_heart(settings: Settings) -> None:
    """From scratch, without augmentation. An untrained network's boxes hit nothing, so its target
    scores and losses are next to zero: the losses rise first, and their peak is the measure."""
    calm = {"mosaic": 0.0, "mixup": 0.0, "degrees": 0.0, "scale": 0.0, "translate": 0.0}
    calm |= {"fliplr": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}
    outcome = train(settings(epochs=60, batch=8, lr0=0.002, close_mosaic=0, ema_tau=20.0, **calm))
    history = checkpoint.read(outcome.run_dir / "weights" / "last.pt").state["history"]
    for name in ("box_loss", "cls_loss"):
        losses = [row[name] for row in history]
        assert losses[-1] < 0.5 * max(losses), (name, losses)


def test_llrd_changes_the_rates_and_nothing_else(settings: Settings, recorder: Any) -> None:
    train(settings(epochs=1, llrd=True), sinks=[recorder])
    scales = [group["lr_scale"] for group in recorder.of(RunStarted)[0].groups]
    assert min(scales) == pytest.approx(0.9**22, rel=1e-6)
    assert len(recorder.of(EpochDone)) == 1 and len(recorder.of(RunFinished)) == 1


def flat(value: float) -> Metrics:
    return Metrics(ap50=value, ap50_95=value, precision=value, recall=value, best_conf=0.5)


@pytest.mark.parametrize(
    ("scores", "close_mosaic", "epochs_run", "reason"),
    [
        ([0.1 + 0.01 * i for i in range(9)], 10, 9, "completed"),
        ([0.5] * 9, 10, 6, "patience"),  # 3 epochs, then a tail of 3
        ([0.5] * 9, 0, 3, "patience"),  # no tail
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5], 10, 9, "completed"),  # already in the tail
    ],
)
def test_early_stopping_runs_the_tail(
    scores: list[float],
    close_mosaic: int,
    epochs_run: int,
    reason: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter(scores)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: flat(next(left)))
    outcome = train(settings(epochs=9, patience=2, close_mosaic=close_mosaic, imgsz=32, mosaic=1.0))
    assert outcome.reason == reason and outcome.result is not None
    assert outcome.result["epochs_completed"] == epochs_run


def test_the_learning_rate_jumps_to_the_tail(
    settings: Settings, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: flat(0.5))
    train(settings(epochs=9, patience=2, imgsz=32), sinks=[recorder])
    rates = [next(iter(e.lr.values())) for e in recorder.of(EpochDone)]
    config = settings(epochs=9).config
    assert len(rates) == 6
    assert rates[-1] == pytest.approx(config.lr0 * config.lrf, rel=1e-6)
    assert all(a > b for a, b in zip(rates[1:], rates[2:], strict=False))


def test_two_runs_in_one_second_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.time, "strftime", lambda _: "20260101_120000")
    first, second = folder.make_run_folder(tmp_path), folder.make_run_folder(tmp_path)
    assert [first.name, second.name] == [
        "competition_20260101_120000",
        "competition_20260101_120000_2",
    ]


def test_an_output_that_is_a_file_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; --output needs a folder"):
        train(settings(output=str(tmp_path / "file")))


def test_a_full_disk_is_refused_before_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="free; the run needs about"):
        train(settings())
    assert not (tmp_path / "runs").exists()


def test_no_data_set_is_said(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="no data set given"):
        train(settings(dataset=None))


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(file: Any) -> None:
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]


def test_a_tier_model_that_is_not_at_hand_is_replaced_loudly(
    settings: Settings, recorder: Any, real_data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pretrained = tmp_path / "weights"
    pretrained.mkdir()
    source = real_data / "weights" / "yolov8n_coco_rebuilt.pt"
    (pretrained / "yolov8n.pt").write_bytes(source.read_bytes())
    monkeypatch.setenv("HSRLOOP_WEIGHTS_DIR", str(pretrained))
    monkeypatch.chdir(tmp_path)
    values = {k: v for k, v in settings(epochs=1).config.to_json().items() if k != "model"}
    resolved = resolve([("tier medium", {"model": "yolov8m.pt"}), ("command line", values)])
    train(resolved, sinks=[recorder])
    assert any("yolov8n" in n.text and n.level == "warning" for n in recorder.of(Note))


@pytest.mark.parametrize(
    ("layer", "replaced"),
    [
        ("tier medium", True),
        ("preset fast", True),
        ("command line", False),
        ("file tier_of_mine.yaml", False),
    ],
)
def test_a_model_that_the_user_named_is_not_replaced(
    layer: str, replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Path:
        raise WeightsError(f"{name} was not found")

    monkeypatch.setattr(build, "find_weights", missing)
    monkeypatch.setattr(build, "largest_smaller", lambda name: (tmp_path / "small.pt", "smaller"))
    resolved = resolve([(layer, {"model": "yolov8m.pt"})])
    if replaced:
        assert build.locate(resolved, lambda event: None) == tmp_path / "small.pt"
    else:
        with pytest.raises(WeightsError, match="yolov8m.pt was not found"):
            build.locate(resolved, lambda event: None)


@pytest.mark.parametrize(
    ("layer", "workers", "expected"),
    [("command line", 8, True), ("file of_mine.yaml", 8, False), ("file of_mine.yaml", 1, True)],
)
def test_on_the_cpu_a_process_renders_only_where_that_is_meant(
    settings: Settings, layer: str, workers: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's own config.yaml names the default too."""
    monkeypatch.setattr(build, "usable_cores", lambda: 2)
    monkeypatch.setattr("hsrloop.hardware.probe.usable_cores", lambda: 2)
    values = settings(epochs=1).config.to_json()
    del values["workers"]
    resolved = resolve([("test", values), (layer, {"workers": workers})])
    assert train(resolved).rung.workers == expected


def test_what_has_no_effect_is_warned_of(settings: Settings, recorder: Any) -> None:
    train(settings(epochs=1, head_lr_scale=2.0), sinks=[recorder])
    text = "head_lr_scale is ignored: the network starts from scratch"
    assert [note.level for note in recorder.of(Note) if note.text == text] == ["warning"]


def test_a_training_that_diverges_ends_with_one_error(settings: Settings, tmp_path: Path) -> None:
    """Two good epochs first: what they saved stays."""
    good = train(settings(epochs=2))
    weights = good.run_dir / "weights"
    best = (weights / "best.pt").read_bytes()
    last = checkpoint.read(weights / "last.pt")

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            next(args[0].model.parameters()).fill_(float("nan"))
        return original(*args, **kwargs)

    original = graphs.train_step
    more = resolve([("command line", {"epochs": 3})])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "train_step", poisoned)
        with pytest.raises(DivergedError, match=r"diverged in epoch 3.*--lr0 0\.0001"):
            train(more, resume=weights / "last.pt")
    assert (weights / "best.pt").read_bytes() == best
    assert torch.equal(
        checkpoint.read(weights / "last.pt").state["loss_sums"], last.state["loss_sums"]
    )
    assert not (good.run_dir / "training_result.json").exists()


def test_a_diverged_state_is_not_saved_when_asked_to_stop(settings: Settings) -> None:
    with pytest.raises(DivergedError):
        train(settings(lr0=1e30, epochs=5, optimizer="SGD"))


def test_steps_that_overflow_do_not_count_as_losses(settings: Settings) -> None:
    loss_sums = torch.zeros(6, dtype=torch.float64)
    config = settings().config
    module = load_base("yolov8n.yaml", names=("a",), seed=0).module
    state = build_state(config, module, torch.device("cpu"), fresh_share=None, amp=False)
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    state.loss_sums = loss_sums
    state.record_losses(LossSums(one, one, one, one), one, torch.tensor(False))
    state.record_losses(LossSums(nan, nan, nan, nan), nan, torch.tensor(True))
    assert state.mean_losses()["skipped_steps"] == 1
    assert state.mean_losses()["cls_loss"] == pytest.approx(GAINS.cls)


def test_a_pass_of_one_image_at_the_smallest_size_trains(settings: Settings) -> None:
    outcome = train(settings(imgsz=32, batch=3, epochs=1, mosaic=0.0))  # 3, 3 and 2 images
    assert outcome.result is not None
    assert train(settings(imgsz=32, batch=7, epochs=1)).result is not None  # 7 and 1
    assert train(settings(imgsz=32, batch=1, epochs=1)).result is not None


def test_results_hold_no_value_that_json_lacks() -> None:
    assert json_text({"a": [float("nan"), 1.5], "b": (float("inf"),)}) == (
        '{"a": [null, 1.5], "b": [null]}'
    )


def test_a_home_folder_is_understood_in_output(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outcome = train(settings(output="~/my runs", epochs=1))
    assert outcome.run_dir.parent == tmp_path / "home" / "my runs"


class Silent:
    """A server of event files that never answers."""

    answered = False

    @property
    def url(self) -> str:
        raise AssertionError("somebody waits for it")

    def serve(self, logdir: Path) -> None:
        assert logdir.is_dir()

    def close(self) -> None:
        pass


def test_no_run_waits_for_a_server_that_never_answers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "start_server", lambda port: Silent())
    outcome = train(settings(epochs=1, tensorboard=True))
    assert outcome.result is not None and outcome.result["tensorboard_url"] is None
    assert list((outcome.run_dir / "tensorboard").iterdir())


def test_names_that_are_not_utf8_are_no_matter(tmp_path: Path, settings: Settings) -> None:
    """As from a zip file packed on Japanese Windows; broken images name their files."""
    folder = tmp_path / os.fsdecode(b"\x83e\x83X\x83g")
    write_tiny_dataset(tmp_path / "tiny set").parent.rename(folder)
    yaml_file = folder / "data.yaml"
    (yaml_file.parent / "images/train" / os.fsdecode(b"\x83\x41.jpg")).write_bytes(b"no image")
    outcome = train(settings(dataset=str(yaml_file), epochs=1, tensorboard=True, cache="disk"))
    first = (outcome.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    config = next(e["config"] for e in map(json.loads, first) if e["event"] == "RunStarted")
    assert config["dataset"] == str(yaml_file)
    written = yaml.safe_load((outcome.run_dir / "config.yaml").read_text(encoding="utf-8"))
    assert written["dataset"] == str(yaml_file)
    last = outcome.run_dir / "weights" / "last.pt"
    assert train(resolve([("command line", {"epochs": 2})]), resume=last).result is not None
