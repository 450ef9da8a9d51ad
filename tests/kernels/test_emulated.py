"""The CUDA kernels of the forward and of dX (pack.cu, shrink.cu, expand.cu), run on the CPU."""

import ctypes as c
import functools

import pytest
import torch
from cases import decoded
from emulator.build import TYPES, Matrix, array, emulated, matrix, pointer

from lorapar_kernels import dropout
from lorapar_kernels.testing import FACTOR, NETWORK_FACTOR, assert_as_accurate

DTYPES = list(TYPES)
SEED = 2**61 + 5


class PackProjection(c.Structure):
    _fields_ = [
        ("a", Matrix), ("b", Matrix), ("a_type", c.c_int), ("b_type", c.c_int),
        ("live", c.c_void_p), ("columns", c.c_int), ("n", c.c_int64), ("scale", c.c_float),
    ]  # fmt: skip


class Shrink(c.Structure):
    _fields_ = [
        ("x", Matrix), ("a", Matrix), ("valid", c.c_void_p), ("s", Matrix),
        ("M", c.c_int64), ("K", c.c_int64), ("C", c.c_int), ("R", c.c_int), ("scale", c.c_float),
        ("drops", c.c_bool), ("bits", c.c_void_p), ("words", c.c_int64),
    ]  # fmt: skip


class Draw(c.Structure):
    _fields_ = [
        ("bits", c.c_void_p), ("M", c.c_int64), ("words", c.c_int64), ("seed", c.c_void_p),
        ("drop_below", c.c_uint32), ("first", c.c_int),
    ]  # fmt: skip


class ExpandProjection(c.Structure):
    _fields_ = [
        ("s", Matrix), ("b", Matrix), ("base", Matrix), ("bias", c.c_void_p),
        ("bias_type", c.c_int), ("out", Matrix), ("out_type", c.c_int), ("n", c.c_int64),
    ]  # fmt: skip


