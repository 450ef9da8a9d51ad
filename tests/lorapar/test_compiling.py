"""`accelerate(compile=...)`: what is compiled computes what it did, and everything else is undone.

Here layers are traced, or their stand-ins only called; what CUDA graphs do is for test_cuda_graphs.
"""

import copy
import functools
import gc
import io
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from against_peft import IDS, compare, run
from conftest import DEVICE, make_lora, make_tiny_model
from masked_ranks import partition_for
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lorapar import compiling
from lorapar.callback import LoraParCallback
from lorapar.compiling import Compilation, compilation_of
from lorapar.errors import UserError
from lorapar.partitioning import everything
from lorapar.patch import accelerate, lora_layers, restore
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

LIMITS = [
    (torch._dynamo.config, "recompile_limit"),
    (torch._dynamo.config, "accumulated_recompile_limit"),
    (torch._inductor.config.triton, "cudagraph_unexpected_rerecord_limit"),
]
TWO_CALLS = {"non-reentrant": False, "reentrant": True}


def limits():
    return [getattr(config, name) for config, name in LIMITS]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and no limit left raised by the test before."""
    torch.compiler.reset()
    counters.clear()
    before = limits()
    yield
    for compilation in list(compiling._compilations):  # of a test that failed, say
        compiling._compilations.discard(compilation)
    compiling.uncompile(nn.Identity())
    assert limits() == before


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced, and run as they were traced: no code is generated."""
    compile = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile)


