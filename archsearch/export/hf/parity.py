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
from archsearch.export.kernel_parity import compare_kernels, plain_torch
from archsearch.export.parity import (
    LARGE_BLOCK,
    SMALL,
    TOLERANCE,
    Parity,
    difference_of,
    made_block,
    one_of_each,
    one_thread,
)
from archsearch.model import HybridLM, build_model, num_params

PROMPT = 40  # tokens
GREEDY = 256
STEPS = 80  # of these are compared with the search model's own steps: more than a chunk of the linear mixers
STEPS_OF_KERNELS = 4  # of these are read one by one where kernels are compared
TIE = 1e-4  # of the largest logit: what one forward and many steps of one model may differ by
PACKAGE = "archsearch_exported_folder"


def check_folder(spec: ModelSpec, folder: Path, name: str, weights: Mapping[str, Tensor] | None = None) -> Parity:
    """Load the folder's code and compare; raises ExportError if it computes anything else than the search model.

    weights: those of the search model that the folder holds; None: it has none, so others are compared.
    """
    with loaded_folder(folder, name) as module, torch.inference_mode(), _quiet():
        with torch.device("meta"):
            search = HybridLM(spec)
            exported = module.HybridForCausalLM(module.HybridConfig())
        _same_tensors(spec, search, exported)
        n_params = num_params(search)
        if n_params != params(spec):
            raise ExportError(f"the model has {n_params} parameters, its formula {params(spec)}")
        whole = n_params <= SMALL
        with plain_torch(module):
            if whole:
                with one_thread():
                    what, difference = _whole(spec, module, folder, weights)
            else:
                what, difference = _by_blocks(spec, search, exported)
        if not difference <= TOLERANCE:
            raise ExportError(f"the exported code differs from the search model ({what}) by {difference:.3g}, relative")
        kernels = _with_kernels(spec, module, weights) if whole else ""
    return Parity(what, difference, n_params, kernels)


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
    found = generated(exported, prompt, GREEDY)
    tokens: Tensor = found.sequences
    logits = search(tokens)
    check_greedy(tokens[0, PROMPT:], logits[0, PROMPT - 1 : -1])
    steps = min(STEPS, GREEDY)
    by_step = _steps(search, tokens[:, : PROMPT + steps - 1])
    pairs = [(logits, exported(tokens, use_cache=False).logits), *zip(by_step, found.logits[:steps], strict=True)]
    what = f"{GREEDY} greedy tokens are the same; logits of {tokens.shape[1]} tokens at once and of {steps} one by one"
    return what, difference_of(pairs)


def _steps(search: Any, tokens: Tensor) -> list[Tensor]:
    """The search model's logits [1, vocab] after the prompt, and after each token [1, T] that follows it."""
    state = search.init_state(1, tokens.shape[1])
    pieces = (tokens[:, :PROMPT], *torch.split(tokens[:, PROMPT:], 1, dim=1))
    return [search.extend(piece, state, last_only=True)[:, -1] for piece in pieces]


def generated(exported: Any, prompt: Tensor, n: int) -> Any:
    """transformers' greedy `generate`: n tokens after the prompt [1, T], whatever they are, with their logits."""
    return exported.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _with_kernels(spec: ModelSpec, module: ModuleType, weights: Mapping[str, Tensor] | None) -> str:
    state = hub_state(spec, weights or build_model(spec, seed=0).state_dict())

    def make() -> Any:
        exported = module.HybridForCausalLM(module.HybridConfig()).eval()
        exported.load_state_dict(state, strict=False)
        return exported

    def run(model: Any, tokens: Tensor) -> Tensor:
        before, cache = tokens.shape[1] - STEPS_OF_KERNELS, None
        logits = [model(tokens, use_cache=False).logits]
        for piece in (tokens[:, :before], *torch.split(tokens[:, before:], 1, dim=1)):
            out = model(piece, past_key_values=cache, use_cache=True)
            logits, cache = [*logits, out.logits], out.past_key_values
        return torch.cat(logits, dim=1)

    tokens = torch.randint(spec.vocab_size, (1, min(80, spec.context)), generator=torch.Generator().manual_seed(0))
    return compare_kernels(module, make, run, tokens, getattr(torch, spec.dtype))


def check_greedy(tokens: Tensor, logits: Tensor) -> None:
    """Whether each token [T] is the likeliest of its logits [T, vocab], or as likely as rounding can tell."""
    gaps = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    wrong = (gaps > TIE * logits.abs().amax(-1)).nonzero()[:, 0].tolist()
    if wrong:
        at = wrong[0]
        raise ExportError(
            f"the exported model's greedy token {at + 1} is {int(tokens[at])}, the search model's "
            f"{int(logits[at].argmax())}, by {float(gaps[at]):.3g} in the logits"
        )


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
