"""Shortcuts past dynamo to a layer's record, for calls that dynamo would send there.

In each call of a compiled layer dynamo checks some hundred guards in Python's objects, wraps the
call and makes the layer's result. For a layer that replays a graph this costs more than the rest.
A shortcut remembers what one such call was made of: which arguments and parameters went to the
record, and which of its outputs came back.

A shortcut is taken only where the guards would hold. They read three kinds of things:
- What layers of a kind share: globals, classes, functions. In each forward of the model, and each
  backward that recomputes some, the first call of a compiled function goes through dynamo. Only
  then, and if dynamo still chooses this function, later layers may take shortcuts to it.
- The layer. All that is reachable from it is walked once and remembered, each object by identity;
  the extension compares all of it in each call (csrc/state.cpp), tensors with where they are. A
  layer with anything whose state cannot be seen has no shortcuts.
- The call: arguments, modes of PyTorch. They are compared.

What dynamo would do besides running the function must be nothing. It says itself, when it compiles,
whether it breaks the graph, what it writes to, which may only be our groups of layers, and whether
it reads a tensor of a global or a gradient. The layer has to be the same after a call as before.

A layer's shortcuts hold what they compare. They are part of what stands in place of the layer's
call, and go with it.
"""

import enum
import functools
import itertools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorapar.groups import GROUP
from lorapar_kernels import extension
from lorapar_kernels.plan import Slot

_MOST_ENTRIES = 20000  # of what is walked
_MOST_KNOWN = 16  # shortcuts of one layer: shapes, modes, adapters
_UNUSED = 64  # forwards of whole models, then a shortcut is forgotten, and what it holds
_FREE, _PER_LEARNT = 12, 32  # to learn costs as much as some 32 that are taken spare
_CALL = "_compiled_call_impl"
_TENSORS_AT = 6  # place in a plan
_TENSORS = (Tensor, nn.Parameter)

# Attributes of nn.Module that only saving and loading reads.
_UNREAD = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
           "_load_state_dict_post_hooks")  # fmt: skip
_CONSTANTS = (type(None), bool, int, str, float)
_LEAVES = frozenset(
    (*_CONSTANTS, complex, bytes, range, torch.dtype, torch.device, torch.layout, torch.Size,
     torch.memory_format, types.ModuleType, type(NotImplemented), Slot)
)  # fmt: skip
_BUILT_IN = (dict, OrderedDict, list, set, tuple, frozenset, object)
_HEAP, _IMMUTABLE = 1 << 9, 1 << 8  # flags of types
_HASHED = frozenset((str, int, bool, float, bytes, type(None)))  # by C alone


