"""Selection against the released script's rule, written out the slow way."""

import math

import pytest
import torch
from conftest import released_rule
from hypothesis import given
from hypothesis import strategies as st

from lorapar_kernels import select_by_mass, select_top


def scores(seed: int, shapes=((8, 64), (64, 8), (8, 48))):
    torch.manual_seed(seed)
    return [torch.rand(s).mul(torch.rand(s)) for s in shapes]


def chosen(masks) -> set[int]:
    return set(torch.nonzero(torch.cat([m.flatten() for m in masks])).flatten().tolist())


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_released_rule(theta, seed):
    s = scores(seed)
    flat = torch.cat([t.flatten() for t in s])
    assert flat.unique().numel() == flat.numel()  # no ties
    masks = select_by_mass(s, theta)
    assert [m.shape for m in masks] == [t.shape for t in s]
    assert chosen(masks) == released_rule(flat.double().tolist(), theta)


def test_theta_0_keeps_none_and_1_keeps_all():
    s = scores(0)
    s[0][0] = 0  # zeros too
    assert not any(m.any() for m in select_by_mass(s, 0.0))
    assert all(m.all() for m in select_by_mass(s, 1.0))


def test_ties_go_by_position():
    s = [torch.ones(4), torch.ones(4)]
    assert chosen(select_by_mass(s, 0.6)) == {0, 1, 2, 3, 4}  # 4.8 of 8, the fifth reaches it
    assert chosen(select_top(s, [torch.ones(4).bool()] * 2, 0.5)) == {0, 1, 2, 3}


@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60).filter(lambda v: sum(v) > 0),
    st.floats(0.01, 0.99),
)
def test_is_the_smallest_set_that_reaches_theta(values, theta):
    s = torch.tensor(values)
    (mask,) = select_by_mass([s], theta)
    kept, total = s[mask].double(), s.double().sum()
    slack = 1e-9 * total
    assert kept.sum() >= theta * total - slack
    assert kept.sum() - kept.min() < theta * total + slack  # without its least, too little
    assert mask.all() or kept.min() >= s[~mask].max()


def test_sums_are_made_in_float64():
    s = torch.ones(10)
    s[0] = 2**24  # in fp32, adding 1 to this changes nothing
    (mask,) = select_by_mass([s], (2**24 + 3) / (2**24 + 9))
    assert int(mask.sum()) == 4


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_top_takes_the_floor_by_count(fraction):
    s = scores(1)
    within = [torch.rand(t.shape) < 0.3 for t in s]
    flat, marked = torch.cat([t.flatten() for t in s]), chosen(within)
    best = sorted(marked, key=lambda i: -flat[i])[: math.floor(fraction * len(marked))]
    assert chosen(select_top(s, within, fraction)) == set(best)


def test_bad_input_is_named():
    s = scores(2)
    with pytest.raises(ValueError, match=r"theta must lie in \[0, 1\], got 1.5"):
        select_by_mass(s, 1.5)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], got -0.1"):
        select_top(s, [t > 0 for t in s], -0.1)
    s[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"scores\[1\] \[64, 8\] has 1 elements that are NaN"):
        select_by_mass(s, 0.5)
    with pytest.raises(ValueError, match="all 10 scores are zero"):
        select_by_mass([torch.zeros(10)], 0.5)
    with pytest.raises(ValueError, match="got no scores"):
        select_by_mass([], 0.5)
