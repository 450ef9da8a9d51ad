"""The autograd function of the reference backend: any device, float64 included, no speed."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorapar_kernels import reference
from lorapar_kernels.mask import LoraMask


class ReferenceLora(torch.autograd.Function):
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
        ctx.bias_dtypes = [None if t is None else t.dtype for t in tensors[1::4]]
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
                need_w, need_bias, need_a, need_b = ctx.needs_input_grad[4 + 4 * i : 8 + 4 * i]
                need = (ctx.needs_input_grad[0], need_a, need_b)
                if dy is None:  # this output was not used
                    grads += [None] * 4
                    continue
                keep = reference.dropout_keep(x, ctx.dropout_p, seed, i)
                a, b = adapters[2 * i : 2 * i + 2]
                part, da, db = _backward(st, need, dy, x, keep, weights[i], a, b, activations[i])
                if part is not None:
                    dx = part if dx is None else dx + part
                dbias = reference.bias_gradient(dy, ctx.bias_dtypes[i]) if need_bias else None
                grads += [dy if need_w else None, dbias, da, db]
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
