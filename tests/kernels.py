"""CUDA C++ compiled for the host, where a thread is a turn of a loop: tested without a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
_HOST = r"""
#include <cmath>
using namespace std;
struct Place { int x, y, z; };
static Place blockIdx, blockDim, threadIdx;
#define __global__
#define __device__
#define __shared__ static
static inline void __syncthreads() {}
#include "%(file)s"
extern "C" void launch(const int *grid, const int *block, %(parameters)s) {
    blockDim = {block[0], block[1], block[2]};
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x++)
                for (int c = 0; c < block[2]; c++)
                    for (int b = 0; b < block[1]; b++)
                        for (int a = 0; a < block[0]; a++) {
                            blockIdx = {x, y, z};
                            threadIdx = {a, b, c};
                            %(name)s(%(arguments)s);
                        }
}
"""
_FLAGS = (
    *("-O1", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unused-function"),
)


class HostKernel:
    """Called like `nvrtc.Kernel`, on the CPU.

    Args:
        source: a .cu file, named after its function.
        alone: with one thread a block, as threads that wait for each other need.
    """

    def __init__(self, source: Path, folder: Path, *, alone: bool = False) -> None:
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            pytest.skip("no C++ compiler (apt install g++)")
        name = source.stem
        found = re.search(rf'extern "C" __global__ void {name}\(([^)]*)\)', source.read_text())
        assert found is not None
        parameters = " ".join(found[1].split())
        arguments = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
        file, library = folder / f"{name}.cpp", folder / f"{name}.so"
        values = {"file": source.name, "name": name}
        file.write_text(_HOST % {**values, "parameters": parameters, "arguments": arguments})
        command = [compiler, *_FLAGS, f"-I{source.parent}", str(file), "-o", str(library)]
        subprocess.run(command, check=True)
        self._launch = ctypes.CDLL(str(library)).launch
        self._alone = alone
        self.calls = 0

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        device: torch.device,
        *args: Tensor | int | float | None,
    ) -> None:
        assert device.type == "cpu"
        self.calls += 1
        numbers = ctypes.c_int * 3
        threads = (1, 1, 1) if self._alone else tuple(block)
        self._launch(numbers(*grid), numbers(*threads), *map(_as_c, args))


def _as_c(arg: Tensor | int | float | None) -> object:
    if isinstance(arg, Tensor):
        assert arg.is_contiguous()
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    return ctypes.c_int(arg) if isinstance(arg, int) else ctypes.c_void_p(None)
