"""Models whose layers are compiled, what one step of them gives, and fixtures around it.

A test file takes the fixtures by `pytest_plugins`. Layers are traced, or their stand-ins only
called; what CUDA graphs do is for test_cuda_graphs.
"""

import contextlib
import copy
import ctypes
import functools
import weakref

import pytest
import torch
from conftest import DEVICE, make_lora, make_tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lorapar import compiling, recording, seeds
from lorapar.compiling import compilation_of
from lorapar_kernels.testing import assert_close

LIMITS = [
    (torch._dynamo.config, "recompile_limit"),
    (torch._dynamo.config, "accumulated_recompile_limit"),
]
TWO_CALLS = {"non-reentrant": False, "reentrant": True}


def limits():
    return [getattr(config, name) for config, name in LIMITS]


@pytest.fixture
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
    monkeypatch.setattr(recording, "COMPILER", "eager")


@pytest.fixture
def called(monkeypatch):
    """Nothing is traced: what would be compiled is called as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


class Replayed:
    """graphs.Graph without a GPU: a replay runs the function, and writes where it first did.

    What graphs of the same pool keep that were made later may lie where this one frees its own: a
    replay fills it with NaN.
    """

    made: "list[weakref.ref[Replayed]]" = []

    def __init__(self, function, pool):
        self.pool, self.number = pool, len(self.made)
        self.made.append(weakref.ref(self))
        self.function, self.grad = function, torch.is_grad_enabled()
        self.seeds = seeds._reading
        kept, lent = function()
        self.kept = [t if t is None else t.detach().clone() for t in kept]
        self.lent = [t if t is None else t.detach() for t in lent]  # not as real ones: kept

    def replay(self):
        reading = contextlib.nullcontext() if self.seeds is None else self.seeds.read()
        later = [graph() for graph in self.made[self.number + 1 :]]
        with torch.set_grad_enabled(self.grad), reading:
            kept, lent = self.function()
            for t in (t for g in later if g and g.pool == self.pool for t in g.kept):
                if t is not None and t.is_floating_point():
                    t.data.fill_(float("nan"))
        for old, new in zip([*self.kept, *self.lent], [*kept, *lent], strict=True):
            if new is not None and new.data_ptr() != old.data_ptr():
                old.copy_(new.detach())


def view(t):
    """graphs.view without a GPU."""
    if t.numel() == 0:
        return torch.empty_like(t)
    items = 1 + sum((n - 1) * step for n, step in zip(t.size(), t.stride()))
    memory = (ctypes.c_char * (items * t.element_size())).from_address(t.data_ptr())
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.size(), t.stride())


@pytest.fixture
def recorder(traced, monkeypatch):
    """A recorder of its own, whose graphs are emulated."""
    made = recording.Recorder()
    Replayed.made.clear()
    grad = functools.partial(torch.autograd.grad, retain_graph=True)  # for each replay anew
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(recording, "Graph", Replayed)
    monkeypatch.setattr(recording, "current_device", lambda: torch.device(DEVICE))
    monkeypatch.setattr(recording.Recorder, "pools", lambda self: ("forwards", "backwards"))
    monkeypatch.setattr(recording, "new_pool", object)
    monkeypatch.setattr(recording, "stream_now", int)
    monkeypatch.setattr(recording, "view", view)
    monkeypatch.setattr(compiling, "RECORDER", made)
    return made


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


def loss(model):
    return model(inputs()).square().mean()


def compiled_call(module):
    return module.__dict__.get("_compiled_call_impl")


def is_plain(model):
    return all(compiled_call(m) is None for m in model.modules()) and compilation_of(model) is None
