"""A checkpoint that is not reentrant stops before the base GEMM of its last layer."""

import pytest
import torch
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lorapar_kernels import LoraMask, Projection, fused, lora_linear, lora_linear_group
from lorapar_kernels.testing import FACTOR, assert_as_accurate

M, K, N, R = 48, 40, 56, 3
pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many outputs each call made, in order."""
    counts, whole = [], fused._outputs

    def counted(x, bases, *rest):
        counts.append(len(bases))
        return whole(x, bases, *rest)

    monkeypatch.setattr(fused, "_outputs", counted)
    return counts


def tensors(bias: bool = False) -> dict[str, torch.Tensor]:
    def random(*shape):
        return torch.randn(shape, device=DEVICE)

    found = {"x": random(4, M // 4, K), "lora_a": random(R, K), "lora_b": random(N, R)}
    found |= {"bias": random(N)} if bias else {}
    return {n: t.requires_grad_() for n, t in found.items()} | {"weight": random(N, K)}


def gradients(run, given, **options) -> list[torch.Tensor]:
    """y and the gradients of everything that asks for one."""
    torch.manual_seed(3)
    leaves = [t for t in given.values() if t.requires_grad]
    y = run(lambda x, **others: lora_linear(x=x, scale=0.7, **others, **options), given)
    return [y, *torch.autograd.grad(y.square().mean(), leaves)]


def checkpointed(layer, given):
    """x is an argument: a checkpoint keeps the generators of its arguments' devices."""
    return checkpoint(lambda x: layer(**given | {"x": x}) + 1, given["x"], use_reentrant=False)


def plain(layer, given):
    return layer(**given) + 1


MASK = LoraMask(torch.rand(R, K) < 0.5, torch.rand(N, R) < 0.5)
LIVE = torch.tensor([True, False, True])
OPTIONS = {
    "alone": {},
    "dropout": {"dropout_p": 0.3},
    "mask": {"mask": MASK},
    "dead columns": {"mask": LoraMask(LIVE[:, None].expand(R, K), LIVE.expand(N, R), live=LIVE)},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_last_gemm_runs_once(options, bias, made):
    given = tensors(bias)
    options = {k: v.to(DEVICE) if isinstance(v, LoraMask) else v for k, v in options.items()}
    expected = gradients(plain, given, **options)
    assert made == [1]
    got = gradients(checkpointed, given, **options)
    assert made == [1, 1]  # once in the forward, not in the backward
    for one, other in zip(got, expected):
        assert torch.equal(one, other)


def test_a_layer_whose_output_is_needed_makes_it_again(made):
    given = tensors()
    expected = gradients(lambda layer, given: plain(layer, given).sin(), given, dropout_p=0.3)
    del made[:]

    def inside(layer, given):
        call = lambda x: (layer(**given | {"x": x}) + 1).sin()  # noqa: E731
        return checkpoint(call, given["x"], use_reentrant=False)

    got = gradients(inside, given, dropout_p=0.3)
    assert made == [1, 1]
    for one, other in zip(got, expected):
        assert torch.equal(one, other)


def test_without_stopping_early_and_one_in_another():
    given = tensors()
    expected = gradients(plain, given, dropout_p=0.3)
    with set_checkpoint_early_stop(False):
        whole = gradients(checkpointed, given, dropout_p=0.3)

    def nested(layer, given):
        call = lambda x: checkpointed(layer, given | {"x": x})  # noqa: E731
        return checkpoint(call, given["x"], use_reentrant=False)

    for got in (whole, gradients(nested, given, dropout_p=0.3)):
        for one, other in zip(got, expected):
            assert torch.equal(one, other)


def test_what_is_frozen_and_hooks_that_save(made):
    """Nothing needs a gradient; then x alone; and hooks of other kinds change nothing."""
    given = tensors()
    frozen = {n: t.detach() for n, t in given.items()}
    y = checkpoint(lambda: lora_linear(scale=0.7, **frozen), use_reentrant=False)
    assert not y.requires_grad and made == [1]
    x = frozen["x"].clone().requires_grad_()
    expected = torch.autograd.grad(lora_linear(scale=0.7, **frozen | {"x": x}).sum(), x)
    with torch.autograd.graph.save_on_cpu():
        y = lora_linear(scale=0.7, **frozen | {"x": x})
    assert torch.equal(*torch.autograd.grad(y.sum(), x), *expected)


def test_groups_are_made_as_they_were(made):
    """Their outputs are needed in the recomputation, by what follows."""
    given = tensors()
    projection = Projection(given["weight"], given["lora_a"], given["lora_b"], 0.7)
    y = checkpoint(
        lambda: sum(lora_linear_group(given["x"], [projection] * 2)), use_reentrant=False
    )
    y.sum().backward()
    assert made == [2, 2]


def test_gradients_are_as_accurate_as_without():
    given = tensors()
    got = gradients(checkpointed, given)
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in given.items()}

    def formula(layer, given):
        x, w, a, b = (given[n] for n in ("x", "weight", "lora_a", "lora_b"))
        return x @ w.T + 0.7 * (x @ a.T) @ b.T + 1

    right, usual = gradients(formula, exact), gradients(formula, given)
    for i, (one, other, reference) in enumerate(zip(got, usual, right)):
        assert_as_accurate(str(i), one, reference, other, FACTOR)
