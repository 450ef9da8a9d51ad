"""lorapar.agreement: statistics by hand, and the rows on which teachers differ."""

import json
from collections import Counter

import labelling
import pytest

from lorapar.agreement import Agreement, agreement_of, disagreements, labelled
from lorapar.config import Config, Data, Labels, Teacher
from lorapar.data import Row, row_hash
from lorapar.errors import UserError
from lorapar.exporting import export
from lorapar.labels import label, majority
from lorapar.runs import Run

CODES = {"1": "system1", "2": "system2", "-": None}


def table(*rows, result="-"):
    """Agreement of teachers a, b, c, ... from rows such as "12-", one character a vote."""
    patterns = Counter(tuple(CODES[c] for c in result + row) for row in rows)
    return Agreement(list("abcdefghi"[: len(rows[0])]), patterns)


def test_fleiss_kappa_by_hand():
    # Rows agree by 1, 1/3, 1/3, 1: 2/3. Half of the votes are for either system: 1/2 by chance.
    assert table("111", "112", "122", "222").fleiss_kappa() == pytest.approx(1 / 3)
    # 4/5; votes 7 to 3: 0.49 + 0.09 = 0.58 by chance; 0.22 / 0.42.
    assert table("11", "11", "11", "12", "22").fleiss_kappa() == pytest.approx(11 / 21)
    # Never alike, half by chance.
    assert table("12", "21").fleiss_kappa() == pytest.approx(-1)
    assert table("1111", "2222").fleiss_kappa() == pytest.approx(1)


def test_fleiss_kappa_of_a_worked_example():
    """Ten subjects, 14 raters, five categories: agreement 0.378, by chance 0.213, kappa 0.210."""
    counts = """0 0 0 0 14; 0 2 6 4 2; 0 0 3 5 6; 0 3 9 2 0; 2 2 8 1 1;
        7 7 0 0 0; 3 2 6 3 0; 2 5 3 2 2; 6 5 2 1 0; 0 2 2 3 7"""
    patterns = Counter()
    for line in counts.split(";"):
        votes = [str(k) for k, n in enumerate(line.split()) for _ in range(int(n))]
        patterns[None, *votes] += 1
    found = Agreement([str(i) for i in range(14)], patterns).fleiss_kappa()
    assert found == pytest.approx(0.210, abs=0.0005)


def test_fleiss_kappa_with_abstentions():
    # The last two rows have no pair of votes. The others agree by 1, 0, 1: 2/3. Of their votes 4
    # are for System 1 and 3 for System 2: (16 + 9) / 49 by chance; (98 - 75) / (147 - 75) = 23/72.
    found = table("111", "12-", "-22", "1--", "---")
    assert found.fleiss_kappa() == pytest.approx(23 / 72)
    assert found.unanimous() == (2, 3)


def test_cohens_kappa_by_hand():
    # Alike on 4 + 3 of 10: 0.7. a says System 1 on 6, b on 5: 0.6 * 0.5 + 0.4 * 0.5 = 0.5.
    rows = ["11"] * 4 + ["12"] * 2 + ["21"] + ["22"] * 3
    assert table(*rows).pairs() == {("a", "b"): (7, 10, pytest.approx(0.4))}
    abstained = ["1-", "-2", "--"] * 5
    assert table(*rows, *abstained).pairs() == {("a", "b"): (7, 10, pytest.approx(0.4))}
    assert table("12", "21").pairs() == {("a", "b"): (0, 2, pytest.approx(-1))}
    assert table("12", "12").pairs() == {("a", "b"): (0, 2, 0)}  # 0 by chance too
    three = table("112", "221", "111").pairs()
    assert list(three) == [("a", "b"), ("a", "c"), ("b", "c")]
    # a, c alike on 1 of 3; both say System 1 on 2: 4/9 + 1/9 by chance; (3 - 5) / (9 - 5).
    assert three["a", "b"] == (3, 3, 1) and three["a", "c"] == (1, 3, pytest.approx(-0.5))


