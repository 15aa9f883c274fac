"""Dominance, front, hypervolume, knee, and what noise does to them. numpy only.

Points are the rows of a matrix [n, m] in which every column is to be made small (`to_minimise`). Equal points do not
dominate each other, so duplicates of a front point are on the front too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Bools = NDArray[np.bool_]


def _matrix(values: ArrayLike) -> Floats:
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"found values of shape {points.shape}; expected [points, objectives]")
    if np.isnan(points).any():
        raise ValueError("found NaN among the values; leave such points out")
    return points


def to_minimise(values: ArrayLike, goals: Sequence[Literal["min", "max"]]) -> Floats:
    """[n, m] with the columns to maximise negated; raises ValueError on NaN or if `goals` does not fit."""
    points = np.asarray(values, dtype=np.float64).reshape(-1, len(goals)) if np.size(values) == 0 else _matrix(values)
    if points.shape[1] != len(goals) or not set(goals) <= {"min", "max"}:
        raise ValueError(f"found {points.shape[1]} columns and goals {list(goals)}; expected one min or max for each")
    minimised: Floats = points * np.array([1.0 if goal == "min" else -1.0 for goal in goals])
    return minimised


def dominates(a: ArrayLike, b: ArrayLike) -> bool:
    """Whether point a [m] is nowhere worse than b [m] and somewhere better."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return bool((first <= second).all() and (first < second).any())


def front(values: ArrayLike) -> Indices:
    """Indices of the points that no other dominates, ascending."""
    points = _matrix(values)
    order = np.lexsort(points.T[::-1])  # a point can only be dominated by one that comes before it
    kept = np.empty_like(points)
    chosen: list[int] = []
    for i in order:
        point, rivals = points[i], kept[: len(chosen)]
        if not ((rivals <= point).all(axis=1) & (rivals < point).any(axis=1)).any():
            kept[len(chosen)] = point
            chosen.append(int(i))
    return np.array(sorted(chosen), dtype=np.intp)


def ranks(values: ArrayLike) -> Indices:
    """0 for the front, 1 for the front of what remains without it, and so on (non-dominated sorting, NSGA-II)."""
    points = _matrix(values)
    rank = np.full(len(points), -1, dtype=np.intp)
    left, level = np.arange(len(points)), 0
    while len(left):
        peeled = front(points[left])
        rank[left[peeled]] = level
        left, level = np.delete(left, peeled), level + 1
    return rank


def crowding(values: ArrayLike) -> Floats:
    """Distance between each point's neighbours along every axis, summed; infinite at the ends (Deb et al. 2002).

    Each axis is measured in units of its range. Meant for the points of one rank.
    """
    points = _matrix(values)
    n, m = points.shape
    distance = np.zeros(n)
    for axis in range(m):
        order = np.argsort(points[:, axis], kind="stable")
        column = points[order, axis]
        if n < 3 or column[0] == column[-1]:
            distance[order[[0, -1]] if n else []] = np.inf
            continue
        distance[order[1:-1]] += (column[2:] - column[:-2]) / (column[-1] - column[0])
        distance[order[[0, -1]]] = np.inf
    return distance


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """The exact volume between the points and the reference point [m], for any number of objectives.

    One axis: the gap; two: a sweep; more: the points' exclusive volumes summed (WFG, While, Bradstreet and Barone
    2012). Points that are not better than the reference on every axis add nothing.
    """
    points, worst = _matrix(values), np.asarray(reference, dtype=np.float64)
    if worst.shape != (points.shape[1],) or not np.isfinite(worst).all():
        raise ValueError(f"found reference {worst.tolist()}; expected {points.shape[1]} finite numbers")
    points = points[(points < worst).all(axis=1)]
    if len(points) and not np.isfinite(points).all():
        raise ValueError("found an infinite value better than the reference; its volume has no bound")
    return _volume(np.unique(points[front(points)], axis=0), worst) if len(points) else 0.0


