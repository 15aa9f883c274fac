"""Channel mixers beyond their defaults: formulas, routing, balance, and experts that only see their own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from archsearch.architecture import Block, ModelSpec, parse_ffn
from archsearch.contract import Site
from archsearch.mixers.none import NoMixer
from archsearch.model import build_model, width_multipliers
from archsearch.modules.moe import MoE
from archsearch_kernels.moe import grouped_mm


def moe(seed: int = 0, d_model: int = 32, **options: Any) -> MoE:
    torch.manual_seed(seed)
    return MoE(d_model, **{"d_hidden": 16, "n_experts": 6, "top_k": 2, **options})


def one_by_one(module: MoE, x: torch.Tensor) -> torch.Tensor:
    """Every token by itself, straight from the formula."""
    out = torch.zeros_like(x)
    for b, t in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])).tolist():
        token = x[b, t]
        logits = module.router.weight @ token
        scores = logits.softmax(0) if module.routing == "softmax" else logits.sigmoid()
        rank = scores if module.routing == "softmax" else scores + module.bias
        chosen = rank.argsort(descending=True)[: module.top_k]
        weights = scores[chosen]
        if module.normalize and module.top_k > 1:
            weights = weights / (weights.sum() + (module.norm_eps or 0.0))
        for weight, e in zip(weights, chosen, strict=True):
            h = F.silu(module.gate_proj[e] @ token) * (module.up_proj[e] @ token)
            out[b, t] += module.route_scale * weight * (module.down_proj[e] @ h)
    return out if module.shared is None else out + module.shared(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d_model", [32, 30])  # grouped matrix products want rows of 16 bytes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 6, "n_shared": 2},
        {"routing": "sigmoid", "route_scale": 2.5, "n_shared": 1},
        {"routing": "sigmoid", "top_k": 1},
        {"top_k": 3, "normalize": False},
        {"routing": "sigmoid", "route_scale": 2.5, "normalize": False},
        {"routing": "sigmoid", "route_scale": 2.5, "norm_eps": 0.5},
        {"norm_eps": 0.5},
        {"norm_eps": 0.5, "top_k": 1},
        {"n_experts": 50, "top_k": 3},  # most experts get nothing
    ],
    ids=str,
)
def test_moe_is_its_formula(options: Any, d_model: int, dtype: torch.dtype) -> None:
    module = moe(d_model=d_model, **options).to(dtype)
    if module.routing == "sigmoid":
        module.bias.normal_()
    x = torch.randn(2, 9, d_model, dtype=dtype, requires_grad=True)
    results = []
    for form in (module, lambda x: one_by_one(module, x)):
        y = form(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        grads = torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])
        results.append([y, *grads])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_one_overloaded_expert_drops_no_token() -> None:
    module = moe(top_k=1, routing="sigmoid")
    module.bias[3] = 1e6
    x = torch.randn(4, 100, 32)
    torch.testing.assert_close(module(x), one_by_one(module, x), rtol=1e-5, atol=1e-5)
    assert module.load.tolist() == [0, 0, 0, 400, 0, 0]


def test_experts_fed_by_hand() -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 16, 8)
    expected = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])
    counts = torch.tensor([2, 0, 3])
    torch.testing.assert_close(grouped_mm(x, weight, counts), expected)
    torch.testing.assert_close(grouped_mm(x.double(), weight.double(), counts), expected.double(), rtol=1e-5, atol=1e-5)


# --- losses and balance ---


def test_auxiliary_losses_are_those_of_the_papers() -> None:
    module = moe(aux_loss=0.5, z_loss=0.25)
    x = torch.randn(2, 40, 32)
    module(x)
    logits = (x @ module.router.weight.T).flatten(0, 1)
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(2).indices, 6).sum((0, 1)) / 160
    balance = 6 * (chosen * probabilities.mean(0)).sum()
    z = logits.exp().sum(-1).log().square().mean()
    assert module.router_loss is not None
    torch.testing.assert_close(module.router_loss, 0.5 * balance + 0.25 * z)
    (gradient,) = torch.autograd.grad(module.router_loss, [module.router.weight])
    assert gradient.abs().max() > 0


def test_perfect_balance_costs_the_coefficient() -> None:
    module = moe(aux_loss=0.01, z_loss=0.0, n_experts=4, top_k=4)
    module(torch.randn(2, 8, 32))
    assert module.router_loss is not None
    assert module.router_loss.item() == pytest.approx(0.01)


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_evaluation_leaves_no_trace(routing: str) -> None:
    module = moe(routing=routing)
    x = torch.randn(2, 8, 32)
    module(x)
    assert (module.router_loss is not None) == (routing == "softmax")
    load = module.load.clone() if routing == "sigmoid" else None
    module.eval()(x)
    assert module.router_loss is None
    if load is not None:
        assert torch.equal(module.load, load)


def test_bias_follows_the_sign_of_what_is_missing() -> None:
    module = moe(routing="sigmoid", bias_rate=0.5, n_experts=3, top_k=1)
    module.load = torch.tensor([10, 4, 4])
    module.update_bias()
    assert module.bias.tolist() == [-0.5, 0.5, 0.5]
    assert module.load.tolist() == [0, 0, 0]
    module.update_bias()  # nothing was routed since
    assert module.bias.tolist() == [-0.5, 0.5, 0.5]
    module.load = torch.tensor([6, 6, 6])
    module.update_bias()
    assert module.bias.tolist() == [-0.5, 0.5, 0.5]


def test_bias_evens_out_a_lopsided_router() -> None:
    module = moe(routing="sigmoid", bias_rate=0.01, n_experts=4, top_k=1)
    with torch.no_grad():
        module.router.weight[0, 0] = 2.0
    x = torch.randn(1, 256, 32)
    x[..., 0] = 1.0  # expert 0 likes every token
    module(x)
    assert module.load.max() >= 200
    for _ in range(200):
        module.update_bias()
        module(x)
    assert module.load.max() <= 1.25 * 256 / 4


def test_the_bias_chooses_and_does_not_weigh() -> None:
    module = moe(routing="sigmoid", top_k=6)
    x = torch.randn(1, 5, 32)
    before = module(x)
    module.bias.uniform_(-5, 5)  # all experts are chosen whatever it says
    torch.testing.assert_close(module(x), before)


def test_bias_is_saved_and_load_is_not() -> None:
    names = moe(routing="sigmoid").state_dict().keys()
    assert "bias" in names
    assert "load" not in names
    assert "bias" not in moe().state_dict()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_the_router_learns_from_the_output(routing: str, top_k: int) -> None:
    """Also with one expert a token, where renormalised weights would all be 1."""
    module = moe(routing=routing, top_k=top_k)
    module(torch.randn(2, 8, 32)).square().sum().backward()
    assert module.router.weight.grad is not None
    assert module.router.weight.grad.abs().max() > 0


def test_autocast_routes_in_float32() -> None:
    """The same choice as without autocast, although the experts compute in bfloat16."""
    module = moe(n_experts=64, d_hidden=16, routing="sigmoid")
    x = torch.randn(2, 200, 32)
    module(x)
    load = module.load.clone()
    module.load.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(module.load, load)


# --- specs ---


def test_active_parameters_and_flops() -> None:
    site = Site(64)
    spec = parse_ffn({"kind": "moe", "n_experts": 8, "top_k": 2, "n_shared": 1, "expand": "1/2"})
    expert, router = 3 * 64 * 32, 64 * 8
    assert spec.num_params(site) == 9 * expert + router
    assert spec.active_params(site) == 3 * expert + router
    assert spec.flops(site, 10) == 20 * (3 * expert + router)


def test_more_choices_than_experts_are_refused() -> None:
    spec = parse_ffn({"kind": "moe", "n_experts": 4, "top_k": 5})
    with pytest.raises(ValueError, match="top_k 5 is more than n_experts 4; write at most 4"):
        spec.check(Site(64))


def test_mlp_formulas() -> None:
    x = torch.randn(2, 5, 64)
    for activation, f in (("gelu", F.gelu), ("relu2", lambda h: h.clamp(min=0) ** 2)):
        module: Any = parse_ffn({"kind": "mlp", "activation": activation}).call(Site(64)).build()
        expected = f(x @ module.up_proj.weight.T) @ module.down_proj.weight.T
        torch.testing.assert_close(module(x), expected)


def test_experts_are_initialised_and_trained_like_dense_layers() -> None:
    """Variance 1 / fan-in, not the one that a three-dimensional tensor suggests; learning rates by width."""
    spec = ModelSpec(128, 16, 50, (Block(NoMixer(), parse_ffn({"kind": "moe", "n_shared": 1})),))
    ffn: Any = build_model(spec).blocks[0].ffn
    rates = width_multipliers(spec)
    for name, parameter in ffn.named_parameters():
        fan_in = {"down_proj": 176, "shared.down_proj.weight": 176}.get(name, 128)
        assert parameter.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)
        assert rates[f"blocks.0.ffn.{name}"] == 2.0
