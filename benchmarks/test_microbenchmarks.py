"""The pieces under pytest-benchmark, host cost included: `make bench`. Large on a GPU alone."""

import pytest
import torch

from lorapar_kernels import (
    LoraMask,
    MaskedAdamW,
    Projection,
    lora_add,
    lora_linear,
    lora_linear_group,
    select_by_mass,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"
DTYPE = torch.bfloat16 if LARGE else torch.float32
M, K = (2048, 4096) if LARGE else (128, 256)
N = (4096, 11008) if LARGE else (256, 384)
SCALE = 2.0


def finish(value):
    if LARGE:
        torch.cuda.synchronize()
    return value


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def adapter(n: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 A [r, K] and B [n, r]."""
    a, b = randn(r, K, dtype=torch.float32), randn(n, r, dtype=torch.float32)
    return (a / K**0.5).requires_grad_(), (b / r**0.5).requires_grad_()


def run(benchmark, forward, leaves, dys):
    """Times forward and backward; the gradients have the shapes of the leaves and are finite."""
    grads = benchmark(lambda: finish(torch.autograd.grad(forward(), leaves, dys)))
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("r", [8, 64])
def test_lora_linear(benchmark, r, p):
    x, w, (a, b) = randn(M, K).requires_grad_(), randn(N[0], K), adapter(N[0], r)
    run(benchmark, lambda: lora_linear(x, w, a, b, SCALE, dropout_p=p), (x, a, b), randn(M, N[0]))


def test_lora_linear_masked(benchmark):
    """Four of ten rank columns live and trained."""
    r = 64
    x, w, (a, b) = randn(M, K).requires_grad_(), randn(N[0], K), adapter(N[0], r)
    live = torch.arange(r, device=DEVICE) % 5 < 2
    mask = LoraMask(live[:, None].expand(r, K), live.expand(N[0], r), live=live)
    run(benchmark, lambda: lora_linear(x, w, a, b, SCALE, mask=mask), (x, a, b), randn(M, N[0]))


@pytest.mark.parametrize("widths", [(N[0],) * 3, (N[1],) * 2], ids=["qkv", "gate_up"])
def test_lora_linear_group(benchmark, widths):
    x, adapters = randn(M, K).requires_grad_(), [adapter(n, 8) for n in widths]
    group = [Projection(randn(n, K), a, b, SCALE) for n, (a, b) in zip(widths, adapters)]
    leaves = (x, *(t for ab in adapters for t in ab))
    run(
        benchmark,
        lambda: lora_linear_group(x, group, dropout_p=0.05),
        leaves,
        [randn(M, n) for n in widths],
    )


def test_lora_add(benchmark):
    x, base = randn(M, K).requires_grad_(), randn(M, N[0]).requires_grad_()
    a, b = adapter(N[0], 8)
    run(benchmark, lambda: lora_add(base, x, a, b, SCALE), (base, x, a, b), randn(M, N[0]))


def test_select_by_mass(benchmark):
    scores = [torch.rand(8, 4096, device=DEVICE).square() for _ in range(512 if LARGE else 64)]
    masks = benchmark(lambda: finish(select_by_mass(scores, 0.9)))
    kept = sum(s[m].double().sum() for s, m in zip(scores, masks))
    assert kept >= 0.9 * sum(s.double().sum() for s in scores)


def test_masked_adamw(benchmark):
    count = 384 if LARGE else 16
    tensors = [torch.randn(8, 4096, device=DEVICE) for _ in range(count)]
    named = [(f"p{i}", torch.nn.Parameter(t)) for i, t in enumerate(tensors)]
    masks = {n: torch.rand(p.shape, device=DEVICE) < 0.4 for n, p in named}
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimiser = MaskedAdamW(named, masks)
    benchmark(lambda: finish(optimiser.step()))
    assert all(optimiser.state[p]["exp_avg"].numel() == int(masks[n].sum()) for n, p in named)
