"""A folder for as long as something is measured."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsrloop.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def scratch(what: str) -> Iterator[Path]:
    """Yield a new folder below the system's for temporary files, and remove it afterwards.

    Raises:
        OutputError: there is no room for what is written to it.
    """
    with tempfile.TemporaryDirectory(prefix=f"hsrloop-{what}-") as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OutputError(
                f"the folder for temporary files, {tempfile.gettempdir()}, is full. Set TMPDIR to "
                "one with room, or make some there."
            ) from None
