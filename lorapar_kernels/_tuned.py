"""Launch configurations and plans: measured ones from tuned/<gpu>.json, else a safe default."""

import functools
import json
import re
from pathlib import Path

import torch
from torch import Tensor

_DIR = Path(__file__).parent / "tuned"


def file_of(gpu: str) -> Path:
    """Where the measurements of a card are kept."""
    return _DIR / (re.sub(r"\W+", "_", gpu).strip("_").lower() + ".json")


@functools.cache
def _table(device_index: int) -> dict:
    path = file_of(torch.cuda.get_device_name(device_index))
    return json.loads(path.read_text())["ops"] if path.exists() else {}


@functools.cache
def _nearest(op: str, bucket: int, key: str, device_index: int) -> dict | bool | None:
    by_m = _table(device_index).get(op, {}).get(key)
    if not by_m:
        return None
    return by_m[min(by_m, key=lambda known: abs((int(known) - 1).bit_length() - bucket))]


def chosen(key: str, rows: Tensor) -> bool:
    """Whether `extended_gemm` was measured to be the faster plan, at an M within a factor of four;
    if not measured, it is not."""
    bucket, index = (max(rows.shape[0], 1) - 1).bit_length(), rows.device.index or 0
    known = _table(index).get("extended_gemm", {}).get(key, {})
    near = any(abs((int(m) - 1).bit_length() - bucket) <= 2 for m in known)
    return near and bool(_nearest("extended_gemm", bucket, key, index))


@functools.cache
def _roomy(device_index: int) -> bool:
    """Whether a block may have 227 KB of shared memory: Hopper, data-centre Blackwell."""
    return torch.cuda.get_device_capability(device_index)[0] in (9, 10)


def config(op: str, rows: Tensor, key: str, hopper: dict, safe: dict, interpreted: dict) -> dict:
    """The configuration for `rows` [M, ·]: the one measured for the nearest M, else `hopper`.

    fp32, and cards with less shared memory than Hopper's, take `safe`, which needs less than 99 KB.
    Never benchmarks anything: two ranks, or two runs, always launch the same kernel. Without a GPU
    Triton interprets: `interpreted` serves.
    """
    if rows.device.type != "cuda":
        return interpreted
    index = rows.device.index or 0
    if rows.element_size() != 2 or not _roomy(index):
        return safe
    bucket = (max(rows.shape[0], 1) - 1).bit_length()  # ⌈log2 M⌉
    return _nearest(op, bucket, key, index) or hopper
