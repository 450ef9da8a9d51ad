"""MaskedAdamW: dense AdamW's numbers on trainable elements, and nothing at all elsewhere."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from conftest import DEVICE, KERNEL_DTYPES, REPO, serve_by

from lorapar_kernels import MaskedAdamW, adamw
from lorapar_kernels.testing import assert_as_accurate, assert_close

NAN_BITS = 0x7FC0BEEF  # a NaN that arithmetic would not keep
STEPS = 100 if DEVICE == "cuda" else 40  # interpreted, the kernel is slow
ARGUMENTS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch) -> str:
    """The extension has no kernels for this: Triton's serve beside it."""
    serve_by(request.param, monkeypatch)
    return request.param


def setup(dtype=torch.float32, device="cpu", share=0.4):
    """Three parameters, two of them masked, one longer than a chunk of the kernel."""
    shapes = {"a": (4, 9), "b": (300, 8), "whole": (5,)}
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
def test_equals_dense_adamw_on_trainable_elements(maximize, backend, device):
    params, masks = setup(device=device)
    start, grads = copies(params), gradients(params, STEPS)
    dense, exact = copies(params), copies(params, torch.float64)
    run(MaskedAdamW(params.items(), masks, **ARGUMENTS, maximize=maximize), params, grads)
    fused = torch.optim.AdamW(dense.values(), **ARGUMENTS, maximize=maximize, fused=True)
    run(fused, dense, grads)
    run(torch.optim.AdamW(exact.values(), **ARGUMENTS, maximize=maximize), exact, grads)
    for n, p in params.items():
        mask = masks.get(n, torch.ones_like(p, dtype=torch.bool))
        assert_as_accurate(n, p[mask].detach(), exact[n][mask].detach(), dense[n][mask].detach())
        assert torch.equal(p[~mask], start[n][~mask])  # decay and momentum did not reach them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_as_near_as_torchs(dtype, backend, device):
    if backend == "triton" and dtype not in KERNEL_DTYPES:
        pytest.skip("interpreted, Triton cuts bf16 off instead of rounding")
    params, masks = setup(dtype, device)
    grads = gradients(params, 20)
    for step in grads:  # what a 16-bit gradient holds, for all three
        step.update({n: g.to(dtype).double() for n, g in step.items()})
    dense, exact = copies(params), copies(params, torch.float64)
    run(MaskedAdamW(params.items(), masks, **ARGUMENTS), params, grads)
    run(torch.optim.AdamW(dense.values(), **ARGUMENTS, fused=True), dense, grads)
    run(torch.optim.AdamW(exact.values(), **ARGUMENTS), exact, grads)
    for n, p in params.items():
        mask = masks.get(n, torch.ones_like(p, dtype=torch.bool))
        assert_as_accurate(n, p[mask].detach(), exact[n][mask].detach(), dense[n][mask].detach())


def test_frozen_elements_are_neither_read_nor_written(backend, device):
    """NaN there, in the parameter with a payload and in the gradient, reaches nothing."""
    params, masks = setup(device=device)
    grads = gradients(params, 2)
    clean = copies(params)
    run(MaskedAdamW(clean.items(), masks, **ARGUMENTS), clean, grads)
    for n, mask in masks.items():
        params[n].data.view(torch.int32)[~mask] = NAN_BITS
        for step in grads:
            step[n][~mask] = torch.nan
    run(MaskedAdamW(params.items(), masks, **ARGUMENTS), params, grads)
    for n, mask in masks.items():
        assert torch.equal(params[n][mask], clean[n][mask])
        assert (params[n].data.view(torch.int32)[~mask] == NAN_BITS).all()


