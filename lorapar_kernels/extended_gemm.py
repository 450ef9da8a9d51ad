"""out = x W' + Σ_i keep_i ⊙ (S_i A_i) [+ bias] in one GEMM whose sum runs on over the rank.

Computes    y     out[m, n] = Σ_k x[m, k] W[n, k] + Σ_r S[m, r] B[r, n] + bias[n]      transposed
            dX    out[m, k] = Σ_n dY[m, n] W[n, k] + Σ_i keep_i Σ_r dS[m, r] A[r, k]

Shapes      x [M, K]   W [N, K] if transposed, else [K, N]   S [M, C]   A [C, N]   out [M, N]
Cost        2·M·N·(K+C) flops: the tensor cores bind. It saves writing the adapter's part to memory
            (one pass over out) and pays where this GEMM is near cuBLAS: a measured table decides.

Persistent programs, one a multiprocessor, take tiles in groups of rows for L2; loads and stores use
Hopper's tensor memory accelerator. The last programs have a tile less wherever the tiles do not
divide by their number: work beside this GEMM starts first and delays just those.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lorapar_kernels._launch import cdiv, launch, multiprocessors, power_of_2
from lorapar_kernels._tuned import chosen
from lorapar_kernels.dropout import drop, packed

_DEFAULT = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8,
            "num_warps": 8, "num_stages": 3}  # fmt: skip
_INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2,
                "num_warps": 4, "num_stages": 1}  # fmt: skip


@triton.jit
def _extended_gemm_kernel(
    x_desc, w_desc, out_desc, s_ptr, a_ptr, bias_ptr, bits_ptr,
    M, N, K, PROJECTIONS, R,
    stride_s, stride_a, stride_bits,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        group = tile // (GROUP_M * blocks_n)
        height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * blocks_n)
        first_m = (group * GROUP_M + within % height) * BLOCK_M
        first_n = (within // height) * BLOCK_N
        m = (first_m + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)  # [BM, 1]
        n = first_n + tl.arange(0, BLOCK_N)[None, :]  # [1, BN]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(PROJECTIONS):
            part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, R, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                c = i * R + r
                s = tl.load(s_ptr + m * stride_s + c[None, :], (m < M) & (r[None, :] < R), 0.0)
                a_row = a_ptr + c[:, None].to(tl.int64) * stride_a
                a = tl.load(a_row + n, (r[:, None] < R) & (n < N), 0.0)  # [BR, BN]
                part = tl.dot(s, a, part)
            if bits_ptr is not None:
                word = (n // 1024) * 64 + n % 64
                words = tl.load(bits_ptr + (m + i * M) * stride_bits + word, m < M, 0)
                part = drop(part, words, (n // 64) % 16, PACKED)
            total += part
        for start in range(0, K, BLOCK_K):
            x = x_desc.load([first_m, start])
            if TRANSPOSED:
                total = tl.dot(x, w_desc.load([first_n, start]).T, total)
            else:
                total = tl.dot(x, w_desc.load([start, first_n]), total)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)
        out_desc.store([first_m, first_n], total.to(out_desc.dtype))


def wins(x: Tensor, w: Tensor, R: int, *, transposed: bool, dropout: bool = False) -> bool:
    """Whether the table of this card says that this GEMM beats cuBLAS on a written delta."""
    fits = x.is_cuda and x.element_size() == 2 and x.shape[0] > 0
    return fits and _aligned(x, w) and chosen(plan_key(w, R, transposed, dropout), x)


def plan_key(w: Tensor, R: int, transposed: bool, dropout: bool) -> str:
    """The key of a plan in tuned/<gpu>.json: a layer of weight [N, K] at a packed rank."""
    N, K = w.shape
    return f"{'y' if transposed else 'dX'} N={N},K={K},R={R}{',dropout' if dropout else ''}"


def _aligned(*tensors: Tensor) -> bool:
    """Tensor memory descriptors need 16-byte aligned rows that do not overlap."""
    return all(
        t.data_ptr() % 16 == 0 and t.stride(1) == 1 and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1]
        for t in tensors
    )  # fmt: skip


def extended_gemm(
    x: Tensor, w: Tensor, s: Tensor, a: Tensor, out: Tensor, *, transposed: bool,
    bias: Tensor | None = None, bits: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills out [M, N], 16 bit, all rows 16-byte aligned."""
    (M, K), N, C = x.shape, out.shape[1], a.shape[0]
    projections = 1 if bits is None else bits.shape[0]
    R = C // projections
    cfg = _DEFAULT if x.is_cuda else _INTERPRETED
    bm, bn, bk = cfg["BLOCK_M"], cfg["BLOCK_N"], cfg["BLOCK_K"]
    x_desc = TensorDescriptor.from_tensor(x, [bm, bk])
    w_desc = TensorDescriptor.from_tensor(w, [bn, bk] if transposed else [bk, bn])
    out_desc = TensorDescriptor.from_tensor(out, [bm, bn])
    tiles = cdiv(M, bm) * cdiv(N, bn)
    launch(
        _extended_gemm_kernel, (min(multiprocessors(x.device), tiles),), x,
        (x_desc, w_desc, out_desc, s, a, bias, bits),
        (M, N, K, projections, R,
         s.stride(0), a.stride(0), 0 if bits is None else bits.stride(1)),
        TRANSPOSED=transposed, PACKED=packed(x), BLOCK_R=min(64, max(16, power_of_2(R))), **cfg,
    )  # fmt: skip
