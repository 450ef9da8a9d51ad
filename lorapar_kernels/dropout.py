"""The bits of dropout, one an element, and how the kernels read and apply them.

bits int16 [projections, M, ⌈K/1024⌉·64]: bit j of word (m, 64·q + l) keeps element
(m, 1024·q + 64·j + l), so that 64 columns of x and their words have one layout and one j.
`shrink` draws them with Philox4x32-7: a pure function of (seed, projection, row, column).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._launch import cdiv, launch, wait_for_previous

_BF16X2 = tl.constexpr("""{ .reg .b32 t, z; mov.b32 z, 0x80008000;
    shr.u32 t, $2, $3; and.b32 t, t, 0x00010001; mul.lo.u32 t, t, 0x3F80;
    fma.rn.bf16x2 $0, $1, t, z; }""")
_FP16X2 = tl.constexpr("""{ .reg .b32 t, z; mov.b32 z, 0x80008000;
    shr.u32 t, $2, $3; and.b32 t, t, 0x00010001; mul.lo.u32 t, t, 0x3C00;
    fma.rn.f16x2 $0, $1, t, z; }""")
_FP32X2 = tl.constexpr("""{ .reg .b32 t, u; .reg .f32 g;
    shr.u32 t, $4, $5; and.b32 u, t, 1; mul.lo.u32 u, u, 0x3F800000; mov.b32 g, u;
    mul.f32 $0, $2, g; and.b32 u, t, 0x10000; mul.lo.u32 u, u, 0x3F80; mov.b32 g, u;
    mul.f32 $1, $3, g; }""")


@triton.jit
def read_words(bits_ptr, stride_bits, m, first, inside):
    """The words of row m [BM, 1], int64, for a block of columns that begins with `first`: [BM, 64],
    int16. The block's width divides 1024, and `first`."""
    word = (first // 1024) * 64 + tl.arange(0, 64)[None, :]
    return tl.load(bits_ptr + m * stride_bits + word, inside, 0)


@triton.jit
def drop(t, words, bit, PACKED: tl.constexpr):
    """t [BM, BN] times 1 where `bit` of its word is set, else times 0, which lets a NaN through as
    PyTorch does. 64 columns share 64 words [BM, 64] and one bit; `bit` is a number or [1, BN].
    PACKED: two elements an instruction, on an NVIDIA GPU, where both have one bit (`pairs_share`);
    else plain Triton."""
    BLOCK_M: tl.constexpr = t.shape[0]
    BLOCK_N: tl.constexpr = t.shape[1]
    if BLOCK_N > 64:
        words = tl.broadcast_to(words[:, None, :], (BLOCK_M, BLOCK_N // 64, 64))
        words = tl.reshape(words, (BLOCK_M, BLOCK_N))
    if not PACKED:
        one, zero = tl.full((), 1.0, t.dtype), tl.full((), 0.0, t.dtype)
        return t * tl.where((words.to(tl.int32) >> bit) & 1 != 0, one, zero)
    if t.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16X2, "=r,r,r,r,r", [t, words, bit], dtype=t.dtype, is_pure=True, pack=2
        )
    if t.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _FP16X2, "=r,r,r,r,r", [t, words, bit], dtype=t.dtype, is_pure=True, pack=2
        )
    return tl.inline_asm_elementwise(
        _FP32X2, "=f,=f,f,f,r,r,r", [t, words, bit], dtype=t.dtype, is_pure=True, pack=2
    )


@triton.jit
def draw_words(seed, m, block, projection, limit, BLOCK_M: tl.constexpr):
    """Bits j = 0 … 7 for the columns 512·block + 64·j + 0 … 63, int32 [BM, 64]; m [BM, 1].

    One Philox call makes eight 16-bit draws, each in the upper half of a word."""
    zero = tl.zeros((BLOCK_M, 64), tl.int32)
    column = block * 64 + tl.arange(0, 64)[None, :] + zero
    r0, r1, r2, r3 = tl.philox(seed, column, m.to(tl.int32) + zero, projection + zero, zero, 7)
    kept = zero
    for j in tl.static_range(8):
        word = r0 if j < 2 else r1 if j < 4 else r2 if j < 6 else r3
        draw = word << 16 if j % 2 == 0 else word
        kept = tl.where(draw >= limit, kept | (1 << j), kept)
    return kept


@triton.jit
def _keep_kernel(
    seed_ptr, out_ptr, drop_below, projection, M, K, BLOCK_M: tl.constexpr, PDL: tl.constexpr
):
    wait_for_previous(PDL)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BM, 1]
    block, limit = tl.program_id(1), drop_below.to(tl.uint32)
    kept = draw_words(tl.load(seed_ptr), m, block, projection, limit, BLOCK_M)
    for j in tl.static_range(8):
        k = block * 512 + j * 64 + tl.arange(0, 64)[None, :]
        keep = ((kept >> j) & 1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m * K + k, keep, (m < M) & (k < K))


def keep(out: Tensor, p: float, seed: Tensor, projection: int) -> None:
    """Fills out [M, K] with 1 where `shrink_dropout` keeps that projection's element, else 0."""
    M, K = out.shape
    if out.numel():
        launch(
            _keep_kernel, (cdiv(M, 16), cdiv(K, 512)), out, (seed, out),
            (drop_below(p), projection, M, K), BLOCK_M=16, num_warps=4, num_stages=1,
        )  # fmt: skip


def packed(t: Tensor) -> bool:
    """Whether the kernels may use NVIDIA instructions: not in the interpreter."""
    return t.is_cuda


def pairs_share(columns: int, num_warps: int) -> bool:
    """Whether two elements that a thread holds next to each other have one bit in any layout of a
    loaded tile: a wider tile of rows that are not aligned is laid out with its columns 32 · warps
    apart in neighbouring registers."""
    return columns <= 32 * num_warps


def new_bits(x: Tensor, projections: int, p: float) -> Tensor:
    """Room for the bits of x [M, K]; nothing if p is 0."""
    M, K = x.shape
    shape = (projections, M, -(-K // 1024) * 64) if p > 0.0 else (0, 0, 0)
    return x.new_empty(shape, dtype=torch.int16)


def drop_below(p: float) -> int:
    """An element is dropped if its 16-bit draw, in the upper half of a word, is below this.

    p to within 2^-17; as the int32 with the bits of the uint32.
    """
    limit = min(round(p * 65536), 65535) << 16
    return limit - 2**32 if limit >= 2**31 else limit
