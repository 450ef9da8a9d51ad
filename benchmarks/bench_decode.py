"""Tokens a second of transformers' `generate`: prompt 128, greedy, dynamic cache; the steps alone.

bf16 base, fp32 adapters, no autocast, as in TRL's rollouts; random weights, LLaMA-1B and 7B shapes.
The clock starts when the prompt's forward has given its logits and the GPU is done with it, so that
the prompt is not counted; then each of the 16 tokens takes a forward of one position.
A round runs every variant once on the same weights, the next round in another order. A variant runs
untimed first, and in a whole round that is not counted: else the first one met, as `no LoRA` did,
pays for every kernel that is loaded and for the allocator's growth. No garbage is collected while
the clock runs.
  no LoRA    the base model: its linear layers stand in the place of the LoRA layers
  PEFT       fp32 adapters of rank 8 on q, k, v, gate, up, down
  lorapar    the PEFT model after lorapar.accelerate
  merged     inside merged_for_generation; `once_s` is what merging and restoring take, once a batch
`ratio` is tokens/s over those of no LoRA in the same round, the median of all rounds. A case ends
after 40 seconds once each variant had each place.
"""

import argparse
import contextlib
import gc
import statistics
import time

import harness
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

import lorapar
from lorapar.patch import lora_layers
from lorapar_kernels.testing import error

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 256,
}  # fmt: skip
BATCHES, PROMPT, NEW = (1, 8, 64), 128, 16
WARMUP = 4  # tokens before each timed call
SECONDS = 40  # of a case
R, ADAPTER_STD = 8, 0.1  # B's, so that the adapter's part of y is a fifth of the base's
BASELINE = "no LoRA"
TOLERANCE = 0.25  # of logits: bf16 roundings of 32 layers apart; without the adapter 1 and more off
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(shape: dict) -> LlamaForCausalLM:
    """The base model, made where it runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            config = LlamaConfig(**shape, attn_implementation="sdpa")
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


class Variants:
    """One model with one adapter that becomes each variant in turn."""

    names = (BASELINE, "PEFT", "lorapar", "merged")

    def __init__(self, base: LlamaForCausalLM):
        self.base = base
        config = LoraConfig(
            r=R, lora_alpha=2 * R, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(base, config).eval()
        self.layers = lora_layers(base)
        for layer in self.layers.values():  # PEFT starts at zero; data must be random
            nn.init.normal_(layer.lora_B["default"].weight, std=ADAPTER_STD)
        self.merging, self.once_s = None, []

    def become(self, name: str) -> None:
        begin = time.perf_counter()
        if self.merging is not None:
            self.merging.__exit__(None, None, None)
            _synchronize()
            self.once_s[-1] += time.perf_counter() - begin
            self.merging = None
        for path, layer in self.layers.items():
            self._place(path, layer)
        lorapar.restore(self.base)
        if name == BASELINE:
            for path, layer in self.layers.items():
                self._place(path, layer.base_layer)
        if name == "lorapar" and (left := lorapar.accelerate(self.base)).skipped:
            raise SystemExit(f"accelerate left layers to PEFT: {left}")
        if name == "merged":
            begin = time.perf_counter()
            self.merging = lorapar.merged_for_generation(self.base, keep="gpu")
            with contextlib.redirect_stdout(None):  # it says how much it keeps
                self.merging.__enter__()
            _synchronize()
            self.once_s.append(time.perf_counter() - begin)

    def _place(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.base.get_submodule(parent), name, layer)


class Clock(LogitsProcessor):
    """Starts with the first logits, those of the prompt."""

    def __init__(self):
        self.begin = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.begin is None:
            _synchronize()
            self.begin = time.perf_counter()
        return scores


def generate(model: LlamaForCausalLM, ids: Tensor, new: int) -> float:
    """Seconds of `new` steps after the prompt's: never fewer."""
    clock = Clock()
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new + 1,
        max_new_tokens=new + 1, pad_token_id=0, logits_processor=[clock],
    )  # fmt: skip
    _synchronize()
    seconds = time.perf_counter() - clock.begin
    assert made.shape == (len(ids), ids.shape[1] + new + 1)
    return seconds


def check(label: str, variants: Variants, ids: Tensor) -> dict[str, float]:
    """Relative distance of the logits of a few rows from PEFT's; SystemExit where ours are off."""
    found = {}
    with torch.no_grad():
        for name in variants.names:
            variants.become(name)
            few = ids[:, : max(1, 64 // len(ids))]
            found[name] = variants.base(few, logits_to_keep=1).logits.double()
    off = {n: error(logits, found["PEFT"]).rms for n, logits in found.items()}
    if not max(off["lorapar"], off["merged"]) <= TOLERANCE <= off[BASELINE]:
        raise SystemExit(f"{label}: logits are off PEFT's by {off}; nothing was timed")
    return off


def order(names: tuple[str, ...], turn: int) -> tuple[str, ...]:
    """Each name takes each place, and follows now this name, now that."""
    first = turn % len(names)
    turned = names[first:] + names[:first]
    return turned[::-1] if turn // len(names) % 2 else turned


def measure(label: str, variants: Variants, ids: Tensor, new: int, rounds: int) -> list[dict]:
    names, off = variants.names, check(label, variants, ids)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # the model is no garbage, and need not be walked before each call
    end = time.perf_counter() + SECONDS
    for turn in range(-1, rounds):
        for name in order(names, turn):
            variants.become(name)
            if turn < 0:  # not counted: kernels are loaded, and the allocator grows
                generate(variants.base, ids, new)
                continue
            generate(variants.base, ids, WARMUP)
            gc.collect()
            gc.disable()
            try:
                seconds[name].append(generate(variants.base, ids, new))
            finally:
                gc.enable()
        if turn + 1 >= len(names) and time.perf_counter() > end:
            break
    variants.become(BASELINE)
    gc.unfreeze()
    rows = []
    for name in names:
        ms = sorted(1e3 * s / new for s in seconds[name])
        row = {"case": label, "variant": name}
        row["tokens_per_s"] = round(1e3 * len(ids) / statistics.median(ms), 1)
        row["ms_a_token"] = round(statistics.median(ms), 2)
        for column, share in (("p20", 0.2), ("p80", 0.8)):
            row[column] = round(ms[int(share * (len(ms) - 1))], 2)
        row["ratio"] = harness.median_ratio(seconds[BASELINE], seconds[name])
        row["once_s"] = round(statistics.median(variants.once_s), 3) if name == "merged" else ""
        row["off_peft"] = f"{off[name]:.1e}"
        rows.append(row)
    return rows


def _synchronize() -> None:
    if harness.CUDA:
        torch.cuda.synchronize()


def main(options: argparse.Namespace) -> None:
    shapes, batches, prompt, new = SHAPES, BATCHES, PROMPT, NEW
    if options.smoke:
        shapes, batches, prompt, new = {"tiny": TINY}, (1, 3), 8, 5
    rows = []
    for shape, config in shapes.items():
        labels = {f"{shape} batch {batch}": batch for batch in batches}
        picked = {n: b for n, b in labels.items() if harness.is_picked(n, options)}
        if not picked:
            continue
        variants = Variants(build(config))
        for label, batch in picked.items():
            ids = torch.randint(config["vocab_size"], (batch, prompt), device=DEVICE)
            harness.report(
                "decode", rows, measure(label, variants, ids, new, options.rounds), options
            )
        del variants
        gc.collect()
        if harness.CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(harness.parse("decode", rounds=8))
