"""How far teachers agree: shares, pairs, Fleiss' kappa; and the rows on which they do not."""

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

from lorapar.config import Config
from lorapar.data import SYSTEMS, Row, make_row, read_file, row_hash
from lorapar.errors import UserError
from lorapar.teachers import prompt_hash
from lorapar.votes import read_votes

VOTES = (*SYSTEMS, None)


@dataclass(frozen=True)
class Agreement:
    """Statistics over patterns of votes.

    Attributes:
        teachers: their names.
        patterns: how many rows have a (system, vote of the first teacher, vote of the second, ...);
            None for no label, or no valid vote.
    """

    teachers: list[str]
    patterns: Counter[tuple[str | None, ...]]

    def results(self) -> Counter[str | None]:
        """Rows by label; None: no label."""
        return _summed((pattern[0], n) for pattern, n in self.patterns.items())

    def votes(self, teacher: str) -> Counter[str | None]:
        """Rows by this teacher's vote; None: no valid vote."""
        at = 1 + self.teachers.index(teacher)
        return _summed((pattern[at], n) for pattern, n in self.patterns.items())

    def valid(self, teacher: str) -> int:
        """Rows with a valid vote of this teacher."""
        return sum(n for vote, n in self.votes(teacher).items() if vote)

    def with_result(self, teacher: str) -> tuple[int, int]:
        """(rows that it voted as they are labelled, labelled rows that it voted on)."""
        at = 1 + self.teachers.index(teacher)
        both = _summed(((p[at] == p[0]), n) for p, n in self.patterns.items() if p[at] and p[0])
        return both[True], both.total()

    def pairs(self) -> dict[tuple[str, str], tuple[int, int, float | None]]:
        """(rows voted alike, rows that both voted on, Cohen's kappa) of every two teachers."""
        found = {}
        for (i, a), (j, b) in combinations(enumerate(self.teachers, 1), 2):
            both = _summed(((p[i], p[j]), n) for p, n in self.patterns.items() if p[i] and p[j])
            total, alike = both.total(), sum(both[s, s] for s in SYSTEMS)
            chance = sum(
                _summed((x, n) for (x, _), n in both.items())[s]
                * _summed((y, n) for (_, y), n in both.items())[s]
                for s in SYSTEMS
            )
            found[a, b] = alike, total, _kappa(alike, total, chance / total if total else 0)
        return found

    def fleiss_kappa(self) -> float | None:
        """Fleiss' kappa (1971) over the rows with two or more valid votes; None if undefined.

        1 means that all agree, 0 as much as by chance. With abstentions, a row counts with the
        votes it has: its agreement is the share of its pairs of votes that are alike.
        """
        rows = pairs_alike = 0.0
        cast: Counter[str] = Counter()
        for (_, *votes), n in self.patterns.items():
            counts = Counter(vote for vote in votes if vote)
            k = counts.total()
            if k < 2:
                continue
            rows += n
            pairs_alike += n * sum(c * (c - 1) for c in counts.values()) / (k * (k - 1))
            for system, c in counts.items():
                cast[system] += n * c
        total = cast.total()
        chance = sum((c / total) ** 2 for c in cast.values()) if total else 0
        return _kappa(pairs_alike, rows, chance * rows)

    def unanimous(self) -> tuple[int, int]:
        """(rows on which all valid votes are alike, rows with two or more valid votes)."""
        several = [(set(p[1:]) - {None}, n) for p, n in self.patterns.items() if _valid(p) > 1]
        return sum(n for kinds, n in several if len(kinds) == 1), sum(n for _, n in several)


def agreement_of(path: Path) -> Agreement:
    """The statistics of a labels.jsonl or labels.parquet."""
    teachers: dict[str, int] = {}
    patterns: Counter[tuple[str | None, ...]] = Counter()
    for row, votes in labelled(path):
        for name in votes:
            teachers.setdefault(name, len(teachers))
        patterns[row.system, *(votes.get(name) for name in teachers)] += 1
    width = 1 + len(teachers)  # a row before a teacher's first has no vote of it
    padded = ((p + (None,) * (width - len(p)), n) for p, n in patterns.items())
    return Agreement(list(teachers), _summed(padded))


