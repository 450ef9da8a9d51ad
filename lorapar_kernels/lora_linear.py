"""y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ: a frozen linear layer with its LoRA adapter.

Forward     S  = drop(x) Aᵀ             y = x Wᵀ + bias + scale · S Bᵀ
Backward    dS = scale · dY B           dX = dY W + drop'(dS A), summed over a group
            dA = dSᵀ drop(x)            dB = scale · dYᵀ S         where trainable, else exactly 0
            dbias = Σ_m dY

Shapes      x, dX [M, K]   W [N, K]   A, dA [r, K]   B, dB [N, r]   S, dS [M, r]   y, dY [M, N]
Cost        the frozen layer is 2·M·N·K flops forward and as many for dX; the adapter adds
            2·M·r·(K+N) forward, twice that backward, and above all passes over x and dY.

The mathematics is in `reference`; the kernels are put together in `fused`, or in csrc/ops.cpp; this
file holds the public functions and their checks. The extension makes these by itself in an eager
call: where it gives None, they find what is wrong, or another backend serves.
Saved for backward: x once a call, S [M, r] a projection, dropout's bits (a byte an element in plan
d, `few_rows`), never a copy of W.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorapar_kernels import extension, few_rows
from lorapar_kernels._backend import backend
from lorapar_kernels.fused_function import FusedLora, recomputed
from lorapar_kernels.importance import ImportanceSums
from lorapar_kernels.mask import LoraMask
from lorapar_kernels.reference_function import ReferenceLora

MAX_RANK = 512
_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Projection:
    """One linear layer with its adapter, in a group that shares x.

    Args:
        weight: [N, K] frozen.
        lora_a: [r, K]. lora_b: [N, r].
        scale: lora_alpha / r, or what PEFT made of it.
        bias: [N], or None.
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


class _Static(NamedTuple):
    """What one projection passes around the autograd function besides tensors."""

    scale: float
    mask: LoraMask | None
    sums: ImportanceSums | None
    owns_base: bool  # False: the caller made the base output, as in lora_add
    cu_seqlens: Tensor | None  # of `sums`, at the time of the forward
    extension: bool = False  # whether its raw ops serve the call


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
    """A frozen linear layer plus its LoRA adapter. Differentiable in x, lora_a, lora_b and bias.

    Args:
        x: [..., K] in fp16, bf16, fp32 or float64. Under autocast it is cast as F.linear would.
        weight: [N, K] frozen, in x's dtype (any floating dtype under autocast).
        lora_a: [r, K], lora_b: [N, r], r from 1 to 512, in fp16, bf16, fp32 or float64; they are
            cast to x's dtype for the products. Their gradients come in their own dtype.
        scale: lora_alpha / r, a run-time number.
        bias: [N] in any floating dtype, or None.
        mask: `LoraMask`. The forward uses frozen elements at their present value and skips dead
            columns; gradients are exact zeros where not trainable.
        dropout_p: share of x's elements dropped on the adapter's input, 0 to below 1. The bits
            follow torch's generator of x's device.
        sums: `ImportanceSums`; if given, the backward adds per-example gradients there and gives
            none to lora_a and lora_b.

    Returns:
        [..., N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError: shapes or devices disagree, the rank or dropout_p is out of range, the weight
            requires grad, or `sums` has no examples set.
        TypeError: dtypes that cannot be combined.
    """
    if extension.serves() and not torch.compiler.is_compiling():
        y = extension.linear(x, weight, bias, lora_a, lora_b, scale, mask, dropout_p, sums)
        if y is not None:
            return y
    x = _cast(x)
    _check("lora_linear", x, lora_a, lora_b, mask, sums, dropout_p)
    _check_base(x, weight, bias, lora_b)
    static = [_Static(float(scale), mask, sums, True, _cu(sums))]
    tensors = [(weight, bias, lora_a, lora_b)]
    if x.dim() == 2:
        return _serve(x, static, dropout_p, tensors)[0]
    (y,) = _serve(x.reshape(-1, x.shape[-1]), static, dropout_p, tensors)
    return y.view(*x.shape[:-1], y.shape[-1])


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
    if extension.serves() and not torch.compiler.is_compiling():
        ys = extension.group(x, projections, dropout_p)
        if ys is not None:
            return ys
    if not projections:
        raise ValueError("lora_linear_group: got no projections")
    if len({p.sums is None for p in projections}) > 1:
        raise ValueError("lora_linear_group: sums must be given for all projections or for none")
    x = _cast(x)
    for p in projections:
        _check("lora_linear", x, p.lora_a, p.lora_b, p.mask, p.sums, dropout_p)
        _check_base(x, p.weight, p.bias, p.lora_b)
    static = [_Static(float(p.scale), p.mask, p.sums, True, _cu(p.sums)) for p in projections]
    tensors = [(p.weight, p.bias, p.lora_a, p.lora_b) for p in projections]
    outputs = _serve(x.reshape(-1, x.shape[-1]), static, dropout_p, tensors)
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
    if extension.serves() and not torch.compiler.is_compiling():
        y = extension.add(base, x, lora_a, lora_b, scale, mask, dropout_p, sums)
        if y is not None:
            return y
    x = _cast(x)
    _check("lora_add", x, lora_a, lora_b, mask, sums, dropout_p)
    if base.shape != (*x.shape[:-1], lora_b.shape[0]):
        raise ValueError(
            f"lora_add: base is {list(base.shape)}, expected {[*x.shape[:-1], lora_b.shape[0]]} "
            f"from x {list(x.shape)} and lora_b {list(lora_b.shape)}"
        )
    _check_devices("lora_add", x, base=base)
    static = [_Static(float(scale), mask, sums, False, _cu(sums))]
    rows = base.reshape(-1, base.shape[-1])
    (y,) = _serve(x.reshape(-1, x.shape[-1]), static, dropout_p, [(rows, None, lora_a, lora_b)])
    return y.view(base.shape)


