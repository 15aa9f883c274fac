"""A study goes on: journal and records brought together, what was interrupted queued, and the baselines not yet run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from archsearch.architecture import identity
from archsearch.errors import SpaceError
from archsearch.recipes import baseline
from archsearch.study.candidates import Trial, now, was_run
from archsearch.study.journal import Open

if TYPE_CHECKING:
    from archsearch.study.driver import Study


def resume(study: Study) -> str | None:
    """Bring journal and records together, then queue what was interrupted and the baselines not yet run.

    Returns a sentence that says what was interrupted and how it goes on, if anything was.
    """
    study.last_id = max([study.journal.first - 1, study.journal.highest_trial(), *study.records])
    for record in study.records.values():
        if was_run(record):
            study.seen[f"{record.arch_id}-{identity(record.train)}"] = record.trial
    study.journal.drop_unasked()
    _queue_baselines(study)
    opened = study.journal.open_trials()
    for open_trial in opened:
        _reconcile(study, open_trial)
    _reopen_rungs(study)
    return _interrupted(study, {open_trial.trial for open_trial in opened if not open_trial.again})


def _interrupted(study: Study, asked: set[int]) -> str | None:
    """`asked`: trials that the journal knows to have been under way; of the others a checkpoint tells."""
    parts = []
    for trial in study.waiting:
        has_checkpoint = (study.folder.path / "checkpoints" / f"{trial.trial}.safetensors").exists()
        if has_checkpoint or trial.trial in asked:
            where = " from its checkpoint" if has_checkpoint else " from the start"
            parts.append(f"trial {trial.trial}" + ("" if study.space.runtime.storage else where))
    return f"goes on with what was interrupted: {', '.join(parts)}" if parts else None


def _reconcile(study: Study, open_trial: Open) -> None:
    """Tell a trial that has a record, run one that has none."""
    record = study.records.get(open_trial.trial)
    number = open_trial.number
    match record.status if record is not None else None:
        case None:
            _reopen(study, open_trial)
        case "complete":
            assert record is not None
            study.journal.tell(number, [record.objectives[axis].value for axis in study.axes])
        case "stopped":
            study.journal.tell_stopped(number)
        case "infeasible":
            study.journal.tell_infeasible(number)
        case _:
            study.journal.tell_failed(number)


def _reopen(study: Study, open_trial: Open) -> None:
    """A trial that was interrupted: sampled again from what the journal knows; void if it was never whole."""
    try:
        candidate = study.space.sample(open_trial.chooser)
    except (KeyError, SpaceError):
        study.journal.tell_failed(open_trial.number)
        return
    rung = study.rungs.last if open_trial.again else 0
    trial = Trial(open_trial.trial, candidate, open_trial.number, rung, started=now())
    if study._admit(trial):
        study.going.add(trial.trial)
        study.waiting.append(trial)


def _reopen_rungs(study: Study) -> None:
    """Trials that had reached a rung wait there again, or go on if they had been promoted."""
    by_id = {trial.trial: trial for trial in study.waiting}
    for entry in study.folder.rungs():
        study.rungs.report(entry["trial"], entry["rung"], study._minimised(entry["readings"]))
        if entry["rung"] > 0:
            study.rungs.promote(entry["trial"], entry["rung"] - 1)
        trial = by_id.get(entry["trial"])
        if trial is not None:
            trial.rung, trial.timed = entry["rung"], True
            trial.readings, trial.seconds = dict(entry["readings"]), dict(entry["seconds"])
            study.paused[trial.trial] = trial
    for trial_id in study.records:  # complete or failed: it had left every lower rung
        for rung in range(study.rungs.last):
            if trial_id in study.rungs.results.get(rung, {}):
                study.rungs.promote(trial_id, rung)
    study.waiting = [trial for trial in study.waiting if trial.trial not in study.paused]


def _queue_baselines(study: Study) -> None:
    """The recipes first, the first of them with every seed. Each has its place's number, whenever it is queued: that is
    the name of its checkpoint, and no trial before has had it."""
    search = study.space.search
    done = {record.name for record in study.records.values() if record.name is not None}
    wanted = [(name, k) for at, name in enumerate(search.baselines) for k in range(search.seeds if at == 0 else 1)]
    first = study.journal.first
    study.last_id = max(study.last_id, first + len(wanted) - 1)
    for number, (name, k) in enumerate(wanted, first):
        candidate = baseline(name, study.space)
        train = candidate.train.model_copy(update={"seed": candidate.train.seed + k})
        again = replace(candidate, train=train, name=name if k == 0 else f"{name}, seed {train.seed}")
        if again.name not in done:
            _queue_baseline(study, Trial(number, again, None, repeat_of=name if k else None))


def _queue_baseline(study: Study, trial: Trial) -> None:
    over = study._read_graph(trial)
    if over is not None:
        study._fail(trial, "limit", over)
    else:
        study.seen[trial.key] = trial.trial
        study.waiting.append(trial)
