"""What a model costs, read off its graph: parameters, FLOPs, decode-state bytes. No tensor is made.

FLOPs count 2 per multiply-add of matrix products, forward only. All numbers are exact for the modules built here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from archsearch.architecture import DTYPE_BYTES, Block, ModelSpec
from archsearch.contract import FFNSpec, MixerSpec, Site
from archsearch.errors import UserError


@dataclass(frozen=True)
class BlockCost:
    """One block at one scale; shared weights count where they are owned."""

    params: int
    active_params: int
    state_bytes: int  # per sequence, at the scale's context


def _where(model: ModelSpec, block: Block) -> Site:
    """Costs do not depend on the depth, so equal blocks are computed once."""
    return Site(model.d_model, 0, 1, reads_kv=block.kv_from is not None)


def _asked(spec: MixerSpec | FFNSpec, method: str, *arguments: object) -> int:
    """What a spec says, which may be somebody else's; raises UserError with its kind where it cannot say it."""
    try:
        found: int = getattr(spec, method)(*arguments)
    except Exception as error:
        raise UserError(f"kind {spec.kind}: {method} failed with {type(error).__name__}: {error}") from error
    return found


@lru_cache(maxsize=4096)
def _mixer_params(spec: MixerSpec, site: Site) -> int:
    return _asked(spec, "num_params", site)


@lru_cache(maxsize=4096)
def _ffn_params(spec: FFNSpec, site: Site) -> tuple[int, int]:
    return _asked(spec, "num_params", site), _asked(spec, "active_params", site)


@lru_cache(maxsize=4096)
def _state_bytes(spec: MixerSpec, site: Site, context: int, dtype_bytes: int) -> int:
    return _asked(spec, "state_bytes", site, context, dtype_bytes)


@lru_cache(maxsize=4096)
def _flops(spec: MixerSpec | FFNSpec, site: Site, n_tokens: int) -> int:
    return _asked(spec, "flops", site, n_tokens)


@lru_cache(maxsize=4096)
def _step_flops(spec: MixerSpec, site: Site, context: int) -> int:
    return _asked(spec, "step_flops", site, context)


def block_costs(model: ModelSpec) -> list[BlockCost]:
    """The cost of every block, norms included."""
    made = {id(block): _block_cost(model, block) for block, _ in model.distinct}
    return [made[id(block)] for block in model.blocks]


def _block_cost(model: ModelSpec, block: Block) -> BlockCost:
    site = _where(model, block)
    norms = model.d_model * (2 if model.trunk.norm_place == "sandwich" else 1)
    mixer = 0 if block.mixer.kind == "none" else norms
    ffn = active = 0 if block.ffn.kind == "none" else norms
    if block.mixer_weights_from is None:
        mixer += _mixer_params(block.mixer, site)
    if block.ffn_weights_from is None:
        all_, some = _ffn_params(block.ffn, site)
        ffn, active = ffn + all_, active + some
    state = _state_bytes(block.mixer, site, model.context, DTYPE_BYTES[model.dtype])
    return BlockCost(mixer + ffn, mixer + active, state)


def _outside(model: ModelSpec) -> int:
    tables = 1 if model.trunk.tie_embeddings else 2
    return tables * model.vocab_size * model.d_model + model.d_model


def params(model: ModelSpec) -> int:
    """Trainable parameters, embeddings included, shared ones once."""
    return _outside(model) + sum(n * _block_cost(model, block).params for block, n in model.distinct)


def weight_bytes(model: ModelSpec) -> int:
    """Memory of all parameters in the model's dtype; gradients, optimiser, caches and activations come on top."""
    return params(model) * DTYPE_BYTES[model.dtype]


def active_params(model: ModelSpec) -> int:
    """Parameters that one token passes through."""
    return _outside(model) + sum(n * _block_cost(model, block).active_params for block, n in model.distinct)


def state_bytes(model: ModelSpec, context: int | None = None, batch: int = 1) -> int:
    """Decode-time memory for `batch` sequences: KV caches in the model's dtype, recurrent states in fp32."""
    context = model.context if context is None else context
    each = (
        n * _state_bytes(block.mixer, _where(model, block), context, DTYPE_BYTES[model.dtype])
        for block, n in model.distinct
    )
    return batch * sum(each)


def flops(model: ModelSpec, context: int | None = None) -> int:
    """Forward FLOPs over one sequence of `context` tokens, logits of every token included."""
    n_tokens = model.context if context is None else context
    total = 2 * n_tokens * model.vocab_size * model.d_model
    for block, n in model.distinct:
        site = _where(model, block)
        total += n * (_flops(block.mixer, site, n_tokens) + _flops(block.ffn, site, n_tokens))
    return total


def flops_per_token(model: ModelSpec, context: int | None = None) -> float:
    """`flops` divided by the tokens: the average over a sequence."""
    n_tokens = model.context if context is None else context
    return flops(model, n_tokens) / n_tokens


def step_flops(model: ModelSpec, context: int | None = None) -> int:
    """FLOPs of one decoded token with `context` tokens in the cache."""
    context = model.context if context is None else context
    total = 2 * model.vocab_size * model.d_model
    for block, n in model.distinct:
        site = _where(model, block)
        total += n * (_step_flops(block.mixer, site, context) + _flops(block.ffn, site, 1))
    return total
