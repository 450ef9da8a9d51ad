"""A served layer is PEFT's own in all but its arithmetic: state, copies, files, hooks, modes."""

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from against_peft import IDS, compare, layer_of, pair, run
from conftest import DEVICE, make_lora, make_tiny_model
from peft import LoraConfig, PeftModel
from peft.tuners import lora as peft_lora
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from siblings import attention, inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorapar import served
from lorapar.calls import COPY, MASKS, ZEROED, why_not
from lorapar.partitioning import everything
from lorapar.patch import accelerate, lora_layers, restore, route
from lorapar.served import Served
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import assert_close


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The names of the ops that served layers called, in order."""
    calls = []
    for name in ("lora_linear", "lora_add"):
        op = getattr(served, name)
        monkeypatch.setattr(
            served, name, lambda *a, op=op, name=name, **k: calls.append(name) or op(*a, **k)
        )
    return calls


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"r": 3, "lora_alpha": -5}, {"alpha_pattern": {"q_proj": 64}},
     {"lora_dropout": 0.3}],
    ids=str,
)  # fmt: skip
def test_outputs_and_gradients_are_pefts(changes):
    plain, patched = pair(**changes)
    report = accelerate(patched)
    assert len(report.served) == 12 and not report.skipped
    assert all(why_not(m) is None for m in lora_layers(patched).values())
    compare(patched.eval(), plain.eval())


def test_dropout_applies_in_training_only():
    _, model = pair(lora_dropout=0.5)
    accelerate(model)
    still = [model.eval()(input_ids=IDS).logits for _ in "12"]
    moving = [model.train()(input_ids=IDS).logits for _ in "12"]
    assert torch.equal(*still) and not torch.equal(*moving)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_dropout(reentrant):
    grads = []
    for use in (False, True):
        _, model = pair(lora_dropout=0.5)
        accelerate(model)
        model.train()
        model.enable_input_require_grads()
        if use:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(4)
        grads.append(run(model)[1])
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_mixed_batches_go_to_peft():
    plain, model = (m.eval() for m in pair())
    accelerate(model)
    names = ["default", "__base__"]
    with torch.no_grad():
        got = model(input_ids=IDS, adapter_names=names).logits
        assert torch.equal(got, plain(input_ids=IDS, adapter_names=names).logits)


def test_saved_adapter_has_no_trace(tmp_path):
    plain, model = pair()
    accelerate(model, everything(model), stage="sft")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_model(attn_implementation="eager"), tmp_path)
    loaded = loaded.to(DEVICE)
    assert torch.equal(loaded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    merged = model.merge_and_unload()
    assert_close("merged", merged(input_ids=IDS).logits, plain(input_ids=IDS).logits)


class Doubling(nn.Linear):
    """A base layer whose output is not that of its weight, as quantised layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_base_that_makes_its_own_output_is_served_by_lora_add():
    base = make_tiny_model()
    for layer in base.model.layers:
        layer.self_attn.q_proj.__class__ = Doubling
    plain = make_lora(base).to(DEVICE)
    patched = copy.deepcopy(plain)
    assert len(accelerate(patched).served) == 12
    compare(patched, plain)


def test_hooks_on_the_base_still_fire():
    plain, patched = pair()
    accelerate(patched)
    calls = []
    for model in (plain, patched):
        q = model.base_model.model.model.layers[0].self_attn.q_proj
        q.base_layer.register_forward_hook(lambda m, i, o: calls.append(1) or o * 3)
    compare(patched, plain)
    assert len(calls) >= 2


def test_a_base_weight_that_trains_gets_its_gradient():
    plain, patched = pair()
    accelerate(patched)
    for model in (plain, patched):
        q = model.base_model.model.model.layers[0].self_attn.q_proj
        q.base_layer.weight.requires_grad_(True)
    compare(patched, plain)


def test_generate_with_a_cache():
    plain, model = pair()
    accelerate(model)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


def both(models, change):
    for model in models:
        torch.manual_seed(7)
        change(model)


def randomize(model, adapter):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}." in name:
                p.normal_(0, 0.05)


def add_other(model, **changes):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **changes)
    model.add_adapter("other", config)
    randomize(model, "other")


