"""SearchSpace: a YAML file that describes an architecture with holes.

Loading validates everything at once: every option of every hole is filled in at least once and put through the same
specs that a concrete architecture uses, so one schema serves files with and without holes. Sampling then gives
Candidates, which have no holes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsearch.alphabet import Alphabet
from archsearch.architecture import Architecture, Block, ModelSpec, Scale, Trunk
from archsearch.contract import FFNSpec, MixerSpec
from archsearch.errors import DataError, SpaceError, did_you_mean, one_of
from archsearch.explain import Problems
from archsearch.ffns import FFNS
from archsearch.graph import problems as graph_problems
from archsearch.holes import Chooser, Filling, HoleError, check_hole, find_holes, hole_name, is_hole
from archsearch.layout import LayoutError, Slot, freeze, resolve, shrink_pairs
from archsearch.mixers import MIXERS
from archsearch.rules import Rule, RuleError, parse_rule
from archsearch.settings import Goal, Runtime, Search, Task, Train
from archsearch.share import Share, apply_share
from archsearch.yaml_source import Path_, Source, parse_yaml, read_yaml

FORMAT = 1
WITH_HOLES = ("scales", "mixers", "ffns", "trunk", "layout", "share", "train")
SECTIONS = ("archsearch", "name", "description", "task", *WITH_HOLES, "rules", "objectives", "search", "runtime")
REQUIRED = ("archsearch", "name", "scales", "mixers", "ffns", "layout")
DEFAULT_OBJECTIVES = (Goal(name="val_bpb"), Goal(name="decode_ms"))
BYTE_VOCAB = 257
_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_STUDY_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True)
class Candidate:
    """One point of a space: the architecture at both scales, how it is trained, and what filled the holes."""

    architecture: Architecture
    train: Train
    holes: dict[str, Any]
    name: str | None = None  # of the recipe, if it is a baseline


@dataclass(frozen=True)
class Refusal:
    """Why a candidate is not worth a tensor: `reason` is graph or rule; `violations` per rule for the sampler."""

    reason: str
    message: str
    violations: dict[str, float]


class SearchSpace:
    """A loaded and validated space. `base_dir` resolves paths in the file."""

    def __init__(self, source: Source, base_dir: Path) -> None:
        """Raises SpaceError with every problem of the file."""
        self.source = source
        self.base_dir = base_dir
        self.tree: dict[str, Any] = source.tree
        problems = Problems(source.where)
        self._check_sections(problems)
        self._raise(problems)
        self.name: str = self.tree["name"]
        self.description: str | None = self.tree.get("description")
        self.task = problems.validate(Task, self.tree.get("task", {}), ("task",)) or Task()
        self.vocab_size = self._vocab_size(problems)
        self.search = problems.validate(Search, self.tree.get("search", {}), ("search",)) or Search()
        self.runtime = problems.validate(Runtime, self.tree.get("runtime", {}), ("runtime",)) or Runtime()
        self.objectives = self._objectives(problems)
        self.rules = self._rules(problems)
        if self._check_holes(problems):
            self._cover(problems)
        self._raise(problems)

    @classmethod
    def load(cls, path: str | Path) -> SearchSpace:
        """Read a file. Raises SpaceError."""
        path = Path(path)
        return cls(read_yaml(path), path.resolve().parent)

    @classmethod
    def from_text(cls, text: str, name: str = "space.yaml", base_dir: Path | None = None) -> SearchSpace:
        """Read YAML text. Raises SpaceError."""
        return cls(parse_yaml(text, name), base_dir or Path.cwd())

    @staticmethod
    def _raise(problems: Problems) -> None:
        if problems.found:
            raise SpaceError(list(problems.found))

    # ---- what the file must look like -------------------------------------------------------------------------

    def _check_sections(self, problems: Problems) -> None:
        tree = self.tree
        if not isinstance(tree, dict):
            problems.add((), f"the file is a {type(tree).__name__}; expected a mapping with {one_of(REQUIRED)}")
            return
        for key in tree:
            if key not in SECTIONS:
                problems.add((key,), f"is no section; expected {one_of(SECTIONS)}.{did_you_mean(key, SECTIONS)}")
        for key in REQUIRED:
            if key not in tree:
                hint = "; write 'archsearch: 1' as the first line" if key == "archsearch" else ""
                problems.add((), f"the section '{key}' is missing{hint}")
        if tree.get("archsearch", FORMAT) != FORMAT:
            problems.add(("archsearch",), f"is {tree['archsearch']!r}; this version reads format {FORMAT}")
        if "name" in tree and not (isinstance(tree["name"], str) and _STUDY_NAME.match(tree["name"])):
            problems.add(("name",), f"is {tree['name']!r}; expected letters, digits, dots, dashes and underscores")
        if not isinstance(tree.get("description", ""), str):
            problems.add(("description",), "is no text")
        for section in ("mixers", "ffns"):
            self._check_alphabet(section, problems)

    def _check_alphabet(self, section: str, problems: Problems) -> None:
        alphabet = self.tree.get(section, {"x": {}})
        if not isinstance(alphabet, dict) or not alphabet or is_hole(alphabet):
            problems.add(
                (section,), "is no alphabet; expected names with their options, such as full: {kind: attention}"
            )
            return
        for name in alphabet:
            if not _NAME.match(name):
                problems.add((section, name), "is no name; expected letters, digits and underscores")
            mixers = self.tree.get("mixers")
            if section == "ffns" and isinstance(mixers, dict) and name in mixers:
                problems.add((section, name), "names a mixer already; mixers and ffns need different names")

    def _vocab_size(self, problems: Problems) -> int:
        """The tokenizer's; numpy and the tokenizer's file are only read where it is not plain bytes."""
        packed = self.base_dir / self.task.corpus / "meta.json"
        if self.task.tokenizer == "bytes" and not packed.exists():
            return BYTE_VOCAB
        from archsearch.data import vocab_size

        try:
            return vocab_size(self.task, self.base_dir)
        except DataError as error:
            problems.add(("task",), f"cannot be used: {error}")
            return BYTE_VOCAB

    def _objectives(self, problems: Problems) -> tuple[Goal, ...]:
        listed = self.tree.get("objectives")
        if listed is None:
            return DEFAULT_OBJECTIVES
        if not isinstance(listed, list) or not listed:
            problems.add(
                ("objectives",), f"is {listed!r}; expected a list such as [{{name: val_bpb}}, {{name: decode_ms}}]"
            )
            return DEFAULT_OBJECTIVES
        goals = []
        for i, node in enumerate(listed):
            node = {"name": node} if isinstance(node, str) else node
            goal = problems.validate(Goal, node, ("objectives", i))
            if goal is not None:
                goals.append(goal)
        from archsearch.objectives import OBJECTIVES

        for i, goal in enumerate(goals):
            if goal.name not in OBJECTIVES.names():
                known = OBJECTIVES.names()
                problems.add(
                    ("objectives", i, "name"),
                    f"is '{goal.name}'; expected {one_of(known)}.{did_you_mean(goal.name, known)}",
                )
            if goal in goals[:i]:
                problems.add(("objectives", i), f"repeats '{goal.name}'")
        if not problems.found and any(goal.at.device for goal in goals):
            for i, goal in enumerate(goals):
                is_measured = OBJECTIVES.load(goal.name).stage == "bench"
                if goal.at.device and not is_measured:
                    problems.add(
                        ("objectives", i, "at", "device"), f"is of no use: {goal.name} is not measured on a device"
                    )
                if is_measured and not goal.at.device:
                    why = "others do, and latencies of different devices do not compare"
                    problems.add(("objectives", i, "at"), f"names no device; {why}")
        return tuple(goals)

    def _rules(self, problems: Problems) -> tuple[Rule, ...]:
        listed = self.tree.get("rules", [])
        if not isinstance(listed, list):
            problems.add(("rules",), f"is {listed!r}; expected a list such as ['count(full) >= 1']")
            return ()
        names = {*self.tree["mixers"], *self.tree["ffns"], *MIXERS.table, *FFNS.table}
        rules = []
        for i, text in enumerate(listed):
            try:
                rules.append(parse_rule(text, names))
            except RuleError as error:
                cut = isinstance(text, str) and text.count("(") != text.count(")")
                hint = "; in a [...] list, quote rules that hold a comma" if cut else ""
                problems.add(("rules", i), f"cannot be read: {error}{hint}")
        return tuple(rules)

    def _check_holes(self, problems: Problems) -> bool:
        """Whether all holes are well formed and stand where holes may."""
        before = len(problems.found)
        for path in find_holes(self.tree):
            if path[0] not in WITH_HOLES:
                problems.add(path, f"is a hole; holes may stand in {one_of(WITH_HOLES)}")
                continue
            node: Any = self.tree
            for part in path:
                node = node[part]
            try:
                check_hole(node, path)
            except HoleError as error:
                problems.add(error.path, str(error))
        return len(problems.found) == before

    def _cover(self, problems: Problems) -> None:
        """Fill every option of every hole at least once, so that a mistake in any of them shows now."""
        seen: set[tuple[str, int]] = set()
        queue: list[dict[str, int]] = [{}]
        while queue and len(problems.found) < 20:
            chooser = _Covering(queue.pop())
            try:
                self._fill(chooser, problems, everything=True)
            except HoleError as error:
                problems.add(error.path, str(error))
            for name, n_options in chooser.asked.items():
                for option in range(n_options):
                    base = name.split("@")[0]
                    if option != chooser.given.get(name, 0) and (base, option) not in seen:
                        queue.append({**chooser.given, name: option})
                    seen.add((base, option))

    # ---- sampling ---------------------------------------------------------------------------------------------

    def sample(self, chooser: Chooser) -> Candidate:
        """One candidate; raises SpaceError if a combination of options makes no architecture."""
        problems = Problems(self.source.where)
        candidate = self._fill(chooser, problems)
        self._raise(problems)
        assert candidate is not None
        return candidate

    def refusal(self, candidate: Candidate) -> Refusal | None:
        """What the graph or the rules have against a candidate; None: worth building."""
        for scale, model in candidate.architecture.scales.items():
            found = graph_problems(model)
            if found:
                return Refusal(
                    "graph", f"at {scale} scale: {'; '.join(found)}", {rule.text: 1.0 for rule in self.rules}
                )
        violations, messages = {}, []
        for rule in self.rules:
            try:
                verdict = rule.judge(candidate.architecture)
            except RuleError as error:
                raise SpaceError(f"{self.source.name}: rules: '{rule.text}': {error}") from None
            violations[rule.text] = verdict.violation
            if not verdict.ok:
                messages.append(verdict.why)
        return Refusal("rule", "; ".join(messages), violations) if messages else None

    def _fill(self, chooser: Chooser, problems: Problems, everything: bool = False) -> Candidate | None:
        filling = Filling(chooser, origin=problems.origin)
        scales = self._scales(filling, problems)
        trunk = problems.validate(Trunk, filling.fill(self.tree.get("trunk", {}), ("trunk",)), ("trunk",))
        train = problems.validate(Train, filling.fill(self.tree.get("train", {}), ("train",)), ("train",))
        share = self._share(filling, problems)
        mixers = Alphabet("mixers", self.tree["mixers"], MIXERS, filling, problems)
        ffns = Alphabet("ffns", self.tree["ffns"], FFNS, filling, problems)
        if everything:
            mixers.parse_all()
            ffns.parse_all()
        if scales is None or trunk is None or train is None or share is None:
            return None
        layouts = {what: self._layout(what, filling, scales, problems) for what in ("mixer", "ffn")}
        if layouts["mixer"] is None or layouts["ffn"] is None:
            return None
        slots = {name: self._slots(layouts["mixer"], layouts["ffn"], scale.n_blocks) for name, scale in scales.items()}
        models = {}
        for scale_name, scale in scales.items():
            blocks = self._blocks(scale, slots[scale_name], slots["proxy"], mixers, ffns)
            if problems.found:
                return None
            models[scale_name] = ModelSpec(
                d_model=scale.d_model,
                context=scale.context,
                vocab_size=scale.vocab_size or self.vocab_size,
                blocks=tuple(apply_share(blocks, share, scale.d_model)),
                trunk=trunk,
                dtype=scale.dtype or ("float32" if scale_name == "proxy" else "bfloat16"),
                task=self.task.kind,
            )
        return Candidate(Architecture(models), train, filling.picked)

    def filled_once(self, chooser: Chooser, sections: Sequence[str]) -> dict[str, Any]:
        """Some sections of the file with their holes filled."""
        filling = Filling(chooser)
        return {key: filling.fill(self.tree[key], (key,)) for key in sections if key in self.tree}

    def _scales(self, filling: Filling, problems: Problems) -> dict[str, Scale] | None:
        tree = filling.fill(self.tree["scales"], ("scales",))
        if not isinstance(tree, dict) or "proxy" not in tree:
            problems.add(("scales",), "has no 'proxy'; expected proxy and perhaps target")
            return None
        for key in tree:
            if key not in ("proxy", "target"):
                hint = did_you_mean(key, ("proxy", "target"))
                problems.add(("scales", key), f"is no scale; expected proxy or target.{hint}")
        made = {key: problems.validate(Scale, tree[key], ("scales", key)) for key in ("proxy", "target") if key in tree}
        scales = {key: scale for key, scale in made.items() if scale is not None}
        if len(scales) < len(tree):
            return None
        if scales["proxy"].vocab_size not in (None, self.vocab_size):
            problems.add(
                ("scales", "proxy", "vocab_size"),
                f"is {scales['proxy'].vocab_size}; the tokenizer has {self.vocab_size} (leave it out)",
            )
        scales.setdefault("target", scales["proxy"])
        return scales

    def _share(self, filling: Filling, problems: Problems) -> Share | None:
        share = problems.validate(Share, filling.fill(self.tree.get("share", {}), ("share",)), ("share",))
        if share is None or share.weights == "none":
            return share
        for what, alphabet in (("mixer", "mixers"), ("ffn", "ffns")):
            name = getattr(share.weights, what)
            if name is not None and name not in self.tree[alphabet]:
                known = list(self.tree[alphabet])
                hint = did_you_mean(name, known)
                problems.add(("share", "weights", what), f"is {name!r}; expected {one_of(known)}.{hint}")
        return share

    def _layout(self, what: str, filling: Filling, scales: dict[str, Scale], problems: Problems) -> Any:
        """The filled layout of mixers or ffns, known to resolve at every scale; None with its problems added."""
        path: Path_ = ("layout", what)
        section = self.tree["layout"]
        if not isinstance(section, dict) or what not in section:
            problems.add(("layout",), f"has no '{what}'; expected a layout for mixer and one for ffn")
            return None
        for key in section:
            if key not in ("mixer", "ffn"):
                hint = did_you_mean(key, ("mixer", "ffn"))
                problems.add(("layout", key), f"is unknown; expected mixer and ffn.{hint}")
        tree = filling.fill(section[what], path)
        names = set(self.tree[f"{what}s"])

        def choose(inner: Path_, block: int, options: list[Any]) -> int:
            return filling.choose(f"{hole_name(problems.source((*path, *inner)))}@{block}", options)

        try:
            if isinstance(tree, dict) and "each" in tree:  # a bad name shows before any choice is asked for
                resolve({**tree}, 1, names)
            frozen = freeze(tree, scales["proxy"].n_blocks, choose)
            for scale in scales.values():
                resolve(frozen, scale.n_blocks, names)
            return frozen
        except LayoutError as error:
            message = str(error).replace("found ", "is ", 1).replace("unknown key", "has an unknown key", 1)
            problems.add((*path, *error.path), message)
        return None

    def _slots(self, mixer: Any, ffn: Any, n_blocks: int) -> list[tuple[Slot, Slot]]:
        """(mixer, ffn) of every block."""
        pairs = shrink_pairs(mixer, ffn, n_blocks)
        if pairs is not None:
            return [(Slot(m), Slot(f)) for m, f in pairs]
        mixers = resolve(mixer, n_blocks, set(self.tree["mixers"]))
        return list(zip(mixers, resolve(ffn, n_blocks, set(self.tree["ffns"])), strict=True))

    def _blocks(
        self,
        scale: Scale,
        slots: list[tuple[Slot, Slot]],
        proxy: list[tuple[Slot, Slot]],
        mixers: Alphabet,
        ffns: Alphabet,
    ) -> list[Block]:
        """One object for all blocks that are the same."""
        blocks = []
        proxy_mixers, proxy_ffns = [pair[0] for pair in proxy], [pair[1] for pair in proxy]
        made: dict[tuple[int, int, str, str], Block] = {}
        for i, (m, f) in enumerate(slots):
            mixer = mixers.at(m, i, scale.n_blocks, proxy_mixers)
            ffn = ffns.at(f, i, scale.n_blocks, proxy_ffns)
            if isinstance(mixer, MixerSpec) and isinstance(ffn, FFNSpec):
                key = (id(mixer), id(ffn), m.name, f.name)
                if key not in made:
                    made[key] = Block(mixer.at_context(scale.context), ffn, m.name, f.name)
                blocks.append(made[key])
        return blocks


class _Covering:
    """A chooser for `_cover`: takes given options, else the first, and notes how many each hole has."""

    def __init__(self, given: dict[str, int]) -> None:
        self.given = given
        self.asked: dict[str, int] = {}

    def choice(self, name: str, options: Sequence[Any]) -> int:
        self.asked[name] = len(options)
        return self.given.get(name, 0)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        self.asked[name] = 2
        return high if self.given.get(name, 0) else low

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        self.asked[name] = 2
        return high if self.given.get(name, 0) else low
