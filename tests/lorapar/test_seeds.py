"""Where compiled layers draw their seeds, and when these are new."""

import pytest
import torch
from conftest import DEVICE

from lorapar import seeds
from lorapar_kernels.lora_linear import _draw_seed

HERE = torch.zeros(0, device=DEVICE).device


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
def part():
    part = seeds.Part(HERE)
    with part.read():
        torch.ops.lorapar.draw_seeds(2, HERE)
    return part


def test_a_part_draws_as_the_op_does(part):
    """A call draws the same with a graph as without, and a checkpoint's second run as its first."""
    torch.manual_seed(3)
    part.draw()
    first = part.values.tolist()
    part.draw()
    assert set(part.values.tolist()).isdisjoint(first)
    torch.manual_seed(3)
    drawn = torch.ops.lorapar.draw_seeds(2, HERE)
    assert drawn.tolist() == first


def test_what_a_graph_reads(part):
    part.draw()
    with part.read():
        drawn = torch.ops.lorapar.draw_seeds(2, HERE)
        other = torch.ops.lorapar.draw_seeds(3, HERE)
    assert drawn.tolist() == part.values.tolist() and other.shape == (3,)
    assert drawn.data_ptr() != part.values.data_ptr()  # compiled code writes where it likes
    assert torch.ops.lorapar.draw_seeds(2, HERE).tolist() != drawn.tolist()


def test_what_a_part_has_no_room_for():
    part = seeds.Part(HERE)
    with part.read():
        assert torch.ops.lorapar.draw_seeds(1000, HERE).shape == (1000,)
        other = torch.ops.lorapar.draw_seeds(2, torch.device("meta"))
    assert other.device.type == "meta" and part.values is None
    part.draw()  # nothing
