"""The public ops: dtypes, groups, and every refusal by its text."""

import pytest
import torch
from cases import leaves_of, make, plain, saving, with_grads
from conftest import DTYPES, KERNEL_DTYPES
from torch.nn.functional import linear

from lorapar_kernels import LoraMask, Projection, lora_add, lora_linear, lora_linear_group
from lorapar_kernels.testing import assert_as_accurate, assert_close

# (leading dims, K, N, r): square, odd, rank above a side, one row, nothing
SHAPES = [
    ((3, 16), 32, 32, 8),
    ((7,), 5, 9, 3),
    ((2, 1), 4, 6, 12),
    ((1,), 64, 16, 1),
    ((0,), 8, 8, 2),
]

DRAWS = 8  # judged together: eight elements alone are too few for an RMS


@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, adapter, backend, device, poisoned):
    """All dtypes; `test_fused` has everything else that an input may be."""
    if backend == "triton" and dtype not in KERNEL_DTYPES:
        pytest.skip("bf16 cannot be interpreted")
    adapter_dtype = torch.float32 if adapter == "fp32" else dtype
    draws = [one_draw(shape, dtype, adapter_dtype, device) for _ in range(DRAWS)]
    for i, name in enumerate(("y", "dX", "dA", "dB", "dbias")):
        out, exact, plain = (torch.stack([draw[k][i] for draw in draws]) for k in range(3))
        assert_as_accurate(name, out, exact, plain)


def one_draw(shape, dtype, adapter_dtype, device):
    """(y, dX, dA, dB, dbias) by the op, in float64, and by plain PyTorch."""
    x, w, a, b, bias = make(shape, dtype, device, adapter_dtype)
    bias = bias.to(adapter_dtype)
    dy = torch.randn(*x.shape[:-1], w.shape[0], dtype=dtype, device=device)

    def ours(x, a, b, bias):
        return lora_linear(x, w, a, b, 2.5, bias=bias)

    def theirs(x, a, b, bias):
        return plain(x, w.to(x.dtype), a, b, bias.to(x.dtype), 2.5)

    runs = ((ours, None), (theirs, torch.float64), (theirs, None))
    return [with_grads(f, leaves_of([x, a, b, bias], to), dy) for f, to in runs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_group_equals_its_layers_and_sums_their_dx(dtype, backend, device):
    x = torch.randn(3, 5, 8, dtype=dtype, device=device)
    parts = [make(((1,), 8, n, r), dtype, device)[1:] for n, r in ((8, 4), (6, 2), (10, 3))]
    x0, x1 = (x.clone().requires_grad_() for _ in "12")
    group = lora_linear_group(x0, [Projection(w, a, b, 1.5, bias) for w, a, b, bias in parts])
    alone = [lora_linear(x1, w, a, b, 1.5, bias=bias) for w, a, b, bias in parts]
    for one, other in zip(group, alone):
        assert_close("y", one, other)
    sum(y.square().sum() for y in group).backward()
    sum(y.square().sum() for y in alone).backward()
    assert_close("dX", x0.grad, x1.grad)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lora_add_keeps_the_dtype_of_base(base_dtype, backend, device):
    x, _, a, b, _ = make(((5,), 16, 12, 4), torch.float16, device)
    base = torch.randn(5, 12, device=device).to(base_dtype)
    y = lora_add(base, x, a, b, 1.0)
    assert y.dtype == base_dtype and y is not base
    assert torch.equal(lora_add(base, x, a, torch.zeros_like(b), 1.0), base)


def test_scale_is_a_run_time_number(backend, device):
    x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, device)
    base = linear(x, w)
    one = lora_linear(x, w, a, b, 1.0) - base
    for scale in (0.0, -2.0, 1, 64):
        assert_close("y", lora_linear(x, w, a, b, scale), base + scale * one)


