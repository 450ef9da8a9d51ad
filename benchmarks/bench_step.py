"""A training step of a whole model, LLaMA-7B's shape, random bf16 weights, bf16 autocast.

A step is forward, loss and backward, then gradients are set to None; no optimizer. Every variant
runs on the same weights, in turn, round by round: after it was put in place a step that is not
timed (if compiled, as many as record it), since training repeats steps, then one that is, without
garbage collection:
  no LoRA        the frozen model: its linear layers stand in the place of the LoRA layers
  PEFT           fp32 adapters, dropout .05; PEFT p=0 without
  lorapar        the PEFT model after lorapar.accelerate, dropout .05
  … compiled     the same with every decoder layer compiled, mode `reduce-overhead` (CUDA graphs):
                 lorapar by accelerate(compile=...), the others by the layers' own compile()

`compiled_ratio` is to `no LoRA compiled`. The peak of a compiled variant is taken alone, from
nothing compiled on: it contains what compiling and recording need.
"""

import argparse
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence

import harness
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorapar
from lorapar.patch import lora_layers
from lorapar_kernels.testing import error

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = [(1, 512, False), (1, 2048, False), (4, 2048, True)]  # batch, tokens, checkpointing
RANKS = (8, 64)
COMPILED = [(1, 512, 8), (1, 2048, 8)]  # batch, tokens, rank of the steps that are compiled too
MODE = "reduce-overhead"
DROPOUT = 0.05
BASELINE = "no LoRA"
SHAPE_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096,
}  # fmt: skip
SHAPE_TINY = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP = 4  # steps that compile, record and replay
TOLERANCE = 0.25  # two bf16 roundings of 32 layers apart; a wrong layer is 1 off


def build(shape: dict) -> LlamaForCausalLM:
    """The base model, made where it runs; its embeddings' output asks for a gradient."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            config = LlamaConfig(**shape, use_cache=False, attn_implementation="sdpa")
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).train()
    model.enable_input_require_grads()
    return model


class Variants:
    """One model with one adapter that becomes each variant in turn."""

    def __init__(self, base: LlamaForCausalLM, r: int):
        self.base = self.call = base  # `call` may be a wrapping of it
        config = LoraConfig(
            r=r, lora_alpha=2 * r, lora_dropout=DROPOUT, target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        self.model = get_peft_model(base, config).train()
        self.layers = lora_layers(base)
        self.adapter = [p for p in base.parameters() if p.requires_grad]
        for layer in self.layers.values():  # PEFT starts at zero; data must be random
            nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
        self.compiled = False
        self.names = (BASELINE, "PEFT", "PEFT p=0", "lorapar")

    def become(self, name: str) -> None:
        name, compiled, rest = name.partition(" compiled")
        self.compiled, name = bool(compiled), name + rest
        for block in self.base.model.layers:
            block._compiled_call_impl = None
        for path, layer in self.layers.items():
            self._place(path, layer)
            layer.lora_dropout["default"].p = 0.0 if name.endswith("p=0") else DROPOUT
        lorapar.restore(self.base)
        if name == BASELINE:
            for path, layer in self.layers.items():
                self._place(path, layer.base_layer)
        if name.startswith("lorapar"):
            report = lorapar.accelerate(self.base, compile=MODE if self.compiled else None)
            if report.skipped:
                raise SystemExit(f"accelerate left layers to PEFT: {report}")
        elif self.compiled:
            for block in self.base.model.layers:
                block.compile(mode=MODE, dynamic=False)

    def _place(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.base.get_submodule(parent), name, layer)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.forward_backward(ids)
        for p in self.adapter:
            p.grad = None
        return loss

    def forward_backward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = self.call(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def gradient(self, ids: torch.Tensor) -> torch.Tensor:
        """All gradients of the adapter in one vector."""
        self.forward_backward(ids)
        found = torch.cat([p.grad.flatten() for p in self.adapter])
        self.base.zero_grad(set_to_none=True)
        return found

    def remove(self) -> None:
        """The base model as it was before the adapter."""
        self.become("PEFT")
        self.model.unload()


def wall_ms(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return 1e3 * (time.perf_counter() - start)


def _synchronize() -> None:
    if harness.CUDA:
        torch.cuda.synchronize()


def gpu_times(call: Callable[[], object]) -> dict:
    """Busy GPU time (streams may overlap), summed kernel time and kernels of one call."""
    if not harness.CUDA:
        return {"gpu_ms": "", "gpu_sum_ms": "", "kernels": ""}
    spans = [span for _, *span in kernels(call)]
    total = sum(end - start for start, end in spans)
    return {
        "gpu_ms": round(busy(spans) / 1e3, 2),
        "gpu_sum_ms": round(total / 1e3, 2),
        "kernels": len(spans),
    }


def kernels(call: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Name, start and end in µs of what one call runs on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return [
        (e.name, e.time_range.start, e.time_range.end)
        for e in profiled.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(e, "is_user_annotation", False)
    ]


def busy(spans: Iterable[Sequence[float]]) -> float:
    """The length of the union of the intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def peak_gib(variants: Variants, name: str, call: Callable[[], object]) -> float | str:
    """Peak memory of a step, weights included. Without LoRA its weights do not count."""
    if not harness.CUDA:
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    if name == BASELINE:
        peak -= sum(p.numel() * p.element_size() for p in variants.adapter)
    return round(peak / 2**30, 2)


