"""The options of a run, made from `TrainConfig`: one for each field, in its sections."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import click

from hsrloop.config import AUTO, TrainConfig, parse_scalar, rule_of, type_of

# The first field of each section of --help.
_SECTIONS = {
    "dataset": "What and where",
    "epochs": "Schedule and optimizer",
    "hsv_h": "Augmentation",
    "dynamic_synthetic": "Copy-paste synthesis",
    "workers": "Machine",
    "save_period": "Reports",
}
_SHORT = {"dataset": "-d", "model": "-m", "output": "-o"}
_CHOSEN = {
    "model": "by tier",
    "batch": "by tier",
    "imgsz": "by tier",
    "gpu_tier": "detected",
    "micro_batch": "batch",
}
_WORDS = {"batch": (AUTO,), "micro_batch": (AUTO,)}  # see `layers.auto_batch`
_REST = "This command"

# What a validation depends on; any other setting given to one is named and ignored.
VALIDATION_SETTINGS = (
    *("dataset", "model", "output", "device", "batch", "imgsz", "seed", "trust_checkpoint"),
)

# What a picture of the training images depends on.
PREVIEW_SETTINGS = (
    *("dataset", "imgsz", "seed", "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale"),
    *("shear", "flipud", "fliplr", "mosaic", "mixup", "annotated_dir", "backgrounds_dir"),
    *("distractors_dir", "max_objects", "object_scale_min", "object_scale_max"),
    *("object_degrees", "max_occlusion", "negative_share"),
)

# What the speed of a run depends on.
BENCH_SETTINGS = (
    *("dataset", "model", "device", "gpu_tier", "auto_scale", "batch", "micro_batch", "imgsz"),
    *(
        "epochs",
        "optimizer",
        "mosaic",
        "mixup",
        "workers",
        "cache",
        "augment_device",
        "amp",
        "amp_dtype",
    ),
    *("compile", "cuda_graphs", "seed"),
    *("deterministic", "trust_checkpoint"),
)


class SectionedCommand(click.Command):
    """A command whose --help lists its options in the sections of `TrainConfig`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section, those that are no setting first."""
        sections: dict[str, list[tuple[str, str]]] = {_REST: []}
        current = ""
        for name in fields():
            current = _SECTIONS.get(name, current)
            sections.setdefault(current, [])
        place = _section_of_fields()
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[place.get(parameter.name or "", _REST)].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def setting_options(
    *names: str, told: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds an option for each of the fields named, or for all.

    Args:
        told: help and default of those that mean something else to this command than to a run.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names or fields()):
            text, default = told.get(name, (rule_of(name).help, _default_text(name)))
            function = _option(name, text, default)(function)
        return function

    return decorate


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the command line gave, as values of their fields' types."""
    given: dict[str, Any] = {}
    for name in fields():
        value = options.get(name)
        if value is not None:
            given[name] = parse_scalar(name, value) if isinstance(value, str) else value
    return given


def fields() -> tuple[str, ...]:
    """Return the names of all settings, in the order of their definition."""
    return tuple(TrainConfig.__dataclass_fields__)


def flag(name: str) -> str:
    """Return how a setting is spelled as an option."""
    return "--" + name.replace("_", "-")


def _section_of_fields() -> dict[str, str]:
    place: dict[str, str] = {}
    current = _REST
    for name in fields():
        current = _SECTIONS.get(name, current)
        place[name] = current
    return place


def _option(
    name: str, text: str, default: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    spelled = flag(name)
    text += f"  [default: {default}]" if default else ""
    if _kind(name) == "flag":
        return click.option(f"{spelled}/--no-{spelled[2:]}", name, default=None, help=text)
    names = [spelled, _SHORT[name]] if name in _SHORT else [spelled]
    return click.option(*names, name, default=None, metavar=_metavar(name), help=text)


def _default_text(name: str) -> str:
    if name in _CHOSEN:
        return _CHOSEN[name]
    default = TrainConfig.__dataclass_fields__[name].default
    if _kind(name) == "flag":
        return "on" if default else "off"
    return "" if default is None else f"{default:g}" if _kind(name) == "number" else str(default)


def _metavar(name: str) -> str:
    choices = [choice for choice in rule_of(name).choices if choice is not None]
    if choices:
        return (
            "["
            + "|".join(str(choice).lower() if choice is False else choice for choice in choices)
            + "]"
        )
    words = "".join(f"|{word}" for word in _WORDS.get(name, ()))
    return {"integer": "INTEGER", "number": "NUMBER"}.get(_kind(name), "TEXT") + words


def _kind(name: str) -> str:
    hint = type_of(name)
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if hint is bool:
        return "flag"
    if int in members:
        return "integer"
    return "number" if float in members else "text"


validation_options = setting_options(
    *VALIDATION_SETTINGS,
    told={
        "model": ("weights to validate: a name or a path", "best.pt of the newest run"),
        "output": ("folder in which the newest run is looked for", _default_text("output")),
        "batch": ("images at a time", "16"),
        "imgsz": (rule_of("imgsz").help, "as trained"),
    },
)
preview_options = setting_options(*PREVIEW_SETTINGS, told={"imgsz": (rule_of("imgsz").help, "640")})
bench_options = setting_options(
    *BENCH_SETTINGS, told={"epochs": ("epochs of each training of --against", "5")}
)
