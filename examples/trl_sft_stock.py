"""TRL's SFT of a LoRA adapter: stock, and with three lines more.

    python examples/trl_sft_stock.py MODEL TRAIN.jsonl ADAPTER
    python examples/trl_sft.py MODEL TRAIN.jsonl ADAPTER PARTITION.safetensors

TRAIN.jsonl has `prompt` and `completion`. ADAPTER is the folder of a PEFT adapter to start from.
The second script has three lines that the first has not: they import this package, serve the
adapter by its kernels, and train those of its elements that PARTITION.safetensors selects. Leave
the third out and all of them train. A partition belongs to the adapter that was scored for it:
`init/` and `partition.safetensors` in one run's folder.
"""

import sys

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

model, train, adapter = sys.argv[1:4]
trainer = SFTTrainer(
    model=PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), adapter, is_trainable=True
    ),
    args=SFTConfig(
        output_dir="runs/trl_sft",
        weight_decay=0.1,
        max_steps=20,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=train, split="train"),
)
trainer.train()
trainer.save_model()
