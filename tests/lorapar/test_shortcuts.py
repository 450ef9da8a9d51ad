"""Which calls of compiled layers go past dynamo, and that each change of a layer is honoured in the
very next step.

Graphs are emulated, and so is the extension, of which only the check of the state is used.
"""

import contextlib
import copy
import gc
import pickle
import sys
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from compiled_net import (
    Cell,
    Net,
    assert_equal_steps,
    cells,
    compiled_call,
    gradients,
    inputs,
    llama,
    net,
    step,
    tower,
)
from conftest import DEVICE, beyond
from peft import LoraConfig, get_peft_model
from torch import nn

from lorapar import recording, shortcuts
from lorapar.calls import MASKS
from lorapar.patch import accelerate, restore
from lorapar.served import PLAN
from lorapar_kernels import LoraMask, extension

pytest_plugins = "compiled_net"
pytestmark = pytest.mark.usefixtures("fresh", "state")
LAYERS = 3


@pytest.fixture
def state(monkeypatch):
    """The extension's check, and none of its kernels."""
    if not extension.available():
        sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
        from emulator.module import emulated_module

        monkeypatch.setattr(extension, "module", emulated_module())
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")


class Settings:
    def __init__(self):
        self.gain, self.names = 1.0, {"a": 1.0}


class Mode(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else x


class Reader(Cell):
    """Its forward reads state of all kinds."""

    def __init__(self, number):
        super().__init__(number)
        self.factor, self.items, self.table = 1.0, [1.0, 2.0], {"a": {"b": 1.0}}
        self.settings, self.mode, self.drop = Settings(), Mode(), nn.Dropout(0.0)
        self.pair, self.flags = (1.0, [1.0]), {"closed"}
        self.register_buffer("offset", torch.ones(8))
        gain = 1.0

        def closed(x):
            return x * gain

        def set_gain(new):
            nonlocal gain
            gain = new

        self.closed, self.set_gain = closed, set_gain

    def forward(self, x, more=None, *, halve=False):
        y = self.drop(self.mode(super().forward(x))) + self.offset
        y = y * self.factor * self.items[0] * self.table["a"]["b"] * self.settings.gain
        y = y * self.settings.names["a"] * self.pair[1][0]
        y = self.closed(y) if "closed" in self.flags else 2 * y
        if more is not None:
            y = y + more
        return y / 2 if halve else y


class Calls(nn.Module):
    """Calls its cells with what it is told to."""

    def __init__(self, kinds):
        super().__init__()
        self.cells = nn.ModuleList(kind(i) for i, kind in enumerate(kinds))
        self.kwargs, self.detached, self.within = {}, False, contextlib.nullcontext

    def forward(self, x):
        for cell in self.cells:
            with self.within():
                x = cell(x.detach() if self.detached else x, **self.kwargs)
        return x


def of_kinds(*kinds, **changes):
    torch.manual_seed(0)
    made = Net(0)
    made.tower = Calls(kinds)
    settings = {"r": 2, "target_modules": ["gate_proj", "up_proj", "back"],
                "init_lora_weights": False}  # fmt: skip
    return get_peft_model(made, LoraConfig(**(settings | changes))).to(DEVICE)


def check(plain, model, seed=7):
    assert_equal_steps(step(model, inputs(seed=seed)), step(plain, inputs(seed=seed)))


def learnt(recorder, make):
    """Two equal models; all layers of the second but the first take shortcuts."""
    plain, model = make(), make()
    accelerate(plain)
    accelerate(model, compile="reduce-overhead")
    for seed in range(4):
        check(plain, model, seed)
    assert recorder.shortcuts == LAYERS - 1
    check(plain, model)
    assert recorder.shortcuts == 2 * (LAYERS - 1)
    recorder.shortcuts = 0
    return plain, model


@pytest.fixture
def both(recorder):
    return learnt(recorder, lambda: of_kinds(*[Reader] * LAYERS))


def test_steps(recorder):
    plain, model = learnt(recorder, lambda: net(LAYERS))
    for seed in range(5):
        check(plain, model, seed)
    assert recorder.shortcuts == 5 * (LAYERS - 1) and recorder.failed is None
    assert recorder.replays == 9 * LAYERS


def test_none_without_the_extension(recorder, monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    plain, model = net(), net()
    accelerate(model, compile="reduce-overhead")
    for seed in range(5):
        check(plain, model, seed)
    assert recorder.replays == 4 * LAYERS and recorder.shortcuts == 0


# Every change, in the next step -------------------------------------------------------------------


def gates(cell):
    return cell.gates.gate_proj


def half(module, args, output):
    return output / 2


def half_input(module, args):
    return (args[0] / 2,)


def half_gradient(module, dx, dy):
    return (dx[0] / 2,)


def new_parameter(cell):
    gates(cell).lora_A["default"].weight = nn.Parameter(torch.ones(2, 8, device=DEVICE))


def new_data(cell):
    weight = gates(cell).lora_B["default"].weight
    weight.data = torch.ones_like(weight)


def new_module(cell):
    cell.scale = nn.Identity()


def new_class(cell):
    cell.mode.__class__ = type("Tripled", (Mode,), {"forward": lambda self, x: 3 * x})


def new_dict(cell):
    cell.settings.__dict__ = {"gain": 2.0, "names": {"a": 1.0}}


def mask(cell):
    live = torch.tensor([True, False], device=DEVICE)
    b = torch.tensor([[True, False]] * 12, device=DEVICE)
    layer = gates(cell)
    with torch.no_grad():
        layer.lora_B["default"].weight[:, 1] = 0
    layer.__dict__[MASKS] = {
        "default": LoraMask(torch.tensor([[True] * 8, [False] * 8]), b, live=live)
    }


CHANGES = {
    "eval of an inner module": lambda cell: cell.mode.eval(),
    "p of a dropout": lambda cell: setattr(cell.drop, "p", 1.0),
    "scaling": lambda cell: gates(cell).scaling.update(default=3.0),
    "adapters off": lambda cell: gates(cell).enable_adapters(False),
    "merge": lambda cell: gates(cell).merge(),
    "a mask": mask,
    "requires_grad": lambda cell: gates(cell).lora_A["default"].weight.requires_grad_(False),
    "data": new_data,
    "a parameter": new_parameter,
    "a module": new_module,
    "a class": new_class,
    "a forward hook": lambda cell: cell.gates.register_forward_hook(half),
    "a hook of the layer": lambda cell: cell.register_forward_hook(half),
    "forward": lambda cell: setattr(cell.mode, "forward", lambda x: 3 * x),
    "a float": lambda cell: setattr(cell, "factor", 2.0),
    "an item of a list": lambda cell: cell.items.__setitem__(0, 2.0),
    "an item of a list in a tuple": lambda cell: cell.pair[1].__setitem__(0, 2.0),
    "an item of a dict": lambda cell: cell.table["a"].update(b=2.0),
    "a set": lambda cell: cell.flags.clear(),
    "settings": lambda cell: setattr(cell.settings, "gain", 2.0),
    "a dict of settings": lambda cell: cell.settings.names.update(a=2.0),
    "__dict__": new_dict,
    "a closure": lambda cell: cell.set_gain(2.0),
    "a buffer": lambda cell: setattr(cell, "offset", torch.zeros(8, device=DEVICE)),
}


OFTEN = ["eval of an inner module", "merge", "a mask", "requires_grad", "data", "a module",
         "a hook of the layer", "an item of a list in a tuple", "a closure"]  # fmt: skip


@pytest.mark.parametrize("change", beyond(OFTEN, list(CHANGES)))
def test_changes_of_a_layer(change, both, recorder):
    for model in both:
        CHANGES[change](cells(model)[1])
    check(*both)
    check(*both, seed=8)
    assert recorder.shortcuts >= 2  # of the last layer


def test_plans_of_eager_calls(both, recorder, monkeypatch):
    """What a layer keeps for its next eager call is nothing to those that are compiled."""
    layer = cells(both[1])[1].back
    monkeypatch.setenv("LORAPAR_BACKEND", "cuda")
    layer(torch.randn(3, 12, device=DEVICE))
    assert layer.__dict__[PLAN].plan is not None
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    check(*both)
    assert recorder.shortcuts == LAYERS - 1


HOOKS = {
    "forward": lambda cell: cell.mode.register_forward_hook(half),
    "before": lambda cell: cell.mode.register_forward_pre_hook(half_input),
    "backward": lambda cell: cell.mode.register_full_backward_hook(half_gradient),
}


@pytest.mark.parametrize("change", HOOKS.values(), ids=HOOKS)
def test_first_hooks_of_a_module_inside(change, both, recorder):
    """Dynamo has no guards on them, and would not trace the layer again."""
    change(cells(both[1])[1])
    step(both[1])
    assert recorder.shortcuts == LAYERS - 2


def test_in_place(both, recorder):
    """Values are no state: an optimizer's step changes nothing else."""
    for model in both:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    check(*both)
    assert recorder.shortcuts == LAYERS - 1


def test_unmerge_and_back(both, recorder):
    for change in ("merge", "unmerge"):
        for model in both:
            getattr(gates(cells(model)[1]), change)()
        check(*both)


def test_a_second_adapter(recorder):
    def make():
        model = of_kinds(*[Reader] * LAYERS)
        more = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "back"],
                          init_lora_weights=False)  # fmt: skip
        model.add_adapter("more", more)
        return model.to(DEVICE)

    plain, model = learnt(recorder, make)
    for name in ("more", "default", "more"):
        for m in (plain, model):
            m.set_adapter(name)
        check(plain, model)


