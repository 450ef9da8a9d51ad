"""Few rows without autograd, as in decoding: the extension's one call for a layer and its adapter.

Computes    y = x Wᵀ + bias + scale · S Bᵀ, S = drop(x) Aᵀ rounded to x's dtype as F.linear would

Cost        one Python call and two launches: the base GEMM, and one that reads A and B as they are
            (csrc/decode.cu). Without the extension, plan d serves (few_rows). Dropout, which a
            model in training mode has in its rollouts too, is a launch more: torch draws the seed.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorapar_kernels import extension
from lorapar_kernels.mask import LoraMask

ROWS = 64  # kernels.h: kDecodeRows
_NARROW = (torch.float16, torch.bfloat16)
_READ = (*_NARROW, torch.float32)


def serves(x: Tensor) -> bool:
    """Whether few rows of 16 bit come without autograd where the extension serves."""
    return (
        extension.module is not None
        and not torch.is_grad_enabled()
        and x.numel() <= ROWS * x.shape[-1]
        and x.dtype in _NARROW
        and x.device.type == extension.device
        and extension.serves()
    )


def lora_decode(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    mask: LoraMask | None = None,
    dropout_p: float = 0.0,
    owns_base: bool = True,
) -> Tensor | None:
    """The layer's output for an x that `serves` accepts; no autograd.

    Args:
        x: [..., K] fp16 or bf16.
        weight: [N, K] frozen, or with `owns_base` False the base layer's output [..., N].
        lora_a, lora_b, scale, bias, mask, dropout_p: as in `lora_linear`, with the same bits of
            dropout; of the mask the live columns alone.

    Returns:
        [..., N] in x's dtype; None where something else has to serve the call.
    """
    live = None
    if mask is not None and mask.live is not None:
        if len(mask.live) != lora_a.shape[0]:  # of another adapter
            return None
        live = mask.live_columns
    if not torch.compiler.is_compiling():
        return extension.module.decode(
            x, weight, bias, lora_a, lora_b, scale, live, dropout_p, owns_base
        )
    if x.dtype != weight.dtype or not 0.0 <= dropout_p < 1.0:
        return None
    if lora_a.dtype not in _READ or lora_b.dtype not in _READ:
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return None
    bias = None if bias is None else bias.to(x.dtype)
    y = linear(x, weight, bias) if owns_base else weight.clone()
    seed = None
    if dropout_p > 0.0:  # as lora_linear draws it
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    torch.ops.lorapar_cuda.lora_decode(
        [y], x, [lora_a], [lora_b], [live], [float(scale)], seed, float(dropout_p)
    )
    return y