@pytest.fixture
def called(monkeypatch):
    """Nothing is traced: what would be compiled is called as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def marks(called, monkeypatch):
    """One element a step that CUDA graphs are told of."""
    seen = []
    monkeypatch.setattr(Compilation, "records", True)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append(1))
    return seen


# A model that no list of names knows ------------------------------------------------------------


class Gates(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x):
        return self.gate_proj(x).tanh() * self.up_proj(x)


class Cell(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.broken = number, False
        self.scale, self.gates, self.back = nn.LayerNorm(8), Gates(), nn.Linear(12, 8)

    def forward(self, x):
        if self.broken:
            raise ValueError("broken")
        return x + self.back(self.gates(self.scale(x)))


class Tower(nn.Module):
    checkpoints: bool | None = None  # use_reentrant, or none

    def __init__(self, cells):
        super().__init__()
        self.cells = nn.ModuleList(Cell(i) for i in range(cells))

    def forward(self, x):
        for cell in self.cells:
            if self.checkpoints is None:
                x = cell(x)
            else:
                x = checkpoint(cell, x, use_reentrant=self.checkpoints)
        return x


class Net(nn.Module):
    def __init__(self, cells=3):
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.tower = Tower(cells)
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])  # a list without LoRA

    def forward(self, x):
        y = self.tower(self.enter(x))
        return torch.cat([head(y) for head in self.heads], -1)


def net(cells=3, **changes):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["gate_proj", "up_proj", "back"],
                "init_lora_weights": False}  # fmt: skip
    return get_peft_model(Net(cells), LoraConfig(**(settings | changes))).to(DEVICE)


def tower(model):
    return model.base_model.model.tower


def cells(model):
    return tower(model).cells


def inputs(rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 4, generator=generator).to(DEVICE).requires_grad_()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, x=None):
    """Output and gradients of one step."""
    model.zero_grad()
    y = model(inputs() if x is None else x)
    y.square().mean().backward()
    return y.detach(), gradients(model)


def assert_equal_steps(one, other):
    (y, g), (y0, g0) = one, other
    assert_close("y", y, y0)
    assert g.keys() == g0.keys() and g0
    for name in g0:
        assert_close(name, g[name], g0[name])


def llama(**changes):
    """Two equal models in training, which make no key-value cache."""
    settings = {"attn_implementation": "eager", "use_cache": False} | changes
    plain = make_lora(make_tiny_model(**settings)).to(DEVICE).train()
    plain.enable_input_require_grads()
    return plain, copy.deepcopy(plain)


def graphs():
    return counters["stats"]["unique_graphs"]


def breaks():
    return sum(counters["graph_break"].values())


def shapes_of(report):
    return dict(report.compilation.shapes)


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
    roots = [n for n, m in model.named_modules() if isinstance(_call(m), compiling._Root)]
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
    (root,) = [n for n, m in model.named_modules() if isinstance(_call(m), compiling._Root)]
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


@pytest.mark.slow
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
    assert asked == [
        {"mode": mode, "dynamic": False},
        {"dynamic": False},
    ]  # two; the other records nothing


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


@pytest.mark.parametrize("records", [False, True])
def test_a_forward_that_asks_for_no_cache_is_compiled(records, called, monkeypatch):
    """transformers makes one by default, in training and in scoring too, where nothing reads it."""
    monkeypatch.setattr(Compilation, "records", records)
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


def _call(module):
    return module.__dict__.get("_compiled_call_impl")


def is_plain(model):
    return all(_call(m) is None for m in model.modules()) and compilation_of(model) is None


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
        assert limits() == [10**6] * 3
        restore(model)
        assert limits() == [10**6] * 3
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


# Steps of CUDA graphs ---------------------------------------------------------------------------


def loss(model):
    return model(inputs()).square().mean()


def test_training_marks_every_forward(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for steps in range(1, 4):
        value = loss(model)
        assert len(marks) == steps
        value.backward()
    assert len(marks) == 3
    restore(model)
    loss(model)
    assert len(marks) == 3


def test_without_graphs_nothing_is_marked(marks, monkeypatch):
    monkeypatch.setattr(Compilation, "records", False)
    model = net()
    accelerate(model, compile="default")
    loss(model).backward()
    assert not marks


def test_no_mark_while_a_backward_is_to_come(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    one, other = loss(model), loss(model)
    assert len(marks) == 1
    one.backward()
    third = loss(model)  # the backward of `other` is still to come
    assert len(marks) == 1
    with torch.no_grad():
        loss(model)
    assert len(marks) == 1
    (other + third).backward()
    loss(model).backward()
    assert len(marks) == 2


def test_a_forward_that_is_dropped_is_not_waited_for(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    kept = loss(model)
    del kept
    kept = loss(model)
    assert len(marks) == 2
    loss(model)
    assert len(marks) == 2
    del kept
    loss(model)
    assert len(marks) == 3


def test_forwards_without_grad_are_steps(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for steps in range(1, 4):
        with torch.no_grad():
            y = model(inputs())
        assert len(marks) == steps and not y.requires_grad


def test_an_exception_leaves_no_forward_to_wait_for(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    cells(model)[1].broken = True
    for steps in (1, 2):
        with pytest.raises(ValueError, match="broken"):
            loss(model)
        assert len(marks) == steps
    cells(model)[1].broken = False
    loss(model).backward()
    assert len(marks) == 3


@pytest.mark.parametrize("around", ["cells", "tower"])
@pytest.mark.parametrize("kind", TWO_CALLS)
def test_what_a_checkpoint_recomputes_is_no_step(kind, around, marks):
    plain, model = net(), net()
    for m in (plain, model):
        if around == "cells":
            tower(m).checkpoints = TWO_CALLS[kind]
        else:
            inner = tower(m)
            m.base_model.model.tower = Around(inner, TWO_CALLS[kind])
    report = accelerate(model, compile="reduce-overhead")
    for steps in range(1, 4):
        got = step(model)
        assert len(marks) == steps
        assert_equal_steps(got, step(plain))
    assert shapes_of(report) == {(5, 3, 8): 3 * 2 * 3}  # each layer twice a step


class Around(nn.Module):
    """The user's own checkpoint around all layers."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_what_hooks_save_is_not_recorded(kind, marks, monkeypatch):
    """A checkpoint that is not reentrant holds tensors for longer than graphs allow. Such a layer
    is compiled all the same."""
    seen = []

    def compile(function, mode="default", **options):
        return lambda *args, **kwargs: seen.append(mode) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    plain, model = net(), net()
    tower(model).checkpoints = TWO_CALLS[kind]
    accelerate(model, compile="reduce-overhead")
    for _ in range(2):
        seen.clear()
        assert_equal_steps(step(model), step(plain))
        recorded = "reduce-overhead" if TWO_CALLS[kind] else "default"
        assert len(seen) == 6 and set(seen[:3]) == {recorded}
    tower(model).checkpoints = None
    seen.clear()
    step(model)
    assert seen == ["reduce-overhead"] * 3


# Gradients that are kept ------------------------------------------------------------------------


@pytest.fixture
def copies(marks, monkeypatch):
    """How many gradients are copied."""
    seen, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, **k: seen.append(t) or clone(t, **k))
    return seen


