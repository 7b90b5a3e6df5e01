"""Words that follow a number, and names in a row."""

from __future__ import annotations

from collections.abc import Sequence


def plural(number: int, thing: str) -> str:
    """Return "epoch" for 1, else "epochs"."""
    if number == 1:
        return thing
    return thing + ("es" if thing.endswith(("s", "x")) else "s")


def counted(number: int, thing: str) -> str:
    """Return "1 epoch" or "2 epochs"."""
    return f"{number} {plural(number, thing)}"


def few(names: Sequence[str], shown: int = 8) -> str:
    """Return "a, b, c", and of many the first and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
