"""Memory and cores of the host, with the limits of containers."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hsrloop.hardware import memory
from hsrloop.hardware.memory import GIB, GpuMemory, capped, gpu_memory
from tests.conftest import CardMemory


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v2(limit: str, used: int, cached: int, group: str = "") -> dict[str, str]:
    folder = f"sys/fs/cgroup{group}"
    return {
        "proc/self/cgroup": f"0::{group or '/'}",
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"anon 1\ninactive_file {cached}",
    }


MIB = 2**20


def test_no_cgroup_is_the_machine(tmp_path: Path) -> None:
    assert memory.host_memory(tmp_path).total_bytes == psutil.virtual_memory().total


@pytest.mark.parametrize("group", ["", "/user.slice/app"])
def test_version_2_limit(tmp_path: Path, group: str) -> None:
    write(tmp_path, v2(str(64 * MIB), 50 * MIB, 20 * MIB, group))
    assert memory.host_memory(tmp_path) == memory.HostMemory(64 * MIB, 34 * MIB)


def test_unlimited_version_2(tmp_path: Path) -> None:
    write(tmp_path, v2("max", 50 * MIB, 0))
    assert memory.host_memory(tmp_path).total_bytes == psutil.virtual_memory().total


def test_the_tightest_enclosing_group_counts(tmp_path: Path) -> None:
    write(tmp_path, v2(str(64 * MIB), 10 * MIB, 0, "/a/b"))
    write(tmp_path, {"sys/fs/cgroup/a/memory.max": str(32 * MIB)})
    write(tmp_path, {"sys/fs/cgroup/a/memory.current": str(31 * MIB)})
    assert memory.host_memory(tmp_path) == memory.HostMemory(32 * MIB, MIB)


def test_version_1_limit_and_a_path_of_the_host(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc",
            f"{folder}/memory.limit_in_bytes": str(64 * MIB),
            f"{folder}/memory.usage_in_bytes": str(60 * MIB),
            f"{folder}/memory.stat": f"total_inactive_file {10 * MIB}",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert memory.host_memory(tmp_path) == memory.HostMemory(64 * MIB, 14 * MIB)
    assert memory.usable_cores(tmp_path) == 1


def test_use_over_the_limit_leaves_nothing_free(tmp_path: Path) -> None:
    write(tmp_path, v2(str(64 * MIB), 70 * MIB, 0))
    assert memory.host_memory(tmp_path).free_bytes == 0


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 6), ("400000 100000", 4), ("150000 100000", 1), ("5000 100000", 1)],
)
def test_cores_by_quota(tmp_path: Path, monkeypatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    write(tmp_path, {"sys/fs/cgroup/cpu.max": quota})
    assert memory.usable_cores(tmp_path) == cores


def test_cache_budget_grows_and_leaves_room() -> None:
    sizes = [0, 1, GIB, 2 * GIB, 4 * GIB, 16 * GIB, 256 * GIB]
    budgets = [memory.cache_budget(size) for size in sizes]
    assert budgets == sorted(budgets) and budgets[0] == 0
    assert all(budget <= 0.6 * size for budget, size in zip(budgets, sizes, strict=True))
    assert memory.cache_budget(16 * GIB) == int(14 * GIB * 0.6)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize(
    ("cap", "others", "reserved", "total", "free"),
    [
        (80, 0, 0, 80, 80),
        (80, 70, 2, 80, 8),  # as the driver says
        (6, 0, 0, 6, 6),
        (6, 0, 4, 6, 2),  # what is held counts against the cap
        (6, 77, 1, 6, 2),  # the card is fuller than the cap
        (6, 0, 7, 6, 0),  # capped when more was held already
    ],
)
def test_free_gpu_memory_is_the_cards_or_the_caps(
    card_memory: CardMemory,
    device: str,
    cap: float,
    others: float,
    reserved: float,
    total: float,
    free: float,
) -> None:
    card_memory.share = cap / 80
    card_memory.others, card_memory.reserved = others, reserved
    found = gpu_memory(device)
    assert found == GpuMemory(pytest.approx(total * GIB), pytest.approx(free * GIB, abs=1))


def test_a_cap_ends_with_its_block_and_never_raises_a_smaller_one(card_memory: CardMemory) -> None:
    with pytest.raises(KeyError), capped("cuda:0", 0.5):
        assert card_memory.share == 0.5
        with capped("cuda:0", 0.25):
            assert card_memory.share == 0.25
            with capped("cuda:0", 0.75), capped("cuda:0", 1.5):
                assert card_memory.share == 0.25
        assert card_memory.share == 0.5
        raise KeyError
    assert card_memory.share == 1.0
