"""Whether the Hugging Face folder computes what the search model computes; asked before a folder is kept.

Models of up to SMALL parameters are compared whole, through transformers' own `from_pretrained` and `generate`; of
larger ones every parameter by name and shape, and the outputs of one block of each kind (see `export.parity`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from archsearch.architecture import ModelSpec
from archsearch.cost import params
from archsearch.errors import ExportError
from archsearch.export.hf.names import hub_state, shared_names
from archsearch.export.parity import LARGE_BLOCK, SMALL, TOLERANCE, Parity, difference_of, made_block, one_of_each
from archsearch.model import HybridLM, build_model, num_params

PROMPT = 40  # tokens
GREEDY = 256
PACKAGE = "archsearch_exported_folder"


def check_folder(spec: ModelSpec, folder: Path, name: str, weights: Mapping[str, Tensor] | None = None) -> Parity:
    """Load the folder's code and compare; raises ExportError if it computes anything else than the search model.

    weights: those of the search model that the folder holds; None: it has none, so others are compared.
    """
    with loaded_folder(folder, name) as module, torch.no_grad(), _quiet():
        with torch.device("meta"):
            search = HybridLM(spec)
            exported = module.HybridForCausalLM(module.HybridConfig())
        _same_tensors(spec, search, exported)
        n_params = num_params(search)
        if n_params != params(spec):
            raise ExportError(f"the model has {n_params} parameters, its formula {params(spec)}")
        whole = n_params <= SMALL
        what, difference = _whole(spec, module, folder, weights) if whole else _by_blocks(spec, search, exported)
    if not difference <= TOLERANCE:
        raise ExportError(f"the exported code differs from the search model ({what}) by {difference:.3g}, relative")
    return Parity(what, difference, n_params)


@contextmanager
def loaded_folder(folder: Path, name: str) -> Iterator[ModuleType]:
    """The folder's modeling file as a module, leaving no trace of having been imported."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield importlib.import_module(f"{PACKAGE}.modeling_{name}")
    finally:
        sys.dont_write_bytecode = writes
        for module in [m for m in sys.modules if m.partition(".")[0] == PACKAGE]:
            del sys.modules[module]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and without what transformers says of sequences longer than the context."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _same_tensors(spec: ModelSpec, search: HybridLM, exported: Any) -> None:
    theirs = {name: tuple(t.shape) for name, t in hub_state(spec, search.state_dict()).items()}
    tied = {"lm_head.weight"} if spec.trunk.tie_embeddings else set()
    ours = {name: tuple(t.shape) for name, t in exported.state_dict().items() if name not in tied}
    if theirs != ours:
        wrong = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        raise ExportError(f"the exported code has other tensors than the search model: {', '.join(wrong[:5])}")


def _whole(
    spec: ModelSpec, module: ModuleType, folder: Path, weights: Mapping[str, Tensor] | None
) -> tuple[str, float]:
    search = build_model(spec, seed=0).eval()
    if weights is None:
        exported = module.HybridForCausalLM(module.HybridConfig())
        missing = exported.load_state_dict(hub_state(spec, search.state_dict()), strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}, missing
    else:
        search.load_state_dict(dict(weights), strict=False)
        exported = module.HybridForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exported.eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(spec.vocab_size, (1, PROMPT), generator=generator)
    wanted, logits = _greedy(search, prompt)
    found = exported.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=GREEDY,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    n = _agreeing(wanted[0, PROMPT:], found.sequences[0, PROMPT:], logits)
    pairs = [(search(wanted), exported(wanted, use_cache=False).logits)]
    pairs += [(a, b) for a, b in zip(logits[:n], found.logits[:n], strict=True)]
    what = f"{GREEDY} greedy tokens are equal; logits of {wanted.shape[1]} tokens, full forward and token by token"
    return what, difference_of(pairs)


def _greedy(model: HybridLM, prompt: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The prompt and GREEDY tokens more, [1, T], and the logits [1, vocab] of each."""
    tokens, state = prompt, model.init_state(1, PROMPT + GREEDY)
    new, logits = prompt, []
    for _ in range(GREEDY):
        logits.append(model.extend(new, state, last_only=True)[:, -1])
        new = logits[-1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens, logits


def _agreeing(wanted: Tensor, found: Tensor, logits: list[Tensor]) -> int:
    """How many steps can be compared: all, or up to where two tokens are equally likely to rounding."""
    different = (wanted != found).nonzero()[:, 0].tolist()
    if not different:
        return GREEDY
    first = different[0]
    row = logits[first][0]
    gap = float(row[wanted[first]] - row[found[first]])
    if gap > TOLERANCE * float(row.abs().max()):
        raise ExportError(
            f"the exported model's greedy token {first + 1} is {int(found[first])}, the search model's "
            f"{int(wanted[first])}, by {gap:.3g} in the logits"
        )
    return first + 1


def _by_blocks(spec: ModelSpec, search: Any, exported: Any) -> tuple[str, float]:
    """Blocks of each kind, first and last, on random activations; one that reads keys and values with its source."""
    shares = any(block.kv_from is not None for block in spec.blocks)
    x = torch.randn(1, min(80, spec.context), spec.d_model, generator=torch.Generator().manual_seed(0))
    pairs: list[tuple[Tensor, Tensor]] = [(torch.ones(1), torch.ones(1))]
    kinds = one_of_each(spec)
    chosen = [i for i in kinds if num_params(search.blocks[i]) <= LARGE_BLOCK]
    shared = shared_names(spec, search.state_dict())
    for i in chosen:
        if any(name.startswith(f"blocks.{i}.") for name in shared):
            continue  # its mixer or FFN is made with the block that owns it
        source = spec.blocks[i].kv_from
        both: list[Any] = [None, None]
        for j in (i,) if source is None else (source, i):
            block, layer = made_block(search.blocks[j]), exported.model.layers[j].eval()
            layer.load_state_dict(block.state_dict(), assign=True)
            for name, buffer in block.named_buffers():
                owner, _, own = name.rpartition(".")
                layer.get_submodule(owner)._buffers[own] = buffer
            y, kv = block(x, None, both[0])
            options = {"seq_idx": None, "past_key_values": None}
            found = layer(x, both[1], **options) if shares else (layer(x, **options), None)
            pairs.append((y, found[0]))
            both = [kv, found[1]]
            block.to("meta")
            layer.to("meta")
    what = f"tensors by name and shape; outputs of {len(pairs) - 1} blocks at full width"
    if len(chosen) < len(kinds):
        what += f" ({len(kinds) - len(chosen)} other kinds of block are too large to be made for this)"
    return what, difference_of(pairs)
