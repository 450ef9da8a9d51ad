"""lorapar.labels: rules, majority, what is asked anew, rows that are refused."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from chat_server import by_number
from labelling import ONE, TWO, WORDS, configure, counts, fails, read, rows, write_rows
from rich.console import Console

from lorapar.config import RULES, Labels, Teacher, load
from lorapar.data import Row
from lorapar.labels import label, majority, settings_and_inputs
from lorapar.progress import bars
from lorapar.rules import RULES as COUNTS
from lorapar.rules import operator_count, worked_steps
from lorapar.runs import Run

COUNTED = [(ONE, 1, 1, 5), (TWO, 3, 3, 9), (WORDS, 3, 3, 45)]
WORK = {"-5 = -5": 0, "3 - -5 = 8": 1, "1+2+3 = 6": 2, "$3 * $4 = $12": 1, "20% × 50 ÷ 2": 2,
        "a 8-year-old and/or x": 0, "4 boxes * 3 = <<4*3=12>>12": 1, "12-\n3": 0}  # fmt: skip


@pytest.mark.parametrize("row, steps, operators, words", COUNTED)
def test_rules_count(row, steps, operators, words):
    counts = [count(row) for count, _ in COUNTS.values()]
    assert counts == [steps, operators, words]
    assert worked_steps(Row("", "q", "no mark: 1 + 1 = 2")) == 1


@pytest.mark.parametrize("work, operators", WORK.items())
def test_operator_count(work, operators):
    assert operator_count(Row("", "q", f"{work}\n#### 1+1")) == operators


def test_rules_label_both_kinds_of_row(tmp_path):
    config = configure(tmp_path)
    summary = label(config)
    lines = read(tmp_path / "run/labels.jsonl")
    assert [line["system"] for line in lines] == ["system1", "system2", "system2"]
    names = [t.name for t in RULES]
    assert lines[1]["votes"] == dict(zip(names, ["system2", "system2", "system1"]))
    assert lines[2]["votes"] == dict.fromkeys(names, "system2")
    assert list(lines[0]) == ["id", "question", "answer", "system", "votes"]
    votes = read(tmp_path / "run/votes.jsonl")
    keys = ["id", "teacher", "model", "prompt_hash", "row_hash", "raw", "label", "usage"]
    assert len(votes) == 9 and list(votes[0]) == keys and votes[0]["raw"] == "1 <= 2"
    assert [counts(summary, name) for name in names] == [[3, 3, 0, 0]] * 3
    assert [summary[key] for key in ("rows", "system1", "system2", "none")] == [3, 1, 2, 0]
    assert Run(config).stale("label", *settings_and_inputs(config)) is None
    assert load(tmp_path / "run").labels == config.labels


def test_changed_settings_or_rows_make_the_stage_stale(tmp_path):
    label(configure(tmp_path))
    other = configure(tmp_path, ties="system1")
    assert "ties" in Run(other).stale("label", *settings_and_inputs(other))
    other = configure(tmp_path, [vars(ONE), vars(TWO)])
    assert "data.train" in Run(other).stale("label", *settings_and_inputs(other))


@pytest.mark.parametrize("weights, min_votes, ties, votes, expected", [
    ((1, 1, 1), 1, "drop", "112", "system1"),
    ((1, 1, 1), 1, "drop", "122", "system2"),
    ((1, 1, 1), 1, "drop", "12-", None),
    ((1, 1, 1), 1, "system1", "12-", "system1"),
    ((1, 1, 1), 1, "system2", "12-", "system2"),
    ((1, 1, 1), 1, "drop", "1--", "system1"),
    ((1, 1, 1), 2, "drop", "1--", None),
    ((1, 1, 1), 2, "system2", "1--", "system2"),
    ((1, 1, 1), 2, "drop", "11-", "system1"),
    ((1, 1, 1), 0, "drop", "---", None),
    ((3, 1, 1), 1, "drop", "122", "system1"),
    ((0.3, 0.1, 0.2), 1, "drop", "122", None),
    ((0.3, 0.1, 0.21), 1, "drop", "122", "system2"),
])  # fmt: skip
def test_majority(weights, min_votes, ties, votes, expected):
    teachers = tuple(Teacher(f"t{i}", weight=float(w)) for i, w in enumerate(weights))
    named = {f"t{i}": None if v == "-" else f"system{v}" for i, v in enumerate(votes)}
    assert majority(named, Labels(teachers, ties, min_votes)) == expected


def test_resume_asks_only_what_is_missing(tmp_path, serve):
    server, whole = serve(), tmp_path / "run/votes.jsonl"
    config = configure(tmp_path, rows(20), [server.teacher(sampling={"temperature": 0})])
    label(config)
    expected = (tmp_path / "run/labels.jsonl").read_bytes()
    assert server.asked() == Counter({f"Q{i}": 1 for i in range(20)})
    assert (server.bodies[0]["temperature"], server.bodies[0]["seed"]) == (0, 41)
    assert read(whole)[0]["usage"]["total_tokens"] == 7
    lines = whole.read_bytes().splitlines(keepends=True)
    for torn in (lines[7][:25], lines[7][:-1], b"\xf0\x9f\n"):
        whole.write_bytes(b"".join(lines[:7]) + torn)
        (tmp_path / "run/labels.jsonl").unlink()
        server.prompts.clear()
        assert label(config)["teachers"]["llm"]["asked"] == 13
        kept = {f"Q{json.loads(line)['id'][6:]}" for line in lines[:7]}
        assert set(server.asked()) == {f"Q{i}" for i in range(20)} - kept
        assert whole.read_bytes().startswith(b"".join(lines[:7])) and len(read(whole)) == 20
        assert (tmp_path / "run/labels.jsonl").read_bytes() == expected
    server.prompts.clear()
    assert label(config)["teachers"]["llm"]["asked"] == 0 and not server.prompts


def test_only_what_changed_is_asked_anew_and_old_votes_are_not_counted(tmp_path, serve):
    server = serve()
    label(configure(tmp_path, rows(6), [server.teacher(weight=9.0), *RULES]))
    assert len(server.prompts) == 6
    changed = rows(6)
    changed[4]["answer"] = "other"
    label(configure(tmp_path, changed, [server.teacher()]))
    assert server.asked()["Q4"] == 2 and len(server.prompts) == 7
    label(configure(tmp_path, changed, [server.teacher(weight=2.0, concurrency=1)]))
    assert len(server.prompts) == 7
    label(configure(tmp_path, changed, [server.teacher(sampling={"temperature": 0.5})]))
    assert len(server.prompts) == 13
    assert read(tmp_path / "run/labels.jsonl")[0]["votes"] == {"llm": "system1"}
    assert len(read(tmp_path / "run/votes.jsonl")) == 4 * 6 + 1 + 6


def test_an_empty_system_is_refused(tmp_path):
    config = configure(tmp_path, [vars(ONE), {**vars(ONE), "id": "z"}])
    text = "no row is labelled system2 (system1 2, system2 0, none 0)"
    fails(config, text, "change the teachers, labels.ties or the data")
    assert len(read(tmp_path / "run/votes.jsonl")) == 3  # they say the same: one vote a teacher
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["votes.jsonl"]
    everything = configure(tmp_path, [vars(ONE), {**vars(ONE), "id": "z"}], select="all")
    assert label(everything)["system2"] == 0
    assert len(read(tmp_path / "run/labels.jsonl")) == 2


GOOD = '{"question": "q", "answer": "a"}'
SAME = '{"id": "u", "question": "q", "answer": "a"}'


@pytest.mark.parametrize("lines, texts", [
    ([GOOD, '{"question": "q"}'], [":2:", "'answer'"]),
    ([GOOD, '{"question": "q", "answer": " "}'], [":2:", "'answer'"]),
    ([GOOD, "{"], [":2:", "not valid JSON"]),
    ([], ["no rows"]),
    ([SAME, "", GOOD, SAME], ["train.jsonl:4:", "'u'", "train.jsonl:1;"]),
])  # fmt: skip
def test_bad_rows(tmp_path, lines, texts):
    config = configure(tmp_path)
    Path(config.data.train).write_text("\n".join(lines))
    fails(config, *texts)
    assert not (tmp_path / "run").exists()


def test_progress_counts_every_row(tmp_path, serve):
    config = configure(tmp_path, rows(8), [serve().teacher("llm[/x]", weight=9.0), *RULES])
    for again in range(2):
        with bars(Console(file=io.StringIO(), force_terminal=True)) as progress:
            label(config, progress=progress)
        assert [(t.description, t.completed, t.total) for t in progress.tasks] == [
            (f"label {name}", 8, 8) for name in (r"llm\[/x]", *COUNTS)
        ]
        note = progress.tasks[0].fields["note"]
        assert ("/s · 56 tokens" in note) == (not again)


def test_rows_are_known_by_what_they_say_not_by_their_place(tmp_path, serve):
    server = serve()
    label(configure(tmp_path, rows(6), [server.teacher()]))
    moved = [{"question": "Q77. New", "answer": "#### 7"}, *reversed(rows(6)), rows(1)[0]]
    summary = label(configure(tmp_path, moved, [server.teacher()]))
    assert server.asked() == Counter({**{f"Q{i}": 1 for i in range(6)}, "Q77": 1})
    assert counts(summary) == [1, 8, 0, 0] and summary["rows"] == 8
    lines = read(tmp_path / "run/labels.jsonl")
    expected = [by_number(line["question"]) == "System1" for line in lines]
    assert [line["system"] == "system1" for line in lines] == expected


def test_rows_that_say_the_same_are_asked_once(tmp_path, serve):
    server = serve()
    twice = [{**row, "id": f"{row['question']}{n}"} for n in range(2) for row in rows(4)]
    summary = label(configure(tmp_path, twice, [server.teacher(concurrency=8)]))
    assert set(server.asked().values()) == {1} and summary["rows"] == 8
    assert [line["system"] for line in read(tmp_path / "run/labels.jsonl")][4:] == [
        line["system"] for line in read(tmp_path / "run/labels.jsonl")
    ][:4]


def test_a_changed_prompt_or_target_or_schema_is_asked_anew(tmp_path, serve):
    server, mine = serve(), tmp_path / "mine.txt"
    mine.write_text("{question}{answer}")
    changes = [{}, {"prompt": "plain"}, {"target": "LLaMA2 7B"}, {"prompt": str(mine)}]
    for n, change in enumerate(changes, 1):
        config = configure(tmp_path, rows(4), [server.teacher()], **change)
        assert label(config)["teachers"]["llm"]["asked"] == 4
        assert Run(config).stale("label", *settings_and_inputs(config)) is None
        label(config)
        assert len(server.prompts) == 4 * n
    assert "Q3. Say3\n#### 3" in server.prompts[-4:]
    assert "LLaMA2 7B" in server.prompts[8] and "Stay in this role" not in server.prompts[4]
    mine.write_text("Judge: {question}{answer}")
    assert "labels.prompt" in Run(config).stale("label", *settings_and_inputs(config))
    label(config)
    label(configure(tmp_path, rows(4), [server.teacher(structured=False)]))
    assert len(server.prompts) == 24 and "response_format" not in server.bodies[-1]


def test_whom_teachers_play_matters_only_where_the_prompt_says(tmp_path, serve):
    server = serve()
    for target in ("a", "b"):
        one = configure(tmp_path, rows(4), [server.teacher()], prompt="plain", target=target)
        label(one)
    assert len(server.prompts) == 4


def test_how_a_teacher_is_reached_makes_nothing_stale(tmp_path, serve):
    server = serve()
    label(configure(tmp_path, rows(4), [server.teacher()]))
    moved = replace(server.teacher(), base_url="http://h:1/v1", timeout=9.0, retries=0)
    config = configure(
        tmp_path, rows(4), [replace(moved, concurrency=9, api_key_env="NO_SUCH_KEY")]
    )
    assert Run(config).stale("label", *settings_and_inputs(config)) is None
    label(config)  # all votes are there: neither the server nor the key is needed
    assert len(server.prompts) == 4


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_random_partition(tmp_path, share):
    teacher = Teacher("dice", kind="random", sampling={"system1": share})
    config = configure(tmp_path, rows(1000), [teacher], select="all")
    summary = label(config)
    assert abs(summary["system1"] - 1000 * share) <= 4 * (1000 * share * (1 - share)) ** 0.5
    first = (tmp_path / "run/labels.jsonl").read_bytes()
    label(configure(tmp_path, rows(1000), [teacher], run="again", select="all"))
    assert (tmp_path / "again/labels.jsonl").read_bytes() == first
    other = configure(tmp_path, rows(1000), [teacher], run="other", select="all", seed=1)
    label(other)
    assert ((tmp_path / "other/labels.jsonl").read_bytes() == first) is (share in (0, 1))
    assert counts(label(other), "dice") == [0, 1000, 0, 0]


def test_teachers_of_all_kinds_vote_together(tmp_path, serve):
    servers = [serve(lambda prompt, *, word=word: word) for word in ("System1", "System2", "?")]
    names = ["one", "two", "mute"]
    teachers = [server.teacher(name) for server, name in zip(servers, names)]
    dice = Teacher("dice", kind="random", sampling={"system1": 1.0})
    config = configure(tmp_path, rows(5), [*teachers, RULES[0], dice], select="all")
    summary = label(config)
    votes = {"one": "system1", "two": "system2", "mute": None, RULES[0].name: "system1"}
    for line in read(tmp_path / "run/labels.jsonl"):
        assert line["votes"] == {**votes, "dice": "system1"} and line["system"] == "system1"
    assert counts(summary, "mute") == [5, 0, 5, 0]
    found = summary["agreement"]
    assert found.with_result("one") == (5, 5) and found.with_result("two") == (0, 5)
    assert found.pairs()["one", "dice"][:2] == (5, 5)


def test_data_that_change_while_they_are_labelled(tmp_path, serve):
    values = rows(3)

    def answer(prompt):
        write_rows(tmp_path, [*values, *rows(9)[5:]])
        return by_number(prompt)

    fails(configure(tmp_path, values, [serve(answer).teacher()]), "changed while it was labelled")


def test_hostile_rows_go_there_and_back(tmp_path, serve):
    hard = [
        "Q0. " + "x" * 100_000,
        "Q1. two\nlines\r\nand\ttabs\u2028\u0000",
        "Q2. \U0001f600 \u4f60\u597d \u202e \ufffd",
        "Q3. lone \ud83d surrogate",
        'Q4. {"role": "system"} {question} {answer} %s \\n </think> ```',
    ]
    values = [{"question": q, "answer": f"{q[:3]} #### {i}"} for i, q in enumerate(hard)]
    server = serve()
    config = configure(tmp_path, values, [server.teacher()], select="all")
    assert counts(label(config)) == [5, 5, 0, 0]
    prompts = {int(p[p.index("\nQ") + 2]): p for p in server.prompts}
    for i, question in enumerate(hard):
        assert f"\n{question}\n" in prompts[i]
    assert [line["question"] for line in read(tmp_path / "run/labels.jsonl")] == hard
    assert counts(label(config)) == [0, 5, 0, 0]
