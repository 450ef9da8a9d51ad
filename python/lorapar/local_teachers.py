"""Teachers that `transformers` runs in this process, in batches, on a GPU if there is one."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import torch

from lorapar.data import Row
from lorapar.evaluation import generate
from lorapar.models import device, load_base, load_tokenizer
from lorapar.role_play import parse_label
from lorapar.runs import digest
from lorapar.teachers import Ballot, Stopped

MAX_TOKENS = 32  # new tokens, unless `sampling` says otherwise
WINDOW = 8  # batches whose rows are put in the order of their lengths


async def ask(ballot: Ballot) -> None:
    """Asks one local teacher all rows without a vote; what stops it is told on its ballot."""
    try:
        teacher = await asyncio.to_thread(LocalTeacher, ballot)
        window: list[Row] = []
        ballot.started = time.monotonic()
        for row in ballot.pending():
            if row is None:
                await asyncio.sleep(0)
                continue
            window.append(row)
            if len(window) == WINDOW * ballot.teacher.concurrency:
                await teacher.ask(window)
                window = []
        await teacher.ask(window)
        ballot.close()
    except Stopped as e:
        ballot.stop(str(e))


class LocalTeacher:
    """A model and its tokenizer. Stopped if they cannot be loaded."""

    def __init__(self, ballot: Ballot):
        self.ballot, sampling = ballot, ballot.teacher.sampling
        source = replace(ballot.config, model=ballot.teacher.model)
        try:
            self.tokenizer, self.model = load_tokenizer(source), load_base(source).to(device())
        except Exception as e:  # a broken model fails in many ways
            raise Stopped(f"cannot be loaded: {_short(e)}") from None
        self.seed = sampling["seed"]
        self.max_tokens = sampling.get("max_tokens", MAX_TOKENS)
        self.sampling: dict[str, Any] = {"do_sample": False}
        if temperature := sampling.get("temperature", 0):
            self.sampling = {"do_sample": True, "temperature": float(temperature), "top_k": 0}
            self.sampling["top_p"] = sampling.get("top_p", 1.0)
        context = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        self.longest = context - self.max_tokens

    async def ask(self, rows: list[Row]) -> None:
        """Casts the votes on some rows, those of like length in one batch."""
        fitting = []
        for row in rows:
            try:
                ids = self._ids(self.ballot.prompt(row))
            except Exception as e:  # its chat template
                raise Stopped(f"takes no prompt: {_short(e)}") from None
            if len(ids) <= self.longest:
                fitting.append((row, ids))
            else:
                problem = f"a prompt of {len(ids):,} tokens, it takes {self.longest:,}"
                self.ballot.fail(row, problem, about_row=True)
        fitting.sort(key=lambda pair: len(pair[1]))
        size = self.ballot.teacher.concurrency
        for start in range(0, len(fitting), size):
            await self._batch(fitting[start : start + size])

    async def _batch(self, pairs: list[tuple[Row, list[int]]]) -> None:
        try:
            texts = await asyncio.to_thread(self._try, [ids for _, ids in pairs])
        except Exception as e:
            raise Stopped(f"fails: {_short(e)}") from None
        if texts is None:
            torch.cuda.empty_cache()
            if len(pairs) == 1:
                row, ids = pairs[0]
                self.ballot.fail(row, f"no memory for a prompt of {len(ids):,} tokens")
                return
            for half in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
                await self._batch(half)
            return
        for (row, ids), (text, made) in zip(pairs, texts):
            usage = {"prompt_tokens": len(ids), "completion_tokens": made}
            usage["total_tokens"] = len(ids) + made
            self.ballot.add(row, text, parse_label(text), usage)

    def _ids(self, prompt: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(prompt)["input_ids"]
        message = {"role": "user", "content": prompt}
        encoded = self.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def _try(self, prompts: list[list[int]]) -> list[tuple[str, int]] | None:
        """`_generate`; None where memory is short. The exception ends here, or it would hold the
        tensors of the try."""
        try:
            return self._generate(prompts)
        except torch.OutOfMemoryError:
            return None

    def _generate(self, prompts: list[list[int]]) -> list[tuple[str, int]]:
        """Text and number of new tokens of each; what is drawn, seed and batch decide."""
        torch.manual_seed(int(digest([self.seed, prompts])[:15], 16))
        texts = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.max_tokens,
            batch_size=len(prompts),
            sampling=self.sampling,
        )
        plain = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return list(zip(texts, map(len, plain)))


def _short(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
