"""Named mixers or FFNs of one fill: parsed when a layout uses them, once per block or stage if they ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from archsearch.contract import FFNSpec, MixerSpec
from archsearch.describe import nearest_kind
from archsearch.errors import UserError, did_you_mean, one_of
from archsearch.registry import Registry
from archsearch.space.explain import Problems
from archsearch.space.holes import Filling, find_holes, hole_hint
from archsearch.space.layout import Slot
from archsearch.space.yaml_source import Path_


class Shared:
    """What is the same in every fill of a space, and is worked out in the first. `tree`: the file's."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.sections = frozenset(name for name, section in tree.items() if find_holes(section))  # with holes
        self.per: dict[Path_, set[str]] = {}  # how often a mixer's or FFN's holes ask
        self._parsed: dict[Path_, Any] = {}

    def once(self, path: Path_, has_holes: bool, read: Callable[[], Any]) -> Any:
        """What is read at a place of the file: by the first fill that succeeds for all, unless there are holes."""
        made = self._parsed.get(path)
        if made is None:
            made = read()
            if made is not None and not has_holes:
                self._parsed[path] = made
        return made


class Alphabet:
    """The `mixers` or `ffns` section while holes are being filled; problems go to `problems`."""

    def __init__(
        self,
        section: str,
        tree: dict[str, Any],
        registry: Registry,
        filling: Filling,
        problems: Problems,
        shared: Shared,
    ) -> None:
        self.section, self.tree, self.registry = section, tree, registry
        self.filling, self.problems = filling, problems
        self.shared = shared
        self.made: dict[tuple[str, int | None, int | None], MixerSpec | FFNSpec | None] = {}

    def parse_all(self) -> None:
        """Parse names that no layout uses, so that their mistakes show too."""
        for name in self.tree:
            self.first(name)

    def first(self, name: str) -> MixerSpec | FFNSpec | None:
        """The spec that the first block has where a layout puts this name there."""
        return self._get(name, 0, 0)

    def at(self, slot: Slot, i: int, n_blocks: int, proxy: list[Slot]) -> MixerSpec | FFNSpec | None:
        """The spec at block i of n: at other depths a block takes what the nearest proxy block of its name has."""
        if (slot.name, None, None) in self.made:
            return self.made[slot.name, None, None]
        home = i * len(proxy) // n_blocks
        if "block" in self._asked_per(slot.name):
            places = [j for j, other in enumerate(proxy) if other.name == slot.name]
            home = min(places, key=lambda j: abs(j - home)) if places else home
        return self._get(slot.name, home, slot.stage)

    def _get(self, name: str, block: int, stage: int) -> MixerSpec | FFNSpec | None:
        per = self._asked_per(name)
        key = (name, block if "block" in per else None, stage if "stage" in per else None)
        if key not in self.made:
            path = (self.section, name)
            self.made[key] = self.shared.once(path, bool(per), lambda: self._read(name, block, stage))
        return self.made[key]

    def _read(self, name: str, block: int, stage: int) -> MixerSpec | FFNSpec | None:
        path: Path_ = (self.section, name)
        self.filling.block, self.filling.stage = block, stage
        made = self._parse(self.filling.fill(self.tree[name], path), path)
        self.filling.block = self.filling.stage = None
        return made

    def _asked_per(self, name: str) -> set[str]:
        """What the holes of a mixer or FFN ask per: block, stage or None; empty if it has none."""
        path = (self.section, name)
        if path not in self.shared.per:
            self.shared.per[path] = self._per(name)
        return self.shared.per[path]

    def _per(self, name: str) -> set[str]:
        tree = self.tree[name]
        found = set()
        for path in find_holes(tree):
            node: Any = tree
            for part in path:
                node = node[part]
            found.add(node.get("per"))
        for inner in tree.get("of", []) if isinstance(tree, dict) and isinstance(tree.get("of"), list) else []:
            if isinstance(inner, str) and inner in self.tree and inner != name:
                found |= self._per(inner)
        return found

    def _parse(self, node: Any, path: Path_) -> MixerSpec | FFNSpec | None:
        if not isinstance(node, dict) or "kind" not in node:
            kinds = self.registry.names()
            hint = "" if isinstance(node, dict) else f". Write {{kind: {node if node in kinds else kinds[0]}}}"
            self.problems.add(path, f"has no 'kind'; expected {one_of(kinds)}{hint}")
            return None
        try:
            cls = self.registry.load(node["kind"])
        except UserError as error:
            message = str(error).replace(f"unknown {self.registry.what} ", "is ", 1)
            if not isinstance(node["kind"], str):
                message += hole_hint(node["kind"])
            elif message.startswith("is ") and "Did you mean" not in message:
                message += nearest_kind(node["kind"])
            self.problems.add((*path, "kind"), message)
            return None
        if node["kind"] == "parallel":
            inlined = self._inline(node, path)
            if inlined is None:
                return None
            node = inlined
        spec: MixerSpec | FFNSpec | None = self.problems.validate(cls, node, path)
        return spec

    def _inline(self, node: dict[str, Any], path: Path_) -> dict[str, Any] | None:
        """A parallel mixer names others of the alphabet; the spec holds them whole."""
        of = node.get("of")
        if not isinstance(of, list):
            self.problems.add(path, f"has of: {of!r}; expected names of mixers, such as of: [gdn, swa]")
            return None
        known = [name for name, tree in self.tree.items() if not _is_parallel(tree)]
        whole = []
        for i, name in enumerate(of):
            if name not in known:
                hint = did_you_mean(name, known)
                self.problems.add((*path, "of", i), f"is {name!r}; expected {one_of(known)}.{hint}")
                return None
            inner = self.filling.fill(self.tree[name], (self.section, name))
            if self._parse(inner, (self.section, name)) is None:
                return None
            whole.append(inner)
        return {**node, "of": whole}


def _is_parallel(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.get("kind") == "parallel"
