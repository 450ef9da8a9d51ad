"""One process of runs that average gradients: python reduction_ranks.py OUT, started by torchrun.

On GPUs where there is one a process (cpu:gloo,cuda:nccl), else on CPUs over gloo. By case what it
returns, or the traceback, goes to OUT.RANK.
"""

import contextlib
import os
import sys
import traceback
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import ARITHMETIC, make_lora, make_tiny_model
from masked_ranks import ADAMW, GLOBAL_BATCH, MAX_NORM, partition_for, values
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState

from lorapar import reduction
from lorapar.callback import LoraParCallback, MaskedAdamWFactory
from lorapar.errors import UserError
from lorapar.partitioning import adapter_parameters

RANK, WORLD = (int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("WORLD_SIZE", 1)))
GPU = torch.cuda.is_available() and torch.cuda.device_count() >= max(WORLD, 2)
DEVICE = f"cuda:{RANK}" if GPU else "cpu"
STEPS = 3


@contextlib.contextmanager
def counted():
    """The elements of every all-reduce that Python starts; DDP's own are started in C++."""
    sizes, all_reduce = [], dist.all_reduce

    def counting(t, *args, **options):
        sizes.append(t.numel())
        return all_reduce(t, *args, **options)

    with mock.patch.object(dist, "all_reduce", counting):
        yield sizes


def said(work) -> str:
    """The UserError of what is refused, or nothing."""
    try:
        work()
    except UserError as e:
        return str(e)
    return ""


def batch(number: int) -> torch.Tensor:
    """This process's rows of a global batch."""
    rows = torch.arange(3 + number, 27 + number).view(GLOBAL_BATCH, 6)
    return rows[RANK::WORLD].to(DEVICE)


def ddp_model(dtype=torch.float32, **lora):
    """With a parameter that nothing uses, and one that is laid out the other way round."""
    model = make_lora(make_tiny_model(), modules_to_save=["norm"], **lora).to(DEVICE, dtype)
    turned = next(iter(adapter_parameters(model).values()))
    turned.data = turned.data.t().contiguous().t()
    return model


def zeroing(mask: torch.Tensor):
    def hook(p) -> None:
        p.grad.masked_fill_(~mask, 0)

    return hook


def ddp_steps(packed: bool, *, dtype=torch.float32, unused=False, masked=True, **options) -> dict:
    """Gradients after each of three steps, each of two batches; three buckets and more."""
    model = ddp_model(dtype)
    if unused:
        model.unused = nn.Parameter(torch.ones(3, dtype=dtype, device=DEVICE))
    partition = partition_for(model)
    masks = partition.sft
    by_parameter = {p: masks[n].to(DEVICE) for n, p in adapter_parameters(model).items()}
    if masked:  # else frozen elements have gradients, which the hook alone can zero
        for p, mask in by_parameter.items():
            p.register_post_accumulate_grad_hook(zeroing(mask))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.005, **options)
    state = reduction.reduce_packed(ddp, masks) if packed else None
    steps, sizes = [], []
    # PyTorch itself fails when the first step of a static graph is not synchronised.
    later = contextlib.nullcontext if options.get("static_graph") else ddp.no_sync
    for number in range(STEPS):
        with counted() as sent:
            with later():
                ddp(input_ids=batch(2 * number)).logits.float().square().mean().backward()
            if later is contextlib.nullcontext:
                sent.clear()
            ddp(input_ids=batch(2 * number + 1)).logits.float().square().mean().backward()
            if GPU:
                torch.cuda.synchronize()
        sizes.append(list(sent))
        if not masked and not packed:
            for p, mask in by_parameter.items():
                p.grad.masked_fill_(~mask, 0)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        steps.append({n: p.grad.clone() for n, p in trained.items() if p.grad is not None})
        with torch.no_grad():
            for p in trained.values():
                if p.grad is not None:
                    p.sub_(0.5 * p.grad)
        model.zero_grad(set_to_none=number == 1)
    return {
        "steps": steps,
        "sizes": sizes,
        "sent": state and (state.sent, state.total),
        "trainable": sum(int(m.sum()) for m in masks.values()),
        "adapter": sum(m.numel() for m in masks.values()),
        "others": sum(p.numel() for p in trained.values() if p not in by_parameter),
    }


def ddp(**options) -> dict:
    return {"ours": ddp_steps(True, **options), "theirs": ddp_steps(False, **options)}


