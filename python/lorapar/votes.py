"""votes.jsonl: one line a vote, appended as it arrives, by one process at a time.

A vote is known by teacher, model, prompt_hash and row_hash, so that a changed prompt, sampling
setting or row is asked anew, rows that say the same are asked once, and votes that fit nothing any
more stay in the file, unused. The index over them is a temporary SQLite file: memory does not grow
with the number of rows.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapar.data import SYSTEMS
from lorapar.errors import UserError

log = logging.getLogger("lorapar")

KEYS = ("teacher", "model", "prompt_hash", "row_hash")
SYNC_SECONDS = 1.0  # votes of at most so long wait for the disk

_CODES = {None: 0, SYSTEMS[0]: 1, SYSTEMS[1]: 2}
_LABELS = {code: label for label, code in _CODES.items()}
_DRAWN = 3  # asked for in this run, no vote yet


class Votes:
    """The votes of a run, open for more.

    Raises:
        UserError: another process has the file open for more, it cannot be written, or a line is
            damaged. A line torn by a kill, at the very end, is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._out = path.open("ab", buffering=0)  # unbuffered: a write() is one whole line
        except OSError as e:
            raise self._unwritable(e) from None
        try:
            self._lock()
            # A temporary file, gone with the process; nobody needs to undo what is put there.
            self._index = sqlite3.connect("", isolation_level=None)
            self._execute("PRAGMA journal_mode = OFF")
            self._execute("CREATE TABLE votes (key BLOB PRIMARY KEY, code INT) WITHOUT ROWID")
            for vote in self._read():
                self._put(_key(*map(vote.get, KEYS)), _CODES[vote["label"]])
        except BaseException:
            self._out.close()
            raise

    def __enter__(self) -> "Votes":
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.sync()
        finally:
            self._out.close()  # and with it the lock
            self._index.close()

    def get(self, *key: str | None) -> tuple[bool, str | None]:
        """Whether there is a vote with these KEYS, and its label (None: an abstention)."""
        code = self._code(_key(*key))
        return code in _LABELS, _LABELS.get(code)

    def draw(self, *key: str | None) -> bool:
        """Whether a vote with these KEYS is to be asked for; True once."""
        packed = _key(*key)
        if self._code(packed) is not None:
            return False
        self._put(packed, _DRAWN)
        return True

    def add(self, vote: dict[str, Any]) -> None:
        """Appends one vote, as one write."""
        line = json.dumps(vote).encode() + b"\n"
        try:
            written = self._out.write(line)
            if written != len(line):  # no torn line in the middle, should there be room again
                os.ftruncate(self._out.fileno(), os.fstat(self._out.fileno()).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise self._unwritable(e) from None
        self._put(_key(*map(vote.get, KEYS)), _CODES[vote["label"]])
        self._waiting = True

    def sync(self) -> None:
        """Puts what was added on the disk."""
        if self._waiting:
            self._waiting = False
            try:
                os.fsync(self._out.fileno())
            except OSError as e:
                self._waiting = True
                raise self._unwritable(e) from None

    def _unwritable(self, e: OSError) -> UserError:
        return UserError(
            f"{self.path}: cannot be written ({e.strerror}); the votes in it are kept: put that "
            f"right and run it again"
        )

    def _code(self, key: bytes) -> int | None:
        found = self._execute("SELECT code FROM votes WHERE key = ?", key).fetchone()
        return found[0] if found else None

    def _put(self, key: bytes, code: int) -> None:
        self._execute("INSERT OR REPLACE INTO votes VALUES (?, ?)", key, code)

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._index.execute(statement, values)
        except sqlite3.OperationalError as e:
            raise UserError(
                f"{self.path}: the index of its votes, a temporary file, cannot be written ({e}); "
                f"make room there, or set SQLITE_TMPDIR to another folder"
            ) from None

    def _lock(self) -> None:
        """For as long as the file is open: the kernel frees it when the process ends or dies."""
        try:
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                log.warning("%s: cannot be locked here (%s)", self.path, e.strerror)
                return
            raise UserError(
                f"{self.path}: another process is labelling into this run folder; wait for it, "
                f"stop it, or use another run_dir"
            ) from None

    def _read(self) -> Iterator[dict[str, Any]]:
        """The votes of earlier runs; cuts a torn last line off."""
        torn_at = None
        for number, at, line, vote in _lines(self.path):
            if torn_at is not None:
                raise UserError(
                    f"{self.path}:{number - 1}: not a JSON object; remove the line to ask it again"
                )
            if vote is None or not line.endswith(b"\n"):
                torn_at = at
            else:
                check_vote(f"{self.path}:{number}", vote)
                yield vote
        if torn_at is not None:
            log.warning("%s: the last line is torn and is cut off", self.path)
            os.truncate(self.path, torn_at)


def read_votes(path: Path) -> Iterator[dict[str, Any]]:
    """The votes in a file that another process may be adding to; whole lines only."""
    if path.exists():
        for number, _, _, vote in _lines(path):
            if isinstance(vote, dict):
                check_vote(f"{path}:{number}", vote)
                yield vote


def check_vote(where: str, vote: Any) -> None:
    """Raises UserError for what is not a vote."""
    if not isinstance(vote, dict):
        raise UserError(f"{where}: not a JSON object; remove the line to ask it again")
    if bad := [key for key in ("id", *KEYS) if not isinstance(vote.get(key, 0), str | None)]:
        raise UserError(f"{where}: not a vote: needs a text for {', '.join(bad)}")
    label = vote.get("label", 0)
    if not isinstance(label, str | None) or label not in _CODES:
        found = repr(vote.get("label", "nothing"))
        raise UserError(f"{where}: label must be system1, system2 or null, not {found}")


def _lines(path: Path) -> Iterator[tuple[int, int, bytes, Any]]:
    """(number, position, line, its JSON value or None) of each line."""
    position = 0
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield number, position, line, value
            position += len(line)


def _key(*key: str | None) -> bytes:
    """Sixteen bytes for KEYS."""
    return hashlib.sha256(json.dumps(key).encode()).digest()[:16]
