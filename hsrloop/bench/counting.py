"""Count what a piece of code asks of its device, without a clock: kernels, waits, copies.

A GPU does its work while the host prepares more; each time the host reads a result, it waits until
the GPU has caught up. `DeviceWatch` counts such waits exactly as a GPU would suffer them, also on a
machine without one: there it keeps book of which memory would lie on the device. What is made with
an explicit device, what is sent with `.to(device)`, and what is computed from either is on the
device; `.cpu()`, `.tolist()`, `.numpy()` and `.item()` bring it back. A copy home that need not
block is taken for one into page-locked memory. What has a way of its own for the CPU takes the
GPU's meanwhile.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hsrloop.ops.nvrtc import counted_launches
from hsrloop.ops.paths import as_on_a_gpu

_WAITS = frozenset(
    (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
        *("nonzero_numpy", "_unique2", "unique_dim", "unique_consecutive", "bincount", "nms"),
    )
)
"""Operators that cannot return before the device has answered, by their name without overload."""

_HOST_INDICES = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))

_NO_KERNEL = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("lift_fresh", "_unsafe_view", "is_same_size", "is_pinned", "resize_"),
    )
)
_TO_HOST = frozenset(("cpu", "tolist", "numpy"))


class DeviceWatch:
    """Counts within its `with` block; forward and backward, of this thread.

    Args:
        device: where the work is done; the CPU stands for a GPU.
        resident: tensors that lie there already, such as a network's; on the CPU only they tell.
    """

    def __init__(self, device: torch.device, resident: Iterable[Tensor] = ()) -> None:
        self.kernels: Counter[str] = Counter()  # operators that launch work, and kernels of our own
        self.waits: Counter[str] = Counter()  # what made the host wait, by operator or method
        self.sent = 0  # copies from the host to the device
        self.mixed: Counter[str] = Counter()  # operators that a GPU would refuse: one tensor there,
        # another, of more than one number, on the host
        self._emulated = device.type == "cpu"
        self._device = device
        self._known: dict[int, StorageWeakRef] = {}
        self._paused = False
        self._modes = contextlib.ExitStack()
        for tensor in resident:
            self._mark(tensor)

    def __enter__(self) -> DeviceWatch:
        if self._emulated:
            self._modes.enter_context(as_on_a_gpu())
        self._launches = self._modes.enter_context(counted_launches())
        self._modes.enter_context(_Calls(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()
        self.kernels.update(self._launches)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies on the device, or would."""
        if not self._emulated:
            return tensor.device.type == self._device.type
        reference = self._known.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()  # type: ignore[no-untyped-call]

    def _mark(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a call of torch's Python interface, and look at those that cross the border."""
        name = getattr(func, "__name__", "")
        if not self._emulated or self._paused:
            return func(*args, **kwargs)
        if name in _TO_HOST and self.holds(args[0]):
            self.waits[name] += 1
            with self._pause():
                result = func(*args, **kwargs)
                return result.clone() if isinstance(result, Tensor) else result
        if name == "to" and _names_device(args[1:], kwargs) and not self.holds(args[0]):
            self.sent += 1
            with self._pause():
                result = func(*args, **kwargs)
                result = result.clone() if _same_memory(result, args[0]) else result
            self._mark(result)
            return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and kwargs.get("device") is not None:
            self._mark(result)
        return result

    def _operator(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Count one operator, and remember whether its results lie on the device."""
        if self._paused:
            return
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        there = [self.holds(tensor) for tensor in given]
        if name in ("copy_", "_to_copy"):
            self._copy(name, given, made, non_blocking=_is_non_blocking(name, args, kwargs))
        if not any(there):
            if not self._emulated and any(self.holds(tensor) for tensor in made):
                self._count_kernel(func, name)
            return
        if name in _WAITS or _waits_for_size(name, args):
            self.waits[name] += 1
        if name in _HOST_INDICES and there[0]:
            indices = [i for i in args[1] if isinstance(i, Tensor)]
            self.sent += not all(map(self.holds, indices))
            given = [t for t in given if not any(t is i for i in indices)]
        if name != "copy_" and any(t.dim() and not self.holds(t) for t in given):
            self.mixed[name] += 1
        self._count_kernel(func, name)
        if self._emulated and not (name == "copy_" and not there[0]):
            for tensor in made:
                self._mark(tensor)

    def _copy(
        self, name: str, given: Sequence[Tensor], made: Sequence[Tensor], *, non_blocking: bool
    ) -> None:
        source, target = (given[1], given[0]) if name == "copy_" else (given[0], made[0])
        if self._emulated and name == "_to_copy":
            return  # a change of type
        # Into other than page-locked memory CUDA waits all the same.
        free = non_blocking and (self._emulated or target.is_pinned())
        if self.holds(target) and not self.holds(source):
            self.sent += 1
        elif self.holds(source) and not self.holds(target) and not free:
            self.waits[name] += 1

    def _count_kernel(self, func: Any, name: str) -> None:
        if not func.is_view and name not in _NO_KERNEL:
            self.kernels[name] += 1


class _Calls(TorchFunctionMode):
    """Sees `.to`, `.cpu` and the like, also where they do nothing on the CPU."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._watch._call(func, args, kwargs or {})


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that reaches a device, of the backward pass too."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._watch._operator(func, args, kwargs or {}, result)
        return result


@contextlib.contextmanager
def synchronisations(device: torch.device) -> Iterator[list[str]]:
    """Collect what CUDA itself calls synchronising while the block runs; nothing on the CPU.

    It sees what `DeviceWatch` cannot, such as a wait inside an operator, and misses others, such as
    an event that is waited for. The list is complete after the block.
    """
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    said = (str(warning.message) for warning in caught)
    # Not its notice of the mode itself, which it gives once a process.
    found += [text for text in said if "called a synchronizing" in text]


def _names_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return "device" in kwargs or any(isinstance(a, torch.device | str) for a in args)


def _is_non_blocking(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2]))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _waits_for_size(name: str, args: Sequence[Any]) -> bool:
    """Return whether the result's size is known to the device only, as where an index is a mask."""
    if name == "repeat_interleave":
        return True
    if name == "where":
        return len(args) == 1  # nonzero by another name
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    indices = [i for i in args[1] if isinstance(i, Tensor)]
    return any(i.dtype in (torch.bool, torch.uint8) for i in indices)