FACTOR = 1.0


class Global(Cell):
    def forward(self, x):
        return super().forward(x) * FACTOR


def test_a_global(recorder, monkeypatch):
    plain, model = learnt(recorder, lambda: of_kinds(*[Global] * LAYERS))
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    check(plain, model)
    assert recorder.shortcuts == 0
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    for m in (plain, model):
        m.zero_grad()
    x = torch.ones(5, 3, 8, device=DEVICE)
    assert torch.equal(cells(model)[1](x), cells(plain)[1](x))  # outside of a forward of the model


OFFSET = torch.ones(8, device=DEVICE)


class GlobalTensor(Cell):
    """Each layer has the global's tensor, too, which another one may replace there."""

    def __init__(self, number):
        super().__init__(number)
        self.register_buffer("offset", OFFSET)

    def forward(self, x):
        return super().forward(x) + OFFSET


def test_a_tensor_of_a_global(recorder, monkeypatch):
    plain, model = (of_kinds(*[GlobalTensor] * LAYERS) for _ in range(2))
    accelerate(model, compile="reduce-overhead")
    for seed in range(5):
        check(plain, model, seed)
    monkeypatch.setitem(globals(), "OFFSET", torch.zeros(8, device=DEVICE))
    for seed in range(3):
        check(plain, model, seed)
    assert recorder.shortcuts == 0


