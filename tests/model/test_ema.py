"""The averaged weights follow the formula, in place."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hsrloop.model.ema import Ema


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_floats_are_averaged_and_integers_copied() -> None:
    model, ema = net(), Ema(net())
    start = copy.deepcopy(ema.module.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model(torch.randn(5, 3))  # moves the running statistics and their counter
    tensors = [t.data_ptr() for t in ema.module.state_dict().values()]
    ema.update(model, 0.75)
    for name, value in ema.module.state_dict().items():
        theirs = model.state_dict()[name]
        expected = 0.75 * start[name] + 0.25 * theirs if value.is_floating_point() else theirs
        torch.testing.assert_close(value, expected)
    assert ema.updates == 1
    assert tensors == [t.data_ptr() for t in ema.module.state_dict().values()]
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def test_the_ends_of_the_decay() -> None:
    model, ema = net(1), Ema(net(0))
    start = copy.deepcopy(ema.module.state_dict())
    ema.update(model, 1.0)
    assert all(torch.equal(v, start[k]) for k, v in ema.module.state_dict().items())
    ema.update(model, 0.0)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in ema.module.state_dict().items())


def test_state_goes_round() -> None:
    ema = Ema(net(0))
    ema.update(net(1), 0.5)
    other = Ema(net(2))
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert other.updates == 1
    ema.update(net(3), 0.9)
    other.update(net(3), 0.9)
    for ours, theirs in zip(ema.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
