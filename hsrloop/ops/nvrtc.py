"""Kernels in CUDA C++, compiled when they are needed by the compiler that comes with torch.

No CUDA toolkit is needed, and no compiler for the host: NVRTC, a library, makes machine code for
one kind of card in a fraction of a second.

Source: NVRTC 13.0 and CUDA driver API 13.0, reference manuals.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsrloop.ops.kept_code import kept

_BEFORE = [Path(__file__).with_name(name) for name in ("device.cuh", "numbers.cuh")]  # each source
_OPTIONS = ("--fmad=false",)  # numbers are rounded as on the CPU
_EMBEDDED = (53, 62, 72, 87, 101)  # Jetson and Thor: their code runs on nothing else
_OUT_OF_MEMORY = 2  # of the driver's errors
Argument = Tensor | int | float | ctypes.Structure | None
_LOG = logging.getLogger(__name__)
_COUNTERS: list[Counter[str]] = []  # of `counted_launches`
_CODE: dict[tuple[str, tuple[int, int]], bytes] = {}  # of `compile_source`, by source
_COMPILING = threading.Lock()


class KernelError(RuntimeError):
    """A kernel cannot be compiled or started; says why."""


class Kernel:
    """One kernel on one device; made by `kernels_in`."""

    def __init__(self, name: str, function: ctypes.c_void_p, check: Callable[..., None]) -> None:
        self._name, self._function, self._check = name, function, check

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], device: torch.device, *args: Argument
    ) -> None:
        """Start it on the current stream; nothing is checked that CUDA does not check.

        Args:
            grid, block: three numbers each.
            device: of the tensors; a thread must have used it before.
            args: contiguous tensors and None as addresses, numbers as int and float, structures as
                they are.

        Raises:
            KernelError: it could not be started.
            torch.OutOfMemoryError: the GPU has no room for what it needs.
        """
        values = [_as_c(arg) for arg in args]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        self._check("cuLaunchKernel", self._function, *grid, *block, 0, stream, addresses, None)
        for counter in _COUNTERS:
            counter[self._name] += 1


Kernels = Mapping[str, Kernel]


def kernels_in(source: str, device: torch.device) -> Kernels:
    """Return a device's kernels by name.

    Args:
        source: CUDA C++; kernels have C linkage.

    Raises:
        KernelError: NVRTC is not there, or refuses the source.
        torch.OutOfMemoryError: the GPU has no room for them.
    """
    code = compile_source(source, torch.cuda.get_device_capability(device))
    driver = _library(("libcuda.so.1", "nvcuda.dll"))

    def check(call: str, *args: Any) -> None:
        result = getattr(driver, call)(*args)
        if result == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {call}")
        if result:
            raise KernelError(f"{call} failed with error {result} of the CUDA driver")

    module, found = ctypes.c_void_p(), {}
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # torch's context is current from now on
        check("cuModuleLoadData", ctypes.byref(module), code)
        for name in kernel_names(source):
            function = ctypes.c_void_p()
            check("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            found[name] = Kernel(name, function, check)
    return found


def kernel_names(source: str) -> list[str]:
    """Return what the kernels in a source are called."""
    return re.findall(r'extern "C" __global__ void (?:\w+\([^)]*\) )?(\w+)\(', source)


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count the kernels that are started meanwhile, by name and in all threads."""
    counter: Counter[str] = Counter()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS[:] = [other for other in _COUNTERS if other is not counter]


@functools.cache
def proved_kernels(
    file: Path, device: torch.device, proof: Callable[[Kernels, torch.device], bool]
) -> Kernels | None:
    """Return the kernels in a file, made once a process.

    Args:
        proof: computes something with them and in another way; returns whether both agree.

    Returns:
        None where they cannot be compiled, or compute something else; a warning says so.
    """
    try:
        kernels = kernels_in(file.read_text(encoding="utf-8"), device)
        # Whoever asks first, in a pass without gradients or under autocast.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            why = "" if proof(kernels, device) else "it computes something else than torch"
    except KernelError as error:
        why = str(error)
    if why:
        _LOG.warning("%s is not used, which costs time: %s", file.name, why)
        return None
    return kernels


