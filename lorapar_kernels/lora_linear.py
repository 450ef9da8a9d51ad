"""y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ: a frozen linear layer with its LoRA adapter.

Forward     S  = drop(x) Aᵀ             y = x Wᵀ + bias + scale · S Bᵀ
Backward    dS = scale · dY B           dX = dY W + drop'(dS A), summed over a group
            dA = dSᵀ drop(x)            dB = scale · dYᵀ S         where trainable, else exactly 0

Shapes      x, dX [M, K]   W [N, K]   A, dA [r, K]   B, dB [N, r]   S, dS [M, r]   y, dY [M, N]
Cost        the frozen layer is 2·M·N·K flops forward and as many for dX; the adapter adds
            2·M·r·(K+N) forward, twice that backward, and above all passes over x and dY.

The mathematics is in `reference`; this file holds the autograd function, the public functions and
their checks. Saved for backward: x once a call, S [M, r] a projection, never a copy of W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorapar_kernels import reference
from lorapar_kernels._backend import backend
from lorapar_kernels.importance import ImportanceSums
from lorapar_kernels.mask import LoraMask

MAX_RANK = 512
_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Projection:
    """One linear layer with its adapter, in a group that shares x.

    Args:
        weight: [N, K] frozen.
        lora_a: [r, K]. lora_b: [N, r].
        scale: lora_alpha / r, or what PEFT made of it.
        bias: [N] frozen, or None.
        mask: trainable elements and live columns; None means all.
        sums: where the backward adds importance instead of forming gradients of A and B.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    bias: Tensor | None = None
    mask: LoraMask | None = None
    sums: ImportanceSums | None = None


@dataclass(frozen=True)
class _Static:
    """What one projection passes around the autograd function besides tensors."""

    scale: float
    mask: LoraMask | None
    sums: ImportanceSums | None
    owns_base: bool  # False: the caller made the base output, as in lora_add
    cu_seqlens: Tensor | None  # of `sums`, at the time of the forward


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    mask: LoraMask | None = None,
    dropout_p: float = 0.0,
    sums: ImportanceSums | None = None,
) -> Tensor:
    """A frozen linear layer plus its LoRA adapter. Differentiable in x, lora_a and lora_b.

    Args:
        x: [..., K] in fp16, bf16, fp32 or float64. Under autocast it is cast as F.linear would.
        weight: [N, K] frozen, in x's dtype (any floating dtype under autocast).
        lora_a: [r, K], lora_b: [N, r], r from 1 to 512, in fp16, bf16, fp32 or float64; they are
            cast to x's dtype for the products. Their gradients come in their own dtype.
        scale: lora_alpha / r, a run-time number.
        bias: [N] frozen, or None.
        mask: `LoraMask`. The forward uses frozen elements at their present value and skips dead
            columns; gradients are exact zeros where not trainable.
        dropout_p: share of x's elements dropped on the adapter's input, 0 to below 1. The bits
            follow torch's generator of x's device.
        sums: `ImportanceSums`; if given, the backward adds per-example gradients there and gives
            none to lora_a and lora_b.

    Returns:
        [..., N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError: shapes disagree, the rank or dropout_p is out of range, a frozen tensor
            requires grad, or `sums` has no examples set.
        TypeError: dtypes that cannot be combined.
    """
    projection = Projection(weight, lora_a, lora_b, scale, bias, mask, sums)
    return lora_linear_group(x, (projection,), dropout_p=dropout_p)[0]