def labelled(path: Path) -> Iterator[tuple[Row, dict[str, str | None]]]:
    """Rows of a labels file, each with its votes by teacher; UserError for what are no votes."""
    for number, (where, value) in enumerate(read_file(path), 1):
        row, votes = make_row(where, value, f"line-{number}"), value.get("votes") or {}
        if not isinstance(votes, dict) or any(v not in VOTES for v in votes.values()):
            raise UserError(
                f"{where}: votes must map teachers to system1, system2 or null, found "
                f"{str(votes)[:60]}; leave votes out if there were no teachers"
            )
        yield row, votes


@dataclass(frozen=True)
class Disagreement:
    """A row on which teachers differ; `votes`: (teacher, label or None, what it said) of each."""

    row: Row
    votes: list[tuple[str, str | None, str]]


def disagreements(
    config: Config, path: Path, votes_path: Path, *, limit: int = 20, ids: tuple[str, ...] = ()
) -> list[Disagreement]:
    """The rows whose votes are split most evenly by weight, the first in the file before others.

    Args:
        config: for the teachers' weights; one that is not there weighs 1.
        path, votes_path: labels.jsonl or labels.parquet, and votes.jsonl with what teachers said.
        limit: how many rows.
        ids: the rows with these ids instead, in the file's order, whether votes differ or not.
    """
    if ids:
        chosen = [(row, votes) for row, votes in labelled(path) if row.id in ids]
    else:
        weights = {t.name: Fraction(str(t.weight)) for t in config.labels.teachers}
        split = heapq.nsmallest(limit, _split(path, weights), key=lambda c: c[:2])
        chosen = [(row, votes) for *_, row, votes in split]
    wanted = {row_hash(row) for row, _ in chosen}
    now = {}
    for t in config.labels.teachers:
        with suppress(UserError, KeyError):  # the prompt's file is gone, no such rule any more
            now[t.name] = t.model, prompt_hash(t, config)
    said: dict[tuple[str, str, str | None], tuple[bool, str]] = {}
    for vote in read_votes(votes_path) if wanted else ():
        key = vote["row_hash"], vote["teacher"], vote["label"]
        ours = (vote["model"], vote["prompt_hash"]) == now.get(vote["teacher"])
        if vote["row_hash"] in wanted and (ours or not said.get(key, (False, ""))[0]):
            said[key] = ours, str(vote.get("raw") or "")
    return [
        Disagreement(
            row, [(n, v, said.get((row_hash(row), n, v), (False, ""))[1]) for n, v in votes.items()]
        )
        for row, votes in chosen
    ]


def _split(path: Path, weights: dict[str, Fraction]) -> Iterator[tuple[Fraction, int, Row, dict]]:
    """(margin, place, row, votes) of each row with votes for both systems.

    Weights are summed as the majority sums them: 0.1 and 0.2 tie with 0.3.
    """
    even = Fraction(1)
    for i, (row, votes) in enumerate(labelled(path)):
        one, two = (sum(weights.get(n, even) for n, v in votes.items() if v == s) for s in SYSTEMS)
        if one and two:
            yield abs(one - two) / (one + two), i, row, votes


def _valid(pattern: tuple[Any, ...]) -> int:
    return sum(vote is not None for vote in pattern[1:])


def _kappa(alike: float, total: float, by_chance: float) -> float | None:
    if not total or math.isclose(by_chance, total):
        return None
    return (alike - by_chance) / (total - by_chance)


def _summed(pairs: Any) -> Counter:
    counts: Counter = Counter()
    for key, n in pairs:
        counts[key] += n
    return counts
