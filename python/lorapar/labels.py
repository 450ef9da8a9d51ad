"""Labelling: teachers vote System 1 or System 2 on each training row, the majority decides.

    votes.jsonl   one line a vote, appended as it arrives; a later run asks only what is missing
    labels.jsonl  one line a row, written whole when every teacher has been asked

A vote is known by (teacher, model, row id, prompt_hash, row_hash), so a changed prompt, sampling
setting or row is asked anew, and votes that fit nothing any more stay in the file, unused.
"""

import asyncio
import errno
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from lorapar import data
from lorapar.config import Config, Labels, Teacher, plain
from lorapar.data import SYSTEMS, Row
from lorapar.errors import UserError, check_keys, nearest
from lorapar.rules import RULES, RULES_VERSION
from lorapar.runs import Run, digest, write_text

log = logging.getLogger("lorapar")

KINDS = ("rule", "openai", "transformers")
ROW_STATUSES = (400, 413, 422)  # refusals that may be about one row: too long, filtered
REFUSALS = 8  # so many before any vote are not about the rows: the teacher is stopped
LONGEST_REPLY = 40  # characters; a label with more around it is not "exactly one label"

_LABEL = re.compile(r"(?<![a-z])system[\s_-]*([12])(?![a-z0-9])", re.IGNORECASE)
_DENIAL = re.compile(r"\b(?:not|no|nor|neither|never|cannot)\b|n['’]t\b", re.IGNORECASE)
_PLACE = re.compile(r"\{(model|question|answer)\}")
_VOTE_KEYS = ("teacher", "model", "id", "prompt_hash", "row_hash")


def label(config: Config, *, progress: Any = None) -> dict[str, Any]:
    """Asks every teacher for every training row and writes labels.jsonl.

    Args:
        config: `data.train`, `labels` and `model` (whom the teachers play) matter here.
        progress: a rich `Progress` to show one task a teacher on, or None.

    Returns:
        `rows`, `system1`, `system2`, `none`: counts; `teachers`: per name the counts `asked`
        (in this call), `valid`, `abstained` and `failed` (no answer; asked again next time).

    Raises:
        UserError: bad rows, a teacher that cannot be asked, one system without rows. Votes that
            have arrived are kept; labels.jsonl is written only when all is well.
    """
    run = Run(config)
    rows = _unique(config, data.load_rows(config.data, "train"))
    for teacher in config.labels.teachers:
        check_teacher(teacher)
    path = run.path("votes.jsonl")
    known = _read_votes(path)
    teachers = [_seeded(t, config.labels.seed) for t in config.labels.teachers]
    ballots = [_Ballot.of(teacher, config.model, rows, known) for teacher in teachers]
    asking = [b for b in ballots if b.pending and b.teacher.kind == "openai"]
    clients = {b.teacher.name: _client(b.teacher) for b in asking}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as out:  # unbuffered: a write() is one whole line
        for ballot in ballots:
            ballot.start(out, progress)
        for ballot in ballots:
            if ballot.teacher.kind == "rule":
                ballot.count()
        if asking:
            asyncio.run(_ask(asking, clients))
    return _finish(run, config, rows, ballots)


def _seeded(teacher: Teacher, seed: int) -> Teacher:
    """An endpoint samples with `labels.seed`, unless its own `sampling` has a seed."""
    if teacher.kind != "openai":
        return teacher
    return replace(teacher, sampling={"seed": seed, **teacher.sampling})


