"""Selection against the released script's rule, written out the slow way."""

import math

import pytest
import torch
from conftest import released_rule, serve_by
from hypothesis import given
from hypothesis import strategies as st

from lorapar_kernels import histogram, select_by_mass, select_top
from lorapar_kernels.selection import _reach


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch) -> str:
    """The extension has no kernels for this: Triton's serve beside it."""
    serve_by(request.param, monkeypatch)
    return request.param


def scores(seed: int, shapes=((8, 64), (64, 8), (8, 48))):
    torch.manual_seed(seed)
    return [torch.rand(s).mul(torch.rand(s)) for s in shapes]


def chosen(masks) -> set[int]:
    return set(torch.nonzero(torch.cat([m.flatten() for m in masks])).flatten().tolist())


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_released_rule(theta, seed, backend, device):
    s = [t.to(device) for t in scores(seed)]
    flat = torch.cat([t.flatten() for t in s])
    assert flat.unique().numel() == flat.numel()  # no ties
    masks = select_by_mass(s, theta)
    assert [m.shape for m in masks] == [t.shape for t in s]
    assert chosen(masks) == released_rule(flat.double().tolist(), theta)


def test_theta_0_keeps_none_and_1_keeps_all(backend, device):
    s = [t.to(device) for t in scores(0)]
    s[0][0] = 0  # zeros too
    assert not any(m.any() for m in select_by_mass(s, 0.0))
    assert all(m.all() for m in select_by_mass(s, 1.0))


def test_ties_go_by_position(backend, device):
    s = [torch.ones(4, device=device), torch.ones(4, device=device)]
    assert chosen(select_by_mass(s, 0.6)) == {0, 1, 2, 3, 4}  # 4.8 of 8, the fifth reaches it
    assert chosen(select_top(s, [t.bool() for t in s], 0.5)) == {0, 1, 2, 3}


def test_ties_across_chunks_and_tensors(backend, device):
    """Thousands of equal scores: the cut lies in the middle of a tensor of several chunks."""
    s = [torch.full((n,), 2.0, device=device) for n in (5000, 1, 9000, 3)]
    s[2][7::10] = 8.0  # 900 of them
    above, ties = 900 * 8.0, 14004 - 900
    masks = select_by_mass(s, (above + 2.0 * 11000.5) / (above + 2.0 * ties))
    flat, kept = torch.cat(s), torch.cat(masks)
    assert kept[flat == 8].all() and int(kept.sum()) == 900 + 11001
    assert torch.equal(kept[flat == 2].nonzero().flatten(), torch.arange(11001, device=device))
    within = [torch.arange(len(t), device=device) % 3 > 0 for t in s]
    marked = torch.cat(within)
    kept = torch.cat(select_top(s, within, 0.5))
    wanted = int(marked.sum()) // 2
    assert not kept[~marked].any() and kept[marked & (flat == 8)].all()
    order = (marked & (flat == 2)).nonzero().flatten()
    rest = wanted - int((marked & (flat == 8)).sum())
    assert kept[order[:rest]].all() and not kept[order[rest:]].any()


@pytest.mark.parametrize("kind", ["normal", "tiny", "few values", "mostly zero"])
def test_backends_agree_to_the_last_element(kind, device, monkeypatch):
    """Sums of integers are exact: no order of additions, no batches move the cut."""
    monkeypatch.setattr(histogram, "_BATCH", 5000)
    flat = torch.randn(30000).square()
    if kind == "tiny":  # subnormal
        flat = flat * 2.0**-140
    elif kind == "few values":
        flat = flat.mul(4).round()
    elif kind == "mostly zero":
        flat[torch.rand(30000) < 0.9] = 0.0
        flat[::7] *= -0.0  # and some of them negative
    s = [t.to(device) for t in flat.split([1, 4096, 8191, 17712])]
    within = [torch.rand(t.shape, device=device) < 0.4 for t in s]
    for choose in (
        *(lambda theta=theta: select_by_mass(s, theta) for theta in (0.02, 0.5, 0.9, 0.999999)),
        *(lambda share=share: select_top(s, within, share) for share in (0.1, 0.5, 0.99, 1.0)),
    ):
        found = []
        for name in ("reference", "triton"):
            monkeypatch.setenv("LORAPAR_BACKEND", name)
            found.append(choose())
        assert sum(int(m.sum()) for m in found[0]) > 0
        assert all(torch.equal(*pair) for pair in zip(*found))


def test_sixteen_bits_strides_and_empty_tensors(backend, device):
    s = torch.rand(40, 30, device=device).square()
    whole = select_by_mass([s.bfloat16().float()], 0.8)
    empty = torch.zeros(0, 4, device=device)
    parts = select_by_mass([s.bfloat16().t()[:12].t(), empty, s.bfloat16().t()[12:].t()], 0.8)
    assert parts[1].shape == (0, 4)
    assert torch.equal(torch.cat([parts[0], parts[2]], 1), whole[0])


