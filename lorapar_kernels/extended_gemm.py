"""out = x W' + keep ⊙ (S A) [+ bias] in one GEMM whose sum runs on over the rank.

Computes    y     out[m, n] = Σ_k x[m, k] W[n, k] + Σ_r S[m, r] B[r, n] + bias[n]      transposed
            dX    out[m, k] = Σ_n dY[m, n] W[n, k] + keep(m, k) Σ_r dS[m, r] A[r, k]

Shapes      x [M, K]   W [N, K] if transposed, else [K, N]   S [M, R]   A [R, N]   out [M, N]
Cost        2·M·N·(K+R) flops: the tensor cores bind. It saves writing the adapter's part to memory
            (one pass over out) and pays where this GEMM is near cuBLAS: a measured table decides.

Persistent programs, one a multiprocessor, take tiles in groups of rows for L2; loads and stores use
Hopper's tensor memory accelerator. The last programs have a tile less wherever the tiles do not
divide by their number: work beside this GEMM finds room there.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lorapar_kernels._launch import cdiv, launch, multiprocessors, wait_for_previous
from lorapar_kernels._tuned import chosen
from lorapar_kernels.dropout import drop, packed, read_words
from lorapar_kernels.expand import rank_block

_DEFAULT = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 16,
            "num_warps": 8, "num_stages": 3}  # fmt: skip
AHEAD = tl.constexpr(16)  # rank columns that fit beside the pipeline
_INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP_M": 2,
                "num_warps": 4, "num_stages": 1}  # fmt: skip


@triton.jit
def _first_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: columns of GROUP_M row blocks, one group after the other."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * blocks_n)
    return (group * GROUP_M + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def _rank_part(
    s_ptr, a_ptr, first_m, first_n, M, N, R, stride_s, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S [BM, BR] and A [BR, BN] of a tile, R at most BR; zeros outside."""
    m = (first_m + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    r = tl.arange(0, BLOCK_R)
    s = tl.load(s_ptr + m * stride_s + r[None, :], (m < M) & (r[None, :] < R), 0.0)
    a_row = a_ptr + r[:, None].to(tl.int64) * stride_a
    return s, tl.load(a_row + n, (r[:, None] < R) & (n < N), 0.0)


@triton.jit
def _words(bits_ptr, first_m, first_n, M, N, BLOCK_M: tl.constexpr):
    """The dropout words of a tile [BM, 64]."""
    m = (first_m + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    return read_words(bits_ptr, tl.cdiv(N, 1024) * 64, m, first_n, m < M)


@triton.jit
def _extended_gemm_kernel(
    x_desc, w_desc, out_desc, s_in, a_in, bias_ptr, bits_ptr,
    M, N, K, R, stride_s, stride_a,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    # Few rank columns are loaded a tile ahead, by pointers; many by descriptors, with the tile.
    ahead: tl.constexpr = BLOCK_R <= AHEAD
    program, step = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    first_m, first_n = _first_of(program, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if ahead:
        s, a = _rank_part(
            s_in, a_in, first_m, first_n, M, N, R, stride_s, stride_a, BLOCK_M, BLOCK_N, BLOCK_R
        )
    if bits_ptr is not None:
        words = _words(bits_ptr, first_m, first_n, M, N, BLOCK_M)
    for tile in tl.range(program, tiles, step):
        at_m, at_n = first_m, first_n
        n = at_n + tl.arange(0, BLOCK_N)[None, :]  # [1, BN]
        if ahead:
            total = tl.dot(s, a)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for r in range(0, R, BLOCK_R):
                total = tl.dot(s_in.load([at_m, r]), a_in.load([r, at_n]), total)
        if bits_ptr is not None:
            total = drop(total, words, (n // 64) % 16, PACKED)
        # What the next tile begins with arrives under this one's products.
        next_tile = tl.minimum(tile + step, tiles - 1)
        first_m, first_n = _first_of(next_tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        if ahead:
            s, a = _rank_part(
                s_in, a_in, first_m, first_n, M, N, R, stride_s, stride_a,
                BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        if bits_ptr is not None:
            words = _words(bits_ptr, first_m, first_n, M, N, BLOCK_M)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([at_m, k])
            if TRANSPOSED:
                total = tl.dot(x, w_desc.load([at_n, k]).T, total)
            else:
                total = tl.dot(x, w_desc.load([k, at_n]), total)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)
        out_desc.store([at_m, at_n], total.to(out_desc.dtype))


def wins(
    x: Tensor, w: Tensor, a: Tensor, R: int, *, transposed: bool, dropout: bool = False
) -> bool:
    """Whether the table of this card says that this GEMM beats cuBLAS on a written delta."""
    fits = x.is_cuda and x.element_size() == 2 and x.shape[0] > 0
    return fits and _aligned(x, w, a) and chosen(plan_key(w, R, transposed, dropout), x)


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
    x: Tensor, w: Tensor, s: Tensor, a: Tensor, out: Tensor, *, transposed: bool, live: int,
    bias: Tensor | None = None, bits: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills out [M, N], 16 bit, all rows 16-byte aligned. `bits` are of one projection. Columns of
    s past the `live` ones are zeros, or not read if there are many."""
    (M, K), (R, N) = x.shape, a.shape
    cfg = _DEFAULT if x.is_cuda else _INTERPRETED
    bm, bn, bk = cfg["BLOCK_M"], cfg["BLOCK_N"], cfg["BLOCK_K"]
    x_desc = TensorDescriptor.from_tensor(x, [bm, bk])
    w_desc = TensorDescriptor.from_tensor(w, [bn, bk] if transposed else [bk, bn])
    out_desc = TensorDescriptor.from_tensor(out, [bm, bn])
    br = rank_block(R, x.element_size())
    s_in, a_in = s, a
    if br > AHEAD.value:
        s_in = TensorDescriptor.from_tensor(s[:, :live], [bm, br])  # zeros beyond
        a_in = TensorDescriptor.from_tensor(a, [br, bn])
    tiles = cdiv(M, bm) * cdiv(N, bn)
    launch(
        _extended_gemm_kernel, (min(multiprocessors(x.device), tiles),), x,
        (x_desc, w_desc, out_desc, s_in, a_in, bias, bits),
        (M, N, K, R, s.stride(0), a.stride(0)),
        TRANSPOSED=transposed, PACKED=packed(x), BLOCK_R=br, **cfg,
    )  # fmt: skip
