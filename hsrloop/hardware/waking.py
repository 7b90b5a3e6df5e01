"""Starting CUDA while Python is still loading what will use it; this file never loads torch.

A driver takes tenths of a second to start, or seconds where nothing else uses the card.
"""

from __future__ import annotations

import ctypes
import threading

from hsrloop.hardware.probe import wanted_device

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def wake(device: str, *, drivers: tuple[str, ...] = _DRIVERS) -> threading.Thread | None:
    """Let CUDA start in a thread; returns at once. None: the CPU is wanted.

    Where it does not start nothing happens here: whoever uses it then finds out why.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "N".
        drivers: files of the driver's library, of which the first that is there is taken.

    Raises:
        ConfigError: another word for `device`.

    Source: CUDA driver API 13.0, reference manual: initialization, primary context management.
    """
    wanted = wanted_device(device)
    if wanted == "cpu":
        return None
    index = wanted if isinstance(wanted, int) else None
    # No daemon: a process must not end while a thread of its is in the driver.
    thread = threading.Thread(target=_start, args=(drivers, index), name="hsrloop-waking")
    thread.start()
    return thread


def _start(drivers: tuple[str, ...], index: int | None) -> None:
    """Start CUDA, and on a card the context that torch will find there.

    A context takes some hundred MB, so there is none where it is open which card will be used.
    """
    driver = _loaded(drivers)
    if driver is None or driver.cuInit(0):
        return
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)):
        return
    if index is None and count.value == 1:
        index = 0
    if index is None or index >= count.value:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not driver.cuDeviceGet(ctypes.byref(device), index):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _loaded(files: tuple[str, ...]) -> ctypes.CDLL | None:
    for file in files:
        try:
            return ctypes.CDLL(file)
        except OSError:
            continue
    return None