def test_nan_and_inf_of_trainable_elements_stay_where_they_are(backend, device):
    params, masks = setup(device=device)
    masks["b"][:3, 0] = True
    clean, grads = copies(params), gradients(params, 3)
    run(MaskedAdamW(clean.items(), masks, **ARGUMENTS), clean, grads)
    grads[1]["b"][0, 0], grads[1]["b"][1, 0] = torch.nan, torch.inf
    run(MaskedAdamW(params.items(), masks, **ARGUMENTS), params, grads)
    hurt = torch.zeros_like(masks["b"])
    hurt[:2, 0] = True
    assert params["b"][hurt].isnan().all()
    assert torch.equal(params["b"][~hurt], clean["b"][~hurt])
    assert torch.equal(params["whole"], clean["whole"])


def test_a_parameter_without_gradient_waits_and_keeps_its_own_step(backend, device):
    params, masks = setup(device=device)
    alone, grads = copies(params), gradients(params, 6)
    optimiser = MaskedAdamW(params.items(), masks, **ARGUMENTS)
    for i, step in enumerate(grads):
        for n, p in params.items():
            p.grad = step[n].to(p.dtype) if n != "b" or i % 2 else None
        optimiser.step()
    assert [optimiser.state[params[n]]["step"] for n in ("a", "b")] == [6, 3]
    for n, its in (("a", grads), ("b", grads[1::2])):
        one = {n: alone[n]}
        run(MaskedAdamW(one.items(), {n: masks[n]}, **ARGUMENTS), one, its)
        assert torch.equal(params[n], alone[n]), n


def test_strides_and_offsets(backend, device):
    """A transposed parameter, one at an odd address, a gradient in other strides: the same."""
    params, masks = setup(device=device)
    grads = gradients(params, 3)
    odd = torch.zeros(params["b"].numel() + 1, device=device)[1:].view_as(params["b"])
    other = {
        "a": torch.nn.Parameter(params["a"].detach().t().contiguous().t()),
        "b": torch.nn.Parameter(odd.copy_(params["b"].detach())),
        "whole": torch.nn.Parameter(params["whole"].detach().clone()),
    }
    assert not other["a"].is_contiguous() and other["b"].data_ptr() % 8
    run(MaskedAdamW(params.items(), masks, **ARGUMENTS), params, grads)
    turned = [{n: g.t().contiguous().t() if n == "b" else g for n, g in s.items()} for s in grads]
    run(MaskedAdamW(other.items(), masks, **ARGUMENTS), other, turned)
    for n in params:
        assert_close(n, other[n].detach(), params[n].detach())


def test_one_launch_a_group(device, triton_backend, monkeypatch):
    params, masks = setup(device=device)
    launches, launch = [], adamw.launch
    monkeypatch.setattr(adamw, "launch", lambda *a, **k: launches.append(a[1]) or launch(*a, **k))
    optimiser = MaskedAdamW(params.items(), masks, **ARGUMENTS)
    run(optimiser, params, gradients(params, 2))
    assert launches == [(1 + 3 + 1,)] * 2  # programs: chunks of 1024 elements


def test_bytes_of_state():
    """8 bytes a trainable element, a bit an element, and 12 bytes a chunk."""
    params = {f"p{i}": torch.nn.Parameter(torch.randn(64, 1024)) for i in range(3)}
    masks = {n: torch.rand(p.shape) < 0.4 for n, p in params.items()}
    optimiser = MaskedAdamW(params.items(), masks)
    run(optimiser, params, gradients(params, 1))
    share = sum(int(m.sum()) for m in masks.values()) / (3 * 64 * 1024)
    moments = sum(s[k].nbytes for s in optimiser.state.values() for k in ("exp_avg", "exp_avg_sq"))
    fused = adamw.Fused(list(params.values()), [m.bits for m in optimiser._masks.values()])
    held = (moments + sum(t.nbytes for t in fused.where)) / (3 * 64 * 1024)
    assert held == 8 * share + 1 / 8 + 12 / 1024


