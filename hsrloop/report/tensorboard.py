"""TensorBoard: event files of a run, and a server that shows them.

The files hold TensorBoard's own records, so this module does not load torch. The server
is a process of its own that ends with ours, however ours ends (`tensorboard_server`).
"""

from __future__ import annotations

import io
import json
import logging
import os
import selectors
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hsrloop.events import Climbed, EpochDone, Event, Note, Recovered, RolledBack, RunStarted
from hsrloop.report.files import SPELLED_OUT, append

_LOG = logging.getLogger(__name__)
_START_LIMIT_S = 30.0  # a guess; 3 s on an idle machine


class TensorBoardSink:
    """Writes losses, metrics, speed and the learning rate of each group, a point per epoch.

    TensorBoard's own writer has a thread, which a full disk ends together with what it was given;
    so its records are appended here, each before `handle` returns.

    Args:
        logdir: made when it is not there.
        purge_step: on resume, the first epoch to be run again; older points from it on are hidden.

    Raises:
        OSError: the disk does not take the file's first record.
    """

    def __init__(self, logdir: Path, *, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog

        logdir.mkdir(parents=True, exist_ok=True)
        self._record = Record
        now = time.time_ns()
        place = f"{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now}"
        self._path = logdir / f"events.out.tfevents.{place}"
        start = [Record(wall_time=time.time(), file_version="brain.Event:2")]
        if purge_step is not None:
            restart = SessionLog(status=SessionLog.START)
            start.append(Record(wall_time=time.time(), step=purge_step, session_log=restart))
        self._append(*start)

    def handle(self, event: Event) -> None:
        """Write the points of an `EpochDone`, and notes and settings as text.

        Raises:
            OSError: the disk does not take it; nothing of it was written.
        """
        match event:
            case EpochDone():
                self._scalars(event)
            case RunStarted():
                lines = [f"| {key} | {value} |" for key, value in sorted(event.config.items())]
                table = "\n".join(["| setting | value |", "|---|---|", *lines])
                self._text("run/settings", table, step=event.epoch - 1)
            case Recovered():
                text = f"{event.cause} ran out: {event.change} ({event.reason})"
                self._text("run/recoveries", text, step=event.epoch)
            case Climbed():
                self._text("run/recoveries", f"room to spare: {event.change}", step=event.epoch)
            case RolledBack():
                text = f"{event.cause}: learning rate x {event.lr_scale:g} from here on"
                self._text("run/rollbacks", text, step=event.epoch)
            case Note(level="warning"):
                self._text("run/warnings", event.text, step=0)

    def close(self) -> None:
        """Nothing is held between records."""

    def _append(self, *records: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        writer = RecordWriter(framed)
        for record in records:
            writer.write(record.SerializeToString())
        append(self._path, framed.getvalue())

    def _scalars(self, event: EpochDone) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = {
            "train/box_loss": event.box_loss,
            "train/cls_loss": event.cls_loss,
            "train/dfl_loss": event.dfl_loss,
            "train/images_per_s": event.images_per_s,
            "metrics/mAP50": event.ap50,
            "metrics/mAP50-95": event.ap50_95,
            "metrics/precision": event.precision,
            "metrics/recall": event.recall,
            **{f"lr/{name}": rate for name, rate in event.lr.items()},
        }
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        self._append(
            self._record(
                wall_time=event.time or time.time(),
                step=event.epoch,
                summary=Summary(value=values),
            )
        )

    def _text(self, tag: str, text: str, *, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        spelled = text.encode(errors=SPELLED_OUT).decode()
        self._append(self._record(wall_time=time.time(), step=step, summary=text_pb(tag, spelled)))


class Server:
    """A TensorBoard server; `start_server` makes it."""

    def __init__(self, process: subprocess.Popen[str] | None) -> None:
        self._process = process
        self._line: str | None = None
        self._url: str | None = None
        self._serves = self._asked = False

    def serve(self, logdir: Path) -> None:
        """Let it listen, and show the event files below a folder."""
        self._serves = True
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # it has ended; `url` says so
                self._process.stdin.write(json.dumps(str(logdir)) + "\n")
                self._process.stdin.flush()

    @property
    def answered(self) -> bool:
        """Whether asking for `url` would not wait."""
        return self._asked or self._first_line(wait_s=0) is not None

    @property
    def url(self) -> str | None:
        """Where it listens, once it serves; the first call may wait. None: it did not start."""
        if not self._asked:
            self._asked = True
            line = self._first_line(wait_s=_START_LIMIT_S) or ""
            if line.startswith("http"):
                self._url = line
            else:
                _LOG.warning(
                    "TensorBoard's server did not start (%s). Event files are written all the "
                    "same; use --no-tensorboard to do without.",
                    line or "no answer",
                )
                self.close()
        return self._url

    def close(self) -> None:
        """Stop the server; a second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        if not self._serves:
            process.kill()  # it is loading its parts, and has started nothing else
        with suppress(OSError):
            process.stdin.close()  # the server's signal to end
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def wait(self) -> None:
        """Return when the server has ended by itself."""
        if self._process is not None:
            self._process.wait()

    def _first_line(self, *, wait_s: float) -> str | None:
        """Return what it says first; None: nothing yet."""
        if self._process is None or self._process.stdout is None:
            return "its process could not be made"
        if self._line is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if selector.select(timeout=wait_s):
                    self._line = self._process.stdout.readline().strip()
        return self._line


def start_server(port: int, *, host: str = "127.0.0.1") -> Server:
    """Start a server on `port`, or on the next free one; returns at once.

    It needs a second or more before it can serve, so start it before there is anything to show. A
    server that cannot start is a warning when its `url` is asked for, never an error.
    """
    command = [sys.executable, "-m", "hsrloop.report.tensorboard_server", str(port), host]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run; the server ends after it
        )
    except OSError as error:
        _LOG.debug("TensorBoard's process: %s", error)
        return Server(None)
    return Server(process)
