"""CUDA graphs of compiled functions, one forward and one backward for each layer that calls them.

PyTorch's own (`reduce-overhead`) hand every tensor that is saved for a backward to the host and
look in each step whether it still lives, which for a LoRA layer costs more than its kernels. Here a
call and its backward are one autograd node: what is saved stays inside.

Memory. All forwards share one pool, all backwards another. A tensor that was freed while one graph
was recorded may be where the next one puts its own, hence these rules, for every call:
- A forward replays only if it writes nothing that a backward still to come reads: no turn is
  pending of a record made later, nor of one whose memory was free again when this one was made.
- It is recorded there only while no pending turn's memory is free, and in the same forward of the
  model as the other layers of its function, else in a pool of its own.
- It replays only while nobody holds what it gave before, or what a graph gave that was made later.
Every other call runs as it was compiled, without a graph, and so does one on another stream than
the first. Outputs, and gradients of inputs that are no parameters, keep their memory. Backwards
read what their forward left, in any order, and write only what is copied out at once; what somebody
holds of backwards that were recorded later is put back.

A graph reads its inputs where they were when it was recorded: parameters, what was the same object
in two calls, and what comes out of another graph have to be there again; all else is copied in,
once for all layers that are given the same. The autograd node holds them for its backward, and
finds out whether they were written to.
"""

import itertools
import math
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorapar import seeds
from lorapar.graphs import (
    Graph,
    apart,
    copies,
    current_device,
    empty_like,
    is_tensor,
    lies,
    new_pool,
    stream_now,
    view,
)
from lorapar.shortcuts import whole_code

COMPILER = "inductor"  # torch.compile's backend that makes what is recorded
_MOST_LAYERS = 512  # that share one compiled function

Function = Callable[..., Sequence[Any]]


class Recorder:
    """A backend of torch.compile, whose functions record and replay themselves.

    Attributes:
        paused: whether calls run without graphs now.
        failed: why no call is recorded any longer, or None.
        graphs: how many were recorded.
        replays: how many calls replayed one, without the backwards.
        forwards: of whole models; who calls them counts.
        inside: how many of them run now.
        shortcuts: how many calls took one (`shortcuts.py`).
        watched: a list for what calls with graphs are made of, or None.
    """

    def __init__(self):
        self.paused, self.failed = False, None
        self.graphs = self.replays = self.forwards = self.inside = self.shortcuts = 0
        self.watched: list[tuple] | None = None
        self.pending: weakref.WeakSet[_Turn] = weakref.WeakSet()
        # pool → the latest `made` and the first `released` of what is pending or held, or has been.
        self.busy: dict[Any, tuple[int, float]] = {}
        self.given = -1.0  # the latest `released` of those whose dX is held, or has been
        self.places: set[int] = set()  # of the outputs of records
        self.places_of_dx: weakref.WeakValueDictionary[int, Graph] = weakref.WeakValueDictionary()
        self.buffers: weakref.WeakSet[_Buffer] = weakref.WeakSet()
        self.clock = itertools.count()
        self._functions: weakref.WeakSet[_Recorded] = weakref.WeakSet()  # compiled code holds them
        self._pools: tuple[tuple[Any, Any], list[Graph]] | None = None
        self._stream: tuple[int, int] | None = None

    def __call__(self, graph: Any, inputs: Sequence[Any], **options: Any) -> Function:
        seeds.draw_together(graph)
        compiled = torch._dynamo.lookup_backend(COMPILER)(graph, inputs, **options)
        recorded = _Recorded(self, compiled)
        self._functions.add(recorded)
        return recorded.call

    def moment(self) -> tuple[int, int] | None:
        """Tells apart forwards of whole models, and backwards; None outside of both."""
        backward = torch._C._current_graph_task_id()
        return (self.forwards, backward) if self.inside or backward != -1 else None

    def records(self) -> bool:
        """Whether calls may run with graphs now."""
        return not self.paused and not self.failed and _records_now()

    def confirmed(self, code: types.CodeType, moment: tuple[int, int]) -> bool:
        """Whether dynamo chose a function of this code then."""
        return any(f.code is code and f.confirmed == moment for f in self._functions)

    def __str__(self) -> str:
        text = f"{self.graphs} CUDA graphs hold {self.bytes() / 2**30:.2f} GiB"
        return f"{text}; given up: {self.failed}" if self.failed else text

    def pools(self) -> tuple[Any, Any]:
        """Of the forwards and of the backwards."""
        if self._pools is None:
            handles = new_pool(), new_pool()
            device = current_device()
            keep = [Graph(lambda: ([], [torch.zeros(1, device=device)]), p) for p in handles]
            self._pools = (handles, keep)  # a pool is gone with the last of its graphs
        return self._pools[0]

    def bytes(self) -> int:
        """What the graphs hold."""
        if self._pools is None:
            return 0
        pools = {*self._pools[0], *(record.pool for record in self.records_made())}
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) in pools)

    def forget(self, addresses: set[int]) -> None:
        """Frees the graphs of layers with parameters there."""
        for function in self._functions:
            for key in [key for key in function.layers if not addresses.isdisjoint(key)]:
                del function.layers[key]
        outputs = [t for r in self.records_made() for t in r.outputs if is_tensor(t)]
        self.places = {t.data_ptr() for t in outputs}
        if not self.pending:
            self.busy.clear()
        if not any(function.layers for function in self._functions):
            self._pools = self._stream = None
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # what a pool had serves nothing else before that

    def here(self) -> bool:
        """Whether this is the stream that all graphs share memory on."""
        now = stream_now()
        if self._stream is None:
            self._stream = now
        return self._stream == now

    def records_made(self) -> list["_Record"]:
        layers = itertools.chain.from_iterable(f.layers.values() for f in self._functions)
        return [layer.record for layer in layers if layer.record is not None]

    def give_up(self, error: Exception) -> None:
        self.failed = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        warnings.warn(
            f"lorapar: a CUDA graph could not be recorded, layers run without: {self.failed}",
            stacklevel=2,
        )


