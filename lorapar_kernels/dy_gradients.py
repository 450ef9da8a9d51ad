"""dS = dY B and the partial sums of dB = dYᵀ S, from one read of dY.

Computes    ds_partial[g, m, r] = Σ_{n in block g} dY[m, n] B[r, n]           (scale is in B)
            db_partial[s, c, n] = Σ_{m in split s} dY[m, n] S[m, index[c]]
            dS[m, r] = Σ_g ds_partial[g, m, r], in the order of g

Shapes      dY [M, N]   B [R, N] packed   S, dS [M, ·]   R at most 64
Cost        one read of dY; M·N·R/BLOCK_N·4 and splits·R·N·4 bytes of partials, each way.
            From R = 128 they cost more than a second read: two passes serve (shrink, gradient).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._dot import add_dot
from lorapar_kernels._launch import cdiv, launch, power_of_2, precision, wait_for_previous
from lorapar_kernels._tuned import config
from lorapar_kernels.gradient import split_rows

MAX_RANK, MAX_RANK_FP32 = 64, 16  # wider, fp32 spills its registers
_HOPPER = {"BLOCK_M": 64, "BLOCK_N": 256, "num_warps": 8, "num_stages": 3}
_SAFE = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
_INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
_SUM_BLOCK = 32


@triton.jit
def _dy_gradients_kernel(
    dy_ptr, b_ptr, s_ptr, index_ptr, ds_ptr, db_ptr,
    M, N, C, rows_per_split,
    stride_dy, stride_b, stride_s,
    R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    block, split = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BN]
    r = tl.arange(0, R)  # [R]
    c = tl.arange(0, BLOCK_C)[None, :]  # [1, BC]
    column = c
    if index_ptr is not None:
        column = tl.load(index_ptr + c, c < C, 0)
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, M)
    b = tl.load(b_ptr + r[:, None].to(tl.int64) * stride_b + n, n < N, 0.0)  # [R, BN]
    db = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)  # [BM, 1]
        dy = tl.load(dy_ptr + m * stride_dy + n, (m < stop) & (n < N), 0.0)  # [BM, BN]
        s = tl.load(s_ptr + m * stride_s + column, (m < stop) & (c < C), 0.0)  # [BM, BC]
        ds = tl.dot(dy, tl.trans(b), input_precision=PRECISION)  # [BM, R]
        tl.store(ds_ptr + (block.to(tl.int64) * M + m) * R + r[None, :], ds, m < stop)
        db = add_dot(db, tl.trans(dy), s, PRECISION)
    out = db_ptr + (split.to(tl.int64) * C + c) * N + tl.trans(n)  # [BN, BC]
    tl.store(out, db, (c < C) & (tl.trans(n) < N))


@triton.jit
def _sum_kernel(
    partial_ptr, valid_ptr, out_ptr, scale, M, BLOCKS, stride_out,
    R: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    r = tl.arange(0, R)[None, :]  # [1, R]
    total = tl.zeros((BLOCK_M, R), tl.float32)
    at = partial_ptr + m * R + r
    for _ in tl.range(0, BLOCKS, loop_unroll_factor=8):
        total += tl.load(at, m < M, 0.0)
        at += M * R
    total = tl.where(tl.load(valid_ptr + r) != 0, total * scale, 0.0)
    tl.store(out_ptr + m * stride_out + r, total.to(out_ptr.dtype.element_ty), m < M)


def wins(dy: Tensor, R: int) -> bool:
    """Whether one pass over dY beats two."""
    return R <= (MAX_RANK if dy.element_size() == 2 else MAX_RANK_FP32)


def dy_gradients(
    dy: Tensor, b: Tensor, s: Tensor, ds: Tensor, valid: Tensor, scale: float = 1.0, *,
    index: Tensor | None,
) -> Tensor:  # fmt: skip
    """Fills ds [M, R], times scale; partial sums of dB, fp32 [splits, C, N]. M is at least 1."""
    (M, N), R = dy.shape, b.shape[0]
    C = R if index is None else index.shape[0]
    cfg = config("dy_gradients", dy, f"N={N},R={R}", _HOPPER, _SAFE, _INTERPRETED)
    blocks = cdiv(N, cfg["BLOCK_N"])
    splits, rows = split_rows(M, cfg["BLOCK_M"], blocks, 0, dy, None)
    partial = dy.new_empty((blocks, M, R), dtype=torch.float32)
    db = dy.new_empty((splits, C, N), dtype=torch.float32)
    launch(
        _dy_gradients_kernel, (blocks, splits), dy,
        (dy, b, s, index, partial, db),
        (M, N, C, rows, dy.stride(0), b.stride(0), s.stride(0)),
        R=R, BLOCK_C=max(16, power_of_2(C)), PRECISION=precision(dy.dtype), **cfg,
    )  # fmt: skip
    launch(
        _sum_kernel, (cdiv(M, _SUM_BLOCK),), dy,
        (partial, valid, ds), (scale, M, blocks, ds.stride(0)),
        R=R, BLOCK_M=_SUM_BLOCK, num_warps=4, num_stages=3,
    )  # fmt: skip
    return db
