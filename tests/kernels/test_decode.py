"""The decode kernel, compiled for the CPU, against float64 and plain PyTorch in x's dtype."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from cases import decoded
from conftest import DEVICE
from emulator.build import TYPES, Matrix, array, emulated, matrix, pointer
from test_emulated import Draw, PackProjection

from lorapar_kernels import LoraMask, extension, lora_add, lora_linear
from lorapar_kernels import dropout as bits
from lorapar_kernels.decode import lora_decode, serves
from lorapar_kernels.testing import assert_as_accurate

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCALE = 1.7
SEED = 0x123456789ABCDEF0


class DecodeProjection(ctypes.Structure):
    """kernels.h."""

    _fields_ = [
        ("a", Matrix), ("b", Matrix), ("a_type", ctypes.c_int), ("b_type", ctypes.c_int),
        ("live", ctypes.c_void_p), ("columns", ctypes.c_int), ("out", Matrix),
        ("n", ctypes.c_int64), ("scale", ctypes.c_float),
    ]  # fmt: skip


class DecodeDropout(ctypes.Structure):
    """kernels.h."""

    _fields_ = [
        ("seed", ctypes.c_void_p), ("drop_below", ctypes.c_uint32), ("scale", ctypes.c_float)
    ]  # fmt: skip


@dataclass
class Adapter:
    """One projection's tensors; `live` columns only, or all."""

    a: torch.Tensor
    b: torch.Tensor
    base: torch.Tensor
    live: torch.Tensor | None = None
    scale: float = SCALE
    keep: torch.Tensor | None = None  # [M, K], over 1-p

    def columns(self):
        return slice(None) if self.live is None else self.live.long()


def rows(m, n, dtype, pad=0, shift=0):
    """[m, n] random, its rows `pad` apart and `shift` off alignment; NaN in between."""
    whole = torch.full((m * (n + pad) + shift,), float("nan"), dtype=dtype)
    view = whole[shift:].view(m, n + pad)[:, :n]
    return view.copy_(torch.randn(m, n))


def make(m, k, n, r, dtype, adapter=(FP32, FP32), live=None, pad=0, shift=0):
    a = rows(r, k, adapter[0], pad, shift)
    b = rows(n, r, adapter[1], pad, shift)
    a.mul_(k**-0.5), b.mul_(r**-0.5)
    if live is not None:
        live = torch.tensor(live, dtype=torch.int32)
    return Adapter(a, b, rows(m, n, dtype, pad, shift), live)


def decode(x, adapters, cluster=1, dropout_p=0.0):
    """The kernel's outputs, in the memory of the bases."""
    outs = [p.base.clone(memory_format=torch.preserve_format) for p in adapters]
    for out, p in zip(outs, adapters):
        if not p.base.is_contiguous():
            out.set_(p.base.untyped_storage().clone(), p.base.storage_offset(), *_layout(p.base))
    of = array(DecodeProjection, [
        DecodeProjection(
            matrix(p.a), matrix(p.b), TYPES[p.a.dtype], TYPES[p.b.dtype], pointer(p.live),
            p.a.shape[0] if p.live is None else len(p.live), matrix(out), out.shape[1], p.scale,
        )
        for p, out in zip(adapters, outs)
    ])  # fmt: skip
    seed = torch.tensor([SEED])
    dropout = DecodeDropout()
    if dropout_p:
        limit = bits.drop_below(dropout_p) & 0xFFFFFFFF
        dropout = DecodeDropout(pointer(seed), limit, 1 / (1 - dropout_p))
    emulated("decode").decode(
        of, len(adapters), matrix(x), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]),
        TYPES[x.dtype], ctypes.byref(dropout), cluster,
    )  # fmt: skip
    return outs


def _layout(t):
    return t.shape, t.stride()


def plain(x, p):
    """As few_rows has it, on any device: A, B and S in x's dtype."""
    a, b = p.a[p.columns()].to(x.dtype), p.b[:, p.columns()].to(x.dtype)
    s = torch.nn.functional.linear(_dropped(x, p), a)
    if x.dtype == torch.float64:
        return p.base.double() + p.scale * s @ b.T
    return torch.addmm(p.base, s, b.T, alpha=p.scale)


