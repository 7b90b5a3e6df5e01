"""The configuration of a run: the only home of its defaults.

`TrainConfig` is frozen and checks itself. Settings come in layers, each holding only what it
changes: defaults < tier < preset < YAML file < command line (`resolve`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hsrloop.errors import ConfigError
from hsrloop.rules import Rule, coerce, setting, spell

# Measured at 5 epochs (docs/log.md): at the full rate the first steps undo what the network knows;
# class outputs start from noise and need a multiple of it; a network that knows every class
# already has little to learn and much to lose.
PRETRAINED_LR_SCALE = 0.3
KNOWN_LR_SCALE = 0.02
HEAD_LR_SCALE = 5.0
AUTO = "auto"
COMMAND_LINE = "command line"
_CHOSEN_HERE = ("default", "tier ", "preset ")  # how the names of layers begin that no user wrote


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run; each value is validated on construction.

    Raises:
        ConfigError: a value of the wrong type or outside its range.
    """

    # What and where
    dataset: str | None = setting(None, "data.yaml of the data set")
    model: str = setting("yolov8m.pt", "base weights: a name, a path, or a .yaml for scratch")
    output: str = setting("models/finetuned", "folder that receives the run folder")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    gpu_tier: str | None = setting(
        None,
        "hardware tier; detected when not given",
        choices=(None, "low", "medium", "high", "workstation", "cpu"),
    )
    auto_scale: bool = setting(True, "choose model, batch and imgsz by hardware tier")
    # Schedule
    epochs: int = setting(50, "passes over the training set", low=1)
    batch: int = setting(
        16, "optimization batch, in images; auto: the tier's, and --micro-batch auto", low=1
    )
    micro_batch: int | str | None = setting(
        None,
        "images per forward pass; the batch itself when not given; auto: the fastest that fits, "
        "measured before the run",
        low=1,
        words=(AUTO,),
    )
    imgsz: int = setting(640, "side of the square network input, px", multiple_of=32)
    patience: int = setting(
        10, "epochs without a better mAP50-95 before the last ones are trained; 0: never", low=0
    )
    optimizer: str = setting("AdamW", "optimizer", choices=("AdamW", "Adam", "SGD"))
    lr0: float = setting(
        0.001, "highest learning rate, before the layers' factors", low=0, above=True
    )
    lrf: float = setting(0.01, "last learning rate as a fraction of lr0", low=0, high=1)
    momentum: float = setting(0.937, "momentum of SGD, beta1 of Adam and AdamW", low=0, high=0.9999)
    weight_decay: float = setting(0.0005, "weight decay, as given, not rescaled by batch", low=0)
    warmup_epochs: float = setting(
        3.0, "epochs of linear warm-up, at most a tenth of the run", low=0
    )
    cos_lr: bool = setting(False, "cosine instead of linear decay of the learning rate")
    llrd: bool = setting(False, "layer-wise learning-rate decay")
    llrd_decay_rate: float = setting(0.9, "its rate per module", low=0, high=1, above=True)
    pretrained_lr_scale: float | None = setting(
        None,
        f"learning-rate factor of pretrained layers; when not given from {KNOWN_LR_SCALE} (they "
        f"know all classes) to {PRETRAINED_LR_SCALE} (they know none), 1 with --llrd",
        low=0,
        high=100,
        above=True,
    )
    head_lr_scale: float | None = setting(
        None,
        f"learning-rate factor of the class outputs when all classes are new to pretrained "
        f"weights; {HEAD_LR_SCALE:g} when not given, 1 with --llrd",
        low=0,
        high=100,
        above=True,
    )
    freeze: int = setting(0, "number of leading modules that are not trained", low=0)
    ema_decay: float = setting(
        0.9999, "highest decay of the averaged weights", low=0, high=0.999999
    )
    ema_tau: float = setting(
        2000.0, "optimizer steps over which that decay is reached", low=0, above=True
    )
    # Augmentation
    hsv_h: float = setting(0.015, "hue gain, fraction", low=0, high=0.5)
    hsv_s: float = setting(0.7, "saturation gain, fraction", low=0, high=1)
    hsv_v: float = setting(0.4, "value gain, fraction", low=0, high=1)
    degrees: float = setting(10.0, "largest rotation, degrees either way", low=0, high=180)
    translate: float = setting(0.1, "largest shift, fraction of imgsz", low=0, high=1)
    scale: float = setting(0.5, "largest zoom, fraction either way", low=0, high=0.95)
    shear: float = setting(0.0, "largest shear, degrees either way", low=0, high=60)
    flipud: float = setting(0.0, "probability of an upside-down flip", low=0, high=1)
    fliplr: float = setting(0.5, "probability of a left-right flip", low=0, high=1)
    mosaic: float = setting(1.0, "probability of a four-image mosaic", low=0, high=1)
    mixup: float = setting(0.1, "probability of blending two images", low=0, high=1)
    close_mosaic: int = setting(
        10, "last epochs without mosaic and mixup, at most a third; 0: never close", low=0
    )
    # Copy-paste synthesis
    dynamic_synthetic: bool = setting(True, "copy-paste synthesis while training")
    annotated_dir: str | None = setting(
        None, "cut-out objects, a folder for each class; annotated/ beside data.yaml if not given"
    )
    backgrounds_dir: str | None = setting(
        None, "background photographs; backgrounds/ beside data.yaml if not given"
    )
    distractors_dir: str | None = setting(
        None, "cut-outs of other objects, pasted without labels; distractors/ if not given"
    )
    synthetic_ratio: float = setting(2.0, "synthetic images per real image", low=0, high=1000)
    synthetic_images: int = setting(
        200, "images in an epoch when there are no real ones to train on", low=1, high=1_000_000
    )
    max_objects: int = setting(8, "most objects pasted into an image", low=1, high=100)
    object_scale_min: float = setting(
        0.08, "smallest long side of an object, fraction of imgsz", low=0, high=1, above=True
    )
    object_scale_max: float = setting(
        0.5, "largest long side of an object, fraction of imgsz", low=0, high=1, above=True
    )
    object_degrees: float = setting(
        30.0, "largest rotation of an object, degrees either way", low=0, high=180
    )
    max_occlusion: float = setting(
        0.5, "largest share of an object that others or the frame hide", low=0, high=0.9
    )
    negative_share: float = setting(
        0.05, "share of synthetic images that are a background alone", low=0, high=1
    )
    # Machine
    workers: int = setting(8, "loader processes at most; fewer on few cores, 0 on the CPU", low=0)
    cache: bool | str = setting(
        "ram", "decoded images: false, ram (or true) or disk", choices=(False, "ram", "disk")
    )
    augment_device: str = setting(
        "auto",
        "who renders training images; auto: the GPU when training runs on one",
        choices=("auto", "cpu", "gpu"),
    )
    amp: bool = setting(True, "mixed precision; CUDA only, the CPU computes in float32")
    amp_dtype: str = setting(
        "fp16",
        "type of mixed precision; bf16 (RTX 30 and newer) keeps fewer digits and never overflows",
        choices=("fp16", "bf16"),
    )
    compile: str = setting(
        "off",
        "torch.compile for network and loss; auto: on a GPU, when it saves more time than it takes",
        choices=("off", "auto", "on"),
    )
    cuda_graphs: bool = setting(
        True, "record a step's kernels on a GPU with memory to spare, and start them together"
    )
    oom_recovery: bool = setting(True, "go on at smaller settings when memory runs out")
    rehearsal: str = setting(
        "auto",
        "one step at its worst before the first, so that memory runs out then; auto: on a GPU",
        choices=("auto", "always", "never"),
    )
    seed: int = setting(0, "seed of every random choice", low=0, high=2**32 - 1)
    deterministic: bool = setting(False, "deterministic kernels on CUDA")
    trust_checkpoint: bool = setting(
        False, "open weights of unknown origin; they can run any code on this machine"
    )
    # Reports
    save_period: int = setting(0, "keep weights/epochN.pt every N epochs; 0: never", low=0)
    checkpoint_minutes: float = setting(
        5.0, "minutes between saves of last.pt within an epoch; 0: at its end only", low=0
    )
    tensorboard: bool = setting(True, "TensorBoard event files and server")
    tensorboard_port: int = setting(
        6006, "port of the server; the next free one if taken", low=0, high=65535
    )
    profile: bool = setting(
        False, "profile a few early steps: TensorBoard's profiler tab, and profile.txt"
    )
    export: str | None = setting(None, "export best.pt after training", choices=(None, "onnx"))

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            rule = rule_of(name)
            value = coerce(name, getattr(self, name), kind, choices=rule.choices)
            object.__setattr__(self, name, value)
            if value is not None and rule.problem(value):
                allowed, remedy = rule.describe(), _remedy(name, value)
                raise ConfigError(f"{name} is {spell(value)}; it must be {allowed}.{remedy}")

    def check_together(self) -> TrainConfig:
        """Return this config if its fields agree: a matter of the whole, not of one layer.

        Raises:
            ConfigError: two fields contradict each other.
        """
        if isinstance(self.micro_batch, int) and self.micro_batch > self.batch:
            raise ConfigError(
                f"micro_batch is {self.micro_batch}; it must be at most batch ({self.batch}). "
                f"Raise batch or drop micro_batch."
            )
        if self.object_scale_min > self.object_scale_max:
            raise ConfigError(
                f"object_scale_min is {self.object_scale_min:g}; it must be at most "
                f"object_scale_max ({self.object_scale_max:g}). Lower it, or raise the other."
            )
        return self

    @property
    def largest_micro_batch(self) -> int:
        """Return the images of a forward pass; at most, when they are still to be chosen."""
        return self.micro_batch if isinstance(self.micro_batch, int) else self.batch

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain values that `from_json` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Build from a mapping; missing keys take defaults.

        Raises:
            ConfigError: an unknown key, with the nearest known one, or a wrong value.
        """
        for key in data:
            check_key(key)
        return cls(**data).check_together()

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with `changes`, validated like any other."""
        return dataclasses.replace(self, **changes).check_together()


