"""Plain torch in the place of fla's kernels, so that its models run where no GPU is: what they mean, slowly.

The recurrences are fla's own reference functions (`fla.ops.*.naive`); the rest is a few lines each.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def plain_functions() -> Iterator[None]:
    """Within it fla's models call the functions below."""
    undo: list[tuple[Any, str, Any]] = []
    logger = logging.getLogger("fla")  # of what else could be installed
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for path, functions in _replacements().items():
            module, _, owner = path.partition(":")
            target = importlib.import_module(module)
            target = getattr(target, owner) if owner else target
            for name, function in functions.items():
                undo.append((target, name, vars(target).get(name, undo)))
                setattr(target, name, function)
        yield
    finally:
        logger.setLevel(level)
        for target, name, function in reversed(undo):
            if function is undo:  # there was none: what fla imports where it is installed
                delattr(target, name)
            else:
                setattr(target, name, function)


def _replacements() -> dict[str, dict[str, Any]]:
    """`module` or `module:Class` to the names in it and what stands in for them."""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.naive import naive_recurrent_kda

    delta = partial(_delta_rule, naive_recurrent_gated_delta_rule)
    kda = partial(_delta_rule, naive_recurrent_kda)
    gla = partial(_gla, naive_recurrent_gla)
    retention = partial(_retention, naive_recurrent_gla)
    layers, activations = "fla.layers.", {"silu": F.silu, "swish": F.silu}
    return {
        "fla.modules:RMSNorm": {"forward": _rms_norm},
        "fla.modules:FusedRMSNormGated": {"forward": _gated_norm},
        "fla.modules.norm.layernorm_gated:RMSNormGated": {"forward": _group_norm},
        "fla.modules:ShortConvolution": {"forward": _short_convolution},
        "fla.modules:RotaryEmbedding": {"forward": _rotary},
        "fla.modules:GatedMLP": {"forward": _swiglu},
        f"{layers}attn": {"flash_attn_func": _attention, "flash_attn_varlen_func": _packed_attention},
        f"{layers}delta_net": {"chunk_delta_rule": delta, "fused_recurrent_delta_rule": delta},
        f"{layers}gated_deltanet:GatedDeltaNet": {"_use_fused_qkv_conv": lambda *_, **__: False},
        f"{layers}gated_deltanet": {"chunk_gated_delta_rule": delta, "fused_recurrent_gated_delta_rule": delta},
        f"{layers}kda": {"chunk_kda": kda, "fused_recurrent_kda": kda},
        f"{layers}gla": {"chunk_gla": gla, "fused_recurrent_gla": gla},
        f"{layers}mamba": {"ACT2FN": activations},
        f"{layers}mamba2": {"ACT2FN": activations},
        f"{layers}multiscale_retention": {"chunk_retention": retention, "fused_recurrent_retention": retention},
    }


def _one_sequence(cu_seqlens: Tensor | None) -> None:
    """Of packed sequences, which a mask of ones makes as well, only one."""
    assert cu_seqlens is None or len(cu_seqlens) == 2, "one sequence is compared at a time"


def _rms_norm(self: Any, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, **_: Any) -> Any:
    x = x if residual is None else x + residual
    y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
    return (y, x) if prenorm else y


def _gated_norm(self: Any, x: Tensor, g: Tensor, **_: Any) -> Tensor:
    gate = g.sigmoid() if self.activation == "sigmoid" else F.silu(g)
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * gate


def _group_norm(self: Any, x: Tensor, z: Tensor) -> Tensor:
    assert not self.norm_before_gate
    groups = (x * F.silu(z)).reshape(*x.shape[:-1], -1, self.group_size)
    y: Tensor = F.rms_norm(groups, groups.shape[-1:], None, self.eps).flatten(-2) * self.weight
    return y


def _short_convolution(
    self: Any,
    x: Tensor,
    cache: Tensor | None = None,
    output_final_state: bool | None = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """x [B, T, C]; the cache [B, C, W] holds the last W inputs."""
    _one_sequence(cu_seqlens)
    W = self.kernel_size[0]
    before = x.new_zeros(len(x), x.shape[-1], W) if cache is None else cache
    inputs = torch.cat([before, x.transpose(1, 2)], dim=-1)
    y = F.conv1d(inputs[..., 1:], self.weight, self.bias, groups=x.shape[-1]).transpose(1, 2)
    return (F.silu(y) if self.activation else y), (inputs[..., -W:] if output_final_state else None)


def _rotary(
    self: Any, q: Tensor, k: Tensor, seqlen_offset: int | Tensor = 0, cu_seqlens: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    _one_sequence(cu_seqlens)
    assert not self.interleaved
    assert self.scale is None
    position = torch.arange(q.shape[1], dtype=torch.float32) + float(seqlen_offset)
    angle = torch.outer(position, self._compute_inv_freq())[:, None]  # [T, 1, K / 2]
    cos, sin = angle.cos(), angle.sin()

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return rotated(q), rotated(k)


def _swiglu(self: Any, x: Tensor, **_: Any) -> Tensor:
    assert self.hidden_act == "swish"
    y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    return y


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """q [B, T, H, K] against the last T of the S keys and before; `window_size`: how many before, -1 for all."""
    assert causal
    T, S = q.shape[1], k.shape[1]
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    mask = distance >= 0
    if window_size[0] >= 0:
        mask &= distance <= window_size[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, **options: Any) -> Tensor:
    _one_sequence(cu_seqlens_q)
    return _attention(q[None], k[None], v[None], options["causal"], options["window_size"])[0]


def _v_first(state: Tensor | None, state_v_first: bool) -> Tensor | None:
    """A state from [K, V] to [V, K], or back."""
    return state.transpose(-1, -2) if state is not None and state_v_first else state


def _delta_rule(
    naive: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """With a decay of each head (g [B, T, H]), of each key feature (g [B, T, H, K]), or none."""
    _one_sequence(cu_seqlens)
    assert use_qk_l2norm_in_kernel
    assert lower_bound is None
    assert not safe_gate
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    groups = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    beta = beta.sigmoid() if use_beta_sigmoid_in_kernel else beta
    beta = 2 * beta if allow_neg_eigval and use_beta_sigmoid_in_kernel else beta
    if g is None:
        g = torch.zeros_like(beta)
    elif use_gate_in_kernel:
        assert A_log is not None
        assert dt_bias is not None
        rate = A_log.exp()[:, None] if g.dim() == 4 else A_log.exp()
        g = -rate * F.softplus(g + dt_bias.view(g.shape[2:]))
    o, state = naive(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial_state=_v_first(initial_state, state_v_first),
        output_final_state=bool(output_final_state),
    )
    return o, _v_first(state, state_v_first)


def _gla(
    naive: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The chunked function calls the log decays g, the recurrent one gk."""
    _one_sequence(cu_seqlens)
    initial_state = _v_first(initial_state, state_v_first)
    o, state = naive(q, k, v, gk if g is None else g, initial_state, bool(output_final_state))
    return o, _v_first(state, state_v_first)


def _retention(naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """GLA with a decay that is the same for all features and all tokens, 1 - 2^(-5 - h) in head h."""
    decay = (1 - torch.exp2(-5 - torch.arange(q.shape[2], dtype=torch.float32))).log()
    return _gla(naive, q, k, v, decay[:, None].expand(q.shape), **options)
