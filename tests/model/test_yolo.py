"""The network: sizes, the forward pass, and an import that changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hsrloop.errors import WeightsError
from hsrloop.model import yolo

MILLIONS = {"n": 3.157200, "s": 11.166560, "m": 25.902640, "l": 43.691520, "x": 68.229648}


@pytest.mark.parametrize("scale", yolo.SCALES)
def test_parameters_of_the_five_scales(scale: str) -> None:
    module = yolo.build(f"yolov8{scale}.yaml", names=[str(i) for i in range(80)], seed=0)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(MILLIONS[scale])
    assert yolo.scale_of(module) == scale
    assert tuple(type(m).__name__ for m in yolo.layers(module)) == yolo.LAYERS
    assert (yolo.strides(module), yolo.reg_max(module)) == ((8, 16, 32), 16)


def test_unknown_yaml_lists_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=r"yolov5n.yaml is no model.*yolov8n.yaml"):
        yolo.build("yolov5n.yaml", names=["a"], seed=0)


def test_build_is_a_function_of_its_seed() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (yolo.build("yolov8n.yaml", names=["a"], seed=s) for s in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    values = [torch.cat([p.flatten() for p in m.parameters()]) for m in (one, same, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_module_is_ready_to_train(nano: nn.Module) -> None:
    assert nano.names == {0: "mug", 1: "bowl", 2: "spoon"}
    assert nano.training and nano.criterion is None
    fixed = [name for name, p in nano.named_parameters() if not p.requires_grad]
    assert fixed == ["model.22.dfl.conv.weight"]
    assert all(p.dtype == torch.float32 for p in nano.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_forward_equals_ultralytics(nano: nn.Module, training: bool) -> None:
    module = copy.deepcopy(nano).train(training)
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    ours = (yolo.forward_train if training else yolo.forward_eval)(copy.deepcopy(module), images)
    theirs = module(images) if training else module(images)[1]
    assert torch.equal(ours.box_logits, theirs["boxes"])
    assert torch.equal(ours.class_logits, theirs["scores"])
    assert ours.shapes == ((12, 8), (6, 4), (3, 2))
    assert ours.class_logits.requires_grad is training


def test_forward_takes_no_image(nano: nn.Module) -> None:
    module = copy.deepcopy(nano).eval()
    raw = yolo.forward_eval(module, torch.zeros(0, 3, 64, 64))
    assert raw.box_logits.shape == (0, 64, 84)
    assert raw.class_logits.shape == (0, 3, 84)


def test_fused_it_gives_the_same(nano: nn.Module) -> None:
    module = copy.deepcopy(nano)
    fused = yolo.fuse_for_inference(copy.deepcopy(module))
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole, folded = yolo.forward_eval(module.eval(), images), yolo.forward_eval(fused, images)
    torch.testing.assert_close(folded.box_logits, whole.box_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.class_logits, whole.class_logits, rtol=1e-4, atol=1e-4)


def test_train_mode_keeps_norms_of_frozen_layers(nano: nn.Module) -> None:
    module = copy.deepcopy(nano).eval()
    yolo.set_train_mode(module, freeze=10)
    norms = {n: m.training for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(on is (int(name.split(".")[1]) >= 10) for name, on in norms.items())
    yolo.set_train_mode(module, norms_eval=True)
    assert module.training and not any(
        m.training for m in module.modules() if isinstance(m, nn.BatchNorm2d)
    )


IMPORT = """
import os, pathlib, torch, cv2, numpy as np
torch.set_num_threads(2); cv2.setNumThreads(2)
save, options, environment = torch.save, np.get_printoptions(), dict(os.environ)
from hsrloop.model import yolo
package = yolo.import_ultralytics()
assert package is yolo.import_ultralytics()
assert torch.get_num_threads() == 2 and cv2.getNumThreads() == 2, "threads"
assert torch.save is save and np.get_printoptions() == options
changed = {k for k in set(environment) | set(os.environ) if environment.get(k) != os.environ.get(k)}
assert all(k.startswith("YOLO_") for k in changed), changed
from ultralytics.utils import AUTOINSTALL, SETTINGS, is_online, VERBOSE
assert not AUTOINSTALL and not VERBOSE and not is_online()
assert not list(pathlib.Path.home().iterdir()), list(pathlib.Path.home().iterdir())
print(os.environ["YOLO_CONFIG_DIR"])
"""


def test_import_leaves_the_process_and_the_home_alone(tmp_path, monkeypatch) -> None:
    for key in ("OMP_NUM_THREADS", "YOLO_CONFIG_DIR", "YOLO_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "Ultralytics printed something"
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def packaged_yaml() -> str:
    folder = Path(str(yolo.import_ultralytics().__file__)).parent
    return (folder / "cfg/models/v8/yolov8.yaml").read_text(encoding="utf-8")


def test_a_yaml_of_ones_own_must_describe_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "yolov8n.yaml"
    with pytest.raises(WeightsError, match="cannot be read"):
        yolo.build(str(own), names=("a",), seed=0)
    own.write_text(packaged_yaml())
    assert yolo.scale_of(yolo.build(str(own), names=("a",), seed=0)) == "n"
    own.write_text(packaged_yaml().replace("[-1, 1, SPPF, [1024, 5]]", "[-1, 1, SPPF, [512, 5]]"))
    monkeypatch.chdir(tmp_path)
    for spelled in (str(own), "yolov8n.yaml"):
        with pytest.raises(WeightsError, match="describes another network"):
            yolo.build(spelled, names=("a",), seed=0)
