"""`hsrloop train`: layers, warnings, errors, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from hsrloop.cli import demo, run
from hsrloop.config import Resolved, TrainConfig
from hsrloop.model import export, weights
from hsrloop.train import run as train_run
from tests.cli.conftest import RUNG, Calls, Invoke


def test_the_tier_lies_over_the_defaults(invoke: Invoke, calls: Calls) -> None:
    assert invoke("train", "-d", "data.yaml").exit_code == 0
    config, sources = calls.resolved.config, calls.resolved.sources
    assert (config.model, config.batch, config.imgsz) == ("yolov8m.pt", 16, 640)
    assert sources["model"] == "tier medium"
    assert (sources["dataset"], sources["lr0"]) == ("command line", "default")


def test_the_device_is_prepared_before_the_machine_is_looked_at(
    invoke: Invoke, calls: Calls
) -> None:
    invoke("train", "-d", "d.yaml")
    invoke("train", "-d", "d.yaml", "--device", "cuda:1")
    calls.metrics = None
    invoke("validate", "-d", "d.yaml", "-m", "best.pt", "--device", "cpu")
    assert calls.prepared == ["auto", "cuda:1", "cpu"]


def test_what_goes_on_touches_no_gpu_before_its_checkpoint_names_one(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    last = tmp_path / "last.pt"
    last.touch()
    invoke("train", "--resume", last)
    invoke("train", "--resume", last, "--device", "cuda:1")
    assert calls.prepared == ["cpu", "cuda:1"] and len(calls.trained) == 2


LOOKED_THROUGH = """
import gc, sys
looked = []
def see(phase, info):
    if phase == "start" and "torch" in sys.modules:
        ready = hasattr(sys.modules.get("hsrloop.train.run"), "train")
        looked.append((ready, info["generation"]))
gc.callbacks.append(see)
from hsrloop.cli.main import main
try:
    main(["train", "-d", "nowhere.yaml", "--device", "cpu"], prog_name="hsrloop")
except SystemExit as error:
    assert error.code == 2, error.code
