"""Export of a trained file through Ultralytics' own exporter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hsrloop.errors import DependencyError

_LIBRARIES = {"onnx": ("onnx", "onnxslim", "onnxruntime")}


def check_export(form: str | None) -> None:
    """Check that what an export needs is installed, before anyone waits for a training.

    Raises:
        DependencyError: a library is missing.
    """
    missing = [
        name for name in _LIBRARIES.get(form or "", ()) if not importlib.util.find_spec(name)
    ]
    if missing:
        raise DependencyError(
            f"--export {form} needs {', '.join(missing)}. "
            "Run scripts/install, or: pip install 'hsrloop[export]'."
        )


def export(path: Path, form: str, *, imgsz: int) -> Path:
    """Export weights and return the new file, which lies beside them.

    Args:
        path: a best.pt.
        form: "onnx".
        imgsz: side of the square input the exported network takes, px.

    Raises:
        DependencyError: the exporter's libraries are missing or do not fit together.
    """
    # Loads torch, which a check need not wait for.
    from hsrloop.model.yolo import import_ultralytics

    ultralytics = import_ultralytics()
    try:
        written = ultralytics.YOLO(path).export(
            format=form, imgsz=imgsz, device="cpu", verbose=False
        )
    except (ImportError, AttributeError) as error:
        raise DependencyError(
            f"exporting {path} to {form} failed ({error}). The trained weights are safe; "
            "pip install 'hsrloop[export]', then export with ultralytics."
        ) from error
    return Path(written)
