"""Whether the stock class computes what the search model computes; asked before a folder is kept.

Names and shapes of all tensors and the parameter count are compared always (what `Part.added` names is counted apart).
Models of up to SMALL parameters are loaded from the folder and their logits compared: of random tokens at once, and
step by step through the stock class's own cache while it generates. Of larger ones a model of each kind of block
alone, at full width (less, if the block is very large), with a small vocabulary. All of it on the CPU, with plain
torch where a library has kernels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archsearch.architecture import ModelSpec
from archsearch.cost import params
from archsearch.errors import ExportError
from archsearch.export.dialects.base import Refused
from archsearch.export.dialects.folder import meta_model, quiet
from archsearch.export.dialects.translate import Translation, translate
from archsearch.export.hf.parity import check_greedy, generated
from archsearch.export.parity import LARGE_BLOCK, SMALL, TOLERANCE, difference_of, one_of_each
from archsearch.graph import problems
from archsearch.model import HybridLM, build_model, num_params
from archsearch_kernels.dispatch import using

log = logging.getLogger(__name__)

TOKENS = 80  # more than a chunk of the linear mixers
PROMPT = 40
GREEDY = 20
VOCABULARY = 256  # of the models of one block
SHAKE = 0.2
SHORT = 60  # tokens that kernels take one after another, in full float32
KERNELS = 1e-3  # what kernels may differ by on a GPU, whose matrix products can be TF32


@dataclass(frozen=True)
class DialectParity:
    """What was compared.

    difference: the largest one, relative to the largest value. notes: what somebody who takes the folder should know.
    """

    what: str
    difference: float
    n_params: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For the card."""
        worst = f"{self.difference:.1e} of the largest value" if self.difference else "none"
        told = f"Against the model of the search, in float32: {self.what}; largest difference: {worst}. "
        return told + " ".join([f"{self.n_params:,} parameters, as the formula of the search says.", *self.notes])


def check_folder(translation: Translation, folder: Path, weights: Mapping[str, Tensor] | None) -> DialectParity:
    """Load the folder with the stock class and compare; raises ExportError if anything differs.

    weights: those of the search model that the folder holds; None: it has none, so others are compared.
    """
    spec, dialect = translation.spec, translation.dialect
    stock_class = dialect.stock_class(translation.config)
    with torch.no_grad(), quiet(), dialect.on_cpu(), plain_torch(stock_class):
        config = stock_class.config_class.from_pretrained(folder)
        n_params = _count(translation, config)
        notes = [f"{count:,} parameters more, {why}." for why, count in _added(translation, config).items()]
        notes += dialect.remarks(spec)
        if n_params <= SMALL:
            what, difference = _whole(translation, config, folder, weights)
        else:
            what, difference = _by_blocks(translation)
            if weights is not None:
                _same_weights(translation, folder, weights)
                what += "; weights as loaded from the folder"
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{dialect.title}'s class differs from the search model ({what}) by {difference:.3g}, relative; "
            "the folder was not kept"
        )
    if dialect.kernels and torch.cuda.is_available() and n_params <= SMALL:
        notes.append(_with_kernels(translation, config))
    return DialectParity(what, difference, n_params, tuple(notes))


@contextmanager
def plain_torch(stock_class: Any) -> Iterator[None]:
    """transformers replaces functions of a model by those of fla and the like, which it then calls on any device.

    What is compared here lies on the CPU, where their kernels do not run; the functions that they stand for do.
    """
    module = sys.modules[stock_class.__module__]
    swapped = {
        name: value
        for name, value in vars(module).items()
        if hasattr(value, "__wrapped__")
        and "hub_kernels" in getattr(getattr(value, "__code__", None), "co_filename", "")
    }
    for name, value in swapped.items():
        setattr(module, name, value.__wrapped__)
    try:
        yield
    finally:
        for name, value in swapped.items():
            setattr(module, name, value)


def _count(translation: Translation, config: Any) -> int:
    """Parameters of the search model; raises ExportError if the stock class has others."""
    stock = num_params(meta_model(translation, config))
    added = sum(_added(translation, config).values())
    expected = params(translation.spec)
    if stock - added != expected:
        raise ExportError(f"the stock class has {stock} parameters, {added} of them added; the formula says {expected}")
    return expected


def _added(translation: Translation, config: Any) -> dict[str, int]:
    """How many parameters the stock class has besides, by what they do."""
    sizes = {name: p.numel() for name, p in meta_model(translation, config).named_parameters()}
    found: dict[str, int] = {}
    for name, why in translation.added().items():
        found[why] = found.get(why, 0) + sizes[name]
    return found


