"""RoPE's kernel against plain torch, near and far positions, part of the features, queries and keys at once."""

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, assert_fits_hopper, assert_same, error, outputs_and_gradients, randn

from archsearch_kernels.launch import recording
from archsearch_kernels.rope import reference, rope, rope_qk


def kernel(x, **options):
    return rope(x, **options, implementation="triton")


def pair(q, k, **options):
    return rope_qk(q, k, **options, implementation="triton")


OPTIONS = {"position": 0, "theta": 10_000.0, "n_dims": 32}


@pytest.mark.parametrize(("T", "D", "n_dims"), [(1, 32, 32), (63, 32, 8), (100, 64, 64), (5, 80, 48), (7, 6, 2)])
def test_it_rotates(T, D, n_dims):
    options = OPTIONS | {"n_dims": n_dims, "position": 3}
    q, k = randn(2, T, 3, D), randn(2, T, 1, D, seed=1)
    assert_same(kernel, reference.rope, {"x": q} | options)
    assert_same(pair, reference.rope_qk, {"q": q, "k": k} | options)


def test_transformers_agree():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=64)
    at = torch.arange(9, 9 + 20, device=DEVICE)[None]
    q, k = randn(1, 20, 2, 32), randn(1, 20, 1, 32, seed=1)
    cos, sin = LlamaRotaryEmbedding(config).to(DEVICE)(q, at)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(pair(q, k, position=9, theta=10_000.0, n_dims=32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [0, 511, 8_190, 131_060, 999_990])
def test_angles_are_exact_far_out(position):
    """Against the double-precision sine of the same fp32 angle: rotating (1, 0) shows cosine and sine."""
    half, theta = 64, 10_000.0
    x = torch.zeros(1, 20, 1, 2 * half, device=DEVICE)
    x[..., :half] = 1
    frequency = theta ** (-torch.arange(half, device=DEVICE, dtype=torch.float32) / half)
    angle = torch.arange(position, position + 20, device=DEVICE, dtype=torch.float32)[:, None] * frequency
    expected = torch.cat([angle.double().cos(), angle.double().sin()], -1)
    got = kernel(x, position=position, theta=theta, n_dims=2 * half)[0, :, 0]
    assert (got.double() - expected).abs().max() < 3e-7 * (1 if position < 2**17 else 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    inputs = {"q": randn(2, 9, 2, 40, dtype=dtype), "k": randn(2, 9, 1, 40, seed=1, dtype=dtype)}
    assert_same(pair, reference.rope_qk, inputs | OPTIONS)


def test_every_sequence_may_have_its_own_start():
    x = randn(3, 5, 2, 32)
    starts = torch.tensor([7, 0, 1000], device=DEVICE)
    expected = torch.cat([kernel(x[b : b + 1], **OPTIONS | {"position": int(starts[b])}) for b in range(3)])
    for given, numbers in ((starts, expected), (starts.int(), expected)):
        torch.testing.assert_close(kernel(x, **OPTIONS | {"position": given}), numbers, rtol=1e-6, atol=1e-6)
    one, same = (kernel(x, **OPTIONS | {"position": at}) for at in (starts[2], 1000))
    torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-6)
    assert_same(kernel, reference.rope, {"x": x} | OPTIONS | {"position": starts})


def test_steps_are_the_whole():
    x = randn(2, 6, 2, 32)
    whole = kernel(x, **OPTIONS | {"position": 11})
    steps = [kernel(x[:, t : t + 1], **OPTIONS | {"position": 11 + t}) for t in range(6)]
    assert torch.equal(torch.cat(steps, 1), whole)


def test_slices_are_read_where_they_lie():
    wide = randn(2, 5, 200)
    q, k = (wide[..., i : i + 64].unflatten(-1, (2, 32)) for i in (0, 96))
    for a, b in zip(pair(q, k, **OPTIONS), pair(q.contiguous(), k.contiguous(), **OPTIONS), strict=True):
        assert torch.equal(a, b)
    swapped = randn(2, 3, 5, 32).transpose(1, 2)  # [B, T, H, D] that lies as [B, H, T, D]
    assert torch.equal(kernel(swapped, **OPTIONS), kernel(swapped.contiguous(), **OPTIONS))
    with recording() as launches:
        pair(q, swapped[:, :, :2], **OPTIONS)
    assert launches[0].arguments["q"].data_ptr() == q.data_ptr()
    assert_same(
        lambda wide: pair(wide[..., :64].unflatten(-1, (2, 32)), wide[..., 64:96].unflatten(-1, (1, 32)), **OPTIONS),
        lambda wide: reference.rope_qk(
            wide[..., :64].unflatten(-1, (2, 32)), wide[..., 64:96].unflatten(-1, (1, 32)), **OPTIONS
        ),
        {"wide": wide},
    )


def test_one_of_the_two_may_go_unused():
    q, k = randn(1, 5, 2, 32).requires_grad_(), randn(1, 5, 1, 32, seed=1).requires_grad_()
    pair(q, k, **OPTIONS)[1].sum().backward()
    assert q.grad is None or not q.grad.any()
    expected = torch.autograd.grad(reference.rope(k, **OPTIONS).sum(), k)[0]
    torch.testing.assert_close(k.grad, expected, rtol=1e-4, atol=1e-5)


def test_torch_accepts_the_operators():
    from archsearch_kernels.rope.rotate import rope_op, rope_qk_op

    q, k = randn(1, 3, 2, 16).requires_grad_(), randn(1, 3, 1, 16, seed=1).requires_grad_()
    torch.library.opcheck(rope_op, (q, 5, None, 1e4, 16, False))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(rope_qk_op, (q, k, 5, None, 1e4, 16, False), test_utils=tests)


def test_bad_input_is_named():
    x = randn(2, 3, 1, 8)
    with pytest.raises(ValueError, match=r"x is \(3, 1, 8\); expected \[B, T, H, D\]"):
        rope(x[0], 0, 1e4, 8)
    with pytest.raises(ValueError, match="n_dims is 7; expected an even number up to the 8 features of x"):
        rope(x, 0, 1e4, 7)
    with pytest.raises(ValueError, match=r"k is \(2, 4, 1, 8\) on \S+; expected \(2, 3, heads, 8\)"):
        rope_qk(x, randn(2, 4, 1, 8), 0, 1e4, 8)
    with pytest.raises(ValueError, match=r"position is torch.int64 \(3,\) on \S+; expected integers \(2,\)"):
        rope(x, torch.zeros(3, dtype=torch.long, device=DEVICE), 1e4, 8)
    with pytest.raises(ValueError, match="does not compute in float64"):
        kernel(x.double(), position=0, theta=1e4, n_dims=8)
    assert torch.equal(kernel(x, position=0, theta=1e4, n_dims=0), x)


def launches_of_real_heads():
    with recording(dry=True) as launches:
        for T, heads, D, n_dims in ((16, (16, 4), 128, 128), (16, (16, 2), 256, 64)):
            q, k = (randn(1, T, h, D, dtype=torch.bfloat16) for h in heads)
            inputs = {"q": q, "k": k} | OPTIONS | {"n_dims": n_dims}
            outputs_and_gradients(pair, inputs)
    return launches


def test_the_default_configuration_fits_hopper():
    assert_fits_hopper([x for x in launches_of_real_heads() if not x.arguments["BACK"]])


@pytest.mark.parametrize(("D", "n_dims"), [pytest.param(*p, marks=ON_GPU) for p in ((128, 128), (256, 64), (80, 80))])
def test_real_sizes(D, n_dims):
    inputs = {"q": randn(2, 4097, 8, D, dtype=torch.bfloat16), "k": randn(2, 4097, 2, D, seed=1, dtype=torch.bfloat16)}
    options = OPTIONS | {"n_dims": n_dims, "position": 120_000, "theta": 500_000.0}
    assert_same(pair, reference.rope_qk, inputs | options)
    q, k = pair(**{n: x.float() for n, x in inputs.items()}, **options)
    expected = reference.rope_qk(**{n: x.float() for n, x in inputs.items()}, **options)
    assert max(error(q, expected[0]), error(k, expected[1])) < 1e-5
    once = outputs_and_gradients(pair, inputs | options)
    for _ in range(20):
        assert all(torch.equal(once[n], g) for n, g in outputs_and_gradients(pair, inputs | options).items())
