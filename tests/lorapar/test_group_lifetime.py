"""What a group of siblings holds on to, and for how long."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from against_peft import group_of
from siblings import QKV, Attention, attention, close, inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorapar.patch import accelerate, restore
from lorapar.served import Served
from lorapar_kernels.testing import assert_close


def alive(*references):
    gc.collect()
    return [r() is not None for r in references]


def test_nothing_is_kept_longer_than_one_call():
    _, patched = attention()
    q, k = patched.base_model.model.q_proj, patched.base_model.model.k_proj
    x, y = inputs()
    first, second = weakref.ref(x), weakref.ref(y)
    patched(x, x)
    del x
    assert alive(first) == [False]  # everybody took theirs
    k(y)
    del y
    assert alive(second) == [True]  # q and v may still be called
    with patched.disable_adapter():
        k(*inputs(1))
    assert alive(second) == [False]
    x, y = inputs()
    first, second = weakref.ref(x), weakref.ref(y)
    q(x)
    q(y)
    del x, y
    assert alive(first) == [False]
    restore(patched)
    assert alive(second) == [False]


def test_an_exception_between_members_leaves_no_trace():
    plain, patched = attention()

    def fail(module, args):
        raise RuntimeError("stop")

    (x,) = inputs(1)
    hook = patched.base_model.model.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        patched(x, x)
    hook.remove()
    with torch.no_grad():
        x.add_(1)
    close(patched, plain, x, x)
    close(patched, plain, *inputs())


class Failing(Attention):
    """Raises between q and k; or reads k and v from a cache, as attention over an encoder does."""

    raises, cached = False, False

    def forward(self, x, y):
        q = self.q_proj(x)
        if self.raises:
            raise RuntimeError("midway")
        return q if self.cached else q.sum(-1, keepdim=True) * self.k_proj(y).sum() * self.v_proj(y)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_forward_that_raises_or_skips_midway_holds_nothing(checkpointed, sizes):
    plain, patched = attention(Failing)
    inner = patched.base_model.model
    call = partial(checkpoint, patched, use_reentrant=False) if checkpointed else patched
    gc.collect()
    gc.disable()  # at once, not when the collector comes
    try:
        for kind in ("raises", "cached"):
            setattr(inner, kind, True)
            (x,) = inputs(1)
            held = weakref.ref(x)
            try:
                call(x, x)
            except RuntimeError as e:
                assert str(e) == "midway" and kind == "raises"
            del x
            assert group_of(patched, "q_proj").pending is None and held() is None
            setattr(inner, kind, False)
    finally:
        gc.enable()
    assert sizes == [3, 3]
    for _ in "12":
        close(patched, plain, *inputs(1) * 2)
    # q had to compute alone once, and so does from then on; k finds that out of itself.
    assert sizes == [3, 3, 3, 2]


def test_hooks_on_the_parent_are_taken_away():
    _, patched = attention()
    inner = patched.base_model.model
    accelerate(patched)
    assert len(inner._forward_hooks) == len(inner._forward_hooks_always_called) == 1
    seen = inner.register_forward_hook(lambda *a: None)
    restore(patched)
    assert list(inner._forward_hooks) == [seen.id] and not inner._forward_hooks_always_called


def test_a_replaced_member_is_not_waited_for(sizes):
    plain, patched = attention()
    (x,) = inputs(1)
    for model in (plain, patched):
        model.base_model.model.k_proj = copy.deepcopy(plain.base_model.model.k_proj)
    close(patched, plain, x, x)
    close(patched, plain, x, x)
    assert sizes == [2, 2]


def test_copies_have_groups_of_their_own(sizes):
    plain, patched = attention()
    (x,) = inputs(1)
    inner = patched.base_model.model
    inner.q_proj(x)  # outputs wait while the copy is made
    other = copy.deepcopy(patched)
    assert group_of(other, "q_proj").pending is None
    assert group_of(other, "q_proj") is group_of(other, "v_proj")
    assert group_of(other, "q_proj") is not group_of(patched, "q_proj")
    sizes.clear()
    with torch.no_grad():
        for p in inner.parameters():
            p.zero_()
    close(other, plain, x, x)
    assert sizes == [3]
    alone = copy.deepcopy(other.base_model.model.k_proj)
    del other
    gc.collect()
    assert isinstance(alone, Served)
    assert_close("k", alone(x), plain.base_model.model.k_proj(x))
    assert sizes == [3]
    copy.copy(inner.k_proj)(x)  # PEFT's own
    assert sizes == [3]


def test_a_deleted_model_is_freed_at_once():
    _, patched = attention()
    weight = weakref.ref(patched.base_model.model.k_proj.base_layer.weight)
    inner = patched.base_model.model
    gc.collect()
    gc.disable()
    try:
        layer = inner.k_proj
        inner.k_proj = nn.Identity()
        del layer
        assert weight() is None  # its group does not hold it
    finally:
        gc.enable()
    (x,) = inputs(1)
    inner.q_proj(x), inner.v_proj(x)


def test_two_models_at_once():
    plain, one = attention()
    _, two = attention()
    (x,) = inputs(1)
    got = [[getattr(m.base_model.model, n)(x) for m in (one, two)] for n in QKV]
    for name, (a, b) in zip(QKV, got):
        assert torch.equal(a, b)
        assert_close(name, a, getattr(plain.base_model.model, name)(x))