RECORDER = Recorder()  # one, for the code that dynamo keeps is a backend's


class _Turn:
    """A forward that was replayed and whose backward is to come. The autograd node holds it."""

    __slots__ = ("__weakref__", "number", "record")

    def __init__(self, record: "_Record", number: int):
        self.record, self.number = record, number


class _Recorded:
    """One compiled function and, for each layer that calls it, its records."""

    def __init__(self, owner: Recorder, function: Function):
        self.owner, self.function = owner, function
        self.layers: dict[tuple[int, ...], _Layer] = {}
        self.parameters: list[int] | None = None
        self.code = whole_code()
        self.confirmed: tuple[int, int] | None = None  # when dynamo chose this function last

    def call(self, *args: Any) -> Sequence[Any]:
        owner = self.owner
        self.confirmed = owner.moment()
        layer = self._layer_of(args)
        outs = self.function(*args) if layer is None else layer.call(args)
        if owner.watched is not None and layer is not None:
            owner.watched.append((self, layer, args, outs))
        return outs

    def _layer_of(self, args: tuple[Any, ...]) -> "_Layer | None":
        """None: the call runs without graphs."""
        if not self.owner.records():
            return None
        if self.parameters is None:
            self.parameters = [i for i, a in enumerate(args) if isinstance(a, nn.Parameter)]
        key = tuple([args[i].data_ptr() for i in self.parameters])
        layer = self.layers.get(key)
        if layer is None:
            if len(self.layers) >= _MOST_LAYERS or not _all_here(args):
                return None
            layer = self.layers[key] = _Layer(self, len(args))
        return layer if self.owner.here() else None


