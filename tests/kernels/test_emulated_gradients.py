"""csrc/dy_gradients.cu, x_gradients.cu and few_rows.cu on the CPU (see emulator/): values against
float64, exact zeros where frozen, nothing unwritten, nothing written outside, the same bits every
time."""

import ctypes
from ctypes import c_float, c_int, c_int64, c_size_t, c_void_p

import pytest
import torch
from cases import decoded, make_mask, pairwise
from emulator.build import TYPES, Matrix, array, emulated, matrix, pointer
from torch import Tensor

from lorapar_kernels.mask import LoraMask
from lorapar_kernels.pack import padded_rank
from lorapar_kernels.testing import assert_as_accurate

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCALE = 1.25  # of dS
SCALES = (2.5, -0.5, 1.0)  # of dB
BORDER = 8
MASKS = ["none", "empty", "random", "columns", "dead"]
LAYOUTS = {"contiguous": 0, "bordered": 8, "odd": 3}  # columns beside the matrix


class Gradient(ctypes.Structure):
    _fields_ = [
        ("out", c_void_p), ("type", c_int), ("rank", c_int), ("index", c_void_p),
        ("trained", c_int), ("slot", c_void_p), ("trainable", c_void_p), ("scale", c_float),
        ("sum", c_void_p), ("square", c_void_p),
    ]  # fmt: skip


class DyProjection(ctypes.Structure):
    _fields_ = [
        ("dy", Matrix), ("b", Matrix), ("s", Matrix), ("ds", Matrix), ("valid", c_void_p),
        ("n", c_int64), ("db", Gradient),
    ]  # fmt: skip


class XProjection(ctypes.Structure):
    _fields_ = [("ds", Matrix), ("bits", c_void_p), ("da", Gradient)]


