"""Inputs of the ops, the same layers in plain PyTorch, and which combinations are tried."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorapar_kernels import LoraMask, Projection, lora_add, lora_linear, lora_linear_group
from lorapar_kernels.reference import dropout_keep

DROPOUT = 0.3
SCALES = (2.5, -0.5, 1.25)  # of the projections of a group

# (leading dims, K, N): several tiles both ways, a tile, odd, tiny, one row, nothing, a last block
# of two columns, of one
SHAPES = [
    ((3, 15), 70, 66),
    ((32,), 64, 64),
    ((7,), 5, 9),
    ((2, 1), 4, 6),
    ((1,), 64, 17),
    ((0,), 8, 8),
    ((2, 3), 130, 12),
    ((33,), 65, 65),
]
RANKS = [1, 3, 8, 12, 16, 33, 64, 128, 256, 512]
MASKS = ["none", "empty", "full", "random", "columns", "one element", "dead"]
OPS = ["linear", "group", "add"]
LAYOUTS = ["contiguous", "bordered", "transposed"]


@dataclass(frozen=True)
class Case:
    """One combination. `adapter` is the dtype of A and B."""

    dtype: torch.dtype = torch.float32
    rank: int = 8
    mask: str = "none"
    dropout_p: float = 0.0
    op: str = "linear"
    shape: tuple = SHAPES[0]
    adapter: torch.dtype | None = None
    layout: str = "bordered"
    bias: bool = True
    step: int = 3  # by how much the second layer of a group is wider

    def __str__(self):
        values = [getattr(self, f.name) for f in fields(self)[:-1]]
        return "-".join(str(v).replace("torch.", "").replace(" ", "") for v in values)


def pairwise(factors: dict[str, list]) -> list[dict]:
    """Few rows in which every two values of two factors meet (greedy, always the same rows)."""
    names = list(factors)
    pairs = list(itertools.combinations(names, 2))
    missing = {(f, u, g, v) for f, g in pairs for u, v in itertools.product(factors[f], factors[g])}
    order = [(f, u, g, v) for f, g in pairs for u, v in itertools.product(factors[f], factors[g])]
    rows = []
    for first in order:
        if first not in missing:
            continue
        row = {first[0]: first[1], first[2]: first[3]}
        for turn, name in enumerate(n for n in names if n not in row):
            values = factors[name]
            start = (len(rows) + turn) % len(values)
            row[name] = max(
                values[start:] + values[:start],
                key=lambda v: len(_met(row | {name: v}, names) & missing),
            )
        missing -= _met(row, names)
        rows.append(row)
    return rows


def _met(row: dict, names: Sequence[str]) -> set:
    present = [n for n in names if n in row]
    return {(f, row[f], g, row[g]) for f, g in itertools.combinations(present, 2)}


CHOOSING = {"rank": RANKS, "mask": MASKS, "dropout_p": [0.0, DROPOUT], "op": OPS}  # a kernel
OTHERS = {
    "shape": SHAPES, "adapter": [None, torch.float32], "layout": LAYOUTS, "bias": [True, False],
}  # fmt: skip


def sample(dtypes: list[torch.dtype]) -> list[Case]:
    """Every two values of two factors in some case."""
    return [Case(**row) for row in pairwise({"dtype": dtypes} | CHOOSING | OTHERS)]


def few(cases: list[Case]) -> list[Case]:
    """Some of them: all values that occur, and all pairs of those that choose a kernel but for the
    rank (greedy, always the same)."""
    together = ("dtype", "mask", "dropout_p", "op")
    rows = [{f.name: getattr(case, f.name) for f in fields(case)[:-1]} for case in cases]
    brings = [set(row.items()) | _met(row, together) for row in rows]
    missing, taken = set().union(*brings), []
    while missing:
        i = max(range(len(cases)), key=lambda i: len(brings[i] & missing))
        taken.append(cases[i])
        missing -= brings[i]
    return taken


def product(dtype: torch.dtype, rank: int) -> list[Case]:
    """All that chooses a kernel, with the other factors in turn."""
    factors = {"dtype": [dtype], **CHOOSING, "rank": [rank]}
    turns = list(itertools.product(*OTHERS.values()))
    random.Random(rank).shuffle(turns)
    rows = itertools.product(*factors.values())
    return [
        Case(**dict(zip([*factors, *OTHERS], row + turn)))
        for row, turn in zip(rows, itertools.cycle(turns))
    ]


def guarded(t: Tensor) -> Tensor:
    """The same matrix with a border of NaN, so that a read outside it shows in the result."""
    box = torch.full([n + 16 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    return box[tuple(slice(8, n + 8) for n in t.shape)].copy_(t)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values, in other strides."""
    match layout:
        case "bordered":
            return guarded(t.reshape(-1, t.shape[-1])).unflatten(0, t.shape[:-1])
        case "transposed" if t.dim() > 2:
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        case "transposed":
            return t.t().contiguous().t()
    return t


