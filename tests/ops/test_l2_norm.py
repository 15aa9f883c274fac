"""Unit vectors: the kernel of RMSNorm with another weight, against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import ON_GPU, assert_same, error, outputs_and_gradients, randn

from archsearch_kernels import lasting
from archsearch_kernels.rms_norm import l2_norm, reference

pytest.importorskip("triton")


def kernel(**inputs):
    return l2_norm(**inputs, implementation="triton")


@pytest.mark.parametrize("shape", [(1, 8), (63, 24), (2, 5, 3, 100)], ids=str)
def test_it_is_the_norm(shape):
    assert_same(kernel, reference.l2_norm, {"x": 5 * randn(*shape)})


def test_vectors_have_length_one_and_zeros_stay():
    x = torch.cat((randn(4, 32), torch.zeros_like(randn(1, 32))))
    for implementation in ("triton", "reference"):
        y = l2_norm(x, implementation=implementation)
        assert error(y[:4], F.normalize(x[:4], dim=-1)) < 1e-5
        assert torch.equal(y[4], x[4])


def test_short_vectors_are_not_blown_up():
    x = 1e-4 * F.normalize(randn(3, 24), dim=-1)
    assert_same(kernel, reference.l2_norm, {"x": x})
    assert l2_norm(x, implementation="triton").norm(dim=-1).max() < 0.2, "|x| is far below the root of eps"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    x = randn(9, 4, 64, dtype=dtype)
    assert_same(kernel, reference.l2_norm, {"x": x})
    assert kernel(x=x).dtype == dtype
    assert kernel(x=x, dtype=torch.float32).dtype == torch.float32
    assert error(kernel(x=x, dtype=torch.float32), reference.l2_norm(x.double())) < 1e-5


def test_slices_of_a_projection():
    """As mixers have them: heads of the first columns of wider rows, which get no gradient for the others."""
    x = randn(2, 7, 100)

    def of_slice(x, norm):
        return norm(x[..., 4:68].unflatten(-1, (2, 32)))

    found = outputs_and_gradients(of_slice, {"x": x, "norm": lambda x: kernel(x=x)})
    expected = outputs_and_gradients(of_slice, {"x": x, "norm": reference.l2_norm})
    for name, value in expected.items():
        assert error(found[name], value) < 1e-5, name


def test_it_is_traced_with_nothing_kept(monkeypatch):
    monkeypatch.setattr(lasting, "_kept", {})
    traced = torch.compile(kernel, backend="eager", fullgraph=True)
    x = randn(5, 24)
    assert torch.equal(traced(x=x), kernel(x=x))


def test_other_dtypes_are_refused():
    with pytest.raises(
        ValueError, match="l2_norm: the Triton kernel was asked for, but it does not compute in float64"
    ):
        l2_norm(randn(2, 8).double(), implementation="triton")


class TestOnTheGPU:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("shape", [(2, 8192, 16, 128), (2, 1117, 6, 64)], ids=str)
    def test_real_sizes(self, shape):
        assert_same(kernel, reference.l2_norm, {"x": randn(*shape, dtype=torch.bfloat16)})
