"""Labels as one file for other programs: parquet, or JSONL."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapar.agreement import labelled
from lorapar.config import Config
from lorapar.data import labels_file
from lorapar.errors import UserError
from lorapar.runs import Run, whole_file

ROWS = 1024  # a time


def export(config: Config, to: Path | None = None) -> tuple[Path, int]:
    """Writes the labels of a run with the columns id, question, answer, votes, system.

    `votes` has a field for each teacher: "system1", "system2" or null; without teachers it is null.

    Args:
        config: whose run folder to read.
        to: a .parquet or .jsonl file; None: labels.parquet in the run folder.

    Returns:
        The file, and its number of rows.

    Raises:
        UserError: no labels yet, or another kind of file.
    """
    run = Run(config)
    source, to = labels_file(run), to or run.path("labels.parquet")
    if to.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"--to {to}: the name must end in .parquet or .jsonl")
    if to.resolve() == source.resolve():
        raise UserError(f"--to {to}: these are the labels that are to be written; use another name")
    names = list(dict.fromkeys(name for _, votes in labelled(source) for name in votes))
    count = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row, votes in labelled(source):
            count += 1
            fields = {"id": row.id, "question": row.question, "answer": row.answer}
            cast = {n: votes.get(n) for n in names} or None
            yield fields | {"votes": cast, "system": row.system}

    with whole_file(to) as temporary:
        if to.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows())
        else:
            _write_parquet(temporary, rows(), names)
    return to, count


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], names: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    text = pa.string()
    votes = pa.struct([(name, text) for name in names or ["none"]])  # parquet has no empty struct
    columns = [("id", text), ("question", text), ("answer", text)]
    schema = pa.schema([*columns, ("votes", votes), ("system", text)])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(itertools.islice(rows, ROWS)):
            for row in chunk:
                row |= {key: _utf8(row[key]) for key in ("id", "question", "answer")}
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def _utf8(value: str) -> str:
    """Parquet holds UTF-8 alone: a lone surrogate, which JSON can spell, becomes `?`."""
    return value.encode(errors="replace").decode()
