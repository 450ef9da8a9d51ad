"""Masks: exact zeros, dead columns left out, and no work where nothing trains."""

import math
import pkgutil
from importlib import import_module

import pytest
import torch
from cases import Case, Inputs, leaves_of, make, make_mask, with_grads
from torch.nn.functional import linear

import lorapar_kernels
from lorapar_kernels import LoraMask, Projection, fused, lora_linear, lora_linear_group
from lorapar_kernels.kept import Sizes, parts_of
from lorapar_kernels.testing import assert_close

MASKS = ["none", "full", "random", "columns", "one element"]


def make_plain_mask(kind, *arguments):
    """As in `cases`, but "none" freezes everything."""
    return make_mask("empty" if kind == "none" else kind, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_mask_leaves_dx_alone_and_zeroes_the_rest_exactly(kind, dtype, backend, device, poisoned):
    x, w, a, b, _ = make(((2, 9), 7, 11, 4), dtype, device)
    mask = make_plain_mask(kind, 4, 7, 11, device)
    dy = torch.randn(2, 9, 11, dtype=dtype, device=device)
    y0, dx0, da0, db0 = with_grads(
        lambda x, a, b: lora_linear(x, w, a, b, 3.0), leaves_of([x, a, b]), dy
    )
    y1, dx1, da1, db1 = with_grads(
        lambda x, a, b: lora_linear(x, w, a, b, 3.0, mask=mask), leaves_of([x, a, b]), dy
    )
    assert_close("y", y1, y0)
    assert_close("dX", dx1, dx0)
    for got, free, trainable in ((da1, da0, mask.a), (db1, db0, mask.b)):
        assert not got[~trainable].any()
        if trainable.any():
            assert_close("trained", got[trainable], free[trainable])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("rank", [2, 100])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zero_is_exact_even_where_the_gradient_is_not_finite(where, rank, kind, backend, device):
    x, w, a, b, _ = make(((4,), 6, 5, rank), torch.float32, device)
    dy = torch.randn(4, 5, device=device)
    (x if where == "x" else dy)[:] = torch.inf
    mask = make_plain_mask(kind, rank, 6, 5, device)
    _, da, db = with_grads(
        lambda a, b: lora_linear(x, w, a, b, 1.0, mask=mask), leaves_of([a, b]), dy
    )
    for g, trainable in ((da, mask.a), (db, mask.b)):
        assert not g[~trainable].any() and not g[trainable].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [5, 40])
def test_dead_columns_are_left_out(rank, dtype, backend, device, poisoned):
    x, w, a, b, _ = make(((6,), 8, 10, rank), dtype, device)
    live = torch.arange(rank, device=device) % 2 == 0
    b[:, ~live] = 0
    trainable = live[:, None].expand(rank, 8).contiguous(), live.expand(10, rank).contiguous()
    mask = LoraMask(*trainable, live=live)
    mask.check_dead(a, b)
    dy = torch.randn(6, 10, dtype=dtype, device=device)
    want = with_grads(lambda x, a, b: lora_linear(x, w, a, b, 2.0), leaves_of([x, a, b]), dy)
    # A dead column is skipped, not multiplied: even a NaN there reaches nothing.
    a, b = a.clone(), b.clone()
    for value in (0.0, torch.nan):
        a[~live], b[:, ~live] = value, value
        got = with_grads(
            lambda x, a, b: lora_linear(x, w, a, b, 2.0, mask=mask), leaves_of([x, a, b]), dy
        )
        assert_close("y", got[0], want[0])
        assert_close("dX", got[1], want[1])
        assert_close("dA", got[2][live], want[2][live])
        assert_close("dB", got[3][:, live], want[3][:, live])
        assert not got[2][~live].any() and not got[3][:, ~live].any()


def test_all_columns_dead(backend, device, poisoned):
    """Nothing is left of the adapter; every gradient is zero."""
    x, w, a, b, bias = make(((6,), 8, 10, 3), torch.float32, device)
    live = torch.zeros(3, dtype=torch.bool, device=device)
    mask = LoraMask(live[:, None].expand(3, 8), live.expand(10, 3), live=live)
    a[:], b[:] = torch.nan, torch.nan
    dy = torch.randn(6, 10, device=device)
    for p in (0.0, 0.5):
        y, dx, da, db = with_grads(
            lambda x, a, b, p=p: lora_linear(x, w, a, b, 2.0, bias=bias, mask=mask, dropout_p=p),
            leaves_of([x, a, b]), dy,
        )  # fmt: skip
        assert_close("y", y, torch.nn.functional.linear(x, w, bias))
        assert_close("dX", dx, dy @ w)
        assert not da.any() and not db.any()