def settings_and_inputs(
    config: Config, rows: list[Row] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the stage `label` depends on, for `Run.stale` and `Run.check`; asks no teacher."""
    rows = data.load_rows(config.data, "train") if rows is None else rows
    source = {key: getattr(config.data, key) for key in ("train", "name", "train_rows")}
    labels = plain(config.labels)
    for teacher in labels["teachers"]:  # where and how fast it is asked changes no vote
        for key in ("base_url", "api_key_env", "concurrency"):
            del teacher[key]
    settings = {"data": source, "labels": labels, "model": config.model}
    return settings, {"data.train": digest([[r.id, r.question, r.answer] for r in rows])}


def parse_label(raw: str) -> str | None:
    """The one label a reply states, or None: both, neither, denied, or too much around it."""
    text = raw.rpartition("</think>")[2].strip()
    if "<think>" in text or len(text) > LONGEST_REPLY or _DENIAL.search(text):
        return None
    found = _LABEL.findall(text)
    one = len(set(found)) == 1 and set(re.findall(r"\d", text)) == set(found)
    return f"system{found[0]}" if one else None


def majority(votes: dict[str, str | None], labels: Labels) -> str | None:
    """The label with more weight; `labels.ties` for a tie or fewer than min_votes valid votes."""
    weights = {t.name: Fraction(str(t.weight)) for t in labels.teachers}  # 0.1 + 0.2 ties with 0.3
    valid = {name: vote for name, vote in votes.items() if vote is not None}
    one, two = (sum(weights[n] for n, vote in valid.items() if vote == s) for s in SYSTEMS)
    if len(valid) < labels.min_votes or one == two:
        return None if labels.ties == "drop" else labels.ties
    return SYSTEMS[0] if one > two else SYSTEMS[1]


def prompt_for(row: Row, model: str) -> str:
    """The role-play prompt. One pass: braces in a question or an answer are left alone."""
    values = {"model": _target(model), "question": row.question, "answer": row.answer}
    return _PLACE.sub(lambda place: values[place[1]], _prompt())


@cache
def _prompt() -> str:
    return (files("lorapar") / "prompts" / "role_play.txt").read_text(encoding="utf-8")


def _target(model: str) -> str:
    """The name the teachers play: a folder's own name, a hub name as it is."""
    return Path(model).resolve().name if Path(model).exists() else model


@dataclass
class _Ballot:
    """One teacher's votes: those known, the rows still to be asked, where new ones go."""

    teacher: Teacher
    target: str
    prompt_hash: str
    votes: dict[str, str | None]  # row id → label or None
    pending: list[Row]
    asked: int = 0
    failed: int = 0
    out: BinaryIO | None = None
    advance: Callable[[], None] = lambda: None
    hashes: dict[str, str] = field(default_factory=dict)  # row id → row_hash

    @classmethod
    def of(cls, teacher: Teacher, model: str, rows: list[Row], known: dict) -> "_Ballot":
        if teacher.kind == "rule":
            prompt = {"rule": teacher.name, "limit": RULES[teacher.name][1], "v": RULES_VERSION}
        else:
            prompt = {"prompt": _prompt(), "target": _target(model), "sampling": teacher.sampling}
        ballot = cls(teacher, model, digest(prompt), {}, [])
        for row in rows:
            row_hash = ballot.hashes[row.id] = digest([row.question, row.answer])
            key = (teacher.name, teacher.model, row.id, ballot.prompt_hash, row_hash)
            if key in known:
                ballot.votes[row.id] = known[key]
            else:
                ballot.pending.append(row)
        return ballot

    def start(self, out: BinaryIO, progress: Any) -> None:
        self.out = out
        if progress is not None:
            count = {"total": len(self.hashes), "completed": len(self.votes)}
            task = progress.add_task(f"label {self.teacher.name}", note="", **count)
            self.advance = lambda: progress.advance(task)

    def count(self) -> None:
        """Casts a rule's votes."""
        counter, limit = RULES[self.teacher.name]
        for row in self.pending:
            n = counter(row)
            self.add(row, f"{n} {'>' if n > limit else '<='} {limit}", SYSTEMS[n > limit], None)

    def add(self, row: Row, raw: str, system: str | None, usage: dict | None) -> None:
        """Appends one vote to the file, as one write."""
        vote = {
            "id": row.id,
            "teacher": self.teacher.name,
            "model": self.teacher.model,
            "prompt_hash": self.prompt_hash,
            "row_hash": self.hashes[row.id],
            "raw": raw,
            "label": system,
            "usage": usage,
        }
        line = json.dumps(vote).encode() + b"\n"
        if self.out.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.out.name))
        self.votes[row.id] = system
        self.asked += 1
        self.advance()

    def fail(self, row: Row, problem: str) -> None:
        """Notes a row without an answer; it has no vote, so a later run asks again."""
        log.warning("labels: teacher %s, row %s: %s", self.teacher.name, row.id, problem)
        self.failed += 1
        self.advance()
        if not self.votes and self.failed >= min(REFUSALS, len(self.hashes)):
            raise self.error(f"answered none of {self.failed} rows, the last with: {problem}")

    def error(self, problem: str) -> UserError:
        return UserError(
            f"labels.teachers: {self.teacher.name!r} at {self.teacher.base_url} {problem}; its "
            f"{len(self.votes)} votes so far are kept in {self.out.name}; put it right (server, "
            f"base_url, model, key) or remove the teacher, then run `lorapar label` again"
        )


