"""Seeds of dropout in compiled layers: one draw for all of a forward.

PyTorch's compiler takes a kernel or two for each seed, and a CUDA graph that draws needs two more
before each replay. Here a compiled layer draws all its seeds by one op, and its graph reads them
from a `Store`, which is filled once a forward of the model.

A checkpoint sets the generator back and runs a layer again, which then has to draw the same. Where
that may be, in a forward without gradients and in a backward, a layer fills its own part of the
store from the generator, as the op does that draws without a graph.
"""

import contextlib
import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule

_BELOW = 2**62  # as lora_linear draws a seed: randint(_BELOW, (1,))
_MOST = 1024  # seeds of a store
_reading: "Part | None" = None  # of the graph that is recorded now


class Store:
    """Seeds for the graphs of many layers.

    Attributes:
        values: int64 [_MOST].
        when: the forward of a model that they were drawn in.
    """

    def __init__(self, device: torch.device | None):
        self.values = torch.empty(_MOST, dtype=torch.int64, device=device)
        self.taken, self.when = 0, -1


class Part:
    """The seeds that one graph reads, if it reads any."""

    def __init__(self, store: Store):
        self.store = store
        self.values: Tensor | None = None
        self.used = -1  # in which forward

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """What is recorded inside draws its seeds from here."""
        global _reading
        _reading = self
        try:
            yield
        finally:
            _reading = None

    def take(self, count: int) -> Tensor | None:
        """Of one op, each time the same; None: the store is used up."""
        if self.values is None:
            first, end = self.store.taken, self.store.taken + count
            if end > _MOST:
                return None
            self.store.taken, self.values = end, self.store.values[first:end]
        return self.values

    def fill(self, forward: int | None) -> None:
        """New seeds for a replay in that forward of a model; None: from the generator, now."""
        store = self.store
        if self.values is None:
            return
        if forward is None or forward == self.used:
            self.values.random_(0, _BELOW)
            return
        if store.when != forward:
            store.values.random_(0, _BELOW)
            store.when = forward
        self.used = forward


@torch.library.custom_op(
    "lorapar::draw_seeds", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64 [count], each as `lora_linear` draws one."""
    values = None if _reading is None else _reading.take(count)
    if values is not None:
        return values.clone()
    return torch.randint(_BELOW, (count,), dtype=torch.int64, device=device)


@_draw_seeds.register_fake
def _(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)


def draw_together(module: GraphModule) -> None:
    """Rewrites a graph as dynamo traced it, so that its seeds are elements of one tensor."""
    graph = module.graph
    draws = [n for n in graph.nodes if n.target is torch.randint and n.args == (_BELOW, (1,))]
    if not draws or any(n.kwargs != draws[0].kwargs for n in draws):
        return
    with graph.inserting_before(draws[0]):
        together = graph.call_function(
            torch.ops.lorapar.draw_seeds, (len(draws), draws[0].kwargs["device"])
        )
    for i, draw in enumerate(draws):
        with graph.inserting_before(draw):
            seed = graph.call_function(operator.getitem, (together, slice(i, i + 1)))
        draw.replace_all_uses_with(seed)
        graph.erase_node(draw)
    module.recompile()