class ExpandDx(c.Structure):
    _fields_ = [
        ("ds", Matrix), ("a", Matrix), ("bits", c.c_void_p), ("words", c.c_int64), ("out", Matrix),
        ("M", c.c_int64), ("K", c.c_int64), ("projections", c.c_int), ("R", c.c_int),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library() -> c.CDLL:
    lib = emulated("pack", "shrink", "expand")
    lib.shrink_workspace.restype = c.c_size_t
    lib.set_cluster(1)
    return lib


def lay(t: torch.Tensor, aligned: bool) -> torch.Tensor:
    """The same values in a border of NaN, every row at a multiple of 16 bytes or hardly one."""
    (rows, columns), first = t.shape, 8 if aligned else 7
    stride = -(-(columns + 16) // 8) * 8 + (0 if aligned else 3)
    box = torch.full((rows + 2, stride), torch.nan, dtype=t.dtype)
    return box[1:-1, first : first + columns].copy_(t)


def untouched(out: torch.Tensor) -> bool:
    """Whether all of the memory of `out`, a view made by `lay`, but itself is still NaN."""
    whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    return bool(whole[~inside].isnan().all())


def room(rows: int, columns: int, dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    return lay(torch.full((rows, columns), torch.nan, dtype=dtype), aligned)


# ---- pack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("K, N, r, R", [(64, 136, 16, 16), (37, 131, 5, 16), (72, 9, 40, 64)])
def test_pack(K, N, r, R, adapter, dtype, library):
    sizes, scales = [N, N + 5, 8], [2.5, -0.5, 1.25]
    adapters, lives = [], []
    for i, n in enumerate(sizes):
        aligned = i == 0
        adapters.append((lay(torch.randn(r, K).to(adapter), aligned),
                         lay(torch.randn(n, r).to(adapter), aligned)))  # fmt: skip
        lives.append(torch.arange(r)[1::2].int() if i == 1 else None)
    columns = [r if live is None else len(live) for live in lives]
    calls = [
        PackProjection(matrix(a), matrix(b), TYPES[adapter], TYPES[adapter], pointer(live), count,
                       len(b), scale)
        for (a, b), live, count, scale in zip(adapters, lives, columns, scales)
    ]  # fmt: skip
    a_pack = torch.full((3 * R, K), torch.nan, dtype=dtype)
    b_pack = torch.full((R, sum(sizes)), torch.nan, dtype=dtype)
    valid = torch.full((3 * R,), 7, dtype=torch.int8)
    library.pack(
        array(PackProjection, calls), 3, c.c_int64(K), R, TYPES[dtype], c.c_void_p(pointer(a_pack)),
        c.c_void_p(pointer(b_pack)), c.c_int64(sum(sizes)), c.c_void_p(pointer(valid)),
        c.byref(Draw()),
    )  # fmt: skip
    first = 0
    for i, ((a, b), live, count, scale) in enumerate(zip(adapters, lives, columns, scales)):
        index = torch.arange(r) if live is None else live
        expected = torch.zeros(R, K, dtype=dtype)
        expected[:count] = a[index].to(dtype)
        assert torch.equal(a_pack[i * R : (i + 1) * R], expected), i
        expected = torch.zeros(R, len(b), dtype=dtype)
        expected[:count] = (scale * b.float()).to(dtype).t()[index]
        assert torch.equal(b_pack[:, first : first + len(b)], expected), i
        assert valid[i * R : (i + 1) * R].tolist() == [1] * count + [0] * (R - count)
        first += len(b)


def draw(library, P: int, M: int, K: int, p: float, first: int = 0) -> torch.Tensor:
    """The bits [P, M, words] of projections from `first` on, by a pack of empty adapters."""
    words, R = -(-K // 1024) * 64, 16
    bits, seed = torch.full((P, M, words), 0x5A5A, dtype=torch.int16), torch.tensor([SEED])
    nothing = PackProjection(matrix(None), matrix(None), 0, 0, None, 0, 0, 1.0)
    a_pack, valid = torch.full((P * R, K), torch.nan), torch.full((P * R,), 7, dtype=torch.int8)
    drawn = Draw(pointer(bits), M, words, pointer(seed), dropout.drop_below(p) & 0xFFFFFFFF, first)
    library.pack(
        array(PackProjection, [nothing] * P), P, c.c_int64(K), R, 0, c.c_void_p(pointer(a_pack)),
        None, c.c_int64(0), c.c_void_p(pointer(valid)), c.byref(drawn),
    )  # fmt: skip
    assert not a_pack.any() and not valid.any()
    return bits


@functools.cache
def tritons_keep(M: int, K: int, p: float, projection: int) -> torch.Tensor:
    out = torch.full((M, K), torch.nan)
    dropout.keep(out, p, torch.tensor([SEED]), projection)
    return out


@pytest.mark.parametrize(
    "P, M, K, p, first",
    [(1, 5, 40, 0.3, 0), (3, 40, 1100, 0.05, 0), (2, 33, 513, 0.3, 8), (1, 3, 2048, 1e-6, 0),
     (2, 0, 8, 0.5, 0), (1, 7, 0, 0.5, 0), (1, 16, 1536, 0.99, 0)],
)  # fmt: skip
def test_drawn_bits(P, M, K, p, first, library, triton_backend):
    keeps = decoded(draw(library, P, M, K, p, first), K)
    for i in range(P):
        assert torch.equal(keeps[i].float(), tritons_keep(M, K, p, first + i)), i


# ---- shrink


def packed_a(P: int, R: int, K: int, dtype: torch.dtype, aligned: bool, dead: int = 3):
    """A [P·R, K] with its last `dead` columns of each projection padding, and `valid`."""
    a, valid = torch.randn(P, R, K).to(dtype) / K**0.5, torch.ones(P, R, dtype=torch.int8)
    a[:, R - dead :], valid[:, R - dead :] = 0, 0
    return lay(a.flatten(0, 1), aligned), valid.flatten()


def run_shrink(library, x, a, valid, R, *, scale=1.0, p=0.0, aligned=True):
    """(s, bits)."""
    (M, K), C = x.shape, len(a)
    s = room(M, C, x.dtype, aligned)
    words = -(-K // 1024) * 64
    bits = torch.randint(-(2**15), 2**15, (C // R, M, words), dtype=torch.int16) if p else None
    call = Shrink(
        matrix(x), matrix(a), pointer(valid), matrix(s), M, K, C, R, scale, bool(p),
        pointer(bits), words,
    )  # fmt: skip
    size = library.shrink_workspace(c.byref(call), TYPES[x.dtype])
    workspace = torch.full((size // 4 + 1,), torch.nan)
    library.shrink(c.byref(call), TYPES[x.dtype], c.c_void_p(pointer(workspace)))
    assert workspace[-1].isnan() and untouched(s)
    return s, bits


def check_s(name, s, x, a, valid, R, *, scale=1.0, keeps=None):
    """Against float64, with these bits."""
    for i in range(len(a) // R):
        part = slice(i * R, (i + 1) * R)
        kept = x if keeps is None else x * keeps[i].to(x.dtype)
        live = valid[part].bool()
        exact = scale * (kept.double() @ a[part].double().T)
        plain = (kept @ a[part].T) * scale
        assert_as_accurate(f"{name} {i}", s[:, part], exact * live, plain * live)
        assert not s[:, part][:, ~live].any()


# M, K, P, R, how many multiprocessors the card is said to have, and blocks of a cluster: with one,
# tiles are large, with many, small, and K is split over blocks. All tiles occur, and 1-16 splits.
SHRINK = [
    (5, 40, 1, 16, 132, 1), (33, 130, 2, 16, 1, 1), (16, 64, 1, 32, 1, 1), (40, 1100, 3, 16, 1, 1),
    (16, 600, 1, 64, 1, 1), (17, 9000, 1, 16, 132, 1), (4, 20000, 1, 16, 132, 1),
    (70, 520, 1, 128, 1, 1), (70, 300, 1, 32, 1, 1), (1, 1, 1, 16, 132, 1), (7, 0, 1, 16, 132, 1),
    (0, 8, 1, 16, 132, 1), (17, 9000, 1, 16, 132, 4), (20, 2100, 3, 16, 132, 4),
    (9, 3000, 2, 16, 132, 4), (40, 2100, 1, 64, 132, 2), (70, 2100, 1, 16, 1, 4),
    (16, 300, 3, 16, 1, 1), (16, 300, 2, 64, 1, 1), (33, 600, 3, 16, 4, 4), (20, 100, 1, 64, 1, 1),
    (33, 1100, 2, 16, 1, 4), (33, 1100, 3, 16, 1, 4), (70, 1100, 3, 16, 4, 1),
    (100, 1100, 1, 16, 1, 4), (33, 1100, 1, 32, 1, 4), (20, 1100, 1, 64, 1, 4),
    (33, 1100, 2, 32, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, P, R, card, cluster", SHRINK)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink(M, K, P, R, card, cluster, dtype, aligned, p, library):
    library.set_multiprocessors(card)
    library.set_cluster(cluster)
    x = lay(torch.randn(M, K).to(dtype), aligned)
    a, valid = packed_a(P, R, K, dtype, aligned)
    s, bits = run_shrink(library, x, a, valid, R, scale=0.75, p=p, aligned=aligned)
    check_s("s", s, x, a, valid, R, scale=0.75, keeps=decoded(bits, K) if p else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["x", "a"])
def test_shrink_of_one_aligned_matrix(which, dtype, library):
    library.set_multiprocessors(132)
    library.set_cluster(1)
    x = lay(torch.randn(19, 75).to(dtype), which == "x")
    a, valid = packed_a(2, 16, 75, dtype, which == "a")
    s, _ = run_shrink(library, x, a, valid, 16)
    check_s("s", s, x, a, valid, 16)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_lets_nan_through(dtype, p, library):
    """Also where it is dropped, but not into padding."""
    x = torch.randn(18, 300).to(dtype)
    x[3, 7], x[17, 250] = torch.nan, torch.inf
    a, valid = packed_a(1, 16, 300, dtype, True)
    s, _ = run_shrink(library, x, a, valid, 16, p=p)
    finite = s.isfinite()
    assert not finite[[3, 17], :13].any() and finite[:, 13:].all()
    assert finite[[m for m in range(18) if m not in (3, 17)]].all()


# ---- expand

EXPAND = [(5, 40, 16), (66, 130, 16), (64, 128, 64), (70, 257, 32), (1, 1, 16), (17, 140, 128)]


def check_out(name, out, exact, plain):
    factor = NETWORK_FACTOR if out.numel() == 1 else FACTOR  # one number is one draw
    assert_as_accurate(name, out, exact, plain.to(out.dtype), factor)
    assert untouched(out)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, R", EXPAND)
def test_expand(M, N, R, dtype, aligned, library):
    """Three projections: a bias of another type, a base of another type, nothing but a bias."""
    other = {torch.float32: torch.float16}.get(dtype, torch.float32)
    s = lay(torch.randn(M, 2 * R).to(dtype), aligned)
    bs = [lay(torch.randn(R, n).to(dtype), aligned) for n in (N, N + 3)]
    bias, base = torch.randn(N).to(other), lay(torch.randn(M, N + 3).to(other), aligned)
    only = torch.randn(8).to(dtype)
    outs = [room(M, N, dtype, aligned), room(M, N + 3, other, aligned), room(M, 8, dtype, aligned)]
    none = matrix(None)
    calls = [
        ExpandProjection(matrix(s[:, :R]), matrix(bs[0]), none, pointer(bias), TYPES[other],
                         matrix(outs[0]), TYPES[dtype], N),
        ExpandProjection(matrix(s[:, R:]), matrix(bs[1]), matrix(base), None, 0, matrix(outs[1]),
                         TYPES[other], N + 3),
        ExpandProjection(none, none, none, pointer(only), TYPES[dtype], matrix(outs[2]),
                         TYPES[dtype], 8),
    ]  # fmt: skip
    library.expand(array(ExpandProjection, calls), 3, c.c_int64(M), R, TYPES[dtype])

    def product(i, to):
        return s[:, i * R : (i + 1) * R].to(to) @ bs[i].to(to)

    double = torch.float64
    check_out("bias", outs[0], product(0, double) + bias.double(),
              torch.addmm(bias.to(dtype), s[:, :R], bs[0]))  # fmt: skip
    check_out("base", outs[1], product(1, double) + base.double(),
              product(1, dtype).to(other) + base)  # fmt: skip
    assert torch.equal(outs[2], only.expand(M, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("card", [1, 132])  # several tiles of rows for a block, and one
@pytest.mark.parametrize("M, N, R", [(5, 40, 16), (330, 200, 16), (70, 264, 32), (64, 128, 64),
                                     (257, 136, 128)])  # fmt: skip
def test_expand_of_aligned_matrices(M, N, R, card, dtype, library):
    library.set_multiprocessors(card)
    s = lay(torch.randn(M, 2 * R).to(dtype), True)
    bs = [lay(torch.randn(R, n).to(dtype), True) for n in (N, N + 8)]
    bias = torch.randn(N)
    outs = [room(M, len(b[0]), dtype, True) for b in bs]
    none = matrix(None)
    calls = [
        ExpandProjection(matrix(s[:, :R]), matrix(bs[0]), none, pointer(bias), 0, matrix(outs[0]),
                         TYPES[dtype], N),
        ExpandProjection(matrix(s[:, R:]), matrix(bs[1]), none, None, 0, matrix(outs[1]),
                         TYPES[dtype], N + 8),
    ]  # fmt: skip
    library.expand(array(ExpandProjection, calls), 2, c.c_int64(M), R, TYPES[dtype])
    exact = [s[:, i * R : (i + 1) * R].double() @ b.double() for i, b in enumerate(bs)]
    check_out("bias", outs[0], exact[0] + bias.double(),
              torch.addmm(bias.to(dtype), s[:, :R], bs[0]))  # fmt: skip
    check_out("plain", outs[1], exact[1], s[:, R:] @ bs[1])


DX = [(M, K, 3, R) for M, K, R in EXPAND] + [
    (3, 1100, 3, 16), (70, 1240, 3, 16), (130, 200, 1, 128), (33, 264, 8, 16), (40, 1400, 2, 32),
]  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("card", [1, 132])
@pytest.mark.parametrize("M, K, P, R", DX)
def test_expand_dx(M, K, P, R, card, dtype, aligned, p, library):
    library.set_multiprocessors(card)
    ds = lay(torch.randn(M, P * R).to(dtype), aligned)
    a = lay(torch.randn(P * R, K).to(dtype), aligned)
    words = -(-K // 1024) * 64
    bits = torch.randint(-(2**15), 2**15, (P, M, words), dtype=torch.int16) if p else None
    out = room(M, K, dtype, aligned)
    call = ExpandDx(matrix(ds), matrix(a), pointer(bits), words, matrix(out), M, K, P, R)
    library.expand_dx(c.byref(call), TYPES[dtype])

    def sum_in(to):
        total = torch.zeros(M, K, dtype=to)
        for i in range(P):
            part = ds[:, i * R : (i + 1) * R].to(to) @ a[i * R : (i + 1) * R].to(to)
            total += part if bits is None else part * decoded(bits, K)[i]
        return total

    check_out("dx", out, sum_in(torch.float64), sum_in(dtype))
