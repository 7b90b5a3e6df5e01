"""What device is this, and can torch use it? If it cannot, say why and what would help."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from hsrloop.errors import ConfigError, DeviceError
from hsrloop.hardware.memory import gpu_memory, usable_cores
from hsrloop.hardware.tiers import nominal_gib
from hsrloop.records import DeviceInfo

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as the driver or torch describes it."""

    name: str
    uuid: str = ""
    total_bytes: int = 0
    free_bytes: int = 0  # the driver's figure; torch has none without starting CUDA
    capability: tuple[int, int] = (0, 0)
    bf16: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverView:
    """What NVML sees; no cards and "" when there is no NVIDIA driver."""

    cards: tuple[Card, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)  # newest CUDA this driver runs


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchView:
    """What torch sees; no cards when it cannot start CUDA."""

    cards: tuple[Card, ...] = ()
    arch_list: tuple[str, ...] = ()  # such as "sm_75"; what the build has kernels for
    cuda: str = ""  # CUDA of the build, "" for a build without
    version: str = ""
    # Of the card of a number; starts CUDA on it, which takes memory there until the process ends.
    free_bytes: Callable[[int], int] = lambda index: 0
    started: Callable[[int], bool] = lambda index: False  # by this process, on that card


def probe(
    device: str = "auto",
    *,
    see_driver: Callable[[], DriverView] | None = None,
    see_torch: Callable[[], TorchView] | None = None,
) -> DeviceInfo:
    """Return the device to train on; "auto" is the largest usable GPU, else the CPU.

    Of GPUs of one size it is the one with the most memory free: another program, or the screen, may
    have the first. Once this process has begun to use one, it stays with it.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "N".
        see_driver, see_torch: for tests.

    Raises:
        ConfigError: another word for `device`.
        DeviceError: a GPU is asked for and absent; or there is a GPU that torch cannot use, or
            that others have to themselves, and the CPU was not asked for.
    """
    wanted = wanted_device(device)
    if wanted == "cpu":
        return _describe(None, 0, DriverView())
    driver = (see_driver or _see_driver)()
    torch_view = (see_torch or _see_torch)()
    if not torch_view.cards:
        if device == "auto" and (not driver.cards or _hidden()):
            return _describe(None, 0, DriverView())
        raise DeviceError(_why_no_cuda(device, driver, torch_view))
    if isinstance(wanted, int):
        if wanted >= len(torch_view.cards):
            raise DeviceError(
                f"device is {device}, but there are {len(torch_view.cards)} CUDA devices, counted "
                f"from 0. Use cuda:{len(torch_view.cards) - 1}, auto or cpu."
            )
        choice = [wanted]
    else:
        choice = _largest_first(torch_view, driver)
    usable = [i for i in choice if runs_on(torch_view.cards[i].capability, torch_view.arch_list)]
    if not usable:
        raise DeviceError(_why_no_kernels(torch_view.cards[choice[0]], driver, torch_view))
    for index in usable:
        card = torch_view.cards[index]
        try:
            return _describe(card, index, driver, free_bytes=torch_view.free_bytes(index))
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            why = (
                f"CUDA does not start on cuda:{index}, {card.name} ({said}). Another program may "
                "hold all its memory, or have it to itself: see `nvidia-smi`."
            )
        if index != usable[-1]:
            _LOG.warning("%s Trying another.", why)
    raise DeviceError(f"{why} {_OR_CPU}")


def _largest_first(view: TorchView, driver: DriverView) -> list[int]:
    """Return the numbers of cards; those sold as equal by what the driver says is free.

    The one in use comes before those: what is free on it no longer tells of others.
    """
    free = {_bare(card.uuid): card.free_bytes for card in driver.cards}

    def rank(index: int) -> tuple[int, bool, int, int]:
        card = view.cards[index]
        in_use, has = view.started(index), free.get(_bare(card.uuid), 0)
        return -nominal_gib(card.total_bytes), not in_use, -has, -card.total_bytes

    return sorted(range(len(view.cards)), key=rank)


def _bare(uuid: str) -> str:
    """Return it as torch spells it, which leaves out what NVML puts before."""
    return uuid.removeprefix("GPU-")


def torch_device(info: DeviceInfo) -> str:
    """Return the device as torch spells it, "cpu" or "cuda:0"."""
    return "cpu" if info.kind == "cpu" else f"cuda:{info.index}"


def runs_on(capability: tuple[int, int], arch_list: tuple[str, ...]) -> bool:
    """Return whether a build has code for a card.

    Binary code (sm_86) runs on cards of the same major version and at least its minor one;
    intermediate code (compute_90) on all newer cards; sm_90a and the like on that card only.
    """
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if match[4] == "a":
            if capability == built:
                return True
        elif match[1] == "compute":
            if capability >= built:
                return True
        elif capability[0] == built[0] and capability[1] >= built[1]:
            return True
    return False


def wanted_device(device: str) -> str | int:
    """Return "auto", "cpu", "cuda" or a number, as a setting has it.

    Raises:
        ConfigError: it is another word.
    """
    text = str(device).strip().lower()
    if text in ("", "auto"):
        return "auto"
    if text in ("cpu", "cuda"):
        return text
    match = re.fullmatch(r"(?:cuda:)?(\d+)", text)
    if match is None:
        raise ConfigError(f"device is {device}; it must be auto, cpu, cuda or cuda:N.")
    return int(match[1])


