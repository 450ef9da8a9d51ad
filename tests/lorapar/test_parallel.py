"""Patched equals unpatched however a model is spread over processes or devices, or moved."""

import copy
import importlib.util
from functools import partial

import parallel_ranks
import pytest
import several
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from against_peft import IDS, compare, layer_of, pair
from conftest import make_lora, make_tiny_model
from parallel_ranks import CASES, LAYERS, biased, counted
from torch import nn

from lorapar.patch import accelerate, restore
from lorapar_kernels.testing import FACTOR, NETWORK_FACTOR, assert_as_accurate, assert_close

if torch.cuda.is_available():
    pytest.skip("spreads over CPU processes and devices", allow_module_level=True)

# Cases that PEFT serves: how many of the twelve layers, and why, or None where the report was made
# before the model was spread.
LEFT = {
    "fsdp2, q, k and v alone, patched when sharded": (6, "FSDPLinear, no LoRA layer over one"),
    "fsdp1, by PEFT's policy": (LAYERS, None),
    "fsdp1, by PEFT's policy, as they were": (LAYERS, None),
    "fsdp1, by PEFT's policy, patched when sharded": (LAYERS, None),
    "tensor parallel": (LAYERS, "its base layer is tensor-parallel"),
    "tensor parallel, loaded": (6, "its base layer is tensor-parallel"),
    "zero 3": (LAYERS, "has hooks"),
    "zero 3, reentrant": (LAYERS, "has hooks"),
}
ZERO = [name for name in CASES if name.startswith("zero")]
QUICK = ["ddp, not reentrant", "fsdp2, bf16"]


def judge(name: str, rank: dict) -> None:
    """One rank's results of a case, and who served its layers."""
    assert isinstance(rank, dict), rank  # else the traceback
    plain, patched, exact = rank["plain"], rank["patched"], rank.get("exact")
    assert patched.keys() == plain.keys()
    for key, result in patched.items():
        if exact is None:
            assert_close(key, result, plain[key])
        else:
            factor = FACTOR if key in ("logits 0", "logits 1") else NETWORK_FACTOR
            assert_as_accurate(key, result, exact[key], plain[key], factor)
    left, reason = LEFT.get(name, (0, None))
    layers = 6 if name == "tensor parallel, loaded" else LAYERS
    forwards = 8 if name == "trl" or "reentrant" in name or "checkpointed" in name else 4
    forwards += "before" in plain
    expected = {"kernels": forwards * (layers - left), "peft": forwards * left}
    expected["peft"] += 4 * LAYERS * ("again logits 0" in plain)  # after restore
    assert rank["counts"] == expected
    report = rank["reports"][-1]
    if reason is not None:
        assert len(report.served) == layers - left and len(report.skipped) == left
        assert all(reason in why for why in report.skipped.values()), report
    else:
        assert len(report.served) == layers and not report.skipped, report


def started(out: str, cases: list[str], **environment: str) -> list[dict]:
    """What each of two processes wrote."""
    several.finish(several.start(parallel_ranks.__file__, out, *cases, **environment))
    return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """All cases in one start of the two, DeepSpeed's last, as it changes torch."""
    cases = [name for name in CASES if name not in ZERO]
    if importlib.util.find_spec("deepspeed"):
        cases += ZERO
    return started(f"{tmp_path_factory.mktemp('ranks')}/out", cases, DS_ACCELERATOR="cpu")


@pytest.mark.more
@pytest.mark.parametrize("name", [name for name in CASES if name not in ZERO])
def test_two_processes(name, ranks):
    """DDP, FSDP 2, FSDP 1, tensor parallel and TRL's trainer over gloo."""
    for rank in ranks:
        judge(name, rank[name])
    if name.startswith("ddp"):
        one, other = (rank[name]["patched"] for rank in ranks)
        assert all(torch.equal(g, other[n]) for n, g in one.items() if "logits" not in n)


@pytest.mark.more
@pytest.mark.parametrize("name", ZERO)
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_deepspeed(name, ranks):
    """ZeRO-2 is served; ZeRO-3, which gathers the weights in hooks of lora_A and B, is left."""
    for rank in ranks:
        judge(name, rank[name])


