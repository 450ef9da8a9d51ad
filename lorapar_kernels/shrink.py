"""S = drop(x) Aᵀ for all projections of one x; also dS = dY (scale·B), which has the same form.

Computes    S[m, c] = Σ_k x[m, k] keep_i(m, k) A[c, k] / (1-p)     i = c // R, the projection

Shapes      x [M, K]   A [C, K] packed, C = projections · R   S [M, C]
            bits uint8 [projections, M, ⌈K/512⌉·64]: bit j of byte (m, 64·q + l) keeps element
            (m, 512·q + 64·j + l)
Cost        one read of x from memory, 2·M·K·itemsize bytes' worth of time at r ≤ 64: bandwidth
            binds. Dropout adds one Philox4x32-7 call for 8 elements and K/8 bytes a row.

Programs of one row block run next to each other, so that x comes from memory once and from L2
after. The bits are a pure function of (seed, projection, row, byte).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._launch import on_device, precision
from lorapar_kernels._tuned import config

BITS_BLOCK = 512  # columns of x whose bits share 64 bytes
_DEFAULT = {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
_DEFAULT_LARGE = {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
_DEFAULT_DROPOUT = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}
_DEFAULT_DROPOUT_LARGE = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}
_INTERPRETED = {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
_INTERPRETED_DROPOUT = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}


@triton.jit
def one_if(condition, dtype: tl.constexpr):
    """1 where true, else 0. Multiplying by it lets a NaN through, as PyTorch's dropout does."""
    return tl.where(condition, tl.full((), 1.0, dtype), tl.full((), 0.0, dtype))