def test_adapters_added_switched_and_deleted_after_the_patch():
    plain, model = pair()
    accelerate(model)
    both((model, plain), add_other)
    both((model, plain), lambda m: m.set_adapter("other"))
    q, k = (layer_of(model, f"0.self_attn.{n}_proj") for n in "qk")
    assert isinstance(q, Served) and why_not(q) is None
    assert why_not(k) == "0 active adapters here; one is needed"
    compare(model, plain)
    both((model, plain), lambda m: m.base_model.set_adapter(["default", "other"]))
    assert why_not(q) == "2 active adapters here; one is needed" and why_not(k) is None
    compare(model, plain)
    both((model, plain), lambda m: m.set_adapter("default"))
    both((model, plain), lambda m: m.delete_adapter("other"))
    assert why_not(q) is None
    compare(model, plain)
    both((model, plain), lambda m: add_other(m, lora_dropout=0.0))
    both((model, plain), lambda m: m.set_adapter("other"))
    both((model, plain), lambda m: m.delete_adapter("default"))
    compare(model, plain)


def test_layers_injected_after_the_patch_are_pefts_until_the_next_call():
    plain, model = pair(target_modules=["q_proj"])
    accelerate(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    both((model, plain), lambda m: m.add_adapter("wide", config))
    both((model, plain), lambda m: randomize(m, "wide"))
    both((model, plain), lambda m: m.set_adapter("wide"))
    o = layer_of(model, "0.self_attn.o_proj")
    assert not isinstance(o, Served)
    compare(model, plain)
    report = accelerate(model)
    assert isinstance(o, Served) and len(report.served) == 4 and report.again == 2
    compare(model, plain)


def test_disabled_adapters_in_a_forward_and_in_generation():
    plain, model = pair()
    accelerate(model)
    base = make_tiny_model(attn_implementation="eager").to(DEVICE)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
        assert torch.equal(model.generate(IDS, **options), base.generate(IDS, **options))
    compare(model, plain)


@pytest.mark.parametrize("safe", [False, True])
def test_merged_and_unmerged(safe):
    plain, model = pair()
    accelerate(model)
    both((model, plain), lambda m: m.merge_adapter(safe_merge=safe))
    assert "merged" in why_not(layer_of(model, "0.self_attn.q_proj"))
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():  # unmerges, as PEFT
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    both((model, plain), lambda m: m.merge_adapter(safe_merge=safe))
    both((model, plain), lambda m: m.unmerge_adapter())
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        assert torch.equal(p, q), name
    compare(model, plain)


def scaled(model):
    for layer in lora_layers(model).values():
        layer.set_scale("default", 0.25)


def scaled_by(model):
    for layer in lora_layers(model).values():
        layer.scale_layer(3.0)
        layer.unscale_layer(2.0)


def frozen_a(model):
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)


def trained_base(model):
    layer_of(model, "0.self_attn.q_proj").base_layer.weight.requires_grad_(True)
    layer_of(model, "1.mlp.up_proj").base_layer.weight.requires_grad_(True)


def frozen_layers(model):
    for layer in lora_layers(model).values():
        layer.requires_grad_(False)
    layer_of(model, "0.mlp.up_proj").lora_B["default"].weight.requires_grad_(True)


