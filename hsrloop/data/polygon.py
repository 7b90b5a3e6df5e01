"""The box around what is visible of a polygon."""

from __future__ import annotations

import numpy as np


def polygon_extent(polygon: np.ndarray, visible: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the xyxy box of a polygon cut by a rectangle, mapped, and cut by the unit square.

    Args:
        polygon: (k, 2) in source units.
        visible: (4,) xyxy rectangle in source units.
        matrix: (2, 3) source units to output units.

    Returns:
        (4,) in output units; zeros when nothing is left.
    """
    inside = _cut(polygon, visible)
    if len(inside):
        inside = _cut(inside @ matrix[:, :2].T + matrix[:, 2], np.array([0.0, 0.0, 1.0, 1.0]))
    if not len(inside):
        return np.zeros(4)
    return np.concatenate((inside.min(0), inside.max(0)))


def _cut(polygon: np.ndarray, rectangle: np.ndarray) -> np.ndarray:
    """Return the polygon's part inside an xyxy rectangle; (0, 2) when there is none.

    Source: Sutherland and Hodgman 1974; the seams it leaves in a concave polygon lie on the
    rectangle's edge and do not change the box of a part that reaches it.
    """
    low, high = polygon.min(0), polygon.max(0)
    for axis in (0, 1):
        for limit, sign in ((rectangle[axis], 1.0), (rectangle[axis + 2], -1.0)):
            reach = low[axis] if sign > 0 else high[axis]
            if sign * (reach - limit) >= 0:
                continue  # all of it is on the right side
            polygon = _half_plane(polygon, sign * (polygon[:, axis] - limit))
            if not len(polygon):
                return polygon
            low, high = polygon.min(0), polygon.max(0)
    return polygon


def _half_plane(polygon: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Keep the side where `distance` (k,) is at least 0, with the points where edges cross it."""
    following, ahead = np.roll(polygon, -1, axis=0), np.roll(distance, -1)
    keep, crosses = distance >= 0, (distance >= 0) != (ahead >= 0)
    share = distance / np.where(crosses, distance - ahead, 1.0)
    crossing = polygon + share[:, None] * (following - polygon)
    points = np.stack((polygon, crossing), axis=1).reshape(-1, 2)
    kept: np.ndarray = points[np.stack((keep, crosses), axis=1).ravel()]
    return kept
