"""Profile a few early steps of a run: a trace for TensorBoard's profiler tab, and a short text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from hsrloop.events import Event, Note
from hsrloop.ops.ranges import RANGES
from hsrloop.report.files import replace_text

SKIPPED, WARM, RECORDED = 3, 1, 3  # steps: caches fill, the profiler settles, what is kept
TOP = 10
_STEP = "ProfilerStep*"  # torch's name for what lies between two calls of `step`
_SHOWN = {"render": "  of it render"}  # which is done while data is made, where the CPU does it


class StepProfiler:
    """Records a few steps; `step` after each, `close` at the end. Later steps cost nothing.

    Args:
        folder: of the run; the trace goes to its tensorboard/, the text to profile.txt.
        device: of the run.
        emit: told where both lie.
    """

    def __init__(self, folder: Path, device: torch.device, emit: Callable[[Event], None]) -> None:
        self._folder, self._emit = folder, emit
        self._cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile: Any = profile(
            activities=activities,
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM, active=RECORDED, repeat=1),
            on_trace_ready=self._ready,
            acc_events=True,  # without it torch 2.11 warns of later cycles, which there are not
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )
        self._seen = 0
        self.written = False  # whole
        self._profile.start()

    def step(self) -> None:
        """Count an optimizer step."""
        if self._profile is None:
            return
        self._seen += 1
        self._profile.step()
        if self._seen == SKIPPED + WARM + RECORDED:
            self.close()

    def close(self) -> None:
        """End the recording, also when fewer steps were taken; a second call does nothing."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        if self._seen <= SKIPPED + WARM:
            text = f"nothing was profiled: that takes {SKIPPED + WARM + 1} steps"
            self._emit(Note(text=text, level="warning"))

    def _ready(self, recorded: Any) -> None:
        try:
            self._write(recorded)
        except OSError as error:  # a full disk ends no run
            text = f"the profile cannot be written ({error.strerror})"
            self._emit(Note(text=text, level="warning"))

    def _write(self, recorded: Any) -> None:
        traces = self._folder / "tensorboard"
        traces.mkdir(exist_ok=True)  # the handler below would raise another error
        tensorboard_trace_handler(str(traces))(recorded)
        steps = min(self._seen - SKIPPED - WARM, RECORDED)
        text = summary(recorded.key_averages(), steps=max(steps, 1), cuda=self._cuda)
        replace_text(self._folder / "profile.txt", text)
        self.written = True
        self._emit(Note(text=f"profiled {max(steps, 1)} steps:\n{text}"))


def summary(averages: Sequence[Any], *, steps: int, cuda: bool) -> str:
    """Return the named ranges in their order, then the operators that took most time themselves.

    Args:
        averages: of torch's profiler, one for each name.
        steps: that were recorded.
        cuda: rank by time on the GPU, and show it.
    """
    own = {a.key: a for a in averages}
    lines = [f"{'ms a step':<44}{'host':>10}" + (f"{'GPU':>10}" if cuda else "")]
    lines += [_line("step", a, steps, cuda, whole=True) for a in averages if a.key == _STEP]
    for name in RANGES:
        if name in own:
            lines.append(_line(_SHOWN.get(name, name), own[name], steps, cuda, whole=True))
    skipped = {*RANGES, *(a.key for a in averages if a.key.startswith("ProfilerStep"))}
    operators = [a for a in averages if a.key not in skipped]
    operators.sort(key=lambda a: -(a.self_device_time_total if cuda else a.self_cpu_time_total))
    lines += ["", f"the {TOP} operators that took most time themselves"]
    lines += [_line(a.key, a, steps, cuda, whole=False) for a in operators[:TOP]]
    return "\n".join(lines) + "\n"


def _line(name: str, average: Any, steps: int, cuda: bool, *, whole: bool) -> str:
    host = average.cpu_time_total if whole else average.self_cpu_time_total
    gpu = average.device_time_total if whole else average.self_device_time_total
    shown = name if len(name) <= 43 else name[:40] + "..."
    text = f"{shown:<44}{host / 1e3 / steps:>10.2f}"
    return text + (f"{gpu / 1e3 / steps:>10.2f}" if cuda else "")
