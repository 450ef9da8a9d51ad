"""Dropout: how often, where, after which seed, and the same again in the backward."""

import numpy as np
import pytest
import torch
from cases import Case, Inputs, bits_of, decoded, leaves_of, make, saving
from torch.utils.checkpoint import checkpoint

from lorapar_kernels import Projection, dropout, lora_linear, lora_linear_group

SIGMAS = 4


def within(rate: torch.Tensor | float, p: float, n: int) -> bool:
    """Whether a rate seen in n draws is one of probability p."""
    return abs(float(rate) - p) < SIGMAS * (p * (1 - p) / n) ** 0.5


def kept(p: float, M: int = 64, K: int = 1500, P: int = 1, r: int = 4, device="cpu"):
    """bool [P, M, K]: what one call on the kernels keeps."""
    x = torch.ones(M, K, device=device, requires_grad=True)
    a, b, w = (torch.zeros(s, device=device) for s in ((r, K), (1, r), (1, K)))
    group = [Projection(w, a, b, 1.0)] * P
    _, saved = saving(lambda x: lora_linear_group(x, group, dropout_p=p), x)
    return decoded(bits_of(saved, x, P), K)


@pytest.mark.parametrize("number", [np.float32, torch.tensor], ids=["numpy", "tensor"])
def test_any_kind_of_number(number, backend, device):
    x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, device)
    ys = []
    for p in (0.5, number(0.5)):
        torch.manual_seed(2)
        ys.append(lora_linear(x, w, *leaves_of([a, b]), 1.0, dropout_p=p))
    assert torch.equal(*ys)


class TestBits:
    @pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
    def test_rate(self, p, device, triton_backend):
        keep = kept(p, device=device)
        assert within(keep.float().mean(), 1 - p, keep.numel())
        # Nor is one bit of a word, or one lane, any other.
        for at in range(0, 1472, 64):
            part = keep[..., at : at + 64]
            assert within(part.float().mean(), 1 - p, part.numel()), at

    def test_of_projections_are_independent(self, device, triton_backend):
        p = 0.3
        keep = kept(p, P=3, device=device)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            agree = (keep[i] == keep[j]).float().mean()
            assert within(agree, p**2 + (1 - p) ** 2, keep[i].numel())

    @pytest.mark.parametrize("lag", [1, 2, 16, 32, 64, 128, 512, 1024])
    def test_do_not_repeat_along_a_row(self, lag, device, triton_backend):
        p = 0.3
        (keep,) = kept(p, device=device)
        agree = keep[:, lag:] == keep[:, :-lag]
        assert within(agree.float().mean(), p**2 + (1 - p) ** 2, agree.numel())

    @pytest.mark.parametrize("lag", [1, 16, 32, 64])
    def test_do_not_repeat_along_a_column(self, lag, device, triton_backend):
        p = 0.3
        (keep,) = kept(p, M=130, K=600, device=device)
        agree = keep[lag:] == keep[:-lag]
        assert within(agree.float().mean(), p**2 + (1 - p) ** 2, agree.numel())
        assert len(keep.unique(dim=0)) == 130 and len(keep.unique(dim=1)[0]) == 600

    def test_follow_the_seed_alone(self, device, triton_backend):
        """Not the rank, the number of rows, or how many projections there are."""

        def call(**changes):
            torch.manual_seed(5)
            return kept(0.5, device=device, **changes)

        first, other = call(), kept(0.5, device=device)
        assert not torch.equal(first, other)
        assert torch.equal(first, call())
        assert torch.equal(first, call(r=200))
        assert torch.equal(first[:, :9], call(M=9))
        assert torch.equal(first, call(P=2)[:1])


@pytest.mark.parametrize("shape", [(5, 40), (33, 1100)], ids=str)
def test_the_reference_may_draw_the_kernels_bits(shape, device, triton_backend):
    """`dropout.keep`, by which both backends drop the same elements on a GPU."""
    M, K = shape
    seed = torch.tensor([2**61 + 5], device=device)
    x, w = torch.randn(M, K, device=device), torch.zeros(1, K, device=device)
    a, b = [torch.zeros(2, K, device=device)] * 2, [torch.zeros(1, 2, device=device)] * 2
    out = torch.ops.lorapar.lora_forward(
        x, [w] * 2, [None] * 2, a, b, [None] * 2, [1.0] * 2, seed, 0.3, True
    )
    bits = decoded(bits_of(out[2:], x, 2), K)
    for i in range(2):
        kept = torch.full((M, K), torch.nan, device=device)
        dropout.keep(kept, 0.3, seed, i)
        assert torch.equal(kept, bits[i].float())


def test_keeps_the_right_share_and_the_right_size(backend, device):
    n, p = 2000, 0.3
    x, one = torch.ones(n, 1, device=device), torch.ones(1, 1, device=device)
    y = lora_linear(x, torch.zeros(1, 1, device=device), one, one, 1.0, dropout_p=p)
    assert within((y != 0).float().mean(), 1 - p, n)
    assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p))


def test_mean_output_is_that_without_dropout(backend, device):
    """Over 10 seeds of 200 equal rows each."""
    x, w, a, b, bias = make(((1,), 40, 3, 5), torch.float32, device)
    rows = x.expand(200, -1)
    ys = [lora_linear(rows, w, a, b, 2.0, bias=bias, dropout_p=0.4) for _ in range(10)]
    y = torch.cat(ys).double()
    error = (y.mean(0) - lora_linear(x, w, a, b, 2.0, bias=bias)[0]).abs()
    assert (error < SIGMAS * y.std(0) / len(y) ** 0.5).all()


def test_follows_the_seed_and_differs_between_calls(backend, device):
    x, w, a, b, _ = make(((4, 16), 32, 8, 4), torch.float32, device)

    def call():
        return lora_linear(x, w, a, b, 1.0, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(first, call()) and not torch.equal(first, second)


def test_projections_of_a_group_draw_their_own_bits(backend, device):
    x, w, a, b, _ = make(((4, 16), 32, 8, 4), torch.float32, device)
    one, two = lora_linear_group(x, [Projection(w, a, b, 1.0)] * 2, dropout_p=0.5)
    assert not torch.equal(one, two)


def test_none_without_dropout(backend, device):
    """p = 0 draws no seed."""
    inputs = Inputs(Case(), device)
    before = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    inputs.op(*leaves_of(inputs.leaves))
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)


@pytest.mark.parametrize("op", ["linear", "group", "add"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_in_checkpointing_draws_the_same_bits(reentrant, op, backend, device):
    inputs = Inputs(Case(op=op, dropout_p=0.5, shape=((4, 8), 16, 8)), device)
    grads = []
    for use in (False, True):
        leaves = leaves_of(inputs.leaves)
        torch.manual_seed(5)
        ys = checkpoint(inputs.op, *leaves, use_reentrant=reentrant) if use else inputs.op(*leaves)
        torch.rand(3, device=device)  # the recompute must not depend on what came after
        sum(y.square().sum() for y in ys).backward()
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(g, h) for g, h in zip(*grads))
