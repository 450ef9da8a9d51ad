"""Routes PEFT's LoRA layers through lorapar_kernels, and back.

`accelerate` changes the class of each of PEFT's LoRA layers over a linear base to a subclass of it
(`served`). Whether a call is served is decided in that call, from PEFT's state then; every other
call goes to PEFT. Nothing is added to the model's parameters or buffers.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from peft.tuners import lora
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorapar.calls import COPY, MASKS, ZEROED, adapter_of, owns_base, why_not
from lorapar.compiling import Compilation, compilation_of, compile_layers, uncompile
from lorapar.errors import UserError
from lorapar.groups import make_groups, unlink
from lorapar.partitioning import Partition
from lorapar.served import ATTRIBUTES, PLAN, Served, peft_class, served_class
from lorapar_kernels import LoraMask
from lorapar_kernels.plan import Slot

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class Report:
    """What `accelerate` did, layer by layer. Its text folds layers that differ in a number only.

    Attributes:
        served: layer → plan: `lora_linear_group` (several layers of one x at once), `lora_linear`,
            or `lora_add` (the base layer makes its own output).
        skipped: layer → the reason that PEFT serves it.
        groups: the layers of each group.
        again: how many of the served were patched before.
        copies_bytes: of the copies that `cache_base` may keep, made at the first use.
        compilation: what `compile` made: shapes, calls and memory as they are when it is read.
    """

    served: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    again: int = 0
    copies_bytes: int = 0
    compilation: Compilation | None = None

    def as_dict(self) -> dict[str, dict[str, str | None]]:
        """layer → {"plan": one of `served`'s or "peft", "reason": why PEFT, or None}."""
        served = {n: {"plan": plan, "reason": None} for n, plan in self.served.items()}
        return served | {n: {"plan": "peft", "reason": r} for n, r in self.skipped.items()}

    def __str__(self) -> str:
        total, grouped = len(self.served) + len(self.skipped), sum(map(len, self.groups))
        first = f"served {len(self.served)} of {total} LoRA layers"
        if self.groups:
            first += f", {grouped} of them in {len(self.groups)} groups"
        lines = [first]
        if self.again:
            lines.append(f"  {self.again} of them were patched before")
        added = [n for n, plan in self.served.items() if plan == "lora_add"]
        lines += [f"  added to the output of its base layer {n}" for n in _folded(added)]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [n for n, r in self.skipped.items() if r == reason]
            lines += [f"  left to PEFT {n}: {reason}" for n in _folded(names)]
        if self.copies_bytes:
            lines.append(
                f"  cache_base: 16-bit copies of the base weights, {self.copies_bytes / 2**30:.2f} "
                f"GiB when all are made"
            )
        if self.compilation:
            lines.append(f"  {self.compilation}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    mask: Partition | dict[str, LoraMask] | None = None,
    *,
    stage: str | None = None,
    cache_base: bool = False,
    compile: str | None = None,
    max_shapes: int = 4,
) -> Report:
    """Serves every LoRA layer it can with lorapar_kernels; leaves the rest to PEFT and says why.

    Layers of one x (q, k, v or gate, up) are served together but for few rows: see `groups`. Call
    it again for layers that PEFT injected since; those already patched stay as they are.

    Args:
        model: any model with PEFT LoRA layers. Changed in place; `restore` undoes it.
        mask: what may be updated: a `Partition` (with `stage`), or `LoraMask` by module name.
            A mask belongs to the adapter that is active now, and replaces an earlier one. None:
            everything trains, no mask.
        stage: `sft` or `rl`, which of the partition's masks.
        cache_base: under autocast with an fp32 base, keep a copy of each base weight in autocast's
            dtype (2 bytes an element) instead of casting it in every call. A copy is dropped when
            its weight changes; a write through `weight.data` is not seen, except PEFT's merging.
        compile: `reduce-overhead` compiles the model's decoder layers one by one and replays them
            as CUDA graphs, which makes steps of a few thousand tokens several times faster;
            `default` compiles them without graphs. None: not compiled.
        max_shapes: how many shapes [batch, tokens] may be compiled; calls of others run eagerly.
            `BucketCollator`, or `pad_to_multiple_of` of TRL's configs, makes few shapes of many.

    Returns:
        A `Report`: served layers first, then the reason for each one left.

    Raises:
        UserError: the model has no LoRA layers, the mask does not fit it (all misfits named), or
            the mask is for a layer left to PEFT, which would give frozen elements gradients.
        ValueError: compile is no mode of ours, or the model has no list of layers to compile.
    """
    report = route(model, mask, stage=stage, cache_base=cache_base)
    if compile is None:
        uncompile(model)
    else:
        report.compilation = compile_layers(model, compile, max_shapes)
    return report


def route(
    model: nn.Module,
    mask: Partition | dict[str, LoraMask] | None,
    *,
    stage: str | None,
    cache_base: bool | None = None,
    zeroed: bool = False,
) -> Report:
    """`accelerate`. `cache_base` None: as before, and so is what is compiled. `zeroed`: the caller
    zeroes the gradients of frozen elements, whoever makes them, so that a layer with a mask may be
    left to PEFT."""
    layers = lora_layers(model)
    if not layers:
        raise UserError(
            f"accelerate: {type(model).__name__} has no LoRA layers; wrap it with "
            f"peft.get_peft_model first"
        )
    masks = _masks_by_layer(layers, model, mask, stage)
    reasons = {n: _why_not_class(layer) or _why_not_later(layer) for n, layer in layers.items()}
    report = Report(skipped={n: reason for n, reason in reasons.items() if reason})
    if not zeroed and (unkept := [f"{n}: {reasons[n]}" for n in masks if n in report.skipped]):
        raise UserError(
            "accelerate: PEFT would give these layers gradients where their mask forbids; leave "
            "their masks out, or use LoraParCallback, which zeroes them:\n  " + "\n  ".join(unkept)
        )
    for name, layer in layers.items():
        if _why_not_class(layer):
            continue
        if name not in masks and (slower := served_class(type(layer)).slower):
            report.skipped.setdefault(name, slower)
        report.again += isinstance(layer, Served)
        layer.__class__ = served_class(type(layer))
        caches = COPY in layer.__dict__ if cache_base is None else cache_base
        for attribute in (MASKS, ZEROED, COPY):
            layer.__dict__.pop(attribute, None)
        layer.__dict__.setdefault(PLAN, Slot()).plan = None
        if name in masks:
            layer.__dict__[MASKS] = {adapter_of(layer): masks[name]}
            if zeroed:
                layer.__dict__[ZEROED] = True
        if name in report.skipped:
            continue
        owned = _owns_base(layer)
        report.served[name] = "lora_linear" if owned else "lora_add"
        if caches and owned and layer.base_layer.weight.element_size() == 4:
            layer.__dict__[COPY] = None
            report.copies_bytes += 2 * layer.base_layer.weight.numel()
    _group(model, layers, report)
    report.compilation = compilation_of(model)
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every layer is PEFT's own again. A model never patched is left alone."""
    uncompile(model)
    unlink(model)
    for layer in model.modules():
        if isinstance(layer, Served):
            layer.__class__ = peft_class(type(layer))
            for attribute in ATTRIBUTES:
                layer.__dict__.pop(attribute, None)


def lora_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    """PEFT's LoRA layers by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def why_left(layer: lora.LoraLayer) -> str | None:
    """The reason that PEFT serves this layer as things stand, or None."""
    return _why_not_class(layer) or why_not(layer)


def _why_not_class(layer: nn.Module) -> str | None:
    """A reason that the class cannot be swapped at all."""
    if isinstance(layer, Served):
        return None
    if served_class(type(layer)) is None:
        kind = type(layer)
        return f"it is a {kind.__module__}.{kind.__name__}, no LoRA layer over one linear layer"
    if type(layer.base_layer) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight and never calls it"
    if "forward" in layer.__dict__ or "_old_forward" in layer.__dict__:
        return "its forward was replaced on the instance (an accelerate hook, say)"
    return None


def _why_not_later(layer: lora.LoraLayer) -> str | None:
    """`why_not`, but for what passes by itself: adapters switched off, merged, or FSDP's shards."""
    return None if _sharded(layer) else why_not(layer, passing=True)


def _sharded(layer: lora.LoraLayer) -> bool:
    """Whether FSDP 2 holds the weights as shards between the layer's forwards."""
    return "_is_fsdp_managed_module" in layer.__dict__


def _owns_base(layer: lora.LoraLayer) -> bool:
    base = layer.base_layer
    return owns_base(base) or (_sharded(layer) and type(base) is nn.Linear)


def _group(model: nn.Module, layers: dict[str, lora.LoraLayer], report: Report) -> None:
    names = {m: n for n, m in layers.items() if isinstance(m, Served)}
    for members in make_groups(model, list(names)):
        together = [names[m] for m in members if report.served.get(names[m]) == "lora_linear"]
        if len(together) > 1:
            report.groups.append(together)
            report.served |= dict.fromkeys(together, "lora_linear_group")


def _folded(names: list[str]) -> list[str]:
    """The names, those that differ in numbers only as one, with their count."""
    counts = Counter(_LAYER_NUMBER.sub("*", name) for name in names)
    alone = {_LAYER_NUMBER.sub("*", name): name for name in names}
    return [alone[p] if n == 1 else f"{p} ({n} layers)" for p, n in counts.items()]


def _masks_by_layer(
    layers: dict[str, lora.LoraLayer], model: nn.Module, mask: Any, stage: str | None
) -> dict[str, LoraMask]:
    if mask is None:
        return {}
    if isinstance(mask, Partition):
        mask.check_model(model)
        masks = mask.layer_masks(model, stage)
    elif isinstance(mask, dict):
        masks = mask
    else:
        raise UserError(
            f"accelerate: mask must be a Partition or a dict of LoraMask by module name, got "
            f"{type(mask).__name__}"
        )
    problems = []
    for name, one in masks.items():
        layer = layers.get(name)
        adapter = None if layer is None else adapter_of(layer)
        if layer is None:
            problems.append(f"{name}: no such LoRA layer")
        elif not isinstance(one, LoraMask):
            problems.append(f"{name}: got a {type(one).__name__}, not a LoraMask")
        elif adapter is None:
            problems.append(f"{name}: it has no active adapter with a lora_A, or several")
        elif isinstance(mask, Partition) and adapter != "default":
            problems.append(f"{name}: a partition is of the adapter default; {adapter} is active")
        else:
            weights = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
            try:
                one.check(*weights)
                if one.live is not None:
                    whole = (w.full_tensor() if isinstance(w, DTensor) else w for w in weights)
                    one.to(weights[0].device).check_dead(*(w.detach() for w in whole))
            except ValueError as e:
                problems.append(f"{name}: {e}")
    if problems:
        raise UserError("accelerate: the masks do not fit the model:\n  " + "\n  ".join(problems))
    return masks
