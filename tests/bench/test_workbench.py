"""What stands on the bench: compiled steps stay compiled, an untrained head is as quiet as any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from hsrloop.bench.bare import bare_forward
from hsrloop.bench.measures import waits_of_a_step
from hsrloop.bench.workbench import workbench
from hsrloop.config import Resolved, resolve
from hsrloop.events import Event
from hsrloop.records import LevelLogits
from hsrloop.train.compiled import Compiled
from hsrloop.train.detector import CONF, Detector


@pytest.fixture
def asked(tiny_dataset: Path) -> Resolved:
    values = {"dataset": str(tiny_dataset), "model": "yolov8n.yaml", "imgsz": 64, "batch": 2}
    return resolve([("test", {**values, "device": "cpu"})])


def ignore(_: Event) -> None:
    pass


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_step_is_not_watched_by_operator_and_stays_compiled(asked: Resolved) -> None:
    runs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    compiled = Compiled(backend=backend)  # type: ignore[arg-type]
    compiled.start()
    compiled.micro_batch = 2
    with workbench(asked, ignore) as bench:
        bench = replace(bench, settings=replace(bench.settings, compiled=compiled))
        batches = bench.first_step()
        bench.step(batches)
        before = len(runs)
        assert before
        assert waits_of_a_step(bench, batches) is None, "on the CPU nothing else can count them"
        assert len(runs) == 3 * before
    torch._dynamo.reset()


def test_a_bare_forward_pass_is_that_of_a_validation(asked: Resolved) -> None:
    with workbench(asked, ignore) as bench:
        detector = Detector.of(bench.state.ema.module, bench.device, half=False)
        (batch,) = list(bench.loaders.val)[:1]
        levels = bare_forward(bench, detector.module, detector.inputs(batch.images))()
        assert isinstance(levels, LevelLogits)
        assert not any(logits.requires_grad for logits in (*levels.boxes, *levels.classes))


def test_an_untrained_network_finds_no_more_candidates_than_a_trained_one(
    asked: Resolved,
) -> None:
    with workbench(asked, ignore) as bench:
        for module in (bench.state.model, bench.state.ema.module):
            detector = Detector.of(module, bench.device, half=False)
            (batch,) = list(bench.loaders.val)[:1]
            _, scores = detector._predicted(batch.images)
            assert (scores > CONF).float().mean() < 0.01