def whole_code() -> types.CodeType | None:
    """The code that dynamo compiles now, if all of it becomes this one graph, which is all that the
    code does and reads none of what is not compared; else None."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        effects, root = output.side_effects, output.root_tx
        if output.compile_subgraph_reason.graph_break or output.random_calls or root.debug_locals:
            return None
        if effects.tensor_hooks or effects.save_for_backward:
            return None
        for variable in effects.id_to_variable.values():
            kind = type(variable.mutation_type).__name__
            if kind in ("NoneType", "AttributeMutationNew", "ValueMutationNew"):
                continue  # of no object that was there before
            if effects.is_modified(variable) and GROUP not in variable.source.name:
                return None
        if any("G[" in arg.source.name for arg in output.graphargs):
            return None  # a tensor of a global, which may be another one in the next call
        if any(guard.originating_source.name.endswith(".grad") for guard in output.guards):
            return None
        return root.f_code
    except Exception:  # another version of PyTorch: nothing is known
        return None


class Shortcuts:
    """Those of one layer."""

    def __init__(self, recorder: Any, layer: nn.Module, code: types.CodeType):
        self.recorder, self.layer, self.code = recorder, layer, code
        self.known: list[_Shortcut] = []
        self.learnt = self.taken = 0
        self.replayed = False  # the last call through dynamo

    def call(self, through: Callable[[], Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What `through`, the call of the compiled function, gives."""
        recorder, module = self.recorder, extension.module
        moment = recorder.moment()
        if moment is None or not hasattr(module, "same_state") or not recorder.records():
            return through()
        call = _Call(args, kwargs)
        if not call.plain or not _plain_modes():
            return through()
        for shortcut in self.known:
            if shortcut.serves(module, moment, call) and recorder.here():
                self.taken += 1
                shortcut.used = recorder.forwards
                return shortcut.take(call)
        self.known = [s for s in self.known if recorder.forwards - s.used < _UNUSED]
        replays, recorder.watched = recorder.replays, []
        try:
            if (
                self.replayed
                and self.learnt < _FREE + self.taken // _PER_LEARNT
                and recorder.confirmed(self.code, moment)
            ):
                return self._learn(module, through, call)
            return through()
        finally:
            self.replayed, recorder.watched = recorder.replays == replays + 1, None

    def _learn(self, module: Any, through: Callable[[], Any], call: "_Call") -> Any:
        self.learnt += 1
        states = (s.state for s in self.known if module.same_state(s.state))
        state = next(states, None) or _walk(module, self.layer)
        modes, replays = torch._C._dynamo.guards.GlobalStateGuard(), self.recorder.replays
        result = through()
        watched = self.recorder.watched
        if state is None or self.recorder.replays != replays + 1 or len(watched) != 1:
            return result
        function, layer, flat, outs = watched[0]
        if function.code is not self.code or not modes.check() or not module.same_state(state):
            return result
        inputs = _inputs(module, call, flat, state)
        outputs = _outputs(result, outs)
        if inputs is not None and outputs is not None:
            new = _Shortcut(function, layer, state, modes, call, inputs, outputs)
            new.used = self.recorder.forwards
            now = set(map(id, state[_TENSORS_AT]))  # others have been replaced, and may go
            known = [s for s in self.known if now.issuperset(map(id, s.state[_TENSORS_AT]))]
            self.known = [new, *known][:_MOST_KNOWN]
        return result


class _Call:
    """The arguments of one call.

    Attributes:
        plain: whether they are tensors and constants, in tuples or not.
        tensors: in order.
        rest: all but the tensors.
    """

    __slots__ = ("plain", "rest", "tensors")

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.tensors: list[Tensor] = []
        self.rest: list[Any] = []
        self.plain = self._add(args)
        for key, value in kwargs.items():
            self.rest.append(key)
            self.plain = self.plain and self._add((value,))

    def _add(self, values: tuple) -> bool:
        rest = self.rest
        rest.append(len(values))
        for value in values:
            kind = type(value)
            rest.append(kind)
            if kind is Tensor:
                self.tensors.append(value)
            elif kind is float:
                rest.append(value.hex())  # signs of zeros differ
            elif kind in _CONSTANTS:
                rest.append(value)
            elif kind is not tuple or not self._add(value):
                return False
        return True


class _Shortcut:
    """From calls like one that was seen to the record that it replayed."""

    def __init__(
        self,
        function: Any,
        layer: Any,
        state: tuple,
        modes: Any,
        call: _Call,
        inputs: "_Inputs",
        outputs: tuple,
    ):
        self.function, self.record_of = weakref.ref(function), weakref.ref(layer)
        self.state, self.modes, self.rest = state, modes, call.rest
        self.inputs, self.outputs = inputs, outputs
        self.used = 0  # last, in which forward

    def serves(self, module: Any, moment: Any, call: _Call) -> bool:
        function, inputs = self.function(), self.inputs
        return (
            function is not None
            and function.confirmed == moment
            and self.record_of() is not None
            and call.rest == self.rest
            and self.modes.check()
            and module.same_tensors(tuple(call.tensors), inputs.descriptions)
            and inputs.fixed.isdisjoint(map(id, call.tensors))
            and not any(t.__dict__ for t in call.tensors)
            and module.same_state(self.state)
        )

    def take(self, call: _Call) -> Any:
        flat = self.inputs.flat.copy()
        for i, at in self.inputs.places:
            flat[i] = call.tensors[at]
        layer = self.record_of()
        layer.owner.shortcuts += 1
        outs = layer.call(tuple(flat))
        kind, places = self.outputs
        if kind is None:
            return outs[places[0]]
        return kind([None if i is None else outs[i] for i in places])


