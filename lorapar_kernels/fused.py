"""The raw forward and backward of a group of projections on Triton kernels and cuBLAS.

Forward     S = drop(x) Aᵀ once for all      y_i = S_i B_i + bias_i, then += x W_iᵀ
Backward    dS_i = dY_i B_i / (1-p)          dX = Σ_i keep_i ⊙ (dS_i A_i), then += dY_i W_i in turn
            dA_i = dS_iᵀ (keep_i ⊙ x)        dB_i = scale · dY_iᵀ S_i      beside the dX GEMMs

The base GEMMs run with beta = 1 on the adapter's part (plan a), or as one GEMM that runs on over
the rank where a measured table says that it is faster (plan b). dA, dB and their finish need
nothing of dX: on large inputs they run on a second stream, dA on few multiprocessors, while the
GEMMs use the rest; where that would delay them, the finish alone does. A scoring pass stays on one
stream: the host binds it, and a fork costs the host more than it saves. Packed tensors: a_pack
[P·R, K], b_pack [R, Σ N_i], S and dS [M, P·R].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lorapar_kernels import dy_gradients, extended_gemm
from lorapar_kernels._launch import cublas, side_stream
from lorapar_kernels._library import op
from lorapar_kernels.expand import expand
from lorapar_kernels.gradient import finish, gradient
from lorapar_kernels.kept import Kept, Sizes, new_kept, parts_of
from lorapar_kernels.pack import pack, padded_rank
from lorapar_kernels.shrink import clear_padding, shrink, shrink_dropout

FORK_FLOPS = 2**38  # of the dX GEMMs: from here on (0.35 ms) a second stream is worth its cost
PARTIAL_BYTES = 2**28  # of partial sums in a scoring pass; more examples go in several rounds
MASK_FIELDS = 6  # tensors of one projection's mask in `masks`


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of adapters, by number


class _Shape(NamedTuple):
    """Of one adapter: r, N, the dtypes of A and B."""

    rank: int
    width: int
    a: torch.dtype
    b: torch.dtype


def shapes_of(a: list[Tensor], b: list[Tensor]) -> list[int]:
    """What the backward has to know of the adapters, for `adapters`: K, then four numbers each. The
    adapters themselves are not saved for it: under CUDA graphs each tensor costs the host time."""
    numbers = [a[0].shape[1]]
    for one, other in zip(a, b):
        numbers += [*other.shape[::-1], _DTYPES.index(one.dtype), _DTYPES.index(other.dtype)]
    return numbers


def _read_shapes(adapters: list[int]) -> tuple[int, list[_Shape]]:
    K, *rest = adapters
    parts = zip(*(rest[i::4] for i in range(4)))
    return K, [_Shape(r, n, _DTYPES[a], _DTYPES[b]) for r, n, a, b in parts]


def live_columns(a: list[Tensor], live: list[Tensor | None]) -> list[int]:
    """How many rank columns of each projection are live."""
    return [t.shape[0] if some is None else some.shape[0] for t, some in zip(a, live)]


def _sizes(M: int, K: int, widths: list[int], lives: list[int], p: float) -> Sizes:
    return Sizes(M, K, len(widths), padded_rank(max(lives)), sum(widths), p > 0.0)


def _widths(b: list[Tensor]) -> list[int]:
    return [t.shape[0] for t in b]


def _forward_fake(x, bases, biases, a, b, live, scales, seed, p, owns_base):
    M, K = x.shape
    ys = [
        x.new_empty(M, t.shape[0]) if owns_base else base.new_empty(M, t.shape[0])
        for t, base in zip(b, bases)
    ]
    return [*ys, new_kept(x, _sizes(M, K, _widths(b), live_columns(a, live), p))]


@op(
    "lora_forward(Tensor x, Tensor[] bases, Tensor?[] biases, Tensor[] a, Tensor[] b, "
    "Tensor?[] live, float[] scales, Tensor? seed, float p, bool owns_base) -> Tensor[]",
    fake=_forward_fake,
)
def lora_forward(x, bases, biases, a, b, live, scales, seed, p, owns_base):
    """[y of each projection, then what the backward needs: `kept`]."""
    out = _forward_fake(x, bases, biases, a, b, live, scales, seed, p, owns_base)
    *ys, kept = out
    widths, lives = _widths(b), live_columns(a, live)
    parts = parts_of(kept, _sizes(*x.shape, widths, lives, p))
    _keep(x, a, b, live, scales, seed, p, parts)
    _outputs(x, bases, biases, widths, lives, parts, p, owns_base, ys)
    return out


def _kept_fake(x, a, b, live, scales, seed, p):
    return new_kept(x, _sizes(*x.shape, _widths(b), live_columns(a, live), p))


@op(
    "lora_kept(Tensor x, Tensor[] a, Tensor[] b, Tensor?[] live, float[] scales, Tensor? seed, "
    "float p) -> Tensor",
    fake=_kept_fake,
)
def lora_kept(x, a, b, live, scales, seed, p):
    """The first half of `lora_forward`: what the backward needs."""
    kept = _kept_fake(x, a, b, live, scales, seed, p)
    sizes = _sizes(*x.shape, _widths(b), live_columns(a, live), p)
    parts = parts_of(kept, sizes)
    _keep(x, a, b, live, scales, seed, p, parts)
    for i, count in enumerate(live_columns(a, live)):  # before it is saved
        clear_padding(parts.s[:, i * sizes.R : (i + 1) * sizes.R], count if p == 0.0 else sizes.R)
    return kept


def _outputs_fake(x, bases, biases, widths, lives, kept, p):
    return [x.new_empty(x.shape[0], width) for width in widths]


@op(
    "lora_outputs(Tensor x, Tensor[] bases, Tensor?[] biases, int[] widths, int[] lives, "
    "Tensor kept, float p) -> Tensor[]",
    fake=_outputs_fake,
)
def lora_outputs(x, bases, biases, widths, lives, kept, p):
    """The second half, of projections that own their base: y of each from `kept`."""
    ys = _outputs_fake(x, bases, biases, widths, lives, kept, p)
    parts = parts_of(kept, _sizes(*x.shape, widths, lives, p))
    _outputs(x, bases, biases, widths, lives, parts, p, True, ys)
    return ys


def _keep(x, a, b, live, scales, seed, p, parts: Kept) -> None:
    """Fills `parts`: A and B packed, S and the bits of dropout."""
    bits, a_pack, b_pack, valid, s = parts
    R, columns = b_pack.shape[0], _columns(b_pack, _widths(b))
    for i in range(len(a)) if R else ():
        rows = slice(i * R, (i + 1) * R)
        pack(a[i], b[i], live[i], scales[i], a_pack[rows], columns[i], valid[rows])
    if p > 0.0:
        shrink_dropout(x, a_pack, valid, seed, p, s, bits)
    else:
        shrink(x, a_pack, valid, s, R)


def _outputs(x, bases, biases, widths, lives, parts: Kept, p, owns_base, ys) -> None:
    """Fills `ys` from S and the packed B."""
    R, columns = parts.b_pack.shape[0], _columns(parts.b_pack, widths)
    for i, y in enumerate(ys):
        s_i, base, bias = parts.s[:, i * R : (i + 1) * R], bases[i], biases[i]
        clear_from = lives[i] if p == 0.0 else R  # dropout's S has zeros already
        if not owns_base:
            clear_padding(s_i, clear_from)
            expand(s_i, columns[i], y, base=base)
            continue
        weight = base if base.dtype == x.dtype else base.to(x.dtype)
        if lives[i] and extended_gemm.wins(x, weight, columns[i], R, transposed=True):
            extended_gemm.extended_gemm(
                x, weight, s_i, columns[i], y, transposed=True, live=lives[i], bias=bias
            )
        elif R or bias is not None:
            clear_padding(s_i, clear_from)
            expand(s_i, columns[i], y, bias=bias)
            y.addmm_(x, weight.t())
        else:
            torch.mm(x, weight.t(), out=y)


def _columns(b_pack: Tensor, widths: list[int]) -> list[Tensor]:
    """b_pack [R, Σ N_i] cut into its projections."""
    return [b_pack] if len(widths) == 1 else list(b_pack.split(widths, dim=1))


def _backward_fake(x, dys, weights, adapters, masks, live, kept, scales, p, need_x, need_a, need_b):
    K, shapes = _read_shapes(adapters)
    dx = kept.new_empty(_rows(dys), K) if need_x else kept.new_empty(0)
    das = [_room((s.rank, K), s.a, n, kept) for s, n in zip(shapes, need_a)]
    dbs = [_room((s.width, s.rank), s.b, n, kept) for s, n in zip(shapes, need_b)]
    return [dx, *das, *dbs]


def _room(shape: tuple[int, int], dtype: torch.dtype, needed: bool, kept: Tensor) -> Tensor:
    return kept.new_empty(shape if needed else 0, dtype=dtype)


def _rows(dys: list[Tensor | None]) -> int:
    return next(dy.shape[0] for dy in dys if dy is not None)


@op(
    "lora_backward(Tensor? x, Tensor?[] dys, Tensor[] weights, int[] adapters, Tensor?[] masks, "
    "int[] live, Tensor kept, float[] scales, float p, bool need_x, bool[] need_a, "
    "bool[] need_b) -> Tensor[]",
    fake=_backward_fake,
)
def lora_backward(x, dys, weights, adapters, masks, live, kept, scales, p, need_x, need_a, need_b):
    """[dX, dA of each projection, dB of each]; empty where not needed."""
    fields = [masks[i : i + MASK_FIELDS] for i in range(0, len(masks), MASK_FIELDS)]
    some = max(live) > 0
    trains_a = [some and n and (f[1] is None or len(f[1]) > 0) for n, f in zip(need_a, fields)]
    trains_b = [
        some and n and dy is not None and (f[4] is None or len(f[4]) > 0)
        for n, f, dy in zip(need_b, fields, dys)
    ]
    K, shapes = _read_shapes(adapters)
    step = _Backward(x, dys, weights, [s.width for s in shapes], live, kept, K, p)
    step.make_ds([need_x or t for t in trains_a], trains_b, [f[4] for f in fields])

    # Made on the current stream: they outlive this call, and so does their memory's stream.
    das = [_start((s.rank, K), s.a, *wanted, kept) for s, *wanted in zip(shapes, need_a, trains_a)]
    dbs = [
        _start((s.width, s.rank), s.b, *wanted, kept)
        for s, *wanted in zip(shapes, need_b, trains_b)
    ]

    def partials():
        of_a = step.partial_da(trains_a, [f[1] for f in fields])
        return list(of_a), list(step.partial_db(trains_b, [f[4] for f in fields]))

    def finishes(of_a, of_b):
        for i, partial, first, columns in of_a:
            mask, _, slot = fields[i][:3]
            finish(partial, das[i], 0, slot=slot, mask=mask, first=first, columns=columns)
        for i, partial in of_b:
            mask, _, slot = fields[i][3:]
            finish(partial, dbs[i], 1, slot=slot, mask=mask, scale=scales[i])

    return [step.make_all(partials, finishes, need_x), *das, *dbs]


def _start(shape, dtype: torch.dtype, needed: bool, trains: bool, kept: Tensor) -> Tensor:
    """Room for a gradient that a kernel will make; zeros where frozen; nothing if not needed."""
    if needed and not trains:
        return kept.new_zeros(shape, dtype=dtype)
    return _room(shape, dtype, needed, kept)


def _sums_fake(x, dys, weights, adapters, sums, bounds, live, kept, scales, p, need_x):
    return kept.new_empty(_rows(dys), x.shape[1]) if need_x else kept.new_empty(0)


@op(
    "lora_backward_sums(Tensor x, Tensor?[] dys, Tensor[] weights, int[] adapters, "
    "Tensor(a!)[] sums, Tensor[] bounds, int[] live, Tensor kept, float[] scales, float p, "
    "bool need_x) -> Tensor",
    fake=_sums_fake,
)
def lora_backward_sums(x, dys, weights, adapters, sums, bounds, live, kept, scales, p, need_x):
    """dX; adds each example's gradient and its square to sums = (Σg A, Σg² A, Σg B, Σg² B) · P."""
    K, shapes = _read_shapes(adapters)
    step = _Backward(x, dys, weights, [s.width for s in shapes], live, kept, K, p)
    P, R, columns, bits = step.P, step.R, step.columns, step.bits
    step.make_ds([True] * P, [False] * P, [None] * P)
    used = [i for i, dy in enumerate(step.dys) if dy is not None]
    kept = bits if p > 0.0 else None
    if len({(t.data_ptr(), t.shape) for t in bounds}) == 1:  # x is read once for all
        groups = [(step.ds, kept, used)]
    else:
        groups = [(step.ds_of(i), None if kept is None else kept[i : i + 1], [i]) for i in used]
    for ds, its_bits, members in groups:
        for part in _runs(bounds[members[0]], ds.shape[1] * x.shape[1]):
            da = gradient(ds, x, index=None, bits=its_bits, bounds=part)
            for i in members:
                first, a_sums = (i * R if ds is step.ds else 0), sums[4 * i : 4 * i + 2]
                finish(da, a_sums[0], 0, slot=None, mask=None, first=first, columns=R, sums=a_sums)
    for i in used:
        b_sums = sums[4 * i + 2 : 4 * i + 4]
        for part in _runs(bounds[i], R * columns[i].shape[1]):
            db = gradient(step.s_of(i), step.dys[i], index=None, bounds=part)
            finish(db, b_sums[0], 1, slot=None, mask=None, scale=scales[i], sums=b_sums)
    return step.make_dx() if need_x else step.ds.new_empty(0)