class ReadsGrad(Cell):
    def forward(self, x):
        y = super().forward(x)
        return y if self.scale.weight.grad is None else 2 * y


def test_gradients_that_are_read(recorder):
    plain, model = (of_kinds(*[ReadsGrad] * LAYERS) for _ in range(2))
    accelerate(model, compile="reduce-overhead")
    for seed in range(5):
        check(plain, model, seed)
    for m in (plain, model):
        weight = cells(m)[1].scale.weight
        weight.grad = torch.ones_like(weight)
        m.zero_grad = lambda: None
        found = [p for p in m.parameters() if p.grad is not None and p is not weight]
        for p in found:
            p.grad = None
    check(plain, model)


def test_a_tensor_that_lost_its_memory(both, recorder):
    """As an offload does."""
    cell = cells(both[1])[1]
    memory = gates(cell).base_layer.weight.untyped_storage()
    before = memory.nbytes()
    memory.resize_(0)
    call = compiled_call(cell).shortcuts
    assert not extension.module.same_state(call.known[0].state)
    assert shortcuts._walk(extension.module, cell) is not None
    memory.resize_(before)


# The call -----------------------------------------------------------------------------------------


def test_keyword_arguments(both, recorder):
    more = [torch.randn(5, 3, 8, device=DEVICE) for _ in range(3)]
    for kwargs in ({"halve": True}, {"more": more[0]}, {"more": more[1], "halve": True}, {}):
        for model in both:
            tower(model).kwargs = kwargs
        for seed in range(5):
            check(*both, seed)
    assert recorder.shortcuts >= 4 * (LAYERS - 1)


