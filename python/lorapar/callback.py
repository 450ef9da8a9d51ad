"""`LoraParCallback`: one stage's mask in any TRL or transformers trainer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lorapar.errors import UserError
from lorapar.partitioning import Partition, adapter_parameters
from lorapar.patch import accelerate
from lorapar_kernels import MaskedAdamW

log = logging.getLogger("lorapar")

_ADAMW = ("adamw_torch", "adamw_torch_fused")


class LoraParCallback(TrainerCallback):
    """Trains the elements of one stage and nothing else, exactly.

    Gradients of frozen elements are zero before clipping, accumulation included. At the end of
    training every frozen element is compared with its value at the start, bit by bit. The active
    share appears in the log.

    Use either form; the first also puts AdamW's state on trainable elements alone:

        LoraParCallback("partition.safetensors", stage="sft").attach(trainer)
        trainer.add_callback(LoraParCallback("partition.safetensors", stage="sft"))

    With `add_callback` alone the trainer's own optimiser runs, whichever it is, and frozen
    elements are put back after each of its steps (weight decay and momentum would move them).

    Args:
        partition: a `Partition`, or the path of one.
        stage: `sft` or `rl`. The masks are of the adapter named `default`, as TRL makes it.

    Raises:
        UserError: no such partition or stage; at the start of training, a partition of another
            model; at its end, a frozen element that moved.
    """

    def __init__(self, partition: Partition | str | Path, stage: str):
        self.partition = (
            partition if isinstance(partition, Partition) else Partition.load(partition)
        )
        self.stage = stage
        self.masks = self.partition.masks(stage)
        self.active_share = self.partition.active_share(stage)
        self._hooks: list[Any] = []
        self._frozen: dict[str, Tensor] = {}

    def attach(self, trainer: Trainer) -> "LoraParCallback":
        """Adds this callback and, where the trainer would use AdamW, `MaskedAdamW` in its place."""
        self.partition.check_model(trainer.model)
        if trainer.is_deepspeed_enabled:
            raise UserError(
                "LoraParCallback: DeepSpeed trains a flat fp32 copy of the adapter, in which no "
                "single element can be kept frozen; use DDP or FSDP2"
            )
        trainer.add_callback(self)
        self._remember(trainer.model)  # before a resumed run loads its checkpoint
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
        self.partition.check_model(model)
        report = accelerate(model, self.partition, stage=self.stage)
        log.info("%s; stage %s trains %.2f %%", report, self.stage, 100 * self.active_share)
        parameters = adapter_parameters(model)
        self.masks = {n: m.to(parameters[n].device) for n, m in self.masks.items()}
        if not self._frozen:
            self._remember(model)
        self._remove_hooks()
        for name, p in parameters.items():
            frozen = ~self.masks[name]
            if p.requires_grad and frozen.any():
                self._hooks.append(p.register_post_accumulate_grad_hook(_zero(frozen)))
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not None and not isinstance(inner, MaskedAdamW):
            log.info(
                "%s moves frozen elements; they are put back after each step", type(inner).__name__
            )
            self._hooks.append(
                inner.register_step_post_hook(lambda *unused: self._put_back(parameters))
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry["active_share"] = round(self.active_share, 6)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._remove_hooks()
        accelerate(model)  # served still, without this stage's masks
        self.check_frozen(model)

    def check_frozen(self, model: nn.Module) -> int:
        """How many frozen elements kept their bits: all of them, or UserError names the others."""
        moved, total = {}, 0
        for name, p in adapter_parameters(model).items():
            now, start = p.detach()[~self.masks[name]], self._frozen[name]
            count = int((_bits(now) != _bits(start)).sum())
            total += now.numel()
            if count:
                moved[name] = count
        if moved:
            raise UserError(
                f"stage {self.stage}: {sum(moved.values())} frozen elements moved, in "
                f"{', '.join(list(moved)[:4])}; something besides the optimiser wrote to them"
            )
        return total

    def _remember(self, model: nn.Module) -> None:
        parameters = adapter_parameters(model)
        self.masks = {n: m.to(parameters[n].device) for n, m in self.masks.items()}
        self._frozen = {n: p.detach()[~self.masks[n]].clone() for n, p in parameters.items()}

    @torch.no_grad()
    def _put_back(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, p in parameters.items():
            p.masked_scatter_(~self.masks[name], self._frozen[name])

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


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


def _zero(frozen: Tensor):
    def hook(p: nn.Parameter) -> None:
        p.grad.masked_fill_(frozen, 0)

    return hook


def _bits(t: Tensor) -> Tensor:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(kind)
