"""What has changed in a study since one last looked, so that samplers need not read every trial at every ask."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial

TESTED = ("5.0.",)  # samplers that look inside Optuna's are used with these versions only, else the originals


def is_tested() -> bool:
    """Whether the inside of the installed Optuna is as expected."""
    return optuna.__version__.startswith(TESTED)


class Changes:
    """The trials of one study in a journal, which keeps a trial as one object until something is said of it."""

    def __init__(self) -> None:
        self.trials: list[FrozenTrial] = []
        self.open: list[int] = []  # numbers of those that had not ended

    def read(self, study: optuna.Study) -> list[int]:
        """Numbers of trials that are new or changed, rising."""
        trials = study._get_trials(deepcopy=False, use_cache=True)
        if trials is self.trials:
            return []
        new = range(len(self.trials), len(trials))
        changed = [number for number in self.open if trials[number] is not self.trials[number]]
        changed += new
        ended = {number for number in changed if trials[number].state.is_finished()}
        self.open = [number for number in (*self.open, *new) if number not in ended]
        self.trials = trials
        return changed
