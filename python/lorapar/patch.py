"""Routes PEFT's LoRA layers through lorapar_kernels, and back.

`accelerate` changes the class of each `peft.tuners.lora.Linear` to the subclass `Linear` below,
which overrides `forward` alone. Whether a call is served is decided in that call, from PEFT's state
then; every other call goes to PEFT. Nothing is added to the model's parameters or buffers.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lorapar.errors import UserError
from lorapar.partitioning import Partition
from lorapar_kernels import LoraMask, lora_add, lora_linear

_MASKS, SUMS = "_lorapar_masks", "_lorapar_sums"  # attributes of a served layer
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Report:
    """What `accelerate` did, layer by layer."""

    served: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # layer → reason

    def __str__(self) -> str:
        lines = [f"served {len(self.served)} of {len(self.served) + len(self.skipped)} LoRA layers"]
        return "\n".join(lines + [f"  left to PEFT {n}: {why}" for n, why in self.skipped.items()])


class Linear(lora.Linear):
    """`lora.Linear` whose forward runs in lorapar_kernels where `why_not` has no objection."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or why_not(self) is not None:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dropout = self.lora_dropout[adapter]
        options = {
            "mask": _mask_on(self, adapter, x.device),
            "dropout_p": dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
            "sums": self.__dict__.get(SUMS),
        }
        scale, base = self.scaling[adapter], self.base_layer
        if owns_base(base):
            return lora_linear(x, base.weight, a, b, scale, bias=base.bias, **options)
        return lora_add(base(x), x, a, b, scale, **options)


def accelerate(
    model: nn.Module,
    mask: Partition | dict[str, LoraMask] | None = None,
    *,
    stage: str | None = None,
) -> Report:
    """Serves every LoRA layer it can with lorapar_kernels; leaves the rest to PEFT and says why.

    Args:
        model: any model with PEFT LoRA layers. Changed in place; `restore` undoes it.
        mask: what may be updated: a `Partition` (with `stage`), or `LoraMask` by module name.
            A mask belongs to the adapter that is active now, and replaces an earlier one. None:
            everything trains, no mask.
        stage: `sft` or `rl`, which of the partition's masks.

    Returns:
        A `Report`: served layers first, then the reason for each one left.

    Raises:
        UserError: the model has no LoRA layers, or the mask does not fit it (all misfits named).
    """
    report = Report()
    layers = lora_layers(model)
    if not layers:
        raise UserError(
            f"accelerate: {type(model).__name__} has no LoRA layers; wrap it with "
            f"peft.get_peft_model first"
        )
    masks = _masks_by_layer(model, mask, stage)
    for name, layer in layers.items():
        if reason := _why_not_class(layer):
            report.skipped[name] = reason
            continue
        layer.__class__ = Linear
        layer.__dict__.pop(_MASKS, None)
        if name in masks:
            layer.__dict__[_MASKS] = {layer.active_adapters[0]: masks[name]}
        if (reason := why_not(layer)) and not layer.disable_adapters and not layer.merged:
            report.skipped[name] = reason
        else:
            report.served.append(name)
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every layer is PEFT's own again. A model never patched is left alone."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = lora.Linear
            for attribute in (_MASKS, SUMS):
                layer.__dict__.pop(attribute, None)


def lora_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    """PEFT's LoRA layers by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def why_not(layer: lora.Linear) -> str | None:
    """The reason this layer's next call goes to PEFT, or None."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged into the base weight"
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    if len(active) != 1 or len(layer.active_adapters) != 1:
        return f"{len(active)} active adapters here; one is needed"
    (adapter,) = active
    if adapter in layer.lora_variant:
        return f"a {type(layer.lora_variant[adapter]).__name__}, not plain LoRA"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's input cast is switched off"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) not in (nn.Dropout, nn.Identity) or getattr(dropout, "p", 0.0) >= 1.0:
        return f"its dropout is {dropout}"
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    for side, module in (("A", a), ("B", b)):
        if type(module) is not nn.Linear or "forward" in module.__dict__:
            return f"lora_{side} is a {type(module).__name__} with a forward of its own"
        if _hooked(module):
            return f"lora_{side} has hooks"
        if not _plain(module.weight):
            return f"lora_{side}'s weight is no plain tensor of 16, 32 or 64 bits"
    if b.bias is not None:
        return "lora_bias=True"
    return None


def owns_base(base: nn.Module) -> bool:
    """Whether the base GEMM is ours to run: a plain frozen nn.Linear and nothing around it."""
    return (
        type(base) is nn.Linear
        and "forward" not in base.__dict__
        and not _hooked(base)
        and _plain(base.weight)
        and not base.weight.requires_grad
        and (base.bias is None or (_plain(base.bias) and not base.bias.requires_grad))
    )


def _why_not_class(layer: nn.Module) -> str | None:
    """A reason that the class cannot be swapped at all."""
    if type(layer) is Linear:
        return None
    if type(layer) is not lora.Linear:
        return f"it is a {type(layer).__module__}.{type(layer).__name__}, not lora.Linear"
    if "forward" in layer.__dict__ or "_old_forward" in layer.__dict__:
        return "its forward was replaced on the instance (an accelerate hook, say)"
    return None


def _plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.dtype in _PLAIN and t.numel() > 0


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _mask_on(layer: nn.Module, adapter: str, device: torch.device) -> LoraMask | None:
    masks = layer.__dict__.get(_MASKS)
    mask = masks.get(adapter) if masks else None
    if mask is not None:
        masks[adapter] = mask = mask.to(device)
    return mask


def _masks_by_layer(model: nn.Module, mask: Any, stage: str | None) -> dict[str, LoraMask]:
    if mask is None:
        return {}
    if isinstance(mask, Partition):
        mask.check_model(model)
        masks, layers = mask.layer_masks(model, stage), lora_layers(model)
        for name, one in masks.items():
            adapter = layers[name].active_adapters[0]
            weights = (layers[name].lora_A[adapter].weight, layers[name].lora_B[adapter].weight)
            try:
                one.to(weights[0].device).check_dead(*(w.detach() for w in weights))
            except ValueError as e:
                raise UserError(f"accelerate: {name}: {e}") from None
        return masks
    layers, problems = lora_layers(model), []
    for name, one in mask.items():
        if name not in layers:
            problems.append(f"{name}: no such LoRA layer")
            continue
        adapter = layers[name].active_adapters[0]
        try:
            one.check(layers[name].lora_A[adapter].weight, layers[name].lora_B[adapter].weight)
        except ValueError as e:
            problems.append(f"{name}: {e}")
    if problems:
        raise UserError("accelerate: the masks do not fit the model:\n  " + "\n  ".join(problems))
    return mask