def peak_compiled_gib(variants: Variants, name: str, ids: torch.Tensor) -> float | str:
    """Peak memory of the first steps of a compiled variant, with nothing else compiled."""
    torch.compiler.reset()
    gc.collect()
    variants.become(name)

    def steps():
        for _ in range(WARMUP):
            variants.step(ids)

    return peak_gib(variants, BASELINE if name.startswith(BASELINE) else name, steps)


def check(label: str, variants: Variants, ids: torch.Tensor, compiled: bool) -> None:
    """Without dropout ours has PEFT's gradients; else nothing is timed."""
    variants.become("PEFT p=0")
    peft = variants.gradient(ids).double()
    for name in ("lorapar p=0", "lorapar compiled p=0")[: 1 + compiled]:
        variants.become(name)
        for _ in range(WARMUP if variants.compiled else 1):
            ours = variants.gradient(ids)
        distance = error(ours, peft).rms
        if not distance <= TOLERANCE:
            raise SystemExit(
                f"{label}: {name}: our gradients are {distance:.3f} off PEFT's (relative, limit "
                f"{TOLERANCE}); nothing was timed"
            )


def measure(
    label: str, variants: Variants, ids: torch.Tensor, rounds: int, compiled: bool, skip: str | None
) -> list[dict]:
    check(label, variants, ids, compiled)
    names = [*variants.names]
    if compiled:
        names += [f"{name} compiled" for name in (BASELINE, "PEFT", "lorapar")]
    names = [name for name in names if not skip or skip not in name]
    of_compiled = {n: peak_compiled_gib(variants, n, ids) for n in names if "compiled" in n}
    torch.compiler.reset()
    rows: dict[str, dict] = {}
    for name in names:  # also the warm-up
        variants.become(name)
        for _ in range(WARMUP if variants.compiled else 1):
            variants.step(ids)
        row = rows[name] = {"case": label, "variant": name, "ms": 0.0, "ratio": 0.0}
        row |= gpu_times(lambda: variants.step(ids))
        row["gpu_ratio"] = ""
        row["compiled_ratio"] = ""
        row["peak_gib"] = of_compiled.get(name) or peak_gib(
            variants, name, lambda: variants.step(ids)
        )
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            variants.become(name)
            for _ in range(WARMUP if variants.compiled else 1):
                variants.step(ids)
            gc.disable()
            try:
                times[name].append(wall_ms(lambda: variants.step(ids)))
            finally:
                gc.enable()
    for name, row in rows.items():
        row["ms"] = round(statistics.median(times[name]), 2)
        row["ratio"] = harness.median_ratio(times[name], times[BASELINE])
        if compiled:
            row["compiled_ratio"] = harness.median_ratio(times[name], times[f"{BASELINE} compiled"])
        if row["gpu_ms"]:
            row["gpu_ratio"] = round(row["gpu_ms"] / rows[BASELINE]["gpu_ms"], 3)
        row["tokens_per_s"] = round(1e3 * ids.numel() / row["ms"])
        variants.become(name)
        row["loss"] = round(variants.step(ids).item(), 4)
    return list(rows.values())


def main(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    shape, steps = (SHAPE_TINY, [(2, 16, False), (2, 16, True)]) if options.smoke else (
        SHAPE_7B, STEPS
    )  # fmt: skip
    compiled_steps = COMPILED
    if options.smoke:
        compiled_steps = [(*steps[0][:2], RANKS[0])]
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # fast to compile
    base, rows = build(shape), []
    for r in RANKS[:1] if options.smoke else RANKS:
        variants = Variants(base, r)
        for batch, tokens, checkpointing in steps:
            label = f"{batch}x{tokens} r={r}{' checkpointing' * checkpointing}"
            if not harness.is_picked(label, options):
                continue
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                base.gradient_checkpointing_disable()
            ids = torch.randint(shape["vocab_size"], (batch, tokens), device=DEVICE)
            compiled = (batch, tokens, r) in compiled_steps and not checkpointing
            new = measure(label, variants, ids, options.rounds, compiled, options.skip)
            harness.report("step", rows, new, options)
        variants.remove()


if __name__ == "__main__":
    main(harness.parse("step", rounds=12))
