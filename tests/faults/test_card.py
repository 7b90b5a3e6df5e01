"""A card that is too small, or becomes so: the ladder walks as far as it must, and no further.

The oracle is always the run that was planned to change its settings at that place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsrloop.bench.measures import said_of
from hsrloop.bench.workbench import workbench
from hsrloop.config import Resolved, resolve
from hsrloop.errors import ResourceError
from hsrloop.events import Note, Recovered
from hsrloop.records import DeviceInfo, Rung
from hsrloop.train import build, compiled, ladder, pace, recovery, step, validation
from hsrloop.train.compiled import Compiled
from hsrloop.train.detector import Detector
from hsrloop.train.run import train
from hsrloop.train.validation import validate
from tests.conftest import write_tiny_dataset
from tests.faults.conftest import Card, gpu_error, host_error
from tests.train.conftest import Recorder, run_settings
from tests.train.test_resume import StopAfter, differences, state_of

Settings = Callable[..., Resolved]
Insert = Callable[[Card], Card]
SIZES = (96, 64)
# 16 images in batches of 8: two passes an epoch; the loop asks whether to stop after each step
# and after the one validation batch.
SHAPE = {"epochs": 2, "batch": 8, "imgsz": 128}
LADDER = ((8, 128), (4, 128), (4, 96), (4, 64), (2, 64), (1, 64))


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "SIZES", SIZES)  # so that all rungs are cheap


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("card") / "tiny", train=16)


@pytest.fixture
def settings(dataset: Path, tmp_path: Path) -> Settings:
    return lambda **changes: run_settings(dataset, tmp_path / "runs", **{**SHAPE, **changes})


def end_of(run_dir: Path) -> dict[str, Any]:
    return {k: v for k, v in state_of(run_dir).items() if k != "recoveries"}


def planned(
    settings: Settings, rung: tuple[int, int], questions: int | None, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Return the end of the run that was told to stand on a rung from a point on.

    Args:
        questions: answered before it stops and goes on; None: it stood there from the start.
    """

    def on_rung(real: Rung) -> Rung:
        return dataclasses.replace(real, micro_batch=rung[0], imgsz=rung[1])

    if questions is None:
        first = build.first_rung
        patch.setattr(build, "first_rung", lambda config: on_rung(first(config)))
        return end_of(train(settings()).run_dir)
    last = train(settings(), stop=StopAfter(questions)).run_dir / "weights" / "last.pt"
    content = torch.load(last, weights_only=False)
    state = content["hsrloop"]["state"]
    state["rung"] = dataclasses.asdict(on_rung(Rung(**state["rung"])))
    state["recoveries"] = [{"rung": state["rung"], "change": "planned", "epoch": 0}]
    torch.save(content, last)
    return end_of(train(resolve([]), resume=last).run_dir)


def just_fits(rung: int) -> float:
    return Card.needs(*LADDER[rung])


