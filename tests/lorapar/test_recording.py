"""Which calls of compiled layers replay graphs, and that each gives what an eager one would.

The graphs are emulated: what real ones do to memory is for test_cuda_graphs.
"""

import gc
import weakref

import pytest
import torch
from compiled_net import (
    TWO_CALLS,
    Replayed,
    assert_equal_steps,
    cells,
    gradients,
    graphs,
    inputs,
    loss,
    net,
    step,
    tower,
)
from conftest import DEVICE, beyond
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorapar import recording
from lorapar.calls import SUMS
from lorapar.patch import accelerate, lora_layers, restore
from lorapar_kernels import ImportanceSums
from lorapar_kernels.testing import assert_close

pytest_plugins = "compiled_net"
pytestmark = pytest.mark.usefixtures("fresh")
LAYERS = 3


@pytest.fixture
def both(recorder):
    """Two equal models, the second with recorded layers: after two steps all are recorded."""
    plain, model = net(), net()
    accelerate(plain)
    accelerate(model, compile="reduce-overhead")
    for seed in range(2):
        assert_equal_steps(step(model, inputs(seed=seed)), step(plain, inputs(seed=seed)))
    assert recorder.graphs == 2 * LAYERS and recorder.replays == LAYERS
    for m in (plain, model):
        m.zero_grad()
    recorder.replays = 0
    return plain, model


def check(plain, model, seed=7):
    assert_equal_steps(step(model, inputs(seed=seed)), step(plain, inputs(seed=seed)))


def gradients_of(model, *seeds):
    """Of several losses, each with its backward at once."""
    model.zero_grad()
    for seed in seeds:
        model(inputs(seed=seed)).square().mean().backward()
    return inputs(), gradients(model)


def test_steps(both, recorder):
    for seed in range(2, 5):
        check(*both, seed)
    assert recorder.replays == 3 * LAYERS and recorder.graphs == 2 * LAYERS
    assert not recorder.pending and recorder.failed is None


def test_accumulation_and_gradients_that_are_kept(both):
    plain, model = both
    assert_equal_steps(gradients_of(model, 2, 3, 4), gradients_of(plain, 2, 3, 4))
    kept = [p.grad for p in model.parameters() if p.requires_grad]
    values = [g.clone() for g in kept]
    check(plain, model)  # sets them to None, and replays
    assert all(torch.equal(g, v) for g, v in zip(kept, values))


def test_outputs_that_are_kept(both, recorder):
    _, model = both
    first = cells(model)[0]
    x = torch.randn(5, 3, 8, device=DEVICE, requires_grad=True)
    kept, value = [], []
    for _ in range(3):
        kept.append(first(x * (1 + len(kept))))
        value.append(kept[-1].detach().clone())
        kept[-1].sum().backward()
    assert recorder.replays == 1  # the others would write to it
    assert all(torch.equal(k, v) for k, v in zip(kept, value))


