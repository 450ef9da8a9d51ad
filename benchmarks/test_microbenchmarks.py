"""The same pieces under pytest-benchmark: `make bench`."""

import pytest
import torch

from lorapar_kernels import MaskedAdamW, lora_linear, select_by_mass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def finish(value):
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return value


@pytest.mark.parametrize("r", [8, 64])
def test_lora_linear(benchmark, r):
    x, w = torch.randn(512, 1024, device=DEVICE), torch.randn(1024, 1024, device=DEVICE)
    a = torch.randn(r, 1024, device=DEVICE, requires_grad=True)
    b = torch.randn(1024, r, device=DEVICE, requires_grad=True)
    x.requires_grad_()
    dy = torch.randn(512, 1024, device=DEVICE)

    def step():
        return finish(torch.autograd.grad(lora_linear(x, w, a, b, 2.0), (x, a, b), dy))

    assert [g.shape for g in benchmark(step)] == [x.shape, a.shape, b.shape]


def test_select_by_mass(benchmark):
    scores = [torch.rand(8, 4096, device=DEVICE).square() for _ in range(64)]
    masks = benchmark(lambda: finish(select_by_mass(scores, 0.9)))
    kept = sum(s[m].double().sum() for s, m in zip(scores, masks))
    assert kept >= 0.9 * sum(s.double().sum() for s in scores)


def test_masked_adamw(benchmark):
    named = [(f"p{i}", torch.nn.Parameter(torch.randn(8, 4096, device=DEVICE))) for i in range(16)]
    masks = {n: torch.rand(p.shape, device=DEVICE) < 0.4 for n, p in named}
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimiser = MaskedAdamW(named, masks)
    benchmark(lambda: finish(optimiser.step()))
    assert all(optimiser.state[p]["exp_avg"].numel() == int(masks[n].sum()) for n, p in named)
