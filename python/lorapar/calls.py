"""What one call of a PEFT LoRA layer is made of, read from PEFT's state in that call.

This runs some hundred times a step, hence the look-ups through `_modules`, which spare a detour
through `nn.Module.__getattr__` each.
"""

from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lorapar_kernels import ImportanceSums, LoraMask
from lorapar_kernels.lora_linear import MAX_RANK

MASKS, SUMS = "_lorapar_masks", "_lorapar_sums"  # attributes of a served layer
_PLAIN = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_TENSORS, _DROPOUTS = (nn.Parameter, Tensor), (nn.Identity, nn.Dropout)


class Call(NamedTuple):
    """The adapter of a layer's next call and, where the base GEMM is ours to run, its weight."""

    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    scale: float
    mask: LoraMask | None
    sums: ImportanceSums | None
    weight: Tensor | None  # [N, K]; None: the base layer has to make its own output
    bias: Tensor | None
    dropout_p: float  # in force now: 0 in eval mode
    training: bool


def why_not(layer: lora.Linear) -> str | None:
    """The reason this layer's next call goes to PEFT, or None."""
    found = _adapter_of(layer)
    return found if type(found) is str else None


def _adapter_of(layer: lora.Linear) -> tuple[str, Tensor, Tensor, nn.Module] | str:
    """(name, A, B, dropout module) of this layer's next call, or why it goes to PEFT."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged into the base weight"
    modules, active = layer._modules, layer.active_adapters
    a_modules = modules["lora_A"]._modules
    if len(active) != 1 or active[0] not in a_modules:
        present = [a for a in active if a in a_modules]
        return f"{len(present)} active adapters here; one is needed"
    adapter = active[0]
    if adapter in layer.lora_variant:
        return f"a {type(layer.lora_variant[adapter]).__name__}, not plain LoRA"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's input cast is switched off"
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(dropout) not in _DROPOUTS or getattr(dropout, "p", 0.0) >= 1.0:
        return f"its dropout is {dropout}"
    a, b = a_modules[adapter], modules["lora_B"]._modules[adapter]
    if getattr(a, "out_features", 0) > MAX_RANK:
        return f"its rank is above {MAX_RANK}"
    weights = _weight(a), _weight(b)
    for side, module, weight in zip("AB", (a, b), weights):
        if type(module) is not nn.Linear or "forward" in module.__dict__:
            return f"lora_{side} is a {type(module).__name__} with a forward of its own"
        if _hooked(module):
            return f"lora_{side} has hooks"
        if not _plain(weight):
            return f"lora_{side}'s weight is no plain tensor of 16, 32 or 64 bits"
    if b._parameters.get("bias") is not None:
        return "lora_bias=True"
    return adapter, *weights, dropout


def owns_base(base: nn.Module) -> bool:
    """Whether the base GEMM is ours to run: a plain frozen nn.Linear and nothing around it."""
    if type(base) is not nn.Linear or "forward" in base.__dict__ or _hooked(base):
        return False
    weight, bias = _weight(base), base._parameters.get("bias")
    return (
        _plain(weight)
        and not weight.requires_grad
        and (bias is None or (_plain(bias) and not bias.requires_grad))
    )


def call_of(layer: lora.Linear, device: torch.device) -> Call | None:
    """What the layer's next call on x of `device` computes; None where PEFT has to serve it."""
    found = _adapter_of(layer)
    if type(found) is str:
        return None
    adapter, a, b, dropout = found
    base = layer._modules["base_layer"]
    owned = owns_base(base)
    return Call(
        a,
        b,
        layer.scaling[adapter],
        _mask_on(layer, adapter, device),
        layer.__dict__.get(SUMS),
        _weight(base) if owned else None,
        base._parameters.get("bias") if owned else None,
        dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        layer.training,
    )


def _weight(module: nn.Linear) -> Tensor | None:
    """The module's weight; FSDP 1 keeps it beside the parameters."""
    weight = module._parameters.get("weight")
    return module.__dict__.get("weight") if weight is None else weight


def _plain(t: Tensor | None) -> bool:
    return type(t) in _TENSORS and t.dtype in _PLAIN and t.numel() > 0


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _mask_on(layer: nn.Module, adapter: str, device: torch.device) -> LoraMask | None:
    masks = layer.__dict__.get(MASKS)
    mask = masks.get(adapter) if masks else None
    if mask is not None:
        masks[adapter] = mask = mask.to(device)
    return mask
