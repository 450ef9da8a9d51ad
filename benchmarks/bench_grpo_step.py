"""A GRPO step of TRL with transformers' generation: 8 completions of 256 tokens, LLaMA-1B's shape.

bf16 base, random weights, fp32 adapters of rank 8, TRL's own settings but for the reference (beta
.04, the adapter as it was). TRL generates in train mode: with dropout p, rollouts have it too, but
for merged ones. No completion ends early, so that all have equal work. One trainer; its steps take
the variants in turn:
  PEFT, lorapar    before and after lorapar.accelerate
  lorapar merged   the rollouts besides in merged_for_generation, its time counted
A step is `rollout` (TRL's _generate), `scoring` (the rest of _generate_and_score_completions: the
reference's forward, rewards) and `update` (forward, backward, optimiser). `speedup` is PEFT's step
over this one of the same round. `kl` is merged_kl of the last batch. The first round is not
counted. Its first step generates as many tokens as any: attention is prepared anew for each length
of the cache, once a process, some 50 ms a token. The others generate few, which are repeated, so
that scoring and update meet their shapes. A case ends with the round that reaches 60 seconds.
"""

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import datasets
import harness
import torch
from bench_decode import ADAPTER_STD, DEVICE, SHAPES, TARGETS, TINY, TOLERANCE, build
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import lorapar
from lorapar.patch import lora_layers
from lorapar_kernels.testing import error

NAMES = ("PEFT", "lorapar", "lorapar merged")
COMPLETIONS, TOKENS, R = 8, 256, 8
DROPOUTS = (0.05, 0.0)
WARMUP_TOKENS = 16  # generated in the first round, but for its first step
SECONDS = 60  # of a case
TOKENIZER = Path(__file__).parents[1] / "examples" / "arithmetic" / "base"


class Timed(GRPOTrainer):
    """Seconds of each part of each step, by variant."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.variant, self.seconds = NAMES[0], defaultdict(lambda: defaultdict(list))
        self.generated = None  # prompts and completions of the last batch
        self.new = 0  # tokens to generate

    @contextlib.contextmanager
    def clock(self, part: str):
        _synchronize()
        begin = time.perf_counter()
        yield
        _synchronize()
        self.seconds[self.variant][part].append(time.perf_counter() - begin)

    def become(self, variant: str) -> None:
        self.variant = variant
        lorapar.restore(self.model)
        if variant != "PEFT" and (left := lorapar.accelerate(self.model)).skipped:
            raise SystemExit(f"accelerate left layers to PEFT: {left}")

    def _generate(self, prompts):
        merging = contextlib.nullcontext()
        if self.variant == "lorapar merged":
            merging = lorapar.merged_for_generation(self.model, keep="gpu")
        with self.clock("rollout"), contextlib.redirect_stdout(None), merging:
            made = super()._generate(prompts)
        prompts, completions, *others = made
        if (lengths := {len(ids) for ids in completions}) != {self.new}:
            raise SystemExit(f"completions of {sorted(lengths)} tokens, not of {self.new}")
        most = self.args.max_completion_length
        completions = [(ids * (most // self.new + 1))[:most] for ids in completions]
        self.generated = prompts, completions
        return prompts, completions, *others

    def _generate_and_score_completions(self, inputs):
        with self.clock("scored"):
            return super()._generate_and_score_completions(inputs)


class Turns(TrainerCallback):
    """Each step is another variant's; a round runs all, the first is the warm-up."""

    def __init__(self, trainer: Timed, tokens: int):
        self.trainer, self.tokens, self.step = trainer, tokens, None
        self.end = time.perf_counter() + SECONDS

    def on_step_begin(self, args, state, control, **kwargs):
        turn, place = divmod(state.global_step, len(NAMES))
        self.trainer.become(NAMES[(turn + place) % len(NAMES)])
        first = state.global_step == 0
        tokens = self.tokens if turn or first else min(WARMUP_TOKENS, self.tokens)
        settings = (self.trainer.generation_config, self.trainer.generation_kwargs)
        for name in ("min_new_tokens", "max_new_tokens"):
            setattr(settings[0], name, tokens)
            settings[1][name] = tokens
        self.trainer.new = tokens
        gc.collect()
        gc.disable()
        self.step = self.trainer.clock("step")
        self.step.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.step.__exit__(None, None, None)
        gc.enable()
        rounds, place = divmod(state.global_step, len(NAMES))
        if place == 0 and rounds > 1 and time.perf_counter() > self.end:
            control.should_training_stop = True


