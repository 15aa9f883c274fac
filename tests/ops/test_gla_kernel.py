"""Gated linear attention's Triton kernels against the reference: outputs and gradients."""

from functools import partial

import pytest
import torch
from kernel_checks import DEVICE, LENGTHS, assert_fits_hopper, assert_same, outputs_and_gradients, randn
from vector_gates import GATES, assert_every_configuration_is_right, assert_exact, numbered, strong

pytest.importorskip("triton")

from archsearch_kernels.gla import gla, gla_recurrent, gla_step
from archsearch_kernels.launch import recording

run = partial(gla, implementation="triton")
step = partial(gla_step, implementation="triton")
ARGUMENTS = ["q", "k", "v", "g"]


def inputs(T, B=1, H=1, K=32, V=32, dtype=torch.float32, gate=0.3, state=True):
    shape = (B, T, H, K)
    made = {
        "q": randn(*shape, seed=1, dtype=dtype),
        "k": randn(*shape, seed=2, dtype=dtype),
        "v": randn(B, T, H, V, seed=3, dtype=dtype),
        "g": -gate * randn(*shape, seed=4).abs(),
    }
    return {**made, "initial_state": randn(B, H, K, V, seed=5)} if state else made


@pytest.mark.parametrize("T", LENGTHS)
def test_outputs_and_gradients(T):
    assert_same(run, gla_recurrent, inputs(T, H=2))


@pytest.mark.parametrize(("K", "V"), [(16, 64), (80, 20), (48, 96), (130, 16)])
def test_any_size_of_head(K, V):
    assert_same(run, gla_recurrent, inputs(70, K=K, V=V))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow_gate", [False, True])
def test_half_precision(dtype, narrow_gate):
    given = inputs(100, K=64, V=64, dtype=dtype, state=False)
    if narrow_gate:
        given["g"] = given["g"].to(dtype)
    assert_same(run, gla_recurrent, given)


@pytest.mark.parametrize("gate", GATES)
def test_strong_decays_are_exact(gate):
    given = inputs(130, K=32, V=32)
    assert_exact(run, gla_recurrent, {**given, "g": strong(gate, given["g"])})


@pytest.mark.parametrize("gate", [1.5, 3.0, 6.0, 12.0, 25.0])
def test_blocks_are_halved_as_often_as_decays_are_strong(gate):
    """From all of a chunk as one block to neighbours alone."""
    assert_same(run, gla_recurrent, inputs(64, K=16, V=16, dtype=torch.bfloat16, gate=gate, state=False))