def lora_linear_group(
    x: Tensor, projections: Sequence[Projection], *, dropout_p: float = 0.0
) -> tuple[Tensor, ...]:
    """Several `lora_linear` layers of one x (q, k, v or gate, up), with one dX.

    Args:
        x: [..., K], as in `lora_linear`.
        projections: one or more. Each draws its own dropout bits.
        dropout_p: as in `lora_linear`.

    Returns:
        One [..., N_i] per projection, in order.

    Raises:
        As `lora_linear`; ValueError without projections.
    """
    if not projections:
        raise ValueError("lora_linear_group: got no projections")
    x = x.to(_compute_dtype(x))
    for p in projections:
        _check("lora_linear", x, p.lora_a, p.lora_b, p.mask, p.sums, dropout_p)
        _check_base(x, p)
    static = tuple(_Static(float(p.scale), p.mask, p.sums, True, _cu(p.sums)) for p in projections)
    tensors = [t for p in projections for t in (p.weight, p.bias, p.lora_a, p.lora_b)]
    seed = _draw_seed(x, dropout_p)
    outputs = _Lora.apply(x.reshape(-1, x.shape[-1]), dropout_p, seed, static, *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def lora_add(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    mask: LoraMask | None = None,
    dropout_p: float = 0.0,
    sums: ImportanceSums | None = None,
) -> Tensor:
    """Adds a LoRA adapter to an output made elsewhere, such as that of a quantised layer.

    Args:
        base: [..., N] the base layer's output for x.
        x: [..., K] and the rest as in `lora_linear`.

    Returns:
        A new tensor of base's shape and dtype. Differentiable in base, x, lora_a and lora_b.

    Raises:
        As `lora_linear`.
    """
    x = x.to(_compute_dtype(x))
    _check("lora_add", x, lora_a, lora_b, mask, sums, dropout_p)
    if base.shape != (*x.shape[:-1], lora_b.shape[0]):
        raise ValueError(
            f"lora_add: base is {list(base.shape)}, expected {[*x.shape[:-1], lora_b.shape[0]]} "
            f"from x {list(x.shape)} and lora_b {list(lora_b.shape)}"
        )
    static = (_Static(float(scale), mask, sums, False, _cu(sums)),)
    seed = _draw_seed(x, dropout_p)
    rows = (x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1]))
    (y,) = _Lora.apply(rows[0], dropout_p, seed, static, rows[1], None, lora_a, lora_b)
    return y.view(base.shape)


class _Lora(torch.autograd.Function):
    """All projections of one x. Tensors come four a projection: weight or base, bias, A, B."""

    @staticmethod
    def forward(ctx, x, dropout_p, seed, static, *tensors):
        outputs, activations = [], []
        ctx.set_materialize_grads(False)
        with torch.autocast(x.device.type, enabled=False):
            for i, st in enumerate(static):
                weight_or_base, bias, a, b = tensors[4 * i : 4 * i + 4]
                keep = reference.dropout_keep(x, dropout_p, seed, i)
                live_a, live_b = _live(st.mask, a, b)
                s = reference.lora_delta(x, live_a, keep)  # [M, live r]
                if st.owns_base:
                    y = reference.lora_linear(x, weight_or_base, bias, s, live_b, st.scale)
                else:
                    y = reference.lora_add(weight_or_base, s, live_b, st.scale)
                outputs.append(y)
                trains_b = ctx.needs_input_grad[4 + 4 * i + 3] and (
                    st.mask is None or st.mask.trains_b
                )
                activations.append(s if trains_b or st.sums is not None else None)
        weights = [tensors[4 * i] if st.owns_base else None for i, st in enumerate(static)]
        adapters = [t for i in range(len(static)) for t in tensors[4 * i + 2 : 4 * i + 4]]
        ctx.save_for_backward(x, seed, *weights, *adapters, *activations)
        ctx.dropout_p, ctx.static = dropout_p, static
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        n = len(ctx.static)
        x, seed, *saved = ctx.saved_tensors
        weights, adapters, activations = saved[:n], saved[n : 3 * n], saved[3 * n :]
        dx, grads = None, []
        with torch.autocast(x.device.type, enabled=False):
            for i, (st, dy) in enumerate(zip(ctx.static, dys)):
                need_w, _, need_a, need_b = ctx.needs_input_grad[4 + 4 * i : 8 + 4 * i]
                need = (ctx.needs_input_grad[0], need_a, need_b)
                if dy is None:  # this output was not used
                    grads += [None] * 4
                    continue
                keep = reference.dropout_keep(x, ctx.dropout_p, seed, i)
                a, b = adapters[2 * i : 2 * i + 2]
                part, da, db = _backward(st, need, dy, x, keep, weights[i], a, b, activations[i])
                if part is not None:
                    dx = part if dx is None else dx + part
                grads += [dy if need_w else None, None, da, db]
        return dx, None, None, None, *grads