def _runs(bounds: Tensor, width: int) -> list[Tensor]:
    """The bounds of as many examples at a time as PARTIAL_BYTES hold, `width` numbers each."""
    examples = min(65535, max(1, PARTIAL_BYTES // (4 * max(1, width))))
    starts = range(0, bounds.shape[0] - 1, examples)
    return [bounds[start : start + examples + 1] for start in starts]


class _Backward:
    """The pieces of a backward that training and scoring share."""

    def __init__(self, x, dys, weights, widths, live, kept, K, p):
        dtype = kept.dtype
        self.dys = [
            dy if dy is None or (dy.dtype == dtype and dy.stride(-1) == 1)
            else dy.to(dtype).contiguous()
            for dy in dys
        ]  # fmt: skip
        self.x, self.weights, self.live, self.p = x, weights, live, p
        sizes = _sizes(_rows(dys), K, widths, live, p)
        self.M, self.P, self.R = sizes.M, sizes.P, sizes.R
        self.bits, self.a_pack, b_pack, self.valid, self.s = parts_of(kept, sizes)
        self.columns = _columns(b_pack, widths)
        self.ds = kept.new_empty(self.M, self.P * self.R)
        self.db = [None] * self.P  # partial sums made with dS

    def ds_of(self, i: int) -> Tensor:
        return self.ds[:, i * self.R : (i + 1) * self.R]

    def s_of(self, i: int) -> Tensor:
        return self.s[:, i * self.R : (i + 1) * self.R]

    def make_ds(self, need_ds: list[bool], trains_b: list[bool], index_b: list) -> None:
        """dS / (1-p) of every projection, and partial sums of dB where one read serves both."""
        inverse = 1.0 / (1.0 - self.p)
        for i, dy in enumerate(self.dys):
            if self.R == 0 or self.M == 0 or not need_ds[i]:
                continue
            valid = self.valid[i * self.R : (i + 1) * self.R]
            if dy is None:
                self.ds_of(i).zero_()
            elif trains_b[i] and dy_gradients.wins(dy, self.R):
                self.db[i] = dy_gradients.dy_gradients(
                    dy, self.columns[i], self.s_of(i), self.ds_of(i), valid, inverse,
                    index=index_b[i],
                )  # fmt: skip
            else:
                shrink(dy, self.columns[i], valid, self.ds_of(i), self.R, inverse)

    def partial_da(self, trains_a: list[bool], index_a: list):
        """(projection, partial, first row, rows), one launch where no projection has an index."""
        bits = self.bits if self.p > 0.0 else None
        chosen = [i for i in range(self.P) if trains_a[i] and self.R]
        if len(chosen) == self.P and not any(t is not None for t in index_a):
            partial = gradient(self.ds, self.x, index=None, bits=bits, beside=self.forks)
            for i in chosen:
                yield i, partial, i * self.R, self.R
            return
        for i in chosen:
            kept = None if bits is None else bits[i : i + 1]
            partial = gradient(
                self.ds_of(i), self.x, index=index_a[i], bits=kept, beside=self.forks
            )
            yield i, partial, 0, partial.shape[1]

    def partial_db(self, trains_b: list[bool], index_b: list):
        for i, dy in enumerate(self.dys):
            if not trains_b[i] or dy is None or not self.R:
                continue
            partial = self.db[i]
            if partial is None:
                partial = gradient(self.s_of(i), dy, index=index_b[i], beside=self.forks)
            yield i, partial

    def make_all(self, partials, finishes, need_x: bool):
        """dX, and finishes(*partials()), beside the GEMMs on a second stream if these are long."""
        long = need_x and self.ds.is_cuda and self._gemm_flops() >= FORK_FLOPS
        self.forks = long and self._leaves_room()
        made = None if self.forks else partials()
        if not long:
            finishes(*made)
            return self.make_dx() if need_x else self.ds.new_empty(0)
        main = torch.cuda.current_stream(self.ds.device)
        side = side_stream(main)
        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                finishes(*(partials() if made is None else made))
            return self.make_dx()
        finally:
            main.wait_stream(side)  # only then may `made` be freed

    def _leaves_room(self) -> bool:
        """Whether the GEMMs lose less to dA beside them than dA takes alone, as measured."""
        if cublas(self.ds, self.R):  # takes every multiprocessor
            return False
        if self.p == 0.0:
            return True
        # Its bits keep multiprocessors longer than one GEMM of square W, or two, can spare them.
        return self.P > 2 or (self.P == 1 and self.columns[0].shape[1] >= 2 * self.a_pack.shape[1])

    def _gemm_flops(self) -> int:
        used = (w for w, dy in zip(self.weights, self.dys) if dy is not None)
        return sum(2 * self.M * w.numel() for w in used)

    def _extends(self, dy: Tensor, weight: Tensor) -> bool:
        dropout = self.p > 0.0  # with several projections' bits its registers spill
        return (self.P == 1 or not dropout) and self.R > 0 and extended_gemm.wins(
            dy, weight, self.a_pack, self.R, transposed=False, dropout=dropout
        )  # fmt: skip

    def make_dx(self) -> Tensor:
        dx = self.ds.new_empty(self.M, self.a_pack.shape[1])
        bits = self.bits if self.p > 0.0 else None
        bases = [(dy, w) for dy, w in zip(self.dys, self.weights) if dy is not None]
        bases = [(dy, w if w.dtype == dy.dtype else w.to(dy.dtype)) for dy, w in bases]
        extends = bases and self._extends(*bases[0])
        if self.P > 1 or not extends:
            for i, live in enumerate(self.live):  # where cuBLAS made dS: nothing beside reads it
                clear_padding(self.ds_of(i), live)
        if extends:
            live = self.live[0] if self.P == 1 else self.ds.shape[1]
            extended_gemm.extended_gemm(
                *bases.pop(0), self.ds, self.a_pack, dx, bits=bits, transposed=False, live=live
            )
        else:
            expand(self.ds, self.a_pack, dx, bits=bits)
        for dy, weight in bases:
            dx.addmm_(dy, weight)
        return dx
