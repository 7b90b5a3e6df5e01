"""From options to a resolved config: defaults < tier < preset < YAML < command line."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsrloop.config import (
    AUTO,
    COMMAND_LINE,
    Resolved,
    check_key,
    parse_assignment,
    parse_scalar,
    resolve,
)
from hsrloop.errors import ConfigError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for, before the machine is looked at."""

    options: Mapping[str, Any] = field(default_factory=dict)  # settings given as own options
    assignments: Sequence[str] = ()  # --set key=value
    file: Path | None = None  # --config
    fast: bool = False

    def explicit(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the layers that the user wrote: the file, then the command line.

        Raises:
            ConfigError: an unknown key, a setting given twice, a file that is no mapping.
        """
        layers: list[tuple[str, dict[str, Any]]] = []
        if self.file is not None:
            layers.append((f"file {self.file}", auto_batch(read_file(self.file))))
        layers.append((COMMAND_LINE, auto_batch(_merge(self.options, self.assignments))))
        return layers


def resolve_explicit(request: Request) -> Resolved:
    """Return what the user wrote over the defaults; all that resuming and validation need.

    Raises:
        ConfigError: as `Request.explicit`, or a value out of its range. Whether settings agree is
            known only over the tier, or over the run that goes on.
    """
    return resolve(request.explicit(), complete=False)


def check_asked(asked: Resolved) -> None:
    """Refuse or warn about settings of a new run that would have no effect.

    Raises:
        ConfigError: they contradict each other.
    """
    config = asked.config
    if asked.meant("llrd_decay_rate") and not config.llrd:
        raise ConfigError(
            f"llrd_decay_rate is {config.llrd_decay_rate:g}, but layer-wise decay is off. "
            "Add --llrd, or drop --llrd-decay-rate."
        )
    if asked.meant("gpu_tier") and config.gpu_tier is not None and not config.auto_scale:
        _LOG.warning("--gpu-tier is ignored: auto-scaling is off.")


def add_machine(request: Request, asked: Resolved) -> Resolved:
    """Return the config of a new run: `asked` over the preset over the machine's tier.

    Loads torch when the tier must be detected.

    Raises:
        ConfigError: an unknown tier, or settings that contradict each other.
        DeviceError: the device asked for is absent or unusable.
    """
    return resolve([*_machine_layers(request, asked), *request.explicit()])


def read_file(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or an unknown key.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from None
    # A value that does not fit its tag raises ValueError or others, a deep nesting RecursionError.
    except (
        *(yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError),
        *(RecursionError, OverflowError),
    ) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"--config {path} is not valid YAML{line}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold 'key: value' lines, one for each setting.")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        try:
            check_key(name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        # YAML 1.1 reads 1e-3 as text.
        settings[name] = parse_scalar(name, value) if isinstance(value, str) else value
    return settings


def auto_batch(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which `batch: auto` is spelled out: the micro-batch is what is chosen.

    The batch itself, what the optimizer sees, stays that of the layers below: it decides the
    result, which must not depend on what else runs on a card.

    Raises:
        ConfigError: a size is given for the micro-batch too, or the batch is another word.
    """
    batch = settings.get("batch")
    if batch != AUTO:
        if isinstance(batch, str):
            raise ConfigError(f"batch is {batch!r}; it must be a whole number, or auto.")
        return settings
    rest = {key: value for key, value in settings.items() if key != "batch"}
    if rest.get("micro_batch", AUTO) != AUTO:
        raise ConfigError(
            f"batch is auto, which chooses micro_batch, but micro_batch is {rest['micro_batch']}. "
            "Drop one of them."
        )
    return {**rest, "micro_batch": AUTO}


def _merge(options: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    merged = dict(options)
    for text in assignments:
        key, value = parse_assignment(text)
        if key in merged:
            raise ConfigError(f"{key} is given twice. Drop --set {text} or the other one.")
        merged[key] = value
    return merged


def _machine_layers(request: Request, asked: Resolved) -> list[tuple[str, Mapping[str, Any]]]:
    config = asked.config
    from hsrloop.hardware.tiers import fast_settings, settings_of, tier_for, tier_named

    if not config.auto_scale:
        return [("preset fast", fast_settings(None))] if request.fast else []
    if config.gpu_tier is not None:
        tier = tier_named(config.gpu_tier)
    else:
        from hsrloop.hardware.probe import probe

        tier = tier_for(probe(config.device))
    layers: list[tuple[str, Mapping[str, Any]]] = [(f"tier {tier.name}", settings_of(tier))]
    if request.fast:
        layers.append(("preset fast", fast_settings(tier)))
    return layers
