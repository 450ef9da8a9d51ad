"""Teachers: who votes, what their votes are known by, and those that need no model."""

import hashlib
import logging
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape

from lorapar.config import Config, Teacher
from lorapar.data import SYSTEMS, Row, row_hash, stream_rows
from lorapar.errors import UserError, check_keys, nearest
from lorapar.role_play import load_prompt, prompt_for, target_name
from lorapar.rules import RULES, RULES_VERSION
from lorapar.runs import digest
from lorapar.votes import Votes

log = logging.getLogger("lorapar")

KINDS = ("rule", "random", "openai", "transformers")
FAILURES = 8  # so many rows in a row without an answer are not about the rows
TOLD = 5  # failed rows of a teacher that are named one by one
PAUSE = 500  # rows with votes that are passed over in one go
LONGEST_RAW = 20_000  # characters of a reply that are kept: the first and the last half of them
UNASKED = ("model", "messages", "stream", "n", "response_format")  # ours to set
OPENAI_SAMPLING = (
    "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
    "metadata", "presence_penalty", "reasoning_effort", "seed", "service_tier", "stop", "store",
    "temperature", "top_logprobs", "top_p", "user", "verbosity",
)  # fmt: skip
LOCAL_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


class Stopped(Exception):
    """A teacher that need not be asked further; the others go on."""


def check_teacher(teacher: Teacher) -> None:
    """Raises UserError for a teacher that could never be asked."""
    where = f"labels.teachers: {teacher.name!r}"
    if teacher.kind not in KINDS:
        raise UserError(f"{where}: kind {teacher.kind!r} is unknown{nearest(teacher.kind, KINDS)}")
    if teacher.kind == "rule" and teacher.name not in RULES:
        raise UserError(f"{where} is no known rule{nearest(teacher.name, RULES)}")
    if not 0 < teacher.weight < float("inf"):
        raise UserError(f"{where}: weight must be above 0 and finite, found {teacher.weight}")
    for key in {"openai": ("base_url", "model"), "transformers": ("model",)}.get(teacher.kind, ()):
        if not getattr(teacher, key):
            raise UserError(f"{where}: kind {teacher.kind} needs {key}")
    if teacher.concurrency < 1:
        raise UserError(f"{where}: concurrency must be at least 1, found {teacher.concurrency}")
    if not 0 < teacher.timeout < float("inf"):
        raise UserError(f"{where}: timeout must be above 0 seconds, found {teacher.timeout}")
    if teacher.retries < 0:
        raise UserError(f"{where}: retries must be 0 or more, found {teacher.retries}")
    if teacher.kind == "openai" and not _is_url(teacher.base_url):
        found = re.sub(r"//[^/@]*@", "//…@", teacher.base_url)
        raise UserError(
            f"{where}: base_url must be http:// or https:// and a host, without a user or key in "
            f"it (keys come by api_key_env), found {found!r}"
        )
    _check_sampling(f"{where}: sampling", teacher)


def _check_sampling(where: str, teacher: Teacher) -> None:
    if teacher.kind == "openai":
        if reserved := set(UNASKED) & set(teacher.sampling):
            raise UserError(f"{where} cannot set {', '.join(sorted(reserved))}")
        for key in teacher.sampling:  # a server's own keys go through, misspelt ones do not
            hint = nearest(key, OPENAI_SAMPLING)
            if key not in OPENAI_SAMPLING and "did you mean" in hint and key not in _SERVERS_OWN:
                raise UserError(f"{where}: unknown key {key!r}{hint}")
        return
    known = {"transformers": LOCAL_SAMPLING, "random": ("system1", "seed")}.get(teacher.kind, ())
    check_keys(where, teacher.sampling, known)
    for key, (kind, least, most) in _RANGES.items():
        value = teacher.sampling.get(key, least)
        right = isinstance(value, kind) and not isinstance(value, bool)
        if key in known and not (right and least <= value <= most):
            name = "a whole number" if kind is int else "a number"
            raise UserError(f"{where}: {key} must be {name} in [{least}, {most}], found {value!r}")


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in text
    except ValueError:
        return False


