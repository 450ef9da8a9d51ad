"""`LoraParCallback`: one stage's mask in any TRL or transformers trainer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from lorapar import ranks
from lorapar.calls import MASKS, call_of
from lorapar.drift import drift, moved
from lorapar.errors import UserError
from lorapar.partitioning import Partition, adapter_parameters, base_name
from lorapar.patch import lora_layers, route
from lorapar.reduction import PackedReduction, Replicas, reduce_packed, sharded
from lorapar_kernels import MaskedAdamW

log = logging.getLogger("lorapar")

_FROZEN = ("restore", "check")
_ADAMW = ("adamw_torch", "adamw_torch_fused")
_DEEPSPEED = (
    "LoraParCallback: DeepSpeed trains a flat fp32 copy of the adapter, in which no single element "
    "can be kept frozen; use DDP or FSDP2"
)
_REMEDY = 'LoraParCallback(..., frozen="restore") puts them back after each step'


class LoraParCallback(TrainerCallback):
    """Trains the elements of one stage and no other of the adapter's A and B, exactly.

    What else trains (`lora_bias`, `modules_to_save`) goes on training; a warning names it.

    Gradients of frozen elements are zero before clipping, accumulation included. At the end of
    training every frozen element is compared with its value at the start, bit by bit. The active
    share appears in the log.

    Use either form; the first also puts AdamW's state on trainable elements alone:

        LoraParCallback("partition.safetensors", stage="sft").attach(trainer)
        trainer.add_callback(LoraParCallback("partition.safetensors", stage="sft"))

    With `add_callback` alone the trainer's own optimiser runs, whichever it is. If it would move
    frozen elements, by weight decay or by its method, a warning says so at the start of training.

    Over several processes DDP averages the gradients, or FSDP2 those of the adapters that it
    shards. Where a user leaves the adapters out of sharding (`fsdp_ignored_modules` of accelerate's
    config: `.*lora_[AB].*`), this callback averages them, before clipping, and what else trains
    outside the shards; at the start and at the end these parameters must be the same everywhere.

    Args:
        partition: a `Partition`, or the path of one.
        stage: `sft` or `rl`. The masks are of the adapter named `default`, as TRL makes it.
        frozen: under another optimiser than `MaskedAdamW`, `restore` puts frozen elements back
            after each step, exactly; `check` leaves it at the check at the end.
        packed_reduce: under DDP, send the gradients of trainable elements only (`reduce_packed`).
            Needs `attach`. One process sends nothing, and adapters left out of FSDP2's sharding are
            sent packed anyway.

    Raises:
        UserError: no such partition, stage or mode; at the start of training, a partition of
            another model, DeepSpeed, `packed_reduce` where it cannot be, or adapters outside
            FSDP2's shards that differ between processes; at its end, a frozen element that moved,
            or such adapters that drifted apart.
    """

    def __init__(
        self,
        partition: Partition | str | Path,
        stage: str,
        *,
        frozen: str = "restore",
        packed_reduce: bool = False,
    ):
        if frozen not in _FROZEN:
            raise UserError(f"LoraParCallback: frozen must be restore or check, got {frozen!r}")
        self.partition = (
            partition if isinstance(partition, Partition) else Partition.load(partition)
        )
        self.stage, self.frozen, self.packed_reduce = stage, frozen, packed_reduce
        self.masks = {n: m.cpu() for n, m in self.partition.masks(stage).items()}
        self.active_share = self.partition.active_share(stage)
        self._hooks: list[Any] = []
        self._start: dict[str, Tensor] = {}  # frozen elements at the stage's start, on the host
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # what `restore` puts back
        self._restored = False  # in this step already
        self._remembered = False  # by `attach`, for the training to come
        self._trainer: Callable[[], Trainer | None] = lambda: None  # by `attach`, held weakly
        self._packed: PackedReduction | None = None
        self._replicas: Replicas | None = None

    def attach(self, trainer: Trainer) -> "LoraParCallback":
        """Adds this callback and, where the trainer would use AdamW, `MaskedAdamW` in its place."""
        self.partition.check_model(trainer.model)
        if trainer.is_deepspeed_enabled:
            raise UserError(_DEEPSPEED)
        trainer.add_callback(self)
        self._trainer = ref(trainer)
        self._remember(trainer.model)  # before a resumed run loads its checkpoint
        self._remembered = True
        args, own = trainer.args, trainer.optimizer or trainer.optimizer_cls_and_kwargs
        if own is None and args.optim in _ADAMW and not args.optim_args:
            options = {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "weight_decay": args.weight_decay,
                "callback": self,
                "decays": trainer.get_decay_parameter_names,
            }
            trainer.optimizer_cls_and_kwargs = (MaskedAdamWFactory, options)
        return self

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if isinstance(optimizer, DeepSpeedOptimizerWrapper):
            raise UserError(_DEEPSPEED)
        self.partition.check_model(model)
        report = route(model, self.partition, stage=self.stage, zeroed=True)
        log.info("%s; stage %s trains %.2f %%", report, self.stage, 100 * self.active_share)
        if not self._remembered:
            self._remember(model)
        self._remembered = False
        self._let_go()
        parameters = adapter_parameters(model)
        masks = self._masks_beside(model, parameters)
        for name, p in parameters.items():
            if p.requires_grad and not self.masks[name].all():
                self._hooks.append(p.register_post_accumulate_grad_hook(_zero(masks[name])))
        self._reduce(model, parameters, masks)
        held = {id(p) for p in parameters.values()}
        others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if others and state.is_world_process_zero:
            log.warning(
                "stage %s: %d parameters that no partition covers train as well, the first of them "
                "%s", self.stage, len(others), others[0],
            )  # fmt: skip
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if optimizer is None or isinstance(optimizer, MaskedAdamW):
            return
        if state.is_world_process_zero:
            self._warn(optimizer, parameters)
        if self.frozen == "restore":
            self._keep(parameters, masks)
            if hasattr(optimizer, "register_step_post_hook"):
                self._hooks.append(optimizer.register_step_post_hook(self._put_back))

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Puts back what no hook did: after LOMO, say, whose step accelerate never calls."""
        if not self._restored:
            self._put_back()
        self._restored = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry["active_share"] = round(self.active_share, 6)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        replicas = self._replicas
        self._let_go()
        route(model, None, stage=None)  # served still, without this stage's masks
        if replicas is not None:
            replicas.check()  # first: every process takes part
        self.check_frozen(model)

    def check_frozen(self, model: nn.Module) -> int:
        """How many frozen elements kept their bits: all of them, or UserError names the others."""
        wrong, total = {}, 0
        for name, p in adapter_parameters(model).items():
            now = _frozen_elements(p, self.masks[name])
            count = int(moved(now, self._start[name]).sum())
            total += now.numel()
            if count:
                wrong[name] = count
        if wrong:
            why = "something besides the optimiser wrote to them"
            if self.frozen == "check":
                why = "the optimiser or something else wrote to them; " + _REMEDY
            raise UserError(
                f"stage {self.stage}: {sum(wrong.values())} frozen elements moved, in "
                f"{', '.join(list(wrong)[:4])}; {why}"
            )
        return total

    def _remember(self, model: nn.Module) -> None:
        self._start = {
            n: _frozen_elements(p, self.masks[n]) for n, p in adapter_parameters(model).items()
        }

    def _reduce(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor]
    ) -> None:
        """Whatever is this callback's to average over processes."""
        if ranks.world() == 1:
            return
        masks = {n: m for n, m in masks.items() if parameters[n].requires_grad}
        if sharded(model):
            whole = [n for n in masks if not isinstance(parameters[n], DTensor)]
            if self.packed_reduce and not whole:
                raise UserError(
                    "LoraParCallback: packed_reduce is for gradients that are all-reduced, and "
                    "FSDP2 has sharded this adapter; leave packed_reduce out, or the adapter out "
                    "of sharding (fsdp_ignored_modules: '.*lora_[AB].*'), which packs by itself"
                )
            self._replicas = Replicas(model, {parameters[n]: masks[n] for n in whole})
            how, packed = "beside FSDP2's shards, averaged", self._replicas
        elif self.packed_reduce:
            self._packed = reduce_packed(self._wrapper(), masks)
            how, packed = "under DDP", self._packed
        else:
            return
        if packed.total:
            log.info("gradients %s: %d of %d elements are sent", how, packed.sent, packed.total)

    def _wrapper(self) -> DistributedDataParallel:
        trainer = self._trainer()
        if trainer is None or not trainer.is_in_train:
            raise UserError(
                "LoraParCallback: packed_reduce needs DDP's wrapper, which only the trainer has; "
                "use LoraParCallback(..., packed_reduce=True).attach(trainer), not add_callback"
            )
        for module in trainer.model_wrapped.modules():
            if isinstance(module, DistributedDataParallel):
                return module
        raise UserError(
            f"LoraParCallback: packed_reduce needs DDP, and this trainer's model is a "
            f"{type(trainer.model_wrapped).__name__}; leave packed_reduce out"
        )

    def _masks_beside(
        self, model: nn.Module, parameters: dict[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Each mask on its parameter's device, cut as its parameter is; where our kernels serve the
        layer, the tensor they read and no copy of it."""
        masks = {}
        for name, layer in lora_layers(model).items():
            sides = [f"{base_name(name)}.{side}.weight" for side in ("lora_A", "lora_B")]
            if MASKS in layer.__dict__ and sides[0] in parameters:
                call = call_of(layer, parameters[sides[0]].device)
                if call is not None and call.mask is not None:
                    masks |= zip(sides, (call.mask.a, call.mask.b))
        return {
            n: masks[n] if n in masks else _part(self.masks[n], p) for n, p in parameters.items()
        }

    def _warn(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
        found = drift(
            optimizer, {p: self.masks[n] for n, p in parameters.items() if p.requires_grad}
        )
        if found is None:
            return
        if self.frozen == "restore":
            then = "they are put back after each step"
            if found.method:
                then += (
                    ", but the update of the others is by a method that may see the whole matrix; "
                    "AdamW with attach(trainer) sees the others alone"
                )
            elif not found.unknown:
                then += (
                    "; weight_decay=0, or AdamW with attach(trainer), leaves them where they are"
                )
        else:
            then = (
                f"nothing puts them back, and the check at the end of training will "
                f"{'tell' if found.unknown else 'fail'}; {_REMEDY}"
            )
        log.warning("stage %s: %s; %s", self.stage, found, then)

    def _keep(self, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> None:
        for name, p in parameters.items():
            mask, start = self.masks[name], self._start[name]
            if start.numel():
                whole = torch.zeros(mask.shape, dtype=start.dtype).masked_scatter_(~mask, start)
                start = _part(whole.to(p.dtype), p)[~masks[name]]
                self._kept.append((p, masks[name], start))

    @torch.no_grad()
    def _put_back(self, *unused: Any) -> None:
        for p, mask, start in self._kept:
            _local(p).masked_scatter_(~mask, start)
        self._restored = True

    def _let_go(self) -> None:
        """Of the hooks, and of every tensor on the device."""
        while self._hooks:
            self._hooks.pop().remove()
        self._kept.clear()
        if self._packed is not None:
            self._packed.clear()
        if self._replicas is not None:
            self._replicas.remove()
        self._packed = self._replicas = None


class MaskedAdamWFactory:
    """What transformers calls to make an optimiser from a model: `Factory()(model, **options)`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        callback: LoraParCallback,
        decays: Callable[[nn.Module], list[str]],
        **options: Any,
    ) -> MaskedAdamW:
        names = {id(p): n for n, p in adapter_parameters(model).items()}
        decaying, masks = set(decays(model)), {}
        trained: dict[bool, list] = {True: [], False: []}  # by whether weight decay applies
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            mask = callback.masks.get(names.get(id(p), ""))
            if mask is not None:
                if not mask.any():
                    continue
                masks[name] = mask
            trained[name in decaying].append((name, p))
        groups = [
            {"params": pairs, **({} if decay else {"weight_decay": 0.0})}
            for decay, pairs in trained.items()
            if pairs
        ]
        if not groups:
            raise UserError(f"stage {callback.stage}: the partition leaves nothing to train")
        return MaskedAdamW(groups, masks, **options)


def _zero(mask: Tensor):
    def hook(p: nn.Parameter) -> None:
        _local(p.grad).masked_fill_(~mask, 0)

    return hook


def _frozen_elements(p: Tensor, mask: Tensor) -> Tensor:
    """The elements of the whole parameter where its mask is False, flat, on the host."""
    p = p.detach()
    return (p.full_tensor() if isinstance(p, DTensor) else p).cpu()[~mask]


def _part(whole: Tensor, p: Tensor) -> Tensor:
    """What belongs to the part of `p` that is on this rank, on p's device."""
    whole = whole.to(p.device)
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
