"""AdamW on the trainable elements of many parameters, in one launch.

Computes, for a trainable element p with gradient g at step t:
    p ← p − lr · weight_decay · p
    m ← m + (1 − β₁)(g − m)        v ← β₂ v + (1 − β₂) g²
    p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

Shapes      parameters and gradients: any shape, contiguous, one dtype; m, v: fp32, packed, as many
            elements as are trainable; bits uint8 [C, CHUNK / 8], one for each element of a chunk;
            before int32 [C], how many trainable elements of the tensor lie before a chunk
Cost        a share f of n fp32 elements trainable, scattered: 12 n + 16 f n bytes, n / 8 of bits.
            Frozen elements are not written; their neighbours bring them through memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._launch import launch, wait_for_previous
from lorapar_kernels._many import chunks, numbers, pointer
from lorapar_kernels.bits import count_bits

_CHUNK = 1024


@triton.jit
def _adamw_kernel(
    like_ptr, addresses_ptr, factors_ptr, tensor_ptr, place_ptr, before_ptr, bits_ptr,
    TENSORS, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_ptr + chunk)
    if tl.load(addresses_ptr + tensor) != 0:  # it has a gradient
        lane = tl.arange(0, BLOCK)
        byte = tl.load(bits_ptr + chunk.to(tl.int64) * (BLOCK // 8) + lane // 8)
        bit = (byte.to(tl.int32) >> (lane % 8)) & 1
        on, slot = bit != 0, tl.load(before_ptr + chunk) + tl.cumsum(bit, 0) - 1
        i = tl.load(place_ptr + chunk).to(tl.int64) * BLOCK + lane
        element: tl.constexpr = like_ptr.dtype.element_ty
        g_ptr = pointer(addresses_ptr, tensor, element) + i
        p_ptr = pointer(addresses_ptr + TENSORS, tensor, element) + i
        m_ptr = pointer(addresses_ptr + 2 * TENSORS, tensor, tl.float32) + slot
        v_ptr = pointer(addresses_ptr + 3 * TENSORS, tensor, tl.float32) + slot
        sign, decay = tl.load(factors_ptr), tl.load(factors_ptr + 1)
        new_1, keep_2, new_2 = (
            tl.load(factors_ptr + 2), tl.load(factors_ptr + 3), tl.load(factors_ptr + 4)
        )  # fmt: skip
        size, over_root, eps = (
            tl.load(factors_ptr + 5), tl.load(factors_ptr + 6), tl.load(factors_ptr + 7)
        )  # fmt: skip
        g = sign * tl.load(g_ptr, on, 0.0).to(tl.float32)
        p = tl.load(p_ptr, on, 0.0).to(tl.float32)
        m, v = tl.load(m_ptr, on, 0.0), tl.load(v_ptr, on, 0.0)
        p -= decay * p
        m += new_1 * (g - m)
        v = keep_2 * v + new_2 * g * g
        p -= size * m / (tl.sqrt(v) * over_root + eps)  # approximate to 2 ulp of the change
        tl.store(m_ptr, m, on)
        tl.store(v_ptr, v, on)
        tl.store(p_ptr, p.to(element), on)


class Factors(NamedTuple):
    """The numbers of one step, in the kernel's order: each made in float64, used in fp32."""

    sign: float  # -1 to maximize
    decay: float  # lr · weight_decay
    new_1: float  # 1 − β₁
    keep_2: float  # β₂
    new_2: float  # 1 − β₂
    size: float  # lr / (1 − β₁ᵗ)
    over_root: float  # 1 / √(1 − β₂ᵗ)
    eps: float


def factors(options: dict, step: int) -> Factors:
    """Of a parameter group's options at its step, from 1."""
    (beta1, beta2), lr = options["betas"], float(options["lr"])
    return Factors(
        -1.0 if options["maximize"] else 1.0, lr * options["weight_decay"],
        1 - beta1, beta2, 1 - beta2,
        lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, options["eps"],
    )  # fmt: skip


def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, mask: Tensor, f: Factors) -> None:
    """The reference: one parameter of any strides, in place. mask bool; m, v flat, fp32 or fp64."""
    g, new = f.sign * g[mask].to(m.dtype), p[mask].to(m.dtype)
    new -= f.decay * new
    m.lerp_(g, f.new_1)
    v.mul_(f.keep_2).addcmul_(g, g, value=f.new_2)
    new.addcdiv_(m, v.sqrt().mul_(f.over_root).add_(f.eps), value=-f.size)
    p.masked_scatter_(mask, new.to(p.dtype))


class Fused:
    """Contiguous parameters of one dtype on one device, and which elements of each are trainable.

    Args:
        params: as many as `bits`.
        bits: uint8, as `lorapar_kernels.bits` packs them, of each.
    """

    def __init__(self, params: Sequence[Tensor], bits: Sequence[Tensor]):
        self.dtype, self.device = params[0].dtype, params[0].device
        self.tensors, device, row = len(params), self.device, _CHUNK // 8
        self.like = torch.empty(1, dtype=self.dtype, device=device)
        cut = chunks([p.numel() for p in params], _CHUNK, device)
        padded = [torch.nn.functional.pad(b, (0, -b.numel() % row)).view(-1, row) for b in bits]
        before = [count_bits(b).sum(1) for b in padded]
        before = torch.cat([n.cumsum(0) - n for n in before])
        self.count = cut.count
        self.where = (
            cut.tensor, cut.place, before.to(device, torch.int32), torch.cat(padded).to(device),
        )  # fmt: skip

    def update(self, rows: Sequence[Sequence[int]], f: Factors) -> None:
        """One launch. rows: addresses of g (0: leave the parameter alone), of p, m and v."""
        table = numbers([address for row in rows for address in row], torch.int64, self.device)
        launch(
            _adamw_kernel, (self.count,), self.like,
            (self.like, table, numbers(f, torch.float32, self.device), *self.where),
            (self.tensors,), BLOCK=_CHUNK, num_warps=4,
        )  # fmt: skip
