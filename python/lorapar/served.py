"""PEFT's LoRA layer classes with a forward that runs in lorapar_kernels.

Each class that PEFT has for a kind of base layer gets one subclass, made when first met, since most
of them exist only beside the library that quantises the base. It overrides `forward`; whether a
call is served is decided in that call, and every other call goes to PEFT.
"""

import copy
import copyreg
import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from lorapar.calls import COPY, MASKS, SUMS, ZEROED, Call, adapter_of, call_of, serves_now, why_not
from lorapar.groups import GROUP
from lorapar_kernels import decode, extension, few_rows, lora_add, lora_linear
from lorapar_kernels.plan import Plan, Slot, planned

PLAN = "_lorapar_plan"  # a Slot: what the last call was made of, for the next
ATTRIBUTES = (MASKS, ZEROED, SUMS, GROUP, COPY, PLAN)  # all that a layer has beside PEFT's own
# PEFT's layers over one linear base. All but the first leave the base's output to the base layer.
SERVED = frozenset(
    f"peft.tuners.lora.{name}"
    for name in (
        "layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt", "gptq.GPTQLoraLinear",
        "awq.AwqLoraLinear", "eetq.EetqLoraLinear", "aqlm.AqlmLoraLinear", "hqq.HqqLoraLinear",
        "inc.IncLoraLinear", "torchao.TorchaoLoraLinear", "te.TeLinear",
    )
)  # fmt: skip


# Where PEFT's own path is the faster one, measured by benchmarks/bench_bases.py, and why.
_SLOWER = {
    "Linear8bitLt": "bitsandbytes' 8-bit layer waits for the GPU in every call, and after a wait "
    "PEFT's few operations are there sooner than kernels"
}


# What a plan looks at in a layer, in its modules, and of hooks.
_OWN = (
    "_modules", "_disable_adapters", "_active_adapter", "cast_input_dtype_enabled", "scaling",
    "lora_variant",
)  # fmt: skip
_MODULES = ("lora_A", "lora_B", "lora_dropout", "base_layer")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Served:
    """What the subclasses share. Their other base is PEFT's class."""

    slower: str | None = None  # why PEFT serves where there is neither a mask nor a score to keep

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        holds = False  # whether there is a plan, and no other is needed
        if not (torch.compiler.is_compiling() or args or kwargs):
            slot = self.__dict__.get(PLAN)
            if slot is not None and slot.plan is not None:
                y = planned(slot.plan, self.__dict__, x)
                if type(y) is not bool:
                    return y
                holds = y
                if not holds:  # what it holds is not kept longer
                    slot.plan = None
        if not isinstance(self, Served):  # restored, while a hook of accelerate holds this method
            return type(self).forward(self, x, *args, **kwargs)
        call = None if args or kwargs or not serves_now(x) else call_of(self, x.device)
        if self.slower and call is not None and call.mask is None and call.sums is None:
            call = None
        decodes = call is not None and decode.serves(x) and call.sums is None
        if decodes and call.weight is not None:
            adapter = (call.lora_a, call.lora_b, call.scale)
            y = decode.lora_decode(
                x, call.weight, *adapter, bias=call.whole_bias(), mask=call.mask,
                dropout_p=call.dropout_p,
            )  # fmt: skip
            if y is not None:
                if not holds:
                    _plan(self, call)
                return y
        if (link := self.__dict__.get(GROUP)) is not None:
            group, place = link
            if call is None or call.weight is None:
                group.skip(place)
            elif call.sums is None and few_rows.serves(x):  # by plan d, which shares nothing
                group.drop()
            elif (y := group.output(place, self, x, call)) is not None:
                return y
        if call is None:
            _check_left(self)
            return super().forward(x, *args, **kwargs)
        adapter = (call.lora_a, call.lora_b, call.scale)
        options = {"mask": call.mask, "dropout_p": call.dropout_p, "sums": call.sums}
        if call.weight is not None:
            if not holds and call.sums is None:
                _plan(self, call)
            return lora_linear(x, call.weight, *adapter, bias=call.whole_bias(), **options)
        base = self.base_layer(x)
        if not serves_now(base) or _mixes(base, x):
            _check_left(self)
            return super().forward(x)
        if decodes:
            y = decode.lora_decode(
                x, base, *adapter, mask=call.mask, dropout_p=call.dropout_p, owns_base=False
            )
            if y is not None:
                return y
        return lora_add(base, x, *adapter, **options)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        forget_copy(self)  # W is written through its `.data`, which no version counts
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        forget_copy(self)
        super().unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if (slot := self.__dict__.get(PLAN)) is not None:
            slot.plan = None
        self.__dict__.get(MASKS, {}).pop(adapter_name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        state = dict(self.__dict__)
        state.pop(ZEROED, None)  # the hooks that it stands for are not copied
        state.pop(PLAN, None)
        if COPY in state:
            state[COPY] = None
        made.__setstate__(copy.deepcopy(state, memo))
        return made

    def __reduce_ex__(self, protocol: int) -> tuple:
        """A pickle holds PEFT's own layer, unless a mask would be lost with that."""
        kind, state = peft_class(type(self)), dict(self.__dict__)
        masks = state.get(MASKS)
        for attribute in ATTRIBUTES:
            state.pop(attribute, None)
        if masks:
            return _new, (kind,), state | {MASKS: masks}
        return copyreg._reconstructor, (kind, object, None), state


def served_class(kind: type) -> type | None:
    """The subclass of PEFT's class `kind`, or None if there is none."""
    if issubclass(kind, Served):
        return kind
    return _make(kind) if f"{kind.__module__}.{kind.__qualname__}" in SERVED else None


def peft_class(kind: type) -> type:
    """The class that a served layer had before; FSDP's wrapping of it, where FSDP has wrapped it.

    Raises:
        TypeError: `kind` is a subclass of a served class that this package does not know.
    """
    if kind.__bases__[0] is Served:
        return kind.__bases__[1]
    if len(kind.__bases__) == 2 and issubclass(kind.__bases__[1], Served):  # FSDP 2 tags so
        return _tagged(kind)
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} is no class of lorapar's making")


