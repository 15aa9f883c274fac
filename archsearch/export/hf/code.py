"""ModelSpec to the text of `modeling_<name>.py` and `configuration_<name>.py`; see `archsearch.export.code`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from archsearch.architecture import Block, ModelSpec
from archsearch.contract import MixerSpec
from archsearch.export.blocks import Classes, make_blocks_source
from archsearch.export.closure import Closure
from archsearch.export.code import constants, filled_in, without, without_idle_init
from archsearch.export.imports import CONFIGURATION, GLUE
from archsearch.export.kernels import without_defaults
from archsearch.export.source import literal_text
from archsearch.export.specialise import specialised, tidy
from archsearch.model import BASE_WIDTH, hidden_matrices, width_multipliers
from archsearch.settings import Train

TEMPLATE = "archsearch.export.hf.template"
ENTRIES = frozenset({"HybridCache", "HybridPreTrainedModel", "HybridModel", "HybridForCausalLM"})
RECURRENT = frozenset({"deltanet", "gated_deltanet", "gla", "kda", "mamba", "mamba2", "scalar_decay", "short_conv"})
ATTENTIVE = frozenset({"attention", "mla", "moba"})

ROUTER_LOSS = re.compile(r"\n *if self\.training:\n *loss = loss \+ self\.balance_loss\(\)")
OWN_INIT = re.compile(r'\n {8}elif hasattr\(module, "reset_parameters"\):.*(?:\n {12}.*)+')
UNSAVED_BUFFERS = re.compile(r"\n *for name in module\._non_persistent_buffers_set:.*\n.*zeros_\(.*\)(?=\n)")


def modeling_code(spec: ModelSpec, name: str, with_kernels: bool = True) -> str:
    """The file `modeling_<name>.py` of this one model, without a docstring.

    with_kernels: operations ask `kernels.py` (see `export.kernels`) for a Triton kernel.
    """
    out = _specialised(collected(spec, with_kernels), with_kernels)
    out = out.replace(f"from {CONFIGURATION} import", f"from .configuration_{name} import")
    return out.replace(f"from {GLUE} import", "from .kernels import")


@lru_cache(maxsize=32)  # for whoever exports one layout in several ways
def _specialised(text: str, with_kernels: bool) -> str:
    done = specialised(text, ENTRIES, _for_this_model)
    return tidy(without_defaults(done) if with_kernels else done, text)


def collected(spec: ModelSpec, with_kernels: bool = True) -> str:
    """All code that the model reaches, options and all."""
    classes = Classes()
    values = constants(spec)
    del values["VOCAB_SIZE"]  # the configuration has it
    shares_weights = any(b.mixer_weights_from is not None or b.ffn_weights_from is not None for b in spec.blocks)
    blocks = make_blocks_source(spec, classes, [padding(block) for block in spec.blocks])
    text = filled_in("hf/template.py", values, blocks)
    if shares_weights:  # a device map must not part them
        text = text.replace(
            '_no_split_modules: ClassVar[list[str]] = ["Block"]',
            '_no_split_modules: ClassVar[list[str]] = ["HybridModel"]',
        )
    if not spec.trunk.tie_embeddings:
        text = re.sub(r"\n    _tied_weights_keys: .*\n", "\n", text)
    if not shares_weights:
        text = without(text, ["Block.share"])
    text = text.replace("\nimport torch\n", f"\nimport torch\n{classes.imports()}\n", 1)
    roots = [(module, own) for module, _, own in (target.partition(":") for target in classes.targets())]
    entries = [(TEMPLATE, "HybridForCausalLM")]
    return _for_this_model(Closure([*roots, *entries], {TEMPLATE: text}, with_kernels).text())


def padding(block: Block) -> str:
    """How a block goes on after rows with padding in front; see `hf.template.Block`."""
    mixer: Any = block.mixer
    is_recurrent = mixer.kind in RECURRENT and getattr(mixer, "variant", "") != "retnet"  # whose rotary counts
    return "recurrent" if is_recurrent else "rows"


def layer_types(spec: ModelSpec) -> list[str]:
    """What transformers calls the kind of each block; only names that it allows."""
    return [_layer_type(block.mixer) for block in spec.blocks]


def _layer_type(mixer: MixerSpec) -> str:
    if mixer.kind in ATTENTIVE:
        return "full_attention" if getattr(mixer, "window", None) is None else "sliding_attention"
    if mixer.kind == "short_conv":
        return "conv"
    return {"parallel": "hybrid", "none": "moe"}.get(mixer.kind, "linear_attention")


def configuration_code(spec: ModelSpec, name: str, end_id: int | None) -> str:
    """The file `configuration_<name>.py`, without a docstring; `end_id` ends documents and pads."""
    text = files("archsearch.export.hf").joinpath("configuration.py").read_text().partition('"""\n\n')[2]
    values = {
        "HIDDEN_SIZE": str(spec.d_model),
        "LAYER_TYPES": _tuple([literal_text(name) for name in layer_types(spec)]),
        "    model_type": literal_text(name),
        "    vocab_size: int": str(spec.vocab_size),
        "    max_position_embeddings: int": str(spec.context),
        "    tie_word_embeddings: bool": str(spec.trunk.tie_embeddings),
        "    pad_token_id: int | None": str(end_id),
        "    bos_token_id: int | None": str(end_id),
        "    eos_token_id: int | list[int] | None": str(end_id),
    }
    for field, value in values.items():
        start = text.index(f"\n{field} = ") + len(field) + 4
        text = text[:start] + value + text[text.index("\n", start) :]
    return tidy(text, text)


