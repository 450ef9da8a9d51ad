"""python loads_without_us.py MODEL IDS OUT DEVICE: a pickled model, where lorapar is missing."""

import sys

import torch

sys.modules.update(dict.fromkeys(["lorapar", "lorapar_kernels"]))

model, ids = (torch.load(path, weights_only=False) for path in sys.argv[1:3])
torch.save(model(input_ids=ids.to(sys.argv[4])).logits, sys.argv[3])
