"""Plan d, plain PyTorch for few rows on a GPU, against float64. On a CPU it is made to serve."""

import pytest
import torch
from cases import Case, Inputs, leaves_of, make, plain, saving, three_ways, with_grads
from conftest import DEVICE

from lorapar_kernels import few_rows, lora_linear
from lorapar_kernels.testing import assert_as_accurate

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def serving(monkeypatch):
    """Every call goes to plan d, which only the triton backend leads to."""
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    monkeypatch.setattr(few_rows, "serves", lambda x: True)


@pytest.mark.parametrize("mask", ["none", "empty", "random", "columns", "dead"])
@pytest.mark.parametrize("op", ["linear", "group", "add"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, dropout_p, op, mask, poisoned):
    adapter = torch.float32 if mask != "columns" else None
    inputs = Inputs(Case(dtype, 12, mask, dropout_p, op, adapter=adapter), DEVICE)
    for name, *three in zip(inputs.names(), *three_ways(inputs)):
        assert_as_accurate(name, *three)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_bias(dtype):
    x, w, a, b, bias = make(((300,), 24, 40, 4), dtype, DEVICE, torch.float32)

    def ours(x, bias):
        return lora_linear(x, w, a, b, 2.5, bias=bias)

    def theirs(x, bias):
        return plain(x, w.to(x.dtype), a, b, bias.to(x.dtype), 2.5)

    dy = torch.randn(300, 40, dtype=dtype, device=DEVICE)
    runs = ((ours, None), (theirs, torch.float64), (theirs, None))
    three = [with_grads(f, leaves_of([x, bias.float()], to), dy) for f, to in runs]
    for name, *values in zip(("y", "dX", "dbias"), *three):
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("op", ["linear", "group", "add"])
def test_no_rows(op):
    inputs = Inputs(Case(torch.bfloat16, 8, "random", op=op, shape=((0,), 16, 24)), DEVICE)
    y, dx, *rest = with_grads(inputs.op, leaves_of(inputs.leaves), inputs.dys)
    assert y.shape == (0, 24) and not any(t.any() for t in (dx, *rest))


def test_without_grad_it_gives_the_same_bits():
    inputs = Inputs(Case(torch.bfloat16, 8), DEVICE)
    with_autograd = inputs.op(*leaves_of(inputs.leaves))
    with torch.no_grad():
        without = inputs.op(*inputs.leaves)
    assert all(torch.equal(a.detach(), b) for a, b in zip(with_autograd, without))
    assert not any(y.requires_grad for y in without)


def test_saves_no_copy_of_the_weight_under_autocast():
    x, w = torch.randn(6, 40, device=DEVICE), torch.randn(24, 40, device=DEVICE)
    a, b = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((4, 40), (24, 4)))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, saved = saving(lambda: lora_linear(x, w, a, b, 2.0))
    y.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
    assert not [t for t in saved if t.shape == w.shape and t.dtype == torch.bfloat16]


def test_serves_few_rows_of_16_bit_on_a_gpu_only(monkeypatch):
    monkeypatch.undo()
    x = torch.zeros(few_rows.ROWS, 8, dtype=torch.bfloat16, device=DEVICE)
    assert few_rows.serves(x) == (DEVICE == "cuda")
    assert not few_rows.serves(x.float()) and not few_rows.serves(torch.cat([x, x]))
