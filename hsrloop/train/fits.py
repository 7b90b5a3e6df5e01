"""What earlier rehearsals found to fit: a small file in the user's cache folder.

A rehearsal costs seconds at each start. Its result holds for the same card with as much of its
memory free, the same software, and the same network, sizes and crowds of boxes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hsrloop
from hsrloop.config import TrainConfig
from hsrloop.data.pixels.bank import PLACES
from hsrloop.errors import OutputError
from hsrloop.paths import cache_folder
from hsrloop.records import DeviceInfo, Rung
from hsrloop.train.checkpoint import write_text

_LOG = logging.getLogger(__name__)
FILE = "fits.json"
KEPT = 200  # results; the oldest go first
FREE_STEP_BYTES = 2**29  # free memory counts in steps of this: a desktop takes a little and gives


def key_of(
    info: DeviceInfo, config: TrainConfig, *, parameters: int, classes: int, boxes: int, images: int
) -> str:
    """Return what a result holds for.

    Args:
        parameters: of the network.
        classes, boxes: as rehearsed.
        images: that may lie in GPU memory.
    """
    facts = {
        "device": [info.name, info.uuid, info.driver, info.free_bytes // FREE_STEP_BYTES],
        "versions": [hsrloop.__version__, str(torch.__version__), str(torch.version.cuda)],
        "model": [Path(config.model).name, parameters, classes, config.freeze],
        "sizes": [config.imgsz, config.batch, config.micro_batch, boxes, images],
        "numbers": [
            config.amp,
            config.amp_dtype,
            config.deterministic,
            config.optimizer,
            config.augment_device,
        ],
    }
    return json.dumps(facts)


@dataclass(frozen=True, slots=True)
class Fits:
    """The results under one key. A file that cannot be read counts as empty, and is replaced."""

    key: str
    path: Path

    @classmethod
    def of(cls, key: str, path: Path | None = None) -> Fits:
        """Return the results in a file; None: the one in this user's cache folder."""
        return cls(key, path or cache_folder() / FILE)

    def known(self) -> Rung | None:
        """Return the rung that fitted when the same was tried before."""
        found = self._read().get(self.key)
        try:
            rung = Rung(**found) if found is not None else None
        except TypeError as error:
            _LOG.debug("%s: %s", self.path, error)
            return None
        return rung if rung is not None and _is_sound(rung) else None

    def covers(self, rung: Rung) -> bool:
        """Return whether `rung` is known to fit."""
        known = self.known()
        return known is not None and rung == at_most(rung, known)

    def remember(self, rung: Rung) -> None:
        """Note that `rung` fits."""
        others = {key: value for key, value in self._read().items() if key != self.key}
        self._write({**others, self.key: dataclasses.asdict(rung)})

    def forget(self) -> None:
        """Drop a result that turned out wrong."""
        results = self._read()
        if results.pop(self.key, None) is not None:
            self._write(results)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _LOG.debug("%s is not used: %s", self.path, error)
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: value for key, value in content.items() if isinstance(value, dict)}

    def _write(self, results: dict[str, Any]) -> None:
        newest = dict(list(results.items())[-KEPT:])
        try:
            write_text(self.path, json.dumps(newest, indent=1) + "\n")
        except (OSError, OutputError) as error:  # the next start rehearses again
            _LOG.debug("%s is not written: %s", self.path, error)


def at_most(rung: Rung, known: Rung) -> Rung:
    """Return `rung` with nothing that takes GPU memory larger than in `known`."""
    return dataclasses.replace(
        rung,
        micro_batch=min(rung.micro_batch, known.micro_batch),
        imgsz=min(rung.imgsz, known.imgsz),
        val_batch=min(rung.val_batch, known.val_batch),
        bank=max(rung.bank, known.bank, key=PLACES.index),
    )


def _is_sound(rung: Rung) -> bool:
    sizes = (rung.micro_batch, rung.imgsz, rung.val_batch)
    return rung.bank in PLACES and all(isinstance(n, int) and n > 0 for n in sizes)