@triton.jit
def is_kept(bits_ptr, stride_bits, m, k, inside):
    """Whether dropout kept element (m, k), [BM, BK]; m int64 [BM, 1], k [1, BK]."""
    byte = (k // 512) * 64 + k % 64
    kept = tl.load(bits_ptr + m * stride_bits + byte, inside, 0)
    return (kept.to(tl.int32) & (1 << ((k // 64) % 8))) != 0


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, valid_ptr, s_ptr,
    M, K, C,
    stride_x, stride_a, stride_s,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    c = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    k = tl.arange(0, BLOCK_K)[None, :]  # [1, BK]
    x_row = x_ptr + m * stride_x
    a_row = a_ptr + c[:, None].to(tl.int64) * stride_a
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_row + start + k, (m < M) & (start + k < K), 0.0)  # [BM, BK]
        a = tl.load(a_row + start + k, (c[:, None] < C) & (start + k < K), 0.0)  # [BR, BK]
        s = tl.dot(x, tl.trans(a), s, input_precision=PRECISION)
    valid = tl.load(valid_ptr + c, c < C, 0)[None, :]  # [1, BR]
    s = tl.where(valid != 0, s, 0.0)
    out = s_ptr + m * stride_s + c[None, :]
    tl.store(out, s.to(s_ptr.dtype.element_ty), (m < M) & (c[None, :] < C))


@triton.jit
def _shrink_dropout_kernel(
    x_ptr, a_ptr, valid_ptr, s_ptr, bits_ptr, seed_ptr,
    drop_below, inverse_keep, M, K,
    stride_x, stride_a, stride_s, stride_bits,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    first = tl.program_id(0) * BLOCK_R
    projection = first // R
    c = first + tl.arange(0, BLOCK_R)  # [BR]
    lane = tl.arange(0, 64)[None, :]  # [1, 64]
    seed, limit = tl.load(seed_ptr), drop_below.to(tl.uint32)
    x_row = x_ptr + m * stride_x
    a_row = a_ptr + c[:, None].to(tl.int64) * stride_a
    bits_row = bits_ptr + (projection.to(tl.int64) * M + m) * stride_bits
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for block in range(0, tl.cdiv(K, 512)):
        byte = block * 64 + lane
        counter = byte + tl.zeros((BLOCK_M, 64), tl.int32)
        row = m.to(tl.int32) + tl.zeros((BLOCK_M, 64), tl.int32)
        which = projection + tl.zeros((BLOCK_M, 64), tl.int32)
        r0, r1, r2, r3 = tl.philox(seed, counter, row, which, which * 0, n_rounds=7)
        kept = tl.zeros((BLOCK_M, 64), tl.int32)
        for j in tl.static_range(8):
            word = r0 if j < 2 else r1 if j < 4 else r2 if j < 6 else r3
            draw = word << 16 if j % 2 == 0 else word  # its upper half decides
            keep = draw >= limit  # [BM, 64]
            kept = tl.where(keep, kept | (1 << j), kept)
            k = block * 512 + j * 64 + lane
            x = tl.load(x_row + k, (m < M) & (k < K), 0.0)  # [BM, 64]
            a = tl.load(a_row + k, k < K, 0.0)  # [BR, 64]
            s = tl.dot(x * one_if(keep, x.dtype), tl.trans(a), s, input_precision=PRECISION)
        if first % R == 0:  # the first program of this projection and row block keeps the bits
            tl.store(bits_row + byte, kept.to(tl.uint8), m < M)
    valid = tl.load(valid_ptr + c)[None, :]  # [1, BR]
    s = tl.where(valid != 0, s * inverse_keep, 0.0)
    tl.store(s_ptr + m * stride_s + c[None, :], s.to(s_ptr.dtype.element_ty), m < M)


def bits_shape(projections: int, m: int, k: int) -> tuple[int, int, int]:
    return projections, m, -(-k // BITS_BLOCK) * 64


def shrink(x: Tensor, a: Tensor, valid: Tensor, s: Tensor) -> None:
    """Fills s [M, C] (rows may be strided) with x [M, K] times a [C, K] transposed."""
    (M, K), C = x.shape, a.shape[0]
    if M == 0 or C == 0:
        return
    BLOCK_R = min(128, max(16, triton.next_power_of_2(C)))
    default = _DEFAULT if x.element_size() == 2 and BLOCK_R <= 64 else _DEFAULT_LARGE
    cfg = config("shrink", x, f"K={K},R={BLOCK_R}", default, _INTERPRETED)
    grid = (triton.cdiv(C, BLOCK_R), triton.cdiv(M, cfg["BLOCK_M"]))
    with on_device(x):
        _shrink_kernel[grid](
            x, a, valid, s,
            M, K, C,
            x.stride(0), a.stride(0), s.stride(0),
            BLOCK_R=BLOCK_R, PRECISION=precision(x.dtype), **cfg,
        )  # fmt: skip


def shrink_dropout(
    x: Tensor, a: Tensor, valid: Tensor, seed: Tensor, p: float, s: Tensor, bits: Tensor
) -> None:
    """As `shrink`, for a [projections · R, K], with dropout of x; fills `bits` too."""
    (M, K), C, R = x.shape, a.shape[0], a.shape[0] // bits.shape[0]
    if M == 0 or C == 0:
        return
    BLOCK_R = min(128, R)
    small = x.element_size() == 2 and BLOCK_R <= 64
    default = _DEFAULT_DROPOUT if small else _DEFAULT_DROPOUT_LARGE
    cfg = config("shrink_dropout", x, f"K={K},R={BLOCK_R}", default, _INTERPRETED_DROPOUT)
    grid = (C // BLOCK_R, triton.cdiv(M, cfg["BLOCK_M"]))
    with on_device(x):
        _shrink_dropout_kernel[grid](
            x, a, valid, s, bits, seed,
            drop_below(p), 1.0 / (1.0 - p), M, K,
            x.stride(0), a.stride(0), s.stride(0), bits.stride(1),
            R=R, BLOCK_R=BLOCK_R, PRECISION=precision(x.dtype), **cfg,
        )  # fmt: skip


def drop_below(p: float) -> int:
    """An element is dropped if its 16-bit draw, in the upper half of a word, is below this.

    p to within 2^-17; as the int32 with the bits of the uint32.
    """
    limit = min(round(p * 65536), 65535) << 16
    return limit - 2**32 if limit >= 2**31 else limit


def new_bits(x: Tensor, projections: int, p: float) -> Tensor:
    shape = bits_shape(projections, *x.shape) if p > 0.0 else (0, 0, 0)
    return torch.empty(shape, dtype=torch.uint8, device=x.device)
