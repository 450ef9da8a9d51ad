"""Groups of LoRA layers that are called with one x: q, k, v or gate, up.

The first member that is called computes the others with it, in one `lora_linear_group`; each of
them takes its output when it is called. (Few rows of 16 bit on a GPU are left alone: plan d would
share nothing.) Nothing is trusted: the output is handed over only if x is
the same tensor, unchanged, and the modes and the member's own state are as they were. Otherwise the
member computes alone. So siblings are backpropagated together: a backward through one of them alone
frees what the others saved, unless it retains the graph.

An output that nobody took is dropped when the forward of the layers' parent ends, by an exception
or without, and if that was not called, at the next call in the group. Without an exception the
member that computed it stops doing so: from its next call on, but never within a backward, where a
checkpoint recomputes a forward and has to find the same decisions. (Two forwards before one
backward, checkpointed, in a model whose first forward drops outputs: the second decides anew, and
PyTorch refuses to recompute the first. Attention that is seen to take two inputs is therefore
grouped without q from the start.)
"""

import contextlib
import functools
import inspect
import operator
import weakref
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lorapar.calls import Call, call_of
from lorapar_kernels import Projection, lora_linear_group

GROUP = "_lorapar_group"  # attribute of a served layer: its group and its place there
HOOK = "lorapar.groups"  # one key for all parents, so that compiled layers of one kind are alike

# Children of one module that take one x. Rows of three are attention, its query first.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, OPT, BART, Whisper, CLIP
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("wq", "wk", "wv"),  # Llama's own code
    ("to_q", "to_k", "to_v"),  # diffusers
    ("gate_proj", "up_proj"),  # Llama, Qwen, Mistral, Gemma
    ("w1", "w3"),  # Mixtral, Llama's own code
    ("wi_0", "wi_1"),  # T5 v1.1
    ("fc_gate", "fc_up"),
)
# Parameters of an attention's forward from which k and v may be made instead of x.
_SECOND_INPUTS = frozenset(
    ("key_value_states", "encoder_hidden_states", "cross_attention_states", "context", "memory",
     "key", "key_states")
)  # fmt: skip


class Group:
    """The siblings of one parent, and the outputs that wait for them.

    A layer refers to its group and its place in it; the group finds its layers as children of the
    parent, which it refers to weakly. A layer that was replaced there, or wrapped (by FSDP 1 or a
    checkpoint), is no member.
    """

    def __init__(self, parent: nn.Module | None, names: list[str]):
        size, self.names = len(names), names
        self.parent = (lambda: None) if parent is None else weakref.ref(parent)
        self.ahead = [tuple(j for j in range(size) if j != i) for i in range(size)]
        self.unused: list[set[int]] = [set() for _ in range(size)]  # of `ahead`, to be left out
        # (place of the first, x, modes, place → (its call, versions, y), made in a backward)
        self.pending: tuple | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        """The group of the parent's copy; of a layer copied alone, one that has no members."""
        return Group(memo.get(id(self.parent())), self.names)

    def member(self, place: int) -> nn.Module | None:
        """The layer there, if it is still a child of the parent, and of this group."""
        parent = self.parent()
        layer = None if parent is None else parent._modules.get(self.names[place])
        link = None if layer is None else layer.__dict__.get(GROUP)
        return layer if link is not None and link[0] is self else None

    def output(self, place: int, layer: nn.Module, x: Tensor, call: Call) -> Tensor | None:
        """The layer's y [..., N], taken from an earlier call or made with those of others.

        None: the layer has to compute alone.
        """
        if self.member(place) is not layer or layer._compiled_call_impl is not None:
            return None
        modes = _modes(x)
        if modes is None:
            self.pending = None
            return None
        pending = self.pending  # read once: another thread may use the same model
        if pending is not None:
            first, seen, seen_modes, waiting, _ = pending
            if x is seen and modes == seen_modes and place != first:
                if (taken := waiting.pop(place, None)) is None:  # left out, or already taken
                    return None
                made, versions, y = taken
                if not waiting and self.pending is pending:
                    self.pending = None
                same = all(map(operator.is_, made, call)) and versions == _versions(call)
                return y if same else None
            self.drop()
        return self._lead(place, x, call, modes)

    def skip(self, place: int) -> None:
        """The layer was called and computes alone: what waits for it is dropped."""
        if (pending := self.pending) is not None:
            first, *_, waiting, _ = pending
            waiting.pop(place, None)
            if place == first or not waiting:
                self.pending = None

    def drop(self) -> None:
        """Nobody takes what still waits: it is dropped, and not computed ahead again."""
        if (pending := self.pending) is not None:
            first, *_, waiting, recomputed = pending
            if not recomputed:
                self.unused[first].update(waiting)
            self.pending = None

    def _lead(self, place: int, x: Tensor, call: Call, modes: tuple) -> Tensor | None:
        recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self.unused[place] and not recomputed:
            self.ahead[place] = tuple(j for j in self.ahead[place] if j not in self.unused[place])
            self.unused[place].clear()
        calls = {place: call}
        for other in self.ahead[place]:
            layer = self.member(other)
            its = None if layer is None or _prepares(layer) else call_of(layer, x.device)
            if its is not None and _together(call, its, x):
                calls[other] = its
        if len(calls) == 1:
            return None
        projections = [
            Projection(c.weight, c.lora_a, c.lora_b, c.scale, c.whole_bias(), c.mask, c.sums)
            for c in calls.values()
        ]
        outputs = lora_linear_group(x, projections, dropout_p=call.dropout_p)
        waiting = {
            other: (its, _versions(its), y)
            for (other, its), y in zip(calls.items(), outputs)
            if other != place
        }
        self.pending = (place, x, modes, waiting, recomputed)
        return outputs[0]


