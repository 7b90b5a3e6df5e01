"""One training or validation of Ultralytics, in a process of its own; prints one row of JSON.

The peer runs with its own defaults, but for what the request says (data, sizes, augmentation,
optimizer, loader processes), a RAM cache, and two things in its favour: the time limit of its NMS
is lifted (on a slow or busy machine it would return no detections), and its thread count may be
set.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  (before ultralytics, or its NMS takes a slow fallback)
from ultralytics import YOLO
from ultralytics.utils import nms

NMS_SECONDS_PER_IMAGE = 100.0


def lift_nms_limit() -> None:
    """Raise the default of the one argument that can void a validation."""
    function = nms.non_max_suppression
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

    def attach(self, model: YOLO, threads: int | None) -> None:
        def start(_: Any) -> None:
            if threads is not None:
                torch.set_num_threads(threads)
            self._mark = time.monotonic()

        model.add_callback("on_train_epoch_start", start)
        model.add_callback("on_train_epoch_end", lambda _: self._lap(self.train_s))
        model.add_callback("on_val_start", lambda _: self._lap([]))
        model.add_callback("on_val_end", lambda _: self._lap(self.val_s))

    def _lap(self, into: list[float]) -> None:
        now = time.monotonic()
        into.append(now - self._mark)
        self._mark = now


def main() -> None:
    request = json.loads(sys.argv[1])
    lift_nms_limit()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"plots": False, "verbose": False, "project": folder, "exist_ok": True}
        row: dict[str, Any] = {}
        weights = Path(request["model"])
        imgsz = request.get("validate", {}).get("imgsz")
        if "train" in request:
            clock, model = Clock(), YOLO(weights)
            clock.attach(model, request["threads"])
            started = time.monotonic()
            settings = {"device": "cpu", "cache": "ram", "name": "run", **request["train"], **quiet}
            model.train(data=request["data"], **settings)
            row["wall_s"] = time.monotonic() - started
            row["train_s"] = clock.train_s
            row["val_s"] = clock.val_s[: len(clock.train_s)]
            weights = Path(folder) / "run" / "weights" / "best.pt"
            imgsz = request["train"]["imgsz"]
        judged = YOLO(weights).val(
            data=request["data"],
            imgsz=imgsz,
            batch=8,
            rect=False,
            workers=0,
            device="cpu",
            name="val",
            **quiet,
        )
        box = judged.box
        row |= {"mAP50-95": float(box.map), "mAP50": float(box.map50)}
        row |= {"precision": float(box.mp), "recall": float(box.mr)}
    print("ROW " + json.dumps(row))


if __name__ == "__main__":
    main()
