"""The autograd function over the raw ops of `fused`, or the extension's, for all projections of one
x. Eager calls on the extension take the node in csrc/function.cpp."""

import torch
from torch.autograd.function import once_differentiable

from lorapar_kernels.fused import (
    MASK_FIELDS,
    live_columns,
    lora_backward,
    lora_backward_sums,
    lora_forward,
    lora_kept,
    lora_outputs,
    shapes_of,
)
from lorapar_kernels.reference import bias_gradient


def recomputed(x, dropout_p, seed, static, *tensors) -> tuple[torch.Tensor, ...] | None:
    """The outputs of one projection for a call whose saved tensors go through hooks, as under a
    checkpoint that is not reentrant; None for any other call.

    Such a checkpoint stops recomputing as soon as it has what was saved. So it is saved before the
    base GEMM: where this layer is the last of the checkpoint (down_proj), the GEMM runs once only.
    """
    (st,) = static
    if not st.owns_base or st.extension or not torch.is_grad_enabled() or _hooks(True) is None:
        return None
    if not any(t is not None and t.requires_grad for t in (x, *tensors)):
        return None
    place, kept = _Gradients.apply(x, dropout_p, seed, static, *tensors)
    weight, bias, a, b = tensors
    live = None if st.mask is None else st.mask.live_columns
    sizes = ([b.shape[0]], live_columns([a], [live]))
    bias = None if bias is None else bias.detach()
    return (_Output.apply(place, x.detach(), kept, weight, bias, sizes, dropout_p),)


_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _arguments(x, static, tensors):
    """x, bases, biases, A, B, live columns and scales, as the raw forward takes them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    bases, biases, a, b = (list(tensors[i::4]) for i in range(4))
    live = [None if st.mask is None else st.mask.live_columns for st in static]
    if not static[0].owns_base:  # cuBLAS takes a weight in any strides, the kernels rows of a base
        bases = [t if t.stride(-1) == 1 else t.contiguous() for t in bases]
    biases = [None if t is None else t.contiguous() for t in biases]
    return x, bases, biases, a, b, live, [st.scale for st in static]


def _save(ctx, x, bases, biases, a, b, live, dropout_p, static, kept) -> None:
    """What the backward needs, for a Function whose tensors begin with its fifth input."""
    ctx.set_materialize_grads(False)
    need, masks = ctx.needs_input_grad[4:], [st.mask for st in static]
    trains_a = static[0].sums is not None or any(
        n and (m is None or m.trains_a) for n, m in zip(need[2::4], masks)
    )
    weights = bases if static[0].owns_base else ()
    ctx.save_for_backward(x if trains_a else None, kept, *weights)
    ctx.adapters = shapes_of(a, b)
    ctx.dropout_p, ctx.static, ctx.live = dropout_p, static, live_columns(a, live)
    ctx.bias_dtypes = [None if t is None else t.dtype for t in biases]


class FusedLora(torch.autograd.Function):
    """All projections of one x. Tensors come four a projection: weight or base, bias, A, B.

    Saved: x where A trains, `kept` (S, the dropout bits, A and B packed in the compute dtype), and
    references to W.
    """

    @staticmethod
    def forward(ctx, x, dropout_p, seed, static, *tensors):
        owns_base = static[0].owns_base
        x, bases, biases, a, b, live, scales = _arguments(x, static, tensors)
        forward = torch.ops.lorapar_cuda.lora_forward if static[0].extension else lora_forward
        *ys, kept = forward(x, bases, biases, a, b, live, scales, seed, dropout_p, owns_base)
        _save(ctx, x, bases, biases, a, b, live, dropout_p, static, kept)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        static, P = ctx.static, len(ctx.static)
        dys = dys[:P]
        grads = [None] * (4 + 4 * P)
        if all(dy is None for dy in dys):
            return tuple(grads)
        x, kept, *weights = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        scales = [st.scale for st in static]
        if static[0].sums is not None:
            totals = [st.sums for st in static]
            sums = [t for u in totals for t in (u.a, u.a_squared, u.b, u.b_squared)]
            bounds = [st.cu_seqlens for st in static]
            backward = lora_backward_sums
            if static[0].extension:
                backward = torch.ops.lorapar_cuda.lora_backward_sums
            dx = backward(
                x,
                dys,
                weights,
                ctx.adapters,
                sums,
                bounds,
                ctx.live,
                kept,
                scales,
                ctx.dropout_p,
                need_x,
            )
        else:
            masks = [
                t
                for st in static
                for t in (st.mask.tensors if st.mask is not None else [None] * MASK_FIELDS)
            ]
            # An output that was not used gives its adapter no gradient at all.
            need_a, need_b = (
                [n and dy is not None for n, dy in zip(need[k::4], dys)] for k in (2, 3)
            )
            backward = lora_backward
            if static[0].extension:
                backward = torch.ops.lorapar_cuda.lora_backward
            dx, *found = backward(
                x, dys, weights, ctx.adapters, masks, ctx.live, kept, scales, ctx.dropout_p, need_x,
                need_a, need_b,
            )  # fmt: skip
            for i in range(P):
                grads[6 + 4 * i] = found[i] if need_a[i] else None
                grads[7 + 4 * i] = found[P + i] if need_b[i] else None
        grads[0] = dx if need_x else None
        for i, dy in enumerate(dys):
            if need[4 * i] and not static[i].owns_base:
                grads[4 + 4 * i] = dy
            if need[1 + 4 * i] and dy is not None:
                grads[5 + 4 * i] = bias_gradient(dy, ctx.bias_dtypes[i])
        return tuple(grads)


class _Gradients(FusedLora):
    """One projection but for its output: a place [M, N] without memory, to which `_Output` gives
    the gradient of y, and `kept`."""

    @staticmethod
    def forward(ctx, x, dropout_p, seed, static, *tensors):
        x, bases, biases, a, b, live, scales = _arguments(x, static, tensors)
        kept = lora_kept(x, a, b, live, scales, seed, dropout_p)
        _save(ctx, x, bases, biases, a, b, live, dropout_p, static, kept)
        ctx.mark_non_differentiable(kept)
        return x.new_empty(1, 1).expand(x.shape[0], b[0].shape[0]), kept


class _Output(torch.autograd.Function):
    """y of one projection from what `_Gradients` kept. Saves nothing."""

    @staticmethod
    def forward(ctx, place, x, kept, weight, bias, sizes, dropout_p):
        x = x if x.stride(-1) == 1 else x.contiguous()
        bias = None if bias is None else bias.contiguous()
        return lora_outputs(x, [weight], [bias], *sizes, kept, dropout_p)[0]

    @staticmethod
    def backward(ctx, dy):
        return (dy, *[None] * 6)