def make(shape, dtype, device, adapter_dtype=None):
    """x, W, A, B and bias; the matrices in a border of NaN."""
    lead, k, n, r = shape
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(*lead, k, dtype=dtype, device=device)
    w = guarded(torch.randn(n, k, dtype=dtype, device=device) / k**0.5)
    a = guarded(torch.randn(r, k, dtype=adapter_dtype, device=device) / k**0.5)
    b = guarded(torch.randn(n, r, dtype=adapter_dtype, device=device) / r**0.5)
    return x, w, a, b, torch.randn(n, dtype=dtype, device=device)


def make_mask(kind: str, r: int, k: int, n: int, device) -> LoraMask | None:
    a = torch.zeros(r, k, dtype=torch.bool, device=device)
    b = torch.zeros(n, r, dtype=torch.bool, device=device)
    live = None
    random_a, random_b = (torch.rand(t.shape, device=device) < 0.4 for t in (a, b))
    match kind:
        case "none":
            return None
        case "full":
            a[:], b[:] = True, True
        case "random":
            a, b = random_a, random_b
        case "columns":
            a[r // 2 :: 3], b[:, r // 3 :: 2] = True, True
        case "one element":
            a[-1, k // 2] = True
        case "dead":
            live = torch.rand(r, device=device) < 0.5
            live[-1] = True
            a, b = random_a & live[:, None], random_b & live
    return LoraMask(a, b, live=live)


class Inputs:
    """The tensors of one case. `leaves` are x, the bases of `lora_add`, then A and B in turn."""

    def __init__(self, case: Case, device: str):
        self.case, (lead, K, N) = case, case.shape
        sizes = [(N, case.rank)]
        if case.op == "group":
            sizes += [(N + case.step, max(1, case.rank // 2)), (max(1, N // 2), case.rank)]
        parts = [make((lead, K, n, r), case.dtype, device, case.adapter) for n, r in sizes]
        self.x = laid_out(parts[0][0], case.layout)
        self.projections = [
            Projection(
                w, a, b, scale,
                guarded(bias) if case.bias and case.op != "add" else None,
                make_mask("none" if i == 1 else case.mask, *a.shape, len(b), device),
            )
            for i, ((_, w, a, b, bias), scale) in enumerate(zip(parts, SCALES))
        ]  # fmt: skip
        outputs = [torch.randn(*lead, n, dtype=case.dtype, device=device) for n, _ in sizes]
        self.dys = [laid_out(t, case.layout) for t in outputs]
        self.bases = [laid_out(torch.randn_like(t), case.layout) for t in outputs]
        self.bases = self.bases if case.op == "add" else []
        self.leaves = [self.x, *self.bases]
        self.leaves += [t for p in self.projections for t in (p.lora_a, p.lora_b)]

    def names(self) -> list[str]:
        count = range(len(self.projections))
        adapters = [f"{g}{i}" for i in count for g in ("dA", "dB")]
        return [*(f"y{i}" for i in count), "dX", *(["dBase"] if self.bases else []), *adapters]

    def op(self, x, *leaves):
        """The public op on these leaves."""
        p, q = self.projections, self.case.dropout_p
        if self.bases:
            base, a, b = leaves
            return (lora_add(base, x, a, b, p[0].scale, mask=p[0].mask, dropout_p=q),)
        if self.case.op == "linear":
            a, b = leaves
            return (
                lora_linear(
                    x, p[0].weight, a, b, p[0].scale,
                    bias=p[0].bias, mask=p[0].mask, dropout_p=q,
                ),
            )  # fmt: skip
        group = [
            Projection(p.weight, a, b, p.scale, p.bias, p.mask)
            for p, a, b in zip(p, leaves[::2], leaves[1::2])
        ]
        return lora_linear_group(x, group, dropout_p=q)

    def plain(self, keeps: list[Tensor] | None):
        """The same as a user of PyTorch would write it, with these dropout bits."""

        def f(x, *leaves):
            bases, adapters = leaves[: len(self.bases)], leaves[len(self.bases) :]
            ys = []
            for i, p in enumerate(self.projections):
                base = bases[0] if bases else linear(x, *(cast(t, x) for t in (p.weight, p.bias)))
                kept = x if keeps is None else x * keeps[i].to(x.dtype).view_as(x)
                ys.append(base + delta(kept, *adapters[2 * i : 2 * i + 2], p.scale, p.mask))
            return tuple(ys)

        return f


def cast(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.dtype)


def delta(x, a, b, scale, mask=None):
    """scale · x Aᵀ Bᵀ, of the live columns, differentiable where trainable."""
    if mask is not None:
        a, b = torch.where(mask.a, a, a.detach()), torch.where(mask.b, b, b.detach())
        if mask.live is not None:
            a, b = a[mask.live], b[:, mask.live]
    return scale * linear(linear(x, a.to(x.dtype)), b.to(x.dtype))


def plain(x, w, a, b, bias, scale):
    """One layer, as a user of PyTorch would write it: autograd does the rest."""
    return linear(x, w, bias) + delta(x, a, b, scale)


def with_grads(f, leaves, dy):
    """What f gives and its gradients, `dy` one tensor or one for each output."""
    y = f(*leaves)
    ys, dys = ((y,), (dy,)) if isinstance(y, Tensor) else (y, dy)
    grads = torch.autograd.grad(ys, leaves, [g.to(y.dtype) for y, g in zip(ys, dys)])
    return [t.detach() for t in (*ys, *grads)]


def leaves_of(tensors, to: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaves of the same values and strides."""
    return [t.detach().to(to or t.dtype).requires_grad_() for t in tensors]


def keeps_of(saved: list[Tensor], x: Tensor, p: float, projections: int) -> list[Tensor] | None:
    """The multipliers of x that a call used, from what it saved for its backward, in float64:
    the kernels' bits, plan d's masks, or the reference's seed."""
    if p == 0.0 or x.numel() == 0:
        return None
    rows = x.reshape(-1, x.shape[-1])
    bits = bits_of(saved, rows, projections)
    if bits is not None:
        return list(decoded(bits, rows.shape[1]).double() / (1.0 - p))
    masks = [t for t in saved if t.dtype == torch.bool and t.shape == rows.shape]
    if masks:
        return [t.double() / (1.0 - p) for t in masks]
    (seed,) = (t for t in saved if t.shape == (1,) and t.dtype == torch.int64)
    return [dropout_keep(rows, p, seed, i).double() for i in range(projections)]


def bits_of(saved: list[Tensor], x: Tensor, projections: int = 1) -> Tensor | None:
    """The dropout bits among what a call with dropout on x [M, K] saved on the kernels: a tensor of
    their own or, by the raw ops, the first of `lorapar_kernels.kept`."""
    for t in saved:
        if t.dtype == torch.int16 and t.dim() == 3 and t.numel():
            return t
    for t in saved:
        if t.dim() == 1 and t.is_floating_point():
            shape = (projections, x.shape[0], -(-x.shape[1] // 1024) * 64)
            return t.view(torch.int16)[: math.prod(shape)].view(shape)
    return None


def decoded(bits: Tensor, K: int) -> Tensor:
    """bool [P, M, K]: bit j of J in word 64·q + l is that of element 64·(J·q + j) + l."""
    words = bits.unflatten(2, (-1, 64))
    planes = [(words >> j) & 1 for j in range(8 * bits.element_size())]
    return torch.stack(planes, dim=3).flatten(2)[..., :K].bool()


def saving(f, *arguments) -> tuple:
    """(what f gives, the tensors it saved for its backward)."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return f(*arguments), saved


def three_ways(inputs: Inputs) -> list[list[Tensor]]:
    """Outputs and gradients by the op, in float64, and by plain PyTorch, with the same bits."""
    found = []

    def op(*leaves):
        ys, saved = saving(inputs.op, *leaves)
        found.append(saved)
        return ys

    ours = with_grads(op, leaves_of(inputs.leaves), inputs.dys)
    keeps = keeps_of(found[0], inputs.x, inputs.case.dropout_p, len(inputs.projections))
    exact, base = (
        with_grads(inputs.plain(keeps), leaves_of(inputs.leaves, to), inputs.dys)
        for to in (torch.float64, None)
    )
    return [ours, exact, base]
