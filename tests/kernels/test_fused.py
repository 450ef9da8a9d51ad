"""The ops, on kernels and on the reference, against float64: every kind of input."""

from dataclasses import replace

import pytest
import torch
from cases import (
    DROPOUT,
    OPS,
    RANKS,
    Case,
    Inputs,
    bits_of,
    decoded,
    delta,
    few,
    keeps_of,
    leaves_of,
    make,
    product,
    sample,
    saving,
    three_ways,
    with_grads,
)
from conftest import DEVICE, KERNEL_DTYPES, beyond
from torch.nn.functional import linear

from lorapar_kernels import (
    LoraMask,
    dy_gradients,
    expand,
    extended_gemm,
    fused,
    gradient,
    lora_add,
    lora_linear,
    shrink,
)
from lorapar_kernels.testing import assert_as_accurate, assert_close

CASES = sample(KERNEL_DTYPES)
# Errors judged together, and draws that give them: an RMS of a few is itself a draw.
ERRORS, MOST_DRAWS = (1000, 64) if DEVICE == "cuda" else (80, 8)


def draws_of(case: Case, inputs: Inputs) -> int:
    """How many draws of a case give enough errors that do not come from one another."""
    independent = 1 if case.mask == "one element" else inputs.x.shape[:-1].numel() * case.rank
    smallest = min(independent, *(t.numel() for t in inputs.leaves))
    return min(MOST_DRAWS, -(-ERRORS // max(1, smallest)))


def judge(case: Case, device: str) -> None:
    """Everything as near float64 as plain PyTorch is; exactly zero where that is exactly zero.

    Of thousands of cases some few are too far by chance, in the largest of a few errors: they are
    judged once more on ten times as many besides, which brings down chance, and no fault.
    """
    inputs = Inputs(case, device)
    count = draws_of(case, inputs)
    draws = [three_ways(inputs if i == 0 else Inputs(case, device)) for i in range(count)]
    try:
        judge_draws(inputs.names(), draws)
    except AssertionError:
        draws += [three_ways(Inputs(case, device)) for _ in range(10 * count)]
        judge_draws(inputs.names(), draws)


def judge_draws(names: list[str], draws: list[list[list[torch.Tensor]]]) -> None:
    """All draws together: one bad element of one of them is an error of them all."""
    for i, name in enumerate(names):
        ours, exact, base = (torch.stack([d[k][i] for d in draws]) for k in range(3))
        assert_as_accurate(name, ours, exact, base)
        assert not ours[exact == 0].any(), f"{name} is not exactly zero"


@pytest.mark.parametrize("case", beyond(few(CASES), CASES))
def test_matches_float64(case, backend, device, poisoned):
    judge(case, device)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_all_combinations_match_float64(dtype, rank, device, poisoned, kernels):
    failed = []
    for case in product(dtype, rank):
        torch.manual_seed(0)
        try:
            judge(case, device)
        except AssertionError as error:
            failed.append(f"{case}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize(
    "op,mask", [("linear", "none"), ("linear", "random"), ("linear", "dead"), ("group", "none")]
)
def test_many_splits(op, mask, one_pass, device, poisoned, triton_backend, monkeypatch):
    """As on a card: each gradient is the sum of several runs of rows, the last one shorter."""
    monkeypatch.setattr(gradient, "multiprocessors", lambda device: 6)
    monkeypatch.setattr(dy_gradients, "wins", lambda dy, R: one_pass)
    judge(Case(torch.float32, 12, mask, DROPOUT, op, ((270,), 40, 64)), device)


@pytest.mark.parametrize("op,K", [("group", 1100), ("linear", 2050)])
def test_dropout_of_wide_inputs(K, op, device, poisoned, kernels):
    """The bits of a row fill several words of a lane."""
    judge(Case(rank=16, dropout_p=DROPOUT, op=op, shape=((5,), K, 30)), device)


@pytest.mark.parametrize("mask", beyond(["random"], ["none", "random", "dead"]))
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("op", OPS)
def test_rows_of_whole_vectors(op, dropout_p, mask, device, poisoned, kernels):
    """Which the backward of few rows is for, where the backend has one."""
    judge(Case(KERNEL_DTYPES[-1], 16, mask, dropout_p, op, ((50,), 1088, 136), step=8), device)


@pytest.mark.parametrize("R", [16, 33])
def test_base_in_another_dtype(R, device, poisoned, kernels):
    """The base of a 16-bit adapter may come in fp32, and stays so."""
    x, _, a, b, _ = make(((37,), 40, 50, R), torch.float16, device)
    base, dy = torch.randn(2, 37, 50, device=device)

    def plain(base, x, a, b):
        return base + delta(x, a, b, 1.5).to(base.dtype)

    def op(base, x, a, b):
        return lora_add(base, x, a, b, 1.5)

    leaves = [base, x, a, b]
    ours, without = (with_grads(f, leaves_of(leaves), dy) for f in (op, plain))
    exact = with_grads(plain, leaves_of(leaves, torch.float64), dy)
    for name, *three in zip(("y", "dBase", "dX", "dA", "dB"), ours, exact, without):
        assert_as_accurate(name, *three)


def test_weight_in_any_strides(backend, device):
    x, w, a, b, bias = make(((5,), 8, 10, 2), torch.float32, device)
    want = lora_linear(x, w, a, b, 1.0, bias=bias)
    columns = w.t().contiguous().t()
    assert_close("y", lora_linear(x, columns, a, b, 1.0, bias=bias), want)
    a, b = (t.t().contiguous().t() for t in (a, b))
    assert_close("y", lora_linear(x, w, a, b, 1.0, bias=bias), want)


def test_bias_in_any_stride(backend, device):
    x, w, a, b, bias = make(((5,), 8, 10, 2), torch.float32, device)
    apart = torch.full((20,), torch.nan, device=device)[::2].copy_(bias)
    want = lora_linear(x, w, a, b, 1.0, bias=bias)
    assert_close("y", lora_linear(x, w, a, b, 1.0, bias=apart), want)


@pytest.mark.parametrize("lead", [(2, 2, 6), (4, 6), (24,), ()], ids=str)
def test_leading_dims(lead, backend, device):
    x, w, a, b, _ = make(((24,), 8, 10, 2), torch.float32, device)
    rows = x if lead else x[0]
    y = lora_linear(rows.view(*lead, 8), w, a, b, 1.0)
    assert y.shape == (*lead, 10)
    want = lora_linear(rows.view(-1, 8), w, a, b, 1.0)
    assert_close("y", y.view(-1, 10), want)


@pytest.mark.parametrize("op,dropout_p", [("linear", 0.0), ("add", DROPOUT), ("group", DROPOUT)])
def test_same_bits_run_after_run(op, dropout_p, device, kernels):
    inputs = Inputs(Case(op=op, shape=((33,), 40, 24), dropout_p=dropout_p), device)
    runs = []
    for _ in range(3 if DEVICE == "cpu" and kernels == "triton" else 20):  # one after another
        torch.manual_seed(3)
        runs.append(with_grads(inputs.op, leaves_of(inputs.leaves), inputs.dys))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("rank", [3, 100])
@pytest.mark.parametrize("where", ["x", "dY"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nan_and_inf_propagate(value, where, rank, dropout_p, backend, device):
    """The ranks are padded inside: zero times Inf must not show."""
    for op in OPS:
        case = Case(KERNEL_DTYPES[-1], rank, "none", dropout_p, op, ((9,), 12, 20))
        inputs = Inputs(case, device)
        for t in (*inputs.leaves, *inputs.dys):
            t.abs_()  # no sum near zero, whose sign, and so an infinity's, is a matter of rounding
        (inputs.x if where == "x" else inputs.dys[0])[4, 7] = value
        ours, _, plain = three_ways(inputs)
        same_pattern(inputs.names(), ours, plain)


def same_pattern(names, ours, plain) -> None:
    for name, got, want in zip(names, ours, plain):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(want)), f"{name}: {kind.__name__}"


@pytest.fixture
def cublas(device, monkeypatch):
    """cuBLAS from rank 128 on; on a CPU, something in its place."""
    if device == "cuda":
        return
    real = torch.mm

    def serves(x, columns):
        return columns >= 128 and x.element_size() == 2

    def addmm(s, x, a, *, beta, alpha, out):
        out.copy_(alpha * (x.float() @ a.float()))

    def mm(a, b, *, out_dtype=None, **options):
        return real(a, b, **options) if out_dtype is None else a.float() @ b.float()

    for module in (shrink, gradient, fused):
        monkeypatch.setattr(module, "cublas", serves)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.parametrize("mask", ["none", "dead"])
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("op", OPS)
def test_where_cublas_serves(op, dropout_p, mask, device, poisoned, triton_backend, cublas):
    judge(Case(KERNEL_DTYPES[-1], 256, mask, dropout_p, op, ((19,), 72, 64)), device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("plan", ["a", "b", "cuda"])
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("dead", beyond([(56, 0, 256)], [(56, 56, 56), (56, 0, 256)]))
@pytest.mark.parametrize("where", ["x", "dY"])
@pytest.mark.parametrize("op", beyond(["group"], OPS))
def test_inf_where_columns_are_padding(
    op, where, dead, dropout_p, plan, device, cublas, monkeypatch, request
):
    """Some of 256 columns live, as of 128 in a group's second; the packed rank is 256."""
    request.getfixturevalue("cuda_backend" if plan == "cuda" else "triton_backend")
    if plan == "b":
        monkeypatch.setattr(extended_gemm, "wins", lambda *arguments, **options: True)
    case = Case(
        KERNEL_DTYPES[-1], 256, "none", dropout_p, op, ((9,), 72, 64), None, "contiguous", step=8
    )
    inputs = Inputs(case, device)
    for i, p in enumerate(inputs.projections):
        a, b = p.lora_a, p.lora_b
        live = torch.arange(len(a), device=device) >= dead[i]
        mask = LoraMask(live[:, None].expand_as(a), live.expand_as(b), live=live)
        inputs.projections[i] = replace(p, mask=mask)
        for t in (a, b, p.weight, inputs.dys[i]):
            t.abs_()  # infinities of one sign: their sum is no NaN unless padding makes it one
    inputs.x.abs_()
    (inputs.x if where == "x" else inputs.dys[0])[4, 7] = torch.inf
    ours, _, plain = three_ways(inputs)
    same_pattern(inputs.names(), ours, plain)


class TestWhatIsNotAskedFor:
    @pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
    @pytest.mark.parametrize("used", [(0, 2), (1,), (2,)], ids=str)
    def test_unused_outputs(self, used, dropout_p, backend, device, poisoned):
        inputs = Inputs(Case(op="group", dropout_p=dropout_p), device)
        found = []

        def op(*leaves):
            ys, saved = saving(inputs.op, *leaves)
            found.append(saved)
            return ys

        def run(f, to=None):
            leaves = leaves_of(inputs.leaves, to)
            ys = f(*leaves)
            sum((ys[i] * inputs.dys[i].to(ys[i].dtype)).sum() for i in used).backward()
            return [t.grad for t in leaves]

        ours = run(op)
        keeps = keeps_of(found[0], inputs.x, dropout_p, 3)
        exact, plain = run(inputs.plain(keeps), torch.float64), run(inputs.plain(keeps))
        for name, *three in zip(inputs.names()[3:], ours, exact, plain):
            assert [t is None for t in three] == [three[1] is None] * 3, name
            if three[0] is not None:
                assert_as_accurate(name, *three)

    @pytest.mark.parametrize("wanted", ["x", "a", "b", "x a", "x b", "a b"])
    @pytest.mark.parametrize("op", OPS)
    def test_some_inputs_without_grad(self, op, wanted, backend, device, poisoned):
        """A first layer's x; A or B frozen."""
        inputs = Inputs(Case(op=op, dropout_p=DROPOUT), device)
        kinds = ["x", *["base"] * len(inputs.bases), *["a", "b"] * len(inputs.projections)]
        grads = []
        for every in (True, False):
            torch.manual_seed(9)
            leaves = leaves_of(inputs.leaves)
            for kind, leaf in zip(kinds, leaves):
                leaf.requires_grad_(every or kind in wanted.split())
            torch.autograd.backward(inputs.op(*leaves), inputs.dys)
            grads.append([t.grad for t in leaves])
        for kind, full, some in zip(kinds, *grads):
            assert (some is not None) == (kind in wanted.split()), kind
            if some is not None:
                assert_close(kind, some, full)

    def test_group_members_frozen_one_by_one(self, backend, device, poisoned):
        """Neither A of the first nor B of the second trains, and x has no gradient."""
        inputs = Inputs(Case(op="group"), device)
        grads = []
        for frozen in ((), (1, 4)):
            leaves = leaves_of(inputs.leaves)
            for i in (0, *frozen):
                leaves[i].requires_grad_(False)
            torch.autograd.backward(inputs.op(*leaves), inputs.dys)
            grads.append([t.grad for t in leaves])
        for i, (full, some) in enumerate(zip(*grads)):
            assert (some is None) == (i in (0, 1, 4))
            if some is not None:
                assert_close(f"gradient {i}", some, full)

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("wanted", ["x", "a", "b", "mask"])
    def test_saves_no_more_than_it_needs(self, wanted, op, device, kernels):
        mask = "empty" if wanted == "mask" else "none"
        inputs = Inputs(Case(op=op, rank=12, shape=((50,), 40, 24), mask=mask), device)
        if op == "group" and wanted == "mask":  # its second projection has no mask
            inputs.projections = inputs.projections[::2]
            inputs.leaves = [*inputs.leaves[:3], *inputs.leaves[5:]]
        leaves = leaves_of(inputs.leaves)
        adapters = leaves[1 + len(inputs.bases) :]
        for t in leaves:
            t.requires_grad_(wanted == "mask")
        leaves[0].requires_grad_(wanted in ("x", "mask"))
        for t in adapters[wanted == "b" :: 2] if wanted in ("a", "b") else ():
            t.requires_grad_()
        _, saved = saving(inputs.op, *leaves)
        P = len(inputs.projections)
        assert (any(t.shape == inputs.x.shape for t in saved)) == (wanted == "a")
        if kernels != "triton":  # whose raw op has one tensor for all that it keeps
            assert (any(t.shape == (50, 16 * P) for t in saved)) == (wanted == "b")
        assert not any(t.shape[0] == 50 for t in saved if wanted in ("x", "mask") and t.dim())


class TestGraph:
    def make(self, device):
        inputs = Inputs(Case(dropout_p=DROPOUT, shape=((20,), 16, 12)), device)
        return inputs, leaves_of(inputs.leaves)

    def test_backward_twice(self, backend, device):
        inputs, leaves = self.make(device)
        (y,) = inputs.op(*leaves)
        one, two = (torch.autograd.grad(y, leaves, inputs.dys, retain_graph=True) for _ in "12")
        assert all(torch.equal(g, h) for g, h in zip(one, two))

    def test_double_backward_is_refused(self, backend, device):
        inputs, leaves = self.make(device)
        (y,) = inputs.op(*leaves)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

    def test_without_grad_mode_nothing_is_saved(self, backend, device):
        inputs, leaves = self.make(device)
        with torch.no_grad():
            (y,), saved = saving(inputs.op, *leaves)
        assert not y.requires_grad and not saved


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("K,N", [(512, 256), (256, 520)])  # dA before dX's GEMM, beside it
def test_gradients_beside_the_gemms(
    K, N, dropout_p, op, device, poisoned, triton_backend, monkeypatch
):
    """The second stream, which small inputs do not take."""
    monkeypatch.setattr(fused, "FORK_FLOPS", 0)
    for mask in ("none", "random", "dead"):
        judge(Case(torch.bfloat16, 16, mask, dropout_p, op, ((1000,), K, N)), device)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [2048, 2053], ids=["aligned", "odd"])
@pytest.mark.parametrize("columns,num_warps", [(256, 4), (256, 8), (128, 4), (64, 4)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_dropout_of_wide_tiles(
    dtype, columns, num_warps, stride, device, poisoned, triton_backend, monkeypatch
):
    """Two elements an instruction share a bit: the layout of a tile depends on its width and on
    the alignment of x's rows."""
    cfg = {"BLOCK_M": 32, "num_warps": num_warps, "num_stages": 2}
    monkeypatch.setattr(gradient, "config", lambda *arguments: cfg | {"BLOCK_K": columns})
    monkeypatch.setattr(expand, "config", lambda *arguments: cfg | {"BLOCK_N": columns})
    inputs = Inputs(Case(dtype, 16, dropout_p=DROPOUT, shape=((300,), 1100, 40)), device)
    x = torch.randn(300, stride, dtype=dtype, device=device)[:, :1100]
    inputs.x = inputs.leaves[0] = x
    judge_draws(inputs.names(), [three_ways(inputs)])


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("K,N", [(4096, 64), (64, 4096)])
def test_more_elements_than_an_int32_counts(K, N, dropout_p, device, kernels):
    """The last rows, and dA and dB, which are sums over all rows."""
    M = 600_000
    assert M * max(K, N) > 2**31
    x, w, a, b, bias = make(((1,), K, N, 16), torch.bfloat16, device, torch.float32)
    x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
    dy = torch.randn(M, N, dtype=torch.bfloat16, device=device)
    leaves = leaves_of([x, a, b])
    y, saved = saving(
        lambda x, a, b: lora_linear(x, w, a, b, 1.5, bias=bias, dropout_p=dropout_p), *leaves
    )
    dx, da, db = torch.autograd.grad(y, leaves, dy)
    bits = bits_of(saved, x) if dropout_p else None

    def part(rows, to):
        """y, dX, dA and dB of these rows; sums over rows in fp32 or wider."""
        x_, dy_ = x[rows].to(to), dy[rows].to(to)
        w_, bias_, a_, b_ = (t.to(to) for t in (w, bias, a, b))
        keep = torch.ones((), dtype=to, device=device)
        if bits is not None:
            keep = (decoded(bits[:, rows], K)[0].double() / (1 - dropout_p)).to(to)
        s, ds = (x_ * keep) @ a_.t(), dy_ @ (1.5 * b_)
        y = linear(x_, w_, bias_) + 1.5 * (s @ b_.t())
        dx = dy_ @ w_ + (ds @ a_) * keep
        wide = torch.promote_types(to, torch.float32)
        da = ds.to(wide).t() @ (x_ * keep).to(wide)
        return y[-100:], dx[-100:], da, 1.5 * (dy_.to(wide).t() @ s.to(wide))

    results = []
    for to in (torch.float64, torch.bfloat16):
        parts = [part(slice(start, start + 50_000), to) for start in range(0, M, 50_000)]
        results.append([*parts[-1][:2], *(sum(p[i] for p in parts) for i in (2, 3))])
    ours = (y[-100:].detach(), dx[-100:], da, db)
    for name, *three in zip(("y", "dX", "dA", "dB"), ours, *results):
        assert_as_accurate(name, *three)
