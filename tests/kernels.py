"""CUDA C++ compiled for the host: tested without a GPU.

A thread is a turn of a loop; those of a block that wait for each other have stacks of their own and
take turns. A warp is as wide as a test wants it.
"""

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

from hsrloop.ops import nvrtc
from hsrloop.ops.nvrtc import kernel_names

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
#include <algorithm>
#include <deque>
#include <math.h>
#include <memory>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <vector>
#define WARP %(warp)d
typedef unsigned long long Key;
struct Place { int x, y, z; };
static Place blockIdx, blockDim, gridDim, threadIdx;

// Threads of a block take turns, each up to where it waits for others; in every other block the
// last one is the first.
struct Turn {
    ucontext_t place;
    Place index;
    std::unique_ptr<char[]> stack;
    bool over;
};
struct Door { size_t of, waiting, opened; };
static const size_t STACK = 1 << 16;
static ucontext_t scheduler;
static std::deque<Turn> turns;  // kept from block to block
static Turn *own;
static size_t moves;  // doors opened and threads ended
static void pass(Door *door) {
    const size_t before = door->opened;
    if (++door->waiting == door->of) {
        door->waiting = 0, door->opened++, moves++;
        return;
    }
    while (door->opened == before) {
        swapcontext(&own->place, &scheduler);
        threadIdx = own->index;
    }
}
template <typename Work> struct Taken {
    static const Work *work;
    static void run() {
        threadIdx = own->index;
        (*work)();
        own->over = true, moves++;
    }
};
template <typename Work> const Work *Taken<Work>::work;