def test_a_kept_gradient_is_copied_once(copies):
    plain, model = net(), net()
    accelerate(model, compile="reduce-overhead")
    trained = [p for p in model.parameters() if p.requires_grad]
    loss(model).backward()
    made = [p.grad for p in trained]
    assert not copies
    second = loss(model)
    assert len(copies) == len(trained) == 18
    kept = [p.grad for p in trained]
    assert all(k is not m and torch.equal(k, m) for k, m in zip(kept, made))
    second.backward()
    loss(model).backward()
    assert len(copies) == 18 and all(p.grad is k for p, k in zip(trained, kept))  # in place
    for _ in range(3):
        loss(plain).backward()
    assert_equal_steps((kept[0], gradients(model)), (kept[0], gradients(plain)))


def test_gradients_that_are_set_to_none_are_not_copied(copies):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for _ in range(3):
        loss(model).backward()
        model.zero_grad(set_to_none=True)
    assert not copies


def test_zeroed_gradients_are_copied_once(copies):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for _ in range(4):
        loss(model).backward()
        model.zero_grad(set_to_none=False)
    assert len(copies) == 18


def test_gradients_of_what_else_trains_in_a_layer_are_copied(copies):
    model = net()
    scales = [cell.scale.weight.requires_grad_() for cell in cells(model)]
    accelerate(model, compile="reduce-overhead")
    loss(model).backward()
    made = [p.grad for p in scales]
    loss(model)
    assert all(p.grad is not m for p, m in zip(scales, made)) and len(copies) == 18 + 3


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


# Masks ------------------------------------------------------------------------------------------


def masks_for(model, seed):
    generator = torch.Generator().manual_seed(seed)

    def some(p):
        return (torch.rand(p.shape, generator=generator) < 0.5).to(p.device)

    return {
        name: LoraMask(some(m.lora_A["default"].weight), some(m.lora_B["default"].weight))
        for name, m in lora_layers(model).items()
    }


def assert_masked(model, plain, masks):
    """Exact zeros where frozen, and the gradient elsewhere."""
    (y, g), (y0, g0) = step(model), step(plain)
    assert_close("y", y, y0)
    assert g.keys() == g0.keys()
    for name, mask in masks.items():
        for side, m in (("lora_A", mask.a), ("lora_B", mask.b)):
            key = f"{name}.{side}.default.weight"
            assert not g[key][~m].any() and g[key][m].any(), key
            assert_close(key, g[key][m], g0[key][m])


def test_masks_that_change_are_honoured(traced):
    plain, model = net(4), net(4)
    for seed in (1, 2, 1):
        masks = masks_for(model, seed)
        report = accelerate(model, masks, compile="default")
        assert_masked(model, plain, masks)
        assert_masked(model, plain, masks)
        assert shapes_of(report) == {(5, 3, 8): 8} and not report.compilation.eager
    assert breaks() == 0
    seen = graphs()
    assert seen <= 3  # one a compilation, not one a layer
    accelerate(model, compile="default")
    assert all(g.all() for g in step(model)[1].values())


def test_a_mask_set_on_compiled_layers_is_honoured(traced):
    """What is compiled stays, as `LoraParCallback` needs it."""
    from lorapar.patch import route

    plain, model = net(4), net(4)
    report = accelerate(model, compile="default")
    assert_equal_steps(step(model), step(plain))
    for seed in (1, 2):
        masks = masks_for(model, seed)
        assert route(model, masks, stage=None).compilation is report.compilation
        assert_masked(model, plain, masks)
    route(model, None, stage=None)
    assert_equal_steps(step(model), step(plain))
    assert shapes_of(report) == {(5, 3, 8): 4 * 4} and not report.compilation.eager
    assert breaks() == 0 and graphs() <= 3


def test_sums_set_on_compiled_layers_are_filled(traced):
    """And gradients are made again when they are gone, as after scoring."""
    from lorapar.calls import SUMS
    from lorapar_kernels import ImportanceSums

    plain, model = net(2), net(2)
    accelerate(model, compile="default")
    accelerate(plain)
    assert_equal_steps(step(model), step(plain))
    for m in (model, plain):
        for layer in lora_layers(m).values():
            a, b = (s["default"].weight for s in (layer.lora_A, layer.lora_B))
            sums = ImportanceSums(torch.zeros_like(a), torch.zeros_like(b))
            sums.examples(torch.tensor([0, 7, 15], dtype=torch.int32, device=DEVICE))
            layer.__dict__[SUMS] = sums
        assert not step(m)[1]
    wanted = lora_layers(plain)
    for name, layer in lora_layers(model).items():
        got, want = (m.__dict__.pop(SUMS) for m in (layer, wanted[name]))
        for side in ("a", "b"):
            assert getattr(want, side).any()
            assert_close(name, getattr(got, side), getattr(want, side))
    assert_equal_steps(step(model), step(plain))


