"""Scripts in several processes, started as a launcher does it, and their end."""

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE, STDOUT, Popen

from conftest import REPO

PATH = os.pathsep.join(
    [*(str(REPO / p) for p in (".", "python", "tests", "tests/lorapar")),
     *filter(None, [os.environ.get("PYTHONPATH")])]
)  # fmt: skip


def launch(world: int) -> dict[str, str]:
    """What a launcher tells all of its processes."""
    return {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(script: str, *arguments: object, world: int = 2, **environment: str) -> list[Popen]:
    """The script in so many processes, each told its rank."""
    shared = launch(world) | environment
    return [
        _python(script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world)
    ]


def torchrun(world: int, *command: object, **environment: str) -> Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world)
    return _python(*launcher, *command, **environment)


def finish(processes: list[Popen], seconds: float = 240) -> list[str]:
    """What each said; all have to end in 0."""
    said = ended(processes, seconds)
    assert not any(p.returncode for p in processes), "\n".join(
        f"{p.args[1:]} ended in {p.returncode}:\n{text}" for p, text in zip(processes, said)
    )
    return said


def ended(processes: list[Popen], seconds: float = 240) -> list[str]:
    """What each said, however it ended. When one fails the others, which may wait for it, are
    killed, as a launcher does; after so many seconds all are."""

    def wait(process: Popen) -> str:
        said = process.communicate(timeout=seconds)[0]
        if process.returncode:
            _kill(processes)
        return said

    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            return [*pool.map(wait, processes)]
    finally:
        _kill(processes)
        for process in processes:
            process.wait()


def _kill(processes: list[Popen]) -> None:
    for process in processes:
        process.kill()


def _python(*command: object, **environment: str) -> Popen:
    return Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": PATH, **environment},
        stdout=PIPE, stderr=STDOUT, text=True,
    )  # fmt: skip
