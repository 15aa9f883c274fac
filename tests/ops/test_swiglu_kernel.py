"""SwiGLU's kernel against plain torch: outputs and gradients, rows at any stride."""

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, assert_fits_hopper, assert_same, outputs_and_gradients, randn

from archsearch_kernels.launch import recording
from archsearch_kernels.swiglu import reference, swiglu, swiglu_packed


def kernel(gate, up):
    return swiglu(gate, up, implementation="triton")


def packed_kernel(x):
    return swiglu_packed(x, implementation="triton")


@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 5, 100), (63, 257), (2, 2, 3, 40), (3, 1500)], ids=str)
def test_it_is_silu_of_the_gate_times_up(shape):
    inputs = {"gate": randn(*shape, scale=3.0), "up": randn(*shape, seed=1)}
    assert_same(kernel, reference.swiglu, inputs)
    assert_same(packed_kernel, reference.swiglu_packed, {"x": torch.cat(list(inputs.values()), -1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    inputs = {"gate": randn(9, 70, dtype=dtype), "up": randn(9, 70, seed=1, dtype=dtype)}
    assert_same(kernel, reference.swiglu, inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, whose inverse is the limit
def test_large_gates_stay_finite():
    gate = torch.tensor([-300.0, -100.0, 0.0, 100.0, 300.0], device=DEVICE)
    got = outputs_and_gradients(kernel, {"gate": gate, "up": torch.ones_like(gate)})
    assert all(g.isfinite().all() for g in got.values())
    assert torch.equal(got["output 0"], gate.relu())


def test_slices_are_read_where_they_lie():
    wide = randn(2, 5, 96)
    gate, up = wide[..., 8:40], wide[..., 48:80]
    heads = randn(5, 2, 3, 32).transpose(0, 1)  # no two strides walk this one
    columns = randn(32, 10).t().view(2, 5, 32)
    for g, u in ((gate, up), (gate[:, ::2], up[:, ::2]), (gate, columns)):
        assert torch.equal(kernel(g, u), kernel(g.contiguous(), u.contiguous()))
    per_head = wide.view(2, 5, 3, 32)[:, :, 1:]
    assert torch.equal(kernel(per_head, heads[:, :, 1:]), kernel(per_head.clone(), heads[:, :, 1:].clone()))
    assert_same(lambda x: packed_kernel(x[..., 8:40]), lambda x: reference.swiglu_packed(x[..., 8:40]), {"x": wide})
    with recording() as launches:
        kernel(gate, up)
    assert launches[0].arguments["gate"].data_ptr() == gate.data_ptr()


def test_a_gradient_of_one_number_everywhere():
    """`sum` sends back one number expanded over all rows."""
    gate, up = randn(4, 24).requires_grad_(), randn(4, 24, seed=1).requires_grad_()
    kernel(gate, up).sum().backward()
    expected = torch.autograd.grad(reference.swiglu(gate, up).sum(), (gate, up))
    torch.testing.assert_close((gate.grad, up.grad), expected)


def test_torch_accepts_the_operators():
    from archsearch_kernels.swiglu.fused import swiglu_op, swiglu_packed_op

    gate, up = randn(3, 20).requires_grad_(), randn(3, 20, seed=1).requires_grad_()
    torch.library.opcheck(swiglu_op, (gate, up))
    torch.library.opcheck(swiglu_packed_op, (randn(3, 40).requires_grad_(),))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"up is \(2, 4\); expected gate's shape \(2, 3\)"):
        swiglu(randn(2, 3), randn(2, 4))
    with pytest.raises(ValueError, match=r"up is torch\.float16"):
        swiglu(randn(2, 3), randn(2, 3).half())
    with pytest.raises(ValueError, match=r"x is \(2, 3\); expected an even last dimension"):
        swiglu_packed(randn(2, 3))
    with pytest.raises(ValueError, match="does not compute in float64"):
        kernel(randn(2, 3).double(), randn(2, 3).double())
    assert swiglu(randn(2, 3).double(), randn(2, 3).double()).dtype == torch.float64


def launches_of_a_real_size():
    with recording(dry=True) as launches:
        for columns in (96, 768, 5632, 8192):
            inputs = {"gate": randn(2, columns, dtype=torch.bfloat16), "up": randn(2, columns, dtype=torch.bfloat16)}
            outputs_and_gradients(kernel, inputs)
        outputs_and_gradients(packed_kernel, {"x": randn(2, 2 * 5632, dtype=torch.bfloat16)})
    return launches


def test_the_default_configuration_fits_hopper():
    assert_fits_hopper([x for x in launches_of_a_real_size() if x.arguments["C"] == 5632])


@pytest.mark.parametrize("rows", [pytest.param(4097, marks=ON_GPU)])
def test_real_sizes(rows):
    inputs = {
        "gate": randn(rows, 5632, dtype=torch.bfloat16),
        "up": randn(rows, 5632, seed=1, dtype=torch.bfloat16),
    }
    assert_same(kernel, reference.swiglu, inputs)
    first = outputs_and_gradients(kernel, inputs)
    for _ in range(20):
        assert all(torch.equal(first[n], g) for n, g in outputs_and_gradients(kernel, inputs).items())
