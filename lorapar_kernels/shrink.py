"""S = drop(x) Aᵀ for all projections of one x; also dS = dY (scale·B), which has the same form.

Computes    S[m, c] = Σ_k x[m, k] keep_i(m, k) A[c, k] / (1-p)     i = c // R, the projection

Shapes      x [M, K]   A [C, K] packed, C = projections · R   S [M, C]
            bits as in `dropout`
Cost        one read of x from memory, 2·M·K·itemsize bytes' worth of time at r ≤ 64: bandwidth
            binds. Dropout adds one Philox4x32-7 call for 8 elements and K/8 bytes a row.

Programs of one row block run next to each other, so that x comes from memory once and from L2
after.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._dot import add_dot
from lorapar_kernels._launch import cdiv, cublas, launch, power_of_2, precision, wait_for_previous
from lorapar_kernels._tuned import config
from lorapar_kernels.dropout import draw_words, drop, drop_below, packed

_HOPPER = {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
_HOPPER_WIDE = {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}  # R = 128
_SAFE = {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
_HOPPER_DROPOUT = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
_HOPPER_DROPOUT_WIDE = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}
_SAFE_DROPOUT = {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
_INTERPRETED = {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
_INTERPRETED_DROPOUT = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, valid_ptr, s_ptr,
    scale, M, K, C,
    stride_x, stride_a, stride_s,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    blocks_c = tl.cdiv(C, BLOCK_R)  # of one row block, next to each other
    pid = tl.program_id(0)
    m = (pid // blocks_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    c = pid % blocks_c * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    k = tl.arange(0, BLOCK_K)[None, :]  # [1, BK]
    x_row = x_ptr + m * stride_x
    a_row = a_ptr + c[:, None].to(tl.int64) * stride_a
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_row + start + k, (m < M) & (start + k < K), 0.0)  # [BM, BK]
        a = tl.load(a_row + start + k, (c[:, None] < C) & (start + k < K), 0.0)  # [BR, BK]
        s = add_dot(s, x, tl.trans(a), PRECISION)
    valid = tl.load(valid_ptr + c, c < C, 0)[None, :]  # [1, BR]
    s = tl.where(valid != 0, s * scale, 0.0)
    out = s_ptr + m * stride_s + c[None, :]
    tl.store(out, s.to(s_ptr.dtype.element_ty), (m < M) & (c[None, :] < C))


@triton.jit
def _shrink_dropout_kernel(
    x_ptr, a_ptr, valid_ptr, s_ptr, bits_ptr, seed_ptr,
    drop_below, inverse_keep, M, K, C,
    stride_x, stride_a, stride_s, stride_bits,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    blocks_c = tl.cdiv(C, BLOCK_R)  # of one row block, next to each other
    pid = tl.program_id(0)
    m = (pid // blocks_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    first = pid % blocks_c * BLOCK_R
    projection = first // R
    c = first + tl.arange(0, BLOCK_R)  # [BR]
    lane = tl.arange(0, 64)[None, :]  # [1, 64]
    seed, limit = tl.load(seed_ptr), drop_below.to(tl.uint32)
    x_row = x_ptr + m * stride_x
    a_row = a_ptr + c[:, None].to(tl.int64) * stride_a
    bits_row = bits_ptr + (projection.to(tl.int64) * M + m) * stride_bits
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    blocks = tl.cdiv(K, 512)
    words = tl.zeros((BLOCK_M, 64), tl.int32)
    for block in range(0, blocks):
        kept = draw_words(seed, m, block, projection, limit, BLOCK_M)
        for j in tl.static_range(8):
            k = block * 512 + j * 64 + lane
            x = tl.load(x_row + k, (m < M) & (k < K), 0.0)  # [BM, 64]
            a = tl.load(a_row + k, k < K, 0.0)  # [BR, 64]
            x = drop(x, kept.to(tl.int16), j, PACKED)
            s = add_dot(s, x, tl.trans(a), PRECISION)
        half = block % 2  # two blocks of 512 columns share the words of 1024
        words = tl.where(half == 0, kept, words | (kept << 8))
        full = (first % R == 0) & ((half == 1) | (block == blocks - 1))
        rows = tl.where(full, M, 0)
        tl.store(bits_row + (block // 2) * 64 + lane, words.to(tl.int16), m < rows)
    valid = tl.load(valid_ptr + c)[None, :]  # [1, BR]
    s = tl.where(valid != 0, s * inverse_keep, 0.0)
    tl.store(s_ptr + m * stride_s + c[None, :], s.to(s_ptr.dtype.element_ty), m < M)


def shrink(x: Tensor, a: Tensor, valid: Tensor, s: Tensor, R: int, scale: float = 1.0) -> None:
    """Fills s [M, C] (rows may be strided) with scale times x [M, K] times a [C, K] transposed.

    C is made of projections of padded rank R. Padded columns are 0, but where cuBLAS serves NaN in
    rows of x with Inf or NaN; `clear_padding` mends that for those who sum over them.
    """
    (M, K), C = x.shape, a.shape[0]
    if M == 0 or C == 0:
        return
    if cublas(x, R):
        torch.addmm(s, x, a.t(), beta=0, alpha=scale, out=s)
        return
    BLOCK_R = min(128, max(16, power_of_2(C)))
    hopper = _HOPPER if BLOCK_R <= 64 else _HOPPER_WIDE
    cfg = config("shrink", x, f"K={K},R={BLOCK_R}", hopper, _SAFE, _INTERPRETED)
    grid = (cdiv(C, BLOCK_R) * cdiv(M, cfg["BLOCK_M"]),)
    launch(
        _shrink_kernel, grid, x,
        (x, a, valid, s),
        (scale, M, K, C, x.stride(0), a.stride(0), s.stride(0)),
        BLOCK_R=BLOCK_R, PRECISION=precision(x.dtype), **cfg,
    )  # fmt: skip


def clear_padding(s: Tensor, live: int) -> None:
    """Zeros in the columns of s [M, R], one projection of `shrink`, past the live ones."""
    if live < s.shape[1] and cublas(s, s.shape[1]):
        s[:, live:].zero_()


def dropout_block(R: int, itemsize: int) -> int:
    """Rank columns of a program of `shrink_dropout`: with more, fp32 spills its registers."""
    return min(128 if itemsize == 2 else 16, R)


def shrink_dropout(
    x: Tensor, a: Tensor, valid: Tensor, seed: Tensor, p: float, s: Tensor, bits: Tensor
) -> None:
    """As `shrink`, for a [projections · R, K], with dropout of x; fills `bits` too."""
    (M, K), C, R = x.shape, a.shape[0], a.shape[0] // bits.shape[0]
    if M == 0 or C == 0:
        return
    BLOCK_R = dropout_block(R, x.element_size())
    hopper = _HOPPER_DROPOUT if BLOCK_R <= 64 else _HOPPER_DROPOUT_WIDE
    key = f"K={K},R={BLOCK_R}"
    cfg = config("shrink_dropout", x, key, hopper, _SAFE_DROPOUT, _INTERPRETED_DROPOUT)
    grid = (C // BLOCK_R * cdiv(M, cfg["BLOCK_M"]),)
    launch(
        _shrink_dropout_kernel, grid, x,
        (x, a, valid, s, bits, seed),
        (drop_below(p), 1.0 / (1.0 - p), M, K, C,
         x.stride(0), a.stride(0), s.stride(0), bits.stride(1)),
        R=R, BLOCK_R=BLOCK_R, PRECISION=precision(x.dtype), PACKED=packed(x), **cfg,
    )  # fmt: skip