class _Layer:
    """Decides for the calls of one layer."""

    def __init__(self, function: "_Recorded", count: int):
        self.owner, self.function = function.owner, function.function
        self.siblings = function.layers
        self.parameters = function.parameters
        self.others = sorted(set(range(count)) - set(function.parameters))
        self.record: _Record | None = None
        self.gave_up = False
        self.ready = False  # all that a call needs, its backward too, has run once
        self.seen: list[weakref.ref] = []  # the other arguments, as they were in the call before
        self.versions: list[int] = []
        self.written: set[int] = set()  # other arguments that something wrote to
        self.moved: set[int] = set()  # other arguments that were not where a graph reads them

    def call(self, args: tuple[Any, ...]) -> Sequence[Any]:
        if self.record is not None and not self.record.is_free(args):
            return self.function(*args)
        if self.record is not None and not self.record.reads(args):
            self.moved |= {i for i, place in self.record.fixed if args[i].data_ptr() != place}
            self.record = None
            self.gave_up = not self.moved.isdisjoint(self.written)
        if self.record is None and self.ready and not self.gave_up:
            self._make(args)
        return self._run(args) if self.record is None else self.record.run(args)

    def _make(self, args: tuple[Any, ...]) -> None:
        self._look(args)
        same = {i for i, seen in zip(self.others, self.seen) if seen() is args[i]}
        same |= {i for i in self.others if args[i].data_ptr() in self.owner.places}
        fixed = same - self.moved | self.written
        try:
            self.record = _Record(self, args, sorted(fixed))
            self.record.held = self.record.references()
            # The kept tensor and the graph's own; and saved, by the third.
            self.record.rereads = any(n > 2 for n in self.record.held)
            self.owner.places.update(t.data_ptr() for t in self.record.outputs if is_tensor(t))
        except Exception as e:  # of whatever kind: the function alone is right as well
            self.owner.give_up(e)

    def is_late(self) -> bool:
        """Whether a record made now has to have memory for itself."""
        if self.moved or any(turn.record.released < math.inf for turn in self.owner.pending):
            return True
        records = [layer.record for layer in self.siblings.values() if layer.record is not None]
        return any(r.graded and r.when != self.owner.forwards for r in records)

    def _run(self, args: tuple[Any, ...]) -> Sequence[Any]:
        if self.gave_up:
            return self.function(*args)
        self._look(args)
        others = [args[i] for i in self.others]
        self.seen = [weakref.ref(t) for t in others]
        self.versions = [t._version for t in others]
        outs = self.function(*args)
        self._look(args)
        out = next((t for t in outs if is_tensor(t) and t.requires_grad), None)
        if out is None:
            self.ready = True
        elif not self.ready:
            out.register_hook(_Ready(self))
        return outs

    def _look(self, args: tuple[Any, ...]) -> None:
        for i, seen, version in zip(self.others, self.seen, self.versions):
            if seen() is args[i] and args[i]._version != version:
                self.written.add(i)


class _Ready:
    """Hook of an output: its layer's backward runs now, too."""

    def __init__(self, layer: _Layer):
        self.layer = weakref.ref(layer)

    def __call__(self, gradient: Tensor) -> None:
        if (layer := self.layer()) is not None:
            layer.ready = True


class _Buffer:
    """Where graphs of several layers read what is the same tensor for all in a forward."""

    def __init__(self, like: Tensor):
        self.memory = empty_like(like)
        self.of: Callable[[], Tensor | None] = lambda: None
        self.version = self.when = -1
        self.readers: set[int] = set()  # records, by when they were made; who reads again copies

    def holds(self, t: Tensor, forward: int) -> bool:
        return self.of() is t and self.version == t._version and self.when == forward

    def fill(self, t: Tensor, forward: int) -> None:
        self.memory.copy_(t.detach())
        self.of, self.version, self.when = weakref.ref(t), t._version, forward
        self.readers.clear()


