"""Open a checkpoint without running anything that it names.

`torch.load(weights_only=True)` still calls the classes it is allowed to know, and Ultralytics' own
`DetectionModel` evaluates an expression from its configuration. So none of them is allowed: each
class name that a YOLOv8 file may hold is answered by an empty stand-in which only keeps what it is
given. Tensors and plain containers are real; the network is built afresh and filled from them.
What is real may still be made to exhaust memory or time: see `archive` and `extent`.
"""

from __future__ import annotations

import functools
import logging
import pickle
import pickletools
import re
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hsrloop.errors import WeightsError, first_line
from hsrloop.model.archive import is_archive, pickle_of, plain, wrong_archive
from hsrloop.model.extent import check_extent
from hsrloop.paths import is_file

log = logging.getLogger(__name__)


class StandIn:
    """An object whose class was not loaded: its attributes, and nothing that acts."""

    origin = ""

    def __init__(self, *_: Any) -> None:
        """Take and drop whatever the pickled constructor call held."""

    def __setstate__(self, state: Any) -> None:
        """Keep pickled attributes; drop a state that is none (arrays, dates)."""
        if isinstance(state, dict):
            self.__dict__.update(state)


_BLOCKS = ("Conv", "Concat", "C2f", "Bottleneck", "SPPF", "DFL", "Detect")
_TORCH = (
    *("activation.SiLU", "activation.Identity", "batchnorm.BatchNorm2d", "container.ModuleList"),
    *("container.Sequential", "conv.Conv2d", "linear.Identity", "loss.BCEWithLogitsLoss"),
    *("pooling.MaxPool2d", "upsampling.Upsample"),
)
ALLOWED = frozenset(
    [
        "ultralytics.nn.tasks.DetectionModel",
        *(f"ultralytics.nn.modules.{name}" for name in _BLOCKS),  # releases 8.0 to 8.2
        *(f"ultralytics.nn.modules.conv.{name}" for name in ("Conv", "Concat")),
        *(f"ultralytics.nn.modules.block.{name}" for name in ("C2f", "Bottleneck", "SPPF", "DFL")),
        "ultralytics.nn.modules.head.Detect",
        *(f"torch.nn.modules.{name}" for name in _TORCH),
        # Beside the network: settings, a loss left in the file, numbers, paths.
        *(f"ultralytics{v}.utils.IterableSimpleNamespace" for v in ("", ".yolo")),
        *(f"ultralytics{v}.utils.loss.BboxLoss" for v in ("", ".yolo")),
        *(f"ultralytics{v}.utils.tal.TaskAlignedAssigner" for v in ("", ".yolo")),
        *(f"ultralytics.utils.loss.{name}" for name in ("v8DetectionLoss", "DFLoss")),
        "ultralytics.yolo.v8.detect.train.Loss",
        "types.SimpleNamespace",
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
        *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("scalar", "_reconstruct")
        ),
        "numpy.dtype",
        "numpy.ndarray",
        "datetime.datetime",
    ]
)

# Real, since torch calls them: of all that `weights_only` would call, these cannot be asked for
# more memory than the file has.
_REAL = frozenset(
    [
        *("collections.OrderedDict", "builtins.set", "__builtin__.set", "_codecs.encode"),
        *("torch.Size", "torch.device", "torch.float16", "torch.bfloat16", "torch.float32"),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
        *(f"torch.{kind}Storage" for kind in ("Bool", "Byte", "Char", "Short", "Int", "Long")),
        *(f"torch.{kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double")),
    ]
)

_KINDS = (  # a class seen in the file, and what the file therefore is
    (r"models\.(yolo|common)\.", "a YOLOv5 or YOLOv7 checkpoint"),
    (r"(nn\.tasks\.SegmentationModel|\.Segment\w*)$", "a YOLO segmentation model"),
    (r"(nn\.tasks\.PoseModel|\.Pose\w*)$", "a YOLO pose model"),
    (r"(nn\.tasks\.OBBModel|\.OBB\w*)$", "a YOLO model of rotated boxes"),
    (r"(nn\.tasks\.ClassificationModel|\.Classify)$", "a YOLO classification model"),
    (r"(nn\.tasks\.World\w*|\.WorldDetect|\.C2fAttn)$", "a YOLO-World model"),
    (r"YOLOE\w*$", "a YOLOE model"),
    (r"(RTDETR\w*|RTDETRDecoder)$", "an RT-DETR model"),
    (r"\.A2C2f$", "a YOLO12 model"),
    (r"\.C3k2$", "a YOLO11 or YOLO26 model"),
    (r"\.(v10Detect|C2fCIB|SCDown|RepVGGDW)$", "a YOLOv10 model"),
    (r"\.(RepNCSPELAN4|SPPELAN|CBLinear)$", "a YOLOv9 model"),
    (r"ultralytics\.nn\.modules\.(block\.)?C3$", "a YOLOv5 model"),
)


# What unpickling raises for a file that is damaged or made to be.
_BAD_PICKLE = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(AssertionError, pickle.UnpicklingError),
)


@functools.cache
def stand_in(origin: str) -> type[StandIn]:
    """Return the stand-in class for a pickled class, such as "torch.nn.modules.conv.Conv2d"."""
    return type(origin.rpartition(".")[2], (StandIn,), {"origin": origin})


