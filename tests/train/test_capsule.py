"""A diverged run leaves its last step in one file, which shows the same step again elsewhere."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from click.testing import CliRunner, Result

from hsrloop.cli.main import main
from hsrloop.config import TrainConfig
from hsrloop.data.loader import TrainLoader
from hsrloop.data.pixels.store import ImageStore
from hsrloop.data.sets.dataset import load_dataset
from hsrloop.errors import CheckpointError, DivergedError, OutputError, WeightsError
from hsrloop.model.base import load_base
from hsrloop.model.blueprint import blueprint, from_blueprint
from hsrloop.model.yolo import head
from hsrloop.ops.loss import LossSums
from hsrloop.records import Batch, Position
from hsrloop.train import capsule as capsule_module
from hsrloop.train import guard
from hsrloop.train import step as step_module
from hsrloop.train.build import build_state
from hsrloop.train.capsule import Capsule, diverged, read
from hsrloop.train.checkpoint import RunIdentity, versions
from hsrloop.train.guard import LastStep
from hsrloop.train.loop import set_modes
from hsrloop.train.replay import replay
from hsrloop.train.run import train
from hsrloop.train.state import TrainState
from hsrloop.train.step import StepSettings, Transaction, train_step
from hsrloop.train.trace import traced
from tests.conftest import write_material, write_tiny_dataset
from tests.train.conftest import run_settings
from tests.train.test_resume import differences, state_of
from tests.train.test_step import CPU, NAMES

SHAPE = {"epochs": 2, "batch": 4, "micro_batch": 2, "imgsz": 64, "mixup": 1.0}


def diverge(dataset: Path, output: Path, **changes: Any) -> tuple[Path, str]:
    """Train until it diverges; return the capsule and the message."""
    with pytest.raises(DivergedError) as caught:
        train(run_settings(dataset, output, **{**SHAPE, **changes}))
    (path,) = output.glob("competition_*/capsule_*.pt")
    return path, str(caught.value)


@pytest.fixture(scope="module")
def exploded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the capsule of a run at an absurd learning rate; its data set is gone."""
    folder = tmp_path_factory.mktemp("exploded")
    dataset = write_tiny_dataset(folder / "tiny")
    write_material(folder / "tiny")
    path, message = diverge(
        dataset, folder / "runs", lr0=1e30, optimizer="SGD", synthetic_ratio=4.0
    )
    assert f"hsrloop replay {path}" in message and "8 steps in a row had no finite" in message
    shutil.rmtree(dataset.parent)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def test_it_happens_again_without_the_data_set(exploded: Path, tmp_path: Path) -> None:
    sheet, file = tmp_path / "sheet.png", tmp_path / "all.json"
    done = run(exploded, "--sheet", sheet, "--json", file)
    assert done.exit_code == 0, done.output
    assert "It happens again, bit by bit." in done.output
    picture = cv2.imread(str(sheet))
    assert picture is not None and picture.shape == (64, 4 * 64, 3)
    told = json.loads(file.read_text())
    assert told["reproduces"] and told["now"] == told["recorded"]
    assert told["now"]["norm"] is None and told["now"]["first_output"].startswith("model.")
    assert told["now"]["before"] is not None, "some layers still gave numbers"
    assert len(told["images"]) == 4
    used = {str(layer["source"]) for image in told["images"] for layer in image["plan"]["layers"]}
    assert used <= set(told["sources"])
    assert any(image["plan"]["pastes"] for image in told["images"])
    names = {Path(source["path"]).name for source in told["sources"].values()}
    assert all(name in done.output for name in sorted(names)[:1])


def test_in_other_precision_or_elsewhere_the_same_must_not_be_finite(exploded: Path) -> None:
    capsule = read(exploded)
    other = Capsule(**{**_fields(capsule), "versions": {**capsule.versions, "torch": "1.0"}})
    replayed = replay(other)
    assert replayed.differences[0].startswith("torch 1.0 then")
    assert replayed.equal and replayed.reproduces


def _fields(capsule: Capsule) -> dict[str, Any]:
    return {name: getattr(capsule, name) for name in Capsule.__dataclass_fields__}


