"""Each kind of finding: how bad it is, what it does to training, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsrloop.records import Finding, Problem, Severity
from hsrloop.words import plural


@dataclass(frozen=True, slots=True)
class _Advice:
    severity: Severity
    noun: str  # what is counted, in the singular; empty when nothing is
    what: str
    effect: str
    remedy: str


_LOST = "The row is left out, so its object is trained as background: the model learns to miss it."
_TOO_GOOD = (
    "Validation looks too good: mAP, and the choice of best.pt, rest on pictures that were trained."
)
_NO_TRAINING = "None on training; the test set is smaller, or says less, than it seems."

ADVICE: dict[str, _Advice] = {
    "yaml": _Advice(
        "error", "", "data.yaml cannot be used as it is", "Training refuses to start.",
        "Mend what is named here.",
    ),
    "unusable": _Advice(
        "error", "", "no usable object", "Training refuses to start.",
        "Mend the labels and images named here, or point data.yaml to others.",
    ),
    "unreadable": _Advice(
        "warning", "image", "cannot be read", "Left out, together with its labels.",
        "Copy it again from where it came, or delete it and its label file.",
    ),
    "listed-missing": _Advice(
        "warning", "listed image", "no such image", "Not used.",
        "Copy the images, or take their lines out of the list.",
    ),
    "kind-unread": _Advice(
        "warning", "picture", "of a kind that is not read", "Not used, nor are its labels.",
        "Convert it to JPEG or PNG under the same name.",
    ),
    "class-unknown": _Advice(
        "warning", "label row", "class beyond names", _LOST,
        "Correct the number, which counts from 0, or add the class to names in data.yaml.",
    ),
    "outside": _Advice(
        "warning", "label row", "outside the image", _LOST,
        "Write fractions of width and height, 0 to 1. Pixels? Divide by the image's size.",
    ),
    "no-area": _Advice(
        "warning", "label row", "a box without area", _LOST,
        "Draw the box again, or delete the row.",
    ),
    "columns": _Advice(
        "warning", "label row", "wrong number of columns", _LOST,
        "Write `class cx cy w h`, or a polygon `class x1 y1 x2 y2 x3 y3 ...`, with spaces between.",
    ),
    "not-numbers": _Advice(
        "warning", "label row", "no numbers", _LOST, "Write numbers only; classes by their number."
    ),
    "class-fraction": _Advice(
        "warning", "label row", "class is no whole number", _LOST, "Write the class's number."
    ),
    "box-two-classes": _Advice(
        "warning", "box", "given two classes", "The two classes are trained against each other.",
        "Keep the row of the right class.",
    ),
    "box-twice": _Advice(
        "warning", "box", "drawn twice",
        "One object counts as two: every detector misses one of them, and trains on noise.",
        "Delete one of the two rows.",
    ),
    "unlabelled": _Advice(
        "note", "image", "no label file",
        "Trained as background. Right for pictures without an object; in others, the model learns "
        "to miss what is shown.",
        "Label them; for a deliberate background write an empty label file.",
    ),
    "labels-alone": _Advice(
        "warning", "label file", "no image", "Its objects are not trained.",
        "Put the image where its name says, or delete the file.",
    ),
    "labels-unused": _Advice(
        "note", "label file", "its image is in no split", "Its objects are not trained.",
        "Add the image, or its folder, to train, val or test in data.yaml.",
    ),
    "class-untrained": _Advice(
        "warning", "class", "no training example", "The model will never find it.",
        "Photograph and label it, or take it out of names.",
    ),
    "class-unvalidated": _Advice(
        "warning", "class", "no validation example",
        "Its AP is not measured, and best.pt is chosen without it.",
        "Move some of its images, of other scenes than those trained on, to val.",
    ),
    "name-twice": _Advice(
        "warning", "class name", "used twice",
        "If they are one object, its two classes are trained against each other; if not, the robot "
        "cannot tell them apart by name.",
        "Give each class a name of its own, or write one number in all label files.",
    ),
    "copy-across": _Advice(
        "warning", "image", "also in train", _TOO_GOOD, "Keep each picture in one split only."
    ),
    "alike-across": _Advice(
        "warning", "image", "nearly the same picture as one in train", _TOO_GOOD,
        "Keep all versions of a picture in one split.",
    ),
    "burst-across": _Advice(
        "note", "image", "taken right before or after one in train",
        "Validation may look too good: it shows scenes that were trained on.",
        "Put whole scenes into one split; photograph other scenes for val.",
    ),
    "copy-contradicts": _Advice(
        "warning", "image", "a copy with other labels",
        "The same picture is trained with two answers.", "Delete the copy whose labels are wrong.",
    ),
    "copy": _Advice(
        "note", "image", "a copy of another", "It weighs twice.", "Delete the copies."
    ),
    "alike": _Advice(
        "note", "group", "pictures that look alike",
        "Each group teaches little more than one picture.",
        "Photograph more scenes rather than more of the same; delete what is too many.",
    ),
    "val-is-train": _Advice(
        "warning", "", "val is the same images as train",
        "A tenth of the images, of two or more, is held out for validation and not trained on.",
        "Photograph other scenes for val.",
    ),
    "no-val": _Advice(
        "note", "", "no val in data.yaml",
        "A tenth of the images, of two or more, is held out for validation and not trained on.",
        "Add val images of other scenes to know how good the model is.",
    ),
    "tiny": _Advice(
        "note", "box", "tiny at this imgsz",
        "Little is left of such an object to learn from; the finest grid has cells of 8 px.",
        "Train with a larger --imgsz, or photograph from nearer.",
    ),
    "large": _Advice(
        "note", "image", "far larger than imgsz",
        "Decoding takes most of the time of an epoch without cache, and all is shrunk to imgsz.",
        "Shrink the files to about twice imgsz, or train with --cache.",
    ),
    "row-twice": _Advice(
        "note", "label row", "repeats another", "Counted once; nothing is lost.", "Delete it."
    ),
    "ros-name": _Advice(
        "note", "class name", "unsafe as a ROS frame or topic",
        "None on training. ROS takes letters, digits, _ and /, beginning with a letter; a frame or "
        "topic named after the class is refused.",
        "Rename the class before training: names are stored in best.pt.",
    ),
    "no-names": _Advice(
        "note", "", "data.yaml names no classes", "Classes are called by number.",
        "Add names: [first, second, ...] to data.yaml.",
    ),
    "moved": _Advice(
        "note", "path", "found elsewhere than written", "Training uses the place named here.",
        "Write paths relative to data.yaml.",
    ),
}  # fmt: skip
_RANK = {kind: i for i, kind in enumerate(ADVICE)}
_GRADES: tuple[Severity, ...] = ("error", "warning", "note")


def finding(
    kind: str,
    problems: Sequence[Problem],
    *,
    split: str = "",
    of: int = 0,
    severity: Severity | None = None,
) -> Finding:
    """Return the finding of all problems of one kind in one split, at least one.

    Args:
        of: how many there are in all, of which these are some; 0 when it says nothing.
        severity: in place of the kind's usual one. A test set is no part of training: what is wrong
            with it is a note at most.
    """
    advice = ADVICE[kind]
    return Finding(
        kind=kind,
        severity="note" if split == "test" else severity or advice.severity,
        split=split,
        title=_title(advice, len(problems), of, split),
        effect=_NO_TRAINING if split == "test" else advice.effect,
        remedy=advice.remedy,
        problems=tuple(problems),
    )


def _title(advice: _Advice, count: int, of: int, split: str) -> str:
    if not advice.noun:
        return f"{split}: {advice.what}" if split else advice.what
    share = f"{count} of {of}" if of else str(count)
    nouns = plural(max(count, of), advice.noun)
    return f"{share} {nouns}{f' in {split}' if split else ''}: {advice.what}"


def by_kind(problems: Sequence[Problem], *, split: str = "") -> list[Finding]:
    """Return one finding for each kind among the problems."""
    kinds = dict.fromkeys(problem.kind for problem in problems)
    return [finding(kind, [p for p in problems if p.kind == kind], split=split) for kind in kinds]


def worst_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return findings by severity, then in the order of `ADVICE`."""
    return tuple(sorted(findings, key=lambda f: (_GRADES.index(f.severity), _RANK[f.kind])))