def _volume(points: Floats, worst: Floats) -> float:
    """Hypervolume of distinct points in lexicographic order, none of which dominates another."""
    if points.shape[1] == 1:
        return float(worst[0] - points[:, 0].min())
    if points.shape[1] == 2:  # the second axis falls as the first rises
        ceilings = np.concatenate([worst[1:], points[:-1, 1]])
        return float(((worst[0] - points[:, 0]) * (ceilings - points[:, 1])).sum())
    points = points[::-1]  # from the worst first axis on, so that fewer points are cut at each step
    total = 0.0
    for i, point in enumerate(points):
        total += float(np.prod(worst - point))
        cut = np.maximum(points[i + 1 :], point)  # the part of this box that later points cover as well
        if len(cut):
            # every later point is at least as good on the first axis, so all cuts share it
            rest = cut[:, 1:]
            rest = np.unique(rest[front(rest)], axis=0)
            total -= float(worst[0] - point[0]) * _volume(rest, worst[1:])
    return total


def knee(values: ArrayLike) -> int:
    """Index of the front's knee: the front point farthest, towards the ideal, from the plane through the extremes.

    Every axis is brought to [0, 1] between the front's best and worst value; the plane is sum(z) = 1, through the
    corners at which one axis is worst and the others are best. With two objectives these corners are the front's own
    extremes, and the knee is the largest bulge of the front below their chord (Das 1999, "On characterizing the knee
    of the Pareto curve"). Ties go to the first; raises ValueError if there are no points.
    """
    points = _matrix(values)
    if not len(points):
        raise ValueError("no points, so no knee")
    members = front(points)
    best, worst = points[members].min(axis=0), points[members].max(axis=0)
    scaled = (points[members] - best) / np.where(worst > best, worst - best, 1.0)
    return int(members[np.argmin(scaled.sum(axis=1))])


def membership(values: ArrayLike, spreads: ArrayLike, n_samples: int | None = None, seed: int = 0) -> Floats:
    """The probability [n] that each point is on the front, if every value carries independent normal noise.

    spreads: standard deviations [n, m], 0 where a value is exact. Estimated from `n_samples` draws around the measured
    values (None: 10,000, of large matrices fewer and at least 1000), so the standard error is at most
    0.5 / sqrt(n_samples); without any noise it is exactly 0 or 1.
    """
    points, sigma = _matrix(values), _matrix(spreads)
    n_samples = n_samples or max(1000, min(10_000, 500_000 // max(1, points.size)))
    if points.shape != sigma.shape or (sigma < 0).any():
        raise ValueError(f"found spreads of shape {sigma.shape}; expected {points.shape} numbers of at least 0")
    probability = np.zeros(len(points))
    # whom another point beats by 5 standard deviations of the difference on every axis never comes up in the draws,
    # nor is it needed to beat anyone
    alive = np.flatnonzero([not _surely_beaten(i, points, sigma) for i in range(len(points))])
    if not sigma.any():
        probability[alive] = 1.0
        return probability
    noise = np.random.default_rng(seed).standard_normal((n_samples, *points.shape))  # [S, n, m]
    drawn = np.moveaxis((points + noise * sigma)[:, alive], 2, 0).copy()  # [m, S, n alive]
    beaten = np.zeros(drawn.shape[1:], dtype=bool)
    for j in range(len(alive)):
        no_worse, better = np.ones_like(beaten), np.zeros_like(beaten)
        for column in drawn:
            no_worse &= column[:, j : j + 1] <= column
            better |= column[:, j : j + 1] < column
        beaten |= no_worse & better
    probability[alive] = 1.0 - beaten.mean(axis=0)
    return probability


def _surely_beaten(i: int, points: Floats, sigma: Floats) -> bool:
    sure = points + 5 * np.hypot(sigma, sigma[i])
    return bool(((sure <= points[i]).all(axis=1) & (sure < points[i]).any(axis=1)).any())


def tied(values: ArrayLike, spreads: ArrayLike, n_sigmas: float = 2.0) -> Bools:
    """[n, n]: whether two points cannot be told apart: on every axis they differ by at most `n_sigmas` standard
    deviations of their difference, sqrt(s_i^2 + s_j^2). Exact axes must be equal. No point is tied with itself.
    """
    points, sigma = _matrix(values), _matrix(spreads)
    gap = np.abs(points[:, None] - points[None])  # [n, n, m]
    allowed = n_sigmas * np.hypot(sigma[:, None], sigma[None])
    together: Bools = np.all(gap <= allowed, axis=2) & ~np.eye(len(points), dtype=bool)
    return together
