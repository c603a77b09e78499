"""Load on an HTTP endpoint of this machine from a process of its own, over keep-alive connections. Prints one JSON document.

Closed loops: each connection asks again as soon as it is answered. With a rate (requests per second over all connections) each asks at its own regular
moments instead, and at once where an answer came too late for that: the load of many callers who know nothing of each other.
"""

import asyncio
import json
import random
import sys
import time
from pathlib import Path

import numpy as np


class Connection(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it is answered, or `every` so many seconds."""

    def __init__(self, ask, until, done, every):
        self.ask, self.until, self.done, self.every = ask, until, done, every
        self.due = time.perf_counter() + random.random() * every
        self.buffer, self.taken, self.statuses, self.without_retry = b"", [], {}, 0

    def connection_made(self, transport):
        self.transport = transport
        self.next()

    def next(self):
        """Ask at the next moment that is due."""
        wait = self.due - time.perf_counter()
        self.due += self.every
        if self.every and wait > 0:
            asyncio.get_running_loop().call_later(wait, self.send)
        else:
            self.due = max(self.due, time.perf_counter())
            self.send()

    def send(self):
        if self.transport.is_closing() or time.perf_counter() > self.until:
            self.transport.close()
            return
        self.sent = time.perf_counter()
        self.transport.write(self.ask())

    def data_received(self, data):
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        status = int(head[9:12])
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.taken.append(time.perf_counter() - self.sent)
        elif status in (429, 503):
            self.without_retry += b"retry-after:" not in head.lower()
        self.buffer = b""
        self.next()

    def connection_lost(self, _):
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, path: str, key: str, lines: list[bytes], connections: int, seconds: float, rate: float = 0.0) -> dict:
    """Answers per second, latencies of those that were given, and statuses; `lines`: the bodies to choose from; `rate`: 0 for closed loops."""

    def ask() -> bytes:
        body = random.choice(lines)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    loop, until = asyncio.get_running_loop(), time.perf_counter() + seconds
    made = []
    for _ in range(connections):
        done = loop.create_future()
        _, protocol = await loop.create_connection(lambda done=done: Connection(ask, until, done, connections / rate if rate else 0.0), "127.0.0.1", port)
        made.append((protocol, done))
    started = time.perf_counter()
    await asyncio.wait([done for _, done in made], timeout=seconds + 20)
    spent = time.perf_counter() - started
    taken = np.concatenate([p.taken for p, _ in made]) * 1e3
    statuses: dict[int, int] = {}
    for protocol, _ in made:
        for status, times in protocol.statuses.items():
            statuses[status] = statuses.get(status, 0) + times
    p50, p99 = np.quantile(taken, [0.5, 0.99]).tolist() if len(taken) else (float("nan"), float("nan"))
    bare = sum(p.without_retry for p, _ in made)
    return {"rps": len(taken) / spent, "p50": p50, "p99": p99, "statuses": statuses, "n": int(sum(statuses.values())), "refused_without_retry_after": bare}


if __name__ == "__main__":
    port, path, key, bodies, connections, seconds, *rate = sys.argv[1:]
    lines = Path(bodies).read_bytes().splitlines()
    sys.stdout.write(json.dumps(asyncio.run(load(int(port), path, key, lines, int(connections), float(seconds), *map(float, rate)))))
