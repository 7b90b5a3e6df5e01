"""Hardware tiers: which model, batch and image size a card of a given size trains."""

from __future__ import annotations

import math
from typing import Any

from hsrloop.config import FAST_CONFIG
from hsrloop.errors import ConfigError
from hsrloop.hardware.memory import GIB
from hsrloop.records import DeviceInfo, Tier

CPU = Tier(name="cpu", from_gib=0, below_gib=0, model="yolov8n.pt", batch=4, imgsz=320)
# 24 GiB cards still belong to "high"; nominal sizes are whole, so 25 is the next one.
TIERS = (
    Tier(name="low", from_gib=0, below_gib=6, model="yolov8s.pt", batch=8, imgsz=480),
    Tier(name="medium", from_gib=6, below_gib=12, model="yolov8m.pt", batch=16, imgsz=640),
    Tier(name="high", from_gib=12, below_gib=25, model="yolov8l.pt", batch=32, imgsz=640),
    Tier(
        name="workstation", from_gib=25, below_gib=math.inf, model="yolov8x.pt", batch=64, imgsz=800
    ),
    CPU,
)
_MODELS = ("yolov8n.pt", "yolov8s.pt", "yolov8m.pt", "yolov8l.pt", "yolov8x.pt")


def nominal_gib(total_bytes: int) -> int:
    """Return the size on the card's box: its total bytes, which are a little less, rounded."""
    return round(total_bytes / GIB)


def tier_for(info: DeviceInfo) -> Tier:
    """Return the tier of a device."""
    if info.kind == "cpu":
        return CPU
    size = nominal_gib(info.total_bytes)
    return next(t for t in TIERS if t is not CPU and t.from_gib <= size < t.below_gib)


def tier_named(name: str) -> Tier:
    """Return the tier called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    for tier in TIERS:
        if tier.name == name:
            return tier
    names = ", ".join(tier.name for tier in TIERS)
    raise ConfigError(f"tier is {name}; it must be one of {names}.")


def settings_of(tier: Tier) -> dict[str, Any]:
    """Return what a tier changes, as a config layer."""
    return {"model": tier.model, "batch": tier.batch, "imgsz": tier.imgsz}


def fast_settings(tier: Tier | None) -> dict[str, Any]:
    """Return the fast preset as a config layer over `tier`; None: without auto-scaling.

    It never picks a larger model or imgsz than the tier, and leaves the tier's batch alone.
    """
    fast = dict(FAST_CONFIG)
    if tier is not None:
        fast["model"] = min(fast["model"], tier.model, key=_MODELS.index)
        fast["imgsz"] = min(fast["imgsz"], tier.imgsz)
    return fast
