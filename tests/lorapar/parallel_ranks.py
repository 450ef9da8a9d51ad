"""One of two processes of parallel runs: torchrun parallel_ranks.py OUT CASE...

Each case trains a tiny model unpatched, patched and, where they may differ, in float64.
To OUT.RANK goes, by case, what `run` returns, or the traceback of the case.
"""

import contextlib
import os
import sys
import traceback
from collections import Counter
from datetime import timedelta
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from conftest import make_lora, make_tiny_model
from peft.tuners import lora
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import parallel as tp
from torch.nn.parallel import DistributedDataParallel

from lorapar import groups, served
from lorapar.patch import accelerate, lora_layers, restore

LAYERS = 12  # LoRA layers of the models here
BATCHES = torch.arange(3, 51).view(4, 2, 6)  # two steps of two batches a rank, each of one row


@contextlib.contextmanager
def counted():
    """How many calls of a layer the kernels have served, and PEFT."""
    counts = Counter(kernels=0, peft=0)

    def counting(kind, function, size=lambda *unused: 1):
        def call(*args, **options):
            counts[kind] += size(*args)
            return function(*args, **options)

        return call

    together = counting("kernels", groups.lora_linear_group, lambda x, members: len(members))
    with (
        mock.patch.object(served, "lora_linear", counting("kernels", served.lora_linear)),
        mock.patch.object(served, "lora_add", counting("kernels", served.lora_add)),
        mock.patch.object(groups, "lora_linear_group", together),
        mock.patch.object(lora.Linear, "forward", counting("peft", lora.Linear.forward)),
    ):
        yield counts


def llama():
    base = make_tiny_model(attn_implementation="eager", tie_word_embeddings=False)
    return make_lora(base, lora_alpha=5)  # by 5/4: a power of two would round nothing


def biased():
    """Qwen2: its q, k and v have a bias, here none is zero."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=1024,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.bias"):
                p.normal_()
    return make_lora(model, lora_alpha=5)


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def train(forward, model, rank, later=contextlib.nullcontext) -> dict:
    """Two steps of two batches, the first of them under `later`: logits and last gradients."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    logits = []
    for step in range(2):
        optimiser.zero_grad()
        for i, context in enumerate((later, contextlib.nullcontext)):
            ids = BATCHES[2 * step + i, rank : rank + 1]
            with context():
                out = forward(input_ids=ids).logits
                out.float().square().mean().backward()
            logits.append(whole(out))
        grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimiser.step()
    return {f"logits {i}": y for i, y in enumerate(logits)} | grads


def checkpointed(model, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def ddp(model, patch, rank, *, reentrant=None, unused=False, before=True, **options) -> dict:
    if unused:
        model.unused = nn.Parameter(torch.ones(3, dtype=model.dtype))
    if before:
        patch(model)
    if reentrant is not None:
        checkpointed(model, reentrant)
    wrapped = DistributedDataParallel(model, **options)
    if not before:
        patch(wrapped)
    # PyTorch itself fails when the first step of a static graph is not synchronised.
    static = options.get("static_graph")
    return train(wrapped, model, rank, contextlib.nullcontext if static else wrapped.no_sync)


def decoder_layers(model) -> list[nn.Module]:
    return list(model.base_model.model.model.layers)


def attention_layers(model) -> list[nn.Module]:
    return [m for n, m in lora_layers(model).items() if n[-6:] in ("q_proj", "k_proj", "v_proj")]


def fsdp2(
    model,
    patch,
    rank,
    *,
    before=True,
    units=decoder_layers,
    bf16=False,
    reshard=True,
    checkpoint=False,
    offload=False,
    use=None,
) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, "reshard_after_forward": reshard}
    if bf16 and model.dtype == torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if before:
        patch(model)
    for unit in (*units(model), model):
        fully_shard(unit, **options)
    if not before:
        patch(model)
    if checkpoint:
        checkpointed(model, False)
    assert all(isinstance(p, DTensor) for p in model.parameters())

    @contextlib.contextmanager
    def later():
        """As with gradient accumulation: not reduced, and not sharded again either."""
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)
        yield
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(True)

    return (use or train)(model, model, rank, later)


