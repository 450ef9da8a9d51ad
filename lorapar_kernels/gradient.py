"""dA = dSᵀ drop(x), and dB = dYᵀ S, of the same form: partial sums over rows, then one finish.

Computes    partial[s, c, k] = Σ_{m in split s} S[m, index[c]] keep(m, k) x[m, k]
            out = scale · Σ_s partial[s], in the order of s, where trainable; else exact 0

Shapes      x [M, K]   S [M, ·]   index int32 [C] or None   partial fp32 [splits, C, K]
            out [r, K] for A, [N, r] for B, in the adapter's dtype
Cost        one read of x (or dY): bandwidth binds. Partials are splits·C·K·4 bytes each way.

Splits are equal runs of rows, or the examples of a scoring pass; then the finish adds Σg and Σg²
over examples to the importance sums instead. No atomics: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._dot import add_dot
from lorapar_kernels._launch import (
    cdiv,
    cublas,
    launch,
    multiprocessors,
    power_of_2,
    precision,
    wait_for_previous,
)
from lorapar_kernels._tuned import config
from lorapar_kernels.dropout import drop, packed, pairs_share, read_words

_HOPPER = {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
_HOPPER_BESIDE = {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}  # few programs
_HOPPER_BESIDE_WIDE = {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}  # R = 64
_HOPPER_DROPOUT = {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
_HOPPER_WIDE = {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}  # R = 128
_SAFE = {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
_INTERPRETED = {"BLOCK_M": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1}
_FINISH_BLOCK = 64


@triton.jit
def row_range(bounds_ptr, split, M, rows_per_split):
    """First and last+1 row of a split: an example's, or an equal run."""
    if bounds_ptr is not None:
        start, stop = tl.load(bounds_ptr + split), tl.load(bounds_ptr + split + 1)
    else:
        start = split * rows_per_split
        stop = tl.minimum(start + rows_per_split, M)
    return start, stop


