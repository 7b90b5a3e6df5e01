"""Look at image files without decoding them: size as decoded, and whether they are whole."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

ORIENTATION = 274  # EXIF tag; 5 to 8 swap width and height
_TAIL_BYTES = 4096
_DECODE = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class Unreadable(Exception):
    """An image that cannot be used; the message says why, without the path."""


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) as `decode` gives them, EXIF orientation applied.

    Only the header and the last bytes are read, unless they look odd: then all of it is decoded.

    Raises:
        Unreadable: not an image, empty, truncated, or not allowed to be read.
    """
    try:
        if path.stat().st_size == 0:
            raise Unreadable("the file is empty")
        with Image.open(path) as image:
            width, height = image.size
            kind = image.format or ""
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            if not _ends_well(path, kind):
                image.load()
    except (UnidentifiedImageError, ImportError):  # Ultralytics, if loaded, asks for a HEIF library
        raise Unreadable("not an image of a known kind") from None
    except Image.DecompressionBombError:
        raise Unreadable("more than 178 million pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None
    if kind in ("JPEG", "MPO"):
        return (width, height) if turned else (height, width)
    if kind == "PNG" and not turned:
        return height, width
    pixels = decode(path)
    return int(pixels.shape[0]), int(pixels.shape[1])


def _ends_well(path: Path, kind: str) -> bool:
    """Return whether the file has its end marker; kinds without one count as suspicious."""
    marker = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(kind)
    if marker is None:
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        tail = file.read()
    return marker in (tail[-2:] if kind == "JPEG" else tail)


def decode(path: Path, *, shrink: int = 1) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB, EXIF orientation applied, alpha dropped.

    Args:
        shrink: 1, 2, 4 or 8: decode at this fraction of the size, rounded up. A JPEG then takes
            half the time or less, since it is never made whole; other kinds gain nothing.

    Raises:
        Unreadable: the file cannot be read or decoded.
    """
    try:
        data = np.fromfile(path, np.uint8)
        pixels = cv2.imdecode(data, _DECODE[shrink]) if data.size else None
    except (OSError, cv2.error) as error:
        raise Unreadable(" ".join(str(error).split())) from None
    if pixels is None:
        raise Unreadable("it cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def thumbnail(path: Path) -> np.ndarray:
    """Return a small grey version of an image for comparing; a grey 9 x 8 when it is unreadable."""
    try:
        data = np.fromfile(path, np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8) if data.size else None
    except (OSError, cv2.error):
        pixels = None
    if pixels is None:
        return np.full((8, 9), 114, np.uint8)
    return cv2.resize(pixels, (9, 8), interpolation=cv2.INTER_AREA)
