"""out = [base +] Σ_i keep_i ⊙ (S_i A_i) [+ bias]: what the adapter adds to y, or to dX.

Computes    y part    out[m, n] = Σ_r S[m, r] B[r, n] + bias[n] + base[m, n]     (scale is in B)
            dX part   out[m, k] = Σ_i keep_i(m, k) Σ_r dS[m, i·R + r] A[i·R + r, k] (1/(1-p) in dS)

Shapes      S [M, P·R]   A [P·R, N]   out, base [M, N]   bias [N]   bits as in `dropout`
Cost        one write of out, and a read of base where given: bandwidth binds at every rank up to
            128. The base GEMM then runs with beta = 1 on top of it, which costs it nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._dot import add_dot
from lorapar_kernels._launch import cdiv, launch, power_of_2, precision, wait_for_previous
from lorapar_kernels._tuned import config
from lorapar_kernels.dropout import drop, packed, read_words

_HOPPER = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
_HOPPER_DROPOUT = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
_SAFE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
_INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1}


@triton.jit
def _expand_kernel(
    s_ptr, a_ptr, bias_ptr, base_ptr, bits_ptr, out_ptr,
    M, N, PROJECTIONS, R,
    stride_s, stride_a, stride_base, stride_bits, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BN]
    r = tl.arange(0, BLOCK_R)  # [BR]
    inside = (m < M) & (n < N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(PROJECTIONS):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, R, BLOCK_R):
            c = i * R + start + r  # [BR]; a last block past R reads zeros
            within = start + r < R
            s = tl.load(s_ptr + m * stride_s + c[None, :], (m < M) & within[None, :], 0.0)
            a_row = a_ptr + c[:, None].to(tl.int64) * stride_a
            a = tl.load(a_row + n, within[:, None] & (n < N), 0.0)  # [BR, BN]
            part = add_dot(part, s, a, PRECISION)
        if bits_ptr is not None:
            words = read_words(bits_ptr, stride_bits, m + i * M, tl.program_id(1) * BLOCK_N, m < M)
            part = drop(part, words, (n // 64) % 16, PACKED)
        total += part
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)
    if base_ptr is not None:
        total += tl.load(base_ptr + m * stride_base + n, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + m * stride_out + n, total.to(out_ptr.dtype.element_ty), inside)


def rank_block(R: int, itemsize: int) -> int:
    """Rank columns of one step of the sum."""
    return min(64 if itemsize == 2 else 32, max(16, power_of_2(R)))


def expand(
    s: Tensor, a: Tensor, out: Tensor, *, bias: Tensor | None = None, base: Tensor | None = None,
    bits: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills out [M, N] from s [M, C] and a [C, N]; `bits` splits C into its projections."""
    (M, N), C = out.shape, a.shape[0]
    if out.numel() == 0:
        return
    projections = 1 if bits is None else bits.shape[0]
    R = C // projections
    BLOCK_R = rank_block(R, s.element_size())
    op, hopper = ("expand", _HOPPER) if bits is None else ("expand_dropout", _HOPPER_DROPOUT)
    cfg = config(op, s, f"N={N},R={BLOCK_R}", hopper, _SAFE, _INTERPRETED)
    grid = (cdiv(M, cfg["BLOCK_M"]), cdiv(N, cfg["BLOCK_N"]))
    launch(
        _expand_kernel, grid, out,
        (s, a, bias, base, bits, out),
        (M, N, projections, R, s.stride(0), a.stride(0),
         0 if base is None else base.stride(0), 0 if bits is None else bits.stride(1),
         out.stride(0)),
        BLOCK_R=BLOCK_R, PRECISION=precision(s.dtype), PACKED=packed(s), **cfg,
    )  # fmt: skip