@functools.cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def type_of(name: str) -> Any:
    """Return the type annotation of a field; KeyError when there is no such field."""
    return _types()[name]


def rule_of(name: str) -> Rule:
    """Return the rule of a field; KeyError when there is no such field."""
    rule: Rule = TrainConfig.__dataclass_fields__[name].metadata["rule"]
    return rule


def check_key(key: str) -> None:
    """Raise ConfigError, with the nearest known name, when `key` is no setting."""
    known = list(TrainConfig.__dataclass_fields__)
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else f" Known settings: {', '.join(sorted(known))}."
    raise ConfigError(f"{key} is not a setting.{hint}")


def _remedy(name: str, value: Any) -> str:
    if name == "imgsz" and isinstance(value, int):
        return f" Use --imgsz {max(32, round(value / 32) * 32)}."
    return ""


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read `key=value` as `--set` takes it; the value is read as YAML would read it.

    Raises:
        ConfigError: no "=", an unknown key, or a value that is no YAML scalar.
    """
    key, equals, raw = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals:
        raise ConfigError(f"--set {text} has no '='; write --set key=value.")
    check_key(key)
    return key, parse_scalar(key, raw)


def parse_scalar(key: str, raw: str) -> Any:
    """Read one value from text for field `key`; `1e-3` is a number, unlike in YAML 1.1."""
    members = _types()[key]
    kinds = typing.get_args(members) if isinstance(members, types.UnionType) else (members,)
    text = raw.strip()
    if type(None) in kinds and text.lower() in {"", "null", "none", "~"}:
        return None
    if bool in kinds and text.lower() in {"true", "false", "yes", "no", "on", "off"}:
        return text.lower() in {"true", "yes", "on"}
    for kind in kinds:
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config with, for each field, the name of the layer its value came from."""

    config: TrainConfig
    sources: Mapping[str, str]

    def chosen_here(self, name: str) -> bool:
        """Return whether a setting is as it is by default, by the machine or by a preset."""
        return self.sources[name].startswith(_CHOSEN_HERE)

    def meant(self, name: str) -> bool:
        """Return whether a user wants a setting to be as it is.

        A run's own config.yaml names every setting; only its changes are meant.
        """
        default = TrainConfig.__dataclass_fields__[name].default
        changed = not self.chosen_here(name) and getattr(self.config, name) != default
        return changed or self.sources[name] == COMMAND_LINE