def _backward(st, need, dy, x, keep, weight, a, b, s):
    """dX, dA and dB of one projection; None where not needed."""
    need_x, need_a, need_b = need
    mask, dy = st.mask, dy.to(x.dtype)
    live_a, live_b = _live(mask, a, b)
    trains_a, trains_b = (True, True) if mask is None else (mask.trains_a, mask.trains_b)
    dx = da = db = ds = None
    if need_x or (need_a and trains_a) or st.sums is not None:
        ds = reference.lora_ds(dy, live_b, st.scale)  # [M, live r]
    if need_x:
        dx = reference.lora_dx(ds, live_a, keep)
        if weight is not None:
            dx = torch.addmm(dx, dy, weight.to(dy.dtype))
    if st.sums is not None:
        st.sums.add(st.cu_seqlens, ds, x, keep, dy, s, st.scale)
        return dx, None, None
    if need_a and not trains_a:
        da = torch.zeros_like(a)
    elif need_a:
        da = _gradient(reference.lora_da(ds, x, keep), a, 0, mask, mask and mask.a)
    if need_b and not trains_b:
        db = torch.zeros_like(b)
    elif need_b:
        db = _gradient(reference.lora_db(dy, s, st.scale), b, 1, mask, mask and mask.b)
    return dx, da, db


def _live(mask: LoraMask | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B without their dead columns."""
    if mask is None or mask.live is None:
        return a, b
    columns = mask.live_columns
    return a.index_select(0, columns), b.index_select(1, columns)


def _gradient(
    grad: Tensor, like: Tensor, rank_dim: int, mask: LoraMask | None, trainable: Tensor | None
) -> Tensor:
    """`grad` of the live columns in the shape and dtype of `like`, exact zeros where frozen."""
    grad = grad.to(like.dtype)
    if mask is not None and mask.live is not None:
        grad = torch.zeros_like(like).index_copy_(rank_dim, mask.live_columns.long(), grad)
    return grad if trainable is None else grad.where(trainable, 0)


def _draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """One int64 from the generator of x's device, so that checkpointing draws the same again."""
    if dropout_p == 0.0:
        return None
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)


def _cu(sums: ImportanceSums | None) -> Tensor | None:
    return None if sums is None else sums.cu_seqlens


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if x.dtype != torch.float64 and x.is_floating_point() and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _check(op, x, lora_a, lora_b, mask, sums, dropout_p) -> None:
    backend()
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"{op}: lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} disagree; expected "
            f"lora_a [r, K] and lora_b [N, r]"
        )
    if x.dim() < 1 or x.shape[-1] != lora_a.shape[1]:
        raise ValueError(
            f"{op}: x {list(x.shape)} and lora_a {list(lora_a.shape)} disagree; expected "
            f"x [..., K] and lora_a [r, K]"
        )
    if not 1 <= lora_a.shape[0] <= MAX_RANK:
        raise ValueError(f"{op}: rank {lora_a.shape[0]} is outside 1 to {MAX_RANK}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), got {dropout_p}")
    if x.dtype not in _COMPUTE_DTYPES:
        raise TypeError(f"{op}: x must be fp16, bf16, fp32 or float64, got {x.dtype}")
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dtype not in _COMPUTE_DTYPES:
            raise TypeError(f"{op}: {name} must be fp16, bf16, fp32 or float64, got {t.dtype}")
    if mask is not None:
        mask.check(lora_a, lora_b)
    if sums is not None:
        if sums.cu_seqlens is None:
            raise ValueError(
                f"{op}: sums has no examples yet; call sums.examples(cu_seqlens) first"
            )
        if mask is not None and mask.live is not None:
            raise ValueError(f"{op}: score importance without dead columns; got sums and mask.live")
        if torch.is_grad_enabled() and not (lora_a.requires_grad or lora_b.requires_grad):
            raise ValueError(
                f"{op}: sums are filled in the backward; lora_a or lora_b must require grad for it"
            )


def _check_base(x: Tensor, p: Projection) -> None:
    op, weight, bias = "lora_linear", p.weight, p.bias
    expected = (p.lora_b.shape[0], x.shape[-1])
    if weight.shape != expected:
        raise ValueError(
            f"{op}: weight is {list(weight.shape)}, expected {list(expected)} from x "
            f"{list(x.shape)} and lora_b {list(p.lora_b.shape)}"
        )
    if bias is not None and bias.shape != expected[:1]:
        raise ValueError(f"{op}: bias is {list(bias.shape)}, expected {list(expected[:1])}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but this op treats the base as frozen; use "
                f"lora_add(F.linear(x, weight, bias), x, ...) to train it"
            )
        if t.dtype != x.dtype and not (autocast and t.is_floating_point()):
            raise TypeError(
                f"{op}: {name} is {t.dtype} and x is {x.dtype}; cast one of them, or run under "
                f"torch.autocast"
            )
