"""What the tests of labelling share: data, configurations, reading, and the expected refusal."""

import json
from pathlib import Path

import pytest

from lorapar.config import RULES, Config, Data, Labels
from lorapar.data import Row
from lorapar.errors import UserError
from lorapar.labels import label

ONE = Row("a", "What is 23 + 48?", "23 + 48 = 71\n#### 71")
TWO = Row("b", "What is 12 + 45 - 7 + 9?", "12 + 45 = 57\n57 - 7 = 50\n50 + 9 = 59\n#### 59")
WORDS = Row(
    "c",
    "Ann has " + "many " * 40 + "apples. How many?",
    "Half are 48/2 = <<48/2=24>>24.\nBoth 48+24 = $<<48+24=72>>72.\nLeft 72 x 3 = <<72*3=216>>216."
    "\n#### 216",
)


def rows(count):
    return [{"question": f"Q{i}. Say", "answer": f"{i}\n#### {i}"} for i in range(count)]


def write_rows(folder, values):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def configure(folder, values=None, teachers=RULES, run="run", select="labels", **settings):
    path = write_rows(folder, [vars(ONE), vars(TWO), vars(WORDS)] if values is None else values)
    return Config(
        model="tiny/base",
        data=Data(train=str(path), select=select),
        labels=Labels(teachers=tuple(teachers), **settings),
        run_dir=str(folder / run),
    )


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def votes_of(config, teacher="llm"):
    """{row id: vote} of one teacher."""
    lines = read(Path(config.run_dir, "votes.jsonl"))
    return {vote["id"]: vote for vote in lines if vote["teacher"] == teacher}


def counts(summary, teacher="llm", keys=("asked", "valid", "abstained", "failed")):
    return [summary["teachers"][teacher][key] for key in keys]


def fails(config, *texts, **options):
    """The message of the refusal; no label was written."""
    with pytest.raises(UserError) as e:
        label(config, **options)
    assert not [text for text in texts if text not in str(e.value)], str(e.value)
    assert not (Path(config.run_dir) / "labels.jsonl").exists()
    assert not (Path(config.run_dir) / "stages.json").exists()
    return str(e.value)