def _unique(config: Config, rows: list[Row]) -> list[Row]:
    """The rows, if no two share an id."""
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        first = seen.setdefault(row.id, index)
        if first != index:
            path = Path(config.data.train)
            lines = [n for n, _ in data.read_jsonl(path)] if path.exists() else range(1, index + 2)
            raise UserError(
                f"{path}:{lines[index]}: id {row.id!r} is also that of line {lines[first]}; "
                f"ids must differ (leave them out to have rows numbered)"
            )
    return rows


def check_teacher(teacher: Teacher) -> None:
    """Raises UserError for a teacher that could never be asked."""
    where = f"labels.teachers: {teacher.name!r}"
    if teacher.kind not in KINDS:
        raise UserError(f"{where}: kind {teacher.kind!r} is unknown{nearest(teacher.kind, KINDS)}")
    if teacher.kind == "transformers":
        raise UserError(
            f"{where}: kind transformers is not in this version; start `transformers serve` and "
            f"ask the model with kind: openai, base_url: http://127.0.0.1:8000/v1"
        )
    if teacher.kind == "rule" and teacher.name not in RULES:
        raise UserError(f"{where} is no known rule{nearest(teacher.name, RULES)}")
    if not 0 < teacher.weight < float("inf"):
        raise UserError(f"{where}: weight must be above 0 and finite, found {teacher.weight}")
    if teacher.kind == "openai":
        for key in ("base_url", "model"):
            if not getattr(teacher, key):
                raise UserError(f"{where}: kind openai needs {key}")
        if teacher.concurrency < 1:
            raise UserError(f"{where}: concurrency must be at least 1, found {teacher.concurrency}")
        if reserved := {"model", "messages", "stream", "n"} & set(teacher.sampling):
            raise UserError(f"{where}: sampling cannot set {', '.join(sorted(reserved))}")


def _client(teacher: Teacher) -> Any:
    """The teacher's client, with its own retries and time-out; the key is read here only."""
    from openai import AsyncOpenAI

    key = os.environ.get(teacher.api_key_env, "").strip() if teacher.api_key_env else "none"
    if not re.fullmatch("[!-~]+", key):  # others end up in the HTTP library's messages
        found = "holds characters that no key has" if key else "is not set"
        raise UserError(
            f"labels.teachers: {teacher.name!r} needs its key in the environment variable "
            f"{teacher.api_key_env}, which {found}; set it, or remove api_key_env"
        )
    client = AsyncOpenAI(base_url=teacher.base_url, api_key=key)
    settings = set(inspect.signature(client.chat.completions.create).parameters)
    section = f"labels.teachers: {teacher.name!r}: sampling (a server's own go under extra_body)"
    check_keys(section, teacher.sampling, settings)
    return client


