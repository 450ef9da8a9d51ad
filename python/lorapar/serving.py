"""`transformers serve` as a process of ours, for as long as local teachers are asked through it."""

import ctypes
import importlib.util
import logging
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from lorapar.errors import UserError

log = logging.getLogger("lorapar")

START_SECONDS = 600.0  # a large model loads for minutes
_LIBC = ctypes.CDLL(None)
_MAIN = "from transformers.cli.transformers import main; main()"


@contextmanager
def serve(model: str, *, batched: bool | None = None) -> Iterator[str]:
    """Starts `transformers serve MODEL` on a free port of this machine; yields its base_url.

    Args:
        model: a folder, or a model's name on the hub.
        batched: continuous batching; None: if there is a GPU.

    Raises:
        UserError: its packages are missing, or it ends or does not answer in START_SECONDS. The
            message has the end of what it said.
    """
    if missing := [p for p in ("fastapi", "uvicorn") if importlib.util.find_spec(p) is None]:
        raise UserError(
            f"--serve needs {', '.join(missing)}; run: pip install 'lorapar-kernels[serve]'"
        )
    if batched is None:
        import torch

        batched = torch.cuda.is_available()
    port = _free_port()
    command = [sys.executable, "-c", _MAIN, "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port)] + ["--continuous-batching"] * batched
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, preexec_fn=_end_with_us
        )
        try:
            _wait(process, model, f"http://127.0.0.1:{port}/health", said)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, model: str, health: str, said: object) -> None:
    log.info("labels: transformers serve %s is starting", model)
    here = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with here.open(health, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            said.seek(0)
            last = said.read().decode(errors="replace").strip()[-1500:]
            what = f"ended with exit code {process.returncode}" if ended else "does not answer"
            raise UserError(f"--serve {model}: transformers serve {what}; it said: {last}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _end_with_us() -> None:
    """The server is told to end when this process does, even by SIGKILL."""
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
