"""Pictures of what a model sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hsrloop.errors import OutputError

Image = NDArray[np.uint8]
_TEXT_SCALE = 0.4


def draw_predictions(image: Image, detections: NDArray[np.float32], names: Sequence[str]) -> Image:
    """Return a copy of an image with a box, the name and the confidence of each detection.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: (n, 6): x1 y1 x2 y2 in px, confidence, class; n may be 0.
        names: of the classes.
    """
    canvas = np.ascontiguousarray(image).copy()
    for x1, y1, x2, y2, conf, label in detections:
        colour = class_colour(int(label), len(names))
        corner = (round(float(x1)), round(float(y1)))
        cv2.rectangle(canvas, corner, (round(float(x2)), round(float(y2))), colour, 1)
        _write(canvas, f"{names[int(label)]} {conf:.2f}", corner, colour)
    return canvas


def draw_boxes(
    image: Image, boxes: NDArray[np.float32], labels: NDArray[np.int64], names: Sequence[str]
) -> Image:
    """Return a copy of an image with the box and the name of each label.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4) xyxy px; n may be 0.
        labels: (n,) classes.
        names: of the classes.
    """
    canvas = np.ascontiguousarray(image).copy()
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        colour = class_colour(int(label), len(names))
        corner = (round(float(x1)), round(float(y1)))
        cv2.rectangle(canvas, corner, (round(float(x2)), round(float(y2))), colour, 1)
        _write(canvas, names[int(label)], corner, colour)
    return canvas


def contact_sheet(images: Sequence[Image], *, columns: int) -> Image:
    """Return images of one size side by side, row by row; the last row is filled with white."""
    blank = np.full_like(images[0], 255)
    filled = [*images, *[blank] * (-len(images) % columns)]
    rows = [np.hstack(filled[i : i + columns]) for i in range(0, len(filled), columns)]
    return np.asarray(np.vstack(rows), np.uint8)


def save_picture(path: Path, image: Image) -> None:
    """Write an RGB image; the suffix decides the format.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not cv2.imwrite, which a name that is not UTF-8 crashes.
        written, coded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        path.write_bytes(coded.tobytes() if written else b"")
    except (OSError, cv2.error):
        written = False
    if not written:
        raise OutputError(f"{path} cannot be written. Choose another --output.")


def class_colour(label: int, classes: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class: hues spread over the circle."""
    hue = np.array([[[int(180 * label / max(classes, 1)), 210, 235]]], np.uint8)
    r, g, b = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0]
    return int(r), int(g), int(b)


def _write(canvas: Image, text: str, corner: tuple[int, int], colour: tuple[int, int, int]) -> None:
    font = cv2.FONT_HERSHEY_SIMPLEX
    (width, height), _ = cv2.getTextSize(text, font, _TEXT_SCALE, 1)
    x = min(max(corner[0], 0), max(canvas.shape[1] - width, 0))
    y = max(corner[1], height + 4)
    cv2.rectangle(canvas, (x, y - height - 4), (x + width, y), colour, -1)
    cv2.putText(canvas, text, (x, y - 3), font, _TEXT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)
