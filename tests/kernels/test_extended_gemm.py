"""The base GEMM whose sum runs on over the rank: alone, and under the ops."""

from dataclasses import replace

import pytest
import torch
from cases import DROPOUT, Case, Inputs, bits_of, decoded, guarded, saving, three_ways
from conftest import DEVICE
from test_fused import judge
from torch.nn.functional import linear

from lorapar_kernels import LoraMask, extended_gemm, lora_linear
from lorapar_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)
DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# (M, N, K): one tile, less, several groups of rows, a row, two words of dropout bits a lane
SHAPES = [(32, 128, 32), (7, 8, 16), (133, 264, 40), (1, 136, 24), (9, 1096, 16)]


def some_bits(M: int, N: int, device) -> torch.Tensor:
    """Dropout bits of an x [M, N], as the ops draw them."""
    x = torch.ones(M, N, dtype=torch.float16, device=device, requires_grad=True)
    a, b, w = (torch.zeros(s, dtype=x.dtype, device=device) for s in ((2, N), (8, 2), (8, N)))
    _, saved = saving(lambda x: lora_linear(x, w, a, b, 1.0, dropout_p=0.4), x)
    return bits_of(saved, x)


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("R", [8, 16, 48, 192])
@pytest.mark.parametrize("transposed", [True, False], ids=["y", "dX"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, shape, transposed, R, dropout, device, poisoned, triton_backend):
    """Without a bias where with dropout."""
    M, N, K = shape
    x = guarded(torch.randn(M, K, dtype=dtype, device=device))
    w = torch.randn(*((N, K) if transposed else (K, N)), dtype=dtype, device=device)
    w = guarded(w / K**0.5)
    live = R - 3
    s, a = torch.randn(M, R, dtype=dtype, device=device), torch.randn(R, N, device=device)
    s[:, live:] = 0.0 if R <= 16 else torch.nan
    a[live:] = 0.0
    s, a = guarded(s), guarded(a.to(dtype) / R**0.5)
    bias = guarded(torch.randn(N, dtype=dtype, device=device)) if not dropout else None
    bits = some_bits(M, N, device) if dropout else None
    out = guarded(torch.full((M, N), torch.nan, dtype=dtype, device=device))
    extended_gemm.extended_gemm(
        x, w, s, a, out, transposed=transposed, live=live, bias=bias, bits=bits
    )

    def plain(to):
        total = linear(x.to(to), w.to(to) if transposed else w.to(to).t())
        kept = torch.ones(M, N, device=device) if bits is None else decoded(bits, N)[0]
        total = total + (s[:, :live].to(to) @ a[:live].to(to)) * kept.to(to)
        return total if bias is None else total + bias.to(to)

    assert_as_accurate("out", out, plain(torch.float64), plain(dtype))
    out.fill_(torch.nan)
    assert out._base.isnan().all(), "wrote outside the matrix"


@pytest.mark.parametrize("mask", ["none", "dead"])
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("op", ["linear", "group"])
def test_under_the_ops(op, dropout_p, mask, device, poisoned, triton_backend, monkeypatch):
    monkeypatch.setattr(extended_gemm, "wins", lambda *arguments, **options: True)
    shape = ((45,), 72, 64)
    judge(Case(torch.float16, 12, mask, dropout_p, op, shape, None, "contiguous", step=8), device)


def test_a_projection_of_a_group_without_live_columns(
    device, poisoned, triton_backend, monkeypatch
):
    monkeypatch.setattr(extended_gemm, "wins", lambda *arguments, **options: True)
    case = Case(torch.float16, 48, op="group", shape=((45,), 72, 64), layout="contiguous", step=8)
    inputs = Inputs(case, device)
    for i, dead in enumerate((0, 48, 5)):
        p = inputs.projections[i]
        live = torch.arange(len(p.lora_a), device=device) >= dead
        mask = LoraMask(live[:, None].expand_as(p.lora_a), live.expand_as(p.lora_b), live=live)
        inputs.projections[i] = replace(p, mask=mask)
    for name, *three in zip(inputs.names(), *three_ways(inputs)):
        assert_as_accurate(name, *three)
