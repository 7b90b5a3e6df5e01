"""Look at image files without decoding them: size as decoded, and whether they are whole."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import warnings
from collections.abc import Iterator
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
# What Pillow's readers raise on damaged files, beside what it documents (found by damaging files).
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError)


class Unreadable(Exception):
    """An image that cannot be used; the message says why, without the path."""


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) as `decode` gives them, EXIF orientation applied.

    Only the header and the last bytes are read, unless they look odd: then all of it is decoded.

    Raises:
        Unreadable: not an image, empty, truncated, or not allowed to be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("not a regular file")
        if status.st_size == 0:
            raise Unreadable("the file is empty")
        with Image.open(path) as image:
            width, height = image.size
            kind = image.format or ""
            chunks = _png_chunks(path) if kind == "PNG" else []
            tag = _orientation(image) if kind in ("JPEG", "MPO") else 1
            if not (chunks[-1:] == [b"IEND"] or _ends_well(path, kind)):
                image.load()
    except (UnidentifiedImageError, ImportError):  # Ultralytics, if loaded, asks for a HEIF library
        raise Unreadable("not an image of a known kind") from None
    except Image.DecompressionBombError:
        raise Unreadable("more than 178 million pixels") from None
    except (*_DAMAGED, struct.error, MemoryError) as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None
    if kind in ("JPEG", "MPO"):
        return (width, height) if tag in (5, 6, 7, 8) else (height, width)
    if kind == "PNG" and b"eXIf" not in chunks:
        return height, width
    try:
        pixels = decode(path)
    except MemoryError:
        raise Unreadable(f"there is no memory for its {width} x {height} px") from None
    return int(pixels.shape[0]), int(pixels.shape[1])


def _orientation(image: Image.Image) -> int:
    """Return what EXIF says; Pillow's own `getexif` also asks XMP, which OpenCV does not."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return int(exif.get(ORIENTATION, 1))


def _ends_well(path: Path, kind: str) -> bool:
    """Return whether the file has its end marker; kinds without one count as suspicious."""
    if kind not in ("JPEG", "MPO"):
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        tail = file.read()
    return b"\xff\xd9" in (tail[-2:] if kind == "JPEG" else tail)


def _png_chunks(path: Path) -> list[bytes]:
    """Return the names of a PNG's chunks that are all there, up to IEND, skipping over them."""
    names: list[bytes] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(8)  # the signature
        while len(head := file.read(8)) == 8 and names[-1:] != [b"IEND"]:
            length, name = struct.unpack(">I4s", head)
            if file.seek(length + 4, os.SEEK_CUR) > size:  # its data and checksum
                break
            names.append(name)
    return names


def decode(path: Path, *, shrink: int = 1) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB; see `decode_bytes`.

    Raises:
        Unreadable: the file cannot be read or decoded.
    """
    return decode_bytes(read_bytes(path), shrink=shrink)


def read_bytes(path: Path) -> np.ndarray:
    """Return a file's bytes, (n,) uint8.

    Raises:
        Unreadable: it cannot be read.
    """
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise Unreadable(" ".join(str(error).split())) from None


def decode_bytes(data: np.ndarray, *, shrink: int = 1) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB, EXIF orientation applied, alpha dropped.

    Args:
        data: (n,) uint8, all of an image file.
        shrink: 1, 2, 4 or 8: decode at this fraction of the size, rounded up. A JPEG then takes
            half the time or less, since it is never made whole; other kinds gain nothing.

    Raises:
        Unreadable, MemoryError: as `decode_as`.
    """
    return cv2.cvtColor(decode_as(_DECODE[shrink], data), cv2.COLOR_BGR2RGB)


def decode_as(flag: int, data: np.ndarray) -> np.ndarray:
    """Return what `cv2.imdecode` makes of an image file's bytes, (n,) uint8.

    Raises:
        Unreadable: it cannot be decoded.
        MemoryError: for want of memory.
    """
    try:
        pixels = cv2.imdecode(data, flag) if data.size else None
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(" ".join(str(error).split())) from None
        raise Unreadable(" ".join(str(error).split())) from None
    if pixels is None:
        raise Unreadable("it cannot be decoded")
    return pixels


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata and on large images from the terminal.

    Warning filters belong to the process: enter it in the main thread, around those that read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\..*")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def reduced(data: np.ndarray) -> np.ndarray | None:
    """Decode an image file's bytes (n,) uint8 to grey, small if it can be; None if it cannot."""
    for flag in (cv2.IMREAD_REDUCED_GRAYSCALE_8, cv2.IMREAD_GRAYSCALE):  # few pixels reduce to none
        with contextlib.suppress(cv2.error):
            pixels = cv2.imdecode(data, flag) if data.size else None
            if pixels is not None:
                return pixels
    return None
