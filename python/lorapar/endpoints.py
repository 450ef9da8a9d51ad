"""Teachers behind an OpenAI-compatible server: bounded concurrency, retries, what stops them.

One POST a row to {base_url}/chat/completions, by aiohttp. OpenAI's own client spends 3 to 5 ms of
Python a request, so that on one core it cannot keep three teachers busy (docs/design.md).
"""

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp

from lorapar.data import Row
from lorapar.errors import nearest
from lorapar.role_play import RESPONSE_FORMAT, parse_label
from lorapar.teachers import Ballot, Stopped

log = logging.getLogger("lorapar")

ROW_STATUSES = (400, 413, 422)  # refusals that may be about one row: too long, filtered
FLAGGED = (403, 451)  # the key, or what a row says: the latter once any row was answered
PASSING = (408, 409, 425, 429)  # and all from 500 on: to be tried again
BROKEN = (500, 501)
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; doubled from one to the other, each ± half
CONNECT_TIMEOUT = 20.0  # seconds
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more is left alone
LONGEST_BODY = 4 << 20  # bytes
SHORTEST_SECRET = 8  # characters; shorter ones are put in where a server wants just any key
SPENT = ("insufficient_quota", "billing_hard_limit_reached")  # 429 that no waiting changes

UNREACHABLE = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientHttpProxyError,
    aiohttp.ConnectionTimeoutError,
)


class Refused(Exception):
    """An answer that is no vote: its status, and what it says."""

    def __init__(self, status: int, text: str, *, code: Any = None, wait: float | None = None):
        super().__init__(f"status {status}: {text}")
        self.status, self.code, self.wait = status, code, wait

    @property
    def passes(self) -> bool:
        """Whether it may help to ask again."""
        return (self.status in PASSING or self.status >= 500) and self.code not in SPENT


class Malformed(Exception):
    """An answer with status 200 that is no chat completion."""


