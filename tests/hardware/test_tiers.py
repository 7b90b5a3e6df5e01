"""The tier table, at its edges."""

from __future__ import annotations

import pytest

from hsrloop.config import TrainConfig
from hsrloop.errors import ConfigError
from hsrloop.hardware import tiers
from hsrloop.records import DeviceInfo

MIB = 2**20


@pytest.mark.parametrize(
    ("mib", "name"),
    [
        (4096, "low"),
        (5100, "low"),  # a "5 GB" card
        (5936, "medium"),  # RTX 2060, "6 GB"
        (8188, "medium"),
        (11264, "medium"),  # GTX 1080 Ti
        (12282, "high"),  # RTX 4070
        (16376, "high"),
        (24564, "high"),  # RTX 4090, "24 GB"
        (24576, "high"),
        (32607, "workstation"),  # RTX 5090
        (143771, "workstation"),
    ],
)
def test_cards_land_where_their_box_says(mib: int, name: str) -> None:
    info = DeviceInfo(kind="cuda", total_bytes=mib * MIB)
    assert tiers.tier_for(info).name == name


def test_the_table() -> None:
    rows = {t.name: tuple(tiers.settings_of(t).values()) for t in tiers.TIERS}
    assert rows == {
        "low": ("yolov8s.pt", 8, 480),
        "medium": ("yolov8m.pt", 16, 640),
        "high": ("yolov8l.pt", 32, 640),
        "workstation": ("yolov8x.pt", 64, 800),
        "cpu": ("yolov8n.pt", 4, 320),
    }
    assert tiers.tier_for(DeviceInfo(kind="cpu")).name == "cpu"


def test_every_size_has_one_tier() -> None:
    for gib in range(1, 200):
        assert sum(t.from_gib <= gib < t.below_gib for t in tiers.TIERS) == 1


def test_tiers_by_name() -> None:
    assert [tiers.tier_named(t.name) for t in tiers.TIERS] == list(tiers.TIERS)
    with pytest.raises(ConfigError, match="tier is huge; it must be one of low, medium, high"):
        tiers.tier_named("huge")


@pytest.mark.parametrize("tier", tiers.TIERS, ids=lambda t: t.name)
def test_fast_never_exceeds_the_tier(tier) -> None:
    fast = tiers.fast_settings(tier)
    config = TrainConfig(**{**tiers.settings_of(tier), **fast})
    assert tiers._MODELS.index(config.model) <= tiers._MODELS.index(tier.model)
    assert config.imgsz <= tier.imgsz and config.batch <= tier.batch
    assert (config.epochs, config.patience) == (30, 5)
    expected = ("yolov8n.pt", 320) if tier.name == "cpu" else ("yolov8s.pt", 480)
    assert (config.model, config.imgsz) == expected


def test_fast_without_a_tier() -> None:
    fast = tiers.fast_settings(None)
    assert (fast["model"], fast["imgsz"]) == ("yolov8s.pt", 480)