def test_state_exists_for_trainable_elements_alone():
    params, masks = setup()
    optimiser = MaskedAdamW(params.items(), masks)
    run(optimiser, params, gradients(params, 1))
    for n, p in params.items():
        count = int(masks[n].sum()) if n in masks else p.numel()
        assert optimiser.state[p]["exp_avg"].shape == (count,)
        assert optimiser.state[p]["exp_avg_sq"].dtype == torch.float32


def test_sixteen_bit_parameters_keep_fp32_moments_through_a_checkpoint(backend, device):
    params, masks = setup(torch.bfloat16, device)
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
    assert all(s["exp_avg"].dtype == torch.float32 for s in resumed.state.values())
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


def test_a_part_of_a_state_is_refused():
    """As one rank's moments are: the masks are the same, the moments too few. Nothing is loaded."""
    params, masks = setup()
    optimiser = MaskedAdamW(params.items(), masks)
    run(optimiser, params, gradients(params, 1))
    state = optimiser.state_dict()
    state["state"][1] = {n: t[:-5] if n != "step" else t for n, t in state["state"][1].items()}
    again = MaskedAdamW(params.items(), masks)
    with pytest.raises(ValueError, match=r"state of b \[300, 8\] has \d+ moments in exp_avg, \d+ "):
        again.load_state_dict(state)
    assert not again.state
    state["state"][7] = state["state"].pop(1)
    with pytest.raises(ValueError, match="the state's groups list no parameter 7"):
        again.load_state_dict(state)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_of_another_kind_are_refused(key, backend, device):
    """Put there by others, after a step: a kernel would take them for what it expects."""
    params, masks = setup(device=device)
    for wrong in (lambda t: t[:-1].clone(), lambda t: t.double(), lambda t: t.half()):
        optimiser = MaskedAdamW(params.items(), masks)
        run(optimiser, params, gradients(params, 1))
        own = optimiser.state[params["b"]]
        own[key] = wrong(own[key])
        with pytest.raises(ValueError, match=rf"{key}"):
            run(optimiser, params, gradients(params, 1))


def test_parameters_that_change_their_kind_between_steps(backend, device):
    """Cast or transposed in place: no address is read as what it was before."""
    params, masks = setup(device=device)
    twin, grads = copies(params), gradients(params, 5)
    optimisers = [MaskedAdamW(named.items(), masks, **ARGUMENTS) for named in (params, twin)]
    for optimiser, named in zip(optimisers, (params, twin)):
        run(optimiser, named, grads[:2])
    params["a"].data = params["a"].data.t().contiguous().t()
    for optimiser, named in zip(optimisers, (params, twin)):
        run(optimiser, named, grads[2:4])
    for n in params:
        assert_close(n, params[n].detach(), twin[n].detach())
    params["b"].grad = None
    params["b"].data = params["b"].data.half()
    before = copies(params)
    run(optimisers[0], params, grads[4:])
    change = (params["b"] - before["b"]).abs().detach()
    assert change[~masks["b"]].max() == 0 and 0 < change[masks["b"]].max() < 0.1


def test_another_parameter_in_its_place(backend, device):
    """As FSDP2 puts a shard there, after the optimiser was made."""
    params, masks = setup(device=device)
    optimiser = MaskedAdamW(params.items(), masks, **ARGUMENTS)
    grads = gradients(params, 4)
    run(optimiser, params, grads[:2])
    other = copies(params)
    optimiser.param_groups[0]["params"] = list(other.values())
    before = copies(params)
    run(optimiser, other, grads[2:])
    assert all(torch.equal(params[n], before[n]) for n in params)
    fresh = copies(before)
    run(MaskedAdamW(fresh.items(), masks, **ARGUMENTS), fresh, grads[2:])
    assert all(torch.equal(other[n], fresh[n]) for n in params)


