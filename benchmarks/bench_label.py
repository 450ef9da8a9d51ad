"""Labelling: how fast teachers are asked, what binds, what memory grows with, what a kill costs.

  rate     GSM8K's 7,473 rows x 3 teachers x 4 requests in flight, a server that takes 50 ms
  ceiling  the same at 64 in flight a teacher
  memory   one teacher, most votes there or none: peak memory of new processes by number of rows
  kills    SIGKILL at random moments, a new start after each: votes and labels as if undisturbed
  clients  why the requests are made by aiohttp: OpenAI's client against the same server

Each labelling process and the server (chat_server.py) are processes of their own. Exits with 1
where a value is above its limit. A run of some parts (--only) writes only to --out.
"""

import argparse
import asyncio
import csv
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEACHERS, CONCURRENCY, MANY = 3, 4, 64
GSM8K_ROWS = 7473
DELAY = 0.05  # seconds
MOST_SECONDS = 107  # of `rate`; the delay alone takes 93
LEFT = 500  # rows that `memory` asks
GROWTH = 100  # bytes a row
WARM = multiprocessing.get_context("forkserver")  # has imported torch: a start takes no seconds
COLD = multiprocessing.get_context("spawn")  # shares no memory
CHARACTERS = 2.64  # a token, see gsm8k_lengths.csv


def labelling(path: Path, pipe: Any) -> None:
    """A labelling process: tells that it begins, and at the end what it took."""
    from lorapar.config import load
    from lorapar.labels import label

    pipe.send("begins")
    start, cpu = time.perf_counter(), time.process_time()
    counts = label(load(path))["teachers"].values()
    took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    asked, failed = (sum(c[key] for c in counts) for key in ("asked", "failed"))
    pipe.send(took | {"peak": int(peak[1]) * 1024, "asked": asked, "failed": failed})


def start(path: Path, context: Any = WARM) -> tuple[Any, Any]:
    """A process that labels and has just begun, and its pipe."""
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=labelling, args=(path, theirs), daemon=True)
    process.start()
    theirs.close()
    pipe.recv()
    return process, pipe


def run(path: Path, asked: int, context: Any = WARM) -> dict[str, Any]:
    """What one undisturbed labelling process took; it must ask `asked` times."""
    process, pipe = start(path, context)
    took = pipe.recv()
    process.join()
    if (took["asked"], took["failed"]) != (asked, 0):
        raise SystemExit(f"{took['asked']} votes, {took['failed']} failed, expected {asked}")
    return took


