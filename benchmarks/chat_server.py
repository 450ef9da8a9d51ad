"""A chat-completions server that answers after a delay, for bench_label: python chat_server.py 0.05

It prints its port and runs until its standard input is closed. The label depends on the request's
text alone. GET /stats says what it has done: requests, the most of them in flight, the most that
came within one second, and its CPU seconds.
"""

import asyncio
import json
import re
import sys
import time
import zlib
from collections import Counter

LABELS = ("System1", "System2", '{"label": "System1"}', '{"label": "System2"}', "Hard to say")


class Counts:
    """What the server has done."""

    def __init__(self):
        self.requests = self.in_flight = self.most_in_flight = 0
        self.by_second: Counter[int] = Counter()

    def stats(self) -> bytes:
        fastest = max(self.by_second.values(), default=0)
        counts = {"requests": self.requests, "most_in_flight": self.most_in_flight}
        return json.dumps(counts | {"fastest": fastest, "cpu": time.process_time()}).encode()


class Chat(asyncio.Protocol):
    """One connection."""

    def __init__(self, counts: Counts, delay: float):
        self.counts, self.delay, self.received = counts, delay, b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n") + 4) > 3:
            length = re.search(rb"\r\ncontent-length: *(\d+)", self.received[:end], re.IGNORECASE)
            whole = end + (int(length[1]) if length else 0)
            if len(self.received) < whole:
                return
            if self.received.startswith(b"GET /stats "):
                self.send(self.counts.stats())
            else:
                self.take(self.received[end:whole])
            self.received = self.received[whole:]

    def take(self, body: bytes) -> None:
        counts = self.counts
        counts.requests += 1
        counts.in_flight += 1
        counts.most_in_flight = max(counts.most_in_flight, counts.in_flight)
        counts.by_second[int(time.monotonic())] += 1
        message = {"role": "assistant", "content": LABELS[zlib.crc32(body) % len(LABELS)]}
        usage = {"prompt_tokens": len(body), "completion_tokens": 2, "total_tokens": len(body) + 2}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"object": "chat.completion", "choices": [choice], "usage": usage}
        asyncio.get_running_loop().call_later(self.delay, self.give, json.dumps(answer).encode())

    def give(self, answer: bytes) -> None:
        self.counts.in_flight -= 1
        if not self.transport.is_closing():
            self.send(answer)

    def send(self, body: bytes) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self.transport.write(f"{head}\r\n\r\n".encode() + body)


async def serve(delay: float) -> None:
    loop, counts, ended = asyncio.get_running_loop(), Counts(), asyncio.Event()
    server = await loop.create_server(lambda: Chat(counts, delay), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(sys.stdin, ended.set)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
