"""Whether exported code computes what the search model computes; asked at every export, before anything is kept.

Models of up to SMALL parameters are compared whole: parameters, logits of a full forward, logits token by token. Of
larger ones every parameter is compared by name and shape on the meta device, and the numbers block by block at full
width: one block of each kind is made at a time, so that a model of any size fits. Blocks of more than LARGE_BLOCK
parameters (hundreds of experts) are not made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from archsearch.architecture import ModelSpec, dump
from archsearch.cost import params
from archsearch.errors import ExportError
from archsearch.export.kernel_parity import compare_kernels, plain_torch
from archsearch.model import HybridLM, build_model, num_params

SMALL = 30_000_000
LARGE_BLOCK = 250_000_000
TOLERANCE = 1e-5  # of the largest logit, in float32
TOKENS = 80  # more than a chunk of the linear mixers
STEPS = 4  # of these are read one by one where kernels are compared


@dataclass(frozen=True)
class Parity:
    """What was compared, and the largest difference relative to the largest value."""

    what: str
    difference: float
    n_params: int
    kernels: str = ""  # how the numbers with kernels compare


def check_parity(spec: ModelSpec, path: Path) -> Parity:
    """Load the exported file and compare; raises ExportError if it computes anything else than the search model."""
    with loaded(path) as module:
        with torch.device("meta"):
            search, exported = HybridLM(spec), module.HybridLM()
        _same_tensors(search, exported)
        n_params = num_params(search)
        if n_params != params(spec):
            raise ExportError(f"the model has {n_params} parameters, its formula {params(spec)}")
        with torch.no_grad(), plain_torch(module):
            if n_params <= SMALL:
                with one_thread():
                    what, difference = _whole(spec, module)
            else:
                what, difference = _by_blocks(spec, search, exported)
        if not difference <= TOLERANCE:
            raise ExportError(f"the exported code differs from the search model ({what}) by {difference:.3g}, relative")
        kernels = _with_kernels(spec, module) if n_params <= SMALL else ""
    return Parity(what, difference, n_params, kernels)


@contextmanager
def one_thread() -> Iterator[None]:
    """Small models token by token: threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """The exported file as a module, leaving no trace of having been imported."""
    module = ModuleType("archsearch_exported_model")
    module.__file__ = str(path)
    known = set(sys.modules)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # where its kernels may lie
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        sys.dont_write_bytecode = writes
        for name in sys.modules.keys() - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(path.parent)):
                del sys.modules[name]


def _same_tensors(search: nn.Module, exported: nn.Module) -> None:
    theirs, ours = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (search, exported))
    if theirs != ours:
        wrong = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        raise ExportError(f"the exported code has other tensors than the search model: {', '.join(wrong[:5])}")
    if num_params(search) != num_params(exported):
        raise ExportError("the exported code shares its tensors in another way than the search model")


def _whole(spec: ModelSpec, module: ModuleType) -> tuple[str, float]:
    search: Any = build_model(spec, seed=0).eval()
    exported: Any = module.HybridLM().eval()
    exported.load_state_dict(search.state_dict())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(spec.vocab_size, (2, min(TOKENS, spec.context)), generator=generator)
    pairs = [(search(tokens), exported(tokens))]
    states = [model.init_state(2, tokens.shape[1]) for model in (search, exported)]
    half = tokens.shape[1] // 2
    for piece in (tokens[:, :half], *tokens[:, half:].unbind(1)):
        piece = piece.view(2, -1)
        pairs.append((search.extend(piece, states[0]), exported.extend(piece, states[1])))
    return f"logits of {tokens.shape[1]} tokens, full forward and token by token", difference_of(pairs)


def _with_kernels(spec: ModelSpec, module: ModuleType) -> str:
    weights = build_model(spec, seed=0).state_dict()

    def make() -> Any:
        exported: Any = module.HybridLM().eval()
        exported.load_state_dict(weights)
        return exported

    def run(model: Any, tokens: Tensor) -> Tensor:
        state, before = model.init_state(1, tokens.shape[1]), tokens.shape[1] - STEPS
        pieces = (tokens[:, :before], *torch.split(tokens[:, before:], 1, dim=1))
        return torch.cat([model(tokens), *(model.extend(piece, state) for piece in pieces)], dim=1)

    tokens = torch.randint(spec.vocab_size, (1, min(TOKENS, spec.context)), generator=torch.Generator().manual_seed(0))
    return compare_kernels(module, make, run, tokens, getattr(torch, spec.dtype))


def _by_blocks(spec: ModelSpec, search: Any, exported: Any) -> tuple[str, float]:
    """Blocks of each kind, first and last, on random activations; one that reads keys and values with its source."""
    shares = any(block.kv_from is not None for block in spec.blocks)
    x = torch.randn(1, min(TOKENS, spec.context), spec.d_model, generator=torch.Generator().manual_seed(0))
    pairs: list[tuple[Tensor, Tensor]] = [(torch.ones(1), torch.ones(1))]
    kinds = one_of_each(spec)
    chosen = [i for i in kinds if num_params(search.blocks[i]) <= LARGE_BLOCK]
    for i in chosen:
        source = spec.blocks[i].kv_from
        both: list[Any] = [None, None]
        for j in (i,) if source is None else (source, i):
            blocks = (made_block(search.blocks[j]), exported.blocks[j])
            _copy(*blocks)
            (y, kv), found = blocks[0](x, None, both[0]), blocks[1](x, kv=both[1]) if shares else (blocks[1](x), None)
            pairs.append((y, found[0]))
            both = [kv, found[1]]
            for block in blocks:
                block.to("meta")
    what = f"tensors by name and shape; outputs of {len(chosen)} blocks at full width"
    if len(chosen) < len(kinds):
        what += f" ({len(kinds) - len(chosen)} other kinds of block are too large to be made for this)"
    return what, difference_of(pairs)


def one_of_each(spec: ModelSpec) -> list[int]:
    """Of each kind of block the first and the last."""
    kinds: dict[str, list[int]] = {}
    for i, block in enumerate(spec.blocks):
        kinds.setdefault(str((dump(block.mixer), dump(block.ffn), block.kv_from is None)), []).append(i)
    return sorted({i for members in kinds.values() for i in (members[0], members[-1])})


def made_block(block: nn.Module) -> nn.Module:
    """A block from the meta device, with initial values."""
    block.to_empty(device="cpu")
    for module in reversed(list(block.modules())):
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return block.eval()


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict(), assign=True)
    for name, buffer in source.named_buffers():
        owner, _, own = name.rpartition(".")
        target.get_submodule(owner)._buffers[own] = buffer
    target.eval()


def difference_of(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference over the largest value; NaN if anything is."""
    largest = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    scale = torch.stack([a.abs().max() for a, _ in pairs]).max()
    return float(largest / scale)