def test_what_is_undefined():
    same = table("11", "11")
    assert same.fleiss_kappa() is None and same.pairs() == {("a", "b"): (2, 2, None)}
    apart = table("1-", "-1")
    assert apart.fleiss_kappa() is None and apart.pairs() == {("a", "b"): (0, 0, None)}
    assert apart.unanimous() == (0, 0) and apart.with_result("a") == (0, 0)
    alone = table("1", "2")
    assert alone.fleiss_kappa() is None and alone.pairs() == {} and alone.unanimous() == (0, 0)
    nobody = Agreement([], Counter({("system1",): 3}))
    assert nobody.fleiss_kappa() is None and nobody.results() == {"system1": 3}


def test_counts():
    patterns = table("11", "1-", result="1").patterns + table("12", "-2", "--").patterns
    found = Agreement(["a", "b"], patterns + table("21", result="2").patterns)
    assert found.results() == {"system1": 2, None: 3, "system2": 1}
    assert found.votes("a") == {"system1": 3, None: 2, "system2": 1} and found.valid("a") == 4
    assert found.votes("b") == {"system1": 2, None: 2, "system2": 2} and found.valid("b") == 4
    assert found.with_result("a") == (3, 3) and found.with_result("b") == (1, 2)
    assert found.unanimous() == (1, 3)


def write(path, rows):
    """labels.jsonl of (id, question, system, votes); votes None: no such key."""
    with path.open("w") as f:
        for name, question, system, votes in rows:
            row = {"id": name, "question": question, "answer": "1", "system": system}
            f.write(json.dumps(row | ({} if votes is None else {"votes": votes})) + "\n")
    return path


def cast(votes, teachers="abcdefghi"):
    return {t: CODES[c] for t, c in zip(teachers, votes)}


def configure(folder, **weights):
    teachers = tuple(Teacher(name, weight=w) for name, w in weights.items())
    labels = Labels(teachers=teachers) if teachers else Labels()
    return Config(model="m", data=Data(train="t.jsonl"), labels=labels, run_dir=str(folder))


def test_a_teacher_that_appears_late(tmp_path):
    rows = [("r0", "q", "system1", None), ("r1", "q", "system1", {"a": "system1"})]
    rows += [("r2", "q", None, {"b": "system2", "a": "system1"}), ("r3", "q", "system2", {})]
    rows += [("r4", "q", "system1", {"a": "system1", "b": None})]
    found = agreement_of(write(tmp_path / "labels.jsonl", rows))
    assert found.teachers == ["a", "b"]
    one, two = "system1", "system2"
    expected = {(one, None, None): 1, (one, one, None): 2, (None, one, two): 1}
    assert found.patterns == expected | {(two, None, None): 1}
    export(configure(tmp_path))
    assert agreement_of(tmp_path / "labels.parquet") == found


def test_labels_without_votes_have_no_teachers(tmp_path):
    write(tmp_path / "labels.jsonl", [("r0", "q", "system1", None), ("r1", "q", "system2", {})])
    export(configure(tmp_path))
    for name in ("labels.jsonl", "labels.parquet"):
        found = agreement_of(tmp_path / name)
        assert found.teachers == [] and found.patterns == {("system1",): 1, ("system2",): 1}


@pytest.mark.parametrize(
    "votes", [["system1"], {"a": "System 2"}, {"a": 1}, 12, {"a": ["system1"]}]
)
def test_what_are_no_votes(tmp_path, votes):
    path = write(tmp_path / "labels.jsonl", [("r0", "q", None, {}), ("r1", "q", None, votes)])
    with pytest.raises(UserError, match=r"labels\.jsonl:2: votes must map teachers to system1"):
        list(labelled(path))


ROWS = [  # weights a 0.1, b 0.2, c 0.3, and 1 for d and e, who are not in the configuration
    ("r0", "112", 0),  # 0.1 + 0.2 against 0.3
    ("r1", "111", None),
    ("r2", "1-2", 1 / 2),  # 0.1 against 0.3
    ("r3", "221", 0),
    ("r4", "12-", 1 / 3),
    ("r5", "1--", None),
    ("r6", "---12", 0),
    ("r7", "21-", 1 / 3),
]


