"""Where compiled layers draw their seeds, and when these are new."""

import pytest
import torch
from conftest import DEVICE

from lorapar import seeds
from lorapar_kernels.lora_linear import _draw_seed


def three(x):
    return [_draw_seed(x, 0.5) for _ in range(3)]


def draws(module):
    return [n for n in module.graph.nodes if n.op == "call_function" and "seed" in str(n.target)]


def traced(function, *args):
    """The graph that dynamo makes of it, rewritten."""
    modules = []

    def backend(module, inputs):
        seeds.draw_together(module)
        modules.append(module)
        return module

    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend)
    return compiled(*args), modules[0]


def test_one_draw_of_what_a_layer_would_draw():
    x = torch.zeros(2, device=DEVICE)
    torch.manual_seed(1)
    found, module = traced(three, x)
    assert len(draws(module)) == 1
    assert not [n for n in module.graph.nodes if n.target is torch.randint]
    assert [s.shape for s in found] == 3 * [(1,)] and {s.dtype for s in found} == {torch.int64}
    torch.manual_seed(1)
    assert torch.cat(found).tolist() == torch.randint(2**62, (3,), device=DEVICE).tolist()
    assert len({s.item() for s in found}) == 3


def test_other_draws_stay():
    def function(x):
        return torch.randint(10, (1,), device=x.device), torch.randint(2**62, (2,), device=x.device)

    _, module = traced(function, torch.zeros(2, device=DEVICE))
    assert not draws(module)


@pytest.fixture
def parts():
    store = seeds.Store(torch.device(DEVICE))
    found = [seeds.Part(store), seeds.Part(store)]
    for part in found:
        with part.read():
            torch.ops.lorapar.draw_seeds(2, torch.device(DEVICE))
    return found


def test_parts_are_apart_and_filled_once_a_forward(parts):
    first, second = parts
    first.fill(1)
    values = first.values.tolist() + second.values.tolist()
    assert len(set(values)) == 4
    second.fill(1)
    assert first.values.tolist() + second.values.tolist() == values
    first.fill(1)  # a second call in one forward
    assert set(first.values.tolist()).isdisjoint(values) and second.values.tolist() == values[2:]
    before = first.values.tolist()
    first.fill(2)
    assert set(second.values.tolist() + first.values.tolist()).isdisjoint(values + before)


def test_what_a_graph_reads(parts):
    first, _ = parts
    first.fill(1)
    with first.read():
        drawn = torch.ops.lorapar.draw_seeds(2, torch.device(DEVICE))
    assert drawn.tolist() == first.values.tolist()
    assert drawn.data_ptr() != first.values.data_ptr()  # compiled code writes where it likes
    assert torch.ops.lorapar.draw_seeds(2, torch.device(DEVICE)).tolist() != drawn.tolist()


def test_without_a_forward_a_part_draws_as_the_op_does(parts):
    """What a checkpoint runs again draws the same, by a graph or without."""
    for part in parts:
        torch.manual_seed(3)
        part.fill(None)
        torch.manual_seed(3)
        drawn = torch.ops.lorapar.draw_seeds(2, torch.device(DEVICE))
        assert part.values.tolist() == drawn.tolist()


def test_a_store_that_is_used_up():
    store = seeds.Store(torch.device(DEVICE))
    part, last = seeds.Part(store), seeds.Part(store)
    assert part.take(1000).shape == (1000,) and last.take(100) is None
    with last.read():
        assert torch.ops.lorapar.draw_seeds(100, torch.device(DEVICE)).shape == (100,)
    last.fill(1)  # nothing to fill
    assert last.values is None