def test_the_callback_leaves_layers_compiled(called):
    _, model = llama()
    report = accelerate(model, compile="default")
    partition = partition_for(model)
    callback = LoraParCallback(partition, stage="sft")
    state = SimpleNamespace(is_world_process_zero=True, log_history=[])
    callback.on_train_begin(None, state, None, model=model)
    assert compilation_of(model) is report.compilation
    _, g = run(model)
    for name, mask in partition.sft.items():
        got = g[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
        assert not got[~mask.to(DEVICE)].any() and got[mask.to(DEVICE)].any(), name
    callback.on_train_end(None, state, None, model=model)
    assert compilation_of(model) is report.compilation
    assert all(g.any() for g in run(model)[1].values())
    assert shapes_of(report) == {(2, 5, 32): 4}


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


# Everything else that a step may be -------------------------------------------------------------


def test_autocast_and_modes(traced):
    """Compiled once for each, and right in each."""
    plain, model = net(2), net(2)
    report = accelerate(model, compile="default")
    for _ in range(2):
        assert_equal_steps(step(model.train()), step(plain.train()))
        exact = step(copy.deepcopy(plain).double(), inputs().double())
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            results = zip(step(model), exact, step(plain))
        (y, ye, y0), (g, ge, g0) = results
        assert_as_accurate("y", y, ye, y0, NETWORK_FACTOR)
        assert g.keys() == g0.keys()
        for name in g:
            assert_as_accurate(name, g[name], ge[name], g0[name], NETWORK_FACTOR)
        assert_equal_steps(step(model.eval()), step(plain.eval()))
    # Under autocast the first layer's input is of another dtype than the others'.
    assert graphs() <= 4 and breaks() == 0 and not report.compilation.eager


def test_dropout_follows_the_generator_and_the_mode(traced):
    model = net(lora_dropout=0.5)
    accelerate(model, compile="default")
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(step(model))
    assert_equal_steps(*results[:2])
    assert not torch.equal(results[0][0], results[2][0])
    eager = copy.deepcopy(model)
    torch.manual_seed(1)
    assert_equal_steps(results[0], step(eager))
    assert_equal_steps(step(model.eval()), step(eager.eval()))
    assert breaks() == 0


def test_accumulation(traced, monkeypatch):
    monkeypatch.setattr(Compilation, "records", True)
    plain, model = net(2), net(2)
    accelerate(model, compile="reduce-overhead")
    for m in (model, plain):
        for seed in range(3):
            m(inputs(seed=seed)).square().mean().backward()
    assert_equal_steps((inputs(), gradients(model)), (inputs(), gradients(plain)))


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_checkpointing_of_transformers(kind, traced):
    """Which is inside the forward of a layer, since transformers 5.24: what it recomputes is
    compiled, and so is what it computes."""
    plain, model = llama(num_hidden_layers=3)
    for m in (plain, model):
        m.gradient_checkpointing_enable({"use_reentrant": TWO_CALLS[kind]})
    report = accelerate(model, compile="default")
    compare(model, plain)
    run(model)
    assert breaks() == 0 and 1 <= graphs() <= 2  # recorded, and not
    assert not report.compilation.eager and list(shapes_of(report)) == [(2, 5, 32)]
    assert all(layer.gradient_checkpointing for layer in model.base_model.model.model.layers)
    model.gradient_checkpointing_disable()
    compare(model, plain)


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_what_transformers_checkpoints_is_recomputed(kind, monkeypatch):
    calls = []

    def compile(function, **options):
        return lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    _, model = llama(num_hidden_layers=3)
    model.gradient_checkpointing_enable({"use_reentrant": TWO_CALLS[kind]})
    accelerate(model, compile="default")
    loss = model(input_ids=IDS, labels=IDS).loss
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 6


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_dropout_is_the_same_when_recomputed(kind, traced):
    results = []
    for checkpoints in (None, TWO_CALLS[kind]):
        model = net(lora_dropout=0.5)
        tower(model).checkpoints = checkpoints
        accelerate(model, compile="default")
        torch.manual_seed(1)
        results.append(step(model))
    assert_equal_steps(*results)


# TRL --------------------------------------------------------------------------------------------


def train(make, compile, buckets=None):
    from lorapar.buckets import BucketCollator

    torch.manual_seed(0)
    trainer = make()
    if buckets:
        trainer.data_collator = BucketCollator(trainer.data_collator, buckets)
    report = accelerate(trainer.model, compile=compile)
    trainer.train()
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    clock = ("runtime", "per_second", "time", "memory", "flos")
    logs = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if not any(word in key for word in clock):
                logs.setdefault(key, []).append(float(value))
    return report, weights, {key: torch.tensor(values) for key, values in logs.items()}


def assert_same_training(one, other):
    (_, weights, logs), (_, weights0, logs0) = one, other
    assert logs.keys() == logs0.keys() and "loss" in logs
    for key, values in logs0.items():
        assert_close(key, logs[key], values)
    assert weights.keys() == weights0.keys()
    for name, values in weights0.items():
        assert_close(name, weights[name], values)


COMMON = {"use_cpu": DEVICE == "cpu", "bf16": False, "report_to": "none", "save_strategy": "no",
          "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.2, "max_steps": 3,
          "lr_scheduler_type": "constant", "logging_steps": 1}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sft(checkpointing, traced, tokenizer, tmp_path):
    import datasets
    import trl

    rows = [{"text": f"Question: {i}\nAnswer:" + f" {i} +" * (6 * i % 11)} for i in range(6)]

    def make():
        return trl.SFTTrainer(
            make_lora(make_tiny_model()),
            trl.SFTConfig(str(tmp_path), **COMMON, per_device_train_batch_size=2,
                          gradient_checkpointing=checkpointing),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip

    compiled, plain = train(make, "default", [12, 24]), train(make, None, [12, 24])
    assert_same_training(compiled, plain)
    compilation = compiled[0].compilation
    assert len(compilation.shapes) == 2 and {s[:2] for s in compilation.shapes} == {
        (2, 12),
        (2, 24),
    }
    assert sum(compilation.shapes.values()) >= 2 * 3
    assert not compilation.eager and breaks() == 0 and 0 < graphs() <= 4


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_grpo(checkpointing, traced, tokenizer, tmp_path):
    """Scoring and updates are compiled, rollouts are not."""
    import datasets
    import trl

    seen = []

    def reward(completion_ids, **columns):
        seen.append(completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    def make():
        seen.append("begin")
        rows = [{"prompt": f"Question: {i}\nAnswer:" + " 1 +" * i} for i in range(4)]
        return trl.GRPOTrainer(
            make_lora(make_tiny_model()),
            reward,
            args=trl.GRPOConfig(
                str(tmp_path), **(COMMON | {"learning_rate": 0.3, "max_steps": 4}),
                per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
                num_iterations=2, gradient_checkpointing=checkpointing, pad_to_multiple_of=32,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip

    compiled, plain = train(make, "default"), train(make, None)
    assert_same_training(compiled, plain)
    second = seen.index("begin", 1)
    assert seen[:second] == seen[second:]
    compilation = compiled[0].compilation
    assert 1 <= len(compilation.shapes) <= 2 and all(s[1] % 32 == 0 for s in compilation.shapes)
    # Two layers: four updates, and two batches that are scored.
    assert sum(compilation.shapes.values()) >= 2 * (4 + 2)
    assert all(r.startswith("a key-value cache") for r in compilation.eager)
    assert breaks() == 0 and graphs() > 0


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
    assert [_call(m) for m in model.modules() if _call(m) is not None] == [own]


def test_a_root_that_is_compiled_already_is_refused(called):
    model = net()
    own = tower(model)._compiled_call_impl = lambda *a: None
    refused("Tower is compiled already; leave compile out", model, compile="default")
    assert compilation_of(model) is None
    assert [_call(m) for m in model.modules() if _call(m) is not None] == [own]


def test_everything_is_a_partition_too(called):
    _, model = llama()
    report = accelerate(model, everything(model), stage="sft", compile="default")
    assert report.compilation.layers and all(g.all() for g in run(model)[1].values())
