"""Rows of question and answer: JSONL in GSM8K's form, parquet, or the hub through `datasets`."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorapar.config import Data
from lorapar.errors import UserError
from lorapar.runs import Run

SYSTEMS = ("system1", "system2")


@dataclass(frozen=True)
class Row:
    """One question with its reference answer; `system` is set on labelled rows and some tests."""

    id: str
    question: str
    answer: str
    system: str | None = None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line. UserError names the line that is no JSON object."""
    try:
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as e:
                    raise UserError(f"{path}:{number}: not valid JSON: {e.msg}") from None
                if not isinstance(value, dict):
                    raise UserError(
                        f"{path}:{number}: expected a JSON object, found {type(value).__name__}"
                    )
                yield number, value
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text: {e.reason} at byte {e.start}") from None


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, values by column) of each row. UserError for what is no parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except (pyarrow.ArrowException, OSError) as e:
        problem = str(e).splitlines()[0]
        raise UserError(f"{path}: not a parquet file, or damaged: {problem}") from None


def read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, values) of each row of a file: parquet by its suffix, else JSONL."""
    parquet = path.suffix == ".parquet"
    for number, value in read_parquet(path) if parquet else read_jsonl(path):
        yield f"{path} row {number}" if parquet else f"{path}:{number}", value


def stream_rows(data: Data, split: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of `train` or `test`, in order, one at a time.

    Raises:
        UserError: no such file or data set; a row without question or answer; no rows at all.
    """
    source = getattr(data, split)
    limit = getattr(data, f"{split}_rows")
    if source is None:
        raise UserError(
            f"data.{split} is not set; expected a JSONL or parquet file, or a data set's name"
        )
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet") or path.exists():
        if not path.is_file():
            raise UserError(f"data.{split}: {path} is no file; expected JSONL or parquet")
        pairs = read_file(path)
    else:
        pairs = _from_hub(source, data.name, split)
    count = 0
    for where, value in pairs:
        if limit is not None and count >= limit:
            break
        yield where, make_row(where, value, f"{split}-{count}")
        count += 1
    if not count:
        raise UserError(f"data.{split}: {source} has no rows; at least one is needed")


def load_rows(data: Data, split: str) -> list[Row]:
    """The rows of `train` or `test`, in order; raises as `stream_rows` does."""
    return [row for _, row in stream_rows(data, split)]


@lru_cache(256)  # asked for several times while a row is at hand
def row_hash(row: Row) -> str:
    """What a vote is about: question and answer, whatever the row's id."""
    text = json.dumps([row.question, row.answer])  # as `digest` does, with less ado
    return hashlib.sha256(text.encode()).hexdigest()


def rows_digest(rows: Iterable[Row]) -> str:
    """`digest([[id, question, answer], ...])`, of rows that come one at a time."""
    h, between = hashlib.sha256(b"["), b""
    for row in rows:
        h.update(between + json.dumps([row.id, row.question, row.answer]).encode())
        between = b", "
    h.update(b"]")
    return h.hexdigest()


def make_row(where: str, value: dict[str, Any], default_id: str) -> Row:
    """A checked row. The released script's `_result` column is read as the label."""
    for key in ("question", "answer"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            found = (
                repr(value[key])[:60] if key in value else f"only {', '.join(value) or 'nothing'}"
            )
            raise UserError(f"{where}: needs a non-empty text {key!r}, found {found}")
    system = value.get("system", value.get("_result"))
    if system is not None:
        named = str(system).lower().replace(" ", "")
        if named not in SYSTEMS:
            raise UserError(
                f"{where}: label {system!r} is neither system1 nor system2 (null for none)"
            )
        system = named
    name = value.get("id")
    return Row(
        default_id if name is None else str(name), value["question"], value["answer"], system
    )


def labels_file(run: Run) -> Path:
    """labels.jsonl of a run, or labels.parquet where that alone is there."""
    parquet = run.path("labels.parquet")
    if parquet.exists() and not run.path("labels.jsonl").exists():
        return parquet
    return run.need("labels.jsonl", "label")


def load_labels(path: Path) -> list[Row]:
    """The rows of a labels.jsonl or labels.parquet."""
    return [make_row(where, v, f"line-{n}") for n, (where, v) in enumerate(read_file(path), 1)]


def rows_of(rows: list[Row], system: str, source: Path) -> list[Row]:
    """The rows with one label; UserError if there are none."""
    chosen = [r for r in rows if r.system == system]
    if not chosen:
        check_both({s: sum(r.system == s for r in rows) for s in (*SYSTEMS, None)}, source)
    return chosen


def check_both(counts: dict[str | None, int], source: Path) -> None:
    """Raises UserError for a system without rows; `counts` by system, None for no label."""
    for system in SYSTEMS:
        if not counts[system]:
            raise UserError(
                f"{source}: no row is labelled {system} (system1 {counts['system1']}, system2 "
                f"{counts['system2']}, none {counts[None]}); both systems need rows: change the "
                f"teachers, labels.ties or the data"
            )


def _from_hub(source: str, name: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, name, split=split)
    except Exception as e:
        raise UserError(
            f"data.{split}: {source!r} is no file here, and datasets could not load it "
            f"({type(e).__name__}: {str(e).splitlines()[0][:200]}); expected a JSONL or parquet "
            f"file, or a data set such as openai/gsm8k with name: main"
        ) from None
    for index, value in enumerate(loaded):
        yield f"{source}[{split}][{index}]", value
