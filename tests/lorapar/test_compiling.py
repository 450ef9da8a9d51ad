"""`accelerate(compile=...)`: which layers are compiled, for which shapes, and how it is undone."""

import copy
import functools
import gc
import io
import pickle
import warnings

import pytest
import torch
from against_peft import IDS, compare, run
from compiled_net import (
    LIMITS,
    Cell,
    Tower,
    assert_equal_steps,
    breaks,
    cells,
    compiled_call,
    gradients,
    graphs,
    inputs,
    is_plain,
    limits,
    llama,
    net,
    shapes_of,
    step,
    tower,
)
from conftest import DEVICE
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from lorapar import compiling, recording
from lorapar.compiling import compilation_of
from lorapar.errors import UserError
from lorapar.partitioning import everything
from lorapar.patch import accelerate, restore
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

pytest_plugins = "compiled_net"
pytestmark = pytest.mark.usefixtures("fresh")


# What is compiled, and what it computes ---------------------------------------------------------


def test_a_llama_is_as_accurate_and_compiles_once(traced):
    plain, model = llama(num_hidden_layers=4)
    report = accelerate(model, compile="reduce-overhead")
    assert report.compilation.layers == [f"base_model.model.model.layers.{i}" for i in range(4)]
    assert len(report.groups) == 8
    compare(model, plain)
    assert graphs() == 1 and breaks() == 0  # one for all four
    for _ in range(2):
        run(model)
    assert graphs() == 1 and breaks() == 0 and not report.compilation.eager
    assert shapes_of(report) == {(2, 5, 32): 4 * 3}
    assert "  compiled 4 layers one by one, mode reduce-overhead; 1 of 4 shapes: 2x5x32" in str(
        report
    )


def test_layers_are_found_without_their_names(traced):
    plain, model = net(5), net(5)
    report = accelerate(model, compile="default")
    at = "base_model.model.tower"
    assert report.compilation.layers == [f"{at}.cells.{i}" for i in range(5)]
    roots = [n for n, m in model.named_modules() if isinstance(compiled_call(m), compiling._Root)]
    assert roots == [at]  # the innermost that holds them
    for _ in range(2):
        assert_equal_steps(step(model), step(plain))
        assert graphs() <= 2 and breaks() == 0


def test_a_layer_may_hold_siblings_itself(traced):
    """So that the hook of their group is on the layer, which is no hook to run eagerly for."""
    plain, model = net(2), net(2)
    for m in (plain, model):
        for cell in cells(m):
            cell.gate_proj, cell.up_proj = cell.gates.gate_proj, cell.gates.up_proj
            cell.gates = None
            cell.__class__ = Flat
    report = accelerate(model, compile="default")
    assert len(report.groups) == 2
    assert_equal_steps(step(model), step(plain))
    assert graphs() == 1 and breaks() == 0
    assert shapes_of(report) == {(5, 3, 8): 2} and not report.compilation.eager


class Flat(Cell):
    def forward(self, x):
        y = self.scale(x)
        return x + self.back(self.gate_proj(y).tanh() * self.up_proj(y))


def test_lists_of_lists_are_looked_into(called):
    """A list is not called; what is in it is."""
    plain, model = net(2), net(2)
    for m in (plain, model):
        inner = tower(m)
        inner.cells, inner.__class__ = nn.ModuleList([inner.cells]), Nested
    report = accelerate(model, compile="default")
    at = "base_model.model.tower.cells.0"
    assert report.compilation.layers == [f"{at}.0", f"{at}.1"]
    assert_equal_steps(step(model), step(plain))
    assert shapes_of(report) == {(5, 3, 8): 2}


class Nested(Tower):
    def forward(self, x):
        for stage in self.cells:
            for cell in stage:
                x = cell(x)
        return x


@pytest.mark.slow
def test_an_encoder_decoder(traced):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                 decoder_start_token_id=0, use_cache=False, dropout_rate=0.0)
    )  # fmt: skip
    adapter = LoraConfig(r=2, target_modules=["q", "k", "v", "wi"], init_lora_weights=False)
    plain = get_peft_model(base, adapter).to(DEVICE).train()
    model = copy.deepcopy(plain)
    report = accelerate(model, compile="default")
    at = "base_model.model"
    assert report.compilation.layers == [
        f"{at}.{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)
    ]
    (root,) = [n for n, m in model.named_modules() if isinstance(compiled_call(m), compiling._Root)]
    assert root == at  # one step is both
    results = []
    for m in (model, plain, copy.deepcopy(plain).double()):
        m(input_ids=IDS, labels=IDS[:, :3].contiguous()).loss.backward()
        results.append(gradients(m))
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        got, want, exact = (r[name] for r in results)
        assert_as_accurate(name, got, exact, want, NETWORK_FACTOR)
    assert breaks() == 0 and not report.compilation.eager and shapes_of(report)