def compile_source(source: str, capability: tuple[int, int]) -> bytes:
    """Return machine code for cards of a compute capability, made once on a machine; needs no card.

    Raises:
        KernelError: NVRTC is not there, or refuses the source.
    """
    with _COMPILING:
        if (source, capability) not in _CODE:
            made_by = [torch.__version__, str(torch.version.cuda), *_OPTIONS]
            made_of = [str(capability), _whole(source), *made_by]
            _CODE[source, capability] = kept(made_of, lambda: _compiled(source, capability))
        return _CODE[source, capability]


def compile_ahead(files: Sequence[Path], device: torch.device) -> threading.Thread | None:
    """Compile files for a GPU in a thread, in their order, while something else is done.

    What cannot be compiled is left for those who need it. None: the device is no GPU.
    """
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)

    def work() -> None:
        with suppress(KernelError):
            for file in files:
                compile_source(file.read_text(encoding="utf-8"), capability)

    # Waited for at the process's end: NVRTC does not like to be unloaded while it works.
    thread = threading.Thread(target=work, name="hsrloop-kernels")
    thread.start()
    return thread


def _whole(source: str) -> str:
    before = [file.read_text(encoding="utf-8") for file in _BEFORE]
    return "\n#line 1\n".join([*before, source])


def _compiled(source: str, capability: tuple[int, int]) -> bytes:
    nvrtc = _library(tuple(_nvrtc_files()))
    text = _whole(source)
    arguments = [f"--gpu-architecture=sm_{_architecture(nvrtc, capability)}", *_OPTIONS]
    options = (ctypes.c_char_p * len(arguments))(*(text.encode() for text in arguments))
    program = ctypes.c_void_p()
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    )
    try:
        if nvrtc.nvrtcCompileProgram(program, len(arguments), options):
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise KernelError(log.rstrip(b"\0").decode(errors="replace").strip())
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _architecture(nvrtc: ctypes.CDLL, capability: tuple[int, int]) -> int:
    """Return the newest architecture that NVRTC knows and a card runs; the card's own, if none."""
    count = ctypes.c_int()
    _check_nvrtc(nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check_nvrtc(nvrtc.nvrtcGetSupportedArchs(known))
    major, minor = capability
    own = 10 * major + minor
    if own in known:
        return own
    alike = (one for one in known if one // 10 == major and one not in _EMBEDDED)
    return max((one for one in alike if one < own), default=own)


def _read(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check_nvrtc(get(program, text))
    return text.raw


def _check_nvrtc(result: int) -> None:
    if result:
        raise KernelError(f"NVRTC failed with error {result}")


def _as_c(arg: Argument) -> Any:
    if isinstance(arg, ctypes.Structure):
        return arg
    if isinstance(arg, int):
        return ctypes.c_int(arg)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    return ctypes.c_void_p(None if arg is None else arg.data_ptr())


def _nvrtc_files() -> Iterator[str]:
    """Yield where NVRTC may be: as the system finds it, beside torch, or in a package of NVIDIA."""
    major = (torch.version.cuda or "").split(".")[0]
    if not major:
        raise KernelError("this torch is made without CUDA")
    torch_folder = Path(torch.__file__).parent
    places = [torch_folder / "lib"]
    places += sorted(torch_folder.parent.glob("nvidia/*/lib")) + sorted(
        torch_folder.parent.glob("nvidia/*/bin")
    )
    pattern = "nvrtc64_*_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}*"
    for place in places:
        yield from (str(path) for path in sorted(place.glob(pattern)))
    if sys.platform != "win32":
        yield f"libnvrtc.so.{major}"


@functools.cache
def _library(files: tuple[str, ...]) -> ctypes.CDLL:
    """Load the first library there is."""
    for file in files:
        try:
            return ctypes.CDLL(file)
        except OSError:
            continue
    raise KernelError(f"none of {', '.join(Path(file).name for file in files)} can be loaded")