def read_checkpoint(path: Path | str, *, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint on the CPU; the network in it comes as stand-ins, the rest as it is.

    Args:
        path: a .pt file as `torch.save` writes it.
        trust: unpickle everything, running whatever code the file holds.

    Raises:
        WeightsError: no such file, a damaged one or one of another kind, or, without `trust`, one
            that names a class outside the allow-list; nothing of it has been run then.
    """
    path = Path(path)
    check_file(path)
    try:
        content = _load_trusted(path) if trust else _load_safely(path)
    except _BAD_PICKLE as error:
        raise WeightsError(_explain(path, error)) from error
    if not isinstance(content, dict):
        kind = getattr(type(content), "origin", type(content).__name__)
        article = "an" if kind[0] in "aeiou" else "a"
        raise WeightsError(f"{path} holds {article} {kind}, not an Ultralytics checkpoint.")
    return content


def _load_safely(path: Path) -> Any:
    if not is_archive(path):  # as torch before 1.6 wrote, and anybody can
        raise pickle.UnpicklingError("no archive")
    unknown = sorted(_globals(path) - ALLOWED - _REAL)
    if unknown:
        raise WeightsError(_refusal(path, unknown))
    allowed: list[Any] = [(stand_in(name), name) for name in sorted(ALLOWED)]
    with torch.serialization.safe_globals(allowed):
        content = torch.load(path, map_location="cpu", weights_only=True)
    check_extent(content, StandIn)
    return content


def _globals(path: Path) -> set[str]:
    """Return the class and function names in the file, without running it.

    torch knows no other opcode that names one, and refuses those it does not know.

    Raises:
        ValueError: it is not pickled as torch does.
    """
    found = set()
    for operation, argument, _ in pickletools.genops(pickle_of(path)):
        if operation.name == "PROTO" and argument != 2:
            raise ValueError(f"pickle protocol {argument}")
        if operation.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
    return found


def _load_trusted(path: Path) -> Any:
    log.warning("opening %s without checks, as told; it can run any code", path)
    door = types.ModuleType("trusting_pickle")
    door.__dict__.update(pickle.__dict__, Unpickler=_Trusting)
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=door)


class _Trusting(pickle.Unpickler):
    """The ordinary unpickler, with stand-ins for classes of the network and for what is missing."""

    def find_class(self, module: str, name: str) -> Any:
        origin = f"{module}.{name}"
        if origin in ALLOWED and module.startswith(("ultralytics", "torch.nn.modules")):
            return stand_in(origin)
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return stand_in(origin)


def _refusal(path: Path, unknown: list[str]) -> str:
    if any(name.endswith(".getattr") for name in unknown):  # a method put in another's place
        return f"{path} was fused for inference, without BatchNorm; give the unfused file."
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in unknown):
            return f"{path} is {kind}; only YOLOv8 detection models can be fine-tuned here."
    return (
        f"{path} names {plain(', '.join(unknown[:3]))}, which a YOLOv8 "
        f"detection checkpoint does not need, so it was not opened. If you know where the file "
        f"comes from, add --trust-checkpoint; it can then run any code on this machine."
    )


def _explain(path: Path, error: Exception) -> str:
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        return _refusal(path, [named[1]])
    if not is_archive(path):
        return (
            f"{path} is damaged, no PyTorch checkpoint, or one in the format of torch before 1.6. "
            "Get it again, or save it anew with a newer torch."
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"{path} is damaged, or no PyTorch checkpoint. Get it again, or give another file."
    return f"{path} is damaged ({plain(first_line(error))}). Get it again."


def check_file(path: Path) -> None:
    """Raise WeightsError, saying what the file is, unless it looks like a PyTorch checkpoint."""
    if not is_file(path):
        raise WeightsError(f"{path} does not exist or is not a file.")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}).") from error
    kind = _wrong_kind(path, start)
    if kind:
        raise WeightsError(f"{path} is {kind}")


def _wrong_kind(path: Path, start: bytes) -> str | None:
    size = path.stat().st_size
    text = start.lstrip().lower()
    if not start:
        return "empty. Get it again."
    if start.startswith(b"version https://git-lfs"):
        return (
            f"a Git LFS pointer ({size} bytes), not the weights. Run `git lfs pull` in its "
            f"repository, or get it with `hsrloop weights fetch`."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: a download went wrong. Get it again."
    if start.startswith(b"PK\x03\x04"):
        return _wrong_zip(path, size)
    if start.startswith(b"\x80"):
        return None  # a pickle, as torch before 1.6 wrote
    if path.suffix == ".onnx" or (start[:1] == b"\x08" and b"\x12" in start[2:4]):
        return "an ONNX model, which cannot be trained. Give the .pt file it was made from."
    if start[8:10] == b'{"':
        return "a safetensors file, not an Ultralytics checkpoint. Give the .pt file."
    if start[4:8] == b"TFL3":
        return "a TFLite model, which cannot be trained. Give the .pt file it was made from."
    return "not a PyTorch checkpoint. Give a .pt file as Ultralytics or hsrloop writes it."


def _wrong_zip(path: Path, size: int) -> str | None:
    if not is_archive(path):
        return f"truncated ({size} bytes): a download or a copy broke off. Get it again."
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "damaged. Get it again."
    names = [part.filename for part in parts]
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript model, which cannot be trained. Give the .pt file it was made from."
    if not any(name.endswith("/data.pkl") for name in names):
        return "a zip archive, not a PyTorch checkpoint."
    return wrong_archive(parts, size)


def walk(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, stand-in or module) for a pickled network and all its parts."""
    yield prefix, module
    for name, part in vars(module).get("_modules", {}).items():
        if part is not None:
            yield from walk(part, f"{prefix}.{name}" if prefix else name)


def tensors(module: Any) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a pickled network by dotted name, like a state dict."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in walk(module):
        for table in ("_parameters", "_buffers"):
            for name, value in vars(part).get(table, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"{prefix}.{name}" if prefix else name] = value.detach()
    return found
