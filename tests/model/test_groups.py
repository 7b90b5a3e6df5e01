"""Parameter groups: every parameter once, rates by depth; optimizer state made ahead of time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hsrloop.errors import ConfigError
from hsrloop.model import groups as g
from hsrloop.model import yolo


@pytest.fixture
def module(nano: nn.Module) -> nn.Module:
    return copy.deepcopy(nano)


@pytest.mark.parametrize("rate", [None, 1.0, 0.9])
@pytest.mark.parametrize("head_lr_scale", [None, 5.0])
def test_each_trainable_parameter_is_in_one_group(module, rate, head_lr_scale) -> None:
    made = g.parameter_groups(
        module, lr0=0.01, weight_decay=0.1, llrd_rate=rate, head_lr_scale=head_lr_scale
    )
    listed = [id(p) for group in made for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for n, p in module.named_parameters() if "dfl" not in n}
    names = {id(p): n for n, p in module.named_parameters()}
    for group in made:
        assert group["lr"] == pytest.approx(0.01 * group["lr_scale"])
        assert group["weight_decay"] == (0.1 if group["kind"] == "weights" else 0.0)
        for p in group["params"]:
            norm = ".bn." in names[id(p)]
            kind = "norms" if norm else "biases" if names[id(p)].endswith("bias") else "weights"
            assert group["kind"] == kind
    assert len({group["name"] for group in made}) == len(made)


def test_rates_fall_from_the_head_to_the_stem(module: nn.Module) -> None:
    made = g.parameter_groups(module, lr0=1.0, weight_decay=0.0, llrd_rate=0.9)
    by_module = {group["module"]: group["lr_scale"] for group in made}
    assert by_module[0] == pytest.approx(0.0985, abs=5e-5)
    assert by_module[22] == 1.0
    assert all(scale == pytest.approx(0.9 ** (22 - i)) for i, scale in by_module.items())


def test_rate_one_equals_no_decay(module: nn.Module) -> None:
    flat = g.parameter_groups(module, lr0=1.0, weight_decay=0.0)
    assert [group["name"] for group in flat] == ["weights", "norms", "biases"]
    layered = g.parameter_groups(module, lr0=1.0, weight_decay=0.0, llrd_rate=1.0)
    assert {group["lr_scale"] for group in layered} == {1.0}


def test_class_outputs_take_the_head_scale(module: nn.Module) -> None:
    made = g.parameter_groups(module, lr0=1.0, weight_decay=0.0, lr_scale=0.5, head_lr_scale=4.0)
    assert {group["lr_scale"] for group in made} == {0.5, 4.0}
    raised = {id(p) for group in made if group["lr_scale"] == 4.0 for p in group["params"]}
    assert raised == {id(p) for out in yolo.class_outputs(module) for p in out.parameters()}


@pytest.mark.parametrize("freeze", [0, 10, 22])
def test_frozen_layers_are_not_trained(module: nn.Module, freeze: int) -> None:
    made = g.parameter_groups(module, lr0=1.0, weight_decay=0.0, freeze=freeze)
    listed = {id(p) for group in made for p in group["params"]}
    for name, p in module.named_parameters():
        trained = int(name.split(".")[1]) >= freeze and "dfl" not in name
        assert p.requires_grad is trained and (id(p) in listed) is trained
    g.parameter_groups(module, lr0=1.0, weight_decay=0.0)
    assert next(module.parameters()).requires_grad, "freezing is undone by the next call"


@pytest.mark.parametrize("freeze", [-1, 23])
def test_freezing_everything_is_an_error(module: nn.Module, freeze: int) -> None:
    with pytest.raises(ConfigError, match=f"freeze is {freeze}; it must be from 0 to 22"):
        g.parameter_groups(module, lr0=1.0, weight_decay=0.0, freeze=freeze)


def test_table_counts_parameters(module: nn.Module) -> None:
    table = g.groups_table(g.parameter_groups(module, lr0=1.0, weight_decay=0.1))
    assert set(table[0]) == {"name", "lr_scale", "weight_decay", "parameters"}
    counted = sum(row["parameters"] for row in table)
    assert counted == sum(p.numel() for p in module.parameters()) - 16


def test_unknown_optimizer(module: nn.Module) -> None:
    made = g.parameter_groups(module, lr0=1.0, weight_decay=0.0)
    with pytest.raises(ConfigError, match="optimizer is Lion"):
        g.build_optimizer("Lion", made, momentum=0.9)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_state_made_ahead_changes_nothing(name: str) -> None:
    results = []
    for ahead in (False, True):
        model = small()
        before = copy.deepcopy(model.state_dict())
        made = [{"params": list(model.parameters()), "lr": 0.01, "weight_decay": 0.1, "name": "x"}]
        optimizer = g.build_optimizer(name, made, momentum=0.9)
        if ahead:
            g.materialise_state(optimizer)
            assert len(optimizer.state) == 6
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            assert all(p.grad is None for p in model.parameters())
            assert all(float(s.get("step", 0)) == 0 for s in optimizer.state.values())
            assert optimizer.param_groups[0]["lr"] == 0.01
        x = torch.randn(5, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        for images in x:
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
        results.append((copy.deepcopy(model.state_dict()), optimizer.state_dict()["state"]))
    (weights, state), (weights_ahead, state_ahead) = results
    assert all(torch.equal(v, weights_ahead[k]) for k, v in weights.items())
    assert all(torch.equal(v, state_ahead[i][k]) for i, s in state.items() for k, v in s.items())


def test_existing_state_is_left_alone() -> None:
    model = small()
    optimizer = g.build_optimizer("AdamW", [{"params": list(model.parameters())}], momentum=0.9)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    g.materialise_state(optimizer)
    assert all(float(s["step"]) == 1 for s in optimizer.state.values())
    assert all(p.grad is not None for p in model.parameters())
