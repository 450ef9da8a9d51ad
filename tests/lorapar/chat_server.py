"""A chat-completions server for tests, which misbehaves when it is told to."""

import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lorapar.config import Teacher


@dataclass
class Reply:
    """What goes back, and how it goes wrong."""

    body: Any  # text: a completion of it; else bytes or JSON, as they are
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds
    sent: int | None = None  # bytes of the body that are sent before the socket is closed
    hang_up: bool = False  # close the socket without a word


class ChatServer(ThreadingHTTPServer):
    """`answer(prompt)` or `answer(prompt, body)` gives a text, (status, body) or a Reply."""

    daemon_threads = True
    request_queue_size = 256
    delay = 0.02

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.models = answer, ["m", "other-7b"]
        self.prompts, self.keys, self.bodies, self.times = [], set(), [], []
        self.proxy_keys = set()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def teacher(self, name="llm", **settings):
        settings = {"retries": 2, "model": "m", "base_url": self.url} | settings
        return Teacher(name, kind="openai", **settings)

    def asked(self):
        """How often each question was asked."""
        return Counter(re.search(r"Q\d+", prompt)[0] for prompt in self.prompts)

    def handle_error(self, request, client_address):
        pass  # a killed client


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.server.prompts.append(prompt)
        self.server.bodies.append(body)
        self.server.times.append(time.monotonic())
        self.server.keys.add(self.headers["Authorization"])
        self.server.proxy_keys.add(self.headers["Proxy-Authorization"])
        if self.path != "/v1/chat/completions":
            return self.send(Reply({"error": {"message": f"no route {self.path}"}}, 404))
        takes_body = self.server.answer.__code__.co_argcount > 1
        answer = self.server.answer(prompt, body) if takes_body else self.server.answer(prompt)
        if isinstance(answer, tuple):
            answer = Reply(answer[1], answer[0])
        self.send(answer if isinstance(answer, Reply) else Reply(answer), self.server.delay)

    def do_GET(self):
        models = [{"id": name, "object": "model"} for name in self.server.models]
        self.send(Reply({"object": "list", "data": models}))

    def send(self, reply, delay=0.0):
        time.sleep(delay + reply.delay)
        if reply.hang_up:
            self.close_connection = True
            return
        body = completion(reply.body) if isinstance(reply.body, str) else reply.body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**headers, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: reply.sent])
        self.close_connection = self.close_connection or reply.sent is not None

    def log_message(self, *args):
        pass


def completion(text, **message):
    message = {"role": "assistant", "content": text, **message}
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }  # fmt: skip


def number(prompt):
    """n of the question `Qn. ...`."""
    return int(re.search(r"Q(\d+)", prompt)[1])


def by_number(prompt):
    """Every third question is System 1, every tenth is not answered as asked."""
    n = number(prompt)
    return "Hm, hard to say" if n % 10 == 9 else "System1" if n % 3 == 0 else "**System 2**."