def exact(x, p):
    a, b = p.a[p.columns()].double(), p.b[:, p.columns()].double()
    return p.base.double() + p.scale * (_dropped(x.double(), p) @ a.T) @ b.T


def _dropped(x, p):
    return x if p.keep is None else x * p.keep.to(x.dtype)


def judge(name, x, adapters, cluster=1, dropout_p=0.0):
    for i, p in enumerate(adapters if dropout_p else ()):
        p.keep = kept(*x.shape, dropout_p, i) / (1 - dropout_p)
    outs = decode(x, adapters, cluster, dropout_p)
    for i, (out, p) in enumerate(zip(outs, adapters)):
        assert_as_accurate(f"{name} {i}", out, exact(x, p), plain(x, p))
        gap = p.base.stride(0) - p.base.shape[1]
        if gap > 0 and p.base.numel():  # nothing between the rows is written
            whole = torch.as_strided(out, (len(out), p.base.stride(0)), out.stride())
            assert whole[:-1, -gap:].isnan().all()


def kept(m, k, p, projection):
    """0 or 1 [M, K], float64, as `pack` draws them, and `shrink` applies."""
    words = torch.full((1, m, -(-k // 1024) * 64), 0x5A5A, dtype=torch.int16)
    rows, seed = torch.empty(16, k), torch.tensor([SEED])
    limit = bits.drop_below(p) & 0xFFFFFFFF
    of = Draw(pointer(words), m, words.shape[2], pointer(seed), limit, projection)
    nothing = PackProjection(matrix(None), matrix(None), 0, 0, None, 0, 0, 1.0)
    valid = torch.empty(16, dtype=torch.int8)
    emulated("pack").pack(
        array(PackProjection, [nothing]), 1, ctypes.c_int64(k), 16, 0,
        ctypes.c_void_p(pointer(rows)), None, ctypes.c_int64(0), ctypes.c_void_p(pointer(valid)),
        ctypes.byref(of),
    )  # fmt: skip
    return decoded(words, k)[0].double()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 31, 33, 64])
def test_rows(m, dtype):
    judge(f"M={m}", rows(m, 200, dtype), [make(m, 200, 136, 8, dtype)])


@pytest.mark.parametrize("r", [1, 4, 15, 16, 17, 33, 48, 64, 65, 130, 512])
def test_ranks(r):
    judge(f"r={r}", rows(5, 96, BF16), [make(5, 96, 72, r, BF16)])


@pytest.mark.parametrize("k,n", [(1, 1), (8, 8), (31, 63), (33, 65), (264, 24), (1000, 130)])
def test_odd_shapes(k, n):
    judge(f"{k}->{n}", rows(3, k, FP16), [make(3, k, n, 6, FP16)])


@pytest.mark.parametrize("pad,shift", [(0, 1), (8, 0), (3, 0), (5, 3)])
@pytest.mark.parametrize("adapter", [FP32, FP16, BF16], ids=str)
def test_strides_and_alignment(adapter, pad, shift):
    x = rows(10, 72, BF16, pad, shift)
    judge("strided", x, [make(10, 72, 40, 12, BF16, (adapter, adapter), pad=pad, shift=shift)])


@pytest.mark.parametrize("dtypes", [(FP32, BF16), (FP16, FP32), (BF16, FP16)], ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_dtypes_of_a_and_b(dtype, dtypes):
    judge("mixed", rows(4, 128, dtype), [make(4, 128, 64, 8, dtype, dtypes)])


@pytest.mark.parametrize("live", [[0], [1, 3, 4], list(range(1, 80, 2)), []], ids=len)
def test_live_columns_alone(live):
    p = make(9, 64, 48, 80, BF16, live=live)
    dead = [c for c in range(80) if c not in live]
    p.a[dead] = float("nan")
    p.b[:, dead] = float("nan")
    judge("live", rows(9, 64, BF16), [p])


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_of_a_cluster_share_a_sum(cluster):
    m = 8 if cluster == 4 else 20
    group = [make(m, 330, n, r, BF16) for n, r in ((64, 8), (300, 40), (31, 100))]
    judge(f"cluster {cluster}", rows(m, 330, BF16), group, cluster)


def test_a_group_of_eight_with_different_adapters():
    x = rows(2, 100, BF16)
    group = [
        make(2, 100, 20 * i + 4, i + 1, BF16, (FP32 if i % 2 else BF16, FP32)) for i in range(8)
    ]
    for i, p in enumerate(group):
        p.scale = 0.5 * i
    judge("group", x, group)


def test_no_rows_and_no_columns():
    p = make(0, 16, 24, 4, BF16)
    assert decode(rows(0, 16, BF16), [p])[0].shape == (0, 24)
    p = make(2, 16, 0, 4, BF16)
    assert decode(rows(2, 16, BF16), [p])[0].shape == (2, 0)


def test_nan_and_inf_stay_in_their_rows():
    """And padded rank columns do not turn them into NaN elsewhere."""
    x, p = rows(5, 64, BF16), make(5, 64, 32, 3, BF16)
    x[1, 7], x[3, 0] = float("nan"), float("inf")
    (out,) = decode(x, [p])
    expected = plain(x, p)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_the_same_bits_every_time():
    x, p = rows(17, 500, BF16), make(17, 500, 90, 24, BF16)
    first, second = (decode(x, [p])[0] for _ in range(2))
    assert torch.equal(first, second)


# ---- Dropout.


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("m,k,r,cluster", [
    (1, 8, 3, 1), (7, 1100, 8, 1), (8, 2050, 40, 4), (12, 520, 64, 2), (20, 1030, 130, 2),
    (33, 700, 16, 1), (64, 600, 33, 1),
])  # fmt: skip
def test_dropout_keeps_what_shrink_keeps(m, k, r, cluster, dtype):
    """S alone: A picks columns of a row of ones, and B is the identity."""
    picked = torch.randperm(k)[:r]
    a, b = torch.zeros(r, k), torch.eye(r)
    a[torch.arange(len(picked)), picked] = 1
    p = Adapter(a, b, torch.zeros(m, r, dtype=dtype), scale=1.0)
    (out,) = decode(torch.ones(m, k, dtype=dtype), [p], cluster, 0.5)
    assert torch.equal(out[:, : len(picked)].double(), 2 * kept(m, k, 0.5, 0)[:, picked])


@pytest.mark.parametrize("pad,shift", [(0, 0), (3, 5)])
@pytest.mark.parametrize("dropout_p", [1e-6, 0.05, 0.7])
@pytest.mark.parametrize("adapter", [FP32, FP16, BF16], ids=str)
def test_dropout(adapter, dropout_p, pad, shift):
    group = [
        make(10, 1200, 40, 12, BF16, (adapter, adapter), pad=pad, shift=shift),
        make(10, 1200, 0, 4, BF16),  # nothing to do, but it counts
        make(10, 1200, 72, 40, BF16, live=[0, 1, 5, 39]),
    ]
    judge("dropped", rows(10, 1200, BF16, pad, shift), group, 2, dropout_p)


def test_dropped_nan_stays_nan():
    x, p = torch.ones(3, 64, dtype=BF16), make(3, 64, 8, 4, BF16)
    x[1] = float("nan")
    (out,) = decode(x, [p], dropout_p=0.999)
    assert out[1].isnan().all() and not out[0].isnan().any() and not out[2].isnan().any()


# ---- The op as the extension gives it: emulated, or on a GPU.


def layer(shape=(3, 1), k=96, n=40, r=8, dtype=BF16, adapter=FP32):
    """x [*shape, K], W, bias, A, B."""
    x = torch.randn(*shape, k, dtype=dtype, device=DEVICE)
    w = (torch.randn(n, k, device=DEVICE) / k**0.5).to(dtype)
    a = torch.randn(r, k, dtype=adapter, device=DEVICE) / k**0.5
    b = torch.randn(n, r, dtype=adapter, device=DEVICE) / r**0.5
    return x, w, torch.randn(n, dtype=dtype, device=DEVICE), a, b


def with_adapter(x, w, bias, a, b, dtype, columns=slice(None)):
    x, w, bias, a, b = (t.to(dtype) for t in (x, w, bias, a, b))
    y = torch.nn.functional.linear(x, w, bias)
    return y + SCALE * torch.nn.functional.linear(x @ a[columns].mT, b[:, columns])


@pytest.mark.parametrize("biased", [None, BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(5,), (64, 1), (2, 3, 4), (0, 1), ()], ids=str)
def test_base_layer_and_adapter(shape, biased, cuda_backend):
    x, w, bias, a, b = layer(shape)
    bias = bias.to(biased) if biased else torch.zeros_like(bias)
    with torch.no_grad():
        y = lora_decode(x, w, a, b, SCALE, bias=bias if biased else None)
    exact = with_adapter(x, w, bias, a, b, torch.float64)
    assert_as_accurate("y", y, exact, with_adapter(x, w, bias, a, b, x.dtype))
    assert y.is_contiguous() and not y.requires_grad


def test_on_a_base_made_elsewhere_which_stays_as_it_is(cuda_backend):
    x, w, bias, a, b = layer()
    base = torch.nn.functional.linear(x, w, bias)
    kept = base.clone()
    with torch.no_grad():
        y = lora_decode(x, base, a, b, SCALE, owns_base=False)
    exact = with_adapter(x, w, bias, a, b, torch.float64)
    assert_as_accurate("y", y, exact, with_adapter(x, w, bias, a, b, x.dtype))
    assert torch.equal(base, kept)


def test_mask_with_dead_columns(cuda_backend):
    x, w, bias, a, b = layer()
    live = torch.arange(8, device=DEVICE) % 3 == 0
    trains = live[:, None].expand(8, 96).contiguous(), live.expand(40, 8).contiguous()
    mask = LoraMask(*trains, live=live)
    with torch.no_grad():
        y = lora_decode(x, w, a, b, SCALE, bias=bias, mask=mask)
        short = lora_decode(x, w, a[:4], b[:, :4], SCALE, bias=bias, mask=mask)
    exact = with_adapter(x, w, bias, a, b, torch.float64, live)
    assert_as_accurate("y", y, exact, with_adapter(x, w, bias, a, b, x.dtype, live))
    assert short is None  # a mask of another adapter


def from_seed(function, *arguments, **options):
    """What it gives, and what the generator gives next."""
    torch.manual_seed(11)
    with torch.no_grad():
        return function(*arguments, **options), torch.rand(1, device=DEVICE)


@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 1), (0, 2)], ids=str)
def test_dropout_is_that_of_lora_linear(shape, dropout_p, cuda_backend):
    x, w, bias, a, b = layer(shape, k=1100)
    options = {"bias": bias, "dropout_p": dropout_p}
    y, after = from_seed(lora_decode, x, w, a, b, SCALE, **options)
    plain, after_plain = from_seed(lora_linear, x, w, a, b, SCALE, **options)
    exact, _ = from_seed(lora_linear, x.float(), w.float(), a, b, SCALE, **options)
    assert_as_accurate("y", y, exact.double(), plain)
    assert torch.equal(after, after_plain)


