"""Base weights: classes by name, branch widths, old files, and what is refused and how."""

from __future__ import annotations

import copy
import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hsrloop.errors import WeightsError
from hsrloop.model import yolo
from hsrloop.model.base import _matching_rows, load_base
from hsrloop.model.safe_load import read_checkpoint
from tests.model.conftest import NAMES, checkpoint, flat_pickles, scrambled


def rows(module: nn.Module) -> list[torch.Tensor]:
    """Return, per level, (C, width + 1): weights and bias of the class outputs."""
    return [
        torch.cat([out.weight.detach().flatten(1), out.bias.detach()[:, None]], dim=1)
        for out in yolo.class_outputs(module)
    ]


def half(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.half().float() for t in tensors]


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[k].half(), theirs[k].half()) for k in ours
    )


def test_own_checkpoint_comes_back_whole(nano: nn.Module, nano_file: Path) -> None:
    base = load_base(nano_file, names=None, seed=0)
    assert same(base.module, nano)
    assert (base.scale, base.source_names, base.fresh_classes) == ("n", NAMES, (False,) * 3)
    assert base.module.training and base.module.criterion is None
    assert all(p.dtype == torch.float32 for p in base.module.parameters())
    assert [n for n, p in base.module.named_parameters() if not p.requires_grad] == [
        "model.22.dfl.conv.weight"
    ]


def test_rows_follow_their_names(nano: nn.Module, nano_file: Path) -> None:
    names = ("plate", " Spoon", "MUG", "fork")
    base = load_base(nano_file, names=names, seed=0)
    assert base.fresh_classes == (True, False, False, True)
    assert base.module.names == dict(enumerate(names))
    for level, (got, had) in enumerate(zip(rows(base.module), half(rows(nano)), strict=True)):
        assert torch.equal(got[1], had[2]) and torch.equal(got[2], had[0])
        prior = yolo.prior_bias(yolo.strides(nano)[level], 4)
        assert got[[0, 3], -1].tolist() == pytest.approx([prior, prior])
        bound = 1 / got[0, :-1].numel() ** 0.5
        assert 0 < got[0, :-1].abs().max() <= bound


@pytest.mark.parametrize(
    ("have", "want", "found"),
    [
        (("wine glass", "cup"), ("cup", "wine_glass"), (1, 0)),
        (("Wine-Glass",), ("wine  glass",), (0,)),
        (
            ("wine_glass", "wine glass"),
            ("wine glass", "wine_glass"),
            (1, 0),
        ),  # the same before alike
        (("cup", "CUP"), ("cup",), (0,)),
        (("wineglass",), ("wine glass",), (None,)),
        (("-", "_"), ("_", " - ", "__"), (1, 0, None)),
    ],
)
def test_a_class_keeps_its_row_when_its_name_is_made_fit_for_ros(
    have: tuple[str, ...], want: tuple[str, ...], found: tuple[int | None, ...]
) -> None:
    assert tuple(_matching_rows(have, want)) == found


def test_same_number_of_other_names_is_all_fresh(nano_file: Path) -> None:
    base = load_base(nano_file, names=("a", "b", "c"), seed=0)
    assert base.fresh_classes == (True, True, True)


def test_fresh_rows_are_a_function_of_the_seed(nano_file: Path) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (load_base(nano_file, names=("a", "mug"), seed=s).module for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(rows(one), rows(again), strict=True))
    assert not any(torch.equal(x[0], y[0]) for x, y in zip(rows(one), rows(other), strict=True))
    assert all(torch.equal(x[1], y[1]) for x, y in zip(rows(one), rows(other), strict=True))