def test_no_gradient_of_x(both):
    for model in both:
        tower(model).detached = True
    check(*both)


@pytest.mark.parametrize(
    "within",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast(DEVICE, torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes(within, both, recorder):
    def forward(model, seed):
        with within():
            return model(inputs(seed=seed)).detach().clone()

    plain, model = both
    for seed in range(5):
        y, y0 = forward(model, seed), forward(plain, seed)
        assert y.dtype == y0.dtype and torch.equal(y, y0)
        check(plain, model, seed)


def test_modes_of_single_layers(both):
    """Set between the first layer and the others."""
    plain, model = both
    for m in both:
        cells(m)[0].register_forward_hook(half)  # it runs eagerly: another one is the first
    check(plain, model)
    for within in (torch.no_grad, torch.enable_grad):
        found = []
        for m in both:
            tower(m).within = within
            found.append(m(inputs()))
        assert torch.equal(*found) and found[0].requires_grad == found[1].requires_grad


def test_adapters_on_and_off(both, recorder):
    """As for a reference: the same calls, by layers in two states."""
    plain, model = both

    def forwards(seed):
        with torch.no_grad():
            yield [m(inputs(seed=seed)).clone() for m in both]
            with plain.disable_adapter(), model.disable_adapter():
                yield [m(inputs(seed=seed)).clone() for m in both]

    for seed in range(10):
        before = recorder.shortcuts
        for y0, y in forwards(seed):
            assert torch.equal(y, y0)
        check(plain, model, seed)
    assert recorder.shortcuts == before + 3 * (LAYERS - 1)


def test_another_stream(both, recorder, monkeypatch):
    monkeypatch.setattr(recording, "stream_now", lambda: 1)
    check(*both)
    assert recorder.shortcuts == 0


def test_arguments_that_share_memory(both, recorder):
    """Not seen when the shortcut was made."""
    plain, model = both
    for m in both:
        m.zero_grad()
        tower(m).kwargs = {"more": torch.zeros(5, 3, 8, device=DEVICE)}
    for seed in range(5):
        check(plain, model, seed)
    before = recorder.shortcuts
    assert before > 0
    known = compiled_call(cells(model)[1]).shortcuts.known[0]
    x, more = torch.zeros(2, 5, 3, 8, device=DEVICE)
    assert not extension.module.same_tensors((x, more), known.inputs.descriptions)
    x, more = torch.zeros(5, 3, 8, device=DEVICE), torch.zeros(5, 3, 8, device=DEVICE)
    described = tuple(extension.module.describe(t, False) for t in (x, more))
    assert extension.module.same_tensors((x, more), described)
    assert not extension.module.same_tensors((x, x.view(5, 3, 8)), described)


def test_shapes(both, recorder):
    for seed in range(8):
        for rows in (4, 5):
            x = [inputs(rows, seed) for _ in range(2)]
            assert_equal_steps(step(both[1], x[0]), step(both[0], x[1]))
    assert recorder.shortcuts >= 8 * (LAYERS - 1)


# Layers that have none ----------------------------------------------------------------------------


class Keeps(Cell):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Counts(Cell):
    def forward(self, x):
        self.count = getattr(self, "count", 0) + 1
        return super().forward(x)


LOG = []


class Logs(Cell):
    def forward(self, x):
        y = super().forward(x)
        LOG.append(y)
        return y


LAST = None


class Stores(Cell):
    def forward(self, x):
        global LAST
        LAST = super().forward(x)
        return LAST


class Breaks(Cell):
    def forward(self, x):
        y = super().forward(x)
        torch._dynamo.graph_break()
        LOG.append(1)
        return y


class Slots:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 1.0


class Hides(Cell):
    def __init__(self, number):
        super().__init__(number)
        self.hidden = Slots()

    def forward(self, x):
        return super().forward(x) * self.hidden.value


class Marks(Cell):
    def forward(self, x):
        self.marked = True
        return super().forward(x)


class Ordered(Cell):
    def __init__(self, number):
        super().__init__(number)
        self.gains = OrderedDict(a=1.0, b=2.0)

    def forward(self, x):
        return super().forward(x) * next(iter(self.gains.values()))


@pytest.mark.parametrize("kind", [Keeps, Counts, Logs, Stores, Breaks, Hides, Marks, Ordered])
def test_layers_without(kind, recorder):
    global LAST
    plain, model = (of_kinds(*[kind] * LAYERS) for _ in range(2))
    accelerate(model, compile="reduce-overhead")
    for seed in range(6):
        LOG.clear()
        LAST = None
        one = step(model, inputs(seed=seed))
        assert len(LOG) == (LAYERS if kind in (Logs, Breaks) else 0)
        assert (LAST is not None) == (kind is Stores)
        assert_equal_steps(one, step(plain, inputs(seed=seed)))
        if kind is Keeps:
            for a, b in zip(cells(model), cells(plain)):
                assert torch.equal(a.last, b.last)
        if kind is Counts:
            assert [c.count for c in cells(model)] == [c.count for c in cells(plain)]
    assert recorder.shortcuts == 0


def test_no_endless_tries(recorder, monkeypatch):
    walks, walk = [], shortcuts._walk
    monkeypatch.setattr(shortcuts, "_walk", lambda *args: walks.append(1) or walk(*args))
    model = of_kinds(*[Hides] * LAYERS)
    accelerate(model, compile="reduce-overhead")
    for seed in range(12):
        step(model, inputs(seed=seed))
    assert 0 < len(walks) <= 12 * (LAYERS - 1)
    walks.clear()
    monkeypatch.setattr(shortcuts, "_FREE", 0)
    for seed in range(3):
        step(model, inputs(seed=seed))
    assert not walks


# Models -------------------------------------------------------------------------------------------


def test_two_kinds(recorder):
    plain, model = (of_kinds(Cell, Reader, Cell, Reader, Cell) for _ in range(2))
    accelerate(model, compile="reduce-overhead")
    for seed in range(6):
        check(plain, model, seed)
    assert recorder.shortcuts == 3 * 3
    for m in (plain, model):
        cells(m)[3].factor = 2.0
    check(plain, model)
    assert recorder.shortcuts == 3 * 3 + 2


@pytest.mark.parametrize("checkpoints", beyond([None], [None, True, False]))
def test_llama(checkpoints, recorder):
    plain, model = llama(num_hidden_layers=4)
    accelerate(plain)
    accelerate(model, compile="reduce-overhead")
    for m in (plain, model):
        if checkpoints is not None:
            m.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    for seed in range(6):
        ids = torch.randint(0, 1000, (2, 7), generator=torch.Generator().manual_seed(seed))
        ids, found = ids.to(DEVICE), []
        for m in (model, plain):
            m.zero_grad()
            loss = m(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append((loss.detach(), gradients(m)))
        assert_equal_steps(*found)
    assert (recorder.shortcuts == 0) == (checkpoints is False)
    if checkpoints is None:
        assert recorder.shortcuts == 3 * 3


def test_they_go_with_the_layers(both):
    _, model = both
    other = pickle.loads(pickle.dumps(cells(model)[1].scale))
    assert compiled_call(copy.deepcopy(cells(model)[1])) is None and other is not None
    known = [weakref.ref(s) for c in cells(model) for s in compiled_call(c).shortcuts.known]
    assert len(known) == LAYERS - 1
    restore(model)
    gc.collect()
    assert all(ref() is None for ref in known)


@pytest.mark.parametrize("seen", [True, False])
def test_memory_of_what_was_replaced(seen, both, monkeypatch):
    _, model = both
    monkeypatch.setattr(shortcuts, "_UNUSED", 4)
    cell = cells(model)[1]
    new_parameter(cell)
    if not seen:
        cell.hidden = Slots()
    for seed in range(6):
        step(model, inputs(seed=seed))
    now = {id(p) for p in (*cell.parameters(), *cell.buffers())}
    known = compiled_call(cell).shortcuts.known
    assert len(known) == seen
    assert all(id(t) in now for shortcut in known for t in shortcut.state[6])
