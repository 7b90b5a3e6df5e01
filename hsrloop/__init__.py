"""hsrloop: fine-tune YOLOv8 on a robot team's objects, before the match starts.

Importing this package loads neither torch nor ultralytics.
"""

from hsrloop.config import COMPETITION_CONFIG, FAST_CONFIG, TrainConfig

__version__ = "0.1.0"

__all__ = ["COMPETITION_CONFIG", "FAST_CONFIG", "TrainConfig", "__version__"]
