"""Settings that a user wants and that have no effect in this run, with the reason."""

from __future__ import annotations

from collections.abc import Sequence

from hsrloop.config import Resolved
from hsrloop.data.scenes.synthesis import Synthesis
from hsrloop.data.sets.dataset import DatasetSpec

_SYNTHESIS = (
    *("synthetic_ratio", "synthetic_images", "max_objects", "object_scale_min"),
    *("object_scale_max", "object_degrees", "max_occlusion", "negative_share"),
)


def ignored_synthesis(resolved: Resolved, spec: DatasetSpec, synthesis: Synthesis) -> list[str]:
    """Return a line for each reason why settings of synthesis have no effect."""
    given = [name for name in _SYNTHESIS if resolved.meant(name)]
    if synthesis.scenes is None:
        if resolved.config.synthetic_ratio == 0:
            given = [name for name in given if name != "synthetic_ratio"]  # it says so itself
        return _ignored(given, synthesis.text)
    counts, vain = "synthetic_ratio", "synthetic_images"
    if not spec.train:
        counts, vain = vain, counts
    why = f"with {len(spec.train)} real images, {counts} counts"
    lines = _ignored([name for name in given if name == vain], why)
    if resolved.config.negative_share and not synthesis.scenes.backgrounds:
        why = "without backgrounds, every image shows an object"
        lines += _ignored([name for name in given if name == "negative_share"], why)
    return lines


def _ignored(names: Sequence[str], why: str) -> list[str]:
    """Return a line that says so; none where nothing is."""
    verb = "is" if len(names) == 1 else "are"
    return [f"{', '.join(names)} {verb} ignored: {why}"] if names else []


def ignored_elsewhere(resolved: Resolved, kind: str, *, scratch: bool) -> list[str]:
    """Return a line for each reason why settings that the user wants have no effect.

    Args:
        kind: of the training device, "cuda" or "cpu".
        scratch: the network has no weights yet.
    """
    config, lines = resolved.config, list[str]()
    for vain, names, why in (
        (kind == "cpu", ("amp", "amp_dtype", "cuda_graphs"), "training runs on the CPU"),
        (scratch, ("pretrained_lr_scale", "head_lr_scale"), "the network starts from scratch"),
    ):
        given = [name for name in names if resolved.meant(name) and getattr(config, name)]
        lines += _ignored(given if vain else [], why)
    return lines
