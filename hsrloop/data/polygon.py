"""The box around what is visible of a polygon."""

from __future__ import annotations

import numpy as np

_UNIT = np.array([0.0, 0.0, 1.0, 1.0])


def polygon_extent(polygon: np.ndarray, visible: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the xyxy box of a polygon cut by a rectangle, mapped, and cut by the unit square.

    What is left is bounded by parts of the polygon's edges and by corners of the window that lie in
    it. Its own outline is not needed, and of a concave polygon may have several pieces.

    Args:
        polygon: (k, 2) in source units.
        visible: (4,) xyxy rectangle in source units.
        matrix: (2, 3) source units to output units.

    Returns:
        (4,) in output units; zeros when nothing is left.
    """
    points = _mapped(polygon, matrix)
    if not (_within(polygon, visible) and _within(points, _UNIT)):
        window = _window(visible, matrix)
        if len(window):
            ends = _ends(points, _inside(points, window))
            points = np.concatenate((ends, window[_contained(window, points)]))
        else:
            points = window
    if not len(points):
        return np.zeros(4)
    return np.concatenate((points.min(0), points.max(0))).clip(0, 1)


def _within(points: np.ndarray, rectangle: np.ndarray) -> bool:
    return bool((points >= rectangle[:2]).all() and (points <= rectangle[2:]).all())


def _mapped(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    found: np.ndarray = points @ matrix[:, :2].T + matrix[:, 2]
    return found


def _window(visible: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the (m, 2) corners of a rectangle, mapped, and cut by the unit square; m may be 0.

    Source: Sutherland and Hodgman 1974, whose method is exact for what is convex.
    """
    x1, y1, x2, y2 = visible
    corners = _mapped(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]), matrix)
    for axis in (0, 1):
        for limit, sign in ((_UNIT[axis], 1.0), (_UNIT[axis + 2], -1.0)):
            distance = sign * (corners[:, axis] - limit)
            if not (distance >= 0).all():
                corners = _half_plane(corners, distance)
    return corners


def _half_plane(polygon: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Keep the side where `distance` (k,) is at least 0, with the points where edges cross it."""
    following, ahead = np.roll(polygon, -1, axis=0), np.roll(distance, -1)
    keep, crosses = distance >= 0, (distance >= 0) != (ahead >= 0)
    share = distance / np.where(crosses, distance - ahead, 1.0)
    crossing = polygon + share[:, None] * (following - polygon)
    points = np.stack((polygon, crossing), axis=1).reshape(-1, 2)
    kept: np.ndarray = points[np.stack((keep, crosses), axis=1).ravel()]
    return kept


def _inside(points: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return how far points are inside of each side of a convex window, in units of its own.

    Returns:
        (k, m), negative outside.
    """
    following = np.roll(window, -1, axis=0)
    along = following - window
    area = (window[:, 0] * following[:, 1] - window[:, 1] * following[:, 0]).sum()
    inwards = np.stack((-along[:, 1], along[:, 0]), 1) * np.sign(area)  # whichever way round
    found: np.ndarray = points @ inwards.T - (window * inwards).sum(1)
    return found


def _ends(polygon: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the (n, 2) ends of the parts of edges for which `inside` (k, m) is not negative.

    Source: Cyrus and Beck 1978.
    """
    following, ahead = np.roll(polygon, -1, axis=0), np.roll(inside, -1, axis=0)
    enters, leaves = (inside < 0) & (ahead >= 0), (inside >= 0) & (ahead < 0)
    share = inside / np.where(enters | leaves, inside - ahead, 1.0)
    start = np.where(enters, share, 0.0).max(1)
    stop = np.where(leaves, share, 1.0).min(1)
    seen = (start <= stop) & ~((inside < 0) & (ahead < 0)).any(1)
    points = [
        (1 - at[seen, None]) * polygon[seen] + at[seen, None] * following[seen]
        for at in (start, stop)
    ]
    return np.concatenate(points)


def _contained(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Return (m,) whether a line from each point to the right crosses an odd number of edges."""
    following = np.roll(polygon, -1, axis=0)
    (x, y), (ahead_x, ahead_y) = polygon.T, following.T
    own_x, own_y = points[:, :1], points[:, 1:]
    crosses = (y > own_y) != (ahead_y > own_y)  # (m, k)
    rise = np.where(crosses, ahead_y - y, 1.0)
    right = x + (own_y - y) / rise * (ahead_x - x) > own_x
    found: np.ndarray = (crosses & right).sum(1) % 2 == 1
    return found
