"""Class names that the robot's software would stumble over."""

from __future__ import annotations

import re
import unicodedata

from hsrloop.data.doctor.advice import finding
from hsrloop.data.sets.manifest import Manifest
from hsrloop.records import Finding, Problem

# Source: ROS graph resource names, wiki.ros.org/Names; without the leading ~ and /.
_ROS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_/]*")


def name_findings(manifest: Manifest) -> list[Finding]:
    """Return the classes whose names are unsafe as ROS frames or topics, with safe ones."""
    unsafe = [
        Problem("ros-name", manifest.yaml, f"'{name}', better {ros_name(name, i)}", line)
        for i, (name, line) in enumerate(zip(manifest.names, manifest.name_lines, strict=True))
        if not _ROS_NAME.fullmatch(name)
    ]
    return [finding("ros-name", unsafe)] if unsafe else []


def ros_name(name: str, number: int) -> str:
    """Return a name like the given one that ROS takes; class_7 when nothing of it can stay."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9_/]+", "_", plain).strip("_/")
    if not re.search(r"[A-Za-z0-9]", safe):
        return f"class_{number}"
    return safe if safe[0].isalpha() else f"obj_{safe}"
