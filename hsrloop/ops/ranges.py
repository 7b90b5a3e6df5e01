"""Names for stretches of work, as torch's profiler shows them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.autograd.profiler as profiler

RANGES = ("data", "render", "forward", "assign", "loss", "backward", "optimizer", "EMA")
_NOTHING = nullcontext()


def named(name: str) -> AbstractContextManager[object]:
    """Return a context that names what is done in it; nothing at all when nobody profiles."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NOTHING
