"""What every op computes, in plain PyTorch. Clear, not fast; any device, float64 included.

y  = x Wᵀ + bias + scale · S Bᵀ        S  = drop(x) Aᵀ
dX = dY W + drop'(dS A)                dS = scale · dY B
dA = dSᵀ drop(x)                       dB = scale · dYᵀ S         dbias = Σ_m dY

x: [M, K]   W: [N, K]   A: [r, K]   B: [N, r]   S, dS: [M, r]   y, dY: [M, N]
`keep` [M, K], fp32 or wider, holds 0 for a dropped element of x and 1/(1-p) for a kept one; None
means p = 0.
Products are made in x's dtype, except dA and dB, which come from fp32 sums in the dtype of A and B.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorapar_kernels import dropout


def dropout_keep(x: Tensor, p: float, seed: Tensor | None, projection: int = 0) -> Tensor | None:
    """The multipliers of x for one projection of a group: a pure function of `seed` [1] int64."""
    if p == 0.0:
        return None
    return _draw(x, p, seed, projection).mul_(1.0 / (1.0 - p))


@torch.library.custom_op("lorapar::reference_dropout_keep", mutates_args=())
def _draw(x: Tensor, p: float, seed: Tensor, projection: int) -> Tensor:
    """An op of its own, because it reads the seed on the host, which a compiled graph cannot."""
    if x.is_cuda:  # the kernels' own bits, drawn without reading the seed on the host
        out = _draw_fake(x, p, seed, projection)
        dropout.keep(out, p, seed, projection)
        return out
    generator = torch.Generator(x.device).manual_seed(int(seed) + projection)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return kept.to(_wide_dtype(x))


@_draw.register_fake
def _draw_fake(x: Tensor, p: float, seed: Tensor, projection: int) -> Tensor:
    return torch.empty(x.shape, dtype=_wide_dtype(x), device=x.device)


def dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """drop(x), and drop' of a gradient."""
    return x if keep is None else (x * keep).to(x.dtype)


def lora_delta(x: Tensor, a: Tensor, keep: Tensor | None) -> Tensor:
    """S = drop(x) Aᵀ   [M, r]"""
    return dropped(x, keep) @ a.to(x.dtype).T


def lora_add(base: Tensor, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """y = base + scale · S Bᵀ   [M, N], in base's dtype"""
    if base.dtype == s.dtype:
        return torch.addmm(base, s, b.to(s.dtype).T, alpha=scale)
    return base + (scale * (s @ b.to(s.dtype).T)).to(base.dtype)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float
) -> Tensor:
    """y = x Wᵀ + bias + scale · S Bᵀ   [M, N]"""
    base = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return lora_add(base, s, b, scale)


def lora_ds(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """dS = scale · dY B   [M, r], rounded once"""
    return torch.addmm(dy.new_zeros(()), dy, b.to(dy.dtype), beta=0, alpha=scale)


def lora_dx(ds: Tensor, a: Tensor, keep: Tensor | None) -> Tensor:
    """drop'(dS A)   [M, K]: the adapter's part of dX"""
    return dropped(ds @ a.to(ds.dtype), keep)


def lora_da(ds: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
    """dA = dSᵀ drop(x)   [r, K], in fp32 or wider"""
    return _wide(ds).T @ _wide(dropped(x, keep))


def lora_db(dy: Tensor, s: Tensor, scale: float) -> Tensor:
    """dB = scale · dYᵀ S   [N, r], in fp32 or wider"""
    return scale * (_wide(dy).T @ _wide(s))


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dbias = Σ_m dY   [N], summed in fp32 or wider"""
    return dy.sum(0, dtype=_wide_dtype(dy)).to(dtype)


def _wide(t: Tensor) -> Tensor:
    return t.to(_wide_dtype(t))


def _wide_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
