"""pareto.py against brute force, closed-form volumes, and its own promises under noise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch import pareto


def points(n_axes: st.SearchStrategy[int], max_points: int = 12, top: int = 5) -> st.SearchStrategy[np.ndarray]:
    """Small whole numbers, so that ties and duplicates come up all the time."""
    return n_axes.flatmap(
        lambda m: st.lists(st.tuples(*[st.integers(0, top)] * m), min_size=1, max_size=max_points).map(
            lambda rows: np.array(rows, dtype=float)
        )
    )


def brute_front(values: np.ndarray) -> list[int]:
    def beats(a: np.ndarray, b: np.ndarray) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    return [i for i, p in enumerate(values) if not any(beats(q, p) for q in values)]


def brute_volume(values: np.ndarray, reference: np.ndarray) -> float:
    """Unit cells of an integer grid that some point dominates."""
    cells = itertools.product(*(range(int(r)) for r in reference))
    return float(sum(any((p <= np.array(cell)).all() for p in values) for cell in cells))


@settings(deadline=None)
@given(points(st.integers(1, 4)))
def test_front_is_what_nothing_dominates(values: np.ndarray) -> None:
    assert pareto.front(values).tolist() == brute_front(values)


@settings(deadline=None)
@given(points(st.integers(1, 4)), st.data())
def test_front_does_not_depend_on_the_order(values: np.ndarray, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(len(values)))))
    assert sorted(order[pareto.front(values[order])]) == pareto.front(values).tolist()


@settings(deadline=None)
@given(points(st.integers(1, 4)))
def test_every_rank_is_the_front_of_the_rest(values: np.ndarray) -> None:
    rank = pareto.ranks(values)
    for level in range(rank.max() + 1):
        left = np.flatnonzero(rank >= level)
        assert left[brute_front(values[left])].tolist() == np.flatnonzero(rank == level).tolist()


@settings(deadline=None)
@given(points(st.integers(1, 4), max_points=8, top=4))
def test_hypervolume_counts_cells(values: np.ndarray) -> None:
    reference = np.full(values.shape[1], 4.0)
    assert pareto.hypervolume(values, reference) == brute_volume(values, reference)


@settings(deadline=None)
@given(points(st.integers(2, 4)), st.data())
def test_hypervolume_grows_only_by_points_off_the_front(values: np.ndarray, data: st.DataObject) -> None:
    reference = np.full(values.shape[1], 6.0)
    extra = np.array([data.draw(st.tuples(*[st.integers(0, 5)] * values.shape[1]))], dtype=float)
    before, after = pareto.hypervolume(values, reference), pareto.hypervolume(np.vstack([values, extra]), reference)
    covered = (values <= extra).all(axis=1).any()
    assert after == before if covered else after > before


def test_hypervolume_of_known_fronts() -> None:
    x = np.linspace(0, 1, 1501)
    zdt1 = np.stack([x, 1 - np.sqrt(x)], axis=1)  # area under the front: 1/3
    zdt2 = np.stack([x, 1 - x**2], axis=1)  # 2/3
    assert pareto.hypervolume(zdt1, [1.1, 1.1]) == pytest.approx(1.21 - 1 / 3, abs=1e-3)
    assert pareto.hypervolume(zdt2, [1.1, 1.1]) == pytest.approx(1.21 - 2 / 3, abs=1e-3)
    # k equally spaced points of ZDT1's line-shaped cousin f2 = 1 - f1: a staircase, exactly
    line = np.stack([np.linspace(0, 1, 11), 1 - np.linspace(0, 1, 11)], axis=1)
    assert pareto.hypervolume(line, [1, 1]) == pytest.approx(0.45, abs=1e-12)


def test_hypervolume_of_a_sphere_in_three_dimensions() -> None:
    """DTLZ2: the volume outside the unit sphere's octant; a grid of points falls short of it, less with more points."""

    def grid(n: int) -> np.ndarray:
        a, b = np.meshgrid(np.linspace(0, np.pi / 2, n), np.linspace(0, np.pi / 2, n))
        return np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], axis=-1).reshape(-1, 3)

    exact = 1 - math.pi / 6
    coarse, fine = (pareto.hypervolume(grid(n), [1, 1, 1]) for n in (6, 16))
    assert 0.6 * exact < coarse < fine < exact
    assert fine == pytest.approx(exact, rel=0.15)


def test_hypervolume_edges() -> None:
    assert pareto.hypervolume(np.empty((0, 2)), [1, 1]) == 0
    assert pareto.hypervolume([[1.0, 0.0], [0.0, 2.0]], [1, 1]) == 0  # on or beyond the reference
    assert pareto.hypervolume([[-np.inf, 2.0]], [1, 1]) == 0
    with pytest.raises(ValueError, match="no bound"):
        pareto.hypervolume([[-np.inf, 0.0]], [1, 1])
    with pytest.raises(ValueError, match="expected 2 finite numbers"):
        pareto.hypervolume([[0.0, 0.0]], [1.0])