def test_dead_columns_that_contribute_are_refused(device):
    _, _, a, b, _ = make(((6,), 8, 10, 5), torch.float32, device)
    live = torch.tensor([True, False, True, True, True], device=device)
    mask = LoraMask(live[:, None].expand(5, 8), live.expand(10, 5), live=live)
    with pytest.raises(ValueError, match=r"columns \[1\] are marked dead but contribute"):
        mask.check_dead(a, b)


def test_nan_in_a_frozen_live_column_propagates(backend, device):
    x, w, a, b, _ = make(((6,), 8, 10, 3), torch.float32, device)
    a[1, 0] = torch.nan
    y = lora_linear(x, w, a, b, 1.0, mask=make_plain_mask("none", 3, 8, 10, device))
    assert y.isnan().all()


def test_group_with_a_mask_for_each(backend, device, poisoned):
    """Different ranks, dead columns and masks side by side give what each gives alone."""
    inputs = Inputs(Case(op="group", rank=12, mask="dead"), device)
    p, x = inputs.projections, inputs.x
    group = with_grads(inputs.op, leaves_of(inputs.leaves), inputs.dys)
    dx = 0
    for i, q in enumerate(p):
        alone = with_grads(
            lambda x, a, b, q=q: lora_linear(x, q.weight, a, b, q.scale, bias=q.bias, mask=q.mask),
            leaves_of([x, q.lora_a, q.lora_b]), inputs.dys[i],
        )  # fmt: skip
        dx = dx + alone[1]
        for name, got, want in zip(
            ("y", "dA", "dB"), (group[i], *group[4 + 2 * i : 6 + 2 * i]), (alone[0], *alone[2:])
        ):
            assert_close(f"{name} {i}", got, want)
    assert_close("dX", group[3], dx)


class Counted:
    """A kernel that counts the programs of its launches."""

    def __init__(self, kernel):
        self.kernel, self.programs = kernel, 0

    def __getitem__(self, grid):
        self.programs += math.prod(grid)
        return self.kernel[grid]


def count_programs(monkeypatch) -> dict[str, Counted]:
    """Every kernel of the package, counted from now on."""
    counted = {}
    for info in pkgutil.iter_modules(lorapar_kernels.__path__):
        module = import_module(f"lorapar_kernels.{info.name}")
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and not isinstance(value, Counted):
                counted[name] = Counted(value)
                monkeypatch.setattr(module, name, counted[name])
    return counted