def test_dropout_is_that_of_lora_add(cuda_backend):
    x, w, bias, a, b = layer()
    base = torch.nn.functional.linear(x, w, bias)
    y, after = from_seed(lora_decode, x, base, a, b, SCALE, dropout_p=0.4, owns_base=False)
    plain, after_plain = from_seed(lora_add, base, x, a, b, SCALE, dropout_p=0.4)
    exact, _ = from_seed(lora_add, base.float(), x.float(), a, b, SCALE, dropout_p=0.4)
    assert_as_accurate("y", y, exact.double(), plain)
    assert torch.equal(after, after_plain)


def test_dropout_compiles_whole_and_gives_the_same(cuda_backend):
    x, w, bias, a, b = layer()

    def once(x):
        return lora_decode(x, w, a, b, SCALE, bias=bias, dropout_p=0.5)

    compiled = torch.compile(once, fullgraph=True, backend="aot_eager")
    for one, other in zip(from_seed(compiled, x), from_seed(once, x)):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_dropout_in_a_cuda_graph_is_drawn_anew(cuda_backend):
    x, w, _, a, b = layer()
    from_seed(lora_decode, x, w, a, b, SCALE, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = lora_decode(x, w, a, b, SCALE, dropout_p=0.5)
    torch.manual_seed(11)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert torch.equal(first, from_seed(lora_decode, x, w, a, b, SCALE, dropout_p=0.5)[0])
    assert not torch.equal(first, y)


def test_what_is_not_for_it(cuda_backend):
    x, w, bias, a, b = layer()
    assert lora_decode(x, w, a, b, SCALE) is None  # autograd is on
    assert not serves(x)
    with torch.no_grad():
        assert serves(x) and not serves(x.float()) and not serves(x.expand(3, 22, 96))
        assert lora_decode(x.expand(3, 22, 96), w, a, b, SCALE) is None
        assert lora_decode(x, w.float(), a, b, SCALE) is None
        assert lora_decode(x, w, a.double(), b, SCALE) is None
        assert lora_decode(x, w, a[:, 1:], b, SCALE) is None
        assert lora_decode(x, w, a, b, SCALE, bias=bias[1:]) is None
        assert lora_decode(x, w, a, b, SCALE, dropout_p=1.0) is None
        assert lora_decode(x, w, a, b, SCALE, dropout_p=-0.1) is None
        with torch.autocast(DEVICE, dtype=FP16):
            assert lora_decode(x, w, a, b, SCALE) is None
        with torch.autocast(DEVICE, dtype=BF16):
            assert lora_decode(x, w, a, b, SCALE) is not None


def test_served_nowhere_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    with torch.no_grad():
        assert not serves(layer()[0])


def test_another_backend_by_name(cuda_backend, monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    with torch.no_grad():
        assert not serves(layer()[0])


def test_compiles_whole_and_gives_the_same(cuda_backend):
    x, w, bias, a, b = layer()

    def twice(x):
        h = lora_decode(x, w, a, b, SCALE, bias=bias)
        return lora_decode(x + h.sum(-1, keepdim=True), w, a, b, SCALE)

    with torch.no_grad():
        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), twice(x))


