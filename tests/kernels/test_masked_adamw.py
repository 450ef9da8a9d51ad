"""MaskedAdamW: dense AdamW's numbers on trainable elements, and nothing at all elsewhere."""

import copy
import io
import pickle

import pytest
import torch

from lorapar_kernels import MaskedAdamW
from lorapar_kernels.testing import assert_as_accurate

ARGUMENTS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def setup(dtype=torch.float32, device="cpu", share=0.4):
    shapes = {"a": (4, 9), "b": (7, 4), "whole": (5,)}
    params = {
        n: torch.nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for n, s in shapes.items()
    }
    masks = {n: torch.rand(shapes[n], device=device) < share for n in ("a", "b")}
    return params, masks


def gradients(params, steps):
    torch.manual_seed(9)
    return [{n: torch.randn_like(p, dtype=torch.float64) for n, p in params.items()}
            for _ in range(steps)]  # fmt: skip


def run(optimiser, params, grads):
    for step in grads:
        for n, p in params.items():
            p.grad = step[n].to(p.dtype)
        optimiser.step()


def copies(params, dtype=None):
    values = {n: p.detach().to(dtype or p.dtype).clone() for n, p in params.items()}
    return {n: torch.nn.Parameter(value) for n, value in values.items()}


@pytest.mark.parametrize("maximize", [False, True])
def test_equals_dense_adamw_on_trainable_elements(maximize, device):
    params, masks = setup(device=device)
    start, grads = copies(params), gradients(params, 100)
    dense, exact = copies(params), copies(params, torch.float64)
    run(MaskedAdamW(params.items(), masks, **ARGUMENTS, maximize=maximize), params, grads)
    run(torch.optim.AdamW(dense.values(), **ARGUMENTS, maximize=maximize), dense, grads)
    run(torch.optim.AdamW(exact.values(), **ARGUMENTS, maximize=maximize), exact, grads)
    for n, p in params.items():
        mask = masks.get(n, torch.ones_like(p, dtype=torch.bool))
        assert_as_accurate(n, p[mask].detach(), exact[n][mask].detach(), dense[n][mask].detach())
        assert torch.equal(p[~mask], start[n][~mask])  # decay and momentum did not reach them


def test_state_exists_for_trainable_elements_alone():
    params, masks = setup()
    optimiser = MaskedAdamW(params.items(), masks)
    run(optimiser, params, gradients(params, 1))
    for n, p in params.items():
        count = int(masks[n].sum()) if n in masks else p.numel()
        assert optimiser.state[p]["exp_avg"].shape == (count,)
        assert optimiser.state[p]["exp_avg_sq"].dtype == torch.float32


def test_sixteen_bit_parameters_keep_fp32_moments_through_a_checkpoint():
    params, masks = setup(torch.bfloat16)
    grads = gradients(params, 6)
    straight = copies(params)
    run(MaskedAdamW(straight.items(), masks, **ARGUMENTS), straight, grads)
    first = MaskedAdamW(params.items(), masks, **ARGUMENTS)
    run(first, params, grads[:3])
    resumed = MaskedAdamW(params.items(), masks, **ARGUMENTS)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run(resumed, params, grads[3:])
    assert all(torch.equal(params[n], straight[n]) for n in params)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_their_masks(how):
    params, masks = setup()
    optimiser = MaskedAdamW(params.items(), masks, **ARGUMENTS)
    run(optimiser, params, gradients(params, 1))
    twin = how(optimiser)
    (group,) = twin.param_groups
    other = dict(zip(group["param_names"], group["params"]))
    for both, named in ((optimiser, params), (twin, other)):
        run(both, named, gradients(params, 3))
    assert all(torch.equal(params[n], other[n]) for n in params)


def test_state_of_another_mask_is_refused():
    params, masks = setup()
    state = MaskedAdamW(params.items(), masks).state_dict()
    other = dict(masks, a=~masks["a"])
    with pytest.raises(ValueError, match=r"made with another mask: a \[4, 9\] with \d+ trainable"):
        MaskedAdamW(params.items(), other).load_state_dict(state)
    with pytest.raises(ValueError, match="the state has 0 masked parameters, this optimiser 3"):
        dense = torch.optim.AdamW(params.values())
        MaskedAdamW(params.items(), masks).load_state_dict(dense.state_dict())


def test_empty_mask_makes_no_state_and_no_grad_is_skipped():
    params, masks = setup()
    masks["a"][:] = False
    optimiser = MaskedAdamW(params.items(), masks, **ARGUMENTS)
    before = copies(params)
    params["a"].grad = torch.randn_like(params["a"])
    optimiser.step()  # b and whole have no gradient
    assert not optimiser.state and all(torch.equal(params[n], before[n]) for n in params)


def test_groups_have_their_own_options():
    params, masks = setup()
    groups = [
        {"params": [("a", params["a"])], "lr": 0.0, "weight_decay": 0.0},
        {"params": [("b", params["b"])]},
    ]
    before = copies(params)
    run(MaskedAdamW(groups, masks, lr=0.1), {n: params[n] for n in "ab"}, gradients(params, 1))
    assert torch.equal(params["a"], before["a"]) and not torch.equal(params["b"], before["b"])


def test_closure_scheduler_and_clipping_work_as_with_torch():
    params, masks = setup()
    optimiser = MaskedAdamW(params.items(), masks, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: 0.5**s)

    def closure():
        optimiser.zero_grad()
        loss = sum(p.square().sum() for p in params.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        return loss

    first = optimiser.step(closure)
    scheduler.step()
    assert optimiser.step(closure) < first and optimiser.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"amsgrad": True}, TypeError, "amsgrad is not offered"),
        ({"lr": -1.0}, ValueError, r"lr must lie in \[0.0, inf\), got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must lie in"),
    ],
)
def test_bad_arguments(change, error, message):
    params, masks = setup()
    with pytest.raises(error, match=message):
        MaskedAdamW(params.items(), masks, **change)


def test_bad_masks():
    params, masks = setup()
    with pytest.raises(ValueError, match="masks for 1 names that are no parameter here: typo"):
        MaskedAdamW(params.items(), dict(masks, typo=masks["a"]))
    with pytest.raises(ValueError, match=r"the mask of a is \[7, 4\], the parameter \[4, 9\]"):
        MaskedAdamW(params.items(), {"a": masks["b"]})
    with pytest.raises(TypeError, match="the mask of a must be bool"):
        MaskedAdamW(params.items(), {"a": masks["a"].float()})
    with pytest.raises(ValueError, match="parameters need names"):
        MaskedAdamW(params.values(), masks)
