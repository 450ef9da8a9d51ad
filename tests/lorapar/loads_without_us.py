"""python loads_without_us.py MODEL IDS OUT: a pickled model, where no lorapar can be imported."""

import sys

sys.modules.update(dict.fromkeys(["lorapar", "lorapar_kernels"]))

import torch

model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