def _whole(
    translation: Translation, config: Any, folder: Path, weights: Mapping[str, Tensor] | None
) -> tuple[str, float]:
    spec = translation.spec
    search = _shaken(spec)
    if weights is not None:
        search.load_state_dict(dict(weights), strict=False)
        stock = load(translation, folder)
    else:
        stock = _in_memory(translation, config, search)
    prompt = _tokens(spec, min(PROMPT, spec.context // 2))
    steps = min(GREEDY, spec.context - prompt.shape[1])
    found = generated(stock, prompt, steps)
    logits = search(found.sequences)[0, prompt.shape[1] - 1 : -1]
    check_greedy(found.sequences[0, prompt.shape[1] :], logits)
    pairs = [(logits, torch.cat(found.logits)), _at_once(search, stock, _tokens(spec, min(TOKENS, spec.context)))]
    what = (
        f"{steps} greedy tokens are the same; logits of {pairs[1][0].shape[1]} tokens at once and of {steps} one by one"
    )
    return what, difference_of(pairs)


@torch.no_grad()
def _with_kernels(translation: Translation, config: Any) -> str:
    """A note on what the library's own kernels compute on this GPU; raises ExportError if it is something else."""
    spec, name = translation.spec, torch.cuda.get_device_name()
    if any(block.mixer.kind == "attention" for block in spec.blocks):
        return f"Kernels were not compared: {translation.dialect.title} takes flash-attn, which has no float32."
    search = _shaken(spec)
    tokens = _tokens(spec, min(SHORT, spec.context)).cuda()
    with quiet(), using("reference"):
        stock = _in_memory(translation, config, search).cuda()
        pair = _at_once(search.cuda(), stock, tokens)
    difference = difference_of([pair])
    if not difference <= KERNELS:
        raise ExportError(f"the kernels of {translation.dialect.title} differ on {name} by {difference:.3g}, relative")
    return f"With its own kernels on {name}: largest difference {difference:.1e} of the largest value."


def _at_once(search: Any, stock: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return search(tokens), stock(tokens, use_cache=False).logits


def _tokens(spec: ModelSpec, n: int) -> Tensor:
    return torch.randint(spec.vocab_size, (1, n), generator=torch.Generator().manual_seed(n))


def _shaken(spec: ModelSpec) -> HybridLM:
    """A model without a bias of 0 or a norm of 1, so that a tensor in the wrong place is seen."""
    model = build_model(spec, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor += SHAKE * torch.randn(tensor.shape, generator=generator)
    return model


def load(translation: Translation, folder: Path) -> Any:
    """The folder as the stock class loads it, in float32; raises ExportError if a tensor has no place or no value."""
    made = translation.dialect.stock_class(translation.config)
    stock, told = made.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tied = {translation.dialect.names.head} if translation.spec.trunk.tie_embeddings else set()
    wrong = [f"{name} is missing" for name in sorted(set(told["missing_keys"]) - tied)]
    wrong += [f"{name} is left over" for name in sorted(told["unexpected_keys"])]
    wrong += [f"{name} does not fit" for name in sorted(map(str, told["mismatched_keys"]))]
    if wrong:
        raise ExportError(f"{made.__name__} does not load the folder: {', '.join(wrong[:5])}")
    return stock.eval()


def _in_memory(translation: Translation, config: Any, search: nn.Module) -> Any:
    stock = translation.dialect.stock_class(translation.config)(config).eval()
    stock.load_state_dict(translation.tensors(search.state_dict()), strict=False)  # names: see `meta_model`
    stock.tie_weights()
    return stock


def _same_weights(translation: Translation, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """That the folder holds the very numbers; raises ExportError at the first that differs."""
    loaded = load(translation, folder).state_dict()
    wide = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
    for name, tensor in translation.tensors(wide).items():
        if not torch.equal(loaded[name], tensor):
            raise ExportError(f"{name} is not what was written when {translation.dialect.title}'s class loads it")


def _by_blocks(translation: Translation) -> tuple[str, float]:
    """Models of one block each, of every kind, as wide as the whole one or as can be made."""
    spec, pairs, narrow = translation.spec, [], 0
    for i in _first_of_each(spec):
        alone = _alone(translation, i)
        narrow += alone.spec.d_model < spec.d_model
        search = _shaken(alone.spec)
        config = alone.dialect.stock_class(alone.config).config_class.from_dict(dict(alone.config))
        tokens = _tokens(alone.spec, min(TOKENS, spec.context))
        pairs.append(_at_once(search, _in_memory(alone, config, search), tokens))
    what = f"tensors by name and shape; logits of {len(pairs)} blocks, each alone at full width"
    return what + (f" ({narrow} of them, large ones, at less)" if narrow else ""), difference_of(pairs)


def _first_of_each(spec: ModelSpec) -> list[int]:
    """Of each kind of block the first: alone, the others are like it."""
    kinds = [(block.mixer, block.ffn) for block in spec.blocks]
    return [i for i in one_of_each(spec) if kinds.index(kinds[i]) == i]


def _alone(translation: Translation, i: int) -> Translation:
    """Block i as a model, as wide as the whole one if that has at most LARGE_BLOCK parameters, else 1/2, 1/4, ...

    Raises ExportError if none of these can be made.
    """
    spec = replace(translation.spec, blocks=(translation.spec.blocks[i],))
    spec, width = replace(spec, vocab_size=min(spec.vocab_size, VOCABULARY)), spec.d_model
    while width >= 8:
        narrow = replace(spec, d_model=width)
        if not problems(narrow) and params(narrow) <= LARGE_BLOCK:
            try:
                return translate(translation.dialect, narrow)
            except Refused as error:
                if width == spec.d_model:
                    raise
                log.info("block %d at width %d: %s", i, width, error)
        width //= 2
    raise ExportError(f"block {i} is too large to be compared, and no smaller width can be made of it")