def test_class_branches_keep_the_width_of_the_file(tmp_path: Path) -> None:
    wide = scrambled(yolo.build("yolov8n.yaml", names=[f"c{i}" for i in range(80)], seed=0))
    torch.save(checkpoint(wide, tuple(f"c{i}" for i in range(80))), tmp_path / "first.pt")
    first = load_base(tmp_path / "first.pt", names=("new", "c7"), seed=0)
    assert [out.in_channels for out in yolo.class_outputs(first.module)] == [80, 80, 80]
    torch.save(checkpoint(first.module, ("new", "c7")), tmp_path / "second.pt")
    second = load_base(tmp_path / "second.pt", names=("new", "c7", "third"), seed=0)
    assert [out.in_channels for out in yolo.class_outputs(second.module)] == [80, 80, 80]
    assert second.fresh_classes == (False, False, True)
    norms = [m for m in second.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


def test_scratch_is_all_fresh() -> None:
    base = load_base("yolov8n.yaml", names=("a", "b"), seed=0)
    assert (base.fresh_classes, base.source_names) == ((True, True), ())


def test_averaged_weights_go_before_the_others(nano: nn.Module, tmp_path: Path) -> None:
    content = checkpoint(yolo.build("yolov8n.yaml", names=NAMES, seed=5))
    content["ema"] = checkpoint(nano)["model"]
    torch.save(content, tmp_path / "last.pt")
    assert same(load_base(tmp_path / "last.pt", names=None, seed=0).module, nano)


def test_file_of_ultralytics_8_0(nano: nn.Module, tmp_path: Path, old_settings_class) -> None:
    """Flat class paths, attributes that did not exist then, settings objects, paths, NumPy."""
    content = checkpoint(nano)
    network = content["model"]
    for part in network.modules():
        for newer in ("recompute_scale_factor", "add", "n", "_end2end", "np"):
            if not isinstance(part, nn.Conv2d):
                vars(part).pop(newer, None)
    network.args = old_settings_class(imgsz=640)
    content["train_args"] = {"model": pathlib.PurePosixPath("yolov8n.pt"), "save_dir": Path("runs")}
    del content["train_args"]["model"]
    content["best_fitness"] = np.float64(0.37)
    content["fitness"] = np.array([0.1, 0.2])
    with flat_pickles(network):
        torch.save(content, tmp_path / "old.pt")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "old.pt")
    assert "ultralytics.nn.modules.C2f" in names
    assert "ultralytics.yolo.utils.IterableSimpleNamespace" in names
    assert not any(n.startswith("ultralytics.nn.modules.block") for n in names)
    module = load_base(tmp_path / "old.pt", names=None, seed=0).module
    assert same(module, nano)
    yolo.forward_train(module, torch.rand(1, 3, 64, 64))


def test_activations_are_those_of_the_file(nano: nn.Module, tmp_path: Path) -> None:
    content = checkpoint(nano)
    content["model"].model[9].cv1.act = nn.Identity()  # as some 8.4 releases build YOLOv8
    torch.save(content, tmp_path / "w.pt")
    module = load_base(tmp_path / "w.pt", names=None, seed=0).module
    kinds = {name: type(m.act) for name, m in module.named_modules() if hasattr(m, "act")}
    assert kinds.pop("model.9.cv1") is nn.Identity
    assert set(kinds.values()) == {nn.SiLU}


def test_half_a_run_state_comes_back(nano: nn.Module, tmp_path: Path) -> None:
    state = {"rng": torch.arange(4, dtype=torch.uint8), "step": 3, "nested": [{"x": (1, None)}]}
    torch.save(checkpoint(nano, hsrloop=state), tmp_path / "w.pt")
    back = read_checkpoint(tmp_path / "w.pt")["hsrloop"]
    assert torch.equal(back.pop("rng"), state.pop("rng")) and back == state


