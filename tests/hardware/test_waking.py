"""CUDA is started in a thread; by a driver that only writes down what it is asked."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hsrloop.errors import ConfigError
from hsrloop.hardware.waking import wake

_DRIVER = """
static int told[4], devices = %(devices)d;
int asked(int which) { return told[which]; }  // times, and the device last asked for
int cuInit(unsigned flags) { told[0]++; return %(fails)d + (int)flags; }
int cuDeviceGetCount(int *count) { told[1]++; *count = devices; return 0; }
int cuDeviceGet(int *device, int index) {
    told[2]++;
    *device = 40 + index;
    return index < devices ? 0 : 101;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = 0;
    told[3] = device;
    return 0;
}
"""
Driver = Callable[..., Path]


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """Return what compiles a driver."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (apt install gcc)")

    def compiled(*, devices: int = 1, fails: int = 0) -> Path:
        source, library = tmp_path / "driver.c", tmp_path / f"driver{devices}{fails}.so"
        source.write_text(_DRIVER % {"devices": devices, "fails": fails})
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
        return library

    return compiled


def told(device: str, library: Path) -> list[int]:
    """Wake, and return what the driver heard."""
    thread = wake(device, drivers=(str(library.with_name("none.so")), str(library)))
    assert thread is not None
    thread.join()
    heard = ctypes.CDLL(str(library)).asked
    return [heard(i) for i in range(4)]


@pytest.mark.parametrize("device", ["auto", "cuda", "0", "cuda:0"])
def test_one_card_is_given_a_context(device: str, driver: Driver) -> None:
    assert told(device, driver())[2:] == [1, 40]


def test_of_several_only_the_one_that_was_asked_for_is(driver: Driver) -> None:
    library = driver(devices=3)
    assert told("auto", library) == [1, 1, 0, 0]
    assert told("cuda:2", library)[2:] == [1, 42]


@pytest.mark.parametrize("device", ["auto", "7"])
def test_a_driver_that_cannot_start_is_left_alone(device: str, driver: Driver) -> None:
    assert told(device, driver(fails=999)) == [1, 0, 0, 0]


def test_without_the_card_or_the_driver_nothing_happens(driver: Driver, tmp_path: Path) -> None:
    for number in (1, 2**32):
        assert told(f"cuda:{number}", driver())[3] == 0
    thread = wake("auto", drivers=(str(tmp_path / "none.so"),))
    assert thread is not None
    thread.join()


def test_for_the_cpu_there_is_no_thread() -> None:
    before = threading.active_count()
    assert wake("cpu") is None
    assert threading.active_count() == before


def test_another_word_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="device is gpu"):
        wake("gpu")
