"""A stock TRL script, three lines longer: frozen elements stay frozen, the rest trains as before.

    python examples/trl_sft.py MODEL TRAIN.jsonl PARTITION.safetensors

TRAIN.jsonl has `prompt` and `completion`. PARTITION.safetensors is what `lorapar partition` wrote
for an adapter of the same shape; without one, `accelerate` alone serves the adapter.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import lorapar  # 1


def main(model: str, train: str, partition: str | None = None) -> None:
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="runs/trl_sft",
            weight_decay=0.1,
            max_steps=20,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=train, split="train"),
        peft_config=LoraConfig(
            r=8,
            lora_alpha=64,
            target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )
    print(lorapar.accelerate(trainer.model))  # 2
    if partition:
        lorapar.LoraParCallback(partition, stage="sft").attach(trainer)  # 3
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