def make_groups(model: nn.Module, layers: list[lora.Linear]) -> list[list[lora.Linear]]:
    """Links those of `layers` that are siblings, in place of any earlier links."""
    unlink(model)
    groups, free = [], set(layers)
    for parent in model.modules():
        if type(parent).forward is nn.Module.forward:  # a ModuleDict: it is never called
            continue
        for names in SIBLINGS:
            if len(names) == 3 and _takes_two_inputs(type(parent)):
                names = names[1:]
            by_width: dict[int, list[lora.Linear]] = {}
            names_of = {parent._modules.get(name): name for name in names}
            for layer in names_of:
                if layer in free:
                    free.remove(layer)
                    by_width.setdefault(layer.in_features, []).append(layer)
            made = [members for members in by_width.values() if len(members) > 1]
            for members in made:
                group = Group(parent, [names_of[layer] for layer in members])
                for place, layer in enumerate(members):
                    layer.__dict__[GROUP] = (group, place)
            if made:
                parent._forward_hooks[HOOK] = _release
                parent._forward_hooks_always_called[HOOK] = True
            groups += made
    return groups


def unlink(model: nn.Module) -> None:
    """Takes all links, and the hooks on the parents, away."""
    for module in model.modules():
        module.__dict__.pop(GROUP, None)
        _unhook(module)


def _unhook(parent: nn.Module) -> None:
    parent._forward_hooks.pop(HOOK, None)
    parent._forward_hooks_always_called.pop(HOOK, None)


class _Release:
    """Forward hook of a parent: nothing waits for a member any longer.

    In a pickle it is a hook of the standard library that does nothing: models are to be loaded
    where this package is not.
    """

    def __call__(self, parent: nn.Module, args: tuple, output: Any) -> None:
        members = [c for c in parent._modules.values() if c is not None and GROUP in c.__dict__]
        for child in members:
            group, _ = child.__dict__[GROUP]
            if output is None:  # an exception: it may be taken the next time
                group.pending = None
            else:
                group.drop()
        if not members and not torch.compiler.is_compiling():  # unloaded by PEFT
            _unhook(parent)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Release":
        return self

    def __reduce__(self) -> tuple:
        return getattr, (contextlib.nullcontext(), "__exit__")


_release = _Release()


def _prepares(layer: nn.Module) -> bool:
    """Whether something happens before the layer's forward that may be what makes its weights
    ready, or that its gradients wait for: FSDP's hooks on a unit of its own, say. Or whether the
    layer is compiled alone: then no version tells it of writes to x."""
    return (
        bool(layer._forward_pre_hooks)
        or "forward" in layer.__dict__
        or layer._compiled_call_impl is not None
    )


@functools.cache
def _takes_two_inputs(kind: type[nn.Module]) -> bool:
    try:
        return not _SECOND_INPUTS.isdisjoint(inspect.signature(kind.forward).parameters)
    except (TypeError, ValueError):  # no signature to be had
        return False


def _modes(x: Tensor) -> tuple | None:
    """All that a call depends on besides the identity of x and its layer; None: do not group.

    `x._version` tells of writes to x, but breaks a graph that is being compiled, and inference
    tensors have none.
    """
    version = hooks = None
    if not torch.compiler.is_compiling():
        if torch.is_inference_mode_enabled() or x.is_inference():
            return None
        version = x._version
        # What saves and recomputes: a checkpoint around k alone has to save what k's backward needs
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return version, x.requires_grad, torch.is_grad_enabled(), autocast, _stream(x), hooks


def _stream(x: Tensor) -> int | None:
    """What is made on one CUDA stream is not ready on another."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def _trains(call: Call) -> bool:
    tensors = (call.lora_a, call.lora_b, call.lora_bias, call.bias)
    return any(t is not None and t.requires_grad for t in tensors)


def _versions(call: Call) -> tuple[int, ...] | None:
    if torch.compiler.is_compiling():
        return None
    tensors = (call.lora_a, call.lora_b, call.lora_bias)
    try:
        return tuple(t._version for t in tensors if t is not None)
    except RuntimeError:  # loaded in inference mode: nothing counts writes
        return None


def _together(one: Call, other: Call, x: Tensor) -> bool:
    """Whether `lora_linear_group` can compute both."""
    return (
        (x.requires_grad or _trains(one) == _trains(other))
        and other.weight is not None
        and other.dropout_p == one.dropout_p
        and other.training == one.training
        and (other.sums is None) == (one.sums is None)
        and other.weight.dtype == one.weight.dtype
        and other.weight.device == one.weight.device
    )
