"""The process of a TensorBoard server; its arguments are PORT HOST.

A line on stdin, the folder of the event files as JSON, lets it serve. It then writes one line to
stdout, its address once it listens or why it cannot, and ends when its stdin closes. Thus it never
outlives the run that started it, even one that was killed; nor do the processes that TensorBoard's
plugins start, since all of its process group end together.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

_PORTS_TRIED = 100


def serve(plugins: Sequence[Any], logdir: str, port: int, host: str) -> str:
    """Start serving in a thread, on the first free port from `port`; return the URL.

    Raises:
        OSError: none of the ports tried is free.
    """
    from tensorboard import program

    for candidate in range(port, min(port + _PORTS_TRIED, 65536)):
        board = program.TensorBoard(plugins)
        board.configure(logdir=logdir, port=candidate, host=host, reload_interval=15)
        try:
            return str(board.launch())
        except program.TensorBoardServerException:
            continue
    raise OSError(f"no free port from {port} to {port + _PORTS_TRIED - 1}")


def _plugins() -> Sequence[Any]:
    """Load all that serves; it takes a second."""
    from tensorboard import default

    plugins: Sequence[Any] = default.get_plugins()
    return plugins


def _main() -> None:
    port, host = sys.argv[1:]
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    os.nice(10)  # the run comes first on a machine with few cores
    plugins: Sequence[Any] = ()
    why = ""
    try:
        plugins = _plugins()
    except ImportError as error:
        why = str(error)
    if asked := sys.stdin.readline():
        with tempfile.TemporaryDirectory(prefix="hsrloop-", ignore_cleanup_errors=True) as folder:
            tempfile.tempdir = os.environ["TMPDIR"] = folder  # plugins leave things behind
            try:
                line = why or serve(plugins, json.loads(asked), int(port), host)
            except (OSError, ImportError) as error:
                line = str(error)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            sys.stdin.read()
    os.killpg(0, signal.SIGKILL)  # neither threads nor processes of plugins end by themselves


if __name__ == "__main__":
    _main()