class TestWorkAvoided:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.5])
    def test_dead_columns_halve_the_grids(self, dropout_p, device, triton_backend, monkeypatch):
        """r = 256 with 40 % live is packed to 128 columns."""
        x, w, a, b, _ = make(((33,), 96, 80, 256), torch.float32, device)
        live = torch.arange(256, device=device) % 5 < 2
        masks = [
            LoraMask(live[:, None].expand(256, 96), live.expand(80, 256), live=kind)
            for kind in (None, live)
        ]
        programs = []
        for mask in masks:
            with monkeypatch.context() as patch:
                counted = count_programs(patch)
                with_grads(
                    lambda x, a, b, mask=mask: lora_linear(
                        x, w, a, b, 1.0, mask=mask, dropout_p=dropout_p
                    ),
                    leaves_of([x, a, b]), torch.ones(33, 80, device=device),
                )  # fmt: skip
                programs.append({name: kernel.programs for name, kernel in counted.items()})
        every, some = programs
        assert sum(every.values()) > 0
        shrinks = [n for n in every if "shrink" in n and every[n]]
        assert shrinks and all(2 * some[n] == every[n] for n in ("_pack_kernel", *shrinks))
        assert all(some[n] <= every[n] for n in every)

    def test_packed_shapes(self, device, triton_backend):
        x, w, a, b, _ = make(((33,), 96, 80, 256), torch.float32, device)
        live = torch.arange(256, device=device, dtype=torch.int32)[::5]
        for columns, packed in ((None, 256), (live, 64), (live[:0], 0)):
            _, kept = torch.ops.lorapar.lora_forward(
                x, [w], [None], [a], [b], [columns], [1.0], None, 0.0, True
            )
            valid = parts_of(kept, Sizes(33, 96, 1, packed, 80, False)).valid
            assert kept.numel() == 0 if packed == 0 else valid.shape == (packed,)
            assert valid.sum() == (256 if columns is None else len(columns))

    @pytest.mark.parametrize("rank,trained", [(64, 3), (64, 20), (256, 3), (256, 130)])
    def test_only_rows_and_columns_that_train_are_summed(
        self, rank, trained, device, triton_backend, monkeypatch
    ):
        x, w, a, b, _ = make(((33,), 96, 80, rank), torch.float32, device)
        rows = torch.arange(rank, device=device) < trained
        columns = torch.arange(rank, device=device) >= rank - trained - 1
        mask = LoraMask(rows[:, None].expand(rank, 96), columns.expand(80, rank))
        shapes = {}

        def spy(module, name):
            original = getattr(module, name)

            def spied(*arguments, **options):
                partial = original(*arguments, **options)
                shapes[partial.shape[2]] = partial.shape[1]
                return partial

            monkeypatch.setattr(module, name, spied)

        spy(fused, "gradient")
        spy(fused.dy_gradients, "dy_gradients")
        with_grads(
            lambda x, a, b: lora_linear(x, w, a, b, 1.0, mask=mask),
            leaves_of([x, a, b]), torch.ones(33, 80, device=device),
        )  # fmt: skip
        assert shapes == {96: trained, 80: trained + 1}

    @pytest.mark.parametrize("train_x", [True, False])
    def test_an_empty_mask_launches_no_gradient(self, train_x, device, triton_backend, monkeypatch):
        x, w, a, b, _ = make(((33,), 96, 80, 8), torch.float32, device)
        mask = make_mask("empty", 8, 96, 80, device)
        x, a, b = leaves_of([x, a, b])
        x.requires_grad_(train_x)
        y = lora_linear(x, w, a, b, 1.0, mask=mask)
        counted = count_programs(monkeypatch)
        y.sum().backward()
        launched = {n for n, kernel in counted.items() if kernel.programs}
        assert launched == ({"_shrink_kernel", "_expand_kernel"} if train_x else set())
        assert not a.grad.any() and not b.grad.any()

    def test_one_shrink_serves_a_group(self, device, triton_backend, monkeypatch):
        x, w, a, b, _ = make(((33,), 96, 80, 8), torch.float32, device)
        launches = []
        counted = count_programs(monkeypatch)
        for count in (1, 4):
            lora_linear_group(x, [Projection(w, a, b, 1.0)] * count)
            launches.append(counted["_shrink_kernel"].programs)
        assert launches[1] == 2 * launches[0]


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_group_with_a_member_that_has_no_live_column(frozen, backend, device):
    """Its sibling trains one matrix alone, so that x or S is not saved."""
    x, w, a, b, _ = make(((5,), 8, 10, 4), torch.float32, device)
    none = torch.zeros(4, dtype=torch.bool, device=device)
    dead = LoraMask(none[:, None].expand(4, 8), none.expand(10, 4), live=none)
    yes, no = (torch.full((4, 8), v, device=device) for v in (True, False))
    yes_b, no_b = (torch.full((10, 4), v, device=device) for v in (True, False))
    part = LoraMask(no, yes_b) if frozen == "a" else LoraMask(yes, no_b)
    leaves = leaves_of([a, b, a, b])
    group = [Projection(w, *leaves[:2], 2.0, mask=dead), Projection(w, *leaves[2:], 2.0, mask=part)]
    one, other = lora_linear_group(x, group)
    assert_close("y of the dead", one.detach(), linear(x, w))
    grads = torch.autograd.grad((one, other), leaves, [torch.ones_like(one)] * 2)
    trained = 3 if frozen == "a" else 2
    assert [bool(g.any()) for g in grads] == [i == trained for i in range(4)]
