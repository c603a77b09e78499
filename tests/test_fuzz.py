"""schemathesis over the whole OpenAPI of a running endpoint: whatever is sent, the answer is one that is documented, and none is an accident of ours."""

import shutil
import threading
import time

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fastq.environment import free_ports
from fastq.platform import load_platform
from fastq.workspace import Workspace
from serving import auth, endpoint

EXAMPLES = 12  # of each operation, once as documented and once as it must not be
CHECKED = [status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    """The address of an endpoint, over a real socket, and a key that opens everything."""
    workspace = shutil.copytree(trained, tmp_path_factory.mktemp("fuzzed") / "workspace")
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(endpoint.create_app(load_platform(workspace)), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {auth.create_key(Workspace(workspace), 'admin')['key']}"}
    server.should_exit = True
    thread.join(30)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_meets_an_accident(served, mode):
    address, key = served
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    seen: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            answer = case.call(headers=key, timeout=30)
            seen.setdefault(case.operation.label, set()).add(answer.status_code)
            if answer.status_code == 503:  # deliberate, and said as everything else is
                assert answer.headers["retry-after"] and answer.headers["content-type"] == ["application/problem+json"], answer.text
            else:
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            case.validate_response(answer, checks=CHECKED)

        try:
            send()
        except BaseException as error:
            if type(error).__name__ == "Unsatisfiable":  # nothing can be wrong about an operation that takes nothing
                continue
            raise
    assert {label.split()[1] for label in seen} >= endpoint.RECOMMEND
    assert all(200 in statuses for label, statuses in seen.items() if label.startswith("GET") and "{" not in label and mode is GenerationMode.POSITIVE), seen