@contextmanager
def server(delay: float) -> Iterator[str]:
    """The address of a server that answers after `delay` seconds."""
    command = [sys.executable, str(HERE / "chat_server.py"), str(delay)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


def stats(url: str) -> dict[str, float]:
    """What the server has done."""
    with urllib.request.urlopen(f"{url}/stats") as reply:
        return json.load(reply)


def generated(count: int) -> Iterator[dict[str, str]]:
    """Rows as long as GSM8K's, no two alike."""
    with (HERE / "gsm8k_lengths.csv").open() as f:
        lengths = [[int(n) for n in row] for row in list(csv.reader(f))[2:]]
    draw = random.Random(0)
    words = " ".join("".join(draw.choices("etaoinshr", k=draw.randint(2, 8))) for _ in range(4000))
    for number in range(count):
        sizes = (int(CHARACTERS * tokens) for tokens in draw.choice(lengths))
        texts = [words[(at := draw.randrange(4000)) : at + size] for size in sizes]
        yield {"question": f"{number}: {texts[0]}?", "answer": f"{texts[1]} #### {number}"}


def configure(folder: Path, url: str, rows: Path, teachers: int, concurrency: int) -> Path:
    """The configuration of a run in `folder`."""
    from lorapar.config import Config, Data, Labels, Teacher

    asked = {"kind": "openai", "base_url": f"{url}/v1", "concurrency": concurrency}
    named = tuple(Teacher(f"t{i}", model=f"m{i}", **asked) for i in range(teachers))
    labels = Labels(teachers=named)
    config = Config("m", Data(str(rows)), labels=labels, run_dir=str(folder))
    folder.mkdir()
    (folder / "given.yaml").write_text(config.to_yaml())
    return folder / "given.yaml"


def write_rows(path: Path, rows: Iterator[dict[str, str]]) -> int:
    """Writes JSONL; the number of rows."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return len(lines)


def row(part: str, what: str, value: Any, note: str = "", limit: float | None = None) -> dict:
    value = round(value, 3) if isinstance(value, float) else value
    limit = "" if limit is None else round(limit, 1)
    return {"part": part, "what": what, "value": value, "limit": limit, "note": note}


def timed(part: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    """`rate` or `ceiling`: one process over all rows, and where its time goes."""
    concurrency, limit = (CONCURRENCY, MOST_SECONDS) if part == "rate" else (MANY, None)
    rows, source = folder / "rows.jsonl", "rows of GSM8K's lengths"
    found = generated(GSM8K_ROWS)
    if options.data:
        found, source = map(json.loads, options.data.open()), "rows of a file"
    count = write_rows(rows, islice(found, 40 if options.smoke else None))
    asked = count * TEACHERS
    with server(DELAY) as url:
        before = stats(url)
        took = run(configure(folder / "run", url, rows, TEACHERS, concurrency), asked)
        after = stats(url)
    seconds, ideal = took["seconds"], count / concurrency * DELAY
    server_cpu = after["cpu"] - before["cpu"]
    shares = {"delay": ideal, "client's CPU": took["cpu"], "server's CPU": server_cpu}
    most = max(shares, key=shares.get)
    percent = ", ".join(f"{name} {value / seconds:.0%}" for name, value in shares.items())
    words = f"{'' if shares[most] > 0.8 * seconds else 'mostly '}the {most}"
    how = f"{count} {source}, {TEACHERS} teachers, {concurrency} in flight each"
    return [
        row(part, "seconds", seconds, how, None if options.smoke else limit),
        row(part, "ideal seconds", ideal, "the delay alone"),
        row(part, "requests/s", asked / seconds, "of all seconds"),
        row(part, "requests/s at most", after["fastest"], "within one second"),
        row(part, "in flight at most", after["most_in_flight"], "", concurrency * TEACHERS),
        row(part, "client ms/request", 1e3 * took["cpu"] / asked, "CPU"),
        row(part, "server ms/request", 1e3 * server_cpu / asked, "CPU"),
        row(part, "binds", words, f"shares of the seconds: {percent}"),
    ]


def memory(part: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    sizes, limit, context = (1000, 10_000, 100_000), GROWTH, COLD
    if options.smoke:
        sizes, limit, context = (40, 80, 160), None, WARM
    left, made = min(LEFT, sizes[0] // 2), []
    with server(0.0) as url:
        for asked in (left, None):
            how = f"{left} asked, all others known" if asked else "all asked"
            peaks = []
            for size in sizes:
                rows, count = folder / f"{size}.jsonl", asked or size
                write_rows(rows, generated(size))
                path = configure(folder / f"{size} {count}", url, rows, 1, MANY)
                vote(path, size - count)
                peaks.append(run(path, count, context)["peak"])
                made.append(row(part, f"{size} rows, MiB", peaks[-1] / 2**20, how))
            for i, most in ((0, limit), (-2, None)):
                growth = (peaks[-1] - peaks[i]) / (sizes[-1] - sizes[i])
                made.append(row(part, f"bytes/row from {sizes[i]}", growth, how, most))
    return made


def vote(path: Path, count: int) -> None:
    """Puts votes on the first `count` rows into votes.jsonl."""
    from lorapar.config import load
    from lorapar.data import SYSTEMS, stream_rows
    from lorapar.teachers import Ballot
    from lorapar.votes import Votes

    config = load(path)
    with Votes(path.parent / "votes.jsonl") as votes:
        ballot = Ballot(config.labels.teachers[0], config, votes)
        for number, (_, each) in enumerate(islice(stream_rows(config.data, "train"), count)):
            ballot.add(each, "a label", SYSTEMS[number % 2], {"total_tokens": 300})


def kills(part: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    times, count = (3, 40) if options.smoke else (20, 800)
    rows, draw, arrived = folder / "rows.jsonl", random.Random(1), []
    asked = write_rows(rows, generated(count)) * TEACHERS
    with server(0.005) as url:
        whole, killed = (
            configure(folder / name, url, rows, TEACHERS, CONCURRENCY) for name in ("whole", "kill")
        )
        seconds = run(whole, asked)["seconds"]
        before = stats(url)["requests"]
        for _ in range(times):
            process, pipe = start(killed)
            time.sleep(draw.uniform(0, 1.8 * seconds / times))
            process.kill()
            process.join()
            arrived.append(len(votes_of(killed)))
        run(killed, asked - arrived[-1])
        extra = stats(url)["requests"] - before - asked
    one, other = Counter(votes_of(whole)), Counter(votes_of(killed))
    labels = [(path.parent / "labels.jsonl").read_bytes() for path in (whole, killed)]
    differ = (one - other).total() + (other - one).total()
    in_flight = TEACHERS * CONCURRENCY
    return [
        row(part, "kills", times, f"votes then: {' '.join(map(str, arrived))} of {asked}"),
        row(part, "votes that differ", differ, "whole lines, in any order", 0),
        row(part, "labels.jsonl differs", int(labels[0] != labels[1]), "byte by byte", 0),
        row(part, "requests beyond votes", extra, "limit: all in flight, lost", times * in_flight),
    ]


def votes_of(path: Path) -> list[bytes]:
    """The whole lines of votes.jsonl beside a configuration."""
    votes = path.parent / "votes.jsonl"
    return votes.read_bytes().split(b"\n")[:-1] if votes.exists() else []


def clients(part: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    """Requests of one prompt and no more: aiohttp, OpenAI's client, the latter over aiohttp."""
    import aiohttp
    import openai

    message = {"role": "user", "content": next(generated(1))["question"] * 8}
    body = {"model": "m", "messages": [message]}

    async def post(session: aiohttp.ClientSession, url: str) -> None:
        async with session.post(f"{url}/chat/completions", json=body) as reply:
            json.loads(await reply.read())

    async def create(client: openai.AsyncOpenAI, url: str) -> None:
        await client.chat.completions.create(**body)

    async def ask(make: Any, call: Any, url: str, each: int, count: int) -> tuple[float, float]:
        async with AsyncExitStack() as stack:
            made = [await stack.enter_async_context(make(url, each)) for _ in range(TEACHERS)]
            begun, cpu, left = time.perf_counter(), time.process_time(), iter(range(count))

            async def work(client: Any) -> None:
                for _ in left:
                    await call(client, url)

            await asyncio.gather(*(work(client) for client in made for _ in range(each)))
            return count / (time.perf_counter() - begun), (time.process_time() - cpu) / count

    def client(url: str, each: int, **settings: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, **settings)

    ways = {
        "aiohttp": (lambda u, n: aiohttp.ClientSession(), post),
        "openai": (client, create),
        "openai over aiohttp": (
            lambda u, n: client(u, n, http_client=openai.DefaultAioHttpClient()),
            create,
        ),
    }
    table = []
    with server(DELAY) as url:
        for each, count in ((CONCURRENCY, 1200), (MANY, 6000)):
            count = 24 if options.smoke else count
            for name, (make, call) in ways.items():
                rate, cpu = asyncio.run(ask(make, call, f"{url}/v1", each, count))
                note = f"{1e3 * cpu:.2f} ms of CPU a request"
                table.append(row(part, f"{name}, {each} in flight, requests/s", rate, note))
    return table


PARTS = {"rate": timed, "ceiling": timed, "memory": memory, "kills": kills, "clients": clients}


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark label")
    parser.add_argument("--smoke", action="store_true", help="tiny; writes nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts; writes only to --out")
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl for rate and ceiling")
    parser.add_argument("--out", type=Path, help="folder of label.csv, default results/")
    parser.add_argument("--commit", help="to record where there is no git")
    options = parser.parse_args()
    options.case, options.host = options.only, False
    os.environ["NO_PROXY"] = "127.0.0.1"
    WARM.set_forkserver_preload(["lorapar.labels", "lorapar.endpoints"])
    forkserver.ensure_running()
    import harness  # and torch; not at the top: each process here runs what is there

    aiohttp = importlib.metadata.version("aiohttp")
    versions = f"Python {platform.python_version()}, aiohttp {aiohttp}"
    table = [row("machine", "cores", os.cpu_count(), versions)]
    for part in options.only or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            harness.report("label", table, PARTS[part](part, Path(folder), options), options)
    above = [r for r in table if r["limit"] != "" and r["value"] > r["limit"]]
    if above:
        raise SystemExit("\n".join(f"{r['part']}: {r['what']} above {r['limit']}" for r in above))


if __name__ == "__main__":
    main()
