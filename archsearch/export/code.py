"""ModelSpec to the text of `model.py`: collect what the model needs, write its layout, fold, polish."""

from __future__ import annotations

import re
from importlib.resources import files

from archsearch.architecture import ModelSpec
from archsearch.export.blocks import Classes, make_blocks_source
from archsearch.export.closure import Closure
from archsearch.export.docs import trim_docstrings
from archsearch.export.fold import Folder
from archsearch.export.names import literal_text
from archsearch.export.tidy import tidy
from archsearch.model import BASE_WIDTH, EMBED_STD

TEMPLATE = "archsearch.export.template"
ENTRY = "HybridLM"
ENTRIES = {ENTRY, "State"}
OTHER_MODULES = re.compile(
    r"nn\.(?:Conv|GroupNorm|BatchNorm|Bilinear|MultiheadAttention)"
)  # with their own initialisation


def model_code(spec: ModelSpec) -> str:
    """The code of this one model, without a docstring for the file."""
    text = collected(spec)
    folder = Folder(text, ENTRIES)
    folded = folder.run()
    if "def reset_parameters" not in folded and not OTHER_MODULES.search(folded):
        folder.text = folded.replace("HAS_OWN_INIT = True", "HAS_OWN_INIT = False", 1)
        folded = folder.run()
    return tidy(trim_docstrings(folded, folder.dropped, folder.required), text)


def collected(spec: ModelSpec) -> str:
    """All code that the model reaches, options and all."""
    classes = Classes()
    blocks = make_blocks_source(spec, classes)
    text = files("archsearch.export").joinpath("template.py").read_text()
    for name, value in _constants(spec).items():
        text, found = re.subn(rf"(?m)^({name}(?:: [^=]+)?) = [^#\n]*?(  #|$)", rf"\1 = {value}\2", text)
        assert found == 1, name
    start = text.index("def make_blocks()")
    end = text.index("\n\n\n", start)
    text = text[:start] + blocks.rstrip() + text[end:]
    text = text.replace("\nimport torch\n", f"\nimport torch\n{classes.imports()}\n", 1)
    roots = [_symbol(target) for target in classes.targets()]
    return Closure([*roots, (TEMPLATE, ENTRY)], {TEMPLATE: text}).text()


def _symbol(target: str) -> tuple[str, str]:
    module, _, name = target.partition(":")
    return module, name


def _constants(spec: ModelSpec) -> dict[str, str]:
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
