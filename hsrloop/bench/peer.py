"""One training or validation of Ultralytics, in a process of its own; writes one row of JSON.

    python -m hsrloop.bench.peer '{"data": ..., "model": ..., "train": {...}}'

The peer runs with its own defaults, but for what the request says (data, sizes, augmentation,
optimizer, loader processes), a RAM cache, and two things in its favour: the time limit of its NMS
is lifted (on a slow or busy machine it would return no detections), and its thread count may be
set. It writes beside the labels of the set it is given, and may rewrite images in it: give it a
copy.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hsrloop.hardware.peak import peak_bytes
from hsrloop.model.yolo import import_ultralytics

NMS_SECONDS_PER_IMAGE = 100.0
ROW = "ROW "  # begins the line that holds the answer


def lift_nms_limit() -> None:
    """Raise the default of the one argument that can void a validation."""
    function = importlib.import_module("ultralytics.utils.nms").non_max_suppression
    named = [p for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    defaults = list(function.__defaults__ or ())
    defaults[[p.name for p in named].index("max_time_img")] = NMS_SECONDS_PER_IMAGE
    function.__defaults__ = tuple(defaults)


class Clock:
    """Times of each epoch's training and validation, taken through the peer's callbacks."""

    def __init__(self) -> None:
        self.train_s: list[float] = []
        self.val_s: list[float] = []
        self._mark = 0.0

    def attach(self, model: Any, threads: int | None) -> None:
        """Listen to `model`; its training uses `threads`, or its own choice."""

        def start(_: Any) -> None:
            if threads is not None:
                torch.set_num_threads(threads)
            self._mark = time.monotonic()

        model.add_callback("on_train_epoch_start", start)
        model.add_callback("on_train_epoch_end", lambda _: self._lap(self.train_s))
        model.add_callback("on_val_start", lambda _: self._lap([]))
        model.add_callback("on_val_end", lambda _: self._lap(self.val_s))

    def _lap(self, into: list[float]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        into.append(now - self._mark)
        self._mark = now


def answer(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train if asked to, then validate; return times and metrics.

    Args:
        request: "data", "model"; "train" with settings and "threads", or "validate" with "imgsz";
            "device" as the peer spells it, "cpu" when not given; "judged" false: no validation
            beside the training's own, and no metrics.
        folder: for its files.
    """
    yolo: Any = import_ultralytics().YOLO
    lift_nms_limit()
    device = request.get("device", "cpu")
    quiet = {"plots": False, "verbose": False, "project": folder, "exist_ok": True}
    row: dict[str, Any] = {}
    weights: str | Path = request["model"]
    imgsz = request.get("validate", {}).get("imgsz")
    if "train" in request:
        clock, model = Clock(), yolo(weights)
        clock.attach(model, request["threads"])
        started = time.monotonic()
        settings = {"device": device, "cache": "ram", "name": "run", **request["train"], **quiet}
        model.train(data=request["data"], **settings)
        row["wall_s"] = time.monotonic() - started
        row["peak_memory_bytes"] = peak_bytes(torch.device("cpu" if device == "cpu" else "cuda"))
        row["train_s"] = clock.train_s
        row["val_s"] = clock.val_s[: len(clock.train_s)]
        if not request.get("judged", True):
            return row
        weights = Path(folder) / "run" / "weights" / "best.pt"
        imgsz = request["train"]["imgsz"]
    fixed = {"batch": 8, "rect": False, "workers": 0, "device": device, "name": "val"}
    box = yolo(weights).val(data=request["data"], imgsz=imgsz, **fixed, **quiet).box
    row |= {"mAP50-95": float(box.map), "mAP50": float(box.map50)}
    return row | {"precision": float(box.mp), "recall": float(box.mr)}


def main() -> None:
    """Answer the request on the command line."""
    os.environ["YOLO_OFFLINE"] = "true"  # a hall has no network: it need not be looked for
    with tempfile.TemporaryDirectory() as folder:
        row = answer(json.loads(sys.argv[1]), folder)
    sys.stdout.write(f"\n{ROW}{json.dumps(row)}\n")


if __name__ == "__main__":
    main()
