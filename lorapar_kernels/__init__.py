"""Masked LoRA forward and backward, importance sums, selection and a masked optimiser.

Needs torch and triton only. `lorapar` (same distribution) connects it to PEFT and TRL.
"""

from lorapar_kernels.importance import VARIANTS, ImportanceSums, importance
from lorapar_kernels.lora_linear import Projection, lora_add, lora_linear, lora_linear_group
from lorapar_kernels.mask import LoraMask
from lorapar_kernels.masked_adamw import MaskedAdamW
from lorapar_kernels.selection import select_by_mass, select_top

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "ImportanceSums",
    "LoraMask",
    "MaskedAdamW",
    "Projection",
    "importance",
    "lora_add",
    "lora_linear",
    "lora_linear_group",
    "select_by_mass",
    "select_top",
]