def _read_votes(path: Path) -> dict[tuple, str | None]:
    """The votes of earlier runs by key. A line torn by a kill, at the very end, is cut off."""
    if not path.exists():
        return {}
    known, start = {}, 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            vote = json.loads(line)
        except ValueError:
            vote = None
        if number == len(lines) and (vote is None or not line.endswith(b"\n")):
            log.warning("%s:%d: the last line is torn and is cut off", path, number)
            os.truncate(path, start)
            break
        if not isinstance(vote, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove the line to ask it again")
        if bad := [key for key in _VOTE_KEYS if not isinstance(vote.get(key, 0), str | None)]:
            raise UserError(f"{path}:{number}: not a vote: needs a text for {', '.join(bad)}")
        if vote.get("label", 0) not in (*SYSTEMS, None):
            found = repr(vote.get("label", "nothing"))
            raise UserError(f"{path}:{number}: label must be system1, system2 or null, not {found}")
        known[tuple(vote[key] for key in _VOTE_KEYS)] = vote["label"]
        start += len(line)
    return known


async def _ask(ballots: list[_Ballot], clients: dict[str, Any]) -> None:
    """Asks all endpoints at once, each with as many requests in flight as its concurrency."""
    try:
        async with asyncio.TaskGroup() as group:
            for ballot in ballots:
                rows, client = iter(ballot.pending), clients[ballot.teacher.name]
                for _ in range(min(ballot.teacher.concurrency, len(ballot.pending))):
                    group.create_task(_worker(ballot, client, rows))
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    finally:
        for client in clients.values():
            await client.close()


async def _worker(ballot: _Ballot, client: Any, rows: Iterator[Row]) -> None:
    """Asks the rows it draws from `rows`, one by one; what is not about a row stops it."""
    from openai import APIConnectionError, APIStatusError, OpenAIError

    teacher, tries = ballot.teacher, f"after {client.max_retries + 1} tries"
    keyed = f"the key in {teacher.api_key_env}" if teacher.api_key_env else "to work without a key"
    for row in rows:
        message = {"role": "user", "content": prompt_for(row, ballot.target)}
        try:
            reply = await client.chat.completions.create(
                model=teacher.model, messages=[message], **teacher.sampling
            )
            raw, usage = _content(reply)
        except APIConnectionError as e:  # time-outs too
            cause = f" {e.__cause__}" if e.__cause__ else ""
            raise ballot.error(f"gave no answer {tries}: {e}{cause}") from None
        except APIStatusError as e:
            text = " ".join(str(e).split())
            text = (text.replace(client.api_key, "(key)") if teacher.api_key_env else text)[:300]
            if e.status_code in ROW_STATUSES:
                ballot.fail(row, text)
                continue
            named = {401: f"refused {keyed}", 403: f"refused {keyed}", 404: "is not known there"}
            problem = named.get(e.status_code, f"failed {tries}")
            raise ballot.error(f"(model {teacher.model}) {problem}: {text}") from None
        except (OpenAIError, AttributeError, IndexError, TypeError, ValueError) as e:
            ballot.fail(row, f"no chat completion came back ({type(e).__name__}: {e})"[:200])
            continue
        ballot.add(row, raw, parse_label(raw), usage)


def _content(reply: Any) -> tuple[str, dict | None]:
    """Text and usage of a chat completion; the client does not check what a server sends."""
    raw, usage = reply.choices[0].message.content or "", reply.usage
    if not isinstance(raw, str):
        raise TypeError(f"content is {type(raw).__name__}, not text")
    return raw, usage.model_dump(mode="json", exclude_none=True) if usage else None


def _finish(run: Run, config: Config, rows: list[Row], ballots: list[_Ballot]) -> dict[str, Any]:
    """Aggregates the votes, writes labels.jsonl and the manifest, returns the summary."""
    lines, labelled = [], []
    for row in rows:
        votes = {b.teacher.name: b.votes.get(row.id) for b in ballots}
        system = majority(votes, config.labels)
        labelled.append(Row(row.id, row.question, row.answer, system))
        fields = {"id": row.id, "question": row.question, "answer": row.answer}
        lines.append(json.dumps({**fields, "system": system, "votes": votes}) + "\n")
    if config.data.select != "all":
        for system in SYSTEMS:
            data.rows_of(labelled, system, run.path("votes.jsonl"))
    write_text(run.path("labels.jsonl"), "".join(lines))
    run.finish("label", *settings_and_inputs(config, rows), ["votes.jsonl", "labels.jsonl"])
    teachers = {}
    for b in ballots:
        valid = sum(vote is not None for vote in b.votes.values())
        counts = {"asked": b.asked, "valid": valid, "abstained": len(b.votes) - valid}
        teachers[b.teacher.name] = {**counts, "failed": b.failed}
    counts = {s or "none": sum(r.system == s for r in labelled) for s in (*SYSTEMS, None)}
    return {"rows": len(rows), **counts, "teachers": teachers}
