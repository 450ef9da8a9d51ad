"""Plan d: few rows on a GPU, where the host's time counts: the fewest launches of plain PyTorch.

Forward     S = drop(x) Aᵀ        y = x Wᵀ + bias + scale · S Bᵀ
Backward    dS = scale · dY B     dX = drop'(dS A) + dY W
            dA = dSᵀ drop(x)      dB = scale · dYᵀ S          where trainable, else exactly 0

Cost        7 launches forward and 8 backward with fp32 adapters. A 4096² layer takes a fast GPU
            0.1 ms for 1024 rows, and a step of this size is bound by the host whatever the kernels.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lorapar_kernels.reference import bias_gradient

ROWS = 1024


def serves(x: Tensor) -> bool:
    """Whether x [..., K] has few rows and stands on a GPU in a 16-bit dtype. Not where a compiler
    takes the host's time away: there kernels that share more are faster."""
    few = x.is_cuda and x.element_size() == 2 and x.numel() <= ROWS * x.shape[-1]
    return few and not torch.compiler.is_compiling()


def forward(x, base, bias, lora_a, lora_b, dropout_p, static) -> tuple[Tensor, ...]:
    """y, what was kept of x, S, and A and B in the compute dtype."""
    dropped, kept = x, None
    if dropout_p > 0.0:
        dropped, kept = torch.native_dropout(x, dropout_p, True)
    a, b = _compute_copies(x, lora_a, lora_b, static.mask)
    s = linear(dropped, a)
    if static.owns_base:
        y = linear(x, _as(x, base), None if bias is None else _as(x, bias))
        y.addmm_(s, b.t(), alpha=static.scale)
    else:
        y = _add(base, s, b, static.scale)
    return y, kept, s, a, b


def call(x, base, bias, lora_a, lora_b, dropout_p, static) -> Tensor:
    """One projection's output; without autograd where nothing is recorded."""
    arguments = (x, base, bias, lora_a, lora_b, dropout_p, static)
    return FewRowsLora.apply(*arguments) if torch.is_grad_enabled() else forward(*arguments)[0]


class FewRowsLora(torch.autograd.Function):
    """One projection. Saved: x, the mask of dropout (a byte an element), S, A and B as computed."""

    @staticmethod
    def forward(ctx, x, base, bias, lora_a, lora_b, dropout_p, static):
        y, kept, s, a, b = forward(x, base, bias, lora_a, lora_b, dropout_p, static)
        *_, need_a, need_b, _, _ = ctx.needs_input_grad
        mask = static.mask
        trains_a = need_a and (mask is None or mask.trains_a)
        trains_b = need_b and (mask is None or mask.trains_b)
        ctx.save_for_backward(
            x if trains_a else None, s if trains_b else None,
            kept if trains_a or ctx.needs_input_grad[0] else None, a, b,
            base if static.owns_base else None, lora_a, lora_b,
        )  # fmt: skip
        ctx.dropout_p, ctx.static, ctx.trains = dropout_p, static, (trains_a, trains_b)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, kept, a, b, weight, lora_a, lora_b = ctx.saved_tensors
        need_x, need_base, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        (trains_a, trains_b), static = ctx.trains, ctx.static
        base_grad = dy if need_base else None
        dbias = bias_gradient(dy, ctx.bias_dtype) if need_bias else None
        dy, dx, da, db = dy.to(a.dtype), None, None, None
        if need_x or trains_a:
            ds = (dy @ b).mul_(static.scale)
        if need_x:
            dx = ds @ a
            dx = _drop(dx, kept, ctx.dropout_p)
            if weight is not None:
                dx.addmm_(dy, weight.to(dy.dtype))
        if need_a:
            left, right = (ds.t(), _drop(x, kept, ctx.dropout_p)) if trains_a else (None, None)
            da = _gradient(left, right, lora_a, static.mask, 0)
        if need_b:
            db = _gradient(dy.t() if trains_b else None, s, lora_b, static.mask, 1, static.scale)
        return dx, base_grad, dbias, da, db, None, None


def _drop(t: Tensor, kept: Tensor | None, p: float) -> Tensor:
    """t where it was kept, over 1-p; else 0."""
    if kept is None:
        return t
    return torch.ops.aten.native_dropout_backward(t, kept, 1.0 / (1.0 - p))


def _compute_copies(x, lora_a, lora_b, mask) -> tuple[Tensor, Tensor]:
    """A and B in x's dtype, live columns only."""
    if mask is not None and mask.live is not None:
        lora_a = lora_a.index_select(0, mask.live_columns)
        lora_b = lora_b.index_select(1, mask.live_columns)
    return _as(x, lora_a), _as(x, lora_b)


def _as(x: Tensor, t: Tensor) -> Tensor:
    """t in x's dtype. `to` costs the host 1 µs even where it does nothing."""
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _add(base: Tensor, s: Tensor, b: Tensor, scale: float) -> Tensor:
    if base.dtype == s.dtype:
        return torch.addmm(base, s, b.t(), alpha=scale)
    return base + (s @ b.t()).mul_(scale).to(base.dtype)


def _gradient(left, right, like, mask, rank_dim, scale=1.0) -> Tensor:
    """left · right from fp32 accumulators, in the shape and dtype of `like`, zeros where frozen."""
    if left is None or left.numel() == 0:
        return torch.zeros_like(like)
    if left.is_cuda:
        grad = torch.mm(left, right, out_dtype=torch.float32)
    else:  # has no out_dtype
        grad = left.float() @ right.float()
    if scale != 1.0:
        grad = grad.mul_(scale)
    grad = grad.to(like.dtype)
    if mask is None:
        return grad
    if mask.live is not None:
        whole = torch.zeros_like(like)
        grad = whole.index_copy_(rank_dim, mask.live_columns.long(), grad)
    trainable = mask.b if rank_dim else mask.a
    return grad if trainable is None else grad.where(trainable, 0)
