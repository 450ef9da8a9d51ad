"""Rows of question and answer, from JSONL in GSM8K's form or from the hub through `datasets`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapar.config import Data
from lorapar.errors import UserError

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


def load_rows(data: Data, split: str) -> list[Row]:
    """The rows of `train` or `test`, in order.

    Raises:
        UserError: no such file or data set; a row without question or answer; no rows at all.
    """
    source = getattr(data, split)
    limit = getattr(data, f"{split}_rows")
    if source is None:
        raise UserError(f"data.{split} is not set; expected a JSONL file or a data set's name")
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or path.exists():
        if not path.is_file():
            raise UserError(f"data.{split}: {path} is no file; expected JSONL")
        pairs = ((f"{path}:{number}", value) for number, value in read_jsonl(path))
    else:
        pairs = _from_hub(source, data.name, split)
    rows = []
    for where, value in pairs:
        if limit is not None and len(rows) >= limit:
            break
        rows.append(make_row(where, value, f"{split}-{len(rows)}"))
    if not rows:
        raise UserError(f"data.{split}: {source} has no rows; at least one is needed")
    return rows


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
    return Row(str(value.get("id", default_id)), value["question"], value["answer"], system)


def load_labels(path: Path) -> list[Row]:
    """The rows of a labels.jsonl."""
    return [make_row(f"{path}:{n}", value, f"line-{n}") for n, value in read_jsonl(path)]


def rows_of(rows: list[Row], system: str, source: Path) -> list[Row]:
    """The rows with one label; UserError if there are none."""
    chosen = [r for r in rows if r.system == system]
    if not chosen:
        counts = {s: sum(r.system == s for r in rows) for s in (*SYSTEMS, None)}
        raise UserError(
            f"{source}: no row is labelled {system} (system1 {counts['system1']}, system2 "
            f"{counts['system2']}, none {counts[None]}); both systems need rows: change the "
            f"teachers, labels.ties or the data"
        )
    return chosen


def _from_hub(source: str, name: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, name, split=split)
    except Exception as e:
        raise UserError(
            f"data.{split}: {source!r} is no file here, and datasets could not load it "
            f"({type(e).__name__}: {str(e).splitlines()[0][:200]}); expected a JSONL file or a "
            f"data set such as openai/gsm8k with name: main"
        ) from None
    for index, value in enumerate(loaded):
        yield f"{source}[{split}][{index}]", value
