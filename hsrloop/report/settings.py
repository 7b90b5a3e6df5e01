"""Tables shown before training: each setting with its origin, and the parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def settings_table(config: Mapping[str, Any], sources: Mapping[str, str]) -> RenderableType:
    """Return what was chosen, with where it came from, above what was left at its default."""
    chosen = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for title in ("setting", "value", "from"):
        chosen.add_column(title, overflow="fold")
    defaults: list[Text] = []
    for name, value in config.items():
        shown = spell(value)
        if sources.get(name, "default") == "default":
            defaults.append(Text.assemble((name, "dim"), " ", shown))
        else:
            chosen.add_row(name, shown, sources[name])
    parts: list[RenderableType] = []
    if chosen.row_count:
        parts += [chosen, ""]
    if defaults:
        parts += [Text("defaults", style="bold"), Columns(defaults, padding=(0, 3), equal=True)]
    return Group(*parts)


def groups_table(groups: Iterable[Mapping[str, Any]], *, lr0: float) -> RenderableType:
    """Return the parameter groups: names, learning rates, weight decay, parameter counts."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("parameter group")
    for title in ("lr scale", "highest lr", "weight decay", "parameters"):
        table.add_column(title, justify="right")
    for group in groups:
        scale = float(group["lr_scale"])
        table.add_row(
            str(group["name"]),
            f"{scale:.4g}",
            f"{scale * lr0:.3g}",
            f"{float(group['weight_decay']):g}",
            f"{int(group['parameters']):,}",
        )
    return table


def spell(value: Any) -> str:
    """Return a value as a user would type it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