@pytest.mark.parametrize("change", [scaled, scaled_by, frozen_a, trained_base, frozen_layers])
def test_state_follows_peft_at_every_call(change):
    plain, model = pair()
    accelerate(model)
    run(model)  # nothing is remembered of it
    both((model, plain), change)
    compare(model, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_whole_model(dtype):
    plain, model = pair()
    accelerate(model)
    both((model, plain), lambda m: m.to(dtype))
    y, g = run(model)
    assert y.dtype == dtype and all(t.dtype == dtype for t in g.values())
    if dtype == torch.float64:
        y0, g0 = run(plain)
        for name in g:
            assert_close(name, g[name], g0[name])
    else:
        compare(model, plain)


def test_half_and_float():
    plain, model = pair()
    accelerate(model)
    both((model, plain), lambda m: m.half())
    compare(model, plain)
    both((model, plain), lambda m: m.float())
    compare(model, plain)


def test_all_frozen_gives_no_gradient_and_no_graph():
    _, model = pair()
    accelerate(model)
    model.requires_grad_(False)
    assert not model(input_ids=IDS).logits.requires_grad


def test_hot_swapped_adapters_with_scalings_in_tensors_go_to_peft():
    plain, model = (m.eval() for m in pair())
    accelerate(model)
    both((model, plain), lambda m: prepare_model_for_compiled_hotswap(m, target_rank=8))
    assert "scaling is a tensor" in why_not(layer_of(model, "0.self_attn.q_proj"))
    compare(model, plain)


def masks_that_freeze_a(model):
    return {
        n: LoraMask(torch.zeros_like(m.lora_A["default"].weight).bool(), None)
        for n, m in lora_layers(model).items()
    }


BIASES = [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only", "lora_bias": True}]


@pytest.mark.parametrize("changes", BIASES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_biases_that_train(changes, with_bias, counted):
    """In fp32, and as TRL trains: 16-bit base, fp32 adapters, with autocast and without."""
    base = make_tiny_model(
        attn_implementation="eager", attention_bias=with_bias, mlp_bias=with_bias
    )
    if with_bias:
        with torch.no_grad():
            for name, p in base.named_parameters():
                if name.endswith("bias"):
                    p.normal_(0, 0.1)
    plain = make_lora(base, init_std=0.1, **changes).to(DEVICE)
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert len(report.served) == 12 and "lora_add" not in report.served.values()
    compare(model, plain)
    assert "lora_linear" in counted
    for m in (model, plain):
        for name, p in m.named_parameters():
            if "lora_" not in name:
                p.data = p.data.to(torch.bfloat16)
    compare(model, plain)
    compare(model, plain, lambda: torch.autocast(DEVICE, dtype=torch.bfloat16))


def test_lora_bias_on_a_base_that_makes_its_own_output_goes_to_peft():
    base = make_tiny_model(attn_implementation="eager")
    for layer in base.model.layers:
        layer.self_attn.q_proj.__class__ = Doubling
    plain = make_lora(base, lora_bias=True).to(DEVICE)
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert len(report.skipped) == 2
    assert "lora_bias=True on a base layer" in report.skipped.popitem()[1]
    compare(model, plain)


def test_deepcopies_stay_patched_and_stand_alone():
    plain, model = pair()
    accelerate(model)
    other = copy.deepcopy(model)
    restore(model)
    assert all(isinstance(m, Served) for m in lora_layers(other).values())
    compare(other, plain)


@pytest.mark.parametrize("save", [torch.save, pickle.dump])
def test_pickles_need_no_package_but_pefts(save, tmp_path):
    plain, model = (m.eval() for m in pair())
    accelerate(model)
    model(input_ids=IDS)
    with open(tmp_path / "model", "wb") as f:
        save(model, f)
    torch.save(IDS.cpu(), tmp_path / "ids")
    assert isinstance(layer_of(model, "0.self_attn.q_proj"), Served)  # itself as it was
    if save is torch.save:
        script = Path(__file__).parent / "loads_without_us.py"
        paths = [str(tmp_path / name) for name in ("model", "ids", "out")]
        subprocess.run([sys.executable, script, *paths, DEVICE], check=True)
        got = torch.load(tmp_path / "out").to(DEVICE)
    else:
        with open(tmp_path / "model", "rb") as f:
            loaded = pickle.load(f)
        assert all(type(m) is peft_lora.Linear for m in lora_layers(loaded).values())
        assert vars(layer_of(loaded, "q_proj")).keys() == vars(layer_of(plain, "q_proj")).keys()
        got = loaded(input_ids=IDS).logits
        accelerate(loaded)
        compare(loaded, plain)
    assert torch.equal(got, plain(input_ids=IDS).logits)


def test_a_pickle_keeps_a_mask():
    _, model = pair()
    accelerate(model, everything(model), stage="sft")
    accelerate(model, masks_that_freeze_a(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    _, g = run(torch.load(buffer, weights_only=False))
    assert not any(t.any() for n, t in g.items() if "lora_A" in n)
    assert all(t.any() for n, t in g.items() if "lora_B" in n)


def functional(model):
    parameters = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (IDS,)).logits.square().mean()

    return list(torch.func.grad(loss)(parameters).values())


def forward_mode(model):
    (name, p) = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.detach(), torch.ones_like(p))
        y = torch.func.functional_call(model, {name: dual}, (IDS,)).logits
        return list(torch.autograd.forward_ad.unpack_dual(y))


def globally_hooked(model):
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m)))
    try:
        y = model(input_ids=IDS).logits
    finally:
        hook.remove()
    return [y, torch.tensor(seen.count(nn.Linear))]


def flops(model):
    with FlopCounterMode(display=False) as counter:
        y = model(input_ids=IDS).logits
    return [y, torch.tensor(counter.get_total_flops())]


@pytest.mark.parametrize("transform", [functional, forward_mode, globally_hooked, flops])
def test_what_has_to_see_pefts_operations_sees_them(transform, counted):
    plain, model = (m.eval() for m in pair())
    accelerate(model)
    got, want = transform(model), transform(plain)
    assert not counted and len(got) == len(want)
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    compare(model, plain)
    assert counted


