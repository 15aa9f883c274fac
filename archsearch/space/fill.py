"""One fill of a space: what a Chooser picks for its holes, put together to a Candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from archsearch.architecture import Architecture, Block, ModelSpec, Scale, Trunk
from archsearch.contract import FFNSpec, MixerSpec, Site
from archsearch.errors import did_you_mean, one_of
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.settings import Train
from archsearch.space.alphabet import Alphabet, Shared
from archsearch.space.explain import Problems
from archsearch.space.holes import Chooser, Filling, find_holes, hole_name
from archsearch.space.layout import LayoutError, Slot, freeze, resolve, shrink_pairs
from archsearch.space.share import Share, apply_share
from archsearch.space.yaml_source import Path_

S = TypeVar("S")
SCALES = ("proxy", "target")
LAYOUTS = ("mixer", "ffn")


@dataclass(frozen=True)
class Candidate:
    """One point of a space: the architecture at both scales, how it is trained, and what filled the holes."""

    architecture: Architecture
    train: Train
    holes: dict[str, Any]
    name: str | None = None  # of the recipe, if it is a baseline


class Place(NamedTuple):
    """What the two layouts put into one block."""

    mixer: Slot
    ffn: Slot


class Fill:
    """The sections of `tree` while one chooser fills them; whatever is wrong with them goes to `problems`."""

    def __init__(
        self,
        tree: dict[str, Any],
        vocab_size: int,
        task: str,
        chooser: Chooser,
        problems: Problems,
        shared: Shared,
    ) -> None:
        self.tree, self.vocab_size, self.task = tree, vocab_size, task
        self.problems, self.shared = problems, shared
        self.filling = Filling(chooser, origin=problems.origin)
        self.mixers = Alphabet("mixers", tree["mixers"], MIXERS, self.filling, problems, shared)
        self.ffns = Alphabet("ffns", tree["ffns"], FFNS, self.filling, problems, shared)

    def candidate(self, everything: bool = False) -> Candidate | None:
        """The candidate, or None with its problems added. `everything`: also what no layout of this fill uses."""
        scales = self._once("scales", self._scales)
        trunk = self._once("trunk", lambda: self.problems.validate(Trunk, self._filled("trunk"), ("trunk",)))
        train = self._once("train", lambda: self.problems.validate(Train, self._filled("train"), ("train",)))
        share = self._once("share", self._share)
        if everything:
            self.mixers.parse_all()
            self.ffns.parse_all()
            if scales is not None:
                self._check_widths(scales)
        if scales is None or trunk is None or train is None or share is None:
            return None  # a layout is resolved at the scales
        mixer, ffn = (self._layout(what, scales) for what in LAYOUTS)
        if mixer is None or ffn is None:
            return None  # blocks stand where the layouts put them
        places = {name: self._places(mixer, ffn, scale.n_blocks) for name, scale in scales.items()}
        blocks = {name: self._blocks(scale, places[name], places["proxy"]) for name, scale in scales.items()}
        if self.problems.found:
            return None  # a name of the alphabet that could not be read has left its blocks out
        models = {
            name: ModelSpec(
                d_model=scale.d_model,
                context=scale.context,
                vocab_size=scale.vocab_size or self.vocab_size,
                blocks=tuple(apply_share(blocks[name], share, scale.d_model)),
                trunk=trunk,
                dtype=scale.dtype or ("float32" if name == "proxy" else "bfloat16"),
                task=self.task,
            )
            for name, scale in scales.items()
        }
        return Candidate(Architecture(models), train, self.filling.picked)

    def _check_widths(self, scales: dict[str, Scale]) -> None:
        """A mixer or FFN without holes that does not fit a scale is a mistake. Of one with holes some options may fit;
        candidates with the others are refused one by one.
        """
        if find_holes(self.tree["scales"]):
            return
        for alphabet in (self.mixers, self.ffns):
            for name, tree in alphabet.tree.items():
                spec = alphabet.first(name)
                if spec is None or find_holes(tree) or spec.kind == "parallel":  # its branches are told by themselves
                    continue
                why = {scale: message for scale, size in scales.items() if (message := _misfit(spec, size.d_model))}
                for message in dict.fromkeys(why.values()):
                    at = [scale for scale in why if why[scale] == message]
                    where = "cannot be built" if len(at) == len(scales) else f"at {at[0]} scale"
                    self.problems.add((alphabet.section, name), f"{where}: {message}")

    def _once(self, section: str, read: Callable[[], S | None]) -> S | None:
        """What a section says; one without holes says the same in every fill."""
        made: S | None = self.shared.once((section,), section in self.shared.sections, read)
        return made

    def _filled(self, section: str) -> Any:
        return self.filling.fill(self.tree.get(section, {}), (section,))

    def _scales(self) -> dict[str, Scale] | None:
        tree = self._filled("scales")
        if not isinstance(tree, dict) or "proxy" not in tree:
            self.problems.add(("scales",), "has no 'proxy'; expected proxy and perhaps target")
            return None
        for key in tree:
            if key not in SCALES:
                hint = did_you_mean(key, SCALES)
                self.problems.add(("scales", key), f"is no scale; expected proxy or target.{hint}")
        made = {key: self.problems.validate(Scale, tree[key], ("scales", key)) for key in SCALES if key in tree}
        scales = {key: scale for key, scale in made.items() if scale is not None}
        if len(scales) < len(tree):
            return None
        if scales["proxy"].vocab_size not in (None, self.vocab_size):
            self.problems.add(
                ("scales", "proxy", "vocab_size"),
                f"is {scales['proxy'].vocab_size}; the tokenizer has {self.vocab_size} (leave it out)",
            )
        scales.setdefault("target", scales["proxy"])
        return scales

    def _share(self) -> Share | None:
        share = self.problems.validate(Share, self._filled("share"), ("share",))
        if share is None or share.weights == "none":
            return share
        for what in LAYOUTS:
            known = list(self.tree[f"{what}s"])
            for name in getattr(share.weights, what):
                if name not in known:
                    hint = did_you_mean(name, known)
                    self.problems.add(("share", "weights", what), f"is {name!r}; expected {one_of(known)}.{hint}")
        return share

    def _layout(self, what: str, scales: dict[str, Scale]) -> Any:
        """The filled layout of mixers or ffns, known to resolve at every scale; None with its problems added."""
        path: Path_ = ("layout", what)
        section = self.tree["layout"]
        if not isinstance(section, dict) or what not in section:
            self.problems.add(("layout",), f"has no '{what}'; expected a layout for mixer and one for ffn")
            return None
        for key in section:
            if key not in LAYOUTS:
                hint = did_you_mean(key, LAYOUTS)
                self.problems.add(("layout", key), f"is unknown; expected mixer and ffn.{hint}")
        tree = self.filling.fill(section[what], path)
        names = set(self.tree[f"{what}s"])

        def choose(inner: Path_, block: int, options: list[Any]) -> int:
            return self.filling.choose(f"{hole_name(self.problems.source((*path, *inner)))}@{block}", options)

        try:
            if isinstance(tree, dict) and "each" in tree:
                resolve(tree, 1, names)  # a bad name shows before any block asks for its choice
            frozen = freeze(tree, scales["proxy"].n_blocks, choose)
            for scale in scales.values():
                resolve(frozen, scale.n_blocks, names)
            return frozen
        except LayoutError as error:
            self.problems.add((*path, *error.path), str(error))
        return None

    def _places(self, mixer: Any, ffn: Any, n_blocks: int) -> list[Place]:
        pairs = shrink_pairs(mixer, ffn, n_blocks)
        if pairs is not None:
            return [Place(Slot(mixer_name), Slot(ffn_name)) for mixer_name, ffn_name in pairs]
        mixers = resolve(mixer, n_blocks, set(self.tree["mixers"]))
        ffns = resolve(ffn, n_blocks, set(self.tree["ffns"]))
        return [Place(*slots) for slots in zip(mixers, ffns, strict=True)]

    def _blocks(self, scale: Scale, places: list[Place], proxy: list[Place]) -> list[Block]:
        """One object for all blocks that are the same."""
        blocks = []
        proxy_mixers, proxy_ffns = [place.mixer for place in proxy], [place.ffn for place in proxy]
        made: dict[tuple[int, int, str, str], Block] = {}
        for i, place in enumerate(places):
            mixer = self.mixers.at(place.mixer, i, scale.n_blocks, proxy_mixers)
            ffn = self.ffns.at(place.ffn, i, scale.n_blocks, proxy_ffns)
            if isinstance(mixer, MixerSpec) and isinstance(ffn, FFNSpec):
                key = (id(mixer), id(ffn), place.mixer.name, place.ffn.name)
                if key not in made:
                    made[key] = Block(mixer.at_context(scale.context), ffn, place.mixer.name, place.ffn.name)
                blocks.append(made[key])
        return blocks


def _misfit(spec: MixerSpec | FFNSpec, d_model: int) -> str:
    """Why the options of a mixer or FFN do not go together at a width; empty if they do."""
    try:
        spec.check(Site(d_model))
    except ValueError as error:
        return str(error)
    return ""