def test_registered_op(cuda_backend):
    x, w, bias, a, b = layer((4,))
    out = torch.randn(4, 40, dtype=BF16, device=DEVICE)
    op, live = torch.ops.lorapar_cuda.lora_decode, torch.tensor([0, 5], dtype=torch.int32)
    torch.library.opcheck(op.default, ([out], x, [a], [b], [None], [SCALE], None, 0.0))
    two = ([out, out.clone()], x, [a] * 2, [b] * 2, [None, live.to(DEVICE)], [1.0, 2.0])
    seed = torch.tensor([SEED], device=DEVICE)
    torch.library.opcheck(op.default, (*two, seed, 0.5))
    apart = torch.randn(4, 80, dtype=BF16, device=DEVICE)[:, ::2]
    same = apart.contiguous()
    for outs in ([apart], [same]):
        op(outs, x, [a], [b], [None], [SCALE], seed, 0.5)
    assert torch.equal(apart, same)
    many = torch.zeros(65, 40, dtype=BF16, device=DEVICE)
    with pytest.raises(RuntimeError, match="more than 64"):
        op([many], x[:1].expand(65, 96), [a], [b], [None], [1.0], None, 0.0)
    for wrong in ((None, 0.5), (seed, 0.0), (seed, 1.0)):
        with pytest.raises(ValueError, match="p must lie in"):
            op([out], x, [a], [b], [None], [1.0], *wrong)