@triton.jit
def _gradient_kernel(
    s_ptr, x_ptr, index_ptr, bits_ptr, bounds_ptr, partial_ptr,
    M, K, C, R, rows_per_split,
    stride_s, stride_x, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [1, BK]
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]  # [1, BR]
    split = tl.program_id(2)
    start, stop = row_range(bounds_ptr, split, M, rows_per_split)
    column = c
    if index_ptr is not None:
        column = tl.load(index_ptr + c, c < C, 0)
    projection = tl.program_id(1) * BLOCK_R // R
    total = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for first in range(start, stop, BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)  # [BM, 1]
        inside = (m < stop) & (k < K)
        x = tl.load(x_ptr + m * stride_x + k, inside, 0.0)  # [BM, BK]
        if bits_ptr is not None:
            row, first_k = m + projection * M, tl.program_id(0) * BLOCK_K
            words = read_words(bits_ptr, stride_bits, row, first_k, m < stop)  # [BM, 64]
            x = drop(x, words, (k // 64) % 16, PACKED)
        s = tl.load(s_ptr + m * stride_s + column, (m < stop) & (c < C), 0.0)  # [BM, BR]
        total = add_dot(total, tl.trans(x), s, PRECISION)
    out = partial_ptr + (split.to(tl.int64) * C + c) * K + tl.trans(k)  # [BK, BR]
    tl.store(out, total, (c < C) & (tl.trans(k) < K))


@triton.jit
def _finish_kernel(
    partial_ptr, slot_ptr, trainable_ptr, sum_ptr, square_ptr, out_ptr,
    scale, SPLITS, RANK, C, WIDTH, stride_split,
    stride_rank, stride_width, stride_mask_rank, stride_mask_width,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    w = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, B]
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # [BR, 1]
    inside = (rank < RANK) & (w < WIDTH)
    slot = rank
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + rank, rank < RANK, -1)  # -1: not differentiated, dead
    there = inside & (slot >= 0) & (slot < C)
    g = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    at = partial_ptr + slot.to(tl.int64) * WIDTH + w
    for _ in tl.range(0, SPLITS, loop_unroll_factor=4):
        part = scale * tl.load(at, there, 0.0)
        g += part
        squares += part * part
        at += stride_split
    if trainable_ptr is not None:
        trainable = trainable_ptr + rank * stride_mask_rank + w.to(tl.int64) * stride_mask_width
        g = tl.where(tl.load(trainable, inside, 0) != 0, g, 0.0)
    where = rank * stride_rank + w.to(tl.int64) * stride_width
    if sum_ptr is not None:
        tl.store(sum_ptr + where, tl.load(sum_ptr + where, inside, 0.0) + g, inside)
        squares += tl.load(square_ptr + where, inside, 0.0)
        tl.store(square_ptr + where, squares, inside)
    else:
        tl.store(out_ptr + where, g.to(out_ptr.dtype.element_ty), inside)


def gradient(
    s: Tensor, x: Tensor, *, index: Tensor | None, bits: Tensor | None = None,
    bounds: Tensor | None = None, beside: bool = False,
) -> Tensor:  # fmt: skip
    """Partial sums fp32 [splits, C, K]. `beside` a GEMM it takes few multiprocessors."""
    (M, K), C = x.shape, s.shape[1] if index is None else index.shape[0]
    if cublas(x, C) and index is None and bits is None and bounds is None and M > 0:
        return torch.mm(s.t(), x, out_dtype=torch.float32)[None]
    R = C if bits is None else C // bits.shape[0]
    BLOCK_R = min(128, max(16, power_of_2(R)))
    op, hopper = "gradient", _HOPPER
    if bits is not None:
        op, hopper = "gradient_dropout", _HOPPER_DROPOUT
    elif beside:
        op, hopper = "gradient_beside", _HOPPER_BESIDE if R <= 32 else _HOPPER_BESIDE_WIDE
    hopper = hopper if BLOCK_R <= 64 else _HOPPER_WIDE
    cfg = config(op, x, f"K={K},R={BLOCK_R}", hopper, _SAFE, _INTERPRETED)
    blocks = cdiv(K, cfg["BLOCK_K"]) * cdiv(C, BLOCK_R)
    splits, rows = split_rows(M, cfg["BLOCK_M"], blocks, 24 if beside else 0, x, bounds)
    partial = x.new_empty((splits, C, K), dtype=torch.float32)
    if partial.numel() == 0:
        return partial
    grid = (cdiv(K, cfg["BLOCK_K"]), cdiv(C, BLOCK_R), splits)
    pairs = packed(x) and pairs_share(cfg["BLOCK_K"], cfg["num_warps"])
    launch(
        _gradient_kernel, grid, x,
        (s, x, index, bits, bounds, partial),
        (M, K, C, max(1, R), rows,
         s.stride(0), x.stride(0), 0 if bits is None else bits.stride(1)),
        BLOCK_R=BLOCK_R, PRECISION=precision(x.dtype), PACKED=pairs, **cfg,
    )  # fmt: skip
    return partial


def split_rows(
    M: int, block: int, blocks: int, wanted: int, like: Tensor, bounds: Tensor | None
) -> tuple[int, int]:
    """How many splits, of how many rows: enough programs for the card, or one an example."""
    if bounds is not None:
        return bounds.shape[0] - 1, 0
    wanted = wanted or multiprocessors(like.device)
    splits = min(max(1, wanted // max(1, blocks)), max(1, cdiv(M, 4 * block)))
    rows = cdiv(cdiv(M, splits), block) * block
    return max(1, cdiv(M, max(1, rows))), max(1, rows)


def finish(
    partial: Tensor, out: Tensor, rank_dim: int, *, slot: Tensor | None, mask: Tensor | None,
    scale: float = 1.0, first: int = 0, columns: int | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Fills the gradient `out` from rows first … first+columns of `partial`.

    With `sums` = (Σg, Σg²), shaped like `out`, it adds there instead.
    """
    splits, C, width = partial.shape
    RANK = out.shape[rank_dim]
    target = out if sums is None else sums[0]
    if target.numel() == 0:
        return
    BLOCK_R = min(16, power_of_2(RANK))
    grid = (cdiv(width, _FINISH_BLOCK), cdiv(RANK, BLOCK_R))
    strides = (target.stride(rank_dim), target.stride(1 - rank_dim))
    strides_mask = (0, 0) if mask is None else (mask.stride(rank_dim), mask.stride(1 - rank_dim))
    launch(
        _finish_kernel, grid, partial,
        (partial[:, first:] if first else partial, slot, mask, *(sums or (None, None)),
         out if sums is None else None),
        (scale, splits, RANK, C - first if columns is None else columns, width, C * width,
         *strides, *strides_mask),
        BLOCK_R=BLOCK_R, BLOCK=_FINISH_BLOCK,
    )  # fmt: skip
