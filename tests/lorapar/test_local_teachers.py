"""Teachers in this process, and a real `transformers serve`: started, asked, stopped."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from chat_model import PROMPT, save_chat_model
from labelling import configure, counts, fails, read, votes_of

from lorapar.config import RULES, Teacher, load
from lorapar.errors import UserError
from lorapar.labels import label, settings_and_inputs
from lorapar.local_teachers import LocalTeacher
from lorapar.runs import Run
from lorapar.serving import serve as transformers_serve

ROOT = Path(__file__).parents[2]
WORDS = ("fast", "slow", "unsure")


def rows(count):
    """A third each is System 1, System 2 and no label; of many lengths."""
    return [
        {"question": f"Q{i} {'word ' * (7 * i % 20)}{WORDS[i % 3]}", "answer": f"#### {i}"}
        for i in range(count)
    ]


EXPECTED = ("system1", "system2", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    return str(path)


def local(model, name="local", **settings):
    return Teacher(name, "transformers", model=str(model), **settings)


def labels_of(config, teacher="local", count=30):
    votes = votes_of(config, teacher)
    return [votes[f"train-{i}"]["label"] if f"train-{i}" in votes else "-" for i in range(count)]


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_a_local_teacher_votes_in_batches(tmp_path, model, prompt, batch):
    config = configure(tmp_path, rows(30), [local(model, concurrency=batch)], prompt=prompt)
    assert counts(label(config), "local") == [30, 20, 10, 0]
    assert labels_of(config) == [EXPECTED[i % 3] for i in range(30)]
    votes = votes_of(config, "local")
    assert votes["train-0"]["raw"] == "System1" and votes["train-2"]["raw"].startswith("hm hm")
    assert votes["train-0"]["usage"]["completion_tokens"] == 1
    assert votes["train-2"]["usage"]["completion_tokens"] == 32
    assert counts(label(config), "local") == [0, 20, 10, 0]


def test_local_teachers_take_turns_beside_endpoints(
    tmp_path, model, prompt, serve, tmp_path_factory
):
    plain = save_chat_model(tmp_path_factory.mktemp("plain"), template=False)
    server = serve(lambda text: "System1")
    teachers = [local(model, "a"), server.teacher("far"), local(plain, "b", weight=0.5), RULES[0]]
    summary = label(configure(tmp_path, rows(12), teachers, select="all", prompt=prompt))
    assert counts(summary, "a") == counts(summary, "b") == [12, 8, 4, 0]
    assert counts(summary, "far") == [12, 12, 0, 0]


def test_sampling(tmp_path, model, prompt):
    drawn = []
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        sampling = {"temperature": 2.0, "top_p": 0.9, "max_tokens": 5, "seed": seed}
        teacher = local(model, sampling=sampling)
        config = configure(tmp_path, rows(30), [teacher], run=run, select="all", prompt=prompt)
        label(config)
        votes = votes_of(config, "local")
        drawn.append([votes[f"train-{i}"]["raw"] for i in range(30)])
        assert max(vote["usage"]["completion_tokens"] for vote in votes.values()) <= 5
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 8  # one batch's noise is not another's


def test_prompts_that_are_too_long_are_counted(tmp_path, prompt, tmp_path_factory, caplog):
    short = save_chat_model(tmp_path_factory.mktemp("short"), context=48)
    values = rows(30)
    values[4]["question"] = "word " * 40 + "slow"
    config = configure(tmp_path, values, [local(short)], prompt=prompt)
    summary = label(config)
    assert labels_of(config).count("-") == counts(summary, "local")[3] > 0
    assert labels_of(config)[4] == "-" and "tokens, it takes 16" in caplog.text


def test_batches_are_halved_where_memory_is_short(tmp_path, model, prompt, monkeypatch):
    sizes, generate, held = [], LocalTeacher._generate, []

    def small(self, prompts):
        assert not [ref for ref in held if ref() is not None]  # of the tries that failed
        cache = torch.zeros(1)
        held.append(weakref.ref(cache))
        sizes.append(len(prompts))
        if len(prompts) > 3 or max(map(len, prompts)) > 22:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, prompts)

    monkeypatch.setattr(LocalTeacher, "_generate", small)
    config = configure(tmp_path, rows(30), [local(model, concurrency=8)], prompt=prompt)
    summary = label(config)
    assert max(sizes) == 8 and 0 < counts(summary, "local")[3] < 10
    right = [EXPECTED[i % 3] for i in range(30)]
    assert all(found in (want, "-") for found, want in zip(labels_of(config), right))


def test_a_model_that_is_not_there_stops_that_teacher_alone(tmp_path, model, prompt):
    teachers = [local(tmp_path / "nothing", "gone"), local(model)]
    fails(configure(tmp_path, rows(9), teachers, prompt=prompt), "'gone'", "cannot be loaded")
    assert labels_of(configure(tmp_path, rows(9)), count=9) == [EXPECTED[i % 3] for i in range(9)]


def test_other_weights_are_asked_anew(tmp_path, prompt, tmp_path_factory):
    folder = save_chat_model(tmp_path_factory.mktemp("changing"))
    config = configure(tmp_path, rows(9), [local(folder)], prompt=prompt)
    label(config)
    assert counts(label(config), "local")[0] == 0
    save_chat_model(folder, context=512)
    assert counts(label(config), "local")[0] == 9


def test_other_weights_make_the_labels_stale(tmp_path, prompt, tmp_path_factory):
    folder = save_chat_model(tmp_path_factory.mktemp("changing"))
    config = configure(tmp_path, rows(9), [local(folder)], prompt=prompt)
    label(config)
    assert Run(config).stale("label", *settings_and_inputs(config)) is None
    save_chat_model(folder, context=512)
    assert "labels.teachers: local" in Run(config).stale("label", *settings_and_inputs(config))


def test_a_local_model_is_found_beside_the_configuration(tmp_path, tmp_path_factory):
    save_chat_model(tmp_path / "chat")
    teachers = [
        {"name": n, "kind": k, "model": "chat"} for n, k in (("a", "transformers"), ("b", "x"))
    ]
    config = {"model": "m", "data": "t.jsonl", "labels": {"teachers": teachers}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    found = load(tmp_path / "c.yaml").labels.teachers
    assert [t.model for t in found] == [str(tmp_path / "chat"), "chat"]


@pytest.mark.parametrize("broken, text", [
    ("lorapar.local_teachers.load_base", "cannot be loaded: OutOfMemoryError"),
    ("lorapar.local_teachers.LocalTeacher._ids", "takes no prompt: OutOfMemoryError"),
    ("lorapar.local_teachers.generate", "fails: ZeroDivisionError"),
])  # fmt: skip
def test_whatever_breaks_in_a_local_teacher_stops_it_alone(
    tmp_path, model, prompt, serve, monkeypatch, broken, text
):
    def breaks(*a, **k):
        raise ZeroDivisionError if "fails" in text else torch.OutOfMemoryError

    monkeypatch.setattr(broken, breaks)
    server = serve(lambda prompt: "System1")
    config = configure(tmp_path, rows(9), [local(model), server.teacher("far")], prompt=prompt)
    assert "'far'" not in fails(config, "'local'", text)
    assert labels_of(config, "far", 9) == ["system1"] * 9


def test_only_local_teachers_are_served(tmp_path, model):
    config = configure(tmp_path, rows(3), [local(model)])
    fails(config, "--serve other", "no teacher of kind transformers", str(model), serve=["other"])


def test_the_packages_of_the_server_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lorapar-kernels\[serve\]'"):
        with transformers_serve("m"):
            pass


@pytest.mark.slow
def test_a_real_server(tmp_path, model, prompt, monkeypatch):
    """`transformers serve` by hand and by `serve=`; it goes away, and is missed."""
    config = configure(tmp_path, rows(30), [local(model)], prompt=prompt)
    monkeypatch.chdir(model.parent)
    assert counts(label(config, serve=[model.name]), "local") == [30, 20, 10, 0]
    assert labels_of(config) == [EXPECTED[i % 3] for i in range(30)]
    assert counts(label(config, serve=[str(model)]), "local")[0] == 0  # no need to start one
    with transformers_serve(str(model)) as url:
        settings = {"base_url": url, "model": str(model), "sampling": {"temperature": 0}}
        teacher = Teacher("far", "openai", **settings, concurrency=3, retries=1)
        wrong = Teacher("wrong", "openai", **{**settings, "model": "no/such-model"}, retries=0)
        both = configure(tmp_path, rows(6), [teacher, wrong], run="both", prompt=prompt)
        message = fails(both, "'wrong'")
        assert "'far'" not in message
        assert labels_of(both, "far", 6) == [EXPECTED[i % 3] for i in range(6)]
        assert votes_of(both, "far")["train-0"]["usage"]["total_tokens"] > 3
    more = configure(tmp_path, rows(12), [teacher], run="both", prompt=prompt)
    fails(more, "'far'", url, "cannot be reached", "0 votes in this run")
    assert len(read(tmp_path / "both/votes.jsonl")) == 6


CHILD = """
import sys
from lorapar.config import load
from lorapar.labels import label, settings_and_inputs
label(load(sys.argv[1]), serve=[sys.argv[2]])
"""


@pytest.mark.more
def test_the_server_ends_with_a_run_that_is_killed(tmp_path, model, prompt):
    config = configure(tmp_path, rows(3000), [local(model)], prompt=prompt)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", CHILD, tmp_path, model]
    child = subprocess.Popen(command, env=environment)
    votes = tmp_path / "run/votes.jsonl"
    deadline = time.monotonic() + 120
    while not votes.exists() or not votes.stat().st_size:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    servers = [p for p in _children(child.pid) if "serve" in _command(p)]
    assert len(servers) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    while _command(servers[0]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    arrived = len(read(votes)[:-1])
    short = configure(tmp_path, rows(arrived), [local(model)], select="all", prompt=prompt)
    assert counts(label(short), "local")[0] <= 1 + short.labels.teachers[0].concurrency


def _children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
