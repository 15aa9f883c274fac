"""ModelSpec to the text of `model.py`: collect what the model needs, write its layout, specialise it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from importlib.resources import files

from archsearch.architecture import ModelSpec
from archsearch.export.blocks import Classes, make_blocks_source
from archsearch.export.closure import Closure
from archsearch.export.kernels import Kernels, glue_code, used, with_glue, without_defaults
from archsearch.export.source import Edit, Source, apply, literal_text
from archsearch.export.specialise import specialised, tidy
from archsearch.model import BASE_WIDTH, EMBED_STD

TEMPLATE = "archsearch.export.template"
ENTRIES = frozenset({"HybridLM", "State", "main"})
MAINS = {"bytes": "main_bytes", "ids": "main_ids"}
OTHER_MODULES = re.compile(r"nn\.(?:Conv|GroupNorm|BatchNorm|Bilinear|MultiheadAttention)")  # initialise themselves
OWN_INIT = re.compile(r"\n {8}for module in reversed\(.*(?:\n {12}.*)+")
BIASES = re.compile(r"\n *if module\.bias is not None:\n *(?:nn\.init\.)?zeros_\(module\.bias\)(?=\n)")
HOOKS: dict[str, Callable[[str], bool]] = {  # methods of the language model that only some models need
    "balance_loss": lambda text: re.search(r"self\.router_loss = (?!None)", text) is not None,
    "update_router_bias": lambda text: "def update_bias" in text,
}


def model_code(spec: ModelSpec, main: str | None = None, kernels: Kernels = "none", name: str = "model") -> str:
    """The file of this one model, without a docstring.

    main: what running the file does, `bytes` (goes on from a text), `ids` (from token ids) or None. kernels: where
    Triton kernels come from (see `export.kernels`); vendored ones lie in the package `<name>_kernels` beside the file.
    """
    with_kernels = kernels != "none"
    text = collected(spec, main, with_kernels)
    done = specialised(text, ENTRIES, _without_hooks)
    if with_kernels:
        done = without_defaults(done)
        if ops := used(done):
            done = with_glue(done, glue_code(ops, name, kernels, beside=f"{name}_kernels"))
    out = tidy(done, text)
    return out + ('\n\nif __name__ == "__main__":\n    main()\n' if main else "")


def _without_hooks(text: str) -> str:
    """The text without what the language model does for modules that this one does not have."""
    names = [name for name, is_needed in HOOKS.items() if f"def {name}(" in text and not is_needed(text)]
    return without(without_idle_init(text, OWN_INIT), [f"HybridLM.{name}" for name in names])


def without_idle_init(text: str, own_init: re.Pattern[str]) -> str:
    """The text without the initialisation of what no module has: the switches of the templates are set, and what stands
    where one is folded away already goes; `own_init` finds the calls of reset_parameters.
    """
    if "def reset_parameters" not in text and not OTHER_MODULES.search(text):
        text = own_init.sub("", text.replace("HAS_OWN_INIT = True", "HAS_OWN_INIT = False", 1))
    if "module.bias" in text and not has_biases(text):
        text = BIASES.sub("", text.replace("HAS_BIASES = True", "HAS_BIASES = False", 1))
    return text


def has_biases(text: str) -> bool:
    """Whether some nn.Linear that the text makes, or may make, has a bias."""
    nodes = list(ast.walk(ast.parse(text)))
    named = {n for n in nodes if isinstance(n, ast.Name | ast.Attribute) and _last_name(n).endswith("Linear")}
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    tests = [c for c in calls if _last_name(c.func) == "isinstance"]
    named -= {n for test in tests for n in ast.walk(test)}
    named -= {c.func for c in calls for k in c.keywords if k.arg == "bias" and getattr(k.value, "value", None) is False}
    return bool(named)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def collected(spec: ModelSpec, main: str | None = None, with_kernels: bool = False) -> str:
    """All code that the model reaches, options and all."""
    classes = Classes()
    text = filled_in("template.py", constants(spec), make_blocks_source(spec, classes))
    text = without(text, [name for kind, name in MAINS.items() if kind != main])
    if main is not None:
        text = text.replace(f"def {MAINS[main]}(", "def main(")
    text = text.replace("\nimport torch\n", f"\nimport torch\n{classes.imports()}\n", 1)
    roots = [(module, name) for module, _, name in (target.partition(":") for target in classes.targets())]
    entries = [(TEMPLATE, "HybridLM"), *([(TEMPLATE, "main")] if main else [])]
    return Closure([*roots, *entries], {TEMPLATE: text}, with_kernels).text()


def filled_in(template: str, values: Mapping[str, str], blocks: str) -> str:
    """The text of a template in this package with its constants and `make_blocks` replaced."""
    text = files("archsearch.export").joinpath(template).read_text()
    for name, value in values.items():
        text, found = re.subn(rf"(?m)^({name}(?:: [^=]+)?) = [^#\n]*?(  #|$)", rf"\1 = {value}\2", text)
        assert found == 1, name
    start = text.index("def make_blocks()")
    end = text.index("\n\n\n", start)
    return text[:start] + blocks.rstrip() + text[end:]


def without(text: str, names: list[str]) -> str:
    """The text without some of its functions and methods."""
    if not names:
        return text
    source = Source(text)
    edits = []
    for node in source.tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        owners = [("", node), *((f"{getattr(node, 'name', '')}.", child) for child in inside)]
        for prefix, child in owners:
            if isinstance(child, ast.FunctionDef) and prefix + child.name in names:
                edits.append(Edit(*source.line_span(*source.statement_lines(child)), ""))
    return apply(text, edits)


def constants(spec: ModelSpec) -> dict[str, str]:
    """What the constants of a template are for this model, as code."""
    kv_from = {i: b.kv_from for i, b in enumerate(spec.blocks) if b.kv_from is not None}
    values = {
        "VOCAB_SIZE": spec.vocab_size,
        "D_MODEL": spec.d_model,
        "N_BLOCKS": spec.n_blocks,
        "EMBED_STD": EMBED_STD,
        "LOGIT_SCALE": BASE_WIDTH / spec.d_model,
        "NORM": spec.trunk.norm,
        "TIE_EMBEDDINGS": spec.trunk.tie_embeddings,
        "SHARES_KV": bool(kv_from),
        "KV_FROM": kv_from,
    }
    return {name: literal_text(value) for name, value in values.items()}