@pytest.mark.parametrize("part", ["weights", "images", "mode"])
def test_another_step_is_told_from_the_recorded_one(exploded: Path, part: str) -> None:
    """Every loss is NaN in both: the layers that still gave numbers tell."""
    capsule = copy.deepcopy(read(exploded))
    fields = _fields(capsule)
    if part == "weights":
        first = next(iter(capsule.state["model"].values()))
        first.neg_()
    elif part == "images":
        capsule.batches[0].images[0] ^= 1
    else:  # BatchNorm in eval mode
        fields["state"] = {**capsule.state, "rung": {**capsule.state["rung"], "micro_batch": 1}}
    replayed = replay(Capsule(**fields))
    assert not replayed.equal and not replayed.reproduces


@pytest.fixture(scope="module")
def injected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    """Return a capsule of steps with finite losses and an infinite gradient, and what they gave."""
    folder = tmp_path_factory.mktemp("injected")
    dataset = write_tiny_dataset(folder / "tiny")
    real, seen = step_module.forward_backward, []

    def poisoned(state: TrainState, batch: Batch, settings: StepSettings) -> LossSums:
        sums = real(state, batch, settings)
        if state.steps >= 1:
            seen.append([float(term.detach()) for term in (sums.box, sums.cls, sums.dfl)])
            weight = state.model.get_parameter("model.4.cv1.conv.weight")
            assert weight.grad is not None
            weight.grad[(0,) * weight.dim()] = float("inf")
        return sums

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step_module, "forward_backward", poisoned)
        patched.setattr(guard, "IN_A_ROW", 1)
        path, _ = diverge(dataset, folder / "runs")
    return path, dataset, seen


def test_it_holds_the_step_as_it_was(injected: Any) -> None:
    path, dataset, seen = injected
    capsule = read(path)
    *_, before_last, last = seen[:-2]  # of the step; it is taken once more for the file
    recorded = [capsule.measured.box, capsule.measured.cls, capsule.measured.dfl]
    assert recorded == pytest.approx([a + b for a, b in zip(before_last, last, strict=True)], 1e-6)
    assert capsule.measured.norm == math.inf
    assert capsule.measured.first_gradient == "model.4.cv1.conv.weight"
    assert capsule.state["position"] == [0, 4] and capsule.state["steps"] == 1
    refs = load_dataset(dataset).train
    loader = TrainLoader(refs, ImageStore(refs, imgsz=64), capsule.config)
    batches = list(loader.batches(Position(0, 4), mosaic=True))[:2]
    for ours, theirs in zip(capsule.batches, batches, strict=True):
        for name in ("images", "boxes_cxcywh", "labels", "image_index"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert (ours.after, ours.ends_step) == (theirs.after, theirs.ends_step)
    order = loader.stream.order(0)[4:8]
    plans = [loader.stream.plan(0, int(i), mosaic=True) for i in order]
    assert [plan["zoom"] for plan in capsule.plans] == [plan.zoom for plan in plans]
    for plan in plans:
        assert plan.mix is not None
        for layer in (*plan.layers, *plan.mix.layers):
            assert capsule.sources[layer.source]["path"] == str(refs[layer.source].path)


def test_its_state_is_that_of_a_run_which_stopped_before(injected: Any, tmp_path: Path) -> None:
    """Three rollbacks left an eighth of the learning rate."""
    path, dataset, _ = injected
    settings = run_settings(dataset, tmp_path, **{**SHAPE, "lr0": 0.001 / 8})
    stopped = state_of(train(settings, stop=lambda: True).run_dir)
    kept = dict(read(path).state)
    for name in ("model", "ema", "loss_sums", "position", "steps", "torch_rng"):
        assert differences(kept[name], stopped[name]) == [], name
    assert differences(kept["optimizer"]["state"], stopped["optimizer"]["state"]) == []


def test_a_loss_scale_that_was_too_high_is_the_one_in_the_file(tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "tiny")
    refs = load_dataset(dataset).train
    config = TrainConfig(batch=4, imgsz=32, model="yolov8n.yaml")
    module = load_base("yolov8n.yaml", names=NAMES, seed=0).module
    state = build_state(config, module, CPU, fresh_share=None, amp=True)
    settings = StepSettings(
        device=CPU, strides=(8, 16, 32), reg_max=16, amp=True, ema_decay=0.9, ema_tau=10.0
    )
    loader = TrainLoader(refs, ImageStore(refs, imgsz=32), config)
    batches = list(loader.batches(Position(0, 0)))[:1]
    transaction = Transaction(state)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1e30})
    set_modes(state, config)
    transaction.begin()
    train_step(state, batches, settings=settings, lr=0.001, transaction=transaction)
    assert state.scaler.get_scale() == pytest.approx(5e29)
    identity = RunIdentity(
        config=config, sources={}, names=NAMES, fingerprint="", versions=versions(),
        threads=torch.get_num_threads(), fresh_share=None,
    )  # fmt: skip
    diverged(
        state, transaction, LastStep(Position(0, 0), batches, True, 0.001), cause="as a test",
        run_dir=tmp_path, identity=identity, settings=settings, loader=loader,
    )  # fmt: skip
    path = tmp_path / "capsule_000001.pt"
    assert read(path).state["scaler"]["scale"] == pytest.approx(1e30)
    assert run(path).exit_code == 0
    in_float32 = run(path, "--float32")
    assert in_float32.exit_code == 1
    assert "does not happen again (mixed precision then, float32 now)" in in_float32.output


