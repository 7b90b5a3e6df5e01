"""Files made to do harm: each is refused in one line, runs nothing, and takes no memory."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import resource
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from hsrloop.errors import WeightsError
from hsrloop.model.base import load_base
from hsrloop.model.safe_load import read_checkpoint
from tests.model.conftest import NAMES, checkpoint

ROOM_BYTES = 256 * 2**20  # more than any of the files below may take
HUGE = 10**12
MARK = "HSRLOOP_ATTACK_MARK"  # the variable with the file that code in an attack makes
TOUCH = f"open(__import__('os').environ['{MARK}'], 'w').close()"


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which the code of an attack was run."""
    mark = tmp_path / "mark"
    monkeypatch.setenv(MARK, str(mark))
    yield
    assert not mark.exists(), "code from the file was run"


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let the kernel refuse more than `ROOM_BYTES` on top of what this process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(path: Path) -> str:
    """Return the one line with which a file is refused, for whatever it is used."""
    with little_memory(), pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    with little_memory(), pytest.raises(WeightsError):
        load_base(path, names=NAMES, seed=0)
    line = str(caught.value)
    assert line.replace(str(path), "").isprintable() and len(line) < len(str(path)) + 500
    return line


# The opcodes of pickle that attacks need.


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def several(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def named(origin: str) -> bytes:
    module, _, name = origin.rpartition(".")
    return b"c" + f"{module}\n{name}\n".encode()


def called(origin: str, *arguments: bytes) -> bytes:
    return named(origin) + several(*arguments) + b"R"


def built(origin: str, *arguments: bytes) -> bytes:
    return named(origin) + several(*arguments) + b"\x81"


def within(value: bytes) -> bytes:
    """Return a checkpoint, a dict, with something in it."""
    return b"\x80\x02}" + text("model") + value + b"s."


def storage(count: int, key: bytes = text("0"), kind: str = "torch.FloatStorage") -> bytes:
    return several(text("storage"), named(kind), key, text("cpu"), number(count)) + b"Q"


def tensor(
    stored: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
    by: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:  # fmt: skip
    shapes = (several(*map(number, shape)) for shape in (size, stride))
    hooks = called("collections.OrderedDict")
    return called(by, stored, number(offset), *shapes, b"\x89", hooks)


def write(path: Path, pickled: bytes, *more: tuple[str, bytes], top: str = "w") -> Path:
    """Write an archive as torch does, with 16 bytes of tensors."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (
            ("data.pkl", pickled),
            ("version", b"3\n"),
            ("data/0", bytes(16)),
            *more,
        ):
            archive.writestr(f"{top}/{name}", data)
    return path


COMMAND = text(f"touch ${MARK}")
CODE = text(TOUCH)
CALLS = {
    "os.system": called("os.system", COMMAND),
    "posix.system": called("posix.system", COMMAND),
    "subprocess": called("subprocess.getoutput", COMMAND),
    "eval": called("builtins.eval", CODE),
    "eval of Python 2": called("__builtin__.eval", CODE),
    "exec": called("builtins.exec", CODE),
    "runpy": called("runpy._run_code", CODE, b"}"),
    "timeit": called("timeit.timeit", CODE),
    "code in torch": called("torch._inductor.codecache.PyCodeCache.load", CODE),
    "a checkpoint in the checkpoint": called("torch.load", text("other.pt")),
    "torch.hub": called("torch.hub.load", text("evil/repository"), text("model")),
    "TorchScript": called("torch.jit.load", text("other.pt")),
    "getattr": called("builtins.getattr", named("os.system"), text("__call__")),
    "attrgetter": called("operator.attrgetter", text("system")),
    "partial": called("functools.partial", named("builtins.eval"), CODE),
    "copyreg": called("copyreg._reconstructor", named("os.system"), named("os.system"), b"N"),
    "a class of the right name": called("evil.DetectionModel"),
    "a module of the right name": called("ultralytics.nn.tasks.evil.DetectionModel"),
    "what an allowed module imported": called("ultralytics.nn.tasks.torch.load", COMMAND),
    "an OrderedDict of another kind": built("evil.OrderedDict"),
    "a subclass of tensor": called(
        "torch._tensor._rebuild_from_type_v2", named("os.system"), named("evil.T"), b")", b"}"
    ),
    "a tensor through NumPy": called(
        "torch._utils._rebuild_device_tensor_from_numpy",
        text("x"),
        text("f4"),
        text("cpu"),
        b"\x89",
    ),
    "a wrapper of a tensor": called("torch._utils._rebuild_wrapper_subclass", named("evil.T")),
    "a parameter with attributes": called("torch._utils._rebuild_parameter_with_state", b"N"),
}
MEMORY = {
    "bytes": called("builtins.bytearray", number(HUGE)),
    "a tensor made by its class": built("torch.Tensor", number(HUGE)),
    "a storage made by its class": called("torch.UntypedStorage", number(HUGE)),
    "a sparse tensor": called("torch._utils._rebuild_sparse_tensor", named("torch.sparse_coo")),
    "a tensor without storage": called(
        "torch._utils._rebuild_meta_tensor_no_storage", named("torch.float32"),
        several(number(HUGE)), several(number(1)), b"\x89",
    ),
    "a storage of a terabyte": tensor(storage(HUGE // 4), 0, (HUGE // 4,), (1,)),
    "a storage beyond its bytes": tensor(storage(5), 0, (5,), (1,)),
    "a storage of negative size": tensor(storage(-4), 0, (4,), (1,)),
    "a storage of an absurd size": tensor(storage(2**63), 0, (4,), (1,)),
    "a tensor of stride 0": tensor(storage(4), 0, (HUGE,), (0,)),
    "a tensor of overlapping rows": tensor(storage(4), 0, (3, 3), (0, 1)),
    "a tensor beyond its storage": tensor(storage(4), 0, (5,), (1,)),
    "an offset beyond the storage": tensor(storage(4), 1000, (4,), (1,)),
    "a negative offset": tensor(storage(4), -4, (4,), (1,)),
    "a negative stride": tensor(storage(4), 3, (4,), (-1,)),
    "a negative size": tensor(storage(4), 0, (-4,), (1,)),
    "a file for a storage": tensor(storage(4, text("../../../../etc/passwd")), 0, (4,), (1,)),
    "a storage without a type": tensor(
        several(text("storage"), b"N", text("0"), text("cpu"), number(4)) + b"Q", 0, (4,), (1,)
    ),
    "another persistent id": several(text("module"), named("torch.FloatStorage"), text("0")) + b"Q",
    "a persistent id in text": b"P0\n",
    "a list that holds itself": b"]q\x00h\x00a",
    "a billion laughs": b"]q\x00" + b"".join(
        b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e" for i in range(40)
    ),
    "a billion laughs in attributes": b"]q\x00" + b"".join(
        built("types.SimpleNamespace") + b"}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h"
        + bytes([i]) + b"ubq" + bytes([i + 1]) for i in range(60)
    ),
    "a hundred thousand lists in each other": b"]" * 10**5 + b"a" * (10**5 - 1),
    "a text of four thousand million": b"X" + struct.pack("<I", 2**32 - 1) + b"x",
    "an empty stack": b"R",
    "a mark that is not there": b"t",
    "an item of a module": called("torch.nn.modules.container.Sequential") + text("a") + b"Ns",
    "an end that is not there": text("x")[:-1],
}  # fmt: skip
OPCODES = {
    "a class named on the stack": text("os") + text("system") + b"\x93" + COMMAND + b"\x85R",
    "INST": b"(" + COMMAND + b"ios\nsystem\n",
    "OBJ": b"(" + named("os.system") + COMMAND + b"o",
    "NEWOBJ_EX": named("os.system") + several(COMMAND) + b"}\x92",
    "EXT1": b"\x82\x01",
    "a buffer out of band": b"\x97",
    "a long of protocol 0": b"L" + b"9" * 10**5 + b"L\n",
    "a text that is evaluated": b"S'" + TOUCH.encode().replace(b"'", b'"') + b"'\n",
}


@pytest.mark.parametrize("attack", CALLS)
def test_code_is_refused(tmp_path: Path, attack: str) -> None:
    line = refused(write(tmp_path / "w.pt", within(CALLS[attack])))
    assert "does not need, so it was not opened" in line or "was fused" in line


@pytest.mark.parametrize("attack", [*MEMORY, *OPCODES])
def test_what_no_writer_writes_is_refused(tmp_path: Path, attack: str) -> None:
    refused(write(tmp_path / "w.pt", within({**MEMORY, **OPCODES}[attack])))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_every_protocol_is_refused_with_and_without_archive(
    tmp_path: Path, protocol: int
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch ${MARK}",)

    pickled = pickle.dumps({"model": Evil()}, protocol)
    refused(write(tmp_path / "archive.pt", pickled))
    (tmp_path / "bare.pt").write_bytes(pickled)
    refused(tmp_path / "bare.pt")
    torch.save({"model": Evil()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt")


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    line = refused(
        write(tmp_path / "w.pt", within(called("evil.\x1b[2J\rAll is well" + "x" * 999)))
    )
    assert "evil.?[2J?All.is.well" in line
    keys = b"\x80\x02}" + text("\x1b[31m\nError: " + "y" * 10**6) + b"Ns."
    with pytest.raises(WeightsError) as caught:
        load_base(write(tmp_path / "k.pt", keys), names=NAMES, seed=0)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_packed_archive_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", within(b"N"))
        with archive.open("w/data/0", "w") as part:
            for _ in range(8):
                part.write(bytes(2**23))
    assert "a packed archive" in refused(path)


def test_parts_that_lie_over_each_other_are_not_read(tmp_path: Path) -> None:
    """Many entries of the directory for the same bytes: a bomb without compression."""
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", within(b"N"))
        archive.writestr("w/data/0", bytes(10**5))
        for i in range(1, 50):
            again = zipfile.ZipInfo(f"w/data/{i}")
            first = archive.getinfo("w/data/0")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = first.file_size
            archive.filelist.append(again)
    assert "larger than the file" in refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w/data.pkl", "two parts of one name"),
        ("../w/data.pkl", "outside its folder"),
        ("w/../../escaped/data.pkl", "outside its folder"),
        ("/etc/cron.d/data.pkl", "outside its folder"),
        ("v/data.pkl", "outside its folder"),
    ],
)
def test_parts_elsewhere_are_refused(tmp_path: Path, name: str, said: str) -> None:
    path = write(tmp_path / "w.pt", within(b"N"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, within(CALLS["os.system"]))
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(within(CALLS["os.system"]))
    path, link = tmp_path / "w.pt", zipfile.ZipInfo("w/data.pkl")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, str(secret))
    assert "damaged" in refused(path)


@pytest.mark.parametrize("flag", [0x1, 0x20, 0x40])
def test_encrypted_and_patched_parts_are_refused(tmp_path: Path, flag: int) -> None:
    path = write(tmp_path / "w.pt", within(b"N"))
    data = bytearray(path.read_bytes())
    for head, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(head)
        while at >= 0:
            data[at + place] |= flag
            at = data.find(head, at + 1)
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize("place", [20, 24, 42], ids=["packed size", "size", "offset"])
@pytest.mark.parametrize("value", [0xFFFFFFFF, 0xFFFFFFFE, 0])
def test_a_directory_that_lies_is_refused(tmp_path: Path, place: int, value: int) -> None:
    path = write(tmp_path / "w.pt", within(tensor(storage(4), 0, (4,), (1,))))
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    if place == 42 and value == 0:
        value = 7  # where the first part does not lie
    data[at + place : at + place + 4] = struct.pack("<I", value)
    path.write_bytes(data)
    refused(path)


def test_a_tar_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.pt", "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            part = tarfile.TarInfo(name)
            archive.addfile(part, io.BytesIO(b""))
    refused(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.trace(Adds(), torch.zeros(1)).save(str(tmp_path / "w.pt"))
    assert "TorchScript" in refused(tmp_path / "w.pt")


def test_bytes_changed_anywhere_never_do_more_than_refuse(tmp_path: Path) -> None:
    """What is still read is a dict; what is not is refused: no other error, nothing run."""
    path, draw = tmp_path / "w.pt", random.Random(0)
    stored = {"a": torch.arange(4.0), "b": [nn.Conv2d(1, 1, 1)], "c": {"x": (1, "two", None)}}
    torch.save(stored, path)
    whole = path.read_bytes()
    ends = {"read": 0, "refused": 0}
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randrange(len(data))] if draw.random() < 0.1 else data)
        try:
            with little_memory():
                assert isinstance(read_checkpoint(path), dict)
            ends["read"] += 1
        except WeightsError:
            ends["refused"] += 1
    assert min(ends.values()) > 50


def foreign(nano: nn.Module) -> dict[str, dict[str, Any]]:
    """Checkpoints that are sound, of networks that are not."""
    found = {}

    def case(name: str, change: Any) -> None:
        content = checkpoint(nano)
        change(content["model"])
        found[name] = content

    first = "model.0.conv"

    def weight(value: torch.Tensor) -> Any:
        def change(model: nn.Module) -> None:
            model.get_submodule(first).weight = nn.Parameter(value, requires_grad=False)

        return change

    case("a wider layer", weight(torch.zeros(17, 3, 3, 3)))
    case("a flat weight", weight(torch.zeros(16 * 27)))
    case("a weight of no size", weight(torch.zeros(0, 3, 3, 3)))
    case("whole numbers", weight(torch.zeros(16, 3, 3, 3, dtype=torch.int64)))
    case("complex numbers", weight(torch.zeros(16, 3, 3, 3, dtype=torch.complex64)))
    case("truths", weight(torch.zeros(16, 3, 3, 3, dtype=torch.bool)))
    case("text for a layer", lambda model: model.model._modules.update({"3": "layer"}))
    case("text for parameters", lambda model: model.model[0].conv.__dict__.update(_parameters="x"))
    case("text for eps", lambda model: model.model[0].bn.__dict__.update(eps="x"))
    case("a layer in itself", lambda model: model.model[4]._modules.update(x=model.model[4]))
    case("no layers", lambda model: model.model._modules.clear())
    case("another layer", lambda model: model.model._modules.update({"23": nn.Identity()}))
    return found


def test_foreign_shapes_and_types_are_refused(nano: nn.Module, tmp_path: Path) -> None:
    for name, content in foreign(nano).items():
        path = tmp_path / "w.pt"
        torch.save(content, path)
        with pytest.raises(WeightsError) as caught:
            load_base(path, names=NAMES, seed=0)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("names", [5, True, "mug", {"mug": 0}, [None]])
def test_names_of_another_kind_are_no_names(nano: nn.Module, tmp_path: Path, names: Any) -> None:
    content = checkpoint(nano)
    content["model"].names = names
    torch.save(content, tmp_path / "w.pt")
    assert load_base(tmp_path / "w.pt", names=NAMES, seed=0).fresh_classes == (True,) * 3


def test_the_files_of_attacks_are_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    """Or else all of the above could be refused for another reason."""
    sound = within(tensor(storage(4), 0, (2, 2), (2, 1)))
    content = read_checkpoint(write(tmp_path / "w.pt", sound))
    assert torch.equal(content["model"], torch.zeros(2, 2))
