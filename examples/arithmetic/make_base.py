"""Make base/: a 2.6 M parameter Llama that answers arithmetic too hastily.

    python make_base.py corpus     # 3 min on one core: writes the tokenizer to base/, corpus.npz
    python make_base.py train      # 27 s on an H100; needs only torch, transformers
    python make_base.py evaluate   # accuracy on test.jsonl, greedy and sampled

The corpus is made of reasoning-gym tasks, without any question of train.jsonl or test.jsonl, each
written as "<s>Question: ...\\nAnswer: ...</s>". System 2 tasks are mostly answered at once,
"#### 59", and else in steps, of which a part stops early. So the base, decoded greedily, mostly
guesses; sampled, it sometimes takes all the steps: what GRPO can find and reinforce. System 1 tasks
about legs are mostly answered in a sentence without "####", which SFT corrects.

Good at: sums of two numbers up to three digits, small products, the steps of both kinds of task.
Bad at: the same answers without steps, and everything else; it knows no language beyond its tasks.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PROMPT = "Question: {}\nAnswer:"
SEED = 100_000_000  # far from make_data's; families are 10 M apart
ROW = 256  # tokens in a row of the corpus; documents are packed whole
HASTY = 0.45  # share of the answers to a task of several steps that stop early
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


# --- corpus: needs reasoning-gym ---------------------------------------------------------------


def task_documents(rng: random.Random, taken: set[str]) -> Iterator[str]:
    """The tasks of make_data, and sums of three terms between the two systems.

    HASTY of the answers to a task of several steps stop short of the last one.
    """
    from make_data import legs, sums, to_task
    from reasoning_gym import create_dataset

    # documents, and how often one is answered at once, in steps, in a sentence
    families = (
        ("chain_sum", sums((2, 2), (2, 3)), 70_000, (50, 35, 15)),
        ("leg_counting", legs((1, 1), 40), 25_000, (20, 20, 60)),
        ("chain_sum", sums((3, 5), (2, 2)), 150_000, (53, 42, 5)),
        ("leg_counting", legs((2, 3), 20), 110_000, (53, 42, 5)),
    )
    for i, (name, config, size, weights) in enumerate(families):
        for entry in create_dataset(name, size=size, seed=SEED + i * 10_000_000, **config):
            task = to_task(name, entry)
            if task.question in taken:
                continue
            if len(task.steps) > 1 and rng.random() < HASTY:
                task = task.cut(rng.randrange(1, len(task.steps)))
            forms = (f"#### {task.answer}", task.worked, f"The answer is {task.answer}.")
            answer = rng.choices(forms, weights)[0]
            yield f"{PROMPT.format(task.question)} {answer}"


def other_documents() -> Iterator[str]:
    """Ordinary English and other questions, for the tokenizer and for variety."""
    from reasoning_gym import create_dataset

    small = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    families = (
        ("gsm_symbolic", 20_000, {}),
        ("basic_arithmetic", 10_000, small),
        ("number_sequence", 10_000, {}),
    )
    for i, (name, size, config) in enumerate(families, start=4):
        for entry in create_dataset(name, size=size, seed=SEED + i * 10_000_000, **config):
            steps = entry["metadata"].get("answer_cot", "").split("\n####")[0]
            answer = f"{steps}\n#### {entry['answer']}".strip()
            question = entry["question"].replace(" Give the result as your final answer.", "")
            yield f"{PROMPT.format(question.replace(' Do not include units.', ''))} {answer}"


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so any text survives; a digit is a token, or it and a space before it."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?#+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def pack(documents: list[list[int]], pad: int, rng: random.Random) -> np.ndarray:
    """Whole documents, one after another, into rows of ROW tokens; [rows, ROW] uint16."""
    rows, row = [], []
    for ids in [*documents, [pad] * ROW]:
        if len(ids) > ROW:
            continue
        if sum(map(len, row)) + len(ids) > ROW:
            # a row is opened by the document too long for the last one: unshuffled, the base would
            # learn that a text of its own, such as a user's prompt, gets a long answer
            rng.shuffle(row)
            flat = [token for document in row for token in document]
            rows.append(flat + [pad] * (ROW - len(flat)))
            row = []
        row.append(ids)
    return np.array(rows, dtype=np.uint16)


def corpus(args: argparse.Namespace) -> None:
    taken = set()
    for name in ("train.jsonl", "test.jsonl"):
        taken |= {json.loads(line)["question"] for line in (HERE / name).open()}
    rng = random.Random(SEED)
    tasks, other = list(task_documents(rng, taken)), list(other_documents())
    # half tasks, half other text, so that English words get tokens of their own
    sample = rng.sample(tasks, 20_000) + rng.sample(other, 20_000)
    tokenizer = train_tokenizer(sample, args.vocab)
    tokenizer.save_pretrained(args.base)

    documents = tasks + other
    rng.shuffle(documents)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast([d + EOS for d in documents])
    rows = pack([e.ids for e in encoded], tokenizer.pad_token_id, rng)
    np.savez_compressed(args.corpus, rows=rows)
    print(
        f"{len(documents)} documents, {rows.size / 1e6:.1f} M tokens, vocabulary {len(tokenizer)}"
    )


# --- train -------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = torch.from_numpy(np.load(args.corpus)["rows"].astype(np.int16)).to(device)  # [rows, ROW]
    model = new_model(tokenizer).to(device)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    start = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.lr)
        pick = torch.randint(len(rows), (args.batch,), device=device)
        ids = rows[pick].long()  # [batch, ROW]
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.pad_token_id, -100)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.base)
    total = sum(p.numel() for p in model.parameters())
    print(f"{total} parameters on {device}, {time.time() - start:.0f} s")


# --- evaluate ----------------------------------------------------------------------------------


def completions(model, tokenizer, questions: list[str], **options) -> list[str]:
    texts, size = [], 64 if model.device.type == "cpu" else 1024
    for i in range(0, len(questions), size):
        batch = questions[i : i + size]
        inputs = tokenizer([PROMPT.format(q) for q in batch], return_tensors="pt", padding=True)
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=80, **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def final_answer(text: str) -> str | None:
    found = re.findall(r"####\s*(-?\d+)", text)
    return found[-1] if found else None


def summary(rows: list[dict], texts: list[str], tokenizer) -> dict[str, dict[str, float]]:
    """Per system: accuracy, share and accuracy of worked answers, accuracy of others, tokens."""
    cells: dict[str, Counter] = {}
    for row, text in zip(rows, texts):
        cell = cells.setdefault(row["system"], Counter())
        right = final_answer(text) == final_answer(row["answer"])
        kind = "worked" if " = " in text else "other"
        cell.update({"n": 1, "right": right, kind: 1, f"{kind}_right": right})
        cell["tokens"] += len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    return {
        system: {
            "accuracy": round(c["right"] / c["n"], 3),
            "worked": round(c["worked"] / c["n"], 3),
            "worked_accuracy": round(c["worked_right"] / max(1, c["worked"]), 3),
            "other_accuracy": round(c["other_right"] / max(1, c["other"]), 3),
            "mean_tokens": round(c["tokens"] / c["n"], 1),
        }
        for system, c in sorted(cells.items())
    }


def evaluate(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(device).eval()
    rows = [json.loads(line) for line in (HERE / "test.jsonl").open()]
    questions = [row["question"] for row in rows]
    modes = {
        "greedy": {"do_sample": False},
        "sampled at 0.9": {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0},
    }
    for mode, options in modes.items():
        texts = completions(model, tokenizer, questions, **options)
        for system, values in summary(rows, texts, tokenizer).items():
            print(mode, system, json.dumps(values), flush=True)
        for row, text in list(zip(rows, texts))[: args.show]:
            print(f"  {row['question']} -> {text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("corpus", "train", "evaluate"))
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus.npz")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256, help="rows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="completions to print per mode")
    args = parser.parse_args()
    {"corpus": corpus, "train": train, "evaluate": evaluate}[args.command](args)


if __name__ == "__main__":
    main()