assert "torch" in sys.modules and gc.isenabled()
before = [generation for ready, generation in looked if not ready]
assert not before, before
assert gc.get_freeze_count() > 100_000, "modules are looked through again and again"
"""


def test_no_garbage_is_looked_for_while_modules_are_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKED_THROUGH], capture_output=True, text=True)
    assert done.returncode == 0 and "nowhere.yaml" in done.stderr, done.stderr
    assert "leak" not in done.stderr, "said by libraries at the end"


def test_contradictions_are_found_before_anything_is_prepared(invoke: Invoke, calls: Calls) -> None:
    assert invoke("train", "-d", "d.yaml", "--llrd-decay-rate", "0.9").exit_code == 2
    assert not calls.prepared


def test_fast_lies_over_the_tier(invoke: Invoke, calls: Calls) -> None:
    invoke("train", "-d", "data.yaml", "--fast", "--gpu-tier", "cpu")
    config = calls.resolved.config
    assert (config.model, config.imgsz, config.batch) == ("yolov8n.pt", 320, 4)
    assert (config.epochs, config.patience) == (30, 5)
    assert calls.resolved.sources["epochs"] == "preset fast"


def test_a_file_lies_over_the_preset_and_the_command_line_over_all(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 12\nlr0: 1e-3\npatience: 3\nmodel: yolov8n.pt\n")
    invoke("train", "-d", "d.yaml", "--fast", "--config", file, "--set", "patience=4")
    config, sources = calls.resolved.config, calls.resolved.sources
    assert (config.epochs, config.lr0, config.patience) == (12, 0.001, 4)
    assert config.model == "yolov8n.pt"
    assert (sources["epochs"], sources["patience"]) == (f"file {file}", "command line")


def test_without_auto_scaling_no_tier_and_no_probe(
    invoke: Invoke, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hsrloop.hardware import probe

    monkeypatch.setattr(probe, "probe", lambda device: pytest.fail("probed"))
    assert invoke("train", "-d", "d.yaml", "--no-auto-scale").exit_code == 0
    expected = TrainConfig(dataset=str(Path("d.yaml").absolute()), auto_scale=False)
    assert calls.resolved.config == expected  # absolute, so that --resume works from anywhere


def test_an_explicit_value_wins_over_the_tier(invoke: Invoke, calls: Calls) -> None:
    invoke("train", "-d", "d.yaml", "--batch", "3", "--cache", "false")
    assert calls.resolved.config.batch == 3
    assert calls.resolved.config.cache is False


def test_a_runs_own_config_file_gives_the_same_run_without_warnings(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    config = TrainConfig(dataset=str(tmp_path / "d.yaml"), imgsz=320, cos_lr=True)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_json()))
    result = invoke("train", "--config", file)
    assert calls.resolved.config == config
    assert "Warning" not in result.stderr


def test_folders_are_kept_as_absolute_paths(invoke: Invoke, calls: Calls) -> None:
    invoke("train", "-d", "d.yaml", "--annotated-dir", "cut", "--set", "backgrounds_dir=photos")
    config = calls.resolved.config
    assert config.annotated_dir == str(Path("cut").absolute())
    assert config.backgrounds_dir == str(Path("photos").absolute())
    assert config.distractors_dir is None


def test_a_tier_without_auto_scaling_warns(invoke: Invoke, calls: Calls) -> None:
    result = invoke("train", "-d", "d.yaml", "--gpu-tier", "low", "--no-auto-scale")
    assert "--gpu-tier is ignored" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No data set is given. Use --dataset path/to/data.yaml."),
        (["-d", "d", "--epochs", "0"], "epochs is 0; it must be at least 1."),
        (["-d", "d", "--epochs", "ten"], "epochs is 'ten'; it must be a whole number."),
        (["-d", "d", "--batch", "autoo"], "batch is 'autoo'; it must be a whole number, or auto."),
        (["-d", "d", "--imgsz", "650"], "imgsz is 650; it must be a positive multiple of 32."),
        (["-d", "d", "--gpu-tier", "big"], "gpu_tier is big; it must be one of low, medium,"),
        (["-d", "d", "--set", "epoch=3"], "epoch is not a setting. Did you mean epochs?"),
        (["-d", "d", "--set", "epochs"], "--set epochs has no '='; write --set key=value."),
        (["-d", "d", "--epochs", "3", "--set", "epochs=4"], "epochs is given twice. Drop"),
        (["-d", "d", "--llrd-decay-rate", "0.8"], "llrd_decay_rate is 0.8, but layer-wise"),
        (["-d", "d", "--config", "no.yaml"], "--config no.yaml cannot be read: No such file"),
        (["--resume", "gone.pt"], "--resume gone.pt: no checkpoint there."),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    invoke: Invoke, calls: Calls, arguments: list[str], message: str
) -> None:
    result = invoke("train", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1
    assert not calls.trained


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epohcs: 3", "epohcs is not a setting. Did you mean epochs?"),
        ("- 1", "must hold 'key: value' lines"),
        ("a: [", "is not valid YAML, line 1."),
        ("!!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_named(
    invoke: Invoke, calls: Calls, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    result = invoke("train", "-d", "d.yaml", "--config", file)
    assert result.exit_code == 2
    assert str(file) in result.stderr and message in result.stderr


def test_an_unknown_option_names_the_nearest(invoke: Invoke) -> None:
    result = invoke("train", "--epoch", "3")
    assert result.exit_code == 2
    assert "--epochs" in result.stderr


def test_layer_wise_decay_with_its_rate(invoke: Invoke, calls: Calls) -> None:
    assert invoke("train", "-d", "d", "--llrd", "--llrd-decay-rate", "0.8").exit_code == 0
    assert (calls.resolved.config.llrd, calls.resolved.config.llrd_decay_rate) == (True, 0.8)


@pytest.mark.parametrize("given", ["weights/last.pt", "."])
def test_resume_takes_a_checkpoint_or_a_run_folder_and_no_tier(
    invoke: Invoke, calls: Calls, tmp_path: Path, given: str
) -> None:
    checkpoint = tmp_path / "weights" / "last.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert invoke("train", "--resume", tmp_path / given, "--epochs", "9").exit_code == 0
    ((resolved, resume),) = calls.trained
    assert resume == checkpoint
    assert {k for k, v in resolved.sources.items() if v != "default"} == {"epochs"}


def test_resume_alone_takes_the_newest_unfinished_run(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    for name, finished in (
        ("competition_20260101_000000", False),
        ("competition_20260102_0", True),
    ):
        weights = tmp_path / name / "weights"
        weights.mkdir(parents=True)
        (weights / "last.pt").touch()
        if finished:
            (tmp_path / name / "training_result.json").touch()
    assert invoke("train", "-o", tmp_path, "--resume").exit_code == 0
    ((_, resume),) = calls.trained
    assert resume == tmp_path / "competition_20260101_000000" / "weights" / "last.pt"


def test_resume_with_nothing_unfinished_is_an_error(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    result = invoke("train", "--resume", "-o", tmp_path)
    assert result.exit_code == 2
    assert "no unfinished run" in result.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_has_its_own_exit_code(
    invoke: Invoke, calls: Calls, signum: int, code: int
) -> None:
    calls.reason, calls.signum = "interrupted", signum
    assert invoke("train", "-d", "d.yaml").exit_code == code


def test_patience_is_success(invoke: Invoke, calls: Calls) -> None:
    calls.reason = "patience"
    assert invoke("train", "-d", "d.yaml").exit_code == 0


def test_export_follows_the_training(
    invoke: Invoke, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_LIBRARIES", {"onnx": ("json",)})
    result = invoke("train", "-d", "d.yaml", "--export", "onnx", "--imgsz", "320")
    assert calls.exported == [(tmp_path / "weights" / "best.pt", "onnx", 320)]
    assert "best.onnx" in result.stdout


def test_a_missing_export_library_ends_it_before_training(
    invoke: Invoke, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_LIBRARIES", {"onnx": ("json", "no_such_library")})
    result = invoke("train", "-d", "d.yaml", "--export", "onnx")
    assert result.exit_code == 2
    assert "needs no_such_library" in result.stderr and "hsrloop[export]" in result.stderr
    assert not calls.trained


def test_settings_are_compared_over_the_tier(invoke: Invoke, calls: Calls) -> None:
    many = invoke("train", "-d", "d", "--gpu-tier", "workstation", "--micro-batch", "32")
    assert many.exit_code == 0 and calls.resolved.config.batch == 64
    few = invoke("train", "-d", "d", "--gpu-tier", "low", "--micro-batch", "16")
    assert few.exit_code == 2 and "micro_batch is 16; it must be at most batch (8)" in few.stderr


def test_batch_auto_keeps_the_tiers_batch_and_chooses_how_to_split_it(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch: auto\n")
    tier = ["--gpu-tier", "workstation"]
    for given in (["--batch", "auto"], ["--set", "batch=auto"], ["--config", file]):
        assert invoke("train", "-d", "d", *tier, *given).exit_code == 0
        config = calls.trained[-1][0].config
        assert (config.batch, config.micro_batch) == (64, "auto")
    assert invoke("train", "-d", "d", *tier, "--micro-batch", "auto").exit_code == 0
    assert calls.trained[-1][0].config.micro_batch == "auto"
    both = invoke("train", "-d", "d", "--batch", "auto", "--micro-batch", "4")
    assert both.exit_code == 2 and "Drop one of them" in both.stderr


def test_settings_are_compared_with_the_run_that_goes_on(
    invoke: Invoke, calls: Calls, tmp_path: Path
) -> None:
    last = tmp_path / "weights" / "last.pt"
    last.parent.mkdir()
    last.touch()
    options = ["--micro-batch", "32", "--llrd-decay-rate", "0.8"]
    assert invoke("train", "--resume", last, *options).exit_code == 0


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["-d", LONG],
        ["-d", "~nosuchuser/data.yaml"],
        ["-d", "d", "--config", LONG],
        ["--resume", LONG],
        ["--resume", "~nosuchuser/last.pt"],
        ["--resume", "-o", LONG],
        ["-d", "d", "--lr0", "1e999"],
        ["-d", "d", "--set", "lr0=" + "9" * 400],
        ["-d", "tiny/data.yaml", "-o", LONG, "-m", "yolov8n.yaml"],
        ["-d", "tiny/data.yaml", "-m", LONG],
        ["-d", "tiny/data.yaml", "-m", f"./{LONG}.pt"],
        ["-d", "tiny/data.yaml", "-m", "~nosuchuser/a.pt"],
        ["-d", "tiny/data.yaml", "-m", "tiny/"],
    ],
)
def test_a_path_that_cannot_be_is_one_line(
    invoke: Invoke, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tiny_dataset.parents[1])
    monkeypatch.setattr(run.Stop, "listen", lambda self: None)
    monkeypatch.setattr(weights, "_open_within", no_network)
    result = invoke("train", *arguments, "--device", "cpu", "--no-tensorboard")
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr and "Traceback" not in result.output
    assert not Path("models").exists()


def no_network(*_: object) -> None:
    raise OSError("no network here")


def test_weights_are_searched_in_a_folder_that_may_not_be_entered(
    invoke: Invoke, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_dataset.parents[1])
    monkeypatch.setenv("HSRLOOP_WEIGHTS_DIR", LONG)
    monkeypatch.setattr(run.Stop, "listen", lambda self: None)
    monkeypatch.setattr(weights, "_open_within", no_network)
    result = invoke("train", "-d", tiny_dataset, "-m", "yolov8n", "--device", "cpu")
    assert result.exit_code == 2 and "was not found in" in result.stderr


@pytest.mark.parametrize("content", ["lr0: 2024-13-45", "lr0: !!int ''", "[" * 3000])
def test_a_value_that_yaml_cannot_make_is_one_line(
    invoke: Invoke, calls: Calls, tmp_path: Path, content: str
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    result = invoke("train", "-d", "d.yaml", "--config", tmp_path / "mine.yaml")
    assert result.exit_code == 2 and "is not valid YAML" in result.stderr


def test_what_the_system_refuses_is_one_line(
    invoke: Invoke, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/data.yaml")

    monkeypatch.setattr(train_run, "train", refuse)
    result = invoke("train", "-d", "d.yaml")
    assert result.exit_code == 2
    assert result.stderr == "Error: /srv/data.yaml: Permission denied.\n"


def test_ctrl_c_while_fetching_is_130(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "fetch", fetch)
    assert invoke("weights", "fetch").exit_code == 130


def test_nobody_reading_does_not_end_the_training(tiny_dataset: Path, tmp_path: Path) -> None:
    options = "-m yolov8n.yaml --imgsz 64 --epochs 2 --device cpu --no-tensorboard --no-auto-scale"
    command = [sys.executable, "-m", "hsrloop", "train", "-d", str(tiny_dataset), *options.split()]
    ours, theirs = os.pipe()
    os.close(ours)
    ended = subprocess.run(
        [*command, "-o", str(tmp_path)], stdout=theirs, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("Nobody reads the output any more") == 1
    assert list(tmp_path.glob("*/training_result.json"))


def test_a_demo_leaves_nothing_in_the_temporary_folder(
    invoke: Invoke, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(weights, "_open_within", no_network)
    monkeypatch.setattr(demo, "write_data_set", lambda folder, **_: folder / "data.yaml")
    monkeypatch.setattr(demo, "prepare", lambda device: None)
    seen: list[str] = []

    def train(resolved: Resolved, **_: object) -> train_run.Outcome:
        seen.append(resolved.config.model)
        return train_run.Outcome(
            run_dir=tmp_path, reason="interrupted", rung=RUNG, peak_memory_bytes=0, result=None
        )

    monkeypatch.setattr(train_run, "train", train)
    invoke("demo", "-o", "out")
    assert seen == ["yolov8n.yaml"] and not list((tmp_path / "temporary").iterdir())
    assert invoke("demo", "-o", LONG).exit_code == 2
