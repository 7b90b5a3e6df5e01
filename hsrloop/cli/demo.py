"""`hsrloop demo`: the whole way from a data set to a model, in minutes and without photographs."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from hsrloop.cli.run import loading, prepare
from hsrloop.cli.stop import Stop
from hsrloop.cli.tabletop import write_data_set
from hsrloop.config import Resolved, resolve
from hsrloop.errors import WeightsError
from hsrloop.report.console import ConsoleSink, duration, make_console

_LOG = logging.getLogger(__name__)

_MODEL = "yolov8n.pt"
_SCENES = {"train": 240, "val": 60}
_NETWORK_LIMIT_S = 5.0
_SHOWN = 12  # validation scenes in the picture
_SHOWN_CONF = 0.25
_ENLARGED = 1.5  # so that names do not hide what they name

# For a network that starts from nothing on two CPU cores: mAP50 0.89 after 6 epochs of such a run,
# 0.97 after 20 (measured); 20 images/s on one core of the machine it was tried on.
_SETTINGS = {
    "epochs": 10,
    "batch": 8,
    "imgsz": 160,
    "lr0": 0.002,
    "ema_decay": 0.99,
    "ema_tau": 100.0,
    "patience": 0,
    "hsv_s": 0.4,
    "degrees": 0.0,
    "scale": 0.2,
    "mosaic": 0.0,
    "mixup": 0.0,
    "workers": 0,
    "tensorboard": False,
}
# Pretrained weights need less of it.
_PRETRAINED_SETTINGS = {"epochs": 6, "lr0": 0.001}


def run_demo(output: Path, *, device: str, seed: int) -> int:
    """Paint, fine-tune, show; return the exit code."""
    stop = Stop()
    stop.listen()
    begun = time.monotonic()
    console = make_console()
    prepare(device)
    with loading():
        from hsrloop.train.folder import check_writable
        from hsrloop.train.run import train
    check_writable(output)
    console.print("Painting a tabletop data set: 8 classes, with clutter and occlusion.")
    dataset = write_data_set(output / "dataset", **_SCENES, seed=seed)
    # What a late download still writes there once this is over is no matter.
    with tempfile.TemporaryDirectory(prefix="hsrloop-demo-", ignore_cleanup_errors=True) as folder:
        weights = _find_pretrained(console, Path(folder))
        resolved = _settings(dataset, output, weights, device=device, seed=seed)
        outcome = train(resolved, sinks=[ConsoleSink(console)], stop=stop)
    if outcome.result is None:
        return stop.exit_code
    best = outcome.run_dir / str(outcome.result["best_model_path"])
    picture = outcome.run_dir / "predictions.jpg"
    _draw(dataset, best, picture, imgsz=resolved.config.imgsz)
    metrics = outcome.result["metrics"]
    console.print()
    console.print(f"Demo done in {duration(time.monotonic() - begun)}.")
    console.print(f"best.pt: {best}", soft_wrap=True)
    console.print(f"mAP50 {metrics['mAP50']:.3f}, mAP50-95 {metrics['mAP50-95']:.3f}")
    console.print(f"What it sees: {picture}", soft_wrap=True)
    return 0


def _settings(
    dataset: Path, output: Path, weights: Path | None, *, device: str, seed: int
) -> Resolved:
    settings = {**_SETTINGS, **(_PRETRAINED_SETTINGS if weights else {})}
    return resolve(
        [
            ("demo", settings),
            (
                "demo",
                {
                    "model": str(weights) if weights else "yolov8n.yaml",
                    "dataset": str(dataset),
                    "output": str(output),
                    "device": device,
                    "seed": seed,
                },
            ),
        ]
    )


def _find_pretrained(console: Console, folder: Path) -> Path | None:
    """Return yolov8n.pt from this machine, or from the network if that takes no time."""
    from hsrloop.model.weights import fetch, find_weights

    try:
        return find_weights(_MODEL, download=False)
    except WeightsError:
        console.print(f"No {_MODEL} on this machine; trying the network for a moment.")
    fetched = _within(_NETWORK_LIMIT_S, lambda: fetch([_MODEL], dest=folder)[0].path)
    if fetched is None:
        console.print(f"{_MODEL} is out of reach: training from scratch.")
    return fetched


def _within(limit_s: float, work: Callable[[], Path | None]) -> Path | None:
    """Return what `work` returns, or None when it fails or takes longer; it is then left behind."""
    done: list[Path | None] = []

    def attempt() -> None:
        try:
            done.append(work())
        except (WeightsError, OSError) as error:
            _LOG.debug("no weights from the network: %s", error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
    return done[0] if done else None


def _draw(dataset: Path, best: Path, picture: Path, *, imgsz: int) -> None:
    """Write a picture of the first validation scenes with what the model finds in them."""
    import cv2
    import numpy as np
    import torch

    from hsrloop.data.pixels.store import ImageStore
    from hsrloop.data.sets.dataset import load_dataset
    from hsrloop.data.val_loader import ValLoader
    from hsrloop.model.base import load_base
    from hsrloop.report.plots import contact_sheet, draw_predictions, save_picture
    from hsrloop.train.detector import Detector

    spec = load_dataset(dataset, splits=("val",))
    refs = spec.val[:_SHOWN]
    module = load_base(best, names=spec.names, seed=0).module
    detector = Detector.of(module, torch.device("cpu"), half=False)
    store = ImageStore(refs, imgsz=imgsz, interpolation="linear")
    drawn = []
    for batch in ValLoader(refs, store, batch=len(refs), prefetch=False):
        found = detector.detect(batch.images, conf=_SHOWN_CONF, multi_label=False)
        for index, detections in enumerate(found):
            pixels = cv2.imread(str(refs[int(batch.indices[index])].path))
            assert pixels is not None, "written by this command"
            corners = detections[:, :4].view(-1, 2, 2)  # back from letterboxed to native px
            corners = (corners - batch.pads[index]) / batch.gains[index] * _ENLARGED
            boxes = torch.cat([corners.view(-1, 4), detections[:, 4:]], 1).numpy()
            large = cv2.resize(pixels, None, fx=_ENLARGED, fy=_ENLARGED)
            rgb = np.asarray(cv2.cvtColor(large, cv2.COLOR_BGR2RGB), np.uint8)
            drawn.append(draw_predictions(rgb, boxes, spec.names))
    store.close()
    save_picture(picture, contact_sheet(drawn, columns=4))