def test_goals_turn_columns_round() -> None:
    values = pareto.to_minimise([[1, 2], [3, 4]], ["min", "max"])
    assert values.tolist() == [[1, -2], [3, -4]]
    assert pareto.to_minimise([], ["min", "max"]).shape == (0, 2)
    with pytest.raises(ValueError, match="expected one min or max for each"):
        pareto.to_minimise([[1, 2]], ["min"])
    with pytest.raises(ValueError, match="NaN"):
        pareto.to_minimise([[1, math.nan]], ["min", "min"])
    with pytest.raises(ValueError, match=r"expected \[points, objectives\]"):
        pareto.front([1.0, 2.0])


def test_dominance_needs_one_strict_gain() -> None:
    assert pareto.dominates([1, 1], [1, 2])
    assert not pareto.dominates([1, 1], [1, 1])
    assert not pareto.dominates([0, 3], [1, 1])
    assert pareto.front([[1, 1], [1, 1], [1, 2]]).tolist() == [0, 1]


def test_crowding() -> None:
    distance = pareto.crowding([[0, 4], [1, 2], [4, 0]])
    assert distance.tolist() == [math.inf, 2.0, math.inf]
    assert pareto.crowding([[0, 1]]).tolist() == [math.inf]
    assert pareto.crowding(np.empty((0, 2))).tolist() == []
    assert np.isinf(pareto.crowding([[1, 1], [1, 1]])).all()


@settings(deadline=None)
@given(points(st.integers(1, 4)))
def test_knee_is_on_the_front_and_free_of_units(values: np.ndarray) -> None:
    knee = pareto.knee(values)
    assert knee in pareto.front(values)
    scale = 2.0 ** np.arange(values.shape[1])  # powers of two keep the arithmetic exact
    assert pareto.knee(values * scale + 8) == knee


def test_knee_is_the_largest_bulge() -> None:
    values = [[0, 10], [1, 3], [5, 1], [10, 0], [9, 9]]
    assert pareto.knee(values) == 1
    # by distance from the chord through the extremes (0, 1) and (1, 0)
    scaled = np.array(values[:4]) / 10
    assert np.argmax((1 - scaled.sum(axis=1)) / math.sqrt(2)) == 1
    with pytest.raises(ValueError, match="no points"):
        pareto.knee(np.empty((0, 2)))


@settings(deadline=None)
@given(points(st.integers(1, 3)))
def test_without_noise_membership_is_the_front(values: np.ndarray) -> None:
    probability = pareto.membership(values, np.zeros_like(values))
    assert np.flatnonzero(probability).tolist() == brute_front(values)
    assert set(probability) <= {0.0, 1.0}


@settings(deadline=None, max_examples=40)
@given(points(st.integers(1, 3), max_points=6), st.integers(0, 3))
def test_membership_by_brute_force(values: np.ndarray, seed: int) -> None:
    sigma = np.random.default_rng(seed).choice([0.0, 0.3, 2.0], size=values.shape)
    found = pareto.membership(values, sigma, n_samples=200, seed=seed)
    noise = np.random.default_rng(seed).standard_normal((200, *values.shape))
    counts = np.zeros(len(values))
    for draw in values + noise * sigma:
        counts[brute_front(draw)] += 1
    assert found == pytest.approx(counts / 200, abs=1e-12)


def test_membership_of_two_rivals() -> None:
    """On one axis the chance is that of a normal difference; a clear loser has none."""
    found = pareto.membership([[0.0], [1.0], [100.0]], np.ones((3, 1)), n_samples=20_000)
    loses = 0.5 * math.erfc(1 / math.sqrt(2) / math.sqrt(2))  # P(N(1, 2) < 0)
    assert found == pytest.approx([1 - loses, loses, 0.0], abs=0.02)
    first, again, other = (pareto.membership([[0.0], [1.0]], np.ones((2, 1)), seed=seed)[1] for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ValueError, match="at least 0"):
        pareto.membership([[0.0]], [[-1.0]])


def test_ties_need_every_axis() -> None:
    values = [[1.00, 5.0], [1.05, 5.0], [1.05, 6.0], [2.00, 5.0]]
    sigma = [[0.02, 0.0]] * 4
    together = pareto.tied(values, sigma)
    assert np.argwhere(together).tolist() == [[0, 1], [1, 0]]
    assert not pareto.tied(values, sigma, n_sigmas=1.0).any()
    assert pareto.tied([[1, 1], [1, 1]], np.zeros((2, 2))).tolist() == [[False, True], [True, False]]