@pytest.mark.parametrize("kind", ["nested", "COO", "CSR"])
def test_nested_and_sparse_inputs_go_to_peft(kind):
    plain, model = attention()
    rows = torch.eye(3, 16, device=DEVICE)
    x = {
        "nested": lambda: torch.nested.nested_tensor([rows, rows[:2]]),
        "COO": rows.to_sparse,
        "CSR": rows.to_sparse_csr,
    }[kind]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)
        got, want = (m.base_model.model.q_proj(x()) for m in (model, plain))
    if kind == "nested":
        got, want = (torch.cat(t.unbind()) for t in (got, want))
    assert torch.equal(got, want)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_compiled_transforms_see_pefts_operations(transform):
    plain, model = attention()
    (x,) = inputs(1)
    results = []
    for m in (model, plain):
        q = m.base_model.model.q_proj
        if transform == "grad":
            f = torch.func.grad(lambda t, q=q: q(t).sum())
        else:
            f = torch.func.vmap(q)
        torch._dynamo.reset()
        results.append(torch.compile(f, backend="aot_eager")(x))
    assert_close("result", *results)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_exported_layers_are_pefts():
    plain, model = attention()
    (x,) = inputs(1)
    q, want = model.base_model.model.q_proj, plain.base_model.model.q_proj(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert torch.equal(torch.jit.trace(q, (x,))(x), want)
    exported = torch.export.export(q, (x,))
    assert "lorapar" not in str(exported.graph)
    assert_close("y", exported.module()(x), want)


@pytest.mark.more
def test_compiled_as_a_whole():
    """No break, no graph more than PEFT has, and the numbers of the eager model."""
    _, model = pair()
    accelerate(model)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for ids in (IDS, torch.cat([IDS, IDS], 1), IDS):
        model.zero_grad()
        y = compiled(input_ids=ids).logits
        y.square().mean().backward()
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        want_y, want = run(model, ids)
        assert_close("y", y.detach(), want_y)
        for name in want:
            assert_close(name, got[name], want[name])
    assert len(graphs) == 2  # the second shape is made dynamic
    served = [n for n, _ in graphs[0].named_children() if n.startswith("fwd_body")]
    assert len(served) == 6  # of each layer: q, k, v; gate, up; down
    torch._dynamo.reset()


def test_inference_mode(counted):
    plain, model = (m.eval() for m in pair())
    accelerate(model)
    with torch.inference_mode():
        y = model(input_ids=IDS).logits
        assert_close("y", y.clone(), plain(input_ids=IDS).logits.clone())
    assert counted
    compare(model, plain)


def test_generate_with_a_static_cache_and_left_padding():
    plain, model = (m.eval() for m in pair())
    accelerate(model)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    for cache in (None, "static"):
        outputs = [m.generate(IDS, cache_implementation=cache, **options) for m in (model, plain)]
        assert torch.equal(*outputs)


def test_one_model_in_many_threads():
    """Waiting outputs of one thread never reach another."""
    plain, model = attention()
    xs = [torch.randn(3, 16, device=DEVICE) for _ in range(4)]
    want, wrong = [plain(x, x) for x in xs], []

    def work(x, y):
        try:
            for _ in range(60):
                assert_close("y", model(x, x), y)
        except Exception as e:
            wrong.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=one) for one in zip(xs, want)]
        [t.start() for t in threads], [t.join() for t in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def fp32_under_autocast():
    plain, model = pair()
    return plain, model, lambda: torch.autocast(DEVICE, dtype=torch.bfloat16)


def test_cache_base_keeps_one_copy_and_the_numbers():
    _, model, context = fp32_under_autocast()
    uncached = copy.deepcopy(model)
    accelerate(uncached)
    report = accelerate(model, cache_base=True)
    weights = [m.base_layer.weight for m in lora_layers(model).values()]
    assert report.copies_bytes == 2 * sum(w.numel() for w in weights)
    assert "cache_base: 16-bit copies of the base weights, 0.00 GiB" in str(report)
    want = run(uncached, context=context)
    for _ in range(2):
        y, g = run(model, context=context)
        assert torch.equal(y, want[0]) and all(torch.equal(g[n], want[1][n]) for n in g)
    q = layer_of(model, "0.self_attn.q_proj")
    kept = q.__dict__[COPY][2]
    assert kept.dtype == torch.bfloat16
    run(model, context=context)
    assert q.__dict__[COPY][2] is kept
    assert copy.deepcopy(q).__dict__[COPY] is None
    assert not any("copy" in n for n in (*model.state_dict(), *dict(model.named_buffers())))
    route(model, None, stage=None)  # as the callback does: what the user asked for stays
    assert COPY in q.__dict__
    run(model)  # fp32: the weight itself
    assert torch.equal(model(input_ids=IDS).logits, uncached(input_ids=IDS).logits)
    accelerate(model)
    assert COPY not in q.__dict__


@torch.no_grad()
def written(model):
    for layer in lora_layers(model).values():
        layer.base_layer.weight.mul_(1.5)


def merged(model):
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(m.__dict__.get(COPY) is None for m in lora_layers(model).values())


def replaced(model):
    for layer in lora_layers(model).values():
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 1.5, requires_grad=False)


