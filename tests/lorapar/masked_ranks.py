"""One process of a masked SFT run, as torchrun starts it: python masked_ranks.py OUT.

Each case is a run of TRL's trainer (DDP) on one global batch of four rows a step, or, where
accelerate would shard on a GPU alone, a loop with the trainer's events on a model sharded by
FSDP2. Per rank the adapter before and after is written, whole, to OUT.RANK.
"""

import os
import sys
from functools import partial

import datasets
import torch
from conftest import ARITHMETIC, make_lora, make_tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerState
from trl import SFTConfig, SFTTrainer

from lorapar.callback import LoraParCallback, MaskedAdamWFactory
from lorapar.config import PartitionSettings
from lorapar.partitioning import adapter_parameters, make_partition

GLOBAL_BATCH, STEPS, MAX_NORM = 4, 3, 0.05  # clipped: what is in the norm matters
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def partition_for(model, theta=0.6):
    torch.manual_seed(2)
    scores = [{n: torch.rand(p.shape) for n, p in adapter_parameters(model).items()} for _ in "12"]
    return make_partition(*scores, PartitionSettings(theta, 0.5, 0.5))


def values(model) -> dict[str, torch.Tensor]:
    found = {n: p.detach() for n, p in adapter_parameters(model).items()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in found.items()}


def run(folder: str, rank: int, world: int, *, attached: bool, left: bool = False) -> dict:
    model = make_lora(make_tiny_model())
    if left:
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        layer.lora_A["default"].register_forward_hook(lambda *unused: None)
    partition, before = partition_for(model), values(model)
    args = SFTConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        logging_steps=1,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        max_steps=STEPS,
        max_grad_norm=MAX_NORM,
        weight_decay=ADAMW["weight_decay"],
        learning_rate=ADAMW["lr"],
    )
    rows = [
        {
            "input_ids": [1, 5 + i, 9, *[7] * (i % 3), 2],
            "labels": [-100] * 2 + [9 + i] * (2 + i % 3),
        }
        for i in range(16)
    ]
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(ARITHMETIC / "base", padding_side="left"),
    )
    assert trainer.accelerator.num_processes == world
    callback = LoraParCallback(partition, "sft")
    if attached:
        callback.attach(trainer)
    else:
        trainer.add_callback(callback)
    trainer.train()
    norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "optimiser": type(trainer.optimizer.optimizer).__name__,
        "checked": callback.check_frozen(trainer.model),
        "norms": norms,
        "before": before,
        "after": values(trainer.model),
        "masks": partition.sft,
    }


def run_sharded(folder: str, rank: int, world: int, *, masked: bool) -> dict:
    model = make_lora(make_tiny_model(tie_word_embeddings=False)).train()
    partition, before = partition_for(model), values(model)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for part in (*model.base_model.model.model.layers, model):
            fully_shard(part, mesh=mesh)
    callback = LoraParCallback(partition, "sft")
    if masked:
        optimiser = MaskedAdamWFactory()(
            model, callback=callback, decays=lambda m: [n for n, _ in m.named_parameters()], **ADAMW
        )
    else:
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    events, norms = (None, TrainerState(), None), []
    callback.on_train_begin(*events, model=model, optimizer=optimiser)
    for step in range(STEPS):
        ids = torch.arange(3 + step, 27 + step).view(GLOBAL_BATCH, 6)[rank::world]
        model(input_ids=ids, labels=ids).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimiser.step()
        callback.on_optimizer_step(*events)
        optimiser.zero_grad()
    callback.on_train_end(*events, model=model)
    return {
        "wrapper": type(model).__name__,
        "optimiser": type(optimiser).__name__,
        "checked": callback.check_frozen(model),
        "norms": norms,
        "before": before,
        "after": values(model),
        "masks": partition.sft,
    }


CASES = {
    "attached": partial(run, attached=True),  # MaskedAdamW
    "added": partial(run, attached=False),  # AdamW, whose decay is put back
    "left to PEFT": partial(run, attached=True, left=True),  # one layer: its hook alone masks
    "sharded": partial(run_sharded, masked=True),
    "sharded, put back": partial(run_sharded, masked=False),
}


def main(out: str) -> None:
    rank, world = (int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("WORLD_SIZE", 1)))
    torch.save(
        {n: case(f"{out}.{rank}.d", rank, world) for n, case in CASES.items()}, f"{out}.{rank}"
    )


if __name__ == "__main__":
    main(sys.argv[1])
