"""The selective scan's Triton kernels against the loop over tokens: outputs and gradients."""

from functools import partial

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, assert_fits_hopper, assert_same, outputs_and_gradients, randn

pytest.importorskip("triton")

from archsearch_kernels.launch import forcing, recording
from archsearch_kernels.selective_scan import scan, selective_scan, selective_scan_recurrent, selective_scan_step

run = partial(selective_scan, implementation="triton")
step = partial(selective_scan_step, implementation="triton")


def inputs(T, B=1, D=20, N=16, dtype=torch.float32, rate=1.0, state=True):
    made = {
        "x": randn(B, T, D, seed=1, dtype=dtype),
        "dt": 0.1 * randn(B, T, D, seed=2).abs(),
        "a": -rate * randn(D, N, seed=3).abs(),
        "b": randn(B, T, N, seed=4, dtype=dtype),
        "c": randn(B, T, N, seed=5, dtype=dtype),
    }
    return {**made, "initial_state": randn(B, N, D, seed=6)} if state else made


def numbered(T, *starts, B=2):
    """Documents that begin at `starts`, numbered with gaps."""
    at = torch.arange(T)[:, None]
    return (3 * (at >= torch.tensor(starts)).sum(1)).expand(B, T).contiguous().to(DEVICE)


@pytest.fixture
def in_parts(monkeypatch):
    """Sequences of 65 tokens and more are cut into three parts and more, of 32 tokens and more."""
    monkeypatch.setattr(scan, "SHORTEST", 16)


@pytest.mark.parametrize("T", [1, 63, 130])
def test_outputs_and_gradients(T):
    assert_same(run, selective_scan_recurrent, inputs(T))


@pytest.mark.parametrize(("D", "N"), [(1, 1), (33, 5), (20, 128)])
def test_any_size(D, N):
    assert_same(run, selective_scan_recurrent, inputs(40, B=2, D=D, N=N))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("T", [65, 129])
def test_parts_find_what_those_before_left(T, state, in_parts):
    with recording() as launches:
        assert_same(run, selective_scan_recurrent, inputs(T, B=2, state=state))
    shapes = [tuple(x.arguments["found"].shape) for x in launches if x.kernel.name == "selective_scan_borders"]
    assert shapes == [(2, 3, 16, 20)] * 2 if T == 65 else [(2, 5, 16, 20)] * 2


@pytest.mark.parametrize("starts", [(32,), (64, 65), (1, 30, 33, 96), (40, 50)])
def test_documents_end_anywhere_in_parts(starts, in_parts):
    assert_same(run, selective_scan_recurrent, {**inputs(100, B=2), "seq_idx": numbered(100, *starts)})


@pytest.mark.parametrize("N", [5, 64])
def test_parts_of_any_size(N, in_parts):
    assert_same(run, selective_scan_recurrent, inputs(70, D=33, N=N, dtype=torch.bfloat16))