def test_a_state_goes_from_one_process_to_another(tmp_path, backend, device):
    """Written by another interpreter, which made the same parameters, masks and gradients."""
    params, masks = setup(device=device)
    grads = gradients(params, 5)
    start = copies(params)
    run(MaskedAdamW(params.items(), masks, **ARGUMENTS), params, grads)
    torch.save((copies(start), masks, grads), tmp_path / "given")
    code = (
        "import sys, torch\n"
        "from lorapar_kernels import MaskedAdamW\n"
        f"params, masks, grads = torch.load({str(tmp_path / 'given')!r}, weights_only=False)\n"
        f"optimiser = MaskedAdamW(params.items(), masks, **{ARGUMENTS})\n"
        "for step in grads[:3]:\n"
        "    for n, p in params.items(): p.grad = step[n].to(p.dtype)\n"
        "    optimiser.step()\n"
        f"torch.save((params, optimiser.state_dict()), {str(tmp_path / 'made')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
    made, state = torch.load(tmp_path / "made", weights_only=False)
    resumed = MaskedAdamW(made.items(), masks, **ARGUMENTS)
    resumed.load_state_dict(state)
    run(resumed, made, grads[3:])
    assert all(torch.equal(made[n], params[n]) for n in params)


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


def test_closure_scheduler_and_clipping_work_as_with_torch(backend, device):
    params, masks = setup(device=device)
    optimiser = MaskedAdamW(params.items(), masks, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: 0.5**s)

    def closure():
        optimiser.zero_grad()
        loss = sum(p.square().sum() for p in params.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0, foreach=True)
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


def test_a_bad_group_is_refused_and_not_added():
    params, masks = setup()
    optimiser = MaskedAdamW({"a": params["a"]}.items(), {"a": masks["a"]})
    optimiser._masks |= MaskedAdamW({"b": params["a"]}.items(), {"b": masks["a"]})._masks
    for change, error, message in (
        ({"amsgrad": True}, TypeError, "amsgrad"),
        ({"lr": -1.0}, ValueError, "lr must lie"),
        ({"betas": (0.9, 1.5)}, ValueError, "betas must lie"),
        ({}, ValueError, r"the mask of b is \[4, 9\], the parameter \[300, 8\]"),
    ):
        with pytest.raises(error, match=message):
            optimiser.add_param_group({"params": [("b", params["b"])], **change})
        assert len(optimiser.param_groups) == 1


def test_bad_masks():
    params, masks = setup()
    with pytest.raises(ValueError, match="masks for 1 names that are no parameter here: typo"):
        MaskedAdamW(params.items(), dict(masks, typo=masks["a"]))
    with pytest.raises(ValueError, match=r"the mask of a is \[300, 8\], the parameter \[4, 9\]"):
        MaskedAdamW(params.items(), {"a": masks["b"]})
    with pytest.raises(TypeError, match="the mask of a must be bool"):
        MaskedAdamW(params.items(), {"a": masks["a"].float()})
    with pytest.raises(ValueError, match="parameters need names"):
        MaskedAdamW(params.values(), masks)


@pytest.mark.slow
@pytest.mark.parametrize("backend_name", ["reference", "triton"])
def test_two_ranks_of_fsdp2_equal_one_process(backend_name, tmp_path):
    script = Path(__file__).parent / "masked_adamw_ranks.py"
    environment = {"LORAPAR_BACKEND": backend_name, "TRITON_INTERPRET": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    for world in (1, 2):
        several.finish(several.start(script, tmp_path / "out", world=world, **environment))
    *two, one = (torch.load(tmp_path / f"out.{end}") for end in ("2.0", "2.1", "1.0"))
    assert sum(t["moments"] for t in two) == one["moments"]
    assert min(t["moments"] for t in two) < 0.6 * one["moments"]  # each rank has its shard's
    for n, p in one["end"].items():
        assert torch.equal(two[0]["end"][n], two[1]["end"][n])
        assert_close(n, two[0]["end"][n], p)
        frozen = ~one["masks"].get(n, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(two[0]["end"][n][frozen], one["start"][n][frozen])
        assert not torch.equal(p, one["start"][n])
