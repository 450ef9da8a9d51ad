"""Importance sums: one gradient an example at any batch size, and none for A and B."""

import pytest
import torch
from cases import Case, Inputs, keeps_of, leaves_of, make, saving
from conftest import KERNEL_DTYPES

from lorapar_kernels import (
    ImportanceSums,
    Projection,
    fused,
    lora_add,
    lora_linear,
    lora_linear_group,
)
from lorapar_kernels.testing import assert_as_accurate, assert_close

BOUNDS = [0, 5, 5, 6, 46, 50]  # uneven, one of them empty, one longer than a block of rows
NAMES = ("Σg A", "Σg² A", "Σg B", "Σg² B")


def sums_for(projections, bounds, device, apart=False) -> list[ImportanceSums]:
    """All told of the examples by one tensor, or each by one of its own."""
    all_sums = [ImportanceSums(p.lora_a, p.lora_b) for p in projections]
    told = torch.tensor(bounds, dtype=torch.int32, device=device)
    for sums in all_sums:
        sums.examples(told.clone() if apart else told)
    return all_sums


def score(inputs: Inputs, all_sums, leaves) -> list:
    """Runs the op and its backward; what it saved."""
    p, q = inputs.projections, inputs.case.dropout_p

    def op(x, *leaves):
        if inputs.bases:
            return (lora_add(leaves[0], x, *leaves[1:], p[0].scale, dropout_p=q, sums=all_sums[0]),)
        group = [
            Projection(one.weight, a, b, one.scale, one.bias, sums=sums)
            for one, a, b, sums in zip(p, leaves[::2], leaves[1::2], all_sums)
        ]
        return lora_linear_group(x, group, dropout_p=q)

    ys, saved = saving(op, *leaves)
    torch.autograd.backward(ys, inputs.dys)
    return saved


def one_at_a_time(inputs: Inputs, bounds, keeps, to=None):
    """The same by plain autograd, one example after another: four sums a projection."""
    adapters = leaves_of(inputs.leaves[1 + len(inputs.bases) :], to)
    totals = [
        torch.zeros(t.shape, dtype=to or torch.float32, device=t.device)
        for t in adapters for _ in "12"
    ]  # fmt: skip
    x, *bases = (t.detach().flatten(0, -2) for t in inputs.leaves[: 1 + len(inputs.bases)])
    dys = [dy.flatten(0, -2) for dy in inputs.dys]
    x = x.to(to or x.dtype)
    for lo, hi in zip(bounds, bounds[1:]):
        kept = None if keeps is None else [k[lo:hi] for k in keeps]
        ys = inputs.plain(kept)(x[lo:hi], *(t[lo:hi].to(x.dtype) for t in bases), *adapters)
        grads = torch.autograd.grad(ys, adapters, [dy[lo:hi].to(x.dtype) for dy in dys])
        for i, g in enumerate(g.to(totals[0].dtype) for g in grads):
            totals[2 * i] += g
            totals[2 * i + 1] += g.square()
    return totals


def judge(inputs: Inputs, bounds, device, twice: bool = False, apart: bool = False) -> None:
    all_sums = sums_for(inputs.projections, bounds, device, apart)
    leaves = leaves_of(inputs.leaves)
    torch.manual_seed(11)
    saved = score(inputs, all_sums, leaves)
    if twice:  # they add up
        torch.manual_seed(11)
        score(inputs, all_sums, leaves)
    adapters = leaves[1 + len(inputs.bases) :]
    assert all(t.grad is None for t in adapters), "A or B has a gradient"
    keeps = keeps_of(saved, inputs.x, inputs.case.dropout_p, len(inputs.projections))
    got = [t for s in all_sums for t in (s.a, s.a_squared, s.b, s.b_squared)]
    exact = one_at_a_time(inputs, bounds, keeps, torch.float64)
    base = one_at_a_time(inputs, bounds, keeps)
    for i, (g, e, b) in enumerate(zip(got, exact, base)):
        factor = 2 if twice else 1
        assert_as_accurate(f"{NAMES[i % 4]} of {i // 4}", g, factor * e, factor * b)