@pytest.mark.parametrize("B", [1, 2, 64])
@pytest.mark.parametrize("T", [1, 127, 128, 1000, 8192])
@pytest.mark.parametrize("D", [1, 1024, 4096])
def test_parts_fill_the_card_and_no_more(B, T, D):
    parts, length = scan.cut(B, T, D)
    programs = B * -(-D // scan.CHANNELS)
    assert length % scan.CHUNK == 0
    assert (parts - 1) * length < T <= parts * length
    assert parts == 1 or length >= scan.SHORTEST
    assert parts == 1 or (parts - 1) * programs < scan.PROGRAMS
    if length >= 2 * scan.SHORTEST:  # not for want of tokens
        assert 2 * parts * programs >= scan.PROGRAMS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    assert_same(run, selective_scan_recurrent, inputs(70, dtype=dtype, state=False))


@pytest.mark.parametrize("rate", [0.0, 30.0, 1e4])
def test_any_decay(rate, in_parts):
    """Errors relative to the largest value; what is forgotten at once has a gradient of 0."""
    given = inputs(70, rate=rate)
    got = outputs_and_gradients(run, given)
    expected = outputs_and_gradients(selective_scan_recurrent, {n: x.double() for n, x in given.items()})
    for name, x in expected.items():
        assert (got[name].double() - x).abs().max() <= 1e-5 * x.abs().max().clamp(min=1e-6), name


def test_packed_documents():
    starts = (1, 30, 63, 65, 100)
    given = {**inputs(110, B=2), "seq_idx": numbered(110, *starts)}
    assert_same(run, selective_scan_recurrent, given)
    row = {n: x[:1] if n != "a" else x for n, x in given.items() if n != "seq_idx"}
    packed, state = run(**row, cu_seqlens=torch.tensor([0, *starts, 110], dtype=torch.int32, device=DEVICE))
    both, states = run(**given)
    assert torch.equal(packed, both[:1])
    assert torch.equal(state, states[:1])


def test_slices_of_projections_are_read_where_they_lie():
    def call(form, x, p, dt, a):
        b, c = p.split([16, 16], dim=-1)
        return form(x.chunk(2, dim=-1)[0], dt, a, b, c)

    given = {"x": randn(2, 30, 80, seed=1), "p": randn(2, 30, 32, seed=2), "dt": randn(2, 30, 40, seed=3).abs()}
    given["a"] = -randn(40, 16, seed=4).abs()
    assert_same(partial(call, run), partial(call, selective_scan_recurrent), given)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_go_unused(used):
    given = inputs(30)
    if used == 1:  # the final state does not depend on c
        c = given.pop("c")
        assert_same(lambda **x: run(c=c, **x)[1], lambda **x: selective_scan(c=c.double(), **x)[1], given)
    else:
        assert_same(lambda **x: run(**x)[0], lambda **x: selective_scan(**x)[0], given)


def test_runs_are_equal_bit_by_bit(in_parts):
    given = inputs(70, dtype=torch.bfloat16)
    first, second = outputs_and_gradients(run, given), outputs_and_gradients(run, given)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_without_gradients_no_states_are_kept():
    given = inputs(70)
    with recording() as launches, torch.no_grad():
        run(**given)
    assert launches[0].arguments["found"] is None
    with recording() as launches:
        outputs_and_gradients(run, given)
    assert launches[0].arguments["found"].shape == (1, 3, 16, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_carry_the_state(dtype):
    given = inputs(20, B=2, N=5, dtype=dtype)
    state = given.pop("initial_state")
    expected, final = selective_scan_recurrent(**given, initial_state=state)
    a, kept = given.pop("a"), state.clone()
    rows = []
    with torch.no_grad():
        for t in range(20):
            now = {n: x[:, t] for n, x in given.items()}
            _, other = step(**now, a=a, state=kept)
            y, same = step(**now, a=a, state=kept, inplace=True)
            assert same is kept
            assert torch.equal(other, kept)
            rows.append(y)
    torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)
    torch.testing.assert_close(kept, final, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*")
def test_torch_accepts_the_operators():
    given = inputs(20, B=1, D=8, N=4)
    given = {n: x.requires_grad_() for n, x in given.items()}
    order = (*(given[n] for n in ("x", "dt", "a", "b", "c", "initial_state")), None, True)
    run(**inputs(5))  # registers them
    torch.library.opcheck(torch.ops.archsearch.selective_scan.default, order)
    with torch.no_grad():
        step(**{n: x[:, 0] if n not in ("a", "initial_state") else x for n, x in given.items() if n != "initial_state"},
             state=given["initial_state"])  # fmt: skip
    token = [given[n].detach()[:, 0] if n != "a" else given[n].detach() for n in ("x", "dt", "a", "b", "c")]
    state = given["initial_state"].detach()
    torch.library.opcheck(torch.ops.archsearch.selective_scan_step.default, (*token, state))
    torch.library.opcheck(torch.ops.archsearch.selective_scan_step_inplace.default, (*token, state.clone()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5)}, r"x has shape \(2, 5\); expected \[B, T, D\]"),
        ({"dt": (2, 5, 3)}, r"dt has shape \(2, 5, 3\), x \(2, 5, 8\)"),
        ({"a": (4, 8)}, r"a has shape \(4, 8\); expected \(8, N\)"),
        ({"c": (2, 5, 3)}, r"c has shape \(2, 5, 3\); expected \(2, 5, 4\)"),
        ({"initial_state": (2, 8, 4)}, r"initial_state has shape \(2, 8, 4\); expected \(2, 4, 8\)"),
        ({"seq_idx": (2, 5)}, r"seq_idx is torch.float32 \(2, 5\); expected integers"),
        ({"cu_seqlens": (2,)}, "cu_seqlens goes with one row"),
    ],
)
def test_bad_input_is_named(change, message):
    shapes = {"x": (2, 5, 8), "dt": (2, 5, 8), "a": (8, 4), "b": (2, 5, 4), "c": (2, 5, 4), **change}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{n: randn(*shape) for n, shape in shapes.items()})


def test_what_the_kernel_does_not_take():
    with pytest.raises(ValueError, match="130 states a channel are more than 128"):
        run(**inputs(5, N=130))
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        run(**inputs(5, dtype=torch.float64))


@pytest.mark.parametrize("N", [16, 64])
def test_launches_fit_hopper(N, in_parts):
    with recording(dry=True) as launches:
        given = inputs(65, B=1, D=32, N=N, dtype=torch.bfloat16)
        outputs_and_gradients(run, given)
        with torch.no_grad():
            step(**{n: x if n == "a" else x[:, 0] for n, x in given.items() if n != "initial_state"},
                 state=given["initial_state"])  # fmt: skip
    assert len({x.kernel.name for x in launches}) == 5
    assert_fits_hopper(launches)


@pytest.mark.parametrize(("T", "N"), [(4099, 16), (2048, 64)])
class TestOnTheGPU:
    pytestmark = ON_GPU

    def test_real_sizes(self, T, N):
        given = inputs(T, D=1024, N=N, dtype=torch.bfloat16)
        assert_same(run, selective_scan, given)
        first = outputs_and_gradients(run, given)
        for _ in range(20):
            again = outputs_and_gradients(run, given)
            assert all(torch.equal(first[n], again[n]) for n in first)
        with recording() as launches:
            outputs_and_gradients(run, given)
        for launch in {x.kernel.name: x for x in launches}.values():
            for config in launch.kernel.configs(launch.arguments):
                with forcing(launch.kernel.name, config):
                    assert_same(run, selective_scan, given)
