"""What a setting accepts: its rule, its type, and how a value is brought to that type."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from hsrloop.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    """What one field accepts: shown by `--help`, enforced by `TrainConfig`."""

    help: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is excluded
    choices: tuple[Any, ...] = ()
    multiple_of: int = 0
    words: tuple[str, ...] = ()  # taken beside numbers

    def describe(self) -> str:
        """Return the allowed values in words."""
        if self.words:
            numbers = dataclasses.replace(self, words=())
            return f"{numbers.describe()}, or {' or '.join(self.words)}"
        if self.choices:
            return "one of " + ", ".join(spell(c) for c in self.choices if c is not None)
        if self.multiple_of:
            return f"a positive multiple of {self.multiple_of}"
        if self.low == -math.inf and self.high == math.inf:
            return "any number"
        if self.high == math.inf:
            return f"{'more than' if self.above else 'at least'} {self.low:g}"
        return (
            f"{'more than' if self.above else 'from'} {self.low:g} {'and' if self.above else 'to'} "
            + (f"at most {self.high:g}" if self.above else f"{self.high:g}")
        )

    def problem(self, value: Any) -> bool:
        """Return whether `value`, already of the right type, breaks the rule."""
        if self.words and isinstance(value, str):
            return value not in self.words
        if self.choices:
            return value not in self.choices
        if isinstance(value, int | float) and not isinstance(value, bool):
            if self.multiple_of and (value <= 0 or value % self.multiple_of):
                return True
            too_low = value <= self.low if self.above else value < self.low
            return too_low or value > self.high or not math.isfinite(value)
        return False


_IN_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number, such as 0.001",
    str: "text",
    type(None): "null",
}


def setting(default: Any, help: str, **rule: Any) -> Any:
    """Return a dataclass field with its default and its rule."""
    return field(default=default, metadata={"rule": Rule(help=help, **rule)})


def spell(value: Any) -> str:
    """Return a value as YAML spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def coerce(name: str, value: Any, kind: Any, *, choices: tuple[Any, ...] = ()) -> Any:
    """Return `value` as `kind`, accepting whole floats for int and any int for float.

    Args:
        name: of the setting, for the message.
        kind: a type, or a union of types.
        choices: where "on" or "off" is one of them, YAML's truth values mean these.

    Raises:
        ConfigError: a value of another type.
    """
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if name == "cache":
        value = "ram" if value is True else value
    if isinstance(value, bool) and (word := "on" if value else "off") in choices:
        return word
    if value is None and type(None) in members:
        return None
    for member in members:
        if member is bool and isinstance(value, bool):
            return value
        if member is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if member is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if member is float and isinstance(value, int | float) and not isinstance(value, bool):
            return math.inf if abs(value) > sys.float_info.max else float(value)
        if member is str and isinstance(value, str):
            return value
    words = " or ".join(_IN_WORDS[member] for member in members)
    raise ConfigError(f"{name} is {value!r}; it must be {words}.")