@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60).filter(lambda v: sum(v) > 0),
    st.floats(0.01, 0.99),
)
def test_is_the_smallest_set_that_reaches_theta(values, theta):
    """Of any finite numbers, subnormal ones and ties among them."""
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


def test_where_rounding_decides(backend, device):
    """A share so small that it rounds to nothing keeps one element; one so near to 1 that the
    running sum never reaches it keeps all that count."""
    wide = torch.tensor([1e30, 3.0, 0.0, 1e-30], device=device)
    assert chosen(select_by_mass([wide], 5e-324)) == {0}
    assert chosen(select_by_mass([wide * 1e-30 * 1e-15], 5e-324)) == {0}
    torch.manual_seed(1)
    for seed in range(40):
        torch.manual_seed(seed)
        s = torch.rand(200, device=device) * 10.0 ** torch.randint(-9, 9, (200,), device=device)
        s[:9] = 0.0
        (mask,) = select_by_mass([s], 1 - 2.0**-53)
        kept, total = s[mask].double().sum(), s.double().sum()
        assert not mask[:9].any() and kept >= total * (1 - 1e-15)
    amounts = torch.tensor([0.0, 0.0, 3.0, 0.0, 5.0], dtype=torch.float64)
    assert _reach(amounts, 8.0) == (2, 5.0)
    assert _reach(amounts, 8.0 + 1e-12) == (2, 5.0)  # what rounding may leave out of reach
    assert _reach(amounts, 9.0, 4.0) == (4, 4.0)
    thirds = torch.full((7,), 1 / 3, device=device)
    for k in range(1, 7):
        assert int(select_by_mass([thirds], k / 7)[0].sum()) in (k, k + 1)
    assert int(select_by_mass([thirds], 1 - 2.0**-53)[0].sum()) == 7


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_top_takes_the_floor_by_count(fraction, backend, device):
    s = [t.to(device) for t in scores(1)]
    within = [torch.rand(t.shape, device=device) < 0.3 for t in s]
    flat, marked = torch.cat([t.flatten() for t in s]), chosen(within)
    best = sorted(marked, key=lambda i: -flat[i])[: math.floor(fraction * len(marked))]
    assert chosen(select_top(s, within, fraction)) == set(best)


def test_zeros_fill_up_what_is_asked_by_count(backend, device):
    s = [torch.tensor([0.0, 3.0, -0.0, 0.0, 1.0], device=device)]
    within = [torch.tensor([True, True, True, True, False], device=device)]
    assert chosen(select_top(s, within, 0.75)) == {0, 1, 2}
    assert chosen(select_top(s, within, 0.25)) == {1}


@pytest.mark.parametrize(
    ("value", "what"), [(torch.nan, "NaN"), (torch.inf, "Inf"), (-1.0, "negative"), (-1e-45, "")]
)
def test_bad_scores_are_named_and_counted(value, what, backend, device):
    s = [t.to(device) for t in scores(2)]
    s[1][0, :2] = value
    with pytest.raises(ValueError, match=rf"scores\[1\] \[64, 8\] has 2 elements .*{what}"):
        select_by_mass(s, 0.5)
    s[2][3, 3] = value
    with pytest.raises(ValueError, match=r"b \[64, 8\] has 2; c \[8, 48\] has 1 elements"):
        select_by_mass(s, 1.0, names=["a", "b", "c"])
    within = [t > -torch.inf for t in s]
    with pytest.raises(ValueError, match=r"select_top: b"):
        select_top(s, [torch.ones_like(w) for w in within], 0.5, names=["a", "b", "c"])


def test_bad_input_is_named(backend, device):
    s = [t.to(device) for t in scores(2)]
    with pytest.raises(ValueError, match=r"theta must lie in \[0, 1\], got 1.5"):
        select_by_mass(s, 1.5)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], got -0.1"):
        select_top(s, [t > 0 for t in s], -0.1)
    with pytest.raises(ValueError, match="all 10 scores are zero"):
        select_by_mass([torch.zeros(10, device=device)], 0.5)
    with pytest.raises(ValueError, match="got no scores"):
        select_by_mass([], 0.5)
    with pytest.raises(TypeError, match=r"scores\[0\] is torch.float64; cast it to float32"):
        select_by_mass([s[0].double()], 0.5)
    with pytest.raises(ValueError, match="within must have the shapes"):
        select_top(s, [t > 0 for t in s[:2]], 0.5)
    with pytest.raises(TypeError, match="within must be bool"):
        select_top(s, s, 0.5)


@pytest.mark.gpu
def test_no_second_copy_of_the_scores(device, triton_backend):
    """The kernels read the tensors where they are."""
    s = [torch.rand(2**22, device=device) for _ in range(8)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masks = select_by_mass(s, 0.9)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.2 * sum(m.numel() for m in masks)