class Payload:
    """A pickle that runs a command when a careless reader opens it."""

    def __init__(self, call, *args) -> None:
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call", ["os.system", "builtins.eval", "subprocess.getoutput"])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(
    nano: nn.Module, tmp_path: Path, call: str
) -> None:
    mark = tmp_path / "mark"
    module, _, name = call.rpartition(".")
    function = getattr(__import__(module), name)
    argument = f"open({str(mark)!r}, 'w').close()" if name == "eval" else f"touch {mark}"
    torch.save({**checkpoint(nano), "x": Payload(function, argument)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=name) as caught:
        load_base(tmp_path / "evil.pt", names=NAMES, seed=0)
    assert "--trust-checkpoint" in str(caught.value) and "\n" not in str(caught.value)
    assert not mark.exists()
    load_base(tmp_path / "evil.pt", names=NAMES, seed=0, trust=True)
    assert mark.exists(), "the payload is real"


def test_code_in_a_network_description_is_not_run(tmp_path: Path) -> None:
    """Ultralytics' own DetectionModel evaluates `activation`; no pickle may call it."""
    mark = tmp_path / "mark"
    yolo.import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    description = {"nc": 1, "activation": f"open({str(mark)!r}, 'w')", "backbone": [], "head": []}
    torch.save({"model": Payload(DetectionModel, description)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="not a YOLOv8"):
        load_base(tmp_path / "evil.pt", names=NAMES, seed=0)
    assert not mark.exists()


def test_refusal_without_zip_container(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    with path.open("wb") as file:
        pickle.dump({"x": Payload(print, "never")}, file, protocol=2)
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def not_yolov8(nano: nn.Module) -> dict[str, tuple[object, str]]:
    yolo.import_ultralytics()
    from ultralytics.nn import tasks

    shuffled = checkpoint(nano)
    shuffled["model"].model = nn.Sequential(*list(shuffled["model"].model)[::-1])
    fused = checkpoint(nano)
    fused["model"] = yolo.fuse_for_inference(copy.deepcopy(nano))
    nan = checkpoint(nano)
    nan["model"].model[0].bn.weight.data[0] = torch.nan
    segment = tasks.SegmentationModel("yolov8n-seg.yaml", nc=2, verbose=False)
    return {
        "segmentation": ({"model": segment}, "a YOLO segmentation model"),
        "v10": ({"model": tasks.DetectionModel("yolov10n.yaml", nc=2, verbose=False)}, "YOLOv10"),
        "v11": ({"model": tasks.DetectionModel("yolo11n.yaml", nc=2, verbose=False)}, "YOLO11"),
        "v5": ({"model": tasks.DetectionModel("yolov5n.yaml", nc=2, verbose=False)}, "YOLOv5"),
        "p2": (
            {"model": tasks.DetectionModel("yolov8n-p2.yaml", nc=2, verbose=False)},
            "its layers are Conv, Conv, C2f",
        ),
        "state dict": (nano.state_dict(), "a plain state dict"),
        "state dict below model": ({"model": OrderedDict(nano.state_dict())}, "a plain state dict"),
        "random dict": ({"a": 1, "b": [2]}, "no network under 'model', but a, b"),
        "empty": ({}, "but nothing"),
        "list": ([1, 2], "holds a list, not an Ultralytics checkpoint"),
        "number": ({"model": 3}, "a int"),
        "other layers": (shuffled, "its layers are Detect, C2f"),
        "fused": (fused, "fused for inference"),
        "not finite": (nan, "not numbers"),
    }


def test_other_files_are_called_what_they_are(nano: nn.Module, tmp_path: Path) -> None:
    for case, (content, words) in not_yolov8(nano).items():
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(WeightsError) as caught:
            load_base(tmp_path / "w.pt", names=NAMES, seed=0)
        assert words in str(caught.value), case
        assert "w.pt" in str(caught.value) and "\n" not in str(caught.value), case


FILES = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 6549\n",
    "a web page": b"\n<!DOCTYPE html><html><body>Not found</body></html>",
    "empty": b"",
    "an ONNX model": b"\x08\x08\x12\x07pytorch\x1a\x062.15.0",
    "a safetensors file": (40).to_bytes(8, "little") + b'{"__metadata__":{}}',
    "a TFLite model": b"\x1c\x00\x00\x00TFL3",
    "not a PyTorch checkpoint": b"hello, world",
    "truncated": b"PK\x03\x04" + bytes(400),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_called_what_they_are(tmp_path: Path, kind: str) -> None:
    (tmp_path / "w.pt").write_bytes(FILES[kind])
    with pytest.raises(WeightsError, match=f"w.pt is {kind}"):
        load_base(tmp_path / "w.pt", names=NAMES, seed=0)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_checkpoint(nano_file: Path, tmp_path: Path, share: float) -> None:
    whole = nano_file.read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match="truncated"):
        read_checkpoint(tmp_path / "w.pt")


def test_missing_file_and_torchscript(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    import zipfile

    with zipfile.ZipFile(tmp_path / "s.pt", "w") as archive:
        archive.writestr("s/constants.pkl", b"")
    with pytest.raises(WeightsError, match="TorchScript"):
        read_checkpoint(tmp_path / "s.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("a.txt", b"")
    with pytest.raises(WeightsError, match="a zip archive"):
        read_checkpoint(tmp_path / "z.pt")


def test_real_weights_equal_ultralytics_reading(real_data: Path) -> None:
    path = real_data / "weights" / "yolov8n_coco_rebuilt.pt"
    yolo.import_ultralytics()
    from ultralytics.nn.tasks import load_checkpoint

    ours = load_base(path, names=None, seed=0).module
    theirs, _ = load_checkpoint(path)
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    raw = yolo.forward_eval(ours.eval(), images)
    expected = theirs(images)[1]
    assert torch.equal(raw.box_logits, expected["boxes"])
    assert torch.equal(raw.class_logits, expected["scores"])


@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"a": 1}, 2), pickle.dumps(Path("x"), 2), b"\x80\x02" + bytes(range(200))],
)
def test_what_is_no_checkpoint_is_not_said_to_be_unsafe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged, no PyTorch checkpoint") as caught:
        load_base(file, names=None, seed=0)
    assert "trust" not in str(caught.value)


def test_a_fused_network_is_called_that(tmp_path: Path, real_data: Path) -> None:
    content = torch.load(real_data / "weights" / "yolov8n_coco_rebuilt.pt", weights_only=False)
    content.update(model=(content["ema"] or content["model"]).float().fuse(verbose=False), ema=None)
    torch.save(content, tmp_path / "fused.pt")
    with pytest.raises(WeightsError, match="was fused for inference"):
        load_base(tmp_path / "fused.pt", names=None, seed=0)
