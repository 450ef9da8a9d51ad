"""The processes of one stage, started by torchrun or accelerate launch. One process needs none."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lorapar.errors import UserError

T = TypeVar("T")
_WAIT = timedelta(minutes=30)  # for the slowest rank in a collective, as transformers has it
_WAIT_FOR_FIRST = timedelta(days=7)  # for what the first rank does alone: labelling, say
_control: Any = None  # the group over which ranks say how they ended; there is one if it is ours
_inside = False  # a `group` block
_LOST = "another process of this run ended; the same command goes on from the last checkpoint"
_CUT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words


def rank() -> int:
    """This process's place in the group; 0 without one."""
    return dist.get_rank() if _grouped() else 0


def launched_rank() -> int:
    """The place that a launcher gave this process, also before there is a group."""
    return rank() if _alone() else int(os.environ.get("RANK", 0))


def sharded() -> bool:
    """Whether `accelerate launch` was asked for FSDP: no rank has to hold the whole base model."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and "LOCAL_RANK" in os.environ


def world() -> int:
    """How many processes there are in the group; 1 without one."""
    return dist.get_world_size() if _grouped() else 1


@contextmanager
def group() -> Iterator[None]:
    """Joins the launcher's processes, on the GPU of LOCAL_RANK where there are GPUs.

    Does nothing without a launcher, within another such block, or in a group that somebody else
    made. The group stays until this process ends, so one stage may follow another.

    Raises:
        UserError: fewer GPUs than processes, a launcher's variables that are incomplete, or
            another process that is gone.
    """
    global _inside
    if _inside or _alone() or (_grouped() and _control is None):
        yield
        return
    if not _grouped():
        _join()
    _inside = True
    try:
        with _said_when_stopped():
            yield
            _failures(None)  # nobody leaves while another still needs it
    except Exception as e:
        if not getattr(e, "told", False):  # others may wait in a collective: leave at once,
            atexit.unregister(_leave)  # and the launcher ends them
        if isinstance(e, RuntimeError) and (why := _cut_off(e)):
            raise UserError(f"{_LOST} ({why})") from e
        raise
    finally:
        _inside = False


def _join() -> None:
    global _control
    if torch.cuda.is_available():
        place, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= gpus:
            raise UserError(f"process {place} has no GPU, {gpus} are here; start one a GPU")
        torch.cuda.set_device(place)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_WAIT
        )
    except ValueError as e:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {e}; start with torchrun or "
            f"accelerate launch, or unset WORLD_SIZE"
        ) from None
    _control = dist.new_group(backend="gloo", timeout=_WAIT_FOR_FIRST)
    atexit.register(_leave)


def _leave() -> None:
    global _control
    _control = None
    if _grouped():
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """All ranks reach the end of the block, or all raise: one that failed leaves none waiting.

    Raises:
        UserError: another rank failed, with its message.
    """
    try:
        yield
    except Exception as e:
        _failures(f"{type(e).__name__}: {e}" if not isinstance(e, UserError) else str(e))
        e.told = world() > 1
        raise
    if failures := _failures(None):
        told = UserError("; ".join(f"process {r} failed: {why}" for r, why in failures.items()))
        told.told = True
        raise told


def first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank. Its failure there is everyone's."""
    found: list[Any] = [None]
    with together():
        if rank() == 0:
            found = [work()]
    if world() > 1:
        dist.broadcast_object_list(found, src=0, group=_control)
    return found[0]


def of_all(mine: T) -> list[T]:
    """Every rank's object, by rank, on every rank."""
    found: list[Any] = [mine] * world()
    if world() > 1:
        dist.all_gather_object(found, mine, group=_control)
    return found


def add_up(t: torch.Tensor) -> None:
    """Sums the tensor over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(t)


def _failures(mine: str | None) -> dict[int, str]:
    return {r: why for r, why in enumerate(of_all(mine)) if why is not None}


@contextmanager
def _said_when_stopped() -> Iterator[None]:
    """A line on stderr when a launcher ends this process, as it does when another one ended.

    A thread says it, since this one may wait in a collective until it is killed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    me, (out, into) = rank(), os.pipe()
    os.set_blocking(into, False)

    def wait() -> None:
        while caught := os.read(out, 1):  # a byte a signal
            if caught[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is ours:
                said = f"lorapar: process {me} was told to stop, as a launcher does when {_LOST}"
                print(said, file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

    def ours(*unused: Any) -> None:
        """What counts is that there is a handler; a trainer may put its own in its place."""

    handler = signal.signal(signal.SIGTERM, ours)
    before = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        if signal.getsignal(signal.SIGTERM) is ours:
            signal.signal(signal.SIGTERM, handler)
        os.close(into)
        watcher.join()
        os.close(out)


def _cut_off(e: RuntimeError) -> str | None:
    """What says that another process is gone; None for another error."""
    if isinstance(e, dist.DistError):
        return f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    return next((words for words in _CUT if words in str(e)), None)


def _alone() -> bool:
    """Whether no launcher started other processes with this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 and not sharded()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