def test_infinite_decays_forget():
    given = inputs(100, state=False)
    given["g"][:, 40] = float("-inf")
    found = outputs_and_gradients(run, given)
    assert all(x.isfinite().all() for x in found.values())
    parts = [gla_recurrent(**{n: x[:, s] for n, x in given.items()})[0] for s in (slice(40), slice(40, 100))]
    torch.testing.assert_close(found["output 0"], torch.cat(parts, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("starts", [(1,), (64, 128), (30, 63, 65, 100, 101)])
def test_packed_documents(starts):
    given = {**inputs(140, B=2), "seq_idx": numbered(140, *starts, B=2)}
    assert_same(run, gla_recurrent, given)
    lengths = torch.tensor([0, *starts, 140], dtype=torch.int32, device=DEVICE)
    row = {n: x[:1] for n, x in given.items() if n != "seq_idx"}
    packed, state = run(**row, cu_seqlens=lengths)
    both, states = run(**given)
    assert torch.equal(packed, both[:1])
    assert torch.equal(state, states[:1])


def test_scale_and_views():
    """q, k and v as slices of one projection, gates transposed."""

    def call(form, x, g):
        q, k, v = (z.unflatten(-1, (2, -1)) for z in x.split([64, 64, 32], dim=-1))
        assert not any(z.is_contiguous() for z in (q, k, v))
        return form(q, k, v, g.permute(0, 2, 3, 1), scale=0.5)

    given = {"x": randn(2, 70, 160, seed=1), "g": -randn(2, 32, 70, 2, seed=2).abs()}
    assert_same(partial(call, run), partial(call, gla), given)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_go_unused(used):
    given = inputs(70)
    if used == 1:  # the final state does not depend on q
        q = given.pop("q")
        assert_same(lambda **x: run(q, **x)[1], lambda **x: gla(q.double(), **x)[1], given)
    else:
        assert_same(lambda **x: run(**x)[0], lambda **x: gla(**x)[0], given)


def test_runs_are_equal_bit_by_bit():
    given = inputs(130, K=64, V=64, dtype=torch.bfloat16)
    first, second = outputs_and_gradients(run, given), outputs_and_gradients(run, given)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(("K", "V"), [(32, 32), (80, 20)])
def test_a_step_is_the_next_token(K, V):
    given = inputs(3, B=2, H=2, K=K, V=V)
    state = given.pop("initial_state")
    o, final = gla_recurrent(**given, initial_state=state)
    kept = state.clone()
    for t in range(3):
        token = {n: x[:, t] for n, x in given.items()}
        row, new = step(**token, state=state)
        assert new is not state
        row_again, same = step(**token, state=kept, inplace=True)
        assert same is kept
        assert torch.equal(row, row_again)
        assert torch.equal(new, kept)
        torch.testing.assert_close(row, o[:, t], rtol=1e-4, atol=1e-5)
        state = new
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_the_reference_steps_in_place():
    given = inputs(1, B=2)
    state = given.pop("initial_state")
    token = {n: x[:, 0] for n, x in given.items()}
    row, new = gla_step(**token, state=state, implementation="reference")
    assert not torch.equal(new, state)
    same_row, same = gla_step(**token, state=state, inplace=True, implementation="reference")
    assert same is state
    assert torch.equal(same, new)
    assert torch.equal(same_row, row)


def test_operators_keep_torchs_rules():
    from archsearch_kernels.gla.chunk import gla_forward
    from archsearch_kernels.gla.step import step as step_op
    from archsearch_kernels.gla.step import step_inplace

    given = inputs(65, K=16, V=16)
    operands = [given[n].requires_grad_() for n in ARGUMENTS]
    torch.library.opcheck(gla_forward, (*operands, 0.25, given["initial_state"].requires_grad_(), numbered(65, 30)))
    token = [x[:, 0].detach().contiguous() for x in operands]
    for op in (step_op, step_inplace):
        torch.library.opcheck(op, (*token, randn(1, 1, 16, 16), 0.25))


def test_another_library_agrees():
    naive = pytest.importorskip("fla.ops.gla.naive")
    given = inputs(100, B=2, H=2, K=32, V=48)
    o, state = naive.naive_recurrent_gla(
        *(given[n] for n in ("q", "k", "v")), given["g"], initial_state=given["initial_state"], output_final_state=True
    )
    ours, final = run(**given)
    torch.testing.assert_close(ours, o, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(final, state, rtol=2e-3, atol=2e-3)


def test_messages():
    given = inputs(10)
    for name, wrong, message in (
        ("q", given["q"][0], r"gla: q is \(10, 1, 32\); expected \[B, T, H, K\]"),
        ("k", given["k"][..., :8], r"gla: k is \(1, 10, 1, 8\); expected \[B, T, H, K\] = \(1, 10, 1, 32\)"),
        ("g", given["g"][..., 0], r"gla: g is \(1, 10, 1\)"),
        ("initial_state", given["initial_state"][..., :4], r"gla: initial_state is \(1, 1, 32, 4\)"),
        ("seq_idx", numbered(9, 3), r"gla: seq_idx is \(1, 9\)"),
    ):
        for implementation in ("triton", "reference"):
            with pytest.raises(ValueError, match=message):
                gla(**{**given, name: wrong}, implementation=implementation)
    with pytest.raises(ValueError, match="seq_idx and cu_seqlens say the same"):
        run(**given, seq_idx=numbered(10, 3), cu_seqlens=torch.tensor([0, 10], device=DEVICE))
    with pytest.raises(ValueError, match=r"gla_step: state is \(1, 1, 32, 4\)"):
        step(*(given[n][:, 0] for n in ARGUMENTS), given["initial_state"][..., :4])
    with pytest.raises(ValueError, match="K = 257; it takes 16 to 256"):
        run(**inputs(2, K=257))
    with pytest.raises(ValueError, match="a step has no gradient"):
        step(*(given[n][:, 0].requires_grad_() for n in ARGUMENTS), given["initial_state"])
    with pytest.raises(ValueError, match=r"torch\.float64"):
        run(*(given[n].double() for n in ARGUMENTS))


def test_kernels_fit_hopper():
    given = inputs(65, K=128, V=128, dtype=torch.bfloat16)
    given["g"] = given["g"].bfloat16()
    with recording(dry=True) as launches:
        outputs_and_gradients(run, given)
        step(**{n: x[:, 0] for n, x in given.items() if n != "initial_state"}, state=given["initial_state"])
    assert len({x.kernel.name for x in launches}) == 6
    assert_fits_hopper(launches)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(("T", "D", "gate"), [(4099, 128, 0.1), (4096, 64, 20.0), (2049, 256, 1.0)])
def test_real_sizes(T, D, gate):
    given = inputs(T, B=2, H=8, K=D, V=D, dtype=torch.bfloat16, gate=gate)
    assert_same(run, gla, given)
    first = outputs_and_gradients(run, given)
    for _ in range(20):
        again = outputs_and_gradients(run, given)
        assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_configuration_is_right(dtype):
    for D in (64, 128):
        assert_every_configuration_is_right(run, gla, inputs(260, B=1, H=2, K=D, V=D, dtype=dtype))
