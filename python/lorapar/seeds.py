"""Seeds of dropout in compiled layers: one draw for all of a layer, outside of its graph.

PyTorch's compiler takes a kernel or two for each seed, and a CUDA graph that draws needs two more
before each replay. Here a compiled layer draws all its seeds by one op, and a graph reads them
where a `Part` has drawn them before the replay: in the same order from the same generator, so that
a call draws the same with a graph as without, and a checkpoint's second run as its first.
"""

import contextlib
import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule

_BELOW = 2**62  # as lora_linear draws a seed: randint(_BELOW, (1,))
_MOST = 256  # seeds of a layer
_reading: "Part | None" = None  # of the graph that is recorded now


class Part:
    """The seeds that one graph reads.

    Attributes:
        values: int64 [count], or None: the graph reads none.
    """

    def __init__(self, device: torch.device | None):
        self.values: Tensor | None = None
        self._room = torch.empty(_MOST, dtype=torch.int64, device=device)

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """What is recorded inside draws its seeds from here."""
        global _reading
        _reading = self
        try:
            yield
        finally:
            _reading = None

    def take(self, count: int, device: torch.device) -> Tensor | None:
        """For one op, each time the same; None where there are none for it."""
        if self.values is None and count <= _MOST and self._room.device == device:
            self.values = self._room[:count]
        return self.values if self.values is not None and len(self.values) == count else None

    def draw(self) -> None:
        """New ones, for a replay."""
        if self.values is not None:
            self.values.random_(0, _BELOW)


@torch.library.custom_op(
    "lorapar::draw_seeds", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64 [count], each as `lora_linear` draws one."""
    values = None if _reading is None else _reading.take(count, device)
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
