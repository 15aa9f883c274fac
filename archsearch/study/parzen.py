"""Optuna's Parzen estimator with less work: equal kernels and equal points once, and the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters
from optuna.samplers._tpe.probability_distributions import _log_gauss_mass_unique, _unique_inverse_2d

Numbers = NDArray[np.intp]
Floats = NDArray[np.float64]
Points = dict[str, Floats]  # the values of every parameter, choices by their numbers
FAR = 9.0  # standard deviations, beyond which the mass is 0 in double precision
MANY = 2000
kernels_of: Any = _ParzenEstimator._calculate_numerical_distributions  # it uses nothing of an estimator


class Density:
    """Optuna's Parzen estimator with the same numbers: a kernel for each observation, and the prior as the last.

    A kernel of a categorical parameter depends on the observed choice alone, so that there are few, and few points.
    """

    def __init__(
        self,
        seen: dict[str, Floats],
        search_space: dict[str, BaseDistribution],
        options: _ParzenEstimatorParameters,
        weights: Floats | None = None,
    ) -> None:
        n = len(next(iter(seen.values())))
        if weights is None:
            weights = _weights(options.weights, n)
        self.weights = np.append(weights, options.prior_weight) if n else np.ones(1)
        self.weights /= self.weights.sum()
        self.names = list(search_space)
        self.choices: dict[str, _Choices] = {}
        self.numbers: dict[str, Any] = {}  # distributions of Optuna: mu and sigma of every kernel, the range
        for name, space in search_space.items():
            if isinstance(space, CategoricalDistribution):
                self.choices[name] = _Choices(seen[name], len(space.choices), options.prior_weight)
            else:
                self.numbers[name] = kernels_of(None, seen[name], space, options)

    def sample(self, random: np.random.RandomState, size: int) -> Points:
        """Points, drawn from the stream in Optuna's order: kernels, choices, numbers."""
        shares = self.weights.cumsum()
        shares /= shares[-1]
        kernels = shares.searchsorted(random.random_sample(size), side="right")  # as RandomState.choice
        points = {name: choices.sample(random, kernels) for name, choices in self.choices.items()}
        return points | _draw(random, self.numbers, kernels)

    def distinct(self, points: Points) -> Points:
        """The points without those that come again, in the order of the first; choices do, numbers hardly."""
        if self.numbers:
            return points
        codes = np.zeros(1, dtype=np.intp)
        for name, choices in self.choices.items():
            codes = codes * choices.n + points[name].astype(np.intp)
        first = sorted({code: at for at, code in reversed(list(enumerate(codes.tolist())))}.values())
        return {name: points[name][first] for name in self.names}

    def log_pdf(self, points: Points) -> Floats:
        """At each of the points."""
        logs = np.zeros((len(next(iter(points.values()))), len(self.weights)))
        continuous = []
        for name in self.names:  # sums depend on the order
            if name in self.choices:
                logs += self.choices[name].log_pdf(points[name])
            elif self.numbers[name].step:
                log_mass, log_whole = _discrete(points[name], self.numbers[name])
                logs += log_mass
                logs -= log_whole
            else:
                continuous.append(_continuous(points[name], self.numbers[name]))
        if continuous:
            logs += continuous[0] if len(continuous) == 1 else np.stack(continuous, axis=-1).sum(axis=-1)
        logs += np.log(self.weights)
        most = logs.max(axis=1)
        most[np.isneginf(most)] = 0
        logs -= most[:, None]
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(np.exp(logs, out=logs).sum(axis=1)) + most)


@lru_cache(maxsize=8)
def _weights(function: Callable[[int], Floats], n: int) -> Floats:
    return _ParzenEstimator._call_weights_func(function, n)


class _Choices:
    """Kernels of a categorical parameter: one kind for each choice, and the prior. `which` kind each kernel is of."""

    def __init__(self, seen: Floats, n: int, prior_weight: float) -> None:
        self.n = n
        self.which = np.full(len(seen) + 1, n, dtype=np.intp)
        self.which[:-1] = seen
        self.kinds = np.full((n + 1, n), prior_weight / len(self.which) if len(seen) else 1.0 / n)
        if len(seen):
            self.kinds[np.arange(n), np.arange(n)] += 1
            sums = self.kinds.sum(axis=1, keepdims=True)
            self.kinds /= np.where(sums == 0, 1, sums)

    def sample(self, random: np.random.RandomState, kernels: Numbers) -> Floats:
        """A choice from each of the kernels."""
        shares = self.kinds.cumsum(axis=1)
        shares[:, -1] = 1
        found = (shares[self.which[kernels]] < random.rand(len(kernels))[:, None]).sum(axis=1)
        return np.asarray(found, dtype=np.float64)

    def log_pdf(self, x: Floats) -> Floats:
        """Log probabilities [points, kernels]."""
        return np.asarray(np.log(self.kinds).T[x.astype(np.intp)].take(self.which, axis=1))


def _draw(random: np.random.RandomState, numbers: dict[str, Any], kernels: Numbers) -> Points:
    """A number from each of the kernels, of all parameters at once."""
    if not numbers:
        return {}
    mu = np.asarray([one.mu[kernels] for one in numbers.values()])
    sigma = np.asarray([one.sigma[kernels] for one in numbers.values()])
    low, high = (np.asarray([[getattr(one, f"adapted_{end}")] for one in numbers.values()]) for end in ("low", "high"))
    drawn = _truncnorm.rvs((low - mu) / sigma, (high - mu) / sigma, loc=mu, scale=sigma, random_state=random)
    points = {}
    for one, name, x in zip(numbers.values(), numbers, drawn, strict=True):
        x = np.exp(x) if one.is_log else x
        points[name] = (
            np.clip(one.low + np.round((x - one.low) / one.step) * one.step, one.low, one.high) if one.step else x
        )
    return points


def _discrete(x: Floats, kernels: Any) -> tuple[Floats, Floats]:
    """Log masses [points, kernels] of steps and [kernels] of the range; of equal points and kernels once."""
    half, scaled = kernels.step / 2, np.log if kernels.is_log else np.asarray
    steps, at = np.unique(x, return_inverse=True)
    mu, sigma, which = _unique_inverse_2d(kernels.mu, kernels.sigma)
    left, right = ((scaled(steps + side)[:, None] - mu) / sigma for side in (-half, half))
    whole = _truncnorm._log_gauss_mass((kernels.adapted_low - mu) / sigma, (kernels.adapted_high - mu) / sigma)
    return _log_gauss_mass_unique(left, right)[np.ix_(at, which)], whole[which]


def _log_mass(a: Floats, b: Floats) -> Floats:
    """Log masses of a normal distribution between a and b, which lie on both sides of 0: exactly 0 if far on both."""
    if len(a) >= MANY:  # then Optuna has another erf
        return _truncnorm._log_gauss_mass(a, b)
    masses, near = np.zeros(len(a)), (a > -FAR) | (b < FAR)
    masses[near] = _truncnorm._log_gauss_mass(a[near], b[near])
    return masses


def _continuous(x: Floats, kernels: Any) -> Floats:
    """Log densities [points, kernels]."""
    mu, sigma = kernels.mu, kernels.sigma
    a, b = (kernels.adapted_low - mu) / sigma, (kernels.adapted_high - mu) / sigma
    x = ((np.log(x) if kernels.is_log else x)[:, None] - mu) / sigma
    logs = _truncnorm._norm_logpdf(x)
    logs -= _log_mass(a, b)
    logs -= np.log(sigma)
    logs[(x < a) | (x > b)] = -np.inf
    return np.asarray(logs)