def moved(model):
    for layer in lora_layers(model).values():
        layer.base_layer.weight.data = layer.base_layer.weight.data * 1.5


def loaded(model):
    model.load_state_dict({n: 1.5 * t for n, t in model.state_dict().items()})


@pytest.mark.parametrize("change", [written, merged, replaced, moved, loaded])
def test_cache_base_follows_the_weight(change):
    _, model, context = fp32_under_autocast()
    uncached = copy.deepcopy(model)
    accelerate(uncached), accelerate(model, cache_base=True)
    before, _ = run(model, context=context)
    both((model, uncached), change)
    y, g = run(model, context=context)
    want_y, want = run(uncached, context=context)
    assert torch.equal(y, want_y) and all(torch.equal(g[n], want[n]) for n in want)
    assert change is merged or not torch.equal(y, before)


def test_a_mask_is_never_lost_to_pefts_path():
    """Where PEFT would give frozen elements gradients the call is refused, else it goes on."""
    _, model = pair()
    accelerate(model, masks_that_freeze_a(model))
    hook = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with pytest.raises(RuntimeError, match="mask of adapter default would be.*global"):
            model(input_ids=IDS)
        with torch.no_grad():
            model(input_ids=IDS)
        with model.disable_adapter():
            model(input_ids=IDS)
        model.merge_adapter()
        model(input_ids=IDS)
        model.unmerge_adapter()
    finally:
        hook.remove()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(RuntimeError, match="because 2 active adapters here; one is needed"):
        model(input_ids=IDS)
    model.set_adapter("other")
    model(input_ids=IDS)


def test_a_copy_does_not_believe_that_somebody_zeroes_its_gradients():
    _, model = pair()
    route(model, everything(model), stage="sft", zeroed=True)
    assert all(ZEROED in m.__dict__ for m in lora_layers(model).values())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        kept = [m.__dict__ for m in lora_layers(other).values()]
        assert all(MASKS in d and ZEROED not in d for d in kept)


def test_a_mask_goes_with_its_adapter_and_asks_for_nothing_that_is_frozen():
    _, model = pair()
    accelerate(model, masks_that_freeze_a(model))
    model.requires_grad_(False)
    with FlopCounterMode(display=False):
        model(input_ids=IDS)  # nothing trains, so PEFT may serve
    q = layer_of(model, "0.self_attn.q_proj")
    add_other(model)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not q.__dict__[MASKS]


def test_unloading_leaves_no_hook():
    _, model = pair()
    accelerate(model)
    merged = model.merge_and_unload()
    merged(input_ids=IDS)
    assert not any(m._forward_hooks for m in merged.modules())


def test_a_quantised_base_that_is_sharded_or_wrapped_goes_to_peft(counted):
    """Its output is no plain tensor, so PEFT's own additions have to make of it what they can."""

    class Wrapped(torch.Tensor):
        pass

    plain, model = attention()
    for m in (plain, model):
        m.base_model.model.q_proj.base_layer.register_forward_hook(
            lambda m, a, y: y.as_subclass(Wrapped)
        )
    (x,) = inputs(1)
    got, want = (m.base_model.model.q_proj(x) for m in (model, plain))
    assert type(got) is type(want) is Wrapped and torch.equal(got, want) and not counted


def test_a_bias_of_lora_a_goes_to_peft():
    model = make_lora(make_tiny_model()).to(DEVICE).eval()
    layer = next(iter(lora_layers(model).values()))
    layer.lora_A["default"].bias = nn.Parameter(torch.randn(layer.r["default"], device=DEVICE))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert "lora_A has a bias" in str(accelerate(model))
        assert_close("logits", model(input_ids=IDS).logits, expected)
