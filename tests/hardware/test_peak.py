"""The most memory in use, from a moment on."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from hsrloop.hardware.peak import peak_bytes, reset_peak

CPU = torch.device("cpu")
MIB = 1 << 20


def use(mib: int) -> None:
    """Touch so much memory, and give it back to the system."""
    with mmap.mmap(-1, mib * MIB) as memory:
        for start in range(0, mib * MIB, mmap.PAGESIZE):
            memory[start] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it cannot be reset")
def test_what_was_used_before_is_forgotten() -> None:
    use(200)
    before = peak_bytes(CPU)
    reset_peak(CPU)
    after = peak_bytes(CPU)
    assert after <= before - 150 * MIB
    use(50)
    assert after + 40 * MIB <= peak_bytes(CPU) < before