def scored_between(forward, model, rank, later) -> dict:
    """What an evaluation leaves unsharded is there when training goes on."""
    with torch.no_grad():
        first = whole(forward(input_ids=BATCHES[0]).logits)
    return train(forward, model, rank, later) | {"before": first}


def restored(forward, model, rank, later) -> dict:
    """Trains on as PEFT's, whatever it was before."""
    first = train(forward, model, rank, later)
    restore(model)
    kinds = [type(m) for m in lora_layers(model).values()]
    assert all(issubclass(k, lora.Linear) and issubclass(k, FSDPModule) for k in kinds)
    assert not any(issubclass(k, served.Served) for k in kinds)
    again = train(forward, model, rank, later)
    return first | {f"again {n}": t for n, t in again.items()}


def stored(forward, model, rank, later) -> dict:
    """Its state, whole and by shards, after training; the whole one loads."""
    train(forward, model, rank, later)
    options = StateDictOptions(full_state_dict=True)
    state = {n: whole(t) for n, t in get_model_state_dict(model, options=options).items()}
    shards = {n: t.to_local().clone() for n, t in get_model_state_dict(model).items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    set_model_state_dict(model, dict(state), options=options)  # it changes the dict
    for name, t in get_model_state_dict(model).items():
        assert torch.equal(t.to_local(), shards[name]), name
    return state | {f"{n}, shard": t for n, t in shards.items()}


def fsdp1(model, patch, rank, *, policy, before=True, ignored=False, **options) -> dict:
    if before:
        patch(model)
    if ignored:
        options["ignored_states"] = [p for p in model.parameters() if p.requires_grad]
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy(model), device_id=torch.device("cpu"), **options
    )
    if not before:
        patch(wrapped)
    return train(wrapped, wrapped, rank, wrapped.no_sync)


def by_peft(model):
    from peft.utils.other import fsdp_auto_wrap_policy

    return fsdp_auto_wrap_policy(model)


def by_decoder_layer(model):
    return ModuleWrapPolicy({type(decoder_layers(model)[0])})


def by_lora_layer(model):  # the patched ones too, which are subclasses
    return ModuleWrapPolicy({lora.Linear})