def trainer_of(model: nn.Module, folder: str, tokens: int, rounds: int) -> Timed:
    cpu = {} if harness.CUDA else {"use_cpu": True, "bf16": False}
    options = GRPOConfig(
        output_dir=folder, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=COMPLETIONS, num_generations=COMPLETIONS,
        max_completion_length=tokens, max_steps=(1 + rounds) * len(NAMES), learning_rate=1e-6,
        beta=0.04, generation_kwargs={"min_new_tokens": tokens}, **cpu,
    )  # fmt: skip
    prompts = [f"What is {i} + {2 * i}?" for i in range(10, 50)]  # of one length
    trainer = Timed(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        args=options,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
    )
    trainer.add_callback(Turns(trainer, tokens))
    return trainer


def adapted(shape: dict, p: float) -> nn.Module:
    config = LoraConfig(
        r=R, lora_alpha=2 * R, lora_dropout=p, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(build(shape), config)
    for layer in lora_layers(model).values():  # PEFT starts at zero; data must be random
        nn.init.normal_(layer.lora_B["default"].weight, std=ADAPTER_STD)
    return model


@torch.no_grad()
def check(trainer: Timed, vocabulary: int) -> None:
    """Ours has PEFT's logits; else nothing is timed."""
    ids, found = torch.randint(vocabulary, (2, 24), device=DEVICE), []
    trainer.model.eval()
    for name in NAMES[:2]:
        trainer.become(name)
        found.append(trainer.model(input_ids=ids).logits.double())
    distance = error(found[1], found[0]).rms
    if not distance <= TOLERANCE:
        raise SystemExit(f"our logits are {distance:.3f} off PEFT's; nothing was timed")


def kl(trainer: Timed) -> float:
    """merged_kl on the last batch that was generated."""
    rows = [torch.tensor([*p, *c]) for p, c in zip(*trainer.generated)]
    ids, mask = (
        nn.utils.rnn.pad_sequence(of, batch_first=True).to(DEVICE)
        for of in (rows, [torch.ones_like(row) for row in rows])
    )
    return lorapar.merged_kl(trainer.model, ids, mask, keep="gpu")


def rows(label: str, trainer: Timed, divergence: float) -> list[dict]:
    """Medians without the warm-up."""
    found, seconds = [], {n: {k: v[1:] for k, v in trainer.seconds[n].items()} for n in NAMES}
    for name in NAMES:
        of = seconds[name]
        parts = {
            "rollout": of["rollout"],
            "scoring": [s - r for s, r in zip(of["scored"], of["rollout"])],
            "update": [t - s for t, s in zip(of["step"], of["scored"])],
            "step": of["step"],
        }
        row = {"case": label, "variant": name}
        row |= {f"{part}_s": round(statistics.median(v), 3) for part, v in parts.items()}
        row["speedup"] = harness.median_ratio(seconds["PEFT"]["step"], of["step"])
        row["kl"] = f"{divergence:.1e}" if name == "lorapar merged" else ""
        found.append(row)
    return found


def _synchronize() -> None:
    if harness.CUDA:
        torch.cuda.synchronize()


def main(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    shape, tokens = SHAPES["1B"], TOKENS
    if options.smoke:
        shape, tokens = TINY | {"vocab_size": 2048}, 6
    table = []
    for p in DROPOUTS:
        label = f"{COMPLETIONS}x{tokens} p={p:g}"
        if not harness.is_picked(label, options):
            continue
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(adapted(shape, p), folder, tokens, options.rounds)
            check(trainer, shape["vocab_size"])
            trainer.train()
        harness.report("grpo_step", table, rows(label, trainer, kl(trainer)), options)
        del trainer
        gc.collect()


if __name__ == "__main__":
    main(harness.parse("grpo_step", rounds=2))
