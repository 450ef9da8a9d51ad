"""Routes PEFT's LoRA layers through lorapar_kernels, and back.

`accelerate` changes the class of each `peft.tuners.lora.Linear` to the subclass `Linear` below,
which overrides `forward`. Whether a call is served is decided in that call, from PEFT's state
then; every other call goes to PEFT. Nothing is added to the model's parameters or buffers.
"""

from dataclasses import dataclass, field
from typing import Any

from peft.tuners import lora
from torch import Tensor, nn

from lorapar.calls import MASKS, SUMS, call_of, owns_base, why_not
from lorapar.errors import UserError
from lorapar.groups import GROUP, make_groups
from lorapar.partitioning import Partition
from lorapar_kernels import LoraMask, few_rows, lora_add, lora_linear


@dataclass
class Report:
    """What `accelerate` did, layer by layer."""

    served: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # layer → reason
    groups: list[list[str]] = field(default_factory=list)  # of served layers with one x

    def __str__(self) -> str:
        total, grouped = len(self.served) + len(self.skipped), sum(map(len, self.groups))
        first = f"served {len(self.served)} of {total} LoRA layers"
        if self.groups:
            first += f", {grouped} of them in {len(self.groups)} groups"
        return "\n".join([first, *(f"  left to PEFT {n}: {r}" for n, r in self.skipped.items())])


class Linear(lora.Linear):
    """`lora.Linear` whose forward runs in lorapar_kernels where `why_not` has no objection."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = None if args or kwargs else call_of(self, x.device)
        if (link := self.__dict__.get(GROUP)) is not None:
            group, place = link
            if call is None or call.weight is None:
                group.skip(place)
            elif call.sums is None and few_rows.serves(x):  # by plan d, which shares nothing
                group.drop()
            elif (y := group.output(place, self, x, call)) is not None:
                return y
        if call is None:
            return super().forward(x, *args, **kwargs)
        adapter = (call.lora_a, call.lora_b, call.scale)
        options = {"mask": call.mask, "dropout_p": call.dropout_p, "sums": call.sums}
        if call.weight is None:
            return lora_add(self.base_layer(x), x, *adapter, **options)
        return lora_linear(x, call.weight, *adapter, bias=call.bias, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (link := self.__dict__.get(GROUP)) is not None:
            group, place = link
            group.join(place, self)


def accelerate(
    model: nn.Module,
    mask: Partition | dict[str, LoraMask] | None = None,
    *,
    stage: str | None = None,
) -> Report:
    """Serves every LoRA layer it can with lorapar_kernels; leaves the rest to PEFT and says why.

    Layers of one x (q, k, v or gate, up) are served together but for few rows: see `groups`.

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
        layer.__dict__.pop(MASKS, None)
        if name in masks:
            layer.__dict__[MASKS] = {layer.active_adapters[0]: masks[name]}
        if (reason := why_not(layer)) and not layer.disable_adapters and not layer.merged:
            report.skipped[name] = reason
        else:
            report.served.append(name)
    _group(model, report)
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every layer is PEFT's own again. A model never patched is left alone."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = lora.Linear
            for attribute in (MASKS, SUMS, GROUP):
                layer.__dict__.pop(attribute, None)


def lora_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    """PEFT's LoRA layers by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def _why_not_class(layer: nn.Module) -> str | None:
    """A reason that the class cannot be swapped at all."""
    if type(layer) is Linear:
        return None
    if type(layer) is not lora.Linear:
        return f"it is a {type(layer).__module__}.{type(layer).__name__}, not lora.Linear"
    if "forward" in layer.__dict__ or "_old_forward" in layer.__dict__:
        return "its forward was replaced on the instance (an accelerate hook, say)"
    return None


def _group(model: nn.Module, report: Report) -> None:
    names = {m: n for n, m in lora_layers(model).items() if type(m) is Linear}
    served = set(report.served)
    for members in make_groups(model, list(names)):
        together = [names[m] for m in members if names[m] in served and owns_base(m.base_layer)]
        if len(together) > 1:
            report.groups.append(together)


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
