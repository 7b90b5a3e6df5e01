"""Weights that are cast all at once: for the time being, and as they are then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hsrloop.train.halves import Halves


def net() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    module[2].requires_grad_(False)
    return module.to(memory_format=torch.channels_last)


def test_convolutions_compute_with_casts_of_what_weights_are_by_then() -> None:
    module = net()
    parameters = list(module.parameters())
    halves = Halves(module, torch.bfloat16)
    with torch.no_grad():
        parameters[0].mul_(3)
    with halves.instead():
        casts = [module[0].weight, module[2].weight, module[2].bias]
        assert module[1].weight is parameters[1]
    wide = [module[0].weight, module[2].weight, module[2].bias]
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    for cast, weight in zip(casts, wide, strict=True):
        assert cast.dtype is torch.bfloat16 and torch.equal(cast, weight.bfloat16())
        assert cast.stride() == weight.stride()
    assert [cast.requires_grad for cast in casts] == [True, False, False]
    leaves = halves.leaves(parameters)
    assert leaves[0] is casts[0] and leaves[1] is parameters[1] and leaves[3] is casts[1]


def test_weights_are_back_after_an_error_too() -> None:
    module = net()
    own = module[0].weight
    with pytest.raises(ZeroDivisionError), Halves(module, torch.float16).instead():
        assert module[0].weight is not own
        raise ZeroDivisionError
    assert module[0].weight is own
    assert [name for name, _ in module.named_parameters()][:1] == ["0.weight"]


def test_gradients_are_widened_in_their_places() -> None:
    given = [torch.ones(2).half(), torch.ones(3), torch.full((1,), 0.1).half()]
    found = Halves.widened(given, [torch.zeros(2), torch.zeros(3), torch.zeros(1)])
    assert [g.dtype for g in found] == [torch.float32] * 3
    assert found[1] is given[1]
    assert all(torch.equal(a, b.float()) for a, b in zip(found, given, strict=True))