_RANGES = {  # of teachers that are sampled here
    "temperature": (int | float, 0, 100),
    "top_p": (int | float, 0, 1),
    "max_tokens": (int, 1, 1 << 20),
    "seed": (int, 0, 1 << 62),
    "system1": (int | float, 0, 1),
}
_SERVERS_OWN = ("top_k", "top_a", "min_p", "typical_p", "min_tokens", "stop_token_ids")


@dataclass
class Counts:
    """What happened in this call."""

    asked: int = 0
    failed: int = 0
    retries: int = 0
    tokens: int = 0


class Ballot:
    """One teacher's votes: which rows it is still to be asked, and where its votes go."""

    def __init__(self, teacher: Teacher, config: Config, votes: Votes):
        self.teacher, self.config, self.votes = _seeded(teacher, config.labels.seed), config, votes
        self.hash = prompt_hash(teacher, config)
        self.counts, self.stopped = Counts(), None
        self.in_a_row, self.last = 0, ""  # failed rows since the last vote, and why
        self.known = 0  # rows that had a vote before
        self.started: float | None = None
        self.show: Callable[[int], None] = lambda rows: None
        if self.teacher.kind in ("openai", "transformers"):
            self._prompt = load_prompt(config.labels.prompt)
            self._target = config.labels.target or target_name(config.model)

    def key(self, row: Row) -> tuple[str | None, ...]:
        """`votes.KEYS` of this teacher's vote on a row."""
        return self.teacher.name, self.teacher.model, self.hash, row_hash(row)

    def pending(self) -> Iterator[Row | None]:
        """Rows to be asked, each once, however many workers draw from it.

        Among rows that have votes there is a None now and then: time to let others work.
        """
        for number, (_, row) in enumerate(stream_rows(self.config.data, "train")):
            if self.votes.draw(*self.key(row)):
                yield row
                continue
            if self.vote(row)[0]:
                self.known += 1
                self.in_a_row = 0  # those that fail time and again stand among others
            self.show(1)
            if number % PAUSE == 0:
                yield None

    def waits(self) -> bool:
        """Whether any row has no vote yet."""
        rows = stream_rows(self.config.data, "train")
        return any(not self.vote(row)[0] for _, row in rows)

    def vote(self, row: Row) -> tuple[bool, str | None]:
        """Whether there is a vote on a row, and its label (None: an abstention)."""
        return self.votes.get(*self.key(row))

    def prompt(self, row: Row) -> str:
        return prompt_for(row, self._prompt, self._target)

    def watch(self, progress: Any, total: int) -> None:
        """Shows this teacher on a rich `Progress`: rate, tokens, failures."""
        task = progress.add_task(f"label {escape(self.teacher.name)}", note="", total=total)
        self.show = lambda rows: progress.update(task, advance=rows, note=self.note())

    def note(self) -> str:
        c, parts = self.counts, []
        if c.asked and self.started is not None:
            parts.append(f"{c.asked / max(1e-3, time.monotonic() - self.started):.1f}/s")
        parts += [f"{c.tokens:,} tokens"] if c.tokens else []
        parts += [f"{c.retries:,} retries"] if c.retries else []
        parts += [f"{c.failed:,} failed"] if c.failed else []
        return " · ".join(parts + (["stopped"] if self.stopped else []))

    def add(self, row: Row, raw: str, label: str | None, usage: dict | None) -> None:
        """Casts one vote."""
        teacher, model, prompt, row_digest = self.key(row)
        vote = {"id": row.id, "teacher": teacher, "model": model, "prompt_hash": prompt}
        vote |= {"row_hash": row_digest, "raw": _kept(raw), "label": label, "usage": usage}
        self.votes.add(vote)
        total = (usage or {}).get("total_tokens")
        self.counts.tokens += total if isinstance(total, int) else 0
        self.counts.asked += 1
        self.in_a_row = 0
        self.show(1)

    def retry(self) -> None:
        self.counts.retries += 1
        self.show(0)

    def fail(self, row: Row, problem: str, *, about_row: bool = False) -> None:
        """Notes a row without an answer: it has no vote, so a later run asks again.

        Args:
            row, problem: which, and why.
            about_row: this is no sign that the teacher answers no others.

        Raises:
            Stopped: FAILURES of them in a row, unless it is about the row.
        """
        self.counts.failed, self.last = self.counts.failed + 1, problem
        self.in_a_row += not about_row
        if self.counts.failed <= TOLD:
            more = "; no more of its failures are named" if self.counts.failed == TOLD else ""
            log.warning("labels: %s, row %s: %s%s", self.teacher.name, row.id, problem, more)
        self.show(1)
        if self.in_a_row >= FAILURES:
            raise Stopped(f"answered none of {FAILURES} rows in a row, the last with: {problem}")

    @property
    def answers(self) -> bool:
        """Whether it has cast any vote, now or before."""
        return bool(self.known or self.counts.asked)

    def close(self) -> None:
        """Stopped, if the teacher has answered no row at all."""
        if self.counts.failed and not self.answers:
            raise Stopped(f"answered none of {self.counts.failed} rows, the last with: {self.last}")

    def stop(self, problem: str) -> None:
        """Ends this teacher's part; `label` tells at the end."""
        self.stopped = problem
        log.warning("labels: %s is not asked any more: it %s", self.teacher.name, problem)
        self.show(0)

    def count(self) -> None:
        """Casts the votes of a teacher that needs no model."""
        name = self.teacher.name
        for row in filter(None, self.pending()):
            if self.teacher.kind == "random":
                share = self.teacher.sampling.get("system1", 0.5)
                drawn = _uniform(self.hash, row)
                raw, two = f"{drawn:.6f} {'>=' if drawn >= share else '<'} {share}", drawn >= share
            else:
                counter, limit = RULES[name]
                n = counter(row)
                raw, two = f"{n} {'>' if n > limit else '<='} {limit}", n > limit
            self.add(row, raw, SYSTEMS[two], None)


