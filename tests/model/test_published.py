"""What is published loads in Ultralytics and leaves the training module alone."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from hsrloop.model import yolo
from tests.model.conftest import NAMES, checkpoint


def test_training_module_is_untouched(nano: nn.Module) -> None:
    module = copy.deepcopy(nano).to(memory_format=torch.channels_last)
    before = copy.deepcopy(module.state_dict())
    content = checkpoint(module)
    assert module.training and next(module.parameters()).dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    for name, value in content["model"].state_dict().items():
        assert value.dtype == (torch.float16 if before[name].is_floating_point() else torch.int64)
        strides = torch.empty(value.shape).stride()
        assert value.stride() == strides, f"{name} is not plain NCHW"
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    assert not any(p.requires_grad for p in content["model"].parameters())
    assert content["model"].criterion is None and content["ema"] is None


def test_extra_keys_survive_and_do_not_replace(nano: nn.Module) -> None:
    assert checkpoint(nano, hsrloop={"a": 1})["hsrloop"] == {"a": 1}
    with pytest.raises(AssertionError, match="model"):
        checkpoint(nano, model=1)


def test_file_names_only_classes_of_old_releases(nano_file: Path) -> None:
    """Also 8.0.100 has them all; NumPy scalars and paths would tie the file to versions."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(nano_file)
    assert sorted(n for n in names if not n.startswith("torch.nn.modules.")) == [
        "ultralytics.nn.modules.block.Bottleneck",
        "ultralytics.nn.modules.block.C2f",
        "ultralytics.nn.modules.block.DFL",
        "ultralytics.nn.modules.block.SPPF",
        "ultralytics.nn.modules.conv.Concat",
        "ultralytics.nn.modules.conv.Conv",
        "ultralytics.nn.modules.head.Detect",
        "ultralytics.nn.tasks.DetectionModel",
    ]
    assert zipfile.is_zipfile(nano_file)


def test_ultralytics_loads_predicts_and_keeps_names(nano: nn.Module, nano_file: Path) -> None:
    yolo.import_ultralytics()
    from ultralytics import YOLO

    robot = YOLO(str(nano_file))
    assert robot.names == dict(enumerate(NAMES))
    assert robot.task == "detect"
    (result,) = robot.predict(torch.zeros(1, 3, 64, 64), imgsz=64, device="cpu", verbose=False)
    assert result.names == dict(enumerate(NAMES))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rounded = copy.deepcopy(nano).half().float().eval()
    loaded = YOLO(str(nano_file)).model.float().eval()
    raw = yolo.forward_eval(rounded, images)
    assert torch.equal(loaded(images)[1]["scores"], raw.class_logits)