class Endpoint:
    """Asks one teacher. What stops it is told on its ballot; other teachers go on.

    Raises:
        Stopped: its key is not in the environment, or cannot be one.
    """

    def __init__(self, ballot: Ballot):
        self.ballot, self.teacher = ballot, ballot.teacher
        self.url = f"{self.teacher.base_url.rstrip('/')}/chat/completions"
        self.key = _key(self.teacher.api_key_env)
        self.structured = self.teacher.structured
        self.proved = False  # it has answered with response_format set
        self.clear_at = 0.0  # when the server said that it may be asked again

    async def run(self) -> None:
        """Asks all rows without a vote."""
        settings = {
            "timeout": aiohttp.ClientTimeout(self.teacher.timeout, sock_connect=CONNECT_TIMEOUT),
            "connector": aiohttp.TCPConnector(limit=self.teacher.concurrency),
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            **_proxy(self.url),
        }
        self.ballot.started, rows = time.monotonic(), self.ballot.pending()
        async with aiohttp.ClientSession(**settings) as self.session:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self.teacher.concurrency):
                        workers.create_task(self._work(rows))
                self.ballot.close()
            except* Stopped as stopped:
                self.ballot.stop(str(stopped.exceptions[0]))

    async def _work(self, rows: Iterator[Row | None]) -> None:
        for row in rows:
            if row is None:
                await asyncio.sleep(0)
                continue
            try:
                raw, usage = await self._ask(row)
            except Refused as e:
                flagged = e.status in FLAGGED and self.ballot.answers
                if e.status not in ROW_STATUSES and not e.passes and not flagged:
                    raise Stopped(await self._why(e)) from None
                about_row = e.status in ROW_STATUSES and self.ballot.answers
                self.ballot.fail(row, str(e), about_row=about_row)
            except aiohttp.InvalidURL:  # its text could hold a password
                raise Stopped("cannot be asked: it, or the proxy, has no valid address") from None
            except UNREACHABLE as e:
                tries = f"{self.teacher.retries + 1} tries"
                raise Stopped(f"cannot be reached, {tries}: {self._clean(str(e))}") from None
            except TimeoutError:
                self.ballot.fail(row, f"no answer within {self.teacher.timeout:g} s")
            except (Malformed, aiohttp.ClientError, OSError) as e:
                self.ballot.fail(row, self._clean(str(e)) or type(e).__name__)
            else:
                self.ballot.add(row, raw, parse_label(raw), usage)

    async def _ask(self, row: Row) -> tuple[str, dict | None]:
        """Text and usage of the answer, after as many tries as it takes and `retries` allows.

        Each wait is twice the one before, and never less than what the server asked for by
        Retry-After. While other rows of this teacher are answered, a 429 says no more than that the
        queue is long.
        """
        tries, answered, structured = 0, self.ballot.counts.asked, self.structured
        while True:
            while (left := self.clear_at - time.monotonic()) > 0:  # and not all at once
                await asyncio.sleep(left + random.uniform(0, max(0.1, 0.1 * left)))
            try:
                answer = await self._post(row, structured)
                if structured:
                    self.proved = self.structured = True
                elif self.structured and not self.proved:
                    log.info("labels: %s does without response_format", self.teacher.name)
                    self.structured = False
                return answer
            except Refused as e:
                if e.status in ROW_STATUSES and structured and not self.proved:
                    structured = False  # perhaps it does not know response_format
                    continue
                if not e.passes:
                    raise
                if (e.wait or 0) > LONGEST_RETRY_AFTER:
                    raise Stopped(f"asks to wait {e.wait:.0f} s: {e}") from None
                if e.status == 429 and self.ballot.counts.asked > answered:
                    tries, answered = 0, self.ballot.counts.asked
                problem = e
                if e.wait is not None:  # holds for every request to this teacher
                    self.clear_at = max(self.clear_at, time.monotonic() + e.wait)
            except (Malformed, aiohttp.ClientError, OSError) as e:  # TimeoutError is an OSError
                if isinstance(e, aiohttp.InvalidURL):
                    raise
                if isinstance(e, Malformed) and not self.ballot.answers:
                    raise  # perhaps this is no API at all
                problem = e
            if tries >= self.teacher.retries:
                if structured and not self.proved and getattr(problem, "status", 0) in BROKEN:
                    structured = False  # perhaps it breaks at response_format
                    continue
                raise problem
            self.ballot.retry()
            await asyncio.sleep(random.uniform(0.5, 1.5) * min(LONGEST_WAIT, FIRST_WAIT * 2**tries))
            tries += 1

    async def _post(self, row: Row, structured: bool) -> tuple[str, dict | None]:
        message = {"role": "user", "content": self.ballot.prompt(row)}
        sampling = {k: v for k, v in self.teacher.sampling.items() if v is not None}
        body = {"model": self.teacher.model, "messages": [message], **sampling}
        if structured:
            body["response_format"] = RESPONSE_FORMAT
        async with self.session.post(self.url, json=body, allow_redirects=False) as reply:
            data = await _read(reply)
            if reply.status != 200:
                text, code = _problem(data)
                wait = _retry_after(reply.headers)
                raise Refused(reply.status, self._clean(text), code=code, wait=wait)
        raw, usage = _content(data, self._clean)
        if self.key and len(self.key) >= SHORTEST_SECRET:
            raw = raw.replace(self.key, "(key)")
        return raw, usage

    async def _why(self, refused: Refused) -> str:
        """What a refusal that ends this teacher's part means."""
        model, named = f"(model {self.teacher.model})", self.teacher.api_key_env
        keyed = f"refused the key in {named}" if named else "wants a key (api_key_env)"
        meaning = {401: keyed, 402: "has no credit left", 403: keyed, 429: "has no quota left"}
        if refused.status == 404:
            return f"does not know model {self.teacher.model}{await self._models()}: {refused}"
        if 300 <= refused.status < 400:
            return f"is somewhere else, put base_url right: {refused}"
        return f"{model} {meaning.get(refused.status, 'refuses to answer')}: {refused}"

    async def _models(self) -> str:
        """The models that the server has, where it tells."""
        try:
            url = f"{self.teacher.base_url.rstrip('/')}/models"
            async with self.session.get(url, allow_redirects=False) as reply:
                names = [str(m["id"]) for m in json.loads(await _read(reply))["data"]]
        except (Malformed, aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return ""
        if not names:
            return ""
        return self._clean(nearest(self.teacher.model, names[:20])).replace("; known:", "; it has")

    def _clean(self, text: str) -> str:
        """One line without the key, and without what stands before the @ of an address."""
        text = text.replace(self.key, "(key)") if self.key else text
        return re.sub(r"//[^/@\s]*@", "//…@", " ".join(text.split()))[:300]


def _key(variable: str | None) -> str | None:
    """The key; it is read here only."""
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch("[!-~]+", key):  # others end up in the HTTP library's messages
        found = "holds characters that no key has" if key else "is not set"
        raise Stopped(
            f"needs its key in the environment variable {variable}, which {found}; set it, or "
            f"remove api_key_env"
        )
    return key


def _proxy(url: str) -> dict[str, Any]:
    """The proxy that the environment names for a URL, its password apart, as a session takes it.

    Asked once: aiohttp's own `trust_env` asks in every request, and sends ~/.netrc's passwords.
    """
    parts = urllib.parse.urlsplit(url)
    address = urllib.request.getproxies().get(parts.scheme)
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not address or here or urllib.request.proxy_bypass(parts.netloc):
        return {}
    scheme, _, rest = (address if "://" in address else f"http://{address}").partition("://")
    user, at, host = rest.rpartition("@")
    settings: dict[str, Any] = {"proxy": f"{scheme}://{host}"}
    if at:
        name, _, password = map(urllib.parse.unquote, user.partition(":"))
        settings["proxy_auth"] = aiohttp.BasicAuth(name, password)
    return settings


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in reply.content.iter_any():
        data += chunk
        if len(data) > LONGEST_BODY:
            raise Malformed(f"an answer of more than {LONGEST_BODY >> 20} MiB")
    return bytes(data)


def _content(data: bytes, clean: Callable[[str], str]) -> tuple[str, dict | None]:
    """Text of a chat completion, and the numbers of its usage."""
    try:
        value = json.loads(data)
        message, usage = value["choices"][0]["message"], value.get("usage")
        raw = message.get("content") or message.get("refusal") or ""
        if not isinstance(raw, str):
            raise TypeError(f"content is {type(raw).__name__}, not text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        start = clean(data.decode(errors="replace"))[:100]
        problem = f"no chat completion came back ({type(e).__name__}: {e}), it begins {start!r}"
        raise Malformed(problem) from None
    if not isinstance(usage, dict):
        return raw, None
    return raw, {key: n for key, n in usage.items() if isinstance(n, int | float | dict)}


def _problem(data: bytes) -> tuple[str, Any]:
    """Message and code of an error's body, in any of the forms that servers give it."""
    text = data.decode(errors="replace")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return text, None
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return str(error), None
    message = error.get("message") or error.get("detail") or text
    return str(message), error.get("code")


def _retry_after(headers: Any) -> float | None:
    """Seconds, from a number or a date; None if the server does not say."""
    for name, unit in (("Retry-After-Ms", 1e-3), ("Retry-After", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        until = email.utils.parsedate_to_datetime(headers.get("Retry-After", ""))
        return max(0.0, until.timestamp() - time.time())
    except (ValueError, TypeError):
        return None