def _hidden() -> bool:
    """Return whether the user hides all GPUs from CUDA programs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def _describe(
    card: Card | None, index: int, driver: DriverView, *, free_bytes: int = 0
) -> DeviceInfo:
    card_fields = card or Card(name="CPU")
    return DeviceInfo(
        kind="cpu" if card is None else "cuda",
        index=index,
        name=card_fields.name,
        uuid=card_fields.uuid,
        total_bytes=card_fields.total_bytes,
        free_bytes=free_bytes,
        capability=card_fields.capability,
        bf16=card_fields.bf16,
        driver=driver.driver,
        cores=usable_cores(),
    )


_LEGACY_PIP = (
    'pip install --force-reinstall "torch>=2.11,<2.15" torchvision '
    "--index-url https://download.pytorch.org/whl/cu126"
)
_CURRENT_PIP = "pip install --force-reinstall torch torchvision"
_OR_CPU = "Or train on the CPU with --device cpu."


def _why_no_cuda(device: str, driver: DriverView, view: TorchView) -> str:
    """Say why torch sees no GPU."""
    if not driver.cards:
        return (
            f"device is {device}, but no NVIDIA GPU is visible here. Check `nvidia-smi` (in a "
            f"container: --gpus all), or use --device cpu."
        )
    card = driver.cards[0]
    seen = f"{card.name} (driver {driver.driver}, CUDA up to {_dot(driver.cuda)})"
    if _hidden():
        return f"{seen} is hidden by CUDA_VISIBLE_DEVICES. Unset it. {_OR_CPU}"
    if not view.cuda:
        return (
            f"{seen} is there, but torch {view.version} is a CPU build: {_pip_for(card, driver)}. "
            f"{_OR_CPU}"
        )
    needed = int(view.cuda.split(".")[0])
    if driver.cuda[0] < needed:
        return (
            f"{seen}: its driver is too old for torch {view.version}, which is built for CUDA "
            f"{view.cuda}{' and needs driver 580 or newer' if needed == 13 else ''}. Update the "
            f"driver, or take an older build: {_pip_for(card, driver)}. {_OR_CPU}"
        )
    return (
        f"{seen} is there, but torch {view.version} (CUDA {view.cuda}) cannot start it. Reboot "
        f"after a driver update, or check `nvidia-smi`. {_OR_CPU}"
    )


def _why_no_kernels(card: Card, driver: DriverView, view: TorchView) -> str:
    """Say that the build has no code for the card."""
    built = ", ".join(view.arch_list)
    return (
        f"{card.name} has compute capability {_dot(card.capability)} (driver {driver.driver}), but "
        f"torch {view.version} (CUDA {view.cuda}) has kernels for {built} only: "
        f"{_pip_for(card, driver)}. {_OR_CPU}"
    )


def _pip_for(card: Card, driver: DriverView) -> str:
    """Return the pip command that fits card and driver.

    CUDA 12.6 builds exist for torch up to 2.14; they have kernels for capability 5.0 to 9.0 and
    run on drivers from 525 on. Source: pytorch/pytorch RELEASE.md and issue #190385.
    """
    if (0, 0) < card.capability < (5, 0):
        return "no build of torch 2.11 or newer supports it"
    legacy = (0, 0) < card.capability < (7, 5) or driver.cuda[0] < 13
    if legacy and card.capability < (10, 0):
        return f"`{_LEGACY_PIP}`" + (" after a driver update" if driver.cuda[0] < 12 else "")
    return f"`{_CURRENT_PIP}`" + (
        " after an update to driver 580 or newer" if driver.cuda[0] < 13 else ""
    )


def _dot(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _see_driver() -> DriverView:
    """Ask NVML; nothing to see when there is no driver or no library."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return DriverView()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return DriverView(
            cards=tuple(
                Card(
                    name=str(pynvml.nvmlDeviceGetName(handle)),
                    uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
                    total_bytes=int(own.total),
                    free_bytes=int(own.free),
                    capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                )
                for handle, own in zip(handles, memory, strict=True)
            ),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            cuda=(version // 1000, version % 1000 // 10),
        )
    except pynvml.NVMLError:
        return DriverView()  # a driver that answers half is a driver we know nothing about
    finally:
        pynvml.nvmlShutdown()


def _see_torch() -> TorchView:
    """Ask torch, with the warning silenced that it gives when CUDA does not start."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cards = tuple(_torch_card(i) for i in range(count))
        arch_list = tuple(torch.cuda.get_arch_list()) if count else ()
    return TorchView(
        cards=cards,
        arch_list=arch_list,
        cuda=torch.version.cuda or "",
        version=torch.__version__,
        free_bytes=lambda index: gpu_memory(f"cuda:{index}").free_bytes,
        # As torch@2.11 to 2.15; a build without CUDA has none, nor cards to ask about.
        started=lambda index: bool(torch._C._cuda_hasPrimaryContext(index)),
    )


def _torch_card(index: int) -> Card:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Card(
        name=properties.name,
        uuid=str(properties.uuid),
        total_bytes=properties.total_memory,
        capability=capability,
        bf16=capability >= (8, 0),
    )