def ddp_states() -> dict:
    """What is refused, and one wrapper in two stages and after them."""
    model = ddp_model()
    masks, ddp = partition_for(model).sft, DistributedDataParallel(model)
    name = next(iter(masks))
    other = {**masks, name: masks[name] if RANK == 0 else masks[name].flip(0)}
    refuse = partial(reduction.reduce_packed, ddp)
    found = {
        "unlike": said(lambda: refuse(other)),
        "unknown": said(lambda: refuse({"norm": masks[name]})),
        "shape": said(lambda: refuse({name: masks[name].float()})),
        "no DDP": said(lambda: reduction.reduce_packed(model, masks)),
    }
    taken = DistributedDataParallel(ddp_model())
    taken.register_comm_hook(None, allreduce_hook)
    found["taken"] = said(lambda: reduction.reduce_packed(taken, masks))
    sizes, state = [], None
    for stage in (masks, {n: ~m for n, m in masks.items()}, None):
        if stage is None:
            state.clear()
        else:
            state = refuse(stage)  # the same one
        with counted() as sent:
            ddp(input_ids=batch(0)).logits.square().mean().backward()
        sizes.append((sum(sent), state.sent))
    callback = LoraParCallback(partition_for(model), "sft", packed_reduce=True)
    events = (None, TrainerState(), None)
    found["added"] = said(lambda: callback.on_train_begin(*events, model=model))
    callback._let_go()
    return found | {"sizes": sizes, "total": state.total}


def sft_trainer(model, folder: str, **changes):
    """TRL's, accumulated and clipped."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, **changes}
    args = SFTConfig(
        folder,
        use_cpu=not GPU,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        max_grad_norm=MAX_NORM,
        weight_decay=ADAMW["weight_decay"],
        learning_rate=ADAMW["lr"],
        **settings,
    )
    rows = [{"input_ids": [1, 5 + i, 9, 2], "labels": [-100, 5 + i, 9, 2]} for i in range(16)]
    return SFTTrainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(ARITHMETIC / "base", padding_side="left"),
    )


def norms_of(trainer) -> list[float]:
    return [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]


def trainer_run(packed: bool, left: bool, folder: str) -> dict:
    """Twice, so that DDP's wrapper comes back."""
    model = make_lora(make_tiny_model(), lora_bias=True)
    if left:
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        layer.lora_A["default"].register_forward_hook(lambda *unused: None)
    partition, trainer = partition_for(model), sft_trainer(model, folder)
    callback = LoraParCallback(partition, "sft", packed_reduce=packed).attach(trainer)
    sent, averaged = [], reduction._averaged

    def counting(t, *args):
        sent.append(t.numel())
        return averaged(t, *args)

    with mock.patch.object(reduction, "_averaged", counting):
        for _ in range(2):
            trainer.train()
            assert callback._packed is None
    return {
        "after": {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n},
        "norms": norms_of(trainer),
        "sent": sum(sent),
        "step": sum(int(m.sum()) for m in partition.sft.values())
        + sum(p.numel() for n, p in model.named_parameters() if n.endswith("default.bias")),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def trainers(out: str) -> dict:
    return {
        f"{left} {packed}": trainer_run(packed, left, f"{out}.{RANK}.d")
        for left in (False, True)
        for packed in (False, True)
    }


def replicas(
    *, checkpoint=None, accumulate=None, inner=False, broken=False, unlike=False, dtype=None
) -> dict:
    """Adapters outside FSDP2's shards, biases and a parameter that the first process alone uses."""
    base = make_tiny_model(tie_word_embeddings=False)
    model = make_lora(base, lora_bias=True).to(DEVICE).train()
    model.extra = nn.Parameter(torch.ones(3, device=DEVICE))
    if dtype is not None:
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype)
    if checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
        model.enable_input_require_grads()
    partition, before = partition_for(model), values(model)
    if WORLD > 1:
        mesh = init_device_mesh("cuda" if GPU else "cpu", (WORLD,))
        ignored = {p for p in model.parameters() if p.requires_grad}
        root = model.base_model.model if inner else model
        for part in (*model.base_model.model.model.layers, root):
            fully_shard(part, mesh=mesh, ignored_params=ignored)
    if unlike and RANK == 1:
        with torch.no_grad():
            model.extra += 1
    callback = LoraParCallback(partition, "sft")
    optimiser = MaskedAdamWFactory()(
        model, callback=callback, decays=lambda m: [n for n, _ in m.named_parameters()], **ADAMW
    )
    events, norms, sizes = (None, TrainerState(), None), [], []
    if message := said(lambda: callback.on_train_begin(*events, model=model, optimizer=optimiser)):
        callback._let_go()
        return {"message": message}
    kinds = {type(p) for p in model.parameters() if not p.requires_grad}
    assert WORLD == 1 or kinds == {DTensor}
    forward = model.base_model.model if inner else model  # then a hook of the model's is not run
    skip = mock.patch.object(reduction._Bundle, "average", lambda self: None)
    with skip if broken else contextlib.nullcontext():
        for step in range(STEPS):
            with counted() as sent:
                for part in range(2 if accumulate else 1):
                    GradientState()._set_sync_gradients(accumulate != "told" or part == 1)
                    ids = batch(2 * step + part)
                    loss = forward(input_ids=ids, labels=ids).loss
                    if RANK == 0 and step < 2:  # in the last step nobody has a gradient
                        loss = loss + model.extra.sum() * (1.0 if WORLD > 1 else 0.5)
                    loss.backward()
            sizes.append(list(sent))
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            seen = [p.grad is None for p in (model.extra,)]
            optimiser.step()
            callback.on_optimizer_step(*events)
            optimiser.zero_grad()
    message = said(lambda: callback.on_train_end(*events, model=model))
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    masks = partition.sft
    return {
        "message": message,
        "norms": norms,
        "sizes": sizes,
        "extra": seen,
        "before": before,
        "after": values(model),
        "trained": trained,
        "masks": masks,
        "sent": sum(int(m.sum()) for m in masks.values())
        + sum(p.numel() for n, p in trained.items() if n.endswith(("default.bias", "extra")))
        + len(trained),
    }


