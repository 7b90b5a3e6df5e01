"""Ctrl-C, `kill`, a terminal that closes: the first asks the run to save and end.

The second Ctrl-C or `kill` ends it at once.
"""

from __future__ import annotations

import os
import signal
import stat
from types import FrameType

_HANGUP = getattr(signal, "SIGHUP", None)  # absent on Windows
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP is not None else []))
_ASKED = b"\nStopping: the run is being saved. Once more ends it at once.\n"
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """A signal came before there was anything to save; the command ends with `exit_code`."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + signum


class Stop:
    """A question the run asks after every step; True once the user wants it to end.

    Signals count from `listen` on. `signum` is the first one received, 0 before. Until the question
    was asked for the first time there is nothing to save, and a signal raises `Interrupted`.

    Args:
        text: what is said then.
    """

    def __init__(
        self, text: str = "Stopped before the first step: nothing had to be saved."
    ) -> None:
        self.signum = 0
        self._asked, self._text = False, text

    def __call__(self) -> bool:
        """Return whether the run shall save and return."""
        self._asked = True
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        """The code a shell expects of a program ended by this signal: 130 for Ctrl-C."""
        return 128 + self.signum

    def listen(self) -> None:
        """Receive SIGINT, SIGTERM and, but under `nohup`, SIGHUP from now on."""
        for signum in _SIGNALS:
            if signum != _HANGUP or signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == _HANGUP:
            _leave_terminal()
            if self.signum:  # a shell and the system may both say that the terminal closed
                return
        if self.signum:
            for stream in (1, 2):
                if os.isatty(stream):
                    os.write(stream, _SHOW_CURSOR)  # a live bar hides it
            os._exit(128 + signum)  # files are replaced atomically, so nothing is left half-written
        self.signum = signum
        if not self._asked:
            raise Interrupted(signum, self._text)
        os.write(2, _ASKED)  # the only output that is safe inside a handler


def _leave_terminal() -> None:
    """Let what is written to a terminal go nowhere: it is gone, and writing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)
