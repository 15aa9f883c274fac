"""SearchSpace: a YAML file that describes an architecture with holes.

Loading validates everything at once: every option of every hole is filled in at least once and put through the same
specs that a concrete architecture uses, so one schema serves files with and without holes. Sampling then gives
Candidates, which have no holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsearch.errors import SpaceError
from archsearch.graph import misfits, problems_of_layout
from archsearch.settings import Runtime, Search, Task
from archsearch.space.alphabet import Shared
from archsearch.space.coverage import every_option
from archsearch.space.explain import Problems
from archsearch.space.fill import Candidate, Fill
from archsearch.space.holes import Chooser, Filling, HoleError
from archsearch.space.rules import RuleError
from archsearch.space.sections import check_holes, check_sections, read_objectives, read_rules, read_vocab_size
from archsearch.space.yaml_source import Source, parse_yaml, read_yaml

ENOUGH_PROBLEMS = 20  # for a person to mend before more are looked for


@dataclass(frozen=True)
class Refusal:
    """Why a candidate is not worth a tensor: `reason` is graph or rule, `details` says each thing that stands against
    it; `violations` per rule for the sampler.
    """

    reason: str
    details: tuple[str, ...]
    violations: dict[str, float]

    @property
    def message(self) -> str:
        """All details in one line."""
        return "; ".join(self.details)


class SearchSpace:
    """A loaded and validated space. `base_dir` resolves paths in the file."""

    def __init__(self, source: Source, base_dir: Path, vocab_size: int | None = None) -> None:
        """vocab_size: the tokenizer's, if it is known (None: the data are asked). Raises SpaceError with every problem
        of the file.
        """
        self.source = source
        self.base_dir = base_dir
        self.tree: dict[str, Any] = source.tree
        problems = Problems(source)
        check_sections(self.tree, problems)
        self._raise(problems)
        self.name: str = self.tree["name"]
        self.description: str | None = self.tree.get("description")
        self.task = problems.validate(Task, self.tree.get("task", {}), ("task",)) or Task()
        self.vocab_size = vocab_size or read_vocab_size(self.task, base_dir, problems)
        self.search = problems.validate(Search, self.tree.get("search", {}), ("search",)) or Search()
        self.runtime = problems.validate(Runtime, self.tree.get("runtime", {}), ("runtime",)) or Runtime()
        self.objectives = read_objectives(self.tree, problems)
        self.rules = read_rules(self.tree, problems)
        self._shared = Shared(self.tree)
        if check_holes(self.tree, problems):
            self._try_every_option(problems)
        self._raise(problems)

    @classmethod
    def load(cls, path: str | Path, vocab_size: int | None = None) -> SearchSpace:
        """Read a file. Raises SpaceError."""
        path = Path(path)
        return cls(read_yaml(path), path.resolve().parent, vocab_size)

    @classmethod
    def from_text(cls, text: str, name: str = "space.yaml", base_dir: Path | None = None) -> SearchSpace:
        """Read YAML text. Raises SpaceError."""
        return cls(parse_yaml(text, name), base_dir or Path.cwd())

    def __repr__(self) -> str:
        mixers, ffns = ", ".join(self.tree["mixers"]), ", ".join(self.tree["ffns"])
        objectives = ", ".join(goal.name for goal in self.objectives)
        return f"<SearchSpace {self.name}: mixers {mixers}; ffns {ffns}; objectives {objectives}>"

    @staticmethod
    def _raise(problems: Problems) -> None:
        if problems.found:
            raise SpaceError(problems.in_order())

    def _try_every_option(self, problems: Problems) -> None:
        for chooser in every_option():
            try:
                self._fill(chooser, problems).candidate(everything=True)
            except HoleError as error:
                problems.add(error.path, str(error))
            if len(problems.found) >= ENOUGH_PROBLEMS:
                return

    def _fill(self, chooser: Chooser, problems: Problems) -> Fill:
        return Fill(self.tree, self.vocab_size, self.task.kind, chooser, problems, self._shared)

    def sample(self, chooser: Chooser) -> Candidate:
        """One candidate; raises SpaceError if a combination of options makes no architecture."""
        problems = Problems(self.source)
        candidate = self._fill(chooser, problems).candidate()
        self._raise(problems)
        assert candidate is not None
        return candidate

    def filled_once(self, chooser: Chooser, sections: Sequence[str]) -> dict[str, Any]:
        """Some sections of the file with their holes filled."""
        filling = Filling(chooser)
        return {key: filling.fill(self.tree[key], (key,)) for key in sections if key in self.tree}

    def refusal(self, candidate: Candidate) -> Refusal | None:
        """What the graph or the rules have against a candidate; None: worth building.

        Raises SpaceError if a rule cannot be evaluated on it: a block that it lacks, a division by zero.
        """
        for scale, model in candidate.architecture.scales.items():
            unfit = [
                f"{self.source.where((section, name))}: {section}.{name} at {scale} scale: {why}"
                for (section, name), why in misfits(model).items()
            ]
            found = unfit or [f"at {scale} scale: {problem}" for problem in problems_of_layout(model)]
            if found:
                return Refusal("graph", tuple(found), {rule.text: 1.0 for rule in self.rules})
        violations, broken = {}, []
        for i, rule in enumerate(self.rules):
            try:
                verdict = rule.judge(candidate.architecture)
            except RuleError as error:
                raise SpaceError(f"{self.source.where(('rules', i))}: rules: '{rule.text}': {error}") from None
            violations[rule.text] = verdict.violation
            if not verdict.ok:
                broken.append(verdict.why)
        return Refusal("rule", tuple(broken), violations) if broken else None