class Boxes:
    """Fresh tensors, full of NaN and in a border of NaN."""

    def __init__(self):
        self.boxes = []

    def flat(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.matrix(1, torch.Size(shape).numel(), dtype=dtype)[0].view(shape)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Rows of a wider matrix."""
        box = torch.full((rows + 2, columns + 2 * BORDER), torch.nan, dtype=dtype)
        inner = box[1 : rows + 1, BORDER : columns + BORDER]
        self.boxes.append((box, inner))
        return inner

    def check(self) -> None:
        for box, inner in self.boxes:
            kept = inner.clone()
            inner.fill_(torch.nan)
            assert box.isnan().all(), "written outside"
            inner.copy_(kept)


def placed(t: Tensor, layout: str) -> Tensor:
    """The same matrix: contiguous, in a border of NaN, or where hardly a row is aligned."""
    edge, (rows, columns) = LAYOUTS[layout], t.shape
    if not edge:
        return t.contiguous()
    box = torch.full((rows + 2, columns + 2 * edge), torch.nan, dtype=t.dtype)
    return box[1 : rows + 1, edge : edge + columns].copy_(t)


def with_padding(t: Tensor, R: int) -> Tensor:
    """[M, R]: the columns past t's are NaN, so that a use of them shows."""
    out = torch.full((t.shape[0], R), torch.nan, dtype=t.dtype)
    out[:, : t.shape[1]] = t
    return out


class Adapter:
    """One A [r, K] or B [N, r] of some width (K, N), its mask and its gradient."""

    def __init__(self, of: str, r: int, width: int, kind: str, dtype: torch.dtype, scale=1.0):
        self.of, self.r, self.width, self.dtype, self.scale = of, r, width, dtype, scale
        self.mask = make_mask(kind, r, width, width, "cpu") or LoraMask(None, None)
        live = self.mask.live_columns
        self.live = torch.arange(r) if live is None else live.long()
        self.shape = (r, width) if of == "a" else (width, r)
        self.trainable = self.mask.a if of == "a" else self.mask.b

    def gradient(self, out: Tensor | None, sums: tuple | None = None) -> Gradient:
        trainable, index, slot = self.mask.tensors[:3] if self.of == "a" else self.mask.tensors[3:]
        total, square = sums or (None, None)
        return Gradient(
            pointer(out), 0 if out is None else TYPES[out.dtype], self.r, pointer(index),
            len(self.live) if index is None else len(index), pointer(slot), pointer(trainable),
            self.scale, pointer(total), pointer(square),
        )  # fmt: skip

    def of_product(self, s: Tensor, x: Tensor) -> Tensor:
        """scale · sᵀ x [live, width] where it trains, in the adapter's shape; else 0."""
        g = x.new_zeros(self.r, self.width)
        g[self.live] = self.scale * (s.t() @ x)
        g = g if self.of == "a" else g.t()
        return g if self.trainable is None else g.where(self.trainable, 0.0)

    def check(self, name: str, out: Tensor, s: Tensor, x: Tensor) -> None:
        plain = self.of_product(s.float(), x.float()).to(out.dtype)
        assert_as_accurate(name, out, self.of_product(s.double(), x.double()), plain)
        frozen = self.of_product(torch.ones(1, len(self.live)), torch.ones(1, self.width)) == 0
        assert (out[frozen] == 0).all(), f"{name}: not 0 where frozen"


def run(name: str, of: ctypes.Array, *sizes, dtype: torch.dtype, bounds: Tensor | None) -> None:
    """With a workspace of NaN, of just the bytes that the function asks for."""
    function = getattr(emulated(name), f"emulated_{name}")
    function.restype, boxes = c_size_t, Boxes()
    count = 0 if bounds is None else len(bounds) - 1
    arguments = (of, len(of), *sizes, TYPES[dtype], c_void_p(pointer(bounds)), count)
    floats = function(*arguments, None) // 4
    workspace = boxes.flat(floats, dtype=F32)
    boxes.check()
    start = boxes.boxes[0][0].data_ptr() + 4 * (floats + 3 * BORDER)
    assert floats == 0 or start == workspace.data_ptr()
    function(*arguments, c_void_p(start))
    boxes.check()


def assert_same(got: list, again: list) -> None:
    for left, right in zip(got, again):
        assert (left is None) == (right is None)
        if left is not None:
            assert torch.equal(left.nan_to_num(123.0), right.nan_to_num(123.0)), "other bits"


# ---- dS and dB.
class Dy:
    """Inputs of dy_gradients for P projections; wants: "ds", "db" or "both" of each in turn."""

    def __init__(self, dtype, rank, mask, adapter, layout, M, N, P, wants, odd=37):
        self.dtype, self.M = dtype, M
        widths = [N if i % 2 == 0 else N + odd for i in range(P)]
        at = MASKS.index(mask)
        self.adapters = [
            Adapter("b", max(1, rank - i), n, MASKS[(at + i) % len(MASKS)], adapter or dtype,
                    SCALES[i % 3])
            for i, n in enumerate(widths)
        ]  # fmt: skip
        self.R = padded_rank(max(len(a.live) for a in self.adapters))
        self.wants = [(wants, "both", "db")[i % 3] for i in range(P)]
        self.dy, self.b, self.s, self.valid = [], [], [], []
        for a in self.adapters:
            live, n = len(a.live), a.width
            self.dy.append(placed(torch.randn(M, n).to(dtype), layout))
            b = torch.zeros(self.R, n)
            b[:live] = torch.randn(live, n)
            self.b.append(placed(b.to(dtype), layout))
            s = with_padding(torch.randn(M, live).to(dtype), self.R)
            self.s.append(placed(s, layout))
            self.valid.append((torch.arange(self.R) < live).to(torch.int8))

    def projections(self, boxes: Boxes, sums=None) -> tuple[ctypes.Array, list, list]:
        """What the kernels are told, dS and dB of each projection; None where not wanted."""
        of, dss, dbs = [], [], []
        for i, a in enumerate(self.adapters):
            makes_ds, makes_db = self.wants[i] != "db", self.wants[i] != "ds"
            ds = boxes.matrix(self.M, self.R, dtype=self.dtype) if makes_ds else None
            db = boxes.flat(*a.shape, dtype=a.dtype) if makes_db and not sums else None
            gradient = a.gradient(db, sums[i] if sums and makes_db else None)
            of.append(DyProjection(
                matrix(self.dy[i]), matrix(self.b[i]), matrix(self.s[i] if makes_db else None),
                matrix(ds), pointer(self.valid[i]), a.width, gradient,
            ))  # fmt: skip
            dss.append(ds)
            dbs.append(db)
        return array(DyProjection, of), dss, dbs

    def run(self, bounds=None, sums=None) -> list:
        """dS, then dB, of each projection."""
        boxes = Boxes()
        of, dss, dbs = self.projections(boxes, sums)
        run(
            "dy_gradients", of, c_int64(self.M), self.R, c_float(SCALE),
            dtype=self.dtype, bounds=bounds,
        )  # fmt: skip
        boxes.check()
        return dss + dbs

    def check(self, outs: list) -> None:
        P = len(self.adapters)
        for i, (a, ds, db) in enumerate(zip(self.adapters, outs[:P], outs[P:])):
            live, dy, b = len(a.live), self.dy[i], self.b[i]
            if ds is not None:
                exact = SCALE * (dy.double() @ b.double().t())
                plain = (SCALE * (dy.float() @ b.float().t())).to(self.dtype)
                assert_as_accurate(f"dS{i}", ds, exact, plain)
                assert (ds[:, live:] == 0).all(), f"dS{i}: not 0 where not valid"
            if db is not None:
                a.check(f"dB{i}", db, self.s[i][:, :live], dy)


DY = {
    "dtype": [F32, F16, BF16], "rank": [3, 16, 32, 64, 128], "mask": MASKS,
    "adapter": [None, F32, F16], "layout": list(LAYOUTS), "M": [0, 1, 50, 200],
    "N": [1, 9, 64, 300, 520], "P": [1, 3], "wants": ["ds", "db", "both"],
}  # fmt: skip


@pytest.mark.parametrize("case", pairwise(DY), ids=lambda c: "-".join(map(str, c.values())))
def test_dy_gradients(case):
    inputs = Dy(**case)
    outs = inputs.run()
    inputs.check(outs)
    assert_same(outs, inputs.run())


@pytest.mark.parametrize("dtype, rank, N, P", [(BF16, 512, 300, 1), (F16, 16, 256 * 23, 3)])
def test_dy_gradients_of_many_tiles(dtype, rank, N, P):
    """Several tiles of rows a block, and several blocks of the rank."""
    inputs = Dy(dtype, rank, "random", F32, "contiguous", 300, N, P, "both")
    inputs.check(inputs.run())


def test_what_is_not_finite(dtype=F16):
    """NaN and Inf of dY reach what they touch and nothing else: not the padding, not a frozen
    element."""
    inputs = Dy(dtype, 5, "columns", None, "contiguous", 70, 40, 1, "both")
    clean = inputs.run()
    inputs.dy[0][3, 7] = torch.nan
    inputs.dy[0][66, 30] = torch.inf
    ds, db = inputs.run()
    a = inputs.adapters[0]
    assert not ds[[3, 66], :5].isfinite().any() and (ds[:, 5:] == 0).all()
    assert not db[[7, 30]][a.trainable[[7, 30]]].isfinite().any()
    assert (db[~a.trainable] == 0).all()
    ds[[3, 66]], db[[7, 30]] = clean[0][[3, 66]], clean[1][[7, 30]]
    assert_same([ds, db], clean)


EXAMPLES = [  # bounds: all rows; some outside, an empty one; none at all
    [0, 1, 70, 90], [5, 40, 40, 41, 80], [0],
]  # fmt: skip


@pytest.mark.parametrize("bounds", EXAMPLES, ids=str)
@pytest.mark.parametrize(
    "dtype, rank, wants", [(F32, 5, "both"), (F16, 16, "db"), (BF16, 70, "both")]
)
def test_sums_of_db(dtype, rank, wants, bounds):
    inputs = Dy(dtype, rank, "none", F32, "contiguous", 90, 70, 2, wants)
    for a in inputs.adapters:
        a.mask, a.trainable, a.live = LoraMask(None, None), None, torch.arange(a.r)
    sums = sums_of(inputs.adapters)
    before = [[t.clone() for t in pair] for pair in sums]
    b = torch.tensor(bounds, dtype=torch.int32)
    outs = inputs.run(b, sums)
    inputs.check(outs)
    for i, a in enumerate(inputs.adapters):
        check_sums(f"dB{i}", a, inputs.s[i][:, : a.r], inputs.dy[i], bounds, before[i], sums[i])


def sums_of(adapters: list[Adapter]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(a.shape), torch.rand(a.shape)) for a in adapters]


