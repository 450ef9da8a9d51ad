"""lorapar.votes: lines that are whole or cut off, one writer at a time, runs that are killed."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import beyond
from labelling import configure, counts, fails, read, rows

from lorapar.config import RULES
from lorapar.errors import UserError
from lorapar.labels import label
from lorapar.votes import Votes, read_votes

ROOT = Path(__file__).parents[2]
KEYS = ("teacher", "model", "prompt_hash", "row_hash")
CHILD = """
import sys
from lorapar.config import load
from lorapar.labels import label
label(load(sys.argv[1]))
"""


def vote(n, label="system1"):
    keys = {"teacher": "t", "model": None, "prompt_hash": "p", "row_hash": f"r{n}"}
    return {"id": str(n), **keys, "raw": "x", "label": label, "usage": None}


def start(config, folder):
    (folder / "config.yaml").write_text(config.to_yaml())
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, "-c", CHILD, folder], env=environment)


def test_votes_are_there_again(tmp_path):
    path = tmp_path / "run" / "votes.jsonl"
    with Votes(path) as votes:
        assert votes.get("t", None, "p", "r1") == (False, None)
        assert votes.draw("t", None, "p", "r1") and not votes.draw("t", None, "p", "r1")
        assert votes.get("t", None, "p", "r1") == (False, None)  # drawn is not voted
        votes.add(vote(1))
        votes.add(vote(2, None))
        assert len(path.read_bytes().splitlines()) == 2  # as they arrive
    with Votes(path) as votes:
        assert votes.get("t", None, "p", "r1") == (True, "system1")
        assert votes.get("t", None, "p", "r2") == (True, None)
        assert not votes.draw("t", None, "p", "r2") and votes.draw("t", "", "p", "r2")
    assert [v["id"] for v in read_votes(path)] == ["1", "2"]


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, serve):
    server = serve()
    server.delay = 0.1
    config = configure(tmp_path, rows(40), [server.teacher()])
    child = start(config, tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not server.prompts:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        fails(config, "votes.jsonl", "another process is labelling", "use another run_dir")
    finally:
        assert child.wait(60) == 0
    assert counts(label(config)) == [0, 36, 4, 0]
    assert set(server.asked().values()) == {1}


def test_the_lock_goes_with_the_process(tmp_path):
    path = tmp_path / "votes.jsonl"
    with Votes(path):
        with pytest.raises(UserError, match="another process"):
            Votes(path)
    Votes(path).__exit__()


def test_a_torn_last_line_is_cut_off(tmp_path, caplog):
    path = tmp_path / "votes.jsonl"
    with Votes(path) as votes:
        votes.add(vote(1))
        votes.add(vote(2))
    whole = path.read_bytes()
    second = whole.splitlines()[1]  # all but its end
    for torn in (second, b'{"id', b"\xf0\x9f\n", b"\0\0\0", b"\n"):
        kept = whole[: -len(second) - 1] if torn == second else whole
        path.write_bytes(kept + torn)
        assert [v["id"] for v in read_votes(path)][:1] == ["1"]  # a reader cuts nothing off
        assert path.read_bytes() == kept + torn
        caplog.clear()
        with Votes(path) as votes:
            assert path.read_bytes() == kept and "is torn" in caplog.text
            votes.add(vote(3))
        assert path.read_bytes().startswith(kept)
        assert [v["id"] for v in read_votes(path)][-1] == "3"


@pytest.mark.parametrize("damage, text", [
    (b"{oops\n", "not a JSON object"),
    (b"\n", "not a JSON object"),
    (b'{"id": "a"}\n', "needs a text for teacher"),
    (b'["a"]\n', "not a JSON object"),
    (None, "label must be"),
])  # fmt: skip
def test_damaged_votes_are_refused_by_line(tmp_path, damage, text):
    config = configure(tmp_path)
    label(config)
    votes = tmp_path / "run/votes.jsonl"
    lines = votes.read_bytes().splitlines(keepends=True)
    bad = lines[1].replace(b'"system2"', b'"system3"') if damage is None else damage
    votes.write_bytes(b"".join([lines[0], bad, *lines[2:]]))
    damaged = votes.read_bytes()
    with pytest.raises(UserError, match=rf"votes\.jsonl:2: .*{text}"):
        label(config)
    assert votes.read_bytes() == damaged


class FullDisk:
    """A file on a disk that takes half of a line, or none of it."""

    def __init__(self, file, taken):
        self.file, self.taken = file, taken

    def write(self, line):
        if not self.taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(line[: len(line) // 2])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("taken", [0, 1])
def test_a_full_disk_stops_the_run_and_tears_no_line(tmp_path, taken):
    path = tmp_path / "votes.jsonl"
    with Votes(path) as votes:
        votes.add(vote(1))
        file = votes._out
        votes._out = FullDisk(file, taken)
        with pytest.raises(UserError, match=r"votes.jsonl: cannot be written \(No space left"):
            votes.add(vote(2))
        votes._out = file
        votes.add(vote(3))
    assert [v["id"] for v in read_votes(path)] == ["1", "3"] == [v["id"] for v in read(path)]


def test_a_disk_that_fails_under_the_run(tmp_path, serve, monkeypatch):
    def fsync(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("lorapar.labels.SYNC_SECONDS", 0.05)
    monkeypatch.setattr("os.fsync", fsync)
    server = serve()
    config = configure(tmp_path, rows(200), [server.teacher(concurrency=1)])
    fails(config, "votes.jsonl: cannot be written (Input/output error)")
    assert len(server.prompts) < 100


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="votes.jsonl: cannot be written"):
        label(configure(tmp_path))


def test_votes_reach_the_disk_while_the_run_goes_on(tmp_path, serve, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr("lorapar.labels.SYNC_SECONDS", 0.05)
    monkeypatch.setattr("os.fsync", lambda fd: (synced.append(fd), real(fd)))
    server = serve()
    server.delay = 0.05
    label(configure(tmp_path, rows(20), [server.teacher(concurrency=1)]))
    assert 5 <= len(synced) <= 40  # in batches, not each


def test_a_killed_run_continues_without_asking_twice(tmp_path, serve):
    server, concurrency, count = serve(), 4, 90
    teachers = [server.teacher(concurrency=concurrency, weight=9.0), *RULES]
    config = configure(tmp_path, rows(count), teachers)
    votes = tmp_path / "run/votes.jsonl"
    child = start(config, tmp_path)
    deadline = time.monotonic() + 60
    while len(server.prompts) < 45:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "run/labels.jsonl").exists()
    arrived = votes.read_bytes().count(b"\n") - 3 * count
    assert 30 <= arrived < count
    time.sleep(0.1)  # requests in flight reach the server's list
    before = len(server.prompts)
    asked = label(config)["teachers"]["llm"]["asked"]
    assert asked == count - arrived == len(server.prompts) - before
    assert count <= len(server.prompts) <= count + concurrency
    equal_to_an_undisturbed_run(tmp_path, config)


@pytest.mark.slow
@pytest.mark.parametrize("kills", beyond([5], [5, 20]))
def test_kills_at_random_moments(tmp_path, serve, kills):
    servers, count = [serve(), serve(), serve()], 200 + 30 * kills
    teachers = [s.teacher(f"t{i}", weight=i + 1.0) for i, s in enumerate(servers)]
    config, moments = configure(tmp_path, rows(count), teachers), random.Random(7)
    votes, sizes = tmp_path / "run/votes.jsonl", set()
    for kill in range(kills):
        child = start(config, tmp_path)
        before, early = max(sizes, default=0), moments.random() < 0.2
        deadline = time.monotonic() + 60
        while not early and (not votes.exists() or votes.stat().st_size <= before):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)  # mostly while votes arrive, sometimes in the start
        time.sleep(moments.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, f"kill {kill} came too late"
        sizes.add(votes.stat().st_size if votes.exists() else 0)
    assert len(sizes) > kills // 2  # most fell among the votes
    label(config)
    time.sleep(0.1)
    asked = sum(len(server.prompts) for server in servers)
    assert 3 * count <= asked <= 3 * count + kills * 12
    equal_to_an_undisturbed_run(tmp_path, config)


def equal_to_an_undisturbed_run(folder, config):
    other = replace(config, run_dir=str(folder / "other"))
    label(other)
    same = [(folder / run / "labels.jsonl").read_bytes() for run in ("run", "other")]
    assert same[0] == same[1]
    cast = [sorted(read(folder / run / "votes.jsonl"), key=key) for run in ("run", "other")]
    assert cast[0] == cast[1] and len(set(map(key, cast[0]))) == len(cast[0])


def key(vote):
    return tuple(str(vote[k]) for k in KEYS)