@pytest.mark.parametrize("rank,dropout_p", [(3, 0.0), (3, 0.3), (130, 0.3)])
@pytest.mark.parametrize("op", ["linear", "group", "add"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_packed_batches(dtype, op, rank, dropout_p, backend, device, poisoned):
    case = Case(dtype, rank, op=op, dropout_p=dropout_p, shape=((50,), 70, 66))
    judge(Inputs(case, device), BOUNDS, device)


def test_padded_batches(backend, device, poisoned):
    case = Case(op="group", shape=((5, 9), 40, 24), layout="transposed")
    judge(Inputs(case, device), list(range(0, 46, 9)), device)


def test_second_batch_adds(backend, device):
    judge(Inputs(Case(shape=((50,), 70, 66), dropout_p=0.3), device), BOUNDS, device, twice=True)


@pytest.mark.parametrize("examples", [1, 3])
def test_many_examples_in_rounds(examples, device, poisoned, triton_backend, monkeypatch):
    monkeypatch.setattr(fused, "PARTIAL_BYTES", examples * 16 * 70 * 4)
    inputs = Inputs(Case(op="group", rank=16, dropout_p=0.3, shape=((50,), 70, 66)), device)
    judge(inputs, [0, 7, 8, 8, 20, 33, 49, 50], device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("apart", [False, True])
def test_x_is_read_once_for_projections_that_are_told_together(
    apart, dropout_p, device, poisoned, triton_backend, monkeypatch
):
    reads, gradient = [], fused.gradient
    monkeypatch.setattr(
        fused, "gradient", lambda s, x, **k: reads.append(x.shape[1]) or gradient(s, x, **k)
    )
    inputs = Inputs(Case(op="group", rank=5, dropout_p=dropout_p, shape=((50,), 70, 66)), device)
    judge(inputs, BOUNDS, device, apart=apart)
    assert reads.count(70) == (len(inputs.projections) if apart else 1)


@pytest.mark.parametrize("shape", [((0,), 8, 8), ((1,), 5, 3)], ids=str)
def test_nothing_and_next_to_nothing(shape, backend, device, poisoned):
    judge(Inputs(Case(shape=shape), device), [0, *shape[0]], device)


def test_no_examples(backend, device):
    inputs = Inputs(Case(shape=((0,), 8, 8)), device)
    (sums,) = sums_for(inputs.projections, [0], device)
    score(inputs, [sums], leaves_of(inputs.leaves))
    assert not any(t.any() for t in (sums.a, sums.a_squared, sums.b, sums.b_squared))


def test_dx_is_that_of_training(backend, device):
    inputs = Inputs(Case(op="group", dropout_p=0.3, shape=((50,), 40, 24)), device)
    grads = []
    for scoring in (True, False):
        leaves = leaves_of(inputs.leaves)
        torch.manual_seed(11)
        if scoring:
            score(inputs, sums_for(inputs.projections, BOUNDS, device), leaves)
        else:
            torch.autograd.backward(inputs.op(*leaves), inputs.dys)
        grads.append(leaves[0].grad)
    assert_close("dX", *grads)


def test_x_without_grad(backend, device, poisoned):
    inputs = Inputs(Case(shape=((50,), 40, 24)), device)
    totals = []
    for wanted in (True, False):
        all_sums = sums_for(inputs.projections, BOUNDS, device)
        leaves = leaves_of(inputs.leaves)
        leaves[0].requires_grad_(wanted)
        score(inputs, all_sums, leaves)
        totals.append(all_sums[0])
    for name in ("a", "a_squared", "b", "b_squared"):
        assert torch.equal(*(getattr(t, name) for t in totals))


def test_unused_output_adds_nothing(backend, device, poisoned):
    inputs = Inputs(Case(op="group", shape=((50,), 40, 24)), device)
    all_sums = sums_for(inputs.projections, BOUNDS, device)
    leaves = leaves_of(inputs.leaves)
    group = [
        Projection(p.weight, a, b, p.scale, sums=s)
        for p, a, b, s in zip(inputs.projections, leaves[1::2], leaves[2::2], all_sums)
    ]
    lora_linear_group(leaves[0], group)[1].backward(inputs.dys[1])
    for i, sums in enumerate(all_sums):
        for t in (sums.a, sums.a_squared, sums.b, sums.b_squared):
            assert t.isfinite().all() and bool(t.any()) == (i == 1)
    assert leaves[0].grad.isfinite().all()


class TestErrors:
    def make(self, device):
        x, w, a, b, _ = make(((12,), 7, 9, 3), torch.float32, device)
        return x, w, a.clone().requires_grad_(), b.clone().requires_grad_()

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
