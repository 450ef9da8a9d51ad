"""lorapar export: labels that `datasets` reads, and that the stages read again."""

import json

import datasets
import pyarrow.parquet
import pytest
from chat_server import by_number
from labelling import configure, read, rows
from typer.testing import CliRunner

from lorapar import cli
from lorapar.config import RULES, Config, Data
from lorapar.data import labels_file, load_labels, load_rows
from lorapar.errors import UserError
from lorapar.exporting import export
from lorapar.labels import label
from lorapar.runs import Run

COLUMNS = ["id", "question", "answer", "votes", "system"]


@pytest.fixture
def labelled(tmp_path, serve):
    values = rows(2500)
    values[7]["question"] = "Q7. two\nlines, \U0001f600, 'quotes' and \"more\""
    server = serve(lambda prompt: by_number(prompt))
    server.delay = 0
    config = configure(tmp_path, values[:40], [server.teacher(weight=9.0), *RULES])
    label(config)
    return config


def test_datasets_reads_the_parquet_file(tmp_path, labelled):
    path, count = export(labelled)
    assert (path, count) == (tmp_path / "run/labels.parquet", 40)
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache)
    assert loaded.column_names == COLUMNS
    assert [dict(row) for row in loaded] == read(tmp_path / "run/labels.jsonl")
    assert loaded[9]["votes"]["llm"] is None and loaded[3]["votes"]["llm"] == "system1"


def test_jsonl_too_and_nothing_else(tmp_path, labelled):
    path, _ = export(labelled, tmp_path / "out.jsonl")
    assert read(path) == read(tmp_path / "run/labels.jsonl") and list(read(path)[0]) == COLUMNS
    with pytest.raises(UserError, match=r"must end in \.parquet or \.jsonl"):
        export(labelled, tmp_path / "out.csv")
    with pytest.raises(UserError, match="use another name"):
        export(labelled, tmp_path / "run/labels.jsonl")
    (tmp_path / "run/labels.jsonl").unlink()
    with pytest.raises(UserError, match="run `lorapar label"):
        export(labelled)


def test_stages_read_either(tmp_path, labelled):
    run = Run(labelled)
    of_jsonl = load_labels(labels_file(run))
    export(labelled)
    assert labels_file(run).name == "labels.jsonl"
    run.path("labels.jsonl").unlink()
    run.path("stages.json").unlink()
    assert labels_file(run).name == "labels.parquet"
    assert load_labels(labels_file(run)) == of_jsonl
    assert load_rows(Data(str(labels_file(run))), "train") == of_jsonl


def test_rows_of_many_batches_and_teachers_that_come_late(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"id": i, "question": "q", "answer": "a", "system": "system1"} for i in range(3000)]
    lines[2999] |= {"votes": {"late": "system1"}, "system": None}
    (run / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path, count = export(Config(model="m", data=Data("x"), run_dir=str(run)))
    assert count == 3000 and len(load_labels(path)) == 3000
    assert load_labels(path)[2999].system is None
    path, _ = export(Config(model="m", data=Data("x"), run_dir=str(run)), tmp_path / "out.jsonl")
    assert [read(path)[n]["votes"] for n in (0, 2999)] == [{"late": None}, {"late": "system1"}]


def test_a_lone_surrogate_is_replaced(tmp_path):
    line = '{"question": "q \\ud83d", "answer": "a \U0001f600", "system": null}\n'
    (tmp_path / "labels.jsonl").write_text(line)
    path, _ = export(Config(model="m", data=Data("x"), run_dir=str(tmp_path)))
    assert [(row.question, row.answer) for row in load_labels(path)] == [("q ?", "a \U0001f600")]


def test_labels_without_votes(tmp_path):
    (tmp_path / "labels.jsonl").write_text(
        '{"question": "q", "answer": "a", "system": "system2"}\n'
    )
    path, _ = export(Config(model="m", data=Data("x"), run_dir=str(tmp_path)))
    assert [(row.id, row.system) for row in load_labels(path)] == [("line-1", "system2")]


def test_parquet_from_elsewhere(tmp_path):
    columns = {"question": ["a?", "b?"], "answer": ["1", "2"], "id": [None, 7]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    found = load_rows(Data(str(tmp_path / "rows.parquet")), "train")
    assert [(row.id, row.question) for row in found] == [("train-0", "a?"), ("7", "b?")]
    columns["answer"] = ["1", None]
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet row 2: needs a non-empty text 'answer'"):
        load_rows(Data(str(tmp_path / "rows.parquet")), "train")


def test_damaged_parquet(tmp_path):
    whole = tmp_path / "whole.parquet"
    texts = [f"text {n * 7919 % 1009}" for n in range(5000)]
    pyarrow.parquet.write_table(pyarrow.table({"question": texts, "answer": texts}), whole)
    data = bytearray(whole.read_bytes())
    data[200:2000] = b"\xff" * 1800
    (tmp_path / "page.parquet").write_bytes(data)
    with pytest.raises(UserError, match="page.parquet: not a parquet file, or damaged"):
        load_rows(Data(str(tmp_path / "page.parquet")), "train")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="rows.parquet: not a parquet file"):
        load_rows(Data(str(path)), "train")
    with pytest.raises(UserError, match="gone.parquet is no file"):
        load_rows(Data(str(tmp_path / "gone.parquet")), "train")


def test_the_commands(tmp_path, labelled):
    run, console = labelled.run_dir, {"COLUMNS": "200"}
    invoke = CliRunner().invoke
    result = invoke(cli.app, ["export", run, "--to", str(tmp_path / "x.parquet")])
    assert result.exit_code == 0 and "wrote 40 rows" in result.output
    shown = invoke(cli.app, ["votes", run, "--limit", "1"], env=console).output
    assert "Fleiss' kappa" in shown and "llm – the result" in shown and shown.count(" → ") == 1
    shown = invoke(
        cli.app, ["votes", run, "--row", "train-7", "--row", "train-9"], env=console
    ).output
    assert "two\nlines" in shown and "Hm, hard to say" in shown and "1 <= 2" not in shown
    result = invoke(cli.app, ["votes", run, "--row", "nobody"])
    assert isinstance(result.exception, UserError) and "nobody" in str(result.exception)
