"""The scoring pass on LLaMA-7B's shape: 100 examples as long as GSM8K's, random bf16 weights.

Times are per example, over the whole pass; batches hold examples of like length:
  released script's way  PEFT, one example at a time, then three elementwise operations on each
                         matrix: s1 += g φ, s2 += (g φ)², and g cleared
  PEFT forward+backward  batches of 16, gradients of A and B, nothing summed
  forward+backward       the same served by lorapar_kernels; what a scoring pass is measured against
  lorapar                `lorapar.importance.accumulate`: padded, packed, checkpointed
`beyond_bytes` is memory at the peak beyond that of forward+backward, in bytes an adapter element.
`rms_first`, `rms_second`: relative distance of |Σ g φ| and of Σ (g φ)² from those of the script's
way in fp32. That way in bf16 sets the standard: 1.5 times its distance is allowed.
"""

import argparse
import csv
import functools
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from bench_step import DEVICE, SHAPE_7B, SHAPE_TINY, TARGETS, build, wall_ms
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lorapar
from lorapar.batches import batch_losses
from lorapar.importance import Example, accumulate
from lorapar.partitioning import adapter_parameters
from lorapar_kernels.testing import FACTOR, error

BATCH = 16
LENGTHS = Path(__file__).parent / "gsm8k_lengths.csv"
SCRIPT, PEFT = "released script's way, batch 1", "PEFT forward+backward, batch 16"
BASELINE = "forward+backward, batch 16"


def examples(vocabulary: int, share: float) -> list[Example]:
    """Random tokens in the lengths of the file, times share."""
    with open(LENGTHS) as f:
        next(f)
        lengths = [(int(r["question"]), int(r["answer"])) for r in csv.DictReader(f)]

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (max(1, int(n * share)),)).tolist()

    return [Example(ids(q), ids(a)) for q, a in lengths]


def scripts_way(model: nn.Module, batch: list[Example]) -> dict[str, dict[str, Tensor]]:
    """What the released script keeps, an example at a time: Σ g φ and Σ (g φ)², over B."""
    named = adapter_parameters(model)
    first = {n: torch.zeros_like(p) for n, p in named.items()}
    second = {n: torch.zeros_like(p) for n, p in named.items()}
    for e in batch:
        ids = torch.tensor([e.prompt + e.completion], device=DEVICE)
        labels = torch.tensor([[-100] * len(e.prompt) + e.completion], device=DEVICE)
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        for n, p in named.items():
            change = p.grad * p.detach()
            first[n] += change
            second[n] += change.square()
    model.zero_grad()
    return {
        "taylor1": {n: first[n].abs() / len(batch) for n in named},
        "fisher": {n: 0.5 * second[n] / len(batch) for n in named},
    }


def in_fp32(model: nn.Module, batch: list[Example]) -> dict[str, dict[str, Tensor]]:
    """The same with the base cast to fp32, whose bf16 weights come back as they were."""
    base = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    for p in base:
        p.data = p.data.float()
    found = scripts_way(model, batch)
    for p in base:
        p.data = p.data.bfloat16()
    return found


def forward_backward(model: nn.Module, batch: list[Example], size: int) -> None:
    batch = sorted(batch, key=lambda e: len(e.prompt) + len(e.completion), reverse=True)
    for start in range(0, len(batch), size):
        batch_losses(model, batch[start : start + size], 0).sum().backward()
        model.zero_grad()


def peak(call: Callable[[], object]) -> int:
    if not harness.CUDA:
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(label: str, model: nn.Module, batch: list[Example], rounds: int) -> list[dict]:
    elements = sum(p.numel() for p in adapter_parameters(model).values())
    score = functools.partial(accumulate, model, batch, batch_size=BATCH)
    calls: dict[str, tuple[bool, Callable[[], object]]] = {  # name → (served?, call)
        SCRIPT: (False, lambda: scripts_way(model, batch)),
        PEFT: (False, lambda: forward_backward(model, batch, BATCH)),
        BASELINE: (True, lambda: forward_backward(model, batch, BATCH)),
        "lorapar, batch 16": (True, score),
        "lorapar, batch 16 packed": (True, lambda: score(packed=True)),
        "lorapar, batch 16 checkpointed": (True, lambda: score(gradient_checkpointing=True)),
    }

    def become(name: str) -> None:
        lorapar.restore(model)
        if calls[name][0] and (left := lorapar.accelerate(model)).skipped:
            raise SystemExit(f"accelerate left layers to PEFT: {left}")

    become(SCRIPT)
    exact = in_fp32(model, batch)

    def distances(found: Callable[[str], dict[str, Tensor]]) -> list[float]:
        off = []
        for variant, right in exact.items():
            made = found(variant)
            ours, theirs = (
                torch.cat([of[n].flatten().cpu() for n in right]) for of in (made, right)
            )
            off.append(error(ours, theirs.double()).rms)
        return off

    off = {SCRIPT: distances(scripts_way(model, batch).get)}
    for name in (n for n in calls if n.startswith("lorapar")):
        become(name)
        sums = calls[name][1]()
        off[name] = distances(lambda variant, sums=sums: sums.scores(model, variant))
        if any(not ours <= FACTOR * its for ours, its in zip(off[name], off[SCRIPT])):
            raise SystemExit(f"{label}: {name} is {off[name]} off, the script's {off[SCRIPT]}")
    peaks, times = {}, {name: [] for name in calls}
    for name, (_, call) in calls.items():
        become(name)
        peaks[name] = peak(call)
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            become(name)
            times[name].append(wall_ms(calls[name][1]) / len(batch))
    rows = []
    for name in calls:
        row = {"case": label, "provider": name, "ms_per_example": statistics.median(times[name])}
        row["ms_per_example"] = round(row["ms_per_example"], 3)
        row["times_faster"] = round(
            statistics.median(s / t for s, t in zip(times[SCRIPT], times[name])), 2
        )
        row["peak_gib"] = round(peaks[name] / 2**30, 2)
        row["beyond_bytes"] = round((peaks[name] - peaks[BASELINE]) / elements, 2)
        for column, e in zip(("rms_first", "rms_second"), off.get(name, ("", ""))):
            row[column] = f"{e:.1e}" if name in off else ""
        rows.append(row)
    return rows


def main(options: argparse.Namespace) -> None:
    shape = SHAPE_TINY if options.smoke else SHAPE_7B
    base, rows = build(shape), []
    config = LoraConfig(r=8, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    for p in adapter_parameters(model).values():
        nn.init.normal_(p, std=0.01)
    batch = examples(shape["vocab_size"], 0.05 if options.smoke else 1.0)
    tokens = sum(len(e.prompt) + len(e.completion) for e in batch) // len(batch)
    label = f"{len(batch)} examples of {tokens} tokens, r=8"
    if harness.is_picked(label, options):
        harness.report("score", rows, measure(label, model, batch, options.rounds), options)


if __name__ == "__main__":
    main(harness.parse("score", rounds=3))
