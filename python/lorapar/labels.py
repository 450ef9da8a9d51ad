"""Labelling: teachers vote System 1 or System 2 on each training row, the majority decides.

    votes.jsonl   one line a vote, appended as it arrives; a later run asks only what is missing
    labels.jsonl  one line a row, written whole when every teacher has been asked

Rows are read one at a time, over and over, and votes are found in an index on disk: memory does not
grow with the number of rows.
"""

import asyncio
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from lorapar import data
from lorapar.agreement import Agreement
from lorapar.config import Config, Labels, plain
from lorapar.data import SYSTEMS, Row
from lorapar.errors import UserError
from lorapar.role_play import load_prompt
from lorapar.runs import Run, digest, whole_file
from lorapar.teachers import Ballot, Stopped, check_teacher
from lorapar.votes import SYNC_SECONDS, Votes

log = logging.getLogger("lorapar")

ASKED = ("openai", "transformers")  # kinds of teachers that read the prompt
NO_MATTER = ("base_url", "api_key_env", "concurrency", "timeout", "retries")  # change no vote


def label(config: Config, *, progress: Any = None, serve: Sequence[str] = ()) -> dict[str, Any]:
    """Asks every teacher for every training row and writes labels.jsonl.

    Args:
        config: `data.train`, `labels` and `model` (whom the teachers play) matter here.
        progress: a rich `Progress` to show one task a teacher on, or None.
        serve: models of teachers of kind transformers to ask through a `transformers serve` that
            runs as long as this call, instead of in this process.

    Returns:
        `rows`, `system1`, `system2`, `none`: counts; `teachers`: per name the counts `asked`,
        `retries` and `tokens` of this call, `valid` and `abstained` of all votes, and `failed` (no
        answer; asked again next time); `agreement`: an `Agreement`.

    Raises:
        UserError: bad rows, a teacher that cannot be asked, one system without rows, another
            process at work in this run folder. A teacher that stops does not stop the others.
            Votes that have arrived are kept; labels.jsonl is written only when all is well.
    """
    run = Run(config)
    for teacher in config.labels.teachers:
        check_teacher(teacher)
    served = _to_be_served(config, serve)
    if any(teacher.kind in ASKED for teacher in config.labels.teachers):
        load_prompt(config.labels.prompt)
    count, rows_digest = check_rows(config)
    with Votes(run.path("votes.jsonl")) as votes, ExitStack() as servers:
        ballots = [Ballot(teacher, config, votes) for teacher in config.labels.teachers]
        if progress is not None:
            for ballot in ballots:
                ballot.watch(progress, count)
        for ballot in ballots:
            if ballot.teacher.kind not in ASKED:
                ballot.count()
        for model in served:
            _serve(model, [b for b in ballots if b.teacher.model == model], servers)
        waiting = [b for b in ballots if b.teacher.kind in ASKED and b.waits()]
        for ballot in ballots:
            if ballot.teacher.kind in ASKED and ballot not in waiting:
                ballot.show(count)
        _ask(waiting, votes)
        if stopped := [b for b in ballots if b.stopped]:
            raise UserError(_told(stopped, votes.path))
        return _finish(run, config, ballots, rows_digest)