def test_one_process(tmp_path):
    """The same as two processes, for a run that has no time for them."""
    parallel_ranks.main(0, 1, several.free_port(), f"{tmp_path}/out", *QUICK)
    results = torch.load(f"{tmp_path}/out.0", weights_only=False)
    for name in QUICK:
        judge(name, results[name])


def test_what_deepspeed_does_to_weights_is_left():
    """ZeRO-3 empties the weights, and fills them in hooks of lora_A and lora_B."""
    plain, model = pair()
    hooked, empty = layer_of(model, "0.self_attn.q_proj"), layer_of(model, "1.mlp.up_proj")
    hooked.lora_A["default"].register_forward_pre_hook(lambda module, args: None)
    weight, whole = empty.lora_B["default"].weight, empty.lora_B["default"].weight.data
    weight.data = torch.empty(0)
    why = ["lora_A has hooks", "lora_B's weight is no plain tensor of 16, 32 or 64 bits"]
    assert list(accelerate(model).skipped.values()) == why
    hook = empty.lora_B["default"].register_forward_pre_hook(
        lambda module, args: setattr(weight, "data", whole)
    )
    with counted() as counts:
        y = model(input_ids=IDS).logits
    assert counts == {"kernels": LAYERS - 2, "peft": 2}
    assert_close("logits", y, plain(input_ids=IDS).logits)
    hook.remove()
    with counted() as counts:
        compare(model, plain)  # whole again
    assert counts == {"kernels": LAYERS - 1, "peft": 1 + 2 * LAYERS}


def replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes it, on the same device: attributes for parameters."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(made, name, None if child is None else replica(child))
    for name, p in module._parameters.items():
        if p is None:
            made._parameters[name] = None
        else:
            setattr(made, name, p.view_as(p))
    return made


def test_data_parallel_replicas():
    """They keep the bias of the base, and their gradients reach the model."""
    plain = biased()
    model = copy.deepcopy(plain)
    accelerate(model)
    results = []
    with counted() as counts:
        for m in (plain, model):
            y = replica(m)(input_ids=IDS).logits
            y.square().mean().backward()
            results.append((y, {n: p.grad for n, p in m.named_parameters() if p.requires_grad}))
    assert counts == {"kernels": LAYERS, "peft": LAYERS}
    (y0, g0), (y, g) = results
    assert_close("logits", y, y0)
    for name, grad in g0.items():
        assert_close(name, g[name], grad)


def on_several(model, folder, prefix="base_model.model."):
    """The last decoder layer on the disk."""
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    device_map = {prefix + name: "cpu" for name in names} | {f"{prefix}model.layers.1": "disk"}
    options = {"main_device": "cpu", "offload_dir": folder, "force_hooks": True}
    return dispatch_model(model, device_map, **options)


def on_one(model, folder):
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model, folder):
    return cpu_offload(model, execution_device="cpu")


def served_calls(model, plain, backward=True) -> int:
    """How many layer calls of a step the kernels served; the step is that of the plain model."""
    results = []
    for m in (model, plain):
        m.zero_grad()
        with counted() as counts:
            y = m(input_ids=IDS).logits
            if backward:
                y.square().mean().backward()
        results.append((y.detach(), counts["kernels"]))
    (y, kernels), (y0, none) = results
    assert none == 0
    assert_close("logits", y, y0)
    if backward:
        parameters = dict(model.named_parameters())
        for name, p in plain.named_parameters():
            if p.requires_grad:
                assert_close(name, parameters[name].grad, p.grad)
    return kernels


@pytest.mark.parametrize("first", [True, False], ids=["patched first", "patched after"])
@pytest.mark.parametrize("dispatch", [on_one, on_several, offloaded])
def test_dispatched_after_peft(dispatch, first, tmp_path):
    """accelerate's hooks sit on lora_A and lora_B too, so PEFT serves, also when they are gone."""
    plain, model = pair(lora_alpha=5)
    if first:
        assert served_calls(model, plain) == 0
        assert len(accelerate(model).served) == LAYERS
        assert served_calls(model, plain) == LAYERS
    model = dispatch(model, tmp_path)
    if not first:
        (why,) = set(accelerate(model).skipped.values())
        assert "its forward was replaced" in why or "lora_A is a Linear with a forward" in why
    backward = dispatch is on_one  # accelerate gives weights that it loads no gradients
    assert served_calls(model, plain, backward) == 0
    remove_hook_from_submodules(model)
    assert served_calls(model, plain) == 0