class _Record:
    """The two graphs of one layer's calls."""

    def __init__(self, layer: _Layer, args: tuple[Any, ...], fixed: list[int]):
        owner = self.owner = layer.owner
        self.fixed = [(i, args[i].data_ptr()) for i in fixed]
        self.copied = [i for i in layer.others if i not in fixed]
        self.kept = [*layer.parameters, *fixed]
        self.buffers = [self._buffer(args[i]) for i in self.copied]
        function, given = layer.function, list(args)
        for buffer, i in zip(self.buffers, self.copied):
            given[i] = buffer.memory
        graded = [i for i, a in enumerate(args) if a.requires_grad and torch.is_grad_enabled()]
        live = types.SimpleNamespace(inputs=None, outputs=None)

        def forward() -> tuple[Sequence[Any], Sequence[Any]]:
            if given:
                live.inputs = [view(a).requires_grad_(i in graded) for i, a in enumerate(given)]
                given.clear()
            live.outputs = apart(function(*live.inputs), live.inputs)
            return live.outputs, []

        self.pool = new_pool() if layer.is_late() else owner.pools()[0]
        self.seeds = seeds.Part(current_device())
        with self.seeds.read():
            self.forward = Graph(forward, self.pool)
        owner.graphs += 1
        self.made, self.released = next(owner.clock), math.inf
        self.when = owner.forwards
        self.outputs = self.forward.kept
        self.storages: list[int] = []  # of what is kept
        self.dxs = 0  # how many of them are of gradients
        self._keep(self.outputs)
        self.differentiable = [is_tensor(t) and t.requires_grad for t in live.outputs]
        self.graded = graded if any(self.differentiable) else []
        self.number = 0  # of the last turn
        self.backward: Graph | None = None
        self.live = live if self.graded else None  # until the backward is recorded
        self.others = set(layer.others)
        self.gradients_kept: list[Tensor | None] = []
        self.lenders: list[Graph | None] = []  # of each dY that is read where another graph puts it
        self.held: list[int] = []  # references to what is kept that are its own
        self.rereads = False  # whether the backward reads outputs, which must stay as they are

    def references(self) -> list[int]:
        """To the memory of each tensor that is kept."""
        return list(map(torch._C._storage_Use_Count, self.storages))

    def _keep(self, tensors: Sequence[Any]) -> None:
        self.storages += [t.untyped_storage()._cdata for t in tensors if is_tensor(t)]

    def reads(self, args: tuple[Any, ...]) -> bool:
        """Whether the arguments are where the graphs read them."""
        return all(args[i].data_ptr() == place for i, place in self.fixed)

    def is_free(self, args: tuple[Any, ...]) -> bool:
        """Whether a replay writes to nothing that is still needed."""
        owner, pool = self.owner, self.pool
        last, released = owner.busy.get(pool, (-1, math.inf))
        if not last < self.made < released:  # perhaps because of what has been
            turns = [t.record for t in owner.pending if t.record.pool == pool]
            held = [r for r in owner.records_made() if r.pool == pool and r.is_held()]
            last = max((r.made for r in turns + held), default=-1)
            released = min((r.released for r in turns), default=math.inf)
            owner.busy[pool] = (last, released)
            if not last < self.made < released:
                return False
        for buffer, _ in self._stale(args):
            if any(buffer in turn.record.buffers for turn in owner.pending):
                return False
        return not self.is_held()

    def is_held(self, dx: bool = False) -> bool:
        """Whether somebody has what it gave, or of that the gradients."""
        held = map(operator.gt, self.references(), self.held)
        return any(itertools.islice(held, len(self.storages) - self.dxs, None) if dx else held)

    def run(self, args: tuple[Any, ...]) -> Sequence[Any]:
        self.owner.replays += 1
        if self.graded:
            return _Node.apply(self, args, *[args[i] for i in self.graded])
        return self.play(args)

    def play(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for buffer, t in self._stale(args):
            buffer.fill(t, self.owner.forwards)
        for buffer in self.buffers:
            buffer.readers.add(self.made)
        self.seeds.draw()
        self.forward.replay()
        last, released = self.owner.busy.get(self.pool, (-1, math.inf))
        self.owner.busy[self.pool] = (max(last, self.made), released)
        return tuple(t.data if is_tensor(t) else t for t in self.outputs)

    def _buffer(self, t: Tensor) -> _Buffer:
        """The one that holds t, or a new one."""
        for buffer in self.owner.buffers:
            if buffer.holds(t, self.owner.forwards):
                return buffer
        buffer = _Buffer(t)
        self.owner.buffers.add(buffer)
        return buffer

    def _stale(self, args: tuple[Any, ...]) -> list[tuple[_Buffer, Tensor]]:
        """Buffers that have to be filled, and with what."""
        forward, pairs = self.owner.forwards, zip(self.buffers, self.copied)
        return [
            (buffer, args[i]) for buffer, i in pairs
            if self.made in buffer.readers or not buffer.holds(args[i], forward)
        ]  # fmt: skip

    def begin(self) -> _Turn:
        self.number += 1
        turn = _Turn(self, self.number)
        self.owner.pending.add(turn)
        last, released = self.owner.busy[self.pool]
        self.owner.busy[self.pool] = (last, min(released, self.released))
        return turn

    def end(self, turn: _Turn, dys: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the inputs that have one.

        Raises:
            RuntimeError: they were taken before, so that the memory is no longer this turn's.
        """
        if turn not in self.owner.pending or turn.number != self.number:
            raise RuntimeError(
                "a second backward through a layer that accelerate(compile='reduce-overhead') "
                "compiled, whose memory the first has given back; use compile='default' for it"
            )
        self.owner.pending.discard(turn)
        dys = [dy for dy, has in zip(dys, self.differentiable) if has]
        if self.backward is None:
            before = self.references()
            try:
                self._record_backward(dys)
            except Exception as e:
                self.owner.give_up(e)
                raise
            after = self.references()
            gone = map(operator.sub, before, after)  # with the graph of autograd
            self.held = [*map(operator.sub, self.held, gone), *after[len(before) :]]
        borrowed = []
        for buffer, dy, lender in zip(self.buffers_of_dy, dys, self.lenders):
            if dy is not None and lies(dy) == lies(buffer):
                continue
            if lender is not None:  # somebody may hold what is there
                borrowed.append((buffer, buffer.clone()))
            buffer.zero_() if dy is None else buffer.copy_(dy)
        borrowed += [(t, t.clone()) for t in self._dx_written_over()]
        self.backward.replay()
        kept = (None if g is None else g.data for g in self.gradients_kept)
        copied = iter(copies(self.gradients_copied))
        for t, before in borrowed:
            t.copy_(before)
        return [next(kept if i in self.others else copied) for i in self.graded]

    def _dx_written_over(self) -> list[Tensor]:
        """What somebody has of backwards that were recorded later."""
        owner, written = self.owner, []
        if owner.given > self.released:
            held = [r for r in owner.records_made() if r.released < math.inf and r.is_held(dx=True)]
            owner.given = max((r.released for r in held), default=-1.0)
            later = [r for r in held if r.released > self.released]
            written = [t for r in later for t in r.gradients_kept if is_tensor(t)]
        owner.given = max(owner.given, self.released)
        return written

    def _record_backward(self, given: Sequence[Tensor | None]) -> None:
        live, places = self.live, self.owner.places_of_dx
        self.live = None
        wanted = [t for t, has in zip(live.outputs, self.differentiable) if has]
        alike = [dy is not None and dy.stride() == t.stride() for dy, t in zip(given, wanted)]
        self.lenders = [places.get(dy.data_ptr()) if a else None for dy, a in zip(given, alike)]
        self.buffers_of_dy = [
            empty_like(t) if lender is None else view(dy)
            for t, dy, lender in zip(wanted, given, self.lenders)
        ]
        dys = [view(t) for t in self.buffers_of_dy]
        del given, wanted

        def backward() -> tuple[Sequence[Any], Sequence[Any]]:
            outputs = [t for t, has in zip(live.outputs, self.differentiable) if has]
            inputs = [live.inputs[i] for i in self.graded]
            found = torch.autograd.grad(outputs, inputs, dys, allow_unused=True)
            kept = apart([g for i, g in zip(self.graded, found) if i in self.others], dys)
            return kept, [g for i, g in zip(self.graded, found) if i not in self.others]

        graph = Graph(backward, self.owner.pools()[1])
        self.owner.graphs += 1
        self.gradients_kept = graph.kept
        self.dxs = -len(self.storages)
        self._keep(graph.kept)
        self.dxs += len(self.storages)
        places.update({t.data_ptr(): graph for t in graph.kept if is_tensor(t)})
        self.gradients_copied = graph.lent
        self.backward, self.released = graph, next(self.owner.clock)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, args: tuple[Any, ...], *graded: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        outputs = record.play(args)
        again = [t for t in outputs if is_tensor(t)] if record.rereads else []
        ctx.save_for_backward(*[args[i] for i in record.kept], *again)
        ctx.turn = record.begin()
        ctx.mark_non_differentiable(
            *(t for t, has in zip(outputs, record.differentiable)
              if not has and is_tensor(t))
        )  # fmt: skip
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        _ = ctx.saved_tensors  # none was written to
        return None, None, *ctx.turn.record.end(ctx.turn, dys)


def _all_here(args: Sequence[Any]) -> bool:
    """Whether all are plain tensors of the current device."""
    return all(
        type(a) in (Tensor, nn.Parameter) and a.layout is torch.strided and not a.is_inference()
        for a in args
    ) and {a.device for a in args} == {current_device()}  # fmt: skip


def _records_now() -> bool:
    """Not into somebody's graph, nor where hooks decide what is saved for a backward (a checkpoint
    that is not reentrant, or an offload): they would not see what stays inside."""
    if torch.is_inference_mode_enabled():
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None
