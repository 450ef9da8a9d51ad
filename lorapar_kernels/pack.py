"""The compute copies of one adapter: live columns only, the compute dtype, zeros up to R columns.

Computes    a_out[c, k] = A[live[c], k]             for c < C, else 0
            b_out[c, n] = scale · B[n, live[c]]     for c < C, else 0
            valid[c]    = c < C

Shapes      A [r, K], B [N, r] in fp32 or 16 bit   live int32 [C] or None (C = r)
            a_out [R, K], b_out [R, N] in the compute dtype   valid int8 [R]
Cost        r·(K+N) elements read and R·(K+N) written: about 0.3 % of a layer's bytes at r = 16. It
            saves every later kernel the gather, the cast, the scale and a mask on the rank.

Padded columns are exact zeros, but zero times Inf is NaN: kernels that sum over K or N store zero
where `valid` is 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._launch import cdiv, launch, power_of_2, wait_for_previous

_BLOCK_R, _BLOCK = 64, 64


def padded_rank(columns: int) -> int:
    """R: a power of two from 16 to 128, or a multiple of 128; 0 for none."""
    if columns == 0:
        return 0
    return max(16, power_of_2(columns)) if columns <= 128 else -(-columns // 128) * 128


@triton.jit
def _pack_kernel(
    a_ptr, b_ptr, live_ptr, a_out_ptr, b_out_ptr, valid_ptr,
    scale, C, K, N,
    stride_a, stride_b, stride_a_out, stride_b_out,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    pid, pid_r = tl.program_id(0), tl.program_id(1)
    c = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # [BR, 1]
    column = c
    if live_ptr is not None:
        column = tl.load(live_ptr + c, c < C, 0)
    blocks_k = tl.cdiv(K, BLOCK)
    if pid < blocks_k:
        k = pid * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, B]
        a = tl.load(a_ptr + column.to(tl.int64) * stride_a + k, (c < C) & (k < K), 0.0)
        out = a_out_ptr + c.to(tl.int64) * stride_a_out + k
        tl.store(out, a.to(a_out_ptr.dtype.element_ty), k < K)
    else:
        n = (pid - blocks_k) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, B]
        b = tl.load(b_ptr + n.to(tl.int64) * stride_b + column, (c < C) & (n < N), 0.0)
        out = b_out_ptr + c.to(tl.int64) * stride_b_out + n
        tl.store(out, (scale * b.to(tl.float32)).to(b_out_ptr.dtype.element_ty), n < N)
    if pid == 0:
        flag = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(valid_ptr + flag, (flag < C).to(tl.int8))


def pack(
    a: Tensor, b: Tensor, live: Tensor | None, scale: float,
    a_out: Tensor, b_out: Tensor, valid: Tensor,
) -> None:  # fmt: skip
    """Fills a_out [R, K], b_out [R, N] (rows may be strided) and valid [R] for one projection."""
    (r, K), N, R = a.shape, b.shape[0], a_out.shape[0]
    a, b = (t if t.stride(-1) == 1 else t.contiguous() for t in (a, b))
    BLOCK_R = min(R, _BLOCK_R)
    grid = (cdiv(K, _BLOCK) + cdiv(N, _BLOCK), R // BLOCK_R)
    launch(
        _pack_kernel, grid, a,
        (a, b, live, a_out, b_out, valid),
        (scale, r if live is None else live.shape[0], K, N,
         a.stride(0), b.stride(0), a_out.stride(0), b_out.stride(0)),
        BLOCK_R=BLOCK_R, BLOCK=_BLOCK,
    )  # fmt: skip
