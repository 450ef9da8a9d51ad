"""What one call of a PEFT LoRA layer is made of, read from PEFT's state in that call.

This runs some hundred times a step, hence the look-ups through `_modules`, which spare a detour
through `nn.Module.__getattr__` each.
"""

from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook

from lorapar_kernels import ImportanceSums, LoraMask
from lorapar_kernels.lora_linear import MAX_RANK

MASKS, SUMS = "_lorapar_masks", "_lorapar_sums"  # attributes of a served layer
ZEROED = "_lorapar_zeroed"  # where somebody else zeroes the gradients of frozen elements too
COPY = "_lorapar_copy"  # where a 16-bit copy of the base weight may be kept; None until it is made
_PLAIN = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_TENSORS, _DROPOUTS = (nn.Parameter, Tensor), (nn.Identity, nn.Dropout)


class Call(NamedTuple):
    """The adapter of a layer's next call and, where the base GEMM is ours to run, its weight."""

    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    lora_bias: Tensor | None  # [N], scaled as S Bᵀ is
    scale: float
    mask: LoraMask | None
    sums: ImportanceSums | None
    weight: Tensor | None  # [N, K]; None: the base layer has to make its own output
    bias: Tensor | None
    dropout_p: float  # in force now: 0 in eval mode
    training: bool

    def whole_bias(self) -> Tensor | None:
        """The base layer's bias and the adapter's, [N]."""
        if self.lora_bias is None:
            return self.bias
        added = self.scale * self.lora_bias
        return added if self.bias is None else self.bias + added


class _Found(NamedTuple):
    """What the layer's next call is made of, as modules and parameters."""

    adapter: str
    a: Tensor
    b: Tensor
    bias: Tensor | None  # of B
    dropout: nn.Module
    base: nn.Module
    owned: bool  # whether the base GEMM is ours to run


def why_not(layer: LoraLayer, *, passing: bool = False) -> str | None:
    """The reason this layer's next call goes to PEFT, or None; `passing`: once its adapters are
    switched on again and no longer merged."""
    found = _find(layer, passing)
    if type(found) is str:
        return found
    if found.a.device != found.b.device:
        return f"lora_A is on {found.a.device}, lora_B on {found.b.device}"
    if found.owned and _parameter(found.base, "weight").device != found.a.device:
        on = _parameter(found.base, "weight").device
        return f"its adapter is on {found.a.device}, its base weight on {on}"
    return None


def adapter_of(layer: LoraLayer) -> str | None:
    """The one active adapter that the layer has; None if it has none or several."""
    present = [a for a in layer.active_adapters if a in layer.lora_A]
    return present[0] if len(present) == 1 else None


def serves_now(x: Tensor) -> bool:
    """Whether anything can serve x here: no tensor subclass, no transform, tracer or global hook
    that has to see PEFT's own operations."""
    if torch.compiler.is_compiling():
        # What is exported needs no package but PyTorch. (`is_exporting()` is true in every trace.)
        exports = torch.compiler._is_exporting_flag
        return not exports and not torch._C._are_functorch_transforms_active()
    return (
        type(x) in _TENSORS
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not _has_any_global_hook()
    )


def _find(layer: LoraLayer, passing: bool = False) -> _Found | str:
    """What the layer's next call is made of, or why it goes to PEFT wherever its x is."""
    if layer.disable_adapters and not passing:
        return "its adapters are disabled"
    if layer.merged and not passing:
        return "its adapter is merged into the base weight"
    modules = layer._modules
    a_modules = modules["lora_A"]._modules
    present = [a for a in layer.active_adapters if a in a_modules]
    if len(present) != 1:
        return f"{len(present)} active adapters here; one is needed"
    (adapter,) = present
    if adapter in layer.lora_variant:
        return f"a {type(layer.lora_variant[adapter]).__name__}, not plain LoRA"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's input cast is switched off"
    if isinstance(layer.scaling[adapter], Tensor):
        return "its scaling is a tensor (PEFT's compiled hot-swapping); reading it would wait"
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(dropout) not in _DROPOUTS or getattr(dropout, "p", 0.0) >= 1.0:
        return f"its dropout is {dropout}"
    if _hooked(dropout):
        return "its dropout has hooks"
    a, b = a_modules[adapter], modules["lora_B"]._modules[adapter]
    if getattr(a, "out_features", 0) > MAX_RANK:
        return f"its rank is above {MAX_RANK}"
    base, bias = modules["base_layer"], _parameter(b, "bias")
    owned = owns_base(base)
    if "_hf_tp_plan" in base.__dict__ or (
        not owned
        and isinstance(base._parameters.get("weight"), DTensor)
        and "_is_fsdp_managed_module" not in layer.__dict__  # then whole in the forward
    ):
        return "its base layer is tensor-parallel"
    weights = _parameter(a, "weight"), _parameter(b, "weight")
    for side, module, weight in zip("AB", (a, b), weights):
        if type(module) is not nn.Linear or "forward" in module.__dict__:
            return f"lora_{side} is a {type(module).__name__} with a forward of its own"
        if _hooked(module):
            return f"lora_{side} has hooks"
        if not _plain(weight):
            return f"lora_{side}'s weight is no plain tensor of 16, 32 or 64 bits"
    if _parameter(a, "bias") is not None:
        return "lora_A has a bias"
    if bias is not None and not (owned and _plain(bias)):
        return "lora_bias=True on a base layer that makes its own output"
    return _Found(adapter, *weights, bias, dropout, base, owned)


def owns_base(base: nn.Module) -> bool:
    """Whether the base GEMM is ours to run: a plain nn.Linear, nothing around it, W frozen."""
    if type(base) is not nn.Linear or "forward" in base.__dict__ or _hooked(base):
        return False
    weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
    return _plain(weight) and not weight.requires_grad and (bias is None or _plain(bias))


def call_of(layer: LoraLayer, device: torch.device) -> Call | None:
    """What the layer's next call on x of `device` computes; None where PEFT has to serve it."""
    found = _find(layer)
    if type(found) is str:
        return None
    adapter, a, b, lora_bias, dropout, base, owned = found
    weight = bias = None
    if owned:
        weight, bias = _compute_weight(layer, _parameter(base, "weight")), _parameter(base, "bias")
    if a.device != device or b.device != device or (owned and weight.device != device):
        return None  # PEFT's message, or what hooks of the base layer make of it
    return Call(
        a,
        b,
        lora_bias,
        layer.scaling[adapter],
        _mask_on(layer, adapter, device),
        layer.__dict__.get(SUMS),
        weight,
        bias,
        dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        layer.training,
    )


def _compute_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """W, or the copy of it in autocast's dtype where such a copy may be kept.

    The copy is made anew when W was replaced, moved or written to. `data_ptr` and the version tell
    of all but a write through `W.data`; PEFT's own such writes, merge and unmerge, drop the copy.
    """
    if COPY not in layer.__dict__ or torch.compiler.is_compiling() or weight.is_inference():
        return weight
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind):
        return weight
    dtype = torch.get_autocast_dtype(kind)
    if weight.dtype == dtype or weight.dtype == torch.float64:
        return weight
    state = (weight.data_ptr(), weight._version, dtype)
    kept = layer.__dict__[COPY]
    if kept is None or kept[0] is not weight or kept[1] != state:
        with torch.no_grad(), torch.inference_mode(False):
            kept = layer.__dict__[COPY] = (weight, state, weight.detach().to(dtype))
    return kept[2]


def _parameter(module: nn.Linear, name: str) -> Tensor | None:
    """A module's parameter; FSDP 1 and replicas of nn.DataParallel have it as an attribute."""
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


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
