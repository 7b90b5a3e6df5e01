"""Words that follow a number."""

from __future__ import annotations


def plural(number: int, thing: str) -> str:
    """Return "epoch" for 1, else "epochs"."""
    if number == 1:
        return thing
    return thing + ("es" if thing.endswith(("s", "x")) else "s")


def counted(number: int, thing: str) -> str:
    """Return "1 epoch" or "2 epochs"."""
    return f"{number} {plural(number, thing)}"