def _seeded(teacher: Teacher, seed: int) -> Teacher:
    """What is drawn is drawn with `labels.seed`, unless the teacher's own `sampling` has a seed."""
    if teacher.kind == "rule":
        return teacher
    return replace(teacher, sampling={"seed": seed, **teacher.sampling})


def prompt_hash(teacher: Teacher, config: Config) -> str:
    """Hash of all that a teacher's vote on a row depends on, but for `model` and the row."""
    teacher = _seeded(teacher, config.labels.seed)
    if teacher.kind == "rule":
        return digest({"rule": teacher.name, "limit": RULES[teacher.name][1], "v": RULES_VERSION})
    if teacher.kind == "random":
        return digest({"random": teacher.sampling})
    prompt = load_prompt(config.labels.prompt)
    made_of = {"prompt": prompt, "sampling": teacher.sampling}
    if "{model}" in prompt:
        made_of["target"] = config.labels.target or target_name(config.model)
    if teacher.kind == "transformers":
        from lorapar.models import model_digest

        return digest({**made_of, "weights": model_digest(teacher.model)})
    return digest({**made_of, "structured": teacher.structured})


def _uniform(seed: str, row: Row) -> float:
    """A number in [0, 1) that seed and row fix."""
    drawn = hashlib.sha256(f"{seed} {row_hash(row)}".encode()).digest()
    return int.from_bytes(drawn[:6], "big") / 2**48


def _kept(raw: str) -> str:
    """A reply as the votes keep it."""
    half = LONGEST_RAW // 2
    if len(raw) <= LONGEST_RAW:
        return raw
    return f"{raw[:half]}[… {len(raw) - LONGEST_RAW:,} characters are not kept …]{raw[-half:]}"
