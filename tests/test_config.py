"""The configuration: defaults, ranges, layers, messages."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hsrloop import COMPETITION_CONFIG, FAST_CONFIG, TrainConfig
from hsrloop.config import parse_assignment, parse_scalar, resolve, rule_of
from hsrloop.errors import ConfigError

FIELDS = list(TrainConfig.__dataclass_fields__)


def test_defaults_are_what_the_users_were_promised() -> None:
    promised = {
        "model": "yolov8m.pt", "epochs": 50, "batch": 16, "imgsz": 640, "patience": 10,
        "optimizer": "AdamW", "lr0": 0.001, "lrf": 0.01, "momentum": 0.937,
        "weight_decay": 0.0005, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "degrees": 10.0,
        "translate": 0.1, "scale": 0.5, "shear": 0.0, "flipud": 0.0, "fliplr": 0.5,
        "mosaic": 1.0, "mixup": 0.1, "workers": 8, "cache": "ram", "amp": True,
        "close_mosaic": 10, "output": "models/finetuned", "auto_scale": True, "gpu_tier": None,
        "llrd": False, "llrd_decay_rate": 0.9, "tensorboard": True, "tensorboard_port": 6006,
        "oom_recovery": True, "dynamic_synthetic": True, "backgrounds_dir": None,
        "annotated_dir": None, "synthetic_ratio": 2.0, "export": None,
    }  # fmt: skip
    config = TrainConfig().to_json()
    assert {key: config[key] for key in promised} == promised


def test_the_competition_preset_is_the_defaults() -> None:
    assert TrainConfig(**COMPETITION_CONFIG) == TrainConfig()


def test_the_fast_preset() -> None:
    assert dict(FAST_CONFIG) == {
        "model": "yolov8s.pt",
        "imgsz": 480,
        "epochs": 30,
        "patience": 5,
    }


def test_the_smallest_object_is_no_larger_than_the_largest() -> None:
    with pytest.raises(ConfigError, match=r"object_scale_min is 0.6; .* object_scale_max \(0.5\)"):
        resolve([("command line", {"object_scale_min": 0.6})])


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_json_round_trip() -> None:
    config = TrainConfig(dataset="d.yaml", micro_batch=2, cache=False, llrd=True, lr0=3e-4)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_help_line(name: str) -> None:
    assert rule_of(name).help


BOUNDED = [(n, rule_of(n)) for n in FIELDS if rule_of(n).low != float("-inf")]


@pytest.mark.parametrize("name", [name for name, _ in BOUNDED])
def test_bounds_hold_at_and_beyond_the_edge(name: str) -> None:
    rule = rule_of(name)
    with pytest.raises(ConfigError, match=f"^{name} is .* it must be "):
        TrainConfig(**{name: rule.low - 1})
    if not rule.above:
        assert getattr(TrainConfig(**{name: rule.low}), name) == rule.low
    if rule.high != float("inf"):
        with pytest.raises(ConfigError, match=rf"^{name} is "):
            TrainConfig(**{name: rule.high + 1})


@pytest.mark.parametrize(
    "name", [n for n in FIELDS if TrainConfig.__dataclass_fields__[n].type == "float"]
)
def test_not_a_number_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        TrainConfig(**{name: float("nan")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imgsz": 650}, "imgsz is 650; it must be a positive multiple of 32. Use --imgsz 640."),
        ({"imgsz": 0}, "imgsz is 0; it must be a positive multiple of 32. Use --imgsz 32."),
        ({"batch": 0}, "batch is 0; it must be at least 1."),
        ({"lr0": 0}, "lr0 is 0.0; it must be more than 0."),
        ({"epochs": "many"}, "epochs is 'many'; it must be a whole number."),
        ({"epochs": True}, "epochs is True; it must be a whole number."),
        ({"lr0": "0,001"}, "lr0 is '0,001'; it must be a number, such as 0.001."),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number."),
        ({"optimizer": "Lion"}, "optimizer is Lion; it must be one of AdamW, Adam, SGD."),
        ({"cache": "yes"}, "cache is yes; it must be one of false, ram, disk."),
        ({"micro_batch": "many"}, "micro_batch is many; it must be at least 1, or auto."),
        ({"micro_batch": 32}, "micro_batch is 32; it must be at most batch (16)."),
    ],
)
def test_messages_state_value_and_rule(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("yaml_says", "word"), [(False, "off"), (True, "on"), ("auto", "auto")])
def test_yamls_truth_values_are_words_where_words_are_choices(yaml_says: object, word: str) -> None:
    assert TrainConfig(compile=yaml_says).compile == word  # type: ignore[arg-type]
    assert TrainConfig(cache=yaml_says is True).cache == ("ram" if yaml_says is True else False)


def test_what_a_user_means() -> None:
    layers = [
        ("tier cpu", {"model": "yolov8n.pt", "batch": 4}),
        ("file tier_of_mine.yaml", {"workers": 8, "epochs": 7}),
        ("command line", {"patience": 10, "imgsz": 64}),
    ]
    resolved = resolve(layers)
    meant = {name for name in resolved.sources if resolved.meant(name)}
    assert meant == {"epochs", "patience", "imgsz"}, "8 workers are the default"
    assert resolved.chosen_here("model") and not resolved.chosen_here("workers")


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="epoch is not a setting. Did you mean epochs?"):
        TrainConfig.from_json({"epoch": 3})


def test_layers_the_later_wins_and_is_named() -> None:
    resolved = resolve(
        [
            ("tier high", {"batch": 32, "imgsz": 640}),
            ("preset fast", {"imgsz": 480}),
            ("my.yaml", {"epochs": 7}),
            ("command line", {"epochs": 9}),
        ]
    )
    assert (resolved.config.batch, resolved.config.imgsz, resolved.config.epochs) == (32, 480, 9)
    assert resolved.sources["batch"] == "tier high"
    assert resolved.sources["imgsz"] == "preset fast"
    assert resolved.sources["epochs"] == "command line"
    assert resolved.sources["lr0"] == "default"
    assert set(resolved.sources) == set(FIELDS)


def test_an_unknown_key_in_a_layer_names_the_layer() -> None:
    with pytest.raises(ConfigError, match="^my.yaml: patiance is .* Did you mean patience"):
        resolve([("my.yaml", {"patiance": 1})])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr0=1e-3", ("lr0", 0.001)),
        ("cos-lr=true", ("cos_lr", True)),
        ("cache=false", ("cache", False)),
        ("cache=disk", ("cache", "disk")),
        ("gpu_tier=null", ("gpu_tier", None)),
        ("dataset=a=b.yaml", ("dataset", "a=b.yaml")),
        ("epochs=3", ("epochs", 3)),
    ],
)
def test_assignments(text: str, expected: tuple[str, object]) -> None:
    assert parse_assignment(text) == expected


def test_an_assignment_needs_an_equals_sign() -> None:
    with pytest.raises(ConfigError, match="has no '='"):
        parse_assignment("epochs")


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_spelled_out_reads_back(name: str) -> None:
    default = getattr(TrainConfig(), name)
    spelled = "null" if default is None else str(default)
    assert parse_scalar(name, spelled) == default