def tensor_parallel(model, patch, rank) -> dict:
    """The base layers split over the two, their outputs whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    column = tp.ColwiseParallel(output_layouts=Replicate())
    row = tp.RowwiseParallel(input_layouts=Replicate())
    for name, layer in lora_layers(model).items():
        plan = row if name.endswith("down_proj") else column
        tp.parallelize_module(layer, mesh, {"base_layer": plan})
    patch(model)
    assert isinstance(lora_layers(model).popitem()[1].base_layer.weight, DTensor)
    return train(model, model, 0)


def loaded_in_parallel(model, patch, rank) -> dict:
    """As transformers splits a model that it loads, and PEFT the adapter with it."""
    from transformers import AutoModelForCausalLM

    folder = f"{OUT}.tp"
    if rank == 0:
        make_tiny_model().save_pretrained(folder)
    dist.barrier()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="eager")
    model = make_lora(base, init_std=0, target_modules=["q_proj", "k_proj", "v_proj"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    patch(model)
    return train(model, model, 0)


def sft(model, patch, rank, **changes) -> dict:
    """TRL's trainer, which finds the other process by the environment."""
    import datasets
    from conftest import ARITHMETIC
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    patch(model)
    args = SFTConfig(
        f"{OUT}.{rank}.sft",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        **changes,
    )
    rows = [{"input_ids": [1, 5 + i, 9, 7, 2], "labels": [-100, -100, 9, 7, 2]} for i in range(16)]
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(ARITHMETIC / "base", padding_side="left"),
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    trained = {n: whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    return trained | {"losses": torch.tensor(losses)}


def zero(model, patch, rank, *, stage, reentrant=False) -> dict:
    """DeepSpeed, without the operations that it would compile: what every parameter has become."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patch(model)
    if reentrant:
        checkpointed(model, True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=config)
    results = {}
    for i, batch in enumerate(BATCHES):
        results[f"logits {i}"] = out = engine(input_ids=batch[rank : rank + 1]).logits
        engine.backward(out.float().square().mean())
        if i % 2:
            grads = {n: deepspeed.utils.safe_get_full_grad(p).clone() for n, p in trained.items()}
        engine.step()
    patch(model)  # the report now, with the hooks and the shards in place
    engine.destroy()
    return {n: t.detach().clone() for n, t in results.items()} | grads


# Their names begin with what spreads the model.
CASES = {
    "ddp": (ddp, {}),
    "ddp, unused parameters": (ddp, {"unused": True, "find_unused_parameters": True}),
    "ddp, static graph": (ddp, {"static_graph": True}),
    "ddp, static graph, reentrant": (ddp, {"static_graph": True, "reentrant": True}),
    "ddp, reentrant": (ddp, {"reentrant": True}),
    "ddp, not reentrant": (ddp, {"reentrant": False}),
    "ddp, buckets and buffers, patched when wrapped": (
        ddp,
        {
            "before": False,
            "gradient_as_bucket_view": True,
            "broadcast_buffers": False,
            "bucket_cap_mb": 0.001,
        },
    ),
    "fsdp2": (fsdp2, {}),
    "fsdp2, patched when sharded": (fsdp2, {"before": False}),
    "fsdp2, bf16": (fsdp2, {"bf16": True}),
    "fsdp2, bf16, kept whole, patched when sharded": (
        fsdp2,
        {"bf16": True, "reshard": False, "before": False},
    ),
    "fsdp2, bf16, checkpointed": (fsdp2, {"checkpoint": True, "bf16": True}),
    "fsdp2, offloaded": (fsdp2, {"offload": True}),
    "fsdp2, q, k and v alone, patched when sharded": (
        fsdp2,
        {"units": attention_layers, "before": False},
    ),
    "fsdp2, q, k and v alone": (
        fsdp2,
        {"units": attention_layers, "reshard": False, "use": scored_between},
    ),
    "fsdp2, restored": (
        fsdp2,
        {"units": lambda m: list(lora_layers(m).values()), "use": restored},
    ),
    "fsdp2, stored": (fsdp2, {"use": stored}),
    "fsdp1, by PEFT's policy": (fsdp1, {"policy": by_peft, "use_orig_params": False}),
    "fsdp1, by PEFT's policy, as they were": (fsdp1, {"policy": by_peft, "use_orig_params": True}),
    "fsdp1, by PEFT's policy, patched when sharded": (
        fsdp1,
        {"policy": by_peft, "use_orig_params": False, "before": False},
    ),
    "fsdp1, by decoder layer, patched when sharded": (
        fsdp1,
        {"policy": by_decoder_layer, "use_orig_params": True, "before": False},
    ),
    "fsdp1, base alone": (
        fsdp1,
        {"policy": by_decoder_layer, "use_orig_params": False, "ignored": True},
    ),
    "fsdp1, by LoRA layer": (fsdp1, {"policy": by_lora_layer, "use_orig_params": True}),
    "fsdp1, base alone, by LoRA layer": (
        fsdp1,
        {"policy": by_lora_layer, "use_orig_params": False, "ignored": True},
    ),
    "tensor parallel": (tensor_parallel, {}),
    "tensor parallel, loaded": (loaded_in_parallel, {}),
    "trl": (sft, {}),
    "zero 2": (zero, {"stage": 2}),
    "zero 2, reentrant": (zero, {"stage": 2, "reentrant": True}),
    "zero 3": (zero, {"stage": 3}),
    "zero 3, reentrant": (zero, {"stage": 3, "reentrant": True}),
}


def run(name: str, rank: int) -> dict:
    """Results of the plain, the patched and maybe the exact run; counts and reports of patched."""
    case, options = CASES[name]
    case, found = partial(case, **options), {"reports": []}
    make = biased if name.startswith("fsdp1") else llama

    def patch(model):
        found["reports"].append(accelerate(model))

    def nothing(model):
        pass

    found["plain"] = case(make().train(), nothing, rank)
    with counted() as counts:
        found["patched"] = case(make().train(), patch, rank)
    found["counts"] = dict(counts)
    if "bf16" in name or name.startswith("fsdp1"):  # its q and k have large biases
        found["exact"] = case(make().train().double(), nothing, rank)
    return found


def main(rank: int, world: int, port: int, out: str, *cases: str) -> None:
    global OUT
    OUT = out
    options = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", **options)
    results = {}
    for name in cases:
        try:
            results[name] = run(name, rank)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    told = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    main(*told, *sys.argv[1:])