def forget_copy(layer: nn.Module) -> None:
    """Drops the 16-bit copy of the base weight, if there is one."""
    if COPY in layer.__dict__:
        layer.__dict__[COPY] = None


def _plan(layer: nn.Module, call: Call) -> None:
    if not torch.compiler.is_compiling() and extension.serves():
        layer.__dict__.setdefault(PLAN, Slot()).plan = _plan_of(layer, call)


def _plan_of(layer: nn.Module, call: Call) -> Plan | None:
    """All that `call_of` and `serves_now` read of the layer and around it, to be found unchanged by
    `planned`; None for a layer that keeps some of it elsewhere."""
    state, adapter = layer.__dict__, adapter_of(layer)
    modules, active = state["_modules"], state.get("_active_adapter")
    if COPY in state or (isinstance(active, list) and len(active) != 1):
        return None
    containers = [modules[f"lora_{name}"] for name in ("A", "B", "dropout")]
    sides = [container._modules for container in containers]
    (a, b, dropout), base = (side[adapter] for side in sides), modules["base_layer"]
    parameters = [module._parameters for module in (base, a, b)]
    weights = (call.weight, call.lora_a, call.lora_b)
    if call.lora_bias is not None or call.bias is not parameters[0].get("bias"):
        return None
    if any(p.get("weight") is not w for p, w in zip(parameters, weights)):  # a copy in 16 bit, say
        return None
    same = [
        *((None, name, state.get(name)) for name in _OWN),
        *((modules, name, modules[name]) for name in _MODULES),
        *((side, adapter, side[adapter]) for side in (*sides, state["scaling"])),
        *((vars(of), "_modules", side) for of, side in zip(containers, sides)),
        *((vars(of), "_parameters", p) for of, p in zip((base, a, b), parameters)),
        *((p, "bias", None) for p in parameters[1:]),
        (vars(forward_ad), "_current_level", forward_ad._current_level),
    ]
    if isinstance(active, list):
        same.append((active, "", adapter))
    if type(dropout) is nn.Dropout:
        same += [(vars(dropout), name, vars(dropout)[name]) for name in ("training", "p")]
    absent = [(state["lora_variant"], adapter), (vars(base), "_hf_tp_plan")]
    absent += [(vars(module), "forward") for module in (a, b, base)]
    for name in (MASKS, SUMS):
        same += [(None, name, state[name])] if name in state else []
        absent += [] if name in state else [(None, name)]
    if (masks := state.get(MASKS)) is not None:
        same += [(masks, adapter, masks[adapter])] if adapter in masks else []
        absent += [] if adapter in masks else [(masks, adapter)]
    empty = [(vars(module), name) for module in (a, b, dropout, base) for name in _HOOKS]
    empty += [(None, "merged_adapters"), *((vars(module_hooks), f"_global{n}") for n in _HOOKS)]
    types = [(module, type(module)) for module in (a, b, dropout, base)]
    alone = [(None, GROUP), (None, COPY)]
    parts = (same, absent, empty, types, alone)
    flat = (tuple(itertools.chain.from_iterable(part)) for part in parts)
    return Plan(*flat, *parameters, call.scale, call.mask, call.dropout_p)


def _mixes(base: Tensor, x: Tensor) -> bool:
    """Whether fp16 and bf16 meet, which PEFT, by class and autocast, may add up in fp32."""
    kind = x.device.type
    other = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return torch.promote_types(base.dtype, other) not in (base.dtype, other)


def _check_left(layer: nn.Module) -> None:
    """Refuses to leave a call to PEFT that would give frozen elements gradients.

    Raises:
        RuntimeError: the layer has a mask, gradients are recorded, and nothing else zeroes them.
    """
    masks = layer.__dict__.get(MASKS)
    if not masks or ZEROED in layer.__dict__ or not torch.is_grad_enabled():
        return
    if layer.disable_adapters or layer.merged:
        return
    trained = [s[a].weight for a in layer.active_adapters if a in masks
               for s in (layer.lora_A, layer.lora_B)]  # fmt: skip
    if not any(t.requires_grad for t in trained):
        return
    reason = why_not(layer) or "of the way it is called (keywords, a transform, a global hook)"
    raise RuntimeError(
        f"a LoRA layer with a mask of adapter {', '.join(masks)} would be left to PEFT, which "
        f"gives frozen elements gradients, because {reason}; use LoraParCallback, which zeroes "
        f"them, run it under torch.no_grad(), or take the mask off by accelerate(model)"
    )


@functools.cache
def _make(kind: type) -> type:
    own = {"__module__": __name__, "__doc__": kind.__doc__, "slower": _SLOWER.get(kind.__name__)}
    return type(kind.__name__, (Served, kind), own)


@functools.cache
def _tagged(kind: type) -> type:
    tag, served = kind.__bases__
    return type(kind.__name__, (tag, peft_class(served)), dict(kind.__dict__))


def _new(kind: type) -> nn.Module:
    made = served_class(kind)
    return made.__new__(made)