def resolve(layers: Iterable[tuple[str, Mapping[str, Any]]], *, complete: bool = True) -> Resolved:
    """Lay differences over the defaults, the later layer winning.

    Args:
        layers: (name, changes) in rising order, e.g. ("tier high", {...}), ("command line", {...}).
        complete: False when more layers will be laid under these, so that fields need not agree.

    Raises:
        ConfigError: as `TrainConfig`, prefixed with the layer's name for an unknown key.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(TrainConfig.__dataclass_fields__, "default")
    for name, changes in layers:
        for key, value in changes.items():
            try:
                check_key(key)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            values[key] = value
            sources[key] = name
    config = TrainConfig(**values)
    if complete:
        config.check_together()
    return Resolved(config, types.MappingProxyType(sources))


COMPETITION_CONFIG: Mapping[str, Any] = types.MappingProxyType(
    {
        "model": "yolov8m.pt",
        "imgsz": 640,
        "epochs": 50,
        "batch": 16,
        "patience": 10,
        "optimizer": "AdamW",
        "lr0": 0.001,
        "amp": True,
        "cache": "ram",
        "close_mosaic": 10,
    }
)

FAST_CONFIG: Mapping[str, Any] = types.MappingProxyType(
    {"model": "yolov8s.pt", "imgsz": 480, "epochs": 30, "patience": 5}
)
