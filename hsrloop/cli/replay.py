"""`hsrloop replay`: take the step again at which a run gave up, and show what it trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hsrloop.cli.run import check_file_place, check_png, prepare
from hsrloop.report.checkup import clean
from hsrloop.report.console import make_console
from hsrloop.report.files import SPELLED_OUT, json_text

if TYPE_CHECKING:
    import numpy as np

    from hsrloop.train.capsule import Capsule
    from hsrloop.train.replay import Replayed

_COLUMNS = 4
_SHOWN_FILES = 4


def run_replay(
    path: Path, *, device: str | None, float32: bool, sheet: Path | None, json_file: Path | None
) -> int:
    """Replay a capsule; return 0 when the same happens again, else 1.

    Raises:
        HsrloopError: the capsule cannot be read, or a file not be written.
    """
    sheet = path.with_suffix(".png") if sheet is None else sheet
    check_png(sheet, "--sheet")
    prepare()

    from hsrloop.report.plots import contact_sheet, save_picture
    from hsrloop.train.capsule import read
    from hsrloop.train.replay import replay

    capsule = read(path)
    for file, option in ((sheet, "--sheet"), (json_file, "--json")):
        if file is not None:
            check_file_place(file, option)
    replayed = replay(capsule, device_name=device, float32=float32)
    console = make_console()
    _tell(console, capsule, replayed)
    tiles = list(_tiles(capsule))
    save_picture(sheet, contact_sheet(tiles, columns=min(_COLUMNS, len(tiles))))
    console.print(f"Written: {clean(str(sheet))}", soft_wrap=True)
    if json_file is not None:
        text = json_text(_as_json(capsule, replayed), indent=2)
        json_file.write_text(text + "\n", encoding="utf-8", errors=SPELLED_OUT)
        console.print(f"Written: {clean(str(json_file))}", soft_wrap=True)
    return 0 if replayed.reproduces else 1


def _tell(console: Console, capsule: Capsule, replayed: Replayed) -> None:
    """Print what happened then and now, where numbers end, and the images."""
    epoch, sample = capsule.state["position"]
    console.print(
        f"Step {capsule.state['steps'] + 1}, epoch {epoch + 1} from sample {sample}, seed "
        f"{capsule.config.seed}, {capsule.config.model}: {clean(capsule.cause)}.",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("sum over the batch")
    for title in ("recorded", "now"):
        table.add_column(title, justify="right")
    now, then = (dataclasses.asdict(m) for m in (replayed.measured, replayed.recorded))
    for name, title in _TITLES.items():
        table.add_row(title, f"{then[name]:.9g}", f"{now[name]:.9g}")
    console.print(table)
    for title, place in _places(replayed):
        console.print(f"{title}: {place or 'none'}", soft_wrap=True)
    norms = ", ".join(f"{name} {norm:.4g}" for name, norm in replayed.norms.items())
    console.print(f"Gradient norms by group: {norms}", soft_wrap=True)
    console.print(f"Learning rate {capsule.lr:g}. Images of the batch:", soft_wrap=True)
    for line in _image_lines(capsule):
        console.print(f"  {line}", soft_wrap=True)
    console.print(_verdict(replayed), soft_wrap=True, style="bold")


_TITLES = {
    "box": "box loss",
    "cls": "class loss",
    "dfl": "distribution loss",
    "target_scores": "target scores",
    "norm": "gradient norm",
    "before": "outputs while finite",
}


def _places(replayed: Replayed) -> tuple[tuple[str, str], ...]:
    return (
        ("First output that is no finite number", replayed.measured.first_output),
        ("First such gradient, from the loss down", replayed.measured.first_gradient),
        ("First such output in eval mode", replayed.first_in_eval),
    )


def _verdict(replayed: Replayed) -> str:
    why = f" ({'; '.join(replayed.differences)})" if replayed.differences else ""
    if replayed.equal:
        return f"It happens again, bit by bit{why}."
    if replayed.reproduces:
        return f"It happens again, with other digits{why}."
    return f"It does not happen again{why}."


def _image_lines(capsule: Capsule) -> Iterator[str]:
    """Yield one line an image: its files and its boxes."""
    counts = [
        int((batch.image_index == i).sum())
        for batch in capsule.batches
        for i in range(len(batch.images))
    ]
    for number, (plan, count) in enumerate(zip(capsule.plans, counts, strict=True)):
        files = [Path(capsule.sources[layer["source"]]["path"]).name for layer in _layers(plan)]
        more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
        pasted = f", {len(plan['pastes'])} cut-outs" if plan["pastes"] else ""
        shown = ", ".join(map(clean, files[:_SHOWN_FILES]))
        yield f"{number}: {shown}{more}{pasted}; {count} boxes"


def _layers(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    mixed = plan["mix"]["layers"] if plan["mix"] else ()
    return [*plan["layers"], *mixed]


def _tiles(capsule: Capsule) -> Iterator[np.ndarray]:
    """Yield (S, S, 3) uint8 RGB pictures of the batch with their boxes."""
    import torch

    from hsrloop.report.plots import draw_boxes

    for batch in capsule.batches:
        side = batch.images.shape[-1]
        for i, image in enumerate(batch.images):
            mine = batch.image_index == i
            centre, size = batch.boxes_cxcywh[mine].view(-1, 2, 2).unbind(1)
            corners = torch.cat((centre - size / 2, centre + size / 2), dim=1) * side
            yield draw_boxes(
                image.permute(1, 2, 0).numpy(),
                corners.numpy(),
                batch.labels[mine].numpy(),
                capsule.names,
            )


def _as_json(capsule: Capsule, replayed: Replayed) -> dict[str, Any]:
    """Return all but the weights: settings, plans, files, boxes, numbers."""
    boxes = [
        {"boxes_cxcywh": b.boxes_cxcywh[m].tolist(), "labels": b.labels[m].tolist()}
        for b in capsule.batches
        for i in range(len(b.images))
        for m in (b.image_index == i,)
    ]
    return {
        "cause": capsule.cause,
        "position": capsule.state["position"],
        "step": capsule.state["steps"] + 1,
        "seed": capsule.config.seed,
        "lr": capsule.lr,
        "recorded": dataclasses.asdict(replayed.recorded),
        "now": dataclasses.asdict(replayed.measured),
        "norms": replayed.norms,
        "first_in_eval": replayed.first_in_eval,
        "differences": list(replayed.differences),
        "reproduces": replayed.reproduces,
        "images": [
            {"plan": dict(plan), **rows} for plan, rows in zip(capsule.plans, boxes, strict=True)
        ],
        "sources": {str(index): dict(source) for index, source in capsule.sources.items()},
        "cutouts": {str(index): path for index, path in capsule.cutouts.items()},
        "names": list(capsule.names),
        "fingerprint": capsule.fingerprint,
        "versions": dict(capsule.versions),
        "threads": capsule.threads,
        "config": capsule.config.to_json(),
    }