def settings_and_inputs(
    config: Config, rows_digest: str | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the stage `label` depends on, for `Run.stale` and `Run.check`; asks no teacher."""
    if rows_digest is None:
        rows_digest = data.rows_digest(r for _, r in data.stream_rows(config.data, "train"))
    source = {key: getattr(config.data, key) for key in ("train", "name", "train_rows")}
    labels, inputs = plain(config.labels), {"data.train": rows_digest}
    for teacher in labels["teachers"]:
        for key in NO_MATTER:
            del teacher[key]
    prompt = labels.pop("prompt")
    if any(teacher.kind in ASKED for teacher in config.labels.teachers):
        inputs["labels.prompt"] = digest(load_prompt(prompt))
    for teacher in config.labels.teachers:
        if teacher.kind == "transformers":
            from lorapar.models import model_digest

            inputs[f"labels.teachers: {teacher.name}"] = digest(model_digest(teacher.model))
    return {"data": source, "labels": labels, "model": config.model}, inputs


def majority(votes: dict[str, str | None], labels: Labels) -> str | None:
    """The label with more weight; `labels.ties` for a tie or fewer than min_votes valid votes."""
    weights = {t.name: Fraction(str(t.weight)) for t in labels.teachers}  # 0.1 + 0.2 ties with 0.3
    valid = {name: vote for name, vote in votes.items() if vote is not None}
    one, two = (sum(weights[n] for n, vote in valid.items() if vote == s) for s in SYSTEMS)
    if len(valid) < labels.min_votes or one == two:
        return None if labels.ties == "drop" else labels.ties
    return SYSTEMS[0] if one > two else SYSTEMS[1]


def check_rows(config: Config) -> tuple[int, str]:
    """Number of training rows, and their digest; UserError if a row is bad or an id is not new."""
    index = sqlite3.connect("", isolation_level=None)  # a temporary file: ids may be many
    index.execute("PRAGMA journal_mode = OFF")
    index.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
    count = 0

    def rows() -> Iterator[Row]:
        nonlocal count
        for where, row in data.stream_rows(config.data, "train"):
            known = json.dumps(row.id)  # SQLite takes no lone surrogates
            try:
                index.execute("INSERT INTO ids VALUES (?, ?)", (known, where))
            except sqlite3.IntegrityError:
                (first,) = index.execute("SELECT place FROM ids WHERE id = ?", (known,)).fetchone()
                raise UserError(
                    f"{where}: id {row.id!r} is also that of {first}; ids must differ (leave them "
                    f"out to have rows numbered)"
                ) from None
            count += 1
            yield row

    try:
        digest_of_all = data.rows_digest(rows())
    finally:
        index.close()
    return count, digest_of_all


def _to_be_served(config: Config, serve: Sequence[str]) -> list[str]:
    local = [t.model for t in config.labels.teachers if t.kind == "transformers"]
    found = []
    for model in serve:  # a path may be spelt in another way
        same = [m for m in local if m == model or Path(m).resolve() == Path(model).resolve()]
        if not same:
            raise UserError(
                f"--serve {model}: no teacher of kind transformers has this model (those that have "
                f"one: {', '.join(local) or 'none'}); add it to labels.teachers"
            )
        found.append(same[0])
    return list(dict.fromkeys(found))


def _serve(model: str, ballots: list[Ballot], servers: ExitStack) -> None:
    """Has these local teachers asked through a server of ours, if they are to be asked at all."""
    from lorapar.local_teachers import MAX_TOKENS
    from lorapar.serving import serve

    if any(ballot.waits() for ballot in ballots):
        url = servers.enter_context(serve(model))
        for ballot in ballots:
            sampling = {"temperature": 0, "max_tokens": MAX_TOKENS, **ballot.teacher.sampling}
            settings = {"kind": "openai", "base_url": url, "structured": False}
            ballot.teacher = replace(ballot.teacher, sampling=sampling, **settings)


def _ask(ballots: list[Ballot], votes: Votes) -> None:
    """Asks all endpoints at once, and beside them the local teachers one after the other."""
    if not ballots:
        return
    remote = [ballot for ballot in ballots if ballot.teacher.kind == "openai"]
    endpoints = []
    if remote:
        try:
            from lorapar.endpoints import Endpoint
        except ModuleNotFoundError as e:
            raise UserError(
                f"labels.teachers: kind openai needs {e.name}; install it: "
                f"pip install 'lorapar-kernels[label]'"
            ) from None
        for ballot in remote:
            try:
                endpoints.append(Endpoint(ballot))
            except Stopped as e:
                ballot.stop(str(e))

    async def locals_in_turn() -> None:
        for ballot in ballots:
            if ballot.teacher.kind == "transformers":
                from lorapar.local_teachers import ask

                await ask(ballot)

    async def sync() -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(votes.sync)

    async def ask_all() -> None:
        async with asyncio.TaskGroup() as group:
            syncing = group.create_task(sync())
            async with asyncio.TaskGroup() as asking:
                for endpoint in endpoints:
                    asking.create_task(endpoint.run())
                asking.create_task(locals_in_turn())
            syncing.cancel()

    try:
        asyncio.run(ask_all())
    except ExceptionGroup as e:
        first: BaseException = e
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def _told(stopped: Iterable[Ballot], path: Path) -> str:
    """Which teachers stopped and why, and how to go on with or without them."""
    each = []
    for ballot in stopped:
        t = ballot.teacher
        voted = f"{ballot.counts.asked} votes in this run"
        each.append(f"{t.name!r} at {t.base_url or t.model} {ballot.stopped} ({voted})")
    return (
        f"labels.teachers: {'; '.join(each)}. All votes that arrived are kept in {path}, those of "
        f"the other teachers too. Put it right (server, base_url, model, key) and run `lorapar "
        f"label` again; to go on without, remove the teacher from labels.teachers first. No vote "
        f"is asked for twice"
    )


def _finish(run: Run, config: Config, ballots: list[Ballot], rows_digest: str) -> dict[str, Any]:
    """Aggregates the votes, writes labels.jsonl and the manifest, returns the summary."""
    patterns: Counter[tuple[str | None, ...]] = Counter()  # system, then each teacher's vote
    voted = {ballot.teacher.name: 0 for ballot in ballots}
    decided: dict[tuple[str | None, ...], str | None] = {}  # few of them: rows vote alike

    def rows(out: Any) -> Iterator[Row]:
        for _, row in data.stream_rows(config.data, "train"):
            votes = {}
            for ballot in ballots:
                known, votes[ballot.teacher.name] = ballot.vote(row)
                voted[ballot.teacher.name] += known
            cast = tuple(votes.values())
            if cast not in decided:
                decided[cast] = majority(votes, config.labels)
            system = decided[cast]
            patterns[system, *cast] += 1
            fields = {"id": row.id, "question": row.question, "answer": row.answer}
            out.write(json.dumps({**fields, "system": system, "votes": votes}) + "\n")
            yield row

    with whole_file(run.path("labels.jsonl")) as temporary:
        with temporary.open("w", encoding="utf-8") as out:
            if data.rows_digest(rows(out)) != rows_digest:
                raise UserError(f"data.train: {config.data.train} changed while it was labelled")
        counts = {s: sum(n for p, n in patterns.items() if p[0] == s) for s in (*SYSTEMS, None)}
        if config.data.select != "all":
            data.check_both(counts, run.path("votes.jsonl"))
    outputs = ["votes.jsonl", "labels.jsonl"]
    run.finish("label", *settings_and_inputs(config, rows_digest), outputs)
    agreement = Agreement(list(voted), patterns)
    teachers = {}
    for b in ballots:
        valid = agreement.valid(b.teacher.name)
        of_all = {"valid": valid, "abstained": voted[b.teacher.name] - valid}
        asked = {"asked": b.counts.asked, "retries": b.counts.retries, "tokens": b.counts.tokens}
        teachers[b.teacher.name] = {**asked, **of_all, "failed": b.counts.failed}
    named = {system or "none": n for system, n in counts.items()}
    return {"rows": patterns.total(), **named, "teachers": teachers, "agreement": agreement}