def test_our_ops_are_inside(triton_backend, monkeypatch):
    seen = {"forward": [], "backward": []}

    def collect(side):
        def compiler(graph, example_inputs):
            seen[side].append([str(n.target) for n in graph.graph.nodes])
            return graph

        return compiler

    backend = aot_autograd(fw_compiler=collect("forward"), bw_compiler=collect("backward"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain, model = net(3), net(3)
    accelerate(model, compile="default")
    assert_equal_steps(step(model), step(plain))
    assert breaks() == 0
    for side, lists in seen.items():
        (targets,) = lists  # one graph for three layers
        ours = [t for t in targets if t.startswith("lorapar.")]
        assert [t for t in ours if f"lora_{side}" in t] == ours
        assert len(ours) == 2, side  # the group of two, and the one alone


@pytest.mark.more
def test_inductor():
    plain, model = net(2), net(2)
    report = accelerate(model, compile="reduce-overhead")
    for _ in range(2):
        assert_equal_steps(step(model), step(plain))
    assert graphs() == 1 and breaks() == 0 and report.compilation.failed is None


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_what_pytorch_is_asked_for(mode, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    accelerate(net(), compile=mode)
    recorded = {"backend": recording.RECORDER} if mode == "reduce-overhead" else {}
    assert asked == [{"dynamic": False} | recorded]


# Shapes -----------------------------------------------------------------------------------------


def test_more_shapes_than_allowed_run_eagerly(traced):
    plain, model = net(2), net(2)
    report = accelerate(model, compile="default", max_shapes=2)
    for rows in (2, 3, 4, 5, 3, 4):
        assert_equal_steps(step(model, inputs(rows)), step(plain, inputs(rows)))
        assert len(report.compilation.shapes) <= 2
    assert graphs() == 2
    assert shapes_of(report) == {(2, 3, 8): 2, (3, 3, 8): 4}
    assert sum(report.compilation.eager.values()) == 6
    assert str(report).splitlines()[-2:] == [
        "  compiled 2 layers one by one, mode default; 2 of 2 shapes: 2x3x8, 3x3x8",
        "  6 calls ran eagerly: more shapes than max_shapes=2 (pad to a few lengths)",
    ]


# Key-value caches -------------------------------------------------------------------------------


def test_generate_runs_eagerly_and_the_same(called):
    plain, model = llama(use_cache=True)
    report = accelerate(model, compile="default")
    options = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "use_cache": True}
    wanted = plain.eval().generate(**options)
    assert torch.equal(model.eval().generate(**options), wanted)
    assert not report.compilation.shapes
    ((reason, count),) = report.compilation.eager.items()
    assert reason.startswith("a key-value cache was passed") and count % 2 == 0 and count >= 12
    assert f"{count} calls ran eagerly: a key-value cache" in str(report)


def test_a_forward_that_asks_for_no_cache_is_compiled(called):
    """transformers makes one by default, in training and in scoring too, where nothing reads it."""
    plain, model = llama(use_cache=True)
    report = accelerate(model, compile="default")
    model(input_ids=IDS).logits.sum().backward()
    assert shapes_of(report) == {(2, 5, 32): 2} and not report.compilation.eager
    with torch.no_grad():  # as GRPOTrainer scores
        assert_close("logits", model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert shapes_of(report) == {(2, 5, 32): 4} and not report.compilation.eager
    assert model(input_ids=IDS, use_cache=True).past_key_values is not None
    assert sum(report.compilation.eager.values()) == 2


def test_the_whole_model_compiled_by_somebody_else(monkeypatch):
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, model = net(2), net(2)
    report = accelerate(model, compile="default")
    compiled = whole(model)
    for _ in range(2):
        model.zero_grad()
        y = compiled(inputs())
        y.square().mean().backward()
        assert_equal_steps((y.detach(), gradients(model)), step(plain))
    assert graphs() == 1 and not report.compilation.shapes


# Undoing ----------------------------------------------------------------------------------------


def test_restore_and_none_undo_it(called):
    before = limits()
    for undo in (restore, accelerate):
        model = net()
        attributes = {n: set(vars(m)) for n, m in model.named_modules()}
        accelerate(model, compile="default", max_shapes=5000)
        assert all(a > b for a, b in zip(limits(), before)) and not is_plain(model)
        undo(model)
        assert limits() == before and is_plain(model)
        restore(model)
        assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_last_of_two_models_puts_the_limits_back(order, called):
    before, models = limits(), [net(), net()]
    for model, shapes in zip(models, (5000, 10000)):
        accelerate(model, compile="default", max_shapes=shapes)
    raised = limits()
    restore(models[order[0]])
    assert limits() == raised and not is_plain(models[order[1]])
    restore(models[order[1]])
    assert limits() == before


def test_a_model_that_is_gone_needs_no_limits(called):
    before, model = limits(), net()
    accelerate(model, compile="default", max_shapes=5000)
    del model
    gc.collect()
    restore(net())
    assert limits() == before


def test_high_limits_of_the_user_stay(called):
    before, model = limits(), net()
    try:
        for config, name in LIMITS:
            setattr(config, name, 10**6)
        accelerate(model, compile="default")
        assert limits() == [10**6] * 2
        restore(model)
        assert limits() == [10**6] * 2
    finally:
        for (config, name), value in zip(LIMITS, before):
            setattr(config, name, value)


def test_again_is_in_place_of_the_first(traced):
    plain, model = net(2), net(2)
    first = accelerate(model, compile="default")
    step(model)
    second = accelerate(model, compile="reduce-overhead", max_shapes=1)
    assert compilation_of(model) is second.compilation is not first.compilation
    assert_equal_steps(step(model), step(plain))
    assert shapes_of(first) == shapes_of(second) == {(5, 3, 8): 2}
    restore(model)
    assert_equal_steps(step(model), step(plain))
    assert shapes_of(second) == {(5, 3, 8): 2} and breaks() == 0


# What fails -------------------------------------------------------------------------------------


FAILURES = [
    lambda: torch._dynamo.exc.Unsupported("no way\nat all"),
    lambda: torch._dynamo.exc.BackendCompilerFailed(compile, RuntimeError("no way"), None),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_compiled_runs_eagerly(failure, monkeypatch):
    def fail(*args, **kwargs):
        raise failure()

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    plain, model = net(), net()
    report = accelerate(model, compile="default")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = [step(model) for _ in range(2)]
    ours = [str(w.message) for w in seen if "lorapar" in str(w.message)]
    assert len(ours) == 1 and "given up, all runs eagerly" in ours[0]
    for result in results:
        assert_equal_steps(result, step(plain))
    name = type(failure()).__name__
    assert (
        f"  compiled 3 layers one by one, mode default; given up, all runs eagerly: {name}: "
        in (str(report))
    )
    assert report.compilation.eager == {"compiling failed": 6}


def test_an_exception_of_a_layer_reaches_the_caller(traced):
    plain, model = net(), net()
    report = accelerate(model, compile="default")
    for _ in range(2):
        cells(model)[1].broken = True
        with pytest.raises(ValueError, match="^broken"):
            step(model)
        cells(model)[1].broken = False
        assert_equal_steps(step(model), step(plain))
    assert report.compilation.failed is None and not report.compilation.eager


def test_a_hook_on_a_layer_runs(called):
    plain, model = net(), net()
    report, calls = accelerate(model, compile="default"), []
    hook = cells(model)[1].register_forward_hook(lambda *a: calls.append(1))
    assert_equal_steps(step(model), step(plain))
    assert calls == [1] and shapes_of(report) == {(5, 3, 8): 2}
    assert "1 calls ran eagerly: the layer has hooks" in str(report)
    hook.remove()
    step(model)
    assert calls == [1] and shapes_of(report) == {(5, 3, 8): 5}


# Copies and files -------------------------------------------------------------------------------


def test_copies_and_pickles_are_not_compiled(traced):
    plain, model = net(2), net(2)
    report = accelerate(model, compile="default")
    step(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    made = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False)]  # fmt: skip
    for other in made:
        assert is_plain(other)
        assert_equal_steps(step(other), step(plain))
    assert shapes_of(report) == {(5, 3, 8): 2}
    assert compilation_of(model) is report.compilation
    assert_equal_steps(step(model), step(plain))


def test_what_is_saved_is_the_same(called, tmp_path):
    plain, model = net(2), net(2)
    accelerate(model, compile="reduce-overhead")
    step(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, m in (("plain", plain), ("compiled", model)):
        m.save_pretrained(tmp_path / name)
    files = sorted(f.name for f in (tmp_path / "plain").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "compiled").iterdir())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        both = [(tmp_path / n / file).read_bytes() for n in ("plain", "compiled")]
        assert both[0] == both[1], file


# What is refused --------------------------------------------------------------------------------


def refused(match, model=None, error=ValueError, **arguments):
    model, before = net() if model is None else model, limits()
    with pytest.raises(error, match=match):
        accelerate(model, **arguments)
    assert limits() == before
    return model


def test_what_is_refused_leaves_nothing_behind(called):
    assert is_plain(
        refused("compile='fast' is none of default, reduce-overhead, None", compile="fast")
    )
    assert is_plain(
        refused("max_shapes must be at least 1, got 0", compile="default", max_shapes=0)
    )
    bare = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert is_plain(refused("has no nn.ModuleList of layers with LoRA", bare, compile="default"))
    mask = {"nowhere": LoraMask(None, None)}
    model = refused("no such LoRA layer", error=UserError, mask=mask, compile="default")
    assert is_plain(model)


def test_a_layer_that_is_compiled_already_is_refused(called):
    model = net()
    own = cells(model)[1]._compiled_call_impl = lambda *a: None
    refused(r"tower\.cells\.1 is compiled already", model, compile="default", max_shapes=5000)
    assert compilation_of(model) is None
    assert [compiled_call(m) for m in model.modules() if compiled_call(m) is not None] == [own]


def test_a_root_that_is_compiled_already_is_refused(called):
    model = net()
    own = tower(model)._compiled_call_impl = lambda *a: None
    refused("Tower is compiled already; leave compile out", model, compile="default")
    assert compilation_of(model) is None
    assert [compiled_call(m) for m in model.modules() if compiled_call(m) is not None] == [own]


def test_everything_is_a_partition_too(called):
    _, model = llama()
    report = accelerate(model, everything(model), stage="sft", compile="default")
    assert report.compilation.layers and all(g.all() for g in run(model)[1].values())
