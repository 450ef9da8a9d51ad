"""The public ops against plain PyTorch in float64, under the one tolerance rule."""

import pytest
import torch
from conftest import DTYPES
from torch.nn.functional import linear

from lorapar_kernels import (
    ImportanceSums,
    LoraMask,
    Projection,
    lora_add,
    lora_linear,
    lora_linear_group,
)
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


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The same matrix with a border of NaN, so that a read outside it shows in the result."""
    box = torch.full([n + 8 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    return box[tuple(slice(n) for n in t.shape)].copy_(t)


def make(shape, dtype, device, adapter_dtype=None):
    lead, k, n, r = shape
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(*lead, k, dtype=dtype, device=device)
    w = guarded(torch.randn(n, k, dtype=dtype, device=device) / k**0.5)
    a = guarded(torch.randn(r, k, dtype=adapter_dtype, device=device) / k**0.5)
    b = guarded(torch.randn(n, r, dtype=adapter_dtype, device=device) / r**0.5)
    bias = torch.randn(n, dtype=dtype, device=device)
    return x, w, a, b, bias


def plain(x, w, a, b, bias, scale):
    """What the op computes, as a user of PyTorch would write it: autograd does the rest."""
    return linear(x, w, bias) + scale * linear(linear(x, a.to(x.dtype)), b.to(x.dtype))


def with_grads(f, leaves, dy):
    y = f(*leaves)
    return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, adapter, device, poisoned):
    adapter_dtype = torch.float32 if adapter == "fp32" else dtype
    draws = [one_draw(shape, dtype, adapter_dtype, device) for _ in range(DRAWS)]
    for i, name in enumerate(("y", "dX", "dA", "dB")):
        out, exact, plain = (torch.stack([draw[k][i] for draw in draws]) for k in range(3))
        assert_as_accurate(name, out, exact, plain)


def one_draw(shape, dtype, adapter_dtype, device):
    """(y, dX, dA, dB) by the op, in float64, and by plain PyTorch."""
    x, w, a, b, bias = make(shape, dtype, device, adapter_dtype)
    dy = torch.randn(*x.shape[:-1], w.shape[0], dtype=dtype, device=device)

    def leaves(to=None):
        return [t.detach().to(to or t.dtype).requires_grad_() for t in (x, a, b)]

    ours = with_grads(lambda x, a, b: lora_linear(x, w, a, b, 2.5, bias=bias), leaves(), dy)
    base = with_grads(lambda x, a, b: plain(x, w, a, b, bias, 2.5), leaves(), dy)
    wide = torch.float64
    exact = with_grads(
        lambda x, a, b: plain(x, w.to(wide), a, b, bias.to(wide), 2.5), leaves(wide), dy
    )
    return [[t.detach() for t in result] for result in (ours, exact, base)]


def double(*shape, device="cpu", grad=True):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=grad)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p, device):
    x, a, b = (double(*s, device=device) for s in ((4, 5), (3, 5), (6, 3)))
    w, base = double(6, 5, device=device, grad=False), double(4, 6, device=device)

    def op(x, a, b):
        torch.manual_seed(7)  # the same dropout bits in every call
        return lora_linear(x, w, a, b, 0.7, dropout_p=dropout_p)

    def add(base, x, a, b):
        torch.manual_seed(7)
        return lora_add(base, x, a, b, 0.7, dropout_p=dropout_p)

    def group(x, a, b):
        torch.manual_seed(7)
        two = [Projection(w, a, b, 0.7), Projection(w[:4], a, b[:4], -1.5)]
        return lora_linear_group(x, two, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(op, (x, a, b))
    assert torch.autograd.gradcheck(add, (base, x, a, b))
    assert torch.autograd.gradcheck(group, (x, a, b))


MASKS = ["none", "all", "random", "columns", "one element"]


def make_mask(kind, r, k, n, device):
    a = torch.zeros(r, k, dtype=torch.bool, device=device)
    b = torch.zeros(n, r, dtype=torch.bool, device=device)
    match kind:
        case "all":
            a[:], b[:] = True, True
        case "random":
            a, b = torch.rand(r, k, device=device) < 0.4, torch.rand(n, r, device=device) < 0.4
        case "columns":
            a[1], b[:, 1] = True, True
        case "one element":
            a[0, 2] = True
    return LoraMask(a, b)


@pytest.mark.parametrize("kind", MASKS)
def test_mask_leaves_dx_alone_and_zeroes_the_rest_exactly(kind, device):
    x, w, a, b, bias = make(((2, 9), 7, 11, 4), torch.float64, device)
    mask = make_mask(kind, 4, 7, 11, device)
    dy = torch.randn(2, 9, 11, dtype=torch.float64, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y0, dx0, da0, db0 = with_grads(lambda x, a, b: lora_linear(x, w, a, b, 3.0), leaves, dy)
    y1, dx1, da1, db1 = with_grads(
        lambda x, a, b: lora_linear(x, w, a, b, 3.0, mask=mask), leaves, dy
    )
    assert torch.equal(y0, y1) and torch.equal(dx0, dx1)
    for got, free, trainable in ((da1, da0, mask.a), (db1, db0, mask.b)):
        assert torch.equal(got[trainable], free[trainable])
        assert not got[~trainable].any()


def test_mask_zero_is_exact_even_where_the_gradient_is_not_finite(device):
    x, w, a, b, _ = make(((4,), 6, 5, 2), torch.float32, device)
    x[0, 0] = torch.inf
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    mask = make_mask("none", 2, 6, 5, device)
    lora_linear(x, w, a, b, 1.0, mask=mask).sum().backward()
    assert not a.grad.any() and not b.grad.any()


def test_dead_columns_are_left_out(device):
    x, w, a, b, _ = make(((6,), 8, 10, 5), torch.float64, device)
    b[:, [1, 3]] = 0
    live = torch.tensor([True, False, True, False, True], device=device)
    trainable = live[:, None].expand(5, 8).contiguous(), live[None].expand(10, 5).contiguous()
    mask = LoraMask(*trainable, live=live)
    mask.check_dead(a, b)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    dy = torch.randn(6, 10, dtype=torch.float64, device=device)
    got = with_grads(lambda x, a, b: lora_linear(x, w, a, b, 2.0, mask=mask), leaves, dy)
    want = with_grads(lambda x, a, b: lora_linear(x, w, a, b, 2.0), leaves, dy)
    assert_close("y", got[0], want[0])
    assert_close("dX", got[1], want[1])
    assert_close("dA", got[2][live], want[2][live])
    assert_close("dB", got[3][:, live], want[3][:, live])
    assert not got[2][~live].any() and not got[3][:, ~live].any()
    # A dead column is skipped, not multiplied: even a NaN there does not reach the output.
    poisoned = a.clone()
    poisoned[1] = torch.nan
    assert torch.isfinite(lora_linear(x, w, poisoned, b, 2.0, mask=mask)).all()
    with pytest.raises(ValueError, match=r"columns \[1\] are marked dead but contribute"):
        mask.check_dead(a, b.index_fill(1, torch.tensor([1], device=device), 1.0))


def test_nan_in_a_frozen_live_column_propagates(device):
    x, w, a, b, _ = make(((6,), 8, 10, 3), torch.float32, device)
    a[1, 0] = torch.nan
    assert lora_linear(x, w, a, b, 1.0, mask=make_mask("none", 3, 8, 10, device)).isnan().any()


def test_group_equals_its_layers_and_sums_their_dx(device):
    x = torch.randn(3, 5, 8, dtype=torch.float64, device=device)
    parts = [make(((1,), 8, n, r), torch.float64, device)[1:] for n, r in ((8, 4), (6, 2), (10, 3))]
    x0, x1 = (x.clone().requires_grad_() for _ in "12")
    group = lora_linear_group(x0, [Projection(w, a, b, 1.5, bias) for w, a, b, bias in parts])
    alone = [lora_linear(x1, w, a, b, 1.5, bias=bias) for w, a, b, bias in parts]
    for one, other in zip(group, alone):
        assert torch.equal(one, other)
    sum(y.square().sum() for y in group).backward()
    sum(y.square().sum() for y in alone).backward()
    assert_close("dX", x0.grad, x1.grad)


def test_unused_output_of_a_group_gives_no_gradient(device):
    x, w, a, b, _ = make(((4,), 6, 6, 2), torch.float32, device)
    a2 = a.clone().requires_grad_()
    a1 = a.clone().requires_grad_()
    one, _ = lora_linear_group(x, [Projection(w, a1, b, 1.0), Projection(w, a2, b, 1.0)])
    one.sum().backward()
    assert a1.grad.any() and a2.grad is None


class TestDropout:
    def test_keeps_the_right_share_and_the_right_mean(self, device):
        n, p = 40_000, 0.3
        x = torch.ones(n, 1, device=device)
        one = torch.ones(1, 1, device=device)
        y = lora_linear(x, torch.zeros(1, 1, device=device), one, one, 1.0, dropout_p=p)
        kept = (y != 0).float().mean().item()
        assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
        assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p))

    def test_follows_the_seed_and_differs_between_calls(self, device):
        x, w, a, b, _ = make(((4, 16), 32, 8, 4), torch.float32, device)

        def call():
            return lora_linear(x, w, a, b, 1.0, dropout_p=0.5)

        torch.manual_seed(3)
        first, second = call(), call()
        torch.manual_seed(3)
        assert torch.equal(first, call()) and not torch.equal(first, second)

    def test_projections_of_a_group_draw_their_own_bits(self, device):
        x, w, a, b, _ = make(((4, 16), 32, 8, 4), torch.float32, device)
        one, two = lora_linear_group(x, [Projection(w, a, b, 1.0)] * 2, dropout_p=0.5)
        assert not torch.equal(one, two)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_recompute_in_checkpointing_draws_the_same_bits(self, reentrant, device):
        from torch.utils.checkpoint import checkpoint

        x, w, a, b, _ = make(((4, 8), 16, 8, 4), torch.float32, device)
        grads = []
        for use in (False, True):
            leaves = [t.clone().requires_grad_() for t in (x, a, b)]

            def op(x, a, b):
                return lora_linear(x, w, a, b, 1.0, dropout_p=0.5)

            torch.manual_seed(5)
            y = checkpoint(op, *leaves, use_reentrant=reentrant) if use else op(*leaves)
            y.square().sum().backward()
            grads.append([t.grad for t in leaves])
        assert all(torch.equal(g, h) for g, h in zip(*grads))


class TestAutocast:
    def test_behaves_as_linear_does(self, device):
        x, w, a, b, bias = make(((5, 7), 16, 12, 4), torch.float32, device)
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        with torch.autocast(device, dtype=torch.bfloat16):
            y = lora_linear(*leaves[:1], w, *leaves[1:], 2.0, bias=bias)
            assert y.dtype == linear(x, w).dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert [t.grad.dtype for t in leaves] == [torch.float32] * 3

    def test_saves_no_copy_of_the_weight(self, device):
        x, w, a, b, _ = make(((5, 7), 16, 12, 4), torch.float32, device)
        saved = []
        with (
            torch.autocast(device, dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            lora_linear(x, w, a.clone().requires_grad_(), b.clone().requires_grad_(), 2.0)
        assert not [t for t in saved if t.shape == w.shape and t.dtype == torch.bfloat16]


def test_no_s_is_saved_where_neither_a_nor_b_trains(device):
    x, w, a, b, _ = make(((50,), 16, 12, 4), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x.requires_grad_(), w, a, b, 2.0)
    assert not [t for t in saved if t.shape == (50, 4)]


def test_lora_add_keeps_the_dtype_of_base(device):
    x, w, a, b, _ = make(((5,), 16, 12, 4), torch.bfloat16, device)
    base = torch.randn(5, 12, device=device)
    y = lora_add(base, x, a, b, 1.0)
    assert y.dtype == torch.float32 and y is not base
    assert torch.equal(lora_add(base, x, a, torch.zeros_like(b), 1.0), base)


def test_strided_and_leading_dims(device):
    x, w, a, b, _ = make(((4, 6), 8, 10, 2), torch.float32, device)
    want = lora_linear(x, w, a, b, 1.0)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert_close("strided", lora_linear(strided, w, a, b, 1.0), want)
    assert_close("4-D", lora_linear(x.view(2, 2, 6, 8), w, a, b, 1.0).view(4, 6, 10), want)
    assert_close("1-D", lora_linear(x[0, 0], w, a, b, 1.0), want[0, 0])


def test_same_bits_run_after_run(device):
    x, w, a, b, _ = make(((33,), 40, 24, 6), torch.float32, device)
    grads = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        lora_linear(leaves[0], w, *leaves[1:], 1.0).square().sum().backward()
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(g, h) for run in grads[1:] for g, h in zip(grads[0], run))


def test_compiles_without_graph_break(device):
    x, w, a, b, _ = make(((5, 3), 8, 6, 2), torch.float32, device)
    a.requires_grad_()
    b = b.clone()
    b[:, 1] = 0
    mask = LoraMask(
        torch.tensor([[True], [False]], device=device).expand(2, 8).contiguous(),
        torch.tensor([[True, False]], device=device).expand(6, 2).contiguous(),
        live=torch.tensor([True, False], device=device),
    )
    for options in ({}, {"dropout_p": 0.5}, {"mask": mask}):

        def call(f, options=options):
            torch.manual_seed(1)
            y = f(x, w, a, b, 2.0, **options)
            return y, *torch.autograd.grad(y.sum(), a)

        torch._dynamo.reset()
        compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
        for one, other in zip(call(compiled), call(lora_linear)):
            assert torch.equal(one, other)


def test_the_dropout_op_is_registered_correctly(device):
    seed = torch.tensor([5], device=device)
    arguments = (torch.randn(4, 3, device=device), 0.5, seed, 0)
    torch.library.opcheck(torch.ops.lorapar.reference_dropout_keep.default, arguments)


def test_an_empty_mask_saves_no_s(device):
    x, w, a, b, _ = make(((50,), 16, 12, 4), torch.float32, device)
    saved, mask = [], make_mask("none", 4, 16, 12, device)
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x.requires_grad_(), w, *leaves, 2.0, mask=mask)
    assert not [t for t in saved if t.shape == (50, 4)]
    y.sum().backward()
    assert not any(t.grad.any() for t in leaves) and x.grad.any()


class TestSums:
    """Per-example gradients at any batch size, and none for A and B."""

    def make(self, device):
        x, w, a, b, _ = make(((12,), 7, 9, 3), torch.float64, device)
        return x, w, a.clone().requires_grad_(), b.clone().requires_grad_()

    def test_equals_one_example_at_a_time(self, device):
        x, w, a, b = self.make(device)
        dy = torch.randn(12, 9, dtype=torch.float64, device=device)
        bounds = [0, 5, 5, 6, 12]  # uneven, one of them empty
        sums = ImportanceSums(a, b)
        sums.examples(torch.tensor(bounds, dtype=torch.int32, device=device))
        lora_linear(x, w, a, b, 2.0, sums=sums).backward(dy)
        assert a.grad is None and b.grad is None
        want = [torch.zeros_like(t) for t in (a, a, b, b)]
        for lo, hi in zip(bounds, bounds[1:]):
            y = lora_linear(x[lo:hi], w, a, b, 2.0)
            ga, gb = torch.autograd.grad(y, (a, b), dy[lo:hi])
            for total, g in zip(want, (ga, ga.square(), gb, gb.square())):
                total += g
        got = (sums.a, sums.a_squared, sums.b, sums.b_squared)
        for name, g, w64 in zip(("Σg A", "Σg² A", "Σg B", "Σg² B"), got, want):
            assert_as_accurate(name, g, w64, w64.float())

    def test_frozen_adapters_cannot_be_scored(self, device):
        x, w, a, b = self.make(device)
        sums = ImportanceSums(a, b)
        sums.examples(torch.tensor([0, 12], dtype=torch.int32, device=device))
        with pytest.raises(ValueError, match="lora_a or lora_b must require grad"):
            lora_linear(x, w, a.detach(), b.detach(), 1.0, sums=sums)

    def test_examples_that_do_not_cover_x_are_refused(self, device):
        x, w, a, b = self.make(device)
        sums = ImportanceSums(a, b)
        with pytest.raises(ValueError, match=r"call sums.examples"):
            lora_linear(x, w, a, b, 1.0, sums=sums)
        sums.examples(torch.tensor([0, 5, 11], dtype=torch.int32, device=device))
        with pytest.raises(ValueError, match="number of rows of x, 12"):
            lora_linear(x, w, a, b, 1.0, sums=sums).sum().backward()
        with pytest.raises(TypeError, match="int32"):
            sums.examples(torch.tensor([0, 12]))


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

    def test_backend(self, monkeypatch):
        monkeypatch.setenv("LORAPAR_BACKEND", "triton")
        with pytest.raises(RuntimeError, match="'triton', but lorapar_kernels has only reference"):
            lora_linear(*self.args()[:4], 1.0)
