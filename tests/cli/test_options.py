"""The command line is a promise: its options are frozen here."""

from __future__ import annotations

import resource
import subprocess
import sys

import click
import pytest

from hsrloop.cli.main import bench, check, main, preview, replay, train, validate
from hsrloop.cli.options import fields, flag, given_settings
from hsrloop.config import TrainConfig

TRAIN = {
    "--amp", "--amp-dtype", "--annotated-dir", "--augment-device", "--auto-scale",
    "--backgrounds-dir", "--batch", "--cache", "--checkpoint-minutes", "--compile",
    "--close-mosaic", "--config", "--cos-lr", "--cuda-graphs", "--no-cuda-graphs", "--dataset",
    "--degrees", "--deterministic",
    "--device", "--distractors-dir", "--dynamic-synthetic", "--ema-decay", "--ema-tau", "--epochs",
    "--export", "--fast", "--fliplr", "--flipud", "--freeze", "--gpu-tier", "--head-lr-scale",
    "--help", "--hsv-h", "--hsv-s", "--hsv-v", "--imgsz", "--llrd", "--llrd-decay-rate", "--lr0",
    "--lrf", "--max-objects", "--max-occlusion", "--micro-batch", "--mixup", "--model",
    "--momentum", "--mosaic", "--negative-share", "--no-amp", "--no-auto-scale", "--no-cos-lr",
    "--no-deterministic", "--no-dynamic-synthetic", "--no-llrd", "--no-oom-recovery",
    "--no-profile", "--profile",
    "--no-tensorboard", "--no-trust-checkpoint", "--object-degrees", "--object-scale-max",
    "--object-scale-min", "--oom-recovery", "--optimizer", "--output", "--patience",
    "--pretrained-lr-scale", "--rehearsal", "--resume", "--save-period", "--scale", "--seed",
    "--set", "--shear",
    "--synthetic-images", "--synthetic-ratio", "--tensorboard", "--tensorboard-port", "--translate",
    "--trust-checkpoint", "--validate-only", "--warmup-epochs", "--weight-decay", "--workers", "-d",
    "-h", "-m", "-o",
}  # fmt: skip
VALIDATE = {
    "--batch", "--config", "--dataset", "--device", "--help", "--imgsz", "--json", "--model",
    "--no-trust-checkpoint", "--output", "--seed", "--set", "--trust-checkpoint",
    "-d", "-h", "-m", "-o",
}  # fmt: skip
CHECK = {"--dataset", "--help", "--imgsz", "--json", "--plot", "-d", "-h"}
REPLAY = {"capsule", "--device", "--float32", "--help", "--json", "--sheet", "-h"}
PREVIEW = {
    "--annotated-dir", "--backgrounds-dir", "--config", "--dataset", "--degrees",
    "--distractors-dir", "--fliplr", "--flipud", "--help", "--hsv-h", "--hsv-s", "--hsv-v",
    "--images", "--imgsz", "--max-objects", "--max-occlusion", "--mixup", "--mosaic",
    "--negative-share", "--object-degrees", "--object-scale-max", "--object-scale-min",
    "--output", "--scale", "--seed", "--set", "--shear", "--translate", "-d", "-h", "-o",
}  # fmt: skip

BENCH = {
    "--amp", "--amp-dtype", "--augment-device", "--auto-scale", "--batch", "--cache", "--compile",
    "--against", "--config", "--cuda-graphs", "--no-cuda-graphs", "--dataset",
    "--deterministic", "--device", "--epochs", "--gpu-tier", "--help", "--imgsz", "--json",
    "--micro-batch", "--mixup", "--model", "--mosaic", "--no-amp", "--no-auto-scale",
    "--no-deterministic", "--no-trust-checkpoint", "--optimizer", "--plot", "--profile", "--rounds",
    "--seconds", "--seed", "--set",
    "--trust-checkpoint", "--workers", "-d", "-h", "-m", "parts",
}  # fmt: skip


def options_of(command: click.Command) -> set[str]:
    context = click.Context(command, parent=click.Context(main, **main.context_settings))
    return {
        name
        for parameter in command.get_params(context)
        for name in [*parameter.opts, *parameter.secondary_opts]
    }


@pytest.mark.parametrize(
    ("command", "frozen"),
    [
        (train, TRAIN),
        (validate, VALIDATE),
        (check, CHECK),
        (preview, PREVIEW),
        (bench, BENCH),
        (replay, REPLAY),
    ],
)
def test_the_options_are_frozen(command: click.Command, frozen: set[str]) -> None:
    assert options_of(command) == frozen


def test_the_commands_are_frozen() -> None:
    assert set(main.commands) == {
        "train", "validate", "check", "preview", "bench", "replay", "weights", "tensorboard",
        "demo",
    }  # fmt: skip


@pytest.mark.parametrize("name", fields())
def test_every_setting_has_its_own_option(name: str) -> None:
    assert flag(name) in TRAIN


@pytest.mark.parametrize("name", fields())
def test_help_states_the_default(name: str) -> None:
    option = next(p for p in train.params if p.name == name)
    assert isinstance(option, click.Option) and option.help
    default = TrainConfig.__dataclass_fields__[name].default
    if name in ("model", "batch", "imgsz"):
        assert "[default: by tier]" in option.help
    elif isinstance(default, bool):
        assert f"[default: {'on' if default else 'off'}]" in option.help
    elif default is not None:
        spelled = f"{default:g}" if isinstance(default, float) else str(default)
        assert f"[default: {spelled}]" in option.help


@pytest.mark.parametrize(
    ("command", "name", "default"),
    [
        (validate, "model", "best.pt of the newest run"),
        (validate, "imgsz", "as trained"),
        (validate, "batch", "16"),
        (preview, "imgsz", "640"),
        (bench, "epochs", "5"),
        (bench, "imgsz", "by tier"),
    ],
)
def test_help_states_what_a_setting_means_to_the_command(
    command: click.Command, name: str, default: str
) -> None:
    option = next(p for p in command.params if p.name == name)
    assert isinstance(option, click.Option)
    assert (option.help or "").endswith(f"[default: {default}]")
    assert {"16", "640"} <= {str(TrainConfig().batch), str(TrainConfig().imgsz)}


def test_nothing_given_is_no_setting() -> None:
    assert given_settings(dict.fromkeys(fields())) == {}


def test_given_values_have_their_fields_types() -> None:
    given = given_settings({"epochs": "3", "lr0": "1e-3", "cache": "false", "cos_lr": True})
    assert given == {"epochs": 3, "lr0": 0.001, "cache": False, "cos_lr": True}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["check", "--help"], ["--version"]]
)
def test_help_needs_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from hsrloop.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'ultralytics', 'cv2', 'rich', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "hsrloop", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # Processor seconds, not wall time: the machine that runs the tests may be busy.
    assert min(once() for _ in range(5)) < 0.3