def test_the_most_even_rows_come_first(tmp_path):
    config = configure(tmp_path, a=0.1, b=0.2, c=0.3)
    rows = [(name, f"Q {name}", None, cast(votes)) for name, votes, _ in ROWS]
    path = write(tmp_path / "labels.jsonl", rows)

    def ids(**settings):
        return [d.row.id for d in disagreements(config, path, tmp_path / "none.jsonl", **settings)]

    split = sorted((margin, i) for i, (*_, margin) in enumerate(ROWS) if margin is not None)
    assert ids() == [ROWS[i][0] for _, i in split] == ["r0", "r3", "r6", "r4", "r7", "r2"]
    assert ids(limit=2) == ["r0", "r3"] and ids(limit=0) == []
    assert ids(ids=("r5", "r1", "r2"), limit=1) == ["r1", "r2", "r5"] and ids(ids=("r9",)) == []
    for name, votes, margin in ROWS:
        if "d" not in cast(votes) and margin == 0:  # the majority finds the same ties
            assert majority(cast(votes), config.labels) is None, name
    (first, *_) = disagreements(config, path, tmp_path / "none.jsonl")
    assert first.votes == [("a", "system1", ""), ("b", "system1", ""), ("c", "system2", "")]
    write(path, [*rows, rows[1]])
    assert ids(ids=("r1",)) == ["r1", "r1"]  # ids of a user's own file may repeat


def test_what_is_shown_was_said_on_the_present_prompt(tmp_path, serve):
    values = [{"question": "Q0.", "answer": "0"}]
    spoken = iter(["System1", "system 1"])
    server = serve(lambda prompt: next(spoken))
    for prompt in ("plain", "role_play", "plain"):
        teachers = [server.teacher(), Teacher("dice", "random", sampling={"system1": 0.0})]
        one = labelling.configure(tmp_path, values, teachers, select="all", prompt=prompt)
        label(one)
    run = tmp_path / "run"
    (found,) = disagreements(one, run / "labels.jsonl", run / "votes.jsonl")
    assert found.votes[0] == ("llm", "system1", "System1")


def test_what_teachers_said(tmp_path):
    config = configure(tmp_path)
    rows = [("r0", "Q", None, cast("12-")), ("r1", "other", None, cast("12-"))]
    rows += [("twin", "Q", None, cast("12-"))]
    path = write(tmp_path / "labels.jsonl", rows)
    votes = tmp_path / "votes.jsonl"

    def vote(teacher, code, raw, question="Q"):
        about = {"id": "x", "teacher": teacher, "model": None, "prompt_hash": "p", "raw": raw}
        about["row_hash"] = row_hash(Row("", question, "1"))
        return json.dumps(about | {"label": CODES[code]})

    lines = [vote("a", "2", "not the vote that counted"), vote("a", "1", "an older prompt")]
    lines += [vote("a", "1", "one, I say"), vote("a", "2", "nor this"), vote("b", "2", None)]
    lines += [vote("c", "-", "who knows"), vote("z", "1", "not asked"), vote("b", "1", "", "else")]
    torn = vote("a", "1", "torn")[:-9]
    votes.write_text("\n".join([*lines, torn]))
    before = votes.read_bytes()
    found = disagreements(config, path, votes)
    said = [("a", "system1", "one, I say"), ("b", "system2", ""), ("c", None, "who knows")]
    silent = [("a", "system1", ""), ("b", "system2", ""), ("c", None, "")]
    assert [(d.row.id, d.votes) for d in found] == [("r0", said), ("r1", silent), ("twin", said)]
    assert votes.read_bytes() == before
    votes.write_text("\n".join([*lines, '{"label": 1}']))
    with pytest.raises(UserError, match=r"votes\.jsonl:9: not a vote"):
        disagreements(config, path, votes)


def test_the_run_folder_is_left_as_it_is(tmp_path):
    run = Run(configure(tmp_path))
    path = write(run.path("labels.jsonl"), [("r0", "Q", None, cast("12"))])
    disagreements(run.config, path, run.path("votes.jsonl")), agreement_of(path)
    assert [p.name for p in tmp_path.iterdir()] == ["labels.jsonl"]
