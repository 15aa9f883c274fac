"""NSGA-II and NSGA-III of Optuna with the same suggestions and less work per ask.

Optuna's samplers count the members of every generation, and look for the parents and for the parameters that all
trials have, in all trials at each ask. Here each trial is counted once, when it has ended.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from archsearch.study.changes import Changes


class _Counted:
    """Before one of the two in the order of classes. For one study, asked and told by this process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._changes = Changes()
        self._sizes: Counter[int] = Counter()  # generation to members
        self._common: dict[str, BaseDistribution] | None = None
        self._parents: dict[int, list[FrozenTrial]] = {}

    def _look(self, study: optuna.Study) -> None:
        for number in self._changes.read(study):
            trial = self._changes.trials[number]
            if trial.state == TrialState.COMPLETE:
                self._sizes[trial.system_attrs.get(self._get_generation_key(), -1)] += 1  # type: ignore[attr-defined]
                known = trial.distributions if self._common is None else self._common
                self._common = {name: d for name, d in known.items() if trial.distributions.get(name) == d}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all complete trials have, by name."""
        self._look(study)
        return {name: space for name, space in sorted((self._common or {}).items()) if not space.single()}

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        """The youngest generation, or the next where that one is full."""
        key = self._get_generation_key()  # type: ignore[attr-defined]
        known = trial.system_attrs.get(key)
        if known is not None:
            return int(known)
        self._look(study)
        youngest = max(0, *self._sizes) if self._sizes else 0
        generation = youngest + (self._sizes[youngest] >= self.population_size)  # type: ignore[attr-defined]
        study._storage.set_trial_system_attr(trial._trial_id, key, generation)
        return int(generation)

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """Chosen once per generation, of trials that have ended; the choice comes best first, later by number."""
        if generation in self._parents:
            return self._parents[generation]
        found: list[FrozenTrial] = super().get_parent_population(study, generation)  # type: ignore[misc]
        self._parents[generation] = sorted(found, key=lambda trial: trial.number)
        return found


class NSGAIISampler(_Counted, optuna.samplers.NSGAIISampler):
    """The name stands in the journal: studies go on with either."""


class NSGAIIISampler(_Counted, optuna.samplers.NSGAIIISampler):
    """The name stands in the journal: studies go on with either."""
