"""Load on an HTTP endpoint of this machine from a process of its own: closed loops over keep-alive connections. Prints one JSON document."""

import asyncio
import json
import random
import sys
import time
from pathlib import Path

import numpy as np


class Connection(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it is answered."""

    def __init__(self, ask, until, done):
        self.ask, self.until, self.done = ask, until, done
        self.buffer, self.taken, self.statuses = b"", [], {}

    def connection_made(self, transport):
        self.transport = transport
        self.send()

    def send(self):
        if time.perf_counter() > self.until:
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
        self.buffer = b""
        self.send()

    def connection_lost(self, _):
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, path: str, key: str, lines: list[bytes], connections: int, seconds: float) -> dict:
    """Answers per second, latencies and statuses of closed loops; `lines`: the bodies to choose from."""

    def ask() -> bytes:
        body = random.choice(lines)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    loop, until = asyncio.get_running_loop(), time.perf_counter() + seconds
    made = []
    for _ in range(connections):
        done = loop.create_future()
        _, protocol = await loop.create_connection(lambda done=done: Connection(ask, until, done), "127.0.0.1", port)
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
    return {"rps": len(taken) / spent, "p50": p50, "p99": p99, "statuses": statuses, "n": int(sum(statuses.values()))}


if __name__ == "__main__":
    port, path, key, bodies, connections, seconds = sys.argv[1:]
    sys.stdout.write(json.dumps(asyncio.run(load(int(port), path, key, Path(bodies).read_bytes().splitlines(), int(connections), float(seconds)))))
