"""What a group of siblings holds on to, and for how long."""

import copy
import gc
import io
import weakref

import pytest
import torch
from against_peft import group_of
from siblings import QKV, attention, close, inputs
from torch import nn

from lorapar.patch import restore
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


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_groups_of_their_own(how, sizes):
    plain, patched = attention()

    def copied(module):
        if how == "deepcopy":
            return copy.deepcopy(module)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        assert buffer.tell() < 40_000  # a layer does not bring its siblings along
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    (x,) = inputs(1)
    inner = patched.base_model.model
    inner.q_proj(x)  # outputs wait while the copy is made
    other = copied(patched)
    assert group_of(other, "q_proj").pending is None
    assert group_of(other, "q_proj") is group_of(other, "v_proj")
    assert group_of(other, "q_proj") is not group_of(patched, "q_proj")
    sizes.clear()
    with torch.no_grad():
        for p in inner.parameters():
            p.zero_()
    close(other, plain, x, x)
    assert sizes == [3]
    alone = copied(other.base_model.model.k_proj)
    del other
    gc.collect()
    assert isinstance(alone, Served) == (how == "deepcopy")
    assert_close("k", alone(x), plain.base_model.model.k_proj(x))
    assert sizes == [3]
    copy.copy(inner.k_proj)(x)  # a shallow copy is no member
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