def test_inputs_are_left_alone(backend, device):
    x, w, a, b, bias = make(((5,), 16, 12, 4), torch.float32, device)
    before = [t.clone() for t in (x, w, a, b, bias)]
    leaves = leaves_of([x, a, b])
    _, saved = saving(lambda x, a, b: lora_linear(x, w, a, b, 2.0, bias=bias), *leaves)
    dy = torch.ones(5, 12, device=device)
    with_grads(lambda x, a, b: lora_linear(x, w, a, b, 2.0, bias=bias), leaves, dy)
    assert all(torch.equal(t, was) for t, was in zip((x, w, a, b, bias), before))
    assert (dy == 1).all() and saved


class TestErrors:
    def args(self):
        return make(((4,), 8, 6, 2), torch.float32, "cpu")

    def test_shapes(self):
        x, w, a, b, bias = self.args()
        with pytest.raises(ValueError, match=r"x \[4, 7\] and lora_a \[2, 8\] disagree"):
            lora_linear(x[:, :7], w, a, b, 1.0)
        with pytest.raises(ValueError, match=r"lora_a \[2, 8\] and lora_b \[6, 1\] disagree"):
            lora_linear(x, w, a, b[:, :1], 1.0)
        with pytest.raises(ValueError, match=r"weight is \[5, 8\], expected \[6, 8\]"):
            lora_linear(x, w[:5], a, b, 1.0)
        with pytest.raises(ValueError, match=r"bias is \[5\], expected \[6\]"):
            lora_linear(x, w, a, b, 1.0, bias=bias[:5])
        with pytest.raises(ValueError, match=r"base is \[4, 5\], expected \[4, 6\]"):
            lora_add(torch.zeros(4, 5), x, a, b, 1.0)
        with pytest.raises(ValueError, match="no projections"):
            lora_linear_group(x, [])

    @pytest.mark.parametrize(
        "index,name", [(1, "weight"), (2, "lora_a"), (3, "lora_b"), (4, "bias")]
    )
    def test_devices(self, index, name):
        arguments = [t.to("meta") if i == index else t for i, t in enumerate(self.args())]
        with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu; move one of them"):
            lora_linear(*arguments[:4], 1.0, bias=arguments[4])

    def test_values(self):
        x, w, a, b, _ = self.args()
        with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\), got 1.0"):
            lora_linear(x, w, a, b, 1.0, dropout_p=1.0)
        with pytest.raises(ValueError, match="rank 513 is outside 1 to 512"):
            lora_linear(x, w, torch.zeros(513, 8), torch.zeros(6, 513), 1.0)
        with pytest.raises(ValueError, match="weight requires grad"):
            lora_linear(x, w.clone().requires_grad_(), a, b, 1.0)

    def test_dtypes(self):
        x, w, a, b, _ = self.args()
        with pytest.raises(TypeError, match="weight is torch.float16 and x is torch.float32"):
            lora_linear(x, w.half(), a, b, 1.0)
        with pytest.raises(TypeError, match="x must be fp16, bf16, .* got torch.int64"):
            lora_linear(x.long(), w, a, b, 1.0)

    def test_bias_dtype(self):
        x, w, a, b, bias = self.args()
        with pytest.raises(TypeError, match="bias must be of a floating dtype, got torch.int64"):
            lora_linear(x, w, a, b, 1.0, bias=bias.long())

    def test_masks(self):
        x, w, a, b, _ = self.args()
        with pytest.raises(ValueError, match=r"a is \[3, 8\], the adapter needs \[2, 8\]"):
            mask = LoraMask(torch.ones(3, 8).bool(), None)
            lora_linear(x, w, a, b, 1.0, mask=mask)
        with pytest.raises(TypeError, match="a must be a bool tensor, got torch.float32"):
            LoraMask(torch.ones(2, 8), None)
        with pytest.raises(ValueError, match=r"disagree about the rank: \{'a': 2, 'b': 3\}"):
            LoraMask(torch.ones(2, 8).bool(), torch.ones(6, 3).bool())
        with pytest.raises(ValueError, match=r"dead columns \[0\] have trainable elements"):
            LoraMask(torch.ones(2, 8).bool(), None, live=torch.tensor([False, True]))