def by_accelerate(out: str, *, attached: bool, checkpoint: str | None = None) -> dict:
    """TRL's trainer, FSDP2 by accelerate with the adapter ignored; on CPUs, where accelerate shards
    nothing, its state says that it should."""
    model = make_lora(make_tiny_model(tie_word_embeddings=False))
    partition, before = partition_for(model), values(model)
    changes = {"per_device_train_batch_size": 2 // WORLD}
    if checkpoint is not None:
        changes["gradient_checkpointing"] = True
        changes["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpoint == "reentrant"}
    trainer = sft_trainer(model, f"{out}.{RANK}.d", **changes)
    if WORLD > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            ignored_modules=".*lora_[AB].*",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
        state = trainer.accelerator.state._shared_state
        state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        trainer.is_fsdp_enabled = True
    callback = LoraParCallback(partition, "sft")
    if attached:
        callback.attach(trainer)
    else:
        trainer.add_callback(callback)
    trainer.train()
    named = dict(trainer.model.named_parameters())
    AcceleratorState._reset_state(True)
    return {
        "kinds": {isinstance(p, DTensor) for n, p in named.items() if "lora_" not in n},
        "lora": {isinstance(p, DTensor) for n, p in named.items() if "lora_" in n},
        "norms": norms_of(trainer),
        "before": before,
        "after": values(trainer.model),
        "masks": partition.sft,
    }


def sharded_adapter() -> dict:
    """packed_reduce where FSDP2 has the adapter."""
    model = make_lora(make_tiny_model(tie_word_embeddings=False)).to(DEVICE)
    partition = partition_for(model)
    fully_shard(model, mesh=init_device_mesh("cuda" if GPU else "cpu", (WORLD,)))
    callback = LoraParCallback(partition, "sft", packed_reduce=True)
    events = (None, TrainerState(), None)
    message = said(lambda: callback.on_train_begin(*events, model=model))
    callback._let_go()
    return {"message": message}


DDP = {
    "accumulated": partial(ddp),
    "bucket views": partial(ddp, gradient_as_bucket_view=True),
    "static graph": partial(ddp, static_graph=True),
    "unused": partial(ddp, find_unused_parameters=True, unused=True),
    "bf16": partial(ddp, dtype=torch.bfloat16),
    "frozen gradients": partial(ddp, masked=False),
    "frozen gradients, bucket views": partial(ddp, masked=False, gradient_as_bucket_view=True),
}
REPLICAS = {
    "plain": partial(replicas),
    "accumulated": partial(replicas, accumulate="told"),
    "accumulated, nobody says": partial(replicas, accumulate="untold"),
    "reentrant": partial(replicas, checkpoint="reentrant"),
    "not reentrant": partial(replicas, checkpoint="not"),
    "reentrant, root unheard": partial(replicas, checkpoint="reentrant", inner=True),
    "bf16": partial(replicas, dtype=torch.bfloat16),
}
ACCELERATED = {
    "attached": partial(by_accelerate, attached=True),
    "added": partial(by_accelerate, attached=False),
    "reentrant": partial(by_accelerate, attached=True, checkpoint="reentrant"),
}
OTHERS = {
    "states": ddp_states,
    "broken": partial(replicas, broken=True),
    "unlike": partial(replicas, unlike=True),
    "sharded adapter": sharded_adapter,
}


def main(out: str) -> None:
    if GPU:
        torch.cuda.set_device(RANK)
    dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo")
    cases = {**DDP, **{f"replicas, {n}": c for n, c in REPLICAS.items()}, **OTHERS}
    cases["trainers"] = partial(trainers, out)
    cases |= {f"accelerate, {n}": partial(c, out) for n, c in ACCELERATED.items()}
    results = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        GradientState()._set_sync_gradients(True)
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], file=sys.stderr, flush=True)
    torch.save(results, f"{out}.{RANK}")
    if dist.is_initialized():  # accelerate's reset ends it
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