def _serve(
    x: Tensor, static: list[_Static], dropout_p: float, tensors: list[tuple]
) -> Sequence[Tensor]:
    """The outputs for x [M, K]; `tensors` of each projection: weight or base, bias, A, B."""
    dropout_p = float(dropout_p)
    served_by = backend(x.device, x.dtype, chosen=_chosen(x, tensors))
    if served_by == "triton" and few_rows.serves(x) and static[0].sums is None:
        return [few_rows.call(x, *of, dropout_p, st) for of, st in zip(tensors, static)]
    if served_by == "cuda":
        static = [st._replace(extension=True) for st in static]
    flat = [t for of in tensors for t in of]
    arguments = (x, dropout_p, _draw_seed(x, dropout_p), static, *flat)
    if served_by == "reference":
        return ReferenceLora.apply(*arguments)
    if len(static) == 1 and not torch.compiler.is_compiling():
        outputs = recomputed(*arguments)
        if outputs is not None:
            return outputs
    return FusedLora.apply(*arguments)


def _chosen(x: Tensor, tensors: list[tuple]) -> bool:
    """Whether the extension, if it is built, is the one for a call of this size."""
    if not extension.available():
        return False
    outputs, rank = sum(b.shape[0] for *_, b in tensors), max(a.shape[0] for *_, a, _ in tensors)
    return extension.chosen(*x.shape, outputs, x.element_size(), len(tensors), rank)


def _draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """One int64 from the generator of x's device, so that checkpointing draws the same again."""
    if dropout_p == 0.0:
        return None
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)


def _cu(sums: ImportanceSums | None) -> Tensor | None:
    return None if sums is None else sums.cu_seqlens


def _cast(x: Tensor) -> Tensor:
    """x in the dtype of the products: autocast's where that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check(op, x, lora_a, lora_b, mask, sums, dropout_p) -> None:
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack():
        raise RuntimeError(
            f"{op}: torch.func transforms (grad, vjp, jvp, vmap) are not supported; use "
            f"torch.autograd.grad or backward"
        )
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
    _check_devices(op, x, lora_a=lora_a, lora_b=lora_b, mask=mask and _any_of(mask))
    if sums is not None:
        if sums.cu_seqlens is None:
            raise ValueError(
                f"{op}: sums has no examples yet; call sums.examples(cu_seqlens) first"
            )
        _check_devices(op, x, sums=sums.a)
        rows = x.numel() // x.shape[-1]
        if sums.rows != rows:
            raise ValueError(
                f"{op}: sums.examples was told of {sums.rows} rows, but the number of rows of x, "
                f"{rows}, must be covered; call sums.examples(cu_seqlens) before each forward"
            )
        if mask is not None and mask.live is not None:
            raise ValueError(f"{op}: score importance without dead columns; got sums and mask.live")
        if torch.is_grad_enabled() and not (lora_a.requires_grad or lora_b.requires_grad):
            raise ValueError(
                f"{op}: sums are filled in the backward; lora_a or lora_b must require grad for it"
            )


def _any_of(mask: LoraMask) -> Tensor | None:
    return next((t for t in (mask.a, mask.b, mask.live) if t is not None), None)


def _check_devices(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """The kernels get addresses: one on another device would be read all the same."""
    device = x.device
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}, x on {device}; move one of them")


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None, lora_b: Tensor) -> None:
    op, expected = "lora_linear", (lora_b.shape[0], x.shape[-1])
    if weight.shape != expected:
        raise ValueError(
            f"{op}: weight is {list(weight.shape)}, expected {list(expected)} from x "
            f"{list(x.shape)} and lora_b {list(lora_b.shape)}"
        )
    if bias is not None and bias.shape != expected[:1]:
        raise ValueError(f"{op}: bias is {list(bias.shape)}, expected {list(expected[:1])}")
    _check_devices(op, x, weight=weight, bias=bias)
    if weight.requires_grad:
        raise ValueError(
            f"{op}: weight requires grad, but this op treats it as frozen; use "
            f"lora_add(F.linear(x, weight, bias), x, ...) to train it"
        )
    autocast = torch.is_autocast_enabled(x.device.type)
    if weight.dtype != x.dtype and not (autocast and weight.is_floating_point()):
        raise TypeError(
            f"{op}: weight is {weight.dtype} and x is {x.dtype}; cast one of them, or run under "
            f"torch.autocast"
        )
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"{op}: bias must be of a floating dtype, got {bias.dtype}")