def check_sums(name, a: Adapter, s, x, bounds, before, after) -> None:
    """after - before = Σg and Σg² over examples."""
    ways = []
    for kind in (torch.float64, F32):
        total, square = (t.to(kind) for t in before)
        for start, stop in zip(bounds, bounds[1:]):
            g = a.of_product(s[start:stop].to(kind), x[start:stop].to(kind))
            total, square = total + g, square + g * g
        ways.append((total, square))
    for label, out, exact, plain in zip(("sum", "square"), after, *ways):
        assert_as_accurate(f"{name} {label}", out, exact, plain)


# ---- dA.
class X:
    """Inputs of x_gradients for P projections."""

    def __init__(self, dtype, rank, mask, adapter, layout, M, K, P, dropout):
        self.dtype, self.M, self.K = dtype, M, K
        at = MASKS.index(mask)
        self.adapters = [
            Adapter("a", max(1, rank - i), K, MASKS[(at + i) % len(MASKS)], adapter or dtype)
            for i in range(P)
        ]
        self.R = padded_rank(max(len(a.live) for a in self.adapters))
        self.x = placed(torch.randn(M, K).to(dtype), layout)
        self.ds = [
            placed(with_padding(torch.randn(M, len(a.live)).to(dtype), self.R), layout)
            for a in self.adapters
        ]
        self.words = -(-K // 1024) * 64
        shape, self.bits = (P, M, self.words), None
        if dropout:
            self.bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
            self.keep = decoded(self.bits, K)

    def projections(self, boxes, sums=None, without=None) -> tuple[ctypes.Array, list]:
        """What the kernels are told, and dA of each projection."""
        of, das = [], []
        for i, a in enumerate(self.adapters):
            da = None if sums else boxes.flat(*a.shape, dtype=a.dtype)
            bits = None if self.bits is None else pointer(self.bits[i])
            ds = None if i == without else self.ds[i]
            gradient = a.gradient(da, sums[i] if sums else None)
            of.append(XProjection(matrix(ds), bits, gradient))
            das.append(da)
        return array(XProjection, of), das

    def run(self, bounds=None, sums=None, without: int | None = None) -> list:
        """dA of each projection; `without` dS for one."""
        boxes = Boxes()
        of, das = self.projections(boxes, sums, without)
        x = matrix(self.x)
        run(
            "x_gradients", of, c_void_p(x.data), c_int64(x.stride),
            c_int64(self.words), c_int64(self.M), c_int64(self.K), self.R,
            dtype=self.dtype, bounds=bounds,
        )  # fmt: skip
        boxes.check()
        return das

    def left_right(self, i: int) -> tuple[Tensor, Tensor]:
        kept = self.x if self.bits is None else self.x * self.keep[i].to(self.dtype)
        return self.ds[i][:, : len(self.adapters[i].live)], kept

    def check(self, das: list) -> None:
        for i, (a, da) in enumerate(zip(self.adapters, das)):
            a.check(f"dA{i}", da, *self.left_right(i))


X_CASES = {
    "dtype": [F32, F16, BF16], "rank": [3, 16, 32, 64, 128], "mask": MASKS,
    "adapter": [None, F32, F16], "layout": list(LAYOUTS), "M": [0, 1, 70, 200, 1100],
    "K": [1, 70, 130, 1030], "P": [1, 2, 3, 5], "dropout": [False, True],
}  # fmt: skip


@pytest.mark.parametrize("case", pairwise(X_CASES), ids=lambda c: "-".join(map(str, c.values())))
def test_x_gradients(case):
    inputs = X(**case)
    das = inputs.run()
    inputs.check(das)
    assert_same(das, inputs.run())


@pytest.mark.parametrize("dtype, rank, P", [(BF16, 512, 2), (F16, 384, 6)])
def test_x_gradients_of_many_parts(dtype, rank, P):
    """More columns of dS than one launch takes."""
    inputs = X(dtype, rank, "random", F32, "contiguous", 70, 40, P, True)
    inputs.check(inputs.run())


def test_a_projection_without_ds():
    inputs = X(F16, 8, "none", None, "contiguous", 20, 30, 3, True)
    das = inputs.run(without=1)
    assert (das[1] == 0).all()
    assert_same(das[::2], inputs.run()[::2])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_dropped_nan_stays(dtype):
    inputs = X(dtype, 8, "none", None, "contiguous", 20, 30, 1, True)
    inputs.x[4, 5] = torch.nan
    inputs.bits[0, 4, 5] = 0
    (da,) = inputs.run()
    assert da[:, 5].isnan().all()
    assert da.isnan().sum() == 8


@pytest.mark.parametrize("bounds", EXAMPLES, ids=str)
@pytest.mark.parametrize(
    "dtype, rank, dropout", [(F32, 5, True), (F16, 16, False), (BF16, 70, True)]
)
def test_sums_of_da(dtype, rank, dropout, bounds):
    inputs = X(dtype, rank, "none", F32, "contiguous", 90, 70, 2, dropout)
    for a in inputs.adapters:
        a.mask, a.trainable, a.live = LoraMask(None, None), None, torch.arange(a.r)
    inputs.ds = [torch.randn(90, inputs.R).to(dtype) for _ in inputs.adapters]
    sums = sums_of(inputs.adapters)
    before = [[t.clone() for t in pair] for pair in sums]
    inputs.run(torch.tensor(bounds, dtype=torch.int32), sums)
    for i, a in enumerate(inputs.adapters):
        check_sums(f"dA{i}", a, *inputs.left_right(i), bounds, before[i], sums[i])


# ---- All of them, of few rows.
class FewRows:
    """Inputs of few_rows: of dy_gradients and x_gradients; the dS that it makes it uses for dA."""

    def __init__(self, dtype, rank, mask, adapter, layout, M, N, K, P, wants, dropout):
        self.dy = Dy(dtype, rank, mask, adapter, layout, M, N, P, wants, odd=40)
        self.x = X(dtype, rank, mask, adapter, layout, M, K, P, dropout)
        R = max(self.dy.R, self.x.R)
        if R != self.dy.R or R != self.x.R:  # as if one projection had more columns
            self.dy.R = self.x.R = R
            for of in (self.dy.b, self.dy.s, self.dy.valid, self.x.ds):
                for i, t in enumerate(of):
                    of[i] = wider(t, R, rows=of is self.dy.b)

    def run(self, cluster: int, takes: bool = True, without: int | None = None) -> list:
        boxes, dy, x = Boxes(), self.dy, self.x
        of, dss, dbs = dy.projections(boxes)
        x.ds = [made if made is not None else ds for made, ds in zip(dss, x.ds)]
        of_x, das = x.projections(boxes, without=without)
        rows = matrix(x.x)
        took = emulated("few_rows").emulated_few_rows(
            of, len(of), of_x, len(of_x), c_void_p(rows.data), c_int64(rows.stride),
            c_int64(x.words), c_int64(dy.M), c_int64(x.K), dy.R, c_float(SCALE), TYPES[dy.dtype],
            cluster,
        )  # fmt: skip
        assert bool(took) == takes
        boxes.check()
        return [dss + dbs, das]

    def check(self, outs: list) -> None:
        self.dy.check(outs[0])
        self.x.check(outs[1])


def wider(t: Tensor, R: int, rows: bool) -> Tensor:
    """Zeros up to R rows, or NaN up to R columns; 0 up to R numbers."""
    if t.dim() == 1:
        return torch.cat([t, t.new_zeros(R - len(t))])
    if rows:
        return torch.cat([t, t.new_zeros(R - t.shape[0], t.shape[1])])
    return with_padding(t, R)


FEW = {
    "dtype": [F16, BF16], "rank": [3, 8, 16, 32, 64], "mask": MASKS, "adapter": [None, F32, F16],
    "layout": ["contiguous", "bordered"], "M": [1, 50, 200], "N": [8, 64, 304, 2304],
    "K": [8, 136, 1032], "P": [1, 3], "wants": ["ds", "db", "both"], "dropout": [False, True],
    "cluster": [1, 2],
}  # fmt: skip


@pytest.mark.parametrize("case", pairwise(FEW), ids=lambda c: "-".join(map(str, c.values())))
def test_few_rows(case):
    cluster = case.pop("cluster")
    inputs = FewRows(**case)
    outs = inputs.run(cluster)
    inputs.check(outs)
    for one, again in zip(outs, inputs.run(cluster)):
        assert_same(one, again)


@pytest.mark.parametrize("rank, M, P", [(8, 1000, 8), (40, 1024, 2)])
def test_few_rows_are_many(rank, M, P):
    """The most rows, and blocks enough for 64 rows each where the rank lets them."""
    inputs = FewRows(BF16, rank, "random", F32, "contiguous", M, 64, 72, P, "both", True)
    inputs.check(inputs.run(2))


def test_few_rows_without_ds():
    inputs = FewRows(BF16, 8, "none", None, "contiguous", 20, 64, 72, 3, "both", True)
    das = inputs.run(2, without=1)[1]
    assert (das[1] == 0).all()
    assert_same(das[::2], inputs.run(2)[1][::2])


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_few_rows_let_nan_through(dtype):
    """A dropped NaN stays, one of dY reaches what it touches and nothing else."""
    inputs = FewRows(dtype, 8, "none", None, "contiguous", 40, 64, 72, 1, "both", True)
    (ds, db), (da,) = inputs.run(2)
    inputs.dy.dy[0][3, 7] = torch.nan
    inputs.x.x[4, 5] = torch.nan
    inputs.x.bits[0, 4, 5] = 0
    (bad_ds, bad_db), (bad_da,) = inputs.run(2)
    assert bad_ds[3, :8].isnan().all() and (bad_ds[:, 8:] == 0).all()
    assert bad_db[7].isnan().all() and bad_da.isnan().all()
    bad_ds[3], bad_db[7] = ds[3], db[7]
    assert_same([bad_ds, bad_db], [ds, db])
    inputs.dy.dy[0][3, 7] = 1.0
    (bad_da,) = inputs.run(2)[1]
    assert bad_da[:, 5].isnan().all() and bad_da.isnan().sum() == 8


@pytest.mark.parametrize(
    "change",
    [{"dtype": F32}, {"rank": 65}, {"layout": "odd"}, {"M": 1025}, {"N": 12}, {"K": 68}],
    ids=str,
)
def test_what_few_rows_leaves(change):
    case = {"dtype": BF16, "rank": 8, "layout": "contiguous", "M": 20, "N": 64, "K": 72} | change
    inputs = FewRows(**case, mask="none", adapter=None, P=1, wants="both", dropout=False)
    inputs.run(1, takes=False)
