"""Export of a trained file through Ultralytics' own exporter."""

from __future__ import annotations

from pathlib import Path

from hsrloop.errors import DependencyError
from hsrloop.model.yolo import import_ultralytics


def export(path: Path, form: str, *, imgsz: int) -> Path:
    """Export weights and return the new file, which lies beside them.

    Args:
        path: a best.pt.
        form: "onnx".
        imgsz: side of the square input the exported network takes, px.

    Raises:
        DependencyError: the exporter's libraries are missing or do not fit together.
    """
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
