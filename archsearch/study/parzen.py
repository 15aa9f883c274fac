"""Optuna's Parzen estimator with less work: equal kernels and equal points once, and the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
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
    What does not depend on the points is computed once, as the density of the good trials serves many asks.
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
        self.numbers: dict[str, _Numbers] = {}
        for name, space in search_space.items():
            if isinstance(space, CategoricalDistribution):
                self.choices[name] = _Choices(seen[name], len(space.choices), options.prior_weight)
            else:
                self.numbers[name] = _Numbers(kernels_of(None, seen[name], space, options))
        self.shares = self.weights.cumsum()
        self.shares /= self.shares[-1]
        self.log_weights = np.log(self.weights)

    def sample(self, random: np.random.RandomState, size: int) -> Points:
        """Points, drawn from the stream in Optuna's order: kernels, choices, numbers."""
        kernels = self.shares.searchsorted(random.random_sample(size), side="right")  # as RandomState.choice
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
                logs += self.numbers[name].log_mass(points[name])
                logs -= self.numbers[name].log_whole
            else:
                continuous.append(self.numbers[name].log_density(points[name]))
        if continuous:
            logs += continuous[0] if len(continuous) == 1 else np.stack(continuous, axis=-1).sum(axis=-1)
        logs += self.log_weights
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
        found = (self.shares[self.which[kernels]] < random.rand(len(kernels))[:, None]).sum(axis=1)
        return np.asarray(found, dtype=np.float64)

    @cached_property
    def shares(self) -> Floats:
        """Cumulative probabilities [kinds, choices]."""
        shares = self.kinds.cumsum(axis=1)
        shares[:, -1] = 1
        return np.asarray(shares)

    @cached_property
    def logs(self) -> Floats:
        """Log probabilities [choices, kinds]."""
        return np.asarray(np.log(self.kinds).T)

    def log_pdf(self, x: Floats) -> Floats:
        """Log probabilities [points, kernels]."""
        return np.asarray(self.logs[x.astype(np.intp)].take(self.which, axis=1))


class _Numbers:
    """Kernels of a numerical parameter, from Optuna's: mu and sigma of each, cut off at low and high."""

    def __init__(self, kernels: Any) -> None:
        self.mu, self.sigma = kernels.mu, kernels.sigma
        self.low, self.high = kernels.adapted_low, kernels.adapted_high  # half a step beyond the range
        self.first, self.last, self.step = kernels.low, kernels.high, kernels.step
        self.is_log = kernels.is_log

    def on_scale(self, x: Floats) -> Floats:
        """Values where the kernels are normal."""
        return np.asarray(np.log(x) if self.is_log else x)

    def values(self, x: Floats) -> Floats:
        """The way back: values of the parameter, on a step if it has steps."""
        x = np.exp(x) if self.is_log else x
        if not self.step:
            return x
        return np.asarray(
            np.clip(self.first + np.round((x - self.first) / self.step) * self.step, self.first, self.last)
        )

    def log_mass(self, x: Floats) -> Floats:
        """Log masses [points, kernels] of the steps around x, uncut; of equal points and kernels once."""
        steps, at = np.unique(x, return_inverse=True)
        mu, sigma, which = self.distinct
        left, right = ((self.on_scale(steps + side)[:, None] - mu) / sigma for side in (-self.step / 2, self.step / 2))
        return np.asarray(_log_gauss_mass_unique(left, right)[np.ix_(at, which)])

    @cached_property
    def log_whole(self) -> Floats:
        """Log masses [kernels] within low and high, of which `log_mass` is a part."""
        mu, sigma, which = self.distinct
        return np.asarray(_truncnorm._log_gauss_mass((self.low - mu) / sigma, (self.high - mu) / sigma)[which])

    @cached_property
    def distinct(self) -> tuple[Floats, Floats, Numbers]:
        """mu and sigma of the kernels that differ, and which of them each kernel is."""
        mu, sigma, which = _unique_inverse_2d(self.mu, self.sigma)
        return mu, sigma, which

    def log_density(self, x: Floats) -> Floats:
        """Log densities [points, kernels]."""
        a, b, beside = self.ends
        x = (self.on_scale(x)[:, None] - self.mu) / self.sigma
        logs = _truncnorm._norm_logpdf(x)
        for part in beside:
            logs -= part
        logs[(x < a) | (x > b)] = -np.inf
        return np.asarray(logs)

    @cached_property
    def ends(self) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
        """low and high in standard deviations; what is taken off a normal's log density, in Optuna's order."""
        a, b = (self.low - self.mu) / self.sigma, (self.high - self.mu) / self.sigma
        return a, b, (_log_mass(a, b), np.log(self.sigma))


def _draw(random: np.random.RandomState, numbers: dict[str, _Numbers], kernels: Numbers) -> Points:
    """A number from each of the kernels, of all parameters at once."""
    if not numbers:
        return {}
    mu, sigma = (np.asarray([getattr(one, name)[kernels] for one in numbers.values()]) for name in ("mu", "sigma"))
    low, high = (np.asarray([[getattr(one, name)] for one in numbers.values()]) for name in ("low", "high"))
    drawn = _truncnorm.rvs((low - mu) / sigma, (high - mu) / sigma, loc=mu, scale=sigma, random_state=random)
    return {name: one.values(x) for (name, one), x in zip(numbers.items(), drawn, strict=True)}


def _log_mass(a: Floats, b: Floats) -> Floats:
    """Log masses of a normal distribution between a and b, which lie on both sides of 0: exactly 0 if far on both."""
    if len(a) >= MANY:  # then Optuna has another erf
        return _truncnorm._log_gauss_mass(a, b)
    masses, near = np.zeros(len(a)), (a > -FAR) | (b < FAR)
    masses[near] = _truncnorm._log_gauss_mass(a[near], b[near])
    return masses
