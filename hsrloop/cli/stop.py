"""Ctrl-C and `kill`: the first asks the run to save and end, the second ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ASKED = b"\nStopping: the run is being saved. Once more ends it at once.\n"
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """A signal came before there was anything to save; the command ends with `exit_code`."""

    def __init__(self, signum: int) -> None:
        super().__init__("Stopped before the first step: nothing had to be saved.")
        self.exit_code = 128 + signum


class Stop:
    """A question the run asks after every step; True once the user wants it to end.

    Signals count from `listen` on. `signum` is the first one received, 0 before. Until the question
    was asked for the first time there is nothing to save, and a signal raises `Interrupted`.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._asked = False

    def __call__(self) -> bool:
        """Return whether the run shall save and return."""
        self._asked = True
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        """The code a shell expects of a program ended by this signal: 130 for Ctrl-C."""
        return 128 + self.signum

    def listen(self) -> None:
        """Receive SIGINT and SIGTERM from now on."""
        for signum in _SIGNALS:
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            for stream in (1, 2):
                if os.isatty(stream):
                    os.write(stream, _SHOW_CURSOR)  # a live bar hides it
            os._exit(128 + signum)  # files are replaced atomically, so nothing is left half-written
        self.signum = signum
        if not self._asked:
            raise Interrupted(signum)
        os.write(2, _ASKED)  # the only output that is safe inside a handler
