"""The zip archive that `torch.save` writes, and archives that only look like one."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

_ENCRYPTED = 0x1
_SHOWN = 120  # characters of a text that comes from a file


def is_archive(path: Path) -> bool:
    """Return whether a file ends as a zip archive does."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one that says that it spans several disks
        return False


def wrong_archive(parts: Sequence[zipfile.ZipInfo], size: int) -> str | None:
    """Return what is wrong with an archive as a checkpoint, or None.

    torch stores parts as they are, each once, below one folder: what unpacks to more than the file
    has was made to do harm.

    Args:
        parts: as its directory lists them.
        size: bytes of the file.
    """
    names = [part.filename for part in parts]
    if any(p.compress_type != zipfile.ZIP_STORED or p.flag_bits & _ENCRYPTED for p in parts):
        return "a packed archive, which torch does not write. Get it again."
    if any(part.file_size != part.compress_size for part in parts):
        return "damaged: the sizes of its parts contradict each other. Get it again."
    if sum(part.file_size for part in parts) > size:
        return "damaged: its parts claim to be larger than the file. Get it again."
    if len(set(names)) < len(names):
        return "damaged: it has two parts of one name. Get it again."
    paths = [PurePosixPath(name) for name in names]
    if len({path.parts[0] for path in paths if path.parts}) != 1 or any(
        path.is_absolute() or ".." in path.parts for path in paths
    ):
        return "damaged: it has parts outside its folder. Get it again."
    return None


def pickle_of(path: Path) -> bytes:
    """Return the pickled part of a checkpoint that `wrong_archive` found sound.

    Raises:
        OSError: there is no such part, or its checksum is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (
                n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")
            )
            return archive.read(name)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise OSError(None, f"no readable data.pkl: {error}") from error


def plain(text: str) -> str:
    """Return a text from a file as a short one that cannot steer a terminal."""
    shown = text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")
    return "".join(c if c.isprintable() else "?" for c in shown)