@pytest.mark.parametrize(
    ("when", "rung", "questions"),
    [
        (0, 3, None),  # the first step
        (2, 4, 2),  # the first step after a validation
        (3, 2, 3),  # the last step of the last epoch
    ],
)
def test_a_neighbour_takes_memory_and_the_run_ends_as_planned(
    when: int,
    rung: int,
    questions: int | None,
    settings: Settings,
    insert: Insert,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roomy = just_fits(0)
    card = insert(Card(roomy, {when: roomy - just_fits(rung)}))
    outcome = train(settings(), sinks=[recorder])
    monkeypatch.undo()
    assert outcome.reason == "completed"
    assert card.refused == list(LADDER[:rung])  # one try on each rung, from the top
    assert len(recorder.of(Recovered)) == rung
    assert card.trained[-1] == LADDER[rung]
    oracle = planned(settings, LADDER[rung], questions, monkeypatch)
    assert differences(end_of(outcome.run_dir), oracle) == []


def test_two_neighbours_one_after_the_other(
    settings: Settings, insert: Insert, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = just_fits(0)
    # The first pass at micro-batch 4 is number 2, since number 1 was refused.
    takes = {1: roomy - just_fits(1), 3: just_fits(1) - just_fits(5)}
    card = insert(Card(roomy, takes))
    outcome = train(settings(), sinks=[recorder])
    assert outcome.reason == "completed"
    assert card.refused == list(LADDER[:5])
    # Half of the step was done at 128 px: it was undone, and all of it was done again at 64 px.
    assert card.trained[:2] == [LADDER[0], LADDER[1]]
    assert card.trained[2:] == [LADDER[5]] * (3 * 8)
    assert {event.sample for event in recorder.of(Recovered)} == {8}
    monkeypatch.undo()
    assert differences(end_of(outcome.run_dir), planned(settings, LADDER[5], 0, monkeypatch)) == []


def test_the_last_words_name_who_holds_the_memory(
    settings: Settings, insert: Insert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "gpu_neighbours", lambda uuid: ((4711, 3 * 2**30),))
    insert(Card(just_fits(5) - 1))
    with pytest.raises(ResourceError) as raised:
        train(settings())
    words = str(raised.value)
    for expected in (
        "tried: micro_batch 8 -> 4, imgsz 128 -> 96, imgsz 96 -> 64, micro_batch 4 -> 2,",
        "process 4711 3072 MiB",
        "Use a smaller model",
    ):
        assert expected in words


GPU = DeviceInfo(kind="cuda", name="Card", total_bytes=8 * 2**30, free_bytes=2 * 2**30)


@pytest.mark.parametrize(
    ("error", "info", "others", "said"),
    [
        (gpu_error, GPU, ((4711, 3 * 2**30),), "on Card: process 4711 3072 MiB; end them. Use a"),
        (gpu_error, GPU, (), "it could take 2.0 of the 8.0 GiB of Card; see nvidia-smi"),
        (gpu_error, dataclasses.replace(GPU, free_bytes=8 * 2**30), (), "GiB.). Use a smaller mod"),
        (host_error, GPU, (), "End other programs"),
    ],
)
def test_a_network_that_finds_no_room_is_said_in_one_line(
    error: Callable[[], Exception],
    info: DeviceInfo,
    others: tuple[tuple[int, int], ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "gpu_neighbours", lambda uuid: others)
    began = pytest.raises(ResourceError, match="ran out before training began")
    with began as raised, recovery.must_fit(info):
        raise error()
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_says_so_before_it_makes_its_folder(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise gpu_error()

    monkeypatch.setattr(build, "build_state", full)
    with pytest.raises(ResourceError, match="GPU memory ran out before training began"):
        train(settings())
    assert not list((tmp_path / "runs").glob("*/weights"))


def test_other_errors_of_building_are_raised_untouched() -> None:
    with pytest.raises(ZeroDivisionError), recovery.must_fit(GPU):
        raise ZeroDivisionError


def test_a_rehearsal_finds_the_rung_before_the_first_step_and_the_next_run_knows_it(
    settings: Settings,
    insert: Insert,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    card = insert(Card(just_fits(2)))
    outcome = train(settings(rehearsal="always", epochs=1), sinks=[recorder])
    found = recorder.of(Recovered)
    assert [event.change for event in found] == ["micro_batch 8 -> 4", "imgsz 128 -> 96"]
    assert all(event.rehearsed and event.sample == event.epoch == 0 for event in found)
    assert "CUDA out of memory" in found[0].reason
    assert card.refused == list(LADDER[:2])
    assert card.trained == [LADDER[2]] * (2 + 4)  # a step's two micro-batches, then the epoch
    assert outcome.result is not None and outcome.result["imgsz_trained"] == [128, 96]

    again = Recorder()
    second = train(settings(rehearsal="always", epochs=1), sinks=[again])
    assert card.refused == list(LADDER[:2]) and len(card.trained) == 2 + 4 + 4
    assert [event.change for event in again.of(Recovered)] == [
        "micro_batch 8 -> 4, imgsz 128 -> 96"
    ]
    assert differences(end_of(second.run_dir), end_of(outcome.run_dir)) == []


def test_a_rehearsal_shrinks_validation_on_its_own(
    settings: Settings,
    insert: Insert,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    card = insert(Card(just_fits(0), eval_share=2))
    train(settings(rehearsal="always", epochs=1), sinks=[recorder])
    assert [event.change for event in recorder.of(Recovered)] == ["val_batch 8 -> 4"]
    assert set(card.trained) == {LADDER[0]} and recorder.of(Recovered)[0].rehearsed


def test_a_benchmark_measures_what_would_train(
    settings: Settings,
    insert: Insert,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    card = insert(Card(just_fits(2)))
    with workbench(settings(rehearsal="always"), recorder.handle) as bench:
        assert said_of(bench)["micro_batch"] == LADDER[2][0]
        assert said_of(bench)["imgsz"] == LADDER[2][1]
        batches = bench.first_step()
        assert batches[0].images.shape[-1] == LADDER[2][1]
        bench.step(batches)
    assert card.refused == list(LADDER[:2])
    assert [event.change for event in recorder.of(Recovered)][:1] == ["micro_batch 8 -> 4"]


@pytest.mark.parametrize("known", [False, True], ids=["rehearsed", "known to fit"])
def test_a_benchmark_is_in_the_modes_of_the_rung(
    known: bool,
    settings: Settings,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few images at a time leave BatchNorm its statistics; what is compiled knows how many."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = step.forward_train

    def limited(module: Any, images: Tensor) -> Any:
        if len(images) > 1 or images.shape[-1] > 64:
            raise gpu_error()
        return real(module, images)

    asked = settings(rehearsal="always", imgsz=64, batch=8, micro_batch=2)
    for module in (step, compiled):
        monkeypatch.setattr(module, "forward_train", limited)
    monkeypatch.setattr(build, "compiled_for", lambda config, device: Compiled())
    for _ in range(1 + known):
        with workbench(asked, recorder.handle) as bench:
            norms = [m for m in bench.state.model.modules() if isinstance(m, nn.BatchNorm2d)]
            assert bench.state.rung.micro_batch == 1
            assert not any(norm.training for norm in norms)
            made = bench.settings.compiled
            assert made is not None and made.micro_batch == 1


def test_a_benchmark_closes_loaders_that_were_of_no_use(
    settings: Settings, insert: Insert, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, closed, close = [], [], build.Loaders.__exit__
    real = build.build_loaders
    monkeypatch.setattr(
        build, "build_loaders", lambda *given: made.append(real(*given)) or made[-1]
    )
    monkeypatch.setattr(
        build.Loaders, "__exit__", lambda self, *why: closed.append(self) or close(self, *why)
    )
    insert(Card(just_fits(2)))
    with workbench(settings(rehearsal="always"), recorder.handle):
        assert len(made) == 3 and closed == made[:2]
    assert closed == made


def test_a_network_that_finds_no_room_on_the_bench_is_said_in_one_line(
    settings: Settings, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise gpu_error()

    monkeypatch.setattr(build, "build_state", full)
    with (
        pytest.raises(ResourceError, match="^GPU memory ran out before training began"),
        workbench(settings(), recorder.handle),
    ):
        pass


def test_a_benchmark_chooses_the_micro_batch_where_it_is_asked_to(
    settings: Settings, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "rate", lambda rehearsal, size, *_: 1.0 if size == 4 else 0.5)
    with workbench(settings(micro_batch="auto"), recorder.handle) as bench:
        assert said_of(bench)["micro_batch"] == 4
    assert any("micro_batch 4 is chosen" in note.text for note in recorder.of(Note))


def test_memory_that_runs_out_in_a_benchmark_is_one_line(
    settings: Settings, recorder: Recorder
) -> None:
    with (
        pytest.raises(ResourceError, match=r"^GPU memory ran out while measuring \(CUDA out"),
        workbench(settings(), recorder.handle),
    ):
        raise gpu_error()


def test_validating_alone_gives_way_with_its_batch(
    settings: Settings, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, find, limit = [], Detector.find, 2

    def small(self: Detector, images: Tensor, **how: Any) -> Any:
        sizes.append(len(images))
        if len(images) > limit:
            raise gpu_error()
        return find(self, images, **how)

    best = str(train(settings(epochs=1)).run_dir / "weights" / "best.pt")
    freed: list[int] = []
    monkeypatch.setattr(validation, "release_gpu_memory", lambda: freed.append(1))
    plain = validate(settings(model=best))
    monkeypatch.setattr(Detector, "find", small)
    found = validate(settings(model=best), sinks=[recorder])
    assert found is not None and plain is not None and found.ap50 == plain.ap50
    assert sizes == [4, 4, 2, 2] and len(freed) == 2
    said = [note.text for note in recorder.of(Note) if "GPU memory" in note.text]
    assert [text.rpartition(": ")[2] for text in said] == ["batch 8 -> 4", "batch 4 -> 2"]
    limit = 0
    with pytest.raises(ResourceError, match="^GPU memory ran out while validating") as raised:
        validate(settings(model=best))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "refused", "tries", "says"),
    [
        (host_error(), 0, 1, "^main memory ran out while validating"),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR"), 1, 4, "^GPU memory ran out while validating"),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR"), 0, 1, "CUDNN_STATUS"),
    ],
)
def test_validating_gives_way_for_gpu_memory_alone(
    error: Exception,
    refused: int,
    tries: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What cuDNN says vaguely counts where the allocator had to refuse."""
    asked: list[int] = []
    monkeypatch.setattr(
        validation, "refused_allocations", lambda: refused * len(asked), raising=True
    )
    monkeypatch.setattr(recovery, "refused_allocations", lambda: refused * len(asked))

    def attempt(batch: int) -> None:
        asked.append(batch)
        raise error

    with (
        pytest.raises((ResourceError, RuntimeError), match=says),
        recovery.must_fit(GPU, when="while validating"),
    ):
        validation._at_what_fits(attempt, 8, lambda event: None)
    assert asked == [8, 4, 2, 1][:tries]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rehearsal", ["never", "auto"])
def test_a_real_card_with_less_memory(
    rehearsal: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on a GPU, with the allocator's own error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shape = {"epochs": 2, "batch": 16, "imgsz": 640, "device": "cuda", "rehearsal": rehearsal}
    shape["cuda_graphs"] = False  # whose memory would be the first to go
    torch.cuda.reset_peak_memory_stats()
    train(run_settings(dataset, tmp_path / "roomy", **shape))
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing known"))
    recorder = Recorder()
    torch.cuda.set_per_process_memory_fraction(0.4 * peak / total)
    try:
        outcome = train(run_settings(dataset, tmp_path / "tight", **shape), sinks=[recorder])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = recorder.of(Recovered)
    assert outcome.reason == "completed" and found
    assert all(event.cause == "GPU memory" for event in found)
    assert "CUDA out of memory" in found[0].reason
    if rehearsal == "auto":
        assert all(event.rehearsed and event.sample == event.epoch == 0 for event in found)