def test_what_does_not_happen_again_is_said(injected: Any) -> None:
    """The infinity came from outside: without it the step is sound."""
    path, _, _ = injected
    done = run(path)
    assert done.exit_code == 1 and "It does not happen again." in done.output
    assert path.with_suffix(".png").is_file()
    replayed = replay(read(path))
    assert math.isfinite(replayed.measured.norm) and replayed.measured.first_gradient == ""
    assert replayed.measured.cls == read(path).measured.cls
    assert set(replayed.norms) == {"weights", "norms", "biases"}


def test_a_disk_that_is_full_does_not_hide_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("cannot write capsule: No space left on device.")

    monkeypatch.setattr(capsule_module, "write_atomically", full)
    dataset = write_tiny_dataset(tmp_path / "tiny")
    settings = run_settings(dataset, tmp_path / "runs", lr0=1e30, optimizer="SGD", epochs=1)
    with pytest.raises(DivergedError, match=r"too large.*could not be kept: .*No space left"):
        train(settings)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda c: {"model": 1}, CheckpointError, "is no capsule of this version"),
        (lambda c: {**c, "hsrloop_capsule": 3}, CheckpointError, "is no capsule"),
        (lambda c: _without(c, "plans"), CheckpointError, "incomplete capsule"),
        (lambda c: _without(c, "measured"), CheckpointError, "incomplete capsule"),
        (lambda c: {"code": _Evil()}, WeightsError, "was not opened"),
    ],
)
def test_a_file_that_is_no_capsule_is_refused(
    spoil: Callable[[Any], Any], error: type[Exception], message: str,
    exploded: Path, tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "capsule.pt"
    torch.save(spoil(torch.load(exploded, weights_only=True)), path)
    with pytest.raises(error, match=message):
        read(path)
    done = run(path)
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1


def _without(content: Any, name: str) -> Any:
    inside = dict(content["hsrloop_capsule"])
    del inside[name]
    return {"hsrloop_capsule": inside}


class _Evil:
    def __reduce__(self) -> Any:
        return (eval, ("1 / 0",))


def test_a_blueprint_rebuilds_what_a_file_differs_in() -> None:
    source = load_base("yolov8n.yaml", names=[f"c{i}" for i in range(90)], seed=1).module
    for part in source.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps, part.momentum = 0.002, 0.07
    stem: Any = source.get_submodule("model.0")
    stem.act = torch.nn.Identity()
    plan = json.loads(json.dumps(blueprint(source)))
    built = from_blueprint(plan, names=("a", "b"))
    assert blueprint(built) == plan
    assert head(built).cv3[0][0].conv.out_channels == 90 == head(source).cv3[0][0].conv.out_channels
    assert head(built).cv3[0][2].out_channels == 2
    with pytest.raises(WeightsError, match="no YOLOv8 detector is built like that"):
        from_blueprint({**plan, "activations": {}}, names=("a",))


def test_a_trace_names_the_first_layer_and_the_first_gradient() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    last: Any = network[2]
    with torch.no_grad():
        last.weight.fill_(float("inf"))
    with traced(network) as trace:
        network(torch.ones(1, 2)).sum().backward()
    assert trace.output == "2 (Linear)" and trace.gradient == "1 (ReLU)"
    assert math.isfinite(trace.before)
    with traced(network):
        pass
    assert not any(part._forward_hooks for part in network.modules())