def test_restored_while_dispatched():
    """accelerate keeps the forward that the layer had; it has to be PEFT's after restore."""
    plain, model = pair(lora_alpha=5)
    accelerate(model)
    model = on_one(model, None)
    restore(model)
    assert served_calls(model, plain) == 0
    remove_hook_from_submodules(model)
    assert served_calls(model, plain) == 0


@pytest.mark.parametrize("dispatch", [on_one, partial(on_several, prefix=""), offloaded])
def test_peft_on_a_dispatched_base(dispatch, tmp_path):
    """The base layers, and their hooks, are called; the kernels add the adapter."""
    plain, model = pair(lora_alpha=5)
    state = {n: p for n, p in plain.state_dict().items() if "lora_" in n}
    base = dispatch(make_tiny_model(attn_implementation="eager"), tmp_path)
    model = make_lora(base, lora_alpha=5, init_std=0)
    for name, module in model.named_modules():  # PEFT puts them where the weights are: on meta
        if "lora_" in name and isinstance(module, nn.Linear) and module.weight.is_meta:
            module.to_empty(device="cpu")
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    report = accelerate(model)
    assert set(report.served.values()) == {"lora_add"} and len(report.served) == LAYERS
    assert served_calls(model, plain) == LAYERS


def test_meta():
    """A model without data is left to PEFT: there is nothing to be faster at."""
    model = pair()[1].to("meta")
    assert len(accelerate(model).served) == LAYERS
    with counted() as counts:
        y = model(input_ids=IDS.to("meta")).logits
        y.sum().backward()
    assert counts == {"kernels": 0, "peft": LAYERS}
    assert y.is_meta and y.shape == (*IDS.shape, 1024)
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "moved, why",
    [
        (["lora_B"], "lora_A is on cpu, lora_B on meta"),
        (["lora_A"], "lora_A is on meta, lora_B on cpu"),
        (["lora_A", "lora_B"], "its adapter is on meta, its base weight on cpu"),
        (["base_layer"], "its adapter is on cpu, its base weight on meta"),
    ],
)
def test_an_adapter_on_two_devices(moved, why):
    """The report names both, and a call ends as with PEFT."""
    plain, model = pair()
    for m in (plain, model):
        for name in moved:
            getattr(layer_of(m, "1.mlp.down_proj"), name).to("meta")
    assert list(accelerate(model).skipped.values()) == [why]
    endings = []
    with counted() as counts:
        for m in (plain, model):
            try:
                y = m(input_ids=IDS).logits
                endings.append((y.device, y.shape))
            except (RuntimeError, NotImplementedError) as e:  # more devices than one differ
                endings.append((type(e), str(e)))
    assert endings[0] == endings[1]
    assert counts["kernels"] == LAYERS - 1 and counts["peft"] == LAYERS + 1


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double().float(),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ],
    ids=["float64", "bf16", "fp16", "there and back", "meta and back"],
)
def test_moved_after_the_patch(move, swap, monkeypatch):
    """Also where PyTorch swaps the tensors within a parameter instead of setting its data."""
    plain, model = pair(lora_alpha=5)
    state = {n: t.clone() for n, t in plain.state_dict().items()}
    buffers = {n: t.clone() for n, t in plain.named_buffers()}
    accelerate(model)
    model(input_ids=IDS)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for m in (plain, model):
            move(m)
            m.load_state_dict(state)
            for name, buffer in m.named_buffers():
                buffer.copy_(buffers[name])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if model.dtype == torch.float64:
        assert served_calls(model, plain) == LAYERS
        return
    with counted() as counts:
        compare(model, plain)
    assert counts == {"kernels": LAYERS, "peft": 2 * LAYERS}
