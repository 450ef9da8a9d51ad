"""FSDP 2 over a base model that does not train: for scoring and evaluation.

Training is accelerate's business, which shards base and adapter together. Here the adapter stays
whole on every rank: its sums are kept per rank and added up once.
"""

import os

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from lorapar import ranks
from lorapar.partitioning import adapter_parameters


def shard_base(model: nn.Module) -> None:
    raise NotImplementedError