static Door *door;
static std::deque<Door> doors;  // of warps
static std::vector<Key> offered;  // by thread
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static
static inline void __syncthreads() { if (door) pass(door); }
template <typename Number> static void atomicMax(Number *at, Number value) {
    Number old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(
               at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}
template <typename Number> static Number atomicAdd(Number *at, Number more) {
    return __atomic_fetch_add(at, more, __ATOMIC_RELAXED);
}
static inline float from_half(unsigned short bits) {
    _Float16 number;
    __builtin_memcpy(&number, &bits, 2);
    return number;
}
static inline unsigned short to_half(float number) {
    const _Float16 rounded = number;
    unsigned short bits;
    __builtin_memcpy(&bits, &rounded, 2);
    return bits;
}
static Key greatest_in_warp(Key key) {
    if (WARP == 1) return key;
    const int thread = threadIdx.x, warp = thread / WARP;
    offered[thread] = key;
    pass(&doors[warp]);
    const auto first = offered.begin() + warp * WARP;
    key = *std::max_element(first, first + WARP);
    pass(&doors[warp]);
    return key;
}
template <typename Work> static void take_turns(const Work &work) {
    const size_t count = (size_t)blockDim.x * blockDim.y * blockDim.z;
    Door waiting = {count, 0, 0};
    door = &waiting;
    offered.assign(blockDim.x, 0);
    doors.assign(blockDim.x / WARP, {WARP, 0, 0});
    while (turns.size() < count) {
        turns.emplace_back();
        turns.back().stack.reset(new char[STACK]);
    }
    Taken<Work>::work = &work;
    for (size_t i = 0; i < count; i++) {
        const int row = i / blockDim.x, x = i %% blockDim.x;
        turns[i].index = {x, row %% blockDim.y, row / blockDim.y};
        turns[i].over = false;
        getcontext(&turns[i].place);
        turns[i].place.uc_stack.ss_sp = turns[i].stack.get();
        turns[i].place.uc_stack.ss_size = STACK;
        turns[i].place.uc_link = &scheduler;
        makecontext(&turns[i].place, Taken<Work>::run, 0);
    }
    const bool falling = (blockIdx.x + blockIdx.y + blockIdx.z) %% 2;
    for (size_t left = count; left;) {
        const size_t before = moves;
        left = 0;
        for (size_t i = 0; i < count; i++) {
            own = &turns[falling ? count - 1 - i : i];
            if (!own->over) {
                swapcontext(&scheduler, &own->place);
                left += !own->over;
            }
        }
        if (left && moves == before) {
            fprintf(stderr, "%%zu threads of a block wait for ever\n", left);
            abort();
        }
    }
    door = nullptr;
}
template <typename Work>
static void start(const int *grid, const int *block, bool together, Work work) {
    blockDim = {block[0], block[1], block[2]};
    gridDim = {grid[0], grid[1], grid[2]};
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                if (together)
                    take_turns(work);
                else
                    for (int c = 0; c < block[2]; c++)
                        for (int b = 0; b < block[1]; b++)
                            for (int a = 0; a < block[0]; a++) {
                                threadIdx = {a, b, c};
                                work();
                            }
            }
}
#define __expf expf
static inline float __fdividef(float a, float b) { return a / b; }
#include "%(numbers)s"
#include "%(file)s"
"""
_LAUNCH = """
extern "C" void launch_%(name)s(const int *grid, const int *block, int together, %(parameters)s) {
    start(grid, block, together, [=] { %(name)s(%(arguments)s); });
}
"""
_FLAGS = (
    *("-O1", "-std=c++20", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unknown-pragmas"),
)
_CLEAN_UP_TO = 12  # of g++: newer ones warn of more
_NUMBERS = ctypes.c_int * 3


class HostKernel:
    """Called like `nvrtc.Kernel`, on the CPU.

    Args:
        threads: of a block, that run together; 0: as the caller says, one after the other; None: as
            the caller says, together.
    """

    def __init__(self, launch: ctypes._NamedFuncPointer, threads: int | None) -> None:
        self._launch, self._threads = launch, threads
        self.calls = 0

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        device: torch.device,
        *args: Tensor | int | float | ctypes.Structure | None,
    ) -> None:
        assert device.type == "cpu"
        self.calls += 1
        size = (self._threads, 1, 1) if self._threads else tuple(block)
        together = self._threads is None or self._threads > 1
        self._launch(_NUMBERS(*grid), _NUMBERS(*size), together, *map(_as_c, args))


def host_kernels(
    source: Path, folder: Path, *, together: dict[str, int | None] | None = None, warp: int = 1
) -> dict[str, HostKernel]:
    """Compile a .cu file.

    Args:
        together: how many threads a block of a kernel has whose threads wait for each other; None:
            as many as the caller says.
        warp: threads of one; where it is more than one, kernels in which they ask each other have
            to be among those.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (apt install g++)")
    text = source.read_text()
    code = _HOST % {"file": source.name, "numbers": nvrtc._BEFORE[1], "warp": warp}
    for name in kernel_names(text):
        found = re.search(rf'extern "C" __global__ .*\b{name}\(([^)]*)\)', text)
        assert found is not None
        parameters = " ".join(found[1].split())
        arguments = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
        code += _LAUNCH % {"name": name, "parameters": parameters, "arguments": arguments}
    file, library = folder / f"{source.stem}.cpp", folder / f"{source.stem}.so"
    file.write_text(code)
    flags = [*_FLAGS, *(["-Werror"] if _version(compiler) <= _CLEAN_UP_TO else [])]
    command = [compiler, *flags, f"-I{source.parent}", str(file), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded, numbers = ctypes.CDLL(str(library)), together or {}
    return {
        name: HostKernel(loaded[f"launch_{name}"], numbers.get(name, 0))
        for name in kernel_names(text)
    }


def _version(compiler: str) -> int:
    """Its first number."""
    said = subprocess.run([compiler, "-dumpversion"], check=True, capture_output=True, text=True)
    return int(said.stdout.split(".")[0])


def _as_c(arg: Tensor | int | float | ctypes.Structure | None) -> object:
    if isinstance(arg, ctypes.Structure):
        return arg
    if isinstance(arg, Tensor):
        assert arg.is_contiguous()
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    return ctypes.c_int(arg) if isinstance(arg, int) else ctypes.c_void_p(None)
