"""Rows: GSM8K's form, errors with file and line."""

import json

import pytest

from lorapar.config import Data
from lorapar.data import load_labels, load_rows, rows_of
from lorapar.errors import UserError

ROW = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def test_gsm8k_form(tmp_path):
    path = write(tmp_path, ROW, "", {**ROW, "id": "mine", "extra": 1})
    rows = load_rows(Data(str(path)), "train")
    assert [r.id for r in rows] == ["train-0", "mine"] and rows[0].answer == ROW["answer"]
    assert len(load_rows(Data(str(path), train_rows=1), "train")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"rows.jsonl:2: not valid JSON"),
        ("[1]", r"rows.jsonl:2: expected a JSON object, found list"),
        ({"question": "q"}, r"rows.jsonl:2: needs a non-empty text 'answer', found only question"),
        ({**ROW, "question": " "}, r"rows.jsonl:2: needs a non-empty text 'question', found ' '"),
        ({**ROW, "answer": 5}, r"rows.jsonl:2: needs a non-empty text 'answer', found 5"),
        ({**ROW, "system": "system3"}, r"rows.jsonl:2: label 'system3' is neither system1 nor"),
    ],
)
def test_bad_rows(line, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_rows(Data(str(write(tmp_path, ROW, line))), "train")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="has no rows; at least one is needed"):
        load_rows(Data(str(write(tmp_path))), "train")
    with pytest.raises(UserError, match="gone.jsonl is no file; expected JSONL"):
        load_rows(Data(str(tmp_path / "gone.jsonl")), "train")
    with pytest.raises(UserError, match="data.test is not set"):
        load_rows(Data("x"), "test")
    (tmp_path / "rows.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_rows(Data(str(tmp_path / "rows.jsonl")), "train")


def test_hub_names_go_through_datasets(monkeypatch):
    import datasets

    def fake(source, name, split):
        assert (source, name, split) == ("openai/gsm8k", "main", "test")
        return [ROW, ROW]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = Data("t", test="openai/gsm8k", name="main", test_rows=1)
    assert [r.question for r in load_rows(data, "test")] == [ROW["question"]]


def test_a_hub_that_cannot_be_reached_is_a_message():
    with pytest.raises(
        UserError, match="'no/such' is no file here, and datasets could not load it"
    ):
        load_rows(Data("no/such"), "train")


def test_labels_with_the_released_column(tmp_path):
    path = write(
        tmp_path,
        {**ROW, "_result": "System1"},
        {**ROW, "system": None},
        {**ROW, "system": "system2"},
    )
    assert [r.system for r in load_labels(path)] == ["system1", None, "system2"]


def test_an_empty_system_is_refused(tmp_path):
    path = write(tmp_path, {**ROW, "system": "system2"}, {**ROW, "system": None})
    with pytest.raises(
        UserError, match=r"no row is labelled system1 \(system1 0, system2 1, none 1\)"
    ):
        rows_of(load_labels(path), "system1", path)