def training_code(spec: ModelSpec, train: Mapping[str, Any]) -> str:
    """The file `train.py`: this model's sizes, and what the search trained with (`train`, its settings) as defaults."""
    text = files("archsearch.export.hf").joinpath("train.py").read_text()
    hidden = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in hidden_matrices(spec)})
    fixed = {re.sub(r"^blocks\.\d+\.", "", name) for name in width_multipliers(spec)} - set(hidden)
    assert not [name for name in fixed if name.endswith(tuple(hidden))], "a suffix does not tell what follows the width"
    used = Train.model_validate({k: v for k, v in train.items() if k in Train.model_fields})
    values = {
        "BASE_WIDTH": str(BASE_WIDTH),
        "WIDTH": str(spec.d_model),
        "HIDDEN: tuple[str, ...]": _tuple([literal_text(f".{name}") for name in hidden]),
        "CONTEXT": str(spec.context),
        "LR": repr(used.lr),
        "WARMUP, DECAY": f"{used.warmup!r}, {used.decay!r}",
        "WEIGHT_DECAY, BETAS, GRAD_CLIP": f"{used.weight_decay!r}, {(used.beta1, used.beta2)!r}, {used.grad_clip!r}",
        "BATCH_TOKENS": str(used.batch_tokens),
    }
    for name, value in values.items():
        start = text.index(f"\n{name} = ") + len(name) + 4
        end = text.index("\n", start)
        comment = text.find("  #", start, end)
        text = text[:start] + value + text[end if comment < 0 else comment :]
    return text


def _tuple(items: list[str]) -> str:
    one_line = f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    return one_line if len(one_line) < 105 else "(\n" + "".join(f"    {item},\n" for item in items) + ")"


def _for_this_model(text: str) -> str:
    """The text without what the models do for modules that this one does not have."""
    gone = []
    if "def balance_loss" in text and re.search(r"self\.router_loss = (?!None)", text) is None:
        gone.append("HybridForCausalLM.balance_loss")
        text = text.replace("HAS_ROUTER_LOSS = True", "HAS_ROUTER_LOSS = False", 1)
        text = ROUTER_LOSS.sub("", text)  # if that is folded away already
    if "def update_router_bias" in text and "def update_bias" not in text:
        gone.append("HybridForCausalLM.update_router_bias")
    if "persistent=False" not in text:
        text = UNSAVED_BUFFERS.sub("", text)
    return without(without_idle_init(text, OWN_INIT), gone)