class _Inputs:
    """Where the function's flat arguments come from."""

    def __init__(self, flat: list, places: list[tuple[int, int]], descriptions: tuple):
        self.flat, self.places, self.descriptions = flat, places, descriptions
        self.fixed = {id(t) for t in flat if t is not None}


def _inputs(module: Any, call: _Call, flat: tuple, state: tuple) -> _Inputs | None:
    """None: a flat argument is not to be found, or arguments of the call share memory."""
    tensors = tuple(call.tensors)
    descriptions = tuple(module.describe(t, False) for t in tensors)
    if None in descriptions or not module.same_tensors(tensors, descriptions):
        return None
    at = {id(t): i for i, t in enumerate(tensors)}
    held = set(map(id, state[_TENSORS_AT]))
    if not held.isdisjoint(at) or any(id(t) not in at and id(t) not in held for t in flat):
        return None
    if any(t.__dict__ for t in tensors):
        return None
    places = [(i, at[id(t)]) for i, t in enumerate(flat) if id(t) in at]
    return _Inputs([None if id(t) in at else t for t in flat], places, descriptions)


def _outputs(result: Any, outs: Any) -> tuple | None:
    """Kind of the result, None for a tensor, and which outputs it is made of."""
    at = {id(t): i for i, t in enumerate(outs) if isinstance(t, Tensor)}
    if type(result) is Tensor:
        return (None, [at[id(result)]]) if id(result) in at else None
    if type(result) not in (tuple, list):
        return None
    if any(t is not None and id(t) not in at for t in result):
        return None
    return type(result), [None if t is None else at[id(t)] for t in result]


def _plain_modes() -> bool:
    """Whether nothing looks at operations or changes them, and nobody compiles."""
    return (
        torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._dynamo.eval_frame.get_eval_frame_callback() is None
    )


# What is reachable from a layer -------------------------------------------------------------------


class _Unseen(Exception):
    """Something has state that cannot be seen, or there is too much."""


def _walk(module: Any, layer: nn.Module) -> tuple | None:
    """A plan for `same_state` of the extension; None where there can be none."""
    walk = _Walk()
    own = layer.__dict__.get(_CALL)
    if own is not None:
        walk.seen[id(own)] = own  # not looked into
    try:
        walk.run(layer)
        return walk.plan(module)
    except _Unseen:
        return None