def test_gradients_of_hidden_states_that_are_kept(both, recorder):
    _, model = both
    first = cells(model)[1]
    xs = [torch.randn(5, 3, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
    for i, x in enumerate(xs):
        (first(x) * (1 + i)).sum().backward()
    assert recorder.replays == 1  # the others would write to it
    exact = []
    for i, x in enumerate(xs):
        restore(model)
        (g,) = torch.autograd.grad((first(x) * (1 + i)).sum(), x)
        exact.append(g)
    for x, g in zip(xs, exact):
        assert_close("dx", x.grad, g)


@pytest.mark.parametrize("first", [0, 1])
def test_two_forwards_then_two_backwards(first, both, recorder):
    found = []
    for m in reversed(both):
        m.zero_grad()
        losses = [m(inputs(seed=seed)).square().mean() for seed in (2, 3)]
        for each in (losses[first], losses[1 - first]):
            each.backward()
        found.append((inputs(), gradients(m)))
    assert_equal_steps(*found)
    assert recorder.replays == LAYERS  # those of the second forward find memory in use
    check(*both)
    assert recorder.replays == 2 * LAYERS


def test_two_shapes_in_one_backward(both, recorder):
    plain, model = both
    for rows in (4, 4):
        step(model, inputs(rows))
    recorder.replays = 0
    found = []
    for m in (model, plain):
        m.zero_grad()
        (m(inputs(4)).square().mean() + m(inputs(5)).square().mean()).backward()
        found.append((inputs(), gradients(m)))
    assert_equal_steps(*found)
    # Of five rows all were recorded, and their memory was free again, before those of four rows.
    assert recorder.replays == LAYERS


def test_a_forward_that_is_dropped(both, recorder):
    plain, model = both
    kept = loss(model)
    del kept
    gc.collect()
    check(plain, model)
    assert recorder.replays == 2 * LAYERS


def test_scoring_between_a_forward_and_its_backward(both, recorder):
    plain, model = both
    with torch.no_grad():
        for seed in range(3):  # recorded in the second
            assert_close("y", model(inputs(seed=seed)), plain(inputs(seed=seed)))
    assert recorder.graphs == 3 * LAYERS and recorder.replays == 2 * LAYERS
    found = []
    for m in (model, plain):
        m.zero_grad()
        kept = m(inputs(seed=2)).square().mean()
        with torch.no_grad():
            y = m(inputs(seed=3))
        kept.backward()
        found.append((y, gradients(m)))
    assert_equal_steps(*found)
    assert recorder.replays == 3 * LAYERS


def test_an_exception_in_a_step(both, recorder):
    plain, model = both
    cells(model)[1].broken = True
    with pytest.raises(ValueError, match="broken"):
        loss(model)
    cells(model)[1].broken = False
    gc.collect()
    check(plain, model)
    failing = loss(model)
    failing.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.backward()
    del failing
    gc.collect()
    recorder.replays = 0
    check(plain, model)
    assert recorder.replays >= LAYERS  # what raises is compiled in two parts


def test_a_second_backward_is_refused(both):
    _, model = both
    value = loss(model)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward"):
        value.backward()
    value = loss(model)
    other = loss(model)
    other.backward()
    value.backward()


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_checkpoints(kind, recorder):
    """Hooks that decide what is saved would not see what stays in a graph."""
    plain, model = net(), net()
    for m in (plain, model):
        tower(m).checkpoints = TWO_CALLS[kind]
    accelerate(model, compile="reduce-overhead")
    for seed in range(4):
        check(plain, model, seed)
    assert recorder.replays == (2 * LAYERS * 3 if TWO_CALLS[kind] else 0)


def test_a_checkpoint_around_all(recorder):
    plain, model = net(), net()
    accelerate(model, compile="reduce-overhead")
    for m in (plain, model):
        inner = tower(m)
        m.base_model.model.tower = Around(inner)
    for seed in range(4):
        check(plain, model, seed)
    assert recorder.replays == 2 * LAYERS * 3


class Around(nn.Module):
    """The user's own checkpoint around all layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


def test_weights_that_are_written_to(both, recorder):
    for m in both:
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1.1)
    check(*both)
    assert recorder.replays == LAYERS


def test_weights_that_are_written_to_before_the_backward_is_recorded(recorder):
    plain, model = net(), net()
    accelerate(model, compile="reduce-overhead")
    step(model)
    loss(model)  # records the forwards alone
    for m in (plain, model):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1.1)
    check(plain, model)
    assert recorder.graphs == 2 * LAYERS


def test_weights_that_moved(both, recorder):
    for m in both:
        for p in m.parameters():
            p.data = p.data * 0.9
    for seed in range(3):
        check(*both, seed)
    assert recorder.graphs == 4 * LAYERS and recorder.replays == 2 * LAYERS


@pytest.mark.parametrize("late", range(LAYERS))
def test_a_layer_that_is_recorded_late_leaves_the_others_recorded(late, both, recorder):
    for m in both:
        for p in cells(m)[late].parameters():
            p.data = p.data * 0.9
    for seed in range(2):
        check(*both, seed)
    recorder.replays = 0
    for seed in range(2, 5):
        check(*both, seed)
    assert recorder.replays == 3 * LAYERS


class Apart(nn.Module):
    """Layers with something between them, so that none reads where another has put its output."""

    def __init__(self, cells):
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, x):
        for cell in self.cells:
            x = cell(x) * 0.5
        return x


def test_a_late_first_layer_has_memory_for_itself(recorder):
    plain, model = net(), net()
    for m in (plain, model):
        m.base_model.model.tower = Apart(cells(m))
    accelerate(model, compile="reduce-overhead")
    for seed in range(5):
        if seed == 2:
            for m in (plain, model):
                for p in cells(m)[0].parameters():
                    p.data = p.data * 0.9
        recorder.replays = 0
        check(plain, model, seed)
    assert recorder.replays == LAYERS


class Shifted(nn.Module):
    """A layer that reads a tensor of its own, which is no parameter."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.shift = inner, torch.ones(8, device=DEVICE)

    def forward(self, x):
        return self.inner(x) + self.shift


def shifted(model):
    own = tower(model)
    own.cells = nn.ModuleList(Shifted(cell) for cell in own.cells)
    return model


def test_tensors_that_are_replaced_or_written_to(recorder):
    plain, model = shifted(net()), shifted(net())
    accelerate(model, compile="reduce-overhead")
    for seed in range(8):
        for m in (plain, model):
            if seed == 3:
                cells(m)[0].shift.fill_(3.0)
            if seed in (4, 6):
                cells(m)[1].shift = torch.full((8,), float(seed), device=DEVICE)
        check(plain, model, seed)
    assert recorder.replays == 7 * LAYERS  # copied in, from when it was replaced


def test_a_buffer_that_a_layer_writes_to(recorder):
    class Counting(Shifted):
        def forward(self, x):
            self.shift.add_(1.0)
            return self.inner(x) + self.shift

    plain, model = net(), net()
    for m in (plain, model):
        own = tower(m)
        own.cells = nn.ModuleList(Counting(cell) for cell in own.cells)
    accelerate(model, compile="reduce-overhead")
    compared = 0
    for seed in range(7):
        for m in (plain, model):
            if seed == 4:  # what is written to may move, but is never a copy
                cells(m)[1].shift = torch.zeros(8, device=DEVICE)
            for cell in cells(m):
                cell.shift.fill_(seed)
        made = recorder.graphs
        got, want = step(model, inputs(seed=seed)), step(plain, inputs(seed=seed))
        if recorder.graphs == made:  # an emulated recording counts too
            assert_equal_steps(got, want)
            assert all((cell.shift == seed + 1).all() for cell in cells(model))
            compared += 1
    assert compared >= 4 and recorder.replays >= 5 * LAYERS


def test_sums_are_never_replayed(both, recorder):
    for m in both:
        for layer in lora_layers(m).values():
            a, b = (s["default"].weight for s in (layer.lora_A, layer.lora_B))
            sums = ImportanceSums(torch.zeros_like(a), torch.zeros_like(b))
            sums.examples(torch.tensor([0, 7, 15], dtype=torch.int32, device=DEVICE))
            layer.__dict__[SUMS] = sums
        for _ in range(3):
            step(m)
    wanted = lora_layers(both[0])
    for name, layer in lora_layers(both[1]).items():
        got, want = (m.__dict__.pop(SUMS) for m in (layer, wanted[name]))
        assert want.a.any()
        assert_close(name, got.a, want.a)
    assert recorder.replays == 0
    check(*both)
    assert recorder.replays == LAYERS


def test_dropout_draws_in_every_replay(recorder):
    plain, model = net(lora_dropout=0.5), net(lora_dropout=0.5)
    accelerate(plain)
    accelerate(model, compile="reduce-overhead")
    for seed in range(4):
        results = []
        for m in (model, plain):
            recorded = recorder.graphs
            torch.manual_seed(seed)
            results.append(step(m))
            if recorder.graphs > recorded:  # an emulated recording draws too
                break
        else:
            assert_equal_steps(*results)
    assert recorder.replays == 3 * LAYERS


def test_unused_outputs_and_inputs_without_gradient(recorder):
    """The gradient of an output that nothing reads is zero, of an input that needs none, None."""

    class Two(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            y = self.inner(x)
            return y, (y > 0).sum(), y * 2

    class Last(nn.Module):
        def __init__(self, cells):
            super().__init__()
            self.cells = nn.ModuleList(Two(cell) for cell in cells)

        def forward(self, x):
            for cell in self.cells:
                _, count, x = cell(x)
                assert not count.requires_grad
            return x

    plain, model = net(), net()
    for m in (plain, model):
        m.base_model.model.tower = Last(cells(m))
    accelerate(model, compile="reduce-overhead")
    for seed in range(4):
        results = []
        for m in (model, plain):
            m.zero_grad()
            y = m(inputs(seed=seed).detach())
            y.square().mean().backward()
            results.append((y.detach(), gradients(m)))
        assert_equal_steps(*results)
    assert recorder.replays == 3 * LAYERS


# What layers share -------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A cell that is given a tensor which its backward reads too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, scale):
        return self.inner(x) * scale


class ScaledTower(nn.Module):
    """Gives all cells the same tensor, another one in each forward."""

    def __init__(self, cells):
        super().__init__()
        self.cells = nn.ModuleList(map(Scaled, cells))
        self.between = None  # a function of the hidden states and the tensor, after each cell

    def forward(self, x, which=slice(None)):
        scale = x.detach().sum((0, 1)).cos() + 2
        for cell in self.cells[which]:
            x = cell(x, scale)
            if self.between is not None:
                x = self.between(x, scale)
        return x


@pytest.fixture
def scaled(recorder):
    """As `both`, of cells that share a tensor."""
    models = net(), net()
    for m in models:
        m.base_model.model.tower = ScaledTower(cells(m))
    accelerate(models[1], compile="reduce-overhead")
    for seed in range(2):
        check(*models, seed)
    recorder.replays = 0
    return models


def test_what_all_are_given_is_copied_once(scaled, recorder):
    records = recorder.records_made()
    shared = {buffer for r in records for buffer in r.buffers}
    assert len(records) == LAYERS and len(shared) == 2  # the first layer's x, and the scale
    for seed in range(2, 5):
        check(*scaled, seed)
    assert recorder.replays == 3 * LAYERS


def test_what_a_backward_still_reads_is_not_copied_to(scaled, recorder):
    """One layer's forward waits for its backward, while others run with another tensor."""
    found = []
    for m in reversed(scaled):
        m.zero_grad()
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        first = tower(m)(x.requires_grad_(), slice(1))
        rest = tower(m)(first, slice(1, None))
        (rest.sum() + first.square().sum()).backward()
        found.append((rest.detach(), gradients(m)))
    assert_equal_steps(*found)
    check(*scaled)


def test_a_tensor_written_to_between_layers_is_copied_again(scaled, recorder):
    def write(x, scale):
        scale.mul_(1.5)
        return x

    for m in scaled:
        tower(m).between = write
    with torch.no_grad():
        for seed in range(4):
            found = [m(inputs(seed=seed)) for m in scaled]
            assert_close("y", found[1], found[0])
    assert recorder.replays >= 2 * LAYERS


def test_gradients_between_layers_are_read_in_place(both, recorder):
    lenders = [r.lenders for r in recorder.records_made()]
    assert [x != [None] for x in lenders] == [True, True, False]  # nobody records for the last
    check(*both)


@pytest.mark.parametrize("keeps", [False, True])
def test_gradients_between_layers_that_a_hook_replaces(keeps, scaled, recorder):
    """Even while somebody keeps what was there."""
    kept = []

    def replace(g):
        if keeps:
            kept.append((g, g.clone()))
        return g * 3

    def hooked(x, scale):
        x.register_hook(replace)
        return x

    for m in scaled:
        tower(m).between = hooked
    check(*scaled)
    assert recorder.replays == LAYERS
    assert all(torch.equal(g, before) for g, before in kept)
    assert len(kept) == 2 * LAYERS * keeps
    kept.clear()
    check(*scaled)


# What graphs that were made later gave ------------------------------------------------------------


def two_shapes(plain, model, checkpoints=None):
    """Both recorded, of five rows first."""
    for m in (plain, model):
        tower(m).checkpoints = checkpoints
    for rows in (5, 4):
        for seed in range(3):
            assert_equal_steps(*(step(m, inputs(rows, seed)) for m in (model, plain)))


@pytest.mark.parametrize("first", [4, 5])
@pytest.mark.parametrize("checkpoints", beyond([True], [None, True]))
def test_two_shapes_in_one_backward_of_checkpoints(checkpoints, first, both):
    two_shapes(*both, checkpoints)
    for _ in range(2):
        found = []
        for m in reversed(both):
            m.zero_grad()
            losses = [m(inputs(rows, rows)).square().mean() for rows in (first, 9 - first)]
            sum(losses).backward()
            found.append((inputs(), gradients(m)))
        assert_equal_steps(*found)


def test_scoring_another_shape_before_the_backward_of_checkpoints(both, recorder):
    plain, model = both
    with torch.no_grad():
        for seed in range(3):
            model(inputs(4, seed))
    two_shapes(plain, model, checkpoints=True)
    replays, found = recorder.replays, []
    for m in (model, plain):
        m.zero_grad()
        value = m(inputs(seed=7)).square().mean()
        with torch.no_grad():
            m(inputs(4))
        value.backward()
        found.append((inputs(), gradients(m)))
    assert_equal_steps(*found)
    assert recorder.replays > replays


def test_hidden_states_that_are_kept(both):
    """Of the last layer, without gradients, while all layers run again; even of one re-recorded."""
    _, model = both
    kept = []
    for seed in range(6):
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        with torch.no_grad():
            y = tower(model)(x)
        kept.append((y, y.clone()))
    assert all(torch.equal(y, before) for y, before in kept)


@pytest.mark.parametrize("keeps", [False, True])
def test_gradients_of_inputs_while_other_backwards_run(keeps, both, recorder):
    two_shapes(*both)
    found, kept = [], []

    def keep(g):
        if keeps:
            kept.append((g, g.clone()))

    for m in reversed(both):
        xs = [torch.randn(rows, 3, 8, device=DEVICE) for rows in (5, 4)]
        xs = [torch.ones_like(x).requires_grad_() for x in xs]
        value = sum(tower(m)(x).square().sum() for x in reversed(xs))
        for x in xs:
            x.register_hook(keep)
        m.zero_grad()
        value.backward()
        for _ in range(2):
            tower(m)(torch.ones(4, 3, 8, device=DEVICE).requires_grad_()).sum().backward()
        found.append((inputs(), {"0": xs[0].grad, "1": xs[1].grad}))
    assert_equal_steps(*found)
    assert all(torch.equal(g, before) for g, before in kept)


def test_a_backward_finds_held_gradients_of_those_recorded_later(both, recorder):
    check(*both)
    *others, last = sorted(recorder.records_made(), key=lambda r: r.released)
    assert [r._dx_written_over() for r in others] == [[], []]
    held = last.gradients_kept[0].data
    recorder.given = last.released
    assert all(t.data_ptr() == held.data_ptr() for t in others[0]._dx_written_over())
    recorder.given = last.released
    assert len(others[0]._dx_written_over()) == 1 and last._dx_written_over() == []


def test_outputs_and_gradients_that_are_inputs(recorder):
    """Have memory of their own: an input's is written to while they are held."""

    class Passing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, scale):
            return x + self.inner(x).sum() * 0 + scale.sum() * 0, scale

    class PassingTower(ScaledTower):
        def __init__(self, cells):
            super().__init__(cells)
            self.cells = nn.ModuleList(map(Passing, cells))

        def forward(self, x):
            scale = x.detach().sum((0, 1)).cos() + 2
            self.kept = []
            for cell in self.cells:
                x, same = cell(x, scale)
                self.kept.append(same)
            return x * torch.stack(self.kept).sum(0)

    plain, model = net(), net()
    for m in (plain, model):
        m.base_model.model.tower = PassingTower(cells(m))
    accelerate(model, compile="reduce-overhead")
    kept = []
    for seed in range(5):
        check(plain, model, seed)
        kept += [(t, t.clone()) for t in tower(model).kept]
        assert all(torch.equal(t, before) for t, before in kept)


# What ends it -----------------------------------------------------------------------------------


def test_a_forward_that_cannot_be_recorded(recorder, monkeypatch):
    def fail(function, pool):
        raise RuntimeError("no graph\nat all")

    monkeypatch.setattr(recording, "Graph", fail)
    plain, model = net(), net()
    report = accelerate(model, compile="reduce-overhead")
    check(plain, model)
    with pytest.warns(UserWarning, match="could not be recorded.*no graph$"):
        check(plain, model)
    for seed in range(2):
        check(plain, model, seed)
    assert "given up: RuntimeError: no graph" in str(report.compilation)
    assert report.compilation.failed is None and recorder.replays == 0


def test_a_backward_that_cannot_be_recorded(recorder, monkeypatch):
    class Forwards(Replayed):
        def __init__(self, function, pool):
            if pool == "backwards":
                raise RuntimeError("no graph")
            super().__init__(function, pool)

    monkeypatch.setattr(recording, "Graph", Forwards)
    plain, model = net(), net()
    accelerate(model, compile="reduce-overhead")
    check(plain, model)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="no graph"):
        step(model)
    for seed in range(3):
        check(plain, model, seed)


def test_restored_layers_free_their_graphs(both, recorder):
    plain, model = both
    (function,) = recorder._functions
    graph = weakref.ref(next(iter(function.layers.values())).record.forward)
    other = net()
    accelerate(other, compile="reduce-overhead")
    for _ in range(2):
        step(other)
    restore(model)
    gc.collect()
    assert graph() is None and len(function.layers) == LAYERS  # those of the other
    check(plain, model)
    compiled = graphs()
    accelerate(model, compile="reduce-overhead")
    for seed in range(3):
        check(plain, model, seed)
    assert graphs() == compiled  # nothing is compiled anew
    assert recorder.replays == 3 * LAYERS


def test_a_model_that_is_gone_frees_its_graphs(recorder):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for _ in range(2):
        step(model)
    (function,) = recorder._functions
    assert len(function.layers) == LAYERS
    del model
    gc.collect()
    assert not function.layers


def test_devices_that_are_not_this_one(both, recorder, monkeypatch):
    monkeypatch.setattr(recording, "current_device", lambda: torch.device("meta"))
    plain, model = both
    for seed in range(3):
        check(plain, model, seed)  # recorded already: nothing has moved
    other = net()
    accelerate(other, compile="reduce-overhead")
    replays = recorder.replays
    for seed in range(3):
        check(plain, other, seed)
    assert recorder.replays == replays


def test_another_stream(both, recorder, monkeypatch):
    monkeypatch.setattr(recording, "stream_now", lambda: 1)
    check(*both)
    assert recorder.replays == 0
    monkeypatch.setattr(recording, "stream_now", int)
    check(*both)
    assert recorder.replays == LAYERS


def test_inference_mode_and_default_mode_record_nothing(recorder):
    plain, model = net(), net()
    accelerate(model, compile="reduce-overhead")
    for _ in range(3):
        with torch.inference_mode():
            assert_close("y", model(inputs()), plain(inputs()))
    accelerate(model, compile="default")
    for seed in range(3):
        check(plain, model, seed)
    assert recorder.graphs == recorder.replays == 0
