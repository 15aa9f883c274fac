"""Turns pydantic's validation errors into the project's own messages: where, what was found, what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from archsearch.contract import Spec
from archsearch.errors import did_you_mean, one_of
from archsearch.space.holes import hole_hint, hole_name
from archsearch.space.yaml_source import Path_, Source

S = TypeVar("S", bound=Spec)
_PLAIN = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


class Word(NamedTuple):
    """What a key that people bring from elsewhere is called here, in which section, and how it counts."""

    key: str
    section: str
    meaning: str = ""


_BROUGHT = {
    word: here
    for words, here in (
        ("n_heads num_heads num_attention_heads n_head", Word("head_dim", "mixers", "heads fill expand x d_model")),
        ("n_kv_heads num_kv_heads num_key_value_heads", Word("kv_groups", "mixers", "query heads of a key/value head")),
        ("d_head dim_head head_size d_k", Word("head_dim", "mixers")),
        ("sliding_window window_size local_window", Word("window", "mixers")),
        ("rope_base rotary_base", Word("rope_theta", "mixers")),
        ("state_size ssm_state_size", Word("d_state", "mixers")),
        ("conv_size conv_kernel d_conv conv_kernel_size", Word("conv", "mixers", "taps")),
        ("intermediate_size d_ff ffn_dim hidden_dim d_inner", Word("expand", "ffns", "hidden width / d_model")),
        ("num_experts num_local_experts n_routed_experts experts", Word("n_experts", "ffns")),
        ("num_experts_per_tok experts_per_token", Word("top_k", "ffns")),
        ("hidden_size n_embd embed_dim dim width", Word("d_model", "scales")),
        ("n_layers num_layers num_hidden_layers n_layer depth layers", Word("n_blocks", "scales")),
        ("seq_len seq_length max_seq_len context_length max_position_embeddings", Word("context", "scales")),
        ("learning_rate", Word("lr", "train")),
        ("batch_size", Word("batch_tokens", "train", "tokens of one step")),
        ("max_steps steps epochs num_epochs", Word("tokens", "train", "of one trial")),
        ("dtype precision", Word("dtype", "scales")),
        ("type name", Word("kind", "mixers and ffns")),
    )
    for word in words.split()
}


def key_hint(word: object, known: Iterable[str]) -> str:
    """What to write instead of an unknown key: its name here, if it is a word of the field, or the nearest one."""
    known = list(known)
    nearest = did_you_mean(word, known)
    here = _BROUGHT.get(word) if isinstance(word, str) else None
    if here is None or (nearest and here.key not in known):
        return nearest
    place = "" if here.key in known else f" under {here.section}"
    return f" Write '{here.key}'{place}{f' ({here.meaning})' if here.meaning else ''}."


class Problems:
    """Collects problems of one file, each with its line; `origin` leads from filled paths back to the file."""

    def __init__(self, source: Source) -> None:
        self.file = source
        self.found: dict[str, int] = {}  # a message, once, to its line
        self.origin: dict[Path_, Path_] = {}

    def in_order(self) -> list[str]:
        """All messages from the top of the file to its end."""
        return sorted(self.found, key=lambda message: self.found[message])

    def add(self, path: Path_, message: str) -> None:
        """One problem at a path of the filled tree."""
        source = self.source(path)
        name = hole_name(path)
        self.found[f"{self.file.where(source)}: {name + ' ' if name else ''}{message}"] = self.file.line(source)

    def source(self, path: Path_) -> Path_:
        """Where in the file a node of the filled tree came from."""
        for cut in range(len(path), -1, -1):
            if path[:cut] in self.origin:
                return self.origin[path[:cut]] + path[cut:]
        return path

    def validate(self, spec: type[S], node: Any, path: Path_) -> S | None:
        """`node` as a spec, or None with its problems added."""
        if node is None:
            self.add(path, "is empty; write options below it, or leave it out")
            return None
        if not isinstance(node, dict):
            self.add(path, f"is {node!r}; expected a mapping")
            return None
        try:
            return spec.model_validate(node)
        except ValidationError as error:
            self._explain(error, spec, node, path)
        return None

    def _explain(self, error: ValidationError, spec: type[Spec], node: Any, path: Path_) -> None:
        expected: dict[Path_, list[str]] = {}
        items = error.errors(include_url=False)
        for item in items:
            if item["type"] == "literal_error" and any(_says_more(other, item) for other in items):
                continue
            loc = _inside(node, item["loc"])
            if item["type"] == "extra_forbidden":
                known, key = _keys_at(spec, loc[:-1]), loc[-1]
                hint = key_hint(key, known)
                if str(key).isdigit() and _at(node, loc) is None:
                    hint = " Inside {...} a comma ends a value: write 16000, 16k or 0.5, not 16,000 or 0,5."
                elif ":" in str(key) and _at(node, loc) is None:
                    hint = f" Write a space after the colon: '{str(key).replace(':', ': ', 1)}'."
                self.add((*path, *loc[:-1]), f"has an unknown key '{key}'; expected {one_of(known)}.{hint}")
            elif item["type"] == "missing":
                self.add(path, f"has no '{hole_name(item['loc'])}', which is required")
            elif item["type"] == "value_error" and not _is_found(item):
                self.add((*path, *loc), str(item["ctx"]["error"]))
            elif item["type"] == "value_error":
                expected.setdefault(loc, []).append(str(item["ctx"]["error"]))
            else:
                expected.setdefault(loc, []).append(_expected(item))
        for loc, texts in expected.items():
            own = [text for text in texts if text.startswith("found ")]
            if own:
                self.add((*path, *loc), own[0].replace("found ", "is ", 1) + f".{hole_hint(_at(node, loc))}")
                continue
            value = _at(node, loc)
            if value is None:
                self.add((*path, *loc), f"is empty; expected {' or '.join(dict.fromkeys(texts))}")
                continue
            options = [word.strip("'") for text in texts for word in text.replace(" or ", ", ").split(", ")]
            hint = did_you_mean(value, options) if isinstance(value, str) else hole_hint(value)
            self.add((*path, *loc), f"is {value!r}; expected {' or '.join(dict.fromkeys(texts))}.{hint}")


def _says_more(other: Any, item: Any) -> bool:
    """Whether `other` is a mistake inside another branch of the union at `item` (whose last part names the branch)."""
    loc, inner = item["loc"], other["loc"]
    if loc == inner or loc[:-1] != inner[: len(loc) - 1]:
        return False
    return len(inner) > len(loc) or (other["type"] == "value_error" and not _is_found(other))


def _is_found(item: Any) -> bool:
    """Whether a value error says what it found, as those of single values do (`found '4GB'; expected ...`)."""
    return str(item["ctx"]["error"]).startswith("found ")


def _expected(item: Any) -> str:
    kind, ctx = item["type"], item.get("ctx", {})
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "literal_error":
        return str(ctx["expected"])
    if kind in _BOUNDS:
        limit = next(iter(ctx.values()))
        return f"a number {_BOUNDS[kind]} {f'{limit:g}' if isinstance(limit, float) else limit}"
    return str(item["msg"]).replace("Input should be ", "").replace("Value error, ", "")


def _inside(node: Any, loc: tuple[Any, ...]) -> Path_:
    """The part of a pydantic location that walks through the data (the rest names branches of a union)."""
    inside: Path_ = ()
    for part in loc:
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]
            inside = (*inside, part)
    return inside


def _at(node: Any, loc: Path_) -> Any:
    for part in loc:
        node = node[part]
    return node


def _keys_at(spec: type[Spec], loc: Path_) -> list[str]:
    """Keys that the (sub-)model at a location takes."""
    for part in loc:
        inner = spec.model_fields.get(str(part)) or next(
            (f for f in spec.model_fields.values() if f.alias == part), None
        )
        found = _models_in(inner.annotation) if inner is not None else []
        if not found:
            return []
        spec = found[0]
    return [field.alias or name for name, field in spec.model_fields.items()]


def _models_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
