"""An attention whose q, k and v are siblings, PEFT's and patched."""

import copy

import torch
from conftest import DEVICE
from peft import LoraConfig, get_peft_model
from torch import nn

from lorapar.patch import accelerate
from lorapar_kernels.testing import assert_close

QKV = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """q of x, k and v of y, which may be x; widths differ, so that no two can be exchanged."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, n) for n in (8, 12, 20))

    def forward(self, x, y):
        q, k, v = self.q_proj(x), self.k_proj(y), self.v_proj(y)
        return q.sum(-1, keepdim=True) * k.sum(-1, keepdim=True) * v.sin()


class CrossAttention(Attention):
    def forward(self, hidden_states, encoder_hidden_states):
        return super().forward(hidden_states, encoder_hidden_states)


def attention(kind=Attention, **changes):
    """PEFT's and a patched copy."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": QKV, "init_lora_weights": False}
    plain = get_peft_model(kind(), LoraConfig(**(settings | changes))).to(DEVICE)
    patched = copy.deepcopy(plain)
    accelerate(patched)
    return plain, patched


def inputs(count=2, **options):
    return [torch.randn(3, 16, device=DEVICE, **options) for _ in range(count)]


def close(patched, plain, *tensors):
    assert_close("y", patched(*tensors), plain(*tensors))