class _Walk:
    def __init__(self):
        self.seen: dict[int, Any] = {}
        self.left: list[Any] = []
        self.entries = 0
        self.unread: set[int] = set()  # dicts that no forward reads
        self.objects: list[Any] = []
        self.dicts: list[Any] = []
        self.lists: list[Any] = []
        self.sets: list[Any] = []
        self.cells: list[Any] = []
        self.functions: list[Any] = []
        self.tensors: list[Tensor] = []
        self.weak: list[weakref.ref] = []

    def run(self, layer: nn.Module) -> None:
        self._reach((layer,))
        while self.left:
            self._look(self.left.pop())
        for ref in self.weak:  # what one refers to is seen, and held
            of = ref()
            if of is not None and id(of) not in self.seen and not _is_leaf(of):
                raise _Unseen

    def plan(self, module: Any) -> tuple:
        tensors = tuple(self.tensors)
        descriptions = tuple(module.describe(t, True) for t in tensors)
        if None in descriptions:
            raise _Unseen
        some = (self.objects, self.dicts, self.lists, self.sets, self.cells, self.functions)
        return (*map(tuple, some), tensors, descriptions, bytearray(4 * len(self.dicts)))

    def _reach(self, values: Any) -> None:
        for value in values:
            self.entries += 1
            if id(value) not in self.seen and not _is_leaf(value):
                self.seen[id(value)] = value
                self.left.append(value)
        if self.entries > _MOST_ENTRIES:
            raise _Unseen

    def _look(self, value: Any) -> None:
        kind = type(value)
        if kind is types.FunctionType:
            self._function(value)
        elif kind is types.BuiltinFunctionType:
            self._reach((value.__self__,))
        elif kind is types.MethodType:
            self._reach((value.__self__, value.__func__))
        elif kind is functools.partial:
            self._reach((value.func, value.args, value.keywords))
            self._object(value)
        elif kind is types.CellType:
            self._cell(value)
        elif kind is weakref.ref:
            self.weak.append(value)
        elif isinstance(value, Tensor):
            if kind not in _TENSORS:
                raise _Unseen
            self.tensors.append(value)
            self._object(value)
        else:
            self._container(value, _built_in(kind))

    def _container(self, value: Any, base: type) -> None:
        if base in (dict, OrderedDict):
            if id(value) in self.unread:
                return
            if base is OrderedDict and len(value) > 1:
                raise _Unseen  # their order is not that of a dict
            items = tuple(itertools.chain.from_iterable(dict.items(value)))
            self.dicts += (value, items)
            self._reach(items)
        elif base is list:
            items = tuple(list.__iter__(value))
            self.lists += (value, items)
            self._reach(items)
        elif base in (set, frozenset):
            items = tuple(base.__iter__(value))
            if not all(type(item) in _HASHED for item in items):
                raise _Unseen
            if base is set:
                self.sets += (value, items)
        elif base is tuple:
            self._reach(tuple.__iter__(value))
        elif not hasattr(value, "__dict__"):
            raise _Unseen
        if type(value) is not base:
            self._object(value)

    def _object(self, value: Any) -> None:
        """Its type and, if it has one, its `__dict__`."""
        state = _state_of(value)
        if isinstance(value, nn.Module):
            self.unread.update(id(state.get(name)) for name in _UNREAD)
        self.objects += (value, type(value), state)
        if state is not None:
            self._reach((state,))

    def _function(self, function: types.FunctionType) -> None:
        made_of = (function.__code__, function.__defaults__, function.__kwdefaults__)
        self.functions += (function, *made_of)
        self._reach((*made_of[1:], *(function.__closure__ or ())))
        self._object(function)

    def _cell(self, cell: types.CellType) -> None:
        try:
            contents = cell.cell_contents
        except ValueError:  # it is empty
            raise _Unseen from None
        self.cells += (cell, contents)
        self._reach((contents,))


def _is_leaf(value: Any) -> bool:
    return type(value) in _LEAVES or issubclass(type(value), (type, enum.Enum))


def _state_of(value: Any) -> dict[str, Any] | None:
    """The very `__dict__`, whatever a class makes of that name."""
    for cls in type(value).__mro__:
        found = cls.__dict__.get("__dict__")
        if isinstance(found, types.GetSetDescriptorType):
            state = found.__get__(value)
            if type(state) is not dict:
                raise _Unseen
            return state
    return None


def _built_in(kind: type) -> type:
    """The built-in type that instances are made of, if Python's classes add attributes alone."""
    base = kind
    while base not in _BUILT_IN:
        flags = base.__flags__
        if not flags & _HEAP or flags & _IMMUTABLE or base.__dict__.get("__slots__"):
            raise _Unseen
        base = base.__base__
    if (
        kind is object or kind.__basicsize__ - base.__basicsize__ > 16
    ):  # __dict__ and weak references
        raise _Unseen
    return base
