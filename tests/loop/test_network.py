"""Nothing that fastq starts turns to another machine, and nothing that it starts can be reached from one."""

import json
import shutil
import signal
import socket
import sys
import time
from ipaddress import ip_address

import httpx
import psutil
import pytest

from fastq.environment import free_ports

ELSEWHERE = "192.0.2.1"  # reserved for examples: RFC 5737


def test_the_trace_sees_what_leaves(as_a_user, tmp_path):
    """The other tests here would see a stranger: in a child, over UDP, over TCP."""
    program = (
        "import socket, subprocess, sys\n"
        f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{ELSEWHERE}', 9))\n"
        "subprocess.run([sys.executable, '-c', \"import socket; s = socket.socket(socket.AF_INET6); s.setblocking(False); s.connect_ex(('2001:db8::1', 80))\"])"
    )
    run = as_a_user("-c", program, cwd=tmp_path, traced=True, command=(sys.executable,))
    run.process.wait(60)
    assert {ELSEWHERE, "2001:db8::1"} <= run.strangers(), run.trace.read_text()


def on_loopback(address):
    """Also where IPv6 wraps an address of IPv4."""
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


@pytest.fixture(scope="module")
def server(as_a_user, trained, tmp_path_factory):
    """`fastq serve`, traced, ready, in a workspace of its own."""
    workspace, port = shutil.copytree(trained, tmp_path_factory.mktemp("served") / "workspace"), *free_ports(1)
    run = as_a_user("serve", "--port", port, cwd=workspace, traced=True)
    until = time.monotonic() + 240
    while True:
        assert run.process.poll() is None and time.monotonic() < until, run.stderr[-2000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5, trust_env=False).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.3)
    return workspace, run, port


def test_serving_connects_to_nobody_else_and_listens_to_nobody_else(server, as_a_user):
    workspace, run, port = server
    key = json.loads(as_a_user("keys", "create", "--role", "recommend", "--json", cwd=workspace).wait(60).stdout)["key"]
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/recommendations",
        json={"players": ["p00000"]},
        headers={"Authorization": f"Bearer {key}"},
        timeout=30,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    listening = run.listening()
    assert ("127.0.0.1", port) in listening
    assert {place for place in listening if not on_loopback(place[0])} == set()
    time.sleep(5)  # what a library does some seconds after its start
    assert "connect(" in run.trace.read_text(), "the trace is empty"
    assert run.strangers() == set()


def test_a_stopped_server_leaves_nothing_running(server):
    _, run, port = server
    (traced,) = psutil.Process(run.process.pid).children()
    traced.send_signal(signal.SIGTERM)
    assert run.wait(90).code == 0
    run.gone()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the next server would: closed connections linger a minute, a listener refuses this
        probe.bind(("127.0.0.1", port))
