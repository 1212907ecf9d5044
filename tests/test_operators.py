"""What operators read: metrics, the OpenAPI document, readiness and health, logs, and what systemd is told."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import jobqueue
from support import ServerProcess, call, connect, raw, wait_until
from wires import WORKERS, Client, WorkerOverHttp, later, refused

# -- metrics


class Figures:
    """/metrics as Prometheus reads it: families by name, samples by name and labels."""

    def __init__(self, server: Any) -> None:
        parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
        answer = call(server.url, "GET", "/metrics")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        self.text = answer.body.decode()
        self.families = {family.name: family for family in parser.text_string_to_metric_families(self.text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values() for sample in family.samples
        }

    def __call__(self, name: str, **labels: Any) -> float | None:
        return self._samples.get((f"jobqueue_{name}", frozenset((key, str(text)) for key, text in labels.items())))


def play(server: jobqueue.Server) -> None:
    """Five jobs: one whose worker was late, one repeated, one that failed in the end, one that waits, one gone."""
    clock, client = server.clock, Client(server)
    http, grpc = WorkerOverHttp(server), WORKERS["grpc"](server)
    client.put(b"1", lease=10)
    late = http.poll()
    clock.advance(11)
    wait_until(lambda: client.stats()["pending"] == 1)  # the lease has run out
    http.complete(late, b"1")
    http.complete(late, b"1")
    client.put(b"2", attempts=2)
    grpc.fail(grpc.poll(), "once", delay=0)
    grpc.fail(grpc.poll(), "twice")
    client.put(b"3", queue="slow")
    client.cancel(client.put(b"4", queue="slow"))
    client.put(b"5", ttl=5, queue="short")
    clock.advance(6)
    wait_until(lambda: client.stats()["expired"] == 1)
    client.admin("pause", queue="slow")
    with refused("job_not_found"):
        grpc.complete("no-such-job", b"1")
    with refused("job_not_found"):
        http.complete("no-such-job", b"1")


def test_every_metric_parses_and_is_there_after_a_little_work(server):
    play(server)
    figures = Figures(server)
    for name, (kind, text) in jobqueue.METRICS.items():
        family = figures.families.get(name.removesuffix("_total") if kind == "counter" else name)
        assert family is not None, name
        assert (family.type, family.documentation) == (kind, text)
        assert family.samples, name
    assert len(figures.families) == len(jobqueue.METRICS)
    assert figures.text.endswith("\n")


def test_the_figures_are_those_of_what_happened(server):
    play(server)
    figures = Figures(server)
    states = {
        "default": {"completed": 1, "failed": 1},
        "slow": {"pending": 1, "cancelled": 1},
        "short": {"expired": 1},
    }
    for queue, counts in states.items():
        for state in ("delayed", "pending", "running", "completed", "failed", "expired", "cancelled"):
            assert figures("jobs", queue=queue, state=state) == counts.get(state, 0), (queue, state)
    expected = {
        "jobs_submitted_total": 5, "jobs_completed_total": 1, "jobs_failed_total": 1, "jobs_expired_total": 1,
        "jobs_cancelled_total": 1, "leases_lapsed_total": 1, "late_completions_total": 1,
        "duplicate_completions_total": 1, "retries_total": 1, "held_clients": 0, "waiting_workers": 0, "disk_full": 0,
    }
    assert {name: figures(name) for name in expected} == expected
    assert figures("queue_paused", queue="slow") == 1 and figures("queue_paused", queue="short") == 0
    assert 5.9 <= figures("oldest_pending_seconds", queue="slow") <= 7
    assert figures("oldest_pending_seconds", queue="default") == 0
    assert figures("info", version=jobqueue.__version__) == 1
    assert figures("uptime_seconds") == pytest.approx(17, abs=0.5)
    assert figures("journal_bytes") == (Path(server.settings.data_dir) / "journal.jsonl").stat().st_size
    assert figures("connections") >= 1
    # Each of the two jobs that were handed out had waited once, however often it was handed out.
    assert figures("job_wait_seconds_count") == 2
    assert figures("fsync_seconds_count") >= 5 and figures("commit_seconds_count") >= 5


def test_requests_are_counted_by_route_and_code_with_their_time_on_both_wires(server):
    play(server)
    figures = Figures(server)

    def http(method: str, route: str, status: int, part: str = "count", **more: Any) -> float | None:
        return figures(f"http_request_duration_seconds_{part}", method=method, route=route, status=status, **more)

    assert http("POST", "/api/submit", 202) == 5
    assert http("POST", "/api/worker/complete/{job_id}", 200) == 2
    assert http("POST", "/api/worker/complete/{job_id}", 404) == 1
    assert http("GET", "/api/worker/poll", 200) == 1
    assert http("POST", "/api/admin/pause", 200) == 1

    def grpc(method: str, code: str, part: str = "count", **more: Any) -> float | None:
        return figures(f"grpc_request_duration_seconds_{part}", method=method, code=code, **more)

    assert (grpc("RequestJob", "OK"), grpc("FailJob", "OK"), grpc("CompleteJob", "NOT_FOUND")) == (2, 2, 1)
    # A held request counts with the whole of its time.
    held = later(call, server.url, "POST", "/api/submit?queue=held", b"1")
    wait_until(lambda: Client(server).stats()["waiting_clients"] == 1)
    assert Figures(server)("held_clients") == 1
    server.clock.advance(7)
    worker = WorkerOverHttp(server)
    worker.complete(worker.poll(queue="held"), b"1")
    assert held.result(10).status == 200
    figures = Figures(server)
    assert 7 <= http("POST", "/api/submit", 200, "sum") < 8
    assert http("POST", "/api/submit", 200, "bucket", le="5.0" if "5.0" in figures.text else "5") == 0
    assert http("POST", "/api/submit", 200, "bucket", le="+Inf") == 1


def test_buckets_never_fall_and_end_with_the_count(server):
    play(server)
    figures = Figures(server)
    series: dict[Any, list[tuple[float, float]]] = {}
    for family in figures.families.values():
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                labels = {name: text for name, text in sample.labels.items() if name != "le"}
                key = (family.name, tuple(sorted(labels.items())))
                series.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
    assert len(series) > 10
    for (name, labels), buckets in series.items():
        assert buckets == sorted(buckets) and [value for _, value in buckets] == sorted(v for _, v in buckets)
        assert buckets[-1] == (float("inf"), figures(f"{name.removeprefix('jobqueue_')}_count", **dict(labels)))


def test_paths_that_a_caller_makes_up_do_not_make_new_series(server):
    for number in range(20):
        call(server.url, "GET", f"/nothing/{number}")
        call(server.url, "GET", f"/api/jobs/made-up-{number}")
        raw(server.url, b"M%d / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % number)
        raw(server.url, b"GET / HTTP/1.1\r\nHost: localhost\r\nx y: %d\r\n\r\n" % number)
    text = Figures(server).text
    assert "made-up" not in text and "nothing" not in text and '"M1' not in text
    assert text.count("http_request_duration_seconds_count") <= 6


# -- OpenAPI


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return jobqueue.openapi(jobqueue.ROUTES)


def test_the_openapi_document_is_valid_3_1(server, document):
    validator = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    answer = call(server.url, "GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == json.loads(json.dumps(document))
    assert answer.json()["openapi"].startswith("3.1.")
    validator.OpenAPIV31SpecValidator(answer.json()).validate()


@pytest.mark.parametrize("route", jobqueue.ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_route_is_in_the_document_with_its_parameters_and_scope(route, document):
    operation = document["paths"][route.path][route.method.lower()]
    parameters = {(each["in"], each["name"]): each for each in operation["parameters"]}
    wanted = {("query", name) for name in route.parameters}
    wanted |= {("path", name) for name in re.findall(r"\{(\w+)\}", route.path)}
    if route.handler == "submit":
        wanted |= {("header", "Idempotency-Key"), ("header", "Prefer")}
    assert set(parameters) == wanted
    assert all(each["required"] for (place, _), each in parameters.items() if place == "path")
    assert ("requestBody" in operation) == (route.body is not None)
    assert ("security" in operation) == (route.scope is not None)
    if route.scope:
        assert route.scope in operation["description"]
    assert "default" in operation["responses"] and operation["summary"]


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[str]:
    """What a client that was made from the document may put into a query."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "boolean":
        return st.sampled_from(["true", "false"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema["type"] == "integer":
        return st.integers(low, high).map(str)
    if schema["type"] == "number":
        return (st.floats(low, high) | st.integers(math.ceil(low), math.floor(high))).map(str)
    text = st.from_regex(re.compile(schema["pattern"]), fullmatch=True)
    return text.filter(lambda text: len(text) <= schema.get("maxLength", math.inf))


CHECKS = {
    f"{route.method} {route.path} {name}": (name, parse)
    for route in jobqueue.ROUTES
    for name, (parse, _) in route.parameters.items()
}


@pytest.mark.parametrize("check", CHECKS)
@given(data=st.data())
def test_what_the_document_promises_is_taken(check, data):
    name, parse = CHECKS[check]
    text = data.draw(values_of(parse.schema))
    assert name in jobqueue.parse_query(urllib.parse.urlencode({name: text}), {name: (parse, "")})


@pytest.mark.parametrize("text", [
    "", "1e", "e5", "1e+", "1e400", "inf", "nan", "-inf", "1_0", "1e1_0", "0x1", "١", "1e²", " 1",
])
def test_a_number_that_is_none_is_refused(text):
    for name, (parse, _) in jobqueue.SUBMIT_PARAMETERS.items():
        if parse.schema["type"] in ("number", "integer"):
            with pytest.raises(ValueError, match=name):
                parse(name, text)


def test_a_number_may_have_an_exponent(server):
    """str(0.00001) is 1e-05 in Python, and 1e-5 in JavaScript."""
    for delay in ("1e-05", "1e-5", "1E1", "1.5e+1"):
        assert call(server.url, "POST", f"/api/submit?wait=0&delay={delay.replace('+', '%2B')}").status == 202


def test_a_batch_of_results_is_what_the_document_says(server, document):
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed").Draft202012Validator
    body = document["paths"]["/api/worker/complete"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    row = {"job_id": "a"}
    batches = [
        [], [row], [{**row, "lease_token": None, "payload": {"x": [1]}, "content_type": "text/html"}],
        [{**row, "payload": "/+8=", "payload_encoding": "base64"}], [{**row, "payload_encoding": None}],
        [row] * 10_000, [{}],
        [{"job_id": ""}], [{"job_id": 1}], [{**row, "lease_token": 1}], [{**row, "more": 1}], [[]], ["a"], {}, None,
        [{**row, "payload": "/+8", "payload_encoding": "base64"}], [{**row, "payload_encoding": "base64"}],
        [{**row, "payload": "a", "payload_encoding": "hex"}], [{**row, "content_type": []}], [row] * 10_001,
    ]  # fmt: skip
    bodies = [{"results": batch} for batch in batches] + [{}, [], {"results": [], "more": 1}]
    for each in bodies:
        taken = call(server.url, "POST", "/api/worker/complete", json=each).status == 200
        assert taken == validator(body).is_valid(each), ascii(each)[:200]


def test_a_route_that_takes_no_body_takes_no_large_one(server, document):
    bodiless = {"pause", "resume", "requeue", "requeue_all", "release", "extend"}
    assert {route.handler for route in jobqueue.ROUTES if route.method == "POST" and not route.body} == bodiless
    for route in jobqueue.ROUTES:
        if route.handler in bodiless:
            assert "requestBody" not in document["paths"][route.path]["post"]
            for size, refused_ in ((65536, False), (65537, True)):
                answer = call(server.url, "POST", route.path.replace("{job_id}", "none"), b"x" * size)
                assert (answer.status == 413) == refused_, route.path


def test_the_document_holds_no_route_that_is_not_there(document):
    operations = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert operations == {(route.method, route.path) for route in jobqueue.ROUTES}
    ids = [each["operationId"] for methods in document["paths"].values() for each in methods.values()]
    assert len(set(ids)) == len(ids)
    codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert set(codes) == set(jobqueue.ERRORS)


# What holds its caller: with any other value of `wait` the run would only wait.
HOLDING = ("submit", "poll", "view", "result")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("holding", [False, True], ids=["all that answer at once", "what may hold its caller"])
def test_schemathesis_finds_no_server_error(holding, document, process, tmp_path):
    """Requests made from the document, valid and not, none of which may end in a mistake of the server."""
    tool = shutil.which("schemathesis", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not tool:
        pytest.skip("schemathesis is not installed (pip install schemathesis)")
    server = process("--fsync", "never", "--grpc-port", "off")
    document = json.loads(json.dumps(document))
    del document["paths"]["/api/jobs"]["post"]  # it cannot make ndjson; fuzz_http.py does
    for operation in (each for methods in document["paths"].values() for each in methods.values()):
        for parameter in operation["parameters"]:
            if parameter["name"] == "wait":
                parameter |= {"required": operation["operationId"] == "submit", "schema": {"enum": [0]}}
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    # How a job ended is no mistake of the server's: 502 failed, 504 expired.
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "502", "504"]\n')
    choice = "--include-operation-id" if holding else "--exclude-operation-id"
    command = [tool, "run", str(path), "--url", server.url, "--checks", "not_a_server_error", "--max-examples", "100",
               "--mode", "positive" if holding else "all", "--request-timeout", "20", "--no-color"]
    for each in HOLDING:
        command += [choice, each]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Traceback" not in server.log() and "handler_failed" not in server.log()


# -- readiness and health


@pytest.fixture
def draining(process) -> Iterator[ServerProcess]:
    """A server that was told to stop and waits for a job in progress."""
    server = process("--drain", "30")
    client, worker = Client(server), WorkerOverHttp(server)
    client.put()
    server.job, server.worker = worker.poll(), worker
    server.terminate()
    wait_until(lambda: call(server.url, "GET", "/ready").status == 503, what="the drain")
    yield server
    worker.complete(server.job, b"1")
    assert server.wait(20) == 0


def test_a_server_that_serves_is_alive_and_ready(server):
    for path, status in (("/health", "ok"), ("/ready", "ready")):
        answer = call(server.url, "GET", path)
        assert (answer.status, answer.json()) == (200, {"status": status})
        assert call(server.url, "HEAD", path).status == 200


def test_life_and_readiness_are_told_without_a_look_at_the_jobs(server):
    """Whoever asks every second must not have a thousand queues counted, nor wait for whoever has them counted."""
    client = Client(server)
    client.put()
    with server.engine._lock:  # who holds it keeps everybody from the queues
        for path in ("/health", "/ready"):
            assert call(server.url, "GET", path, timeout=10).status == 200
            assert call(server.url, "HEAD", path, timeout=10).status == 200
    assert client.stats()["pending"] == 1


def test_a_server_that_drains_is_alive_and_not_ready_on_both_wires(draining):
    assert call(draining.url, "GET", "/health").json() == {"status": "ok"}
    answer = call(draining.url, "GET", "/ready")
    assert (answer.status, answer.json()["code"]) == (503, "draining")
    assert int(answer.headers["retry-after"]) >= 1
    submit = call(draining.url, "POST", "/api/submit?wait=0", b"1")
    assert (submit.status, submit.json()["code"], "retry-after" in submit.headers) == (503, "draining", True)
    assert call(draining.url, "GET", "/metrics").status == 200  # its last figures can still be read
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    pytest.importorskip("grpc_health", reason="grpcio-health-checking is not installed")
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{draining.grpc_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "worker.WorkerService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.NOT_SERVING


# -- logs

EVIL = (
    b"GET /api/jobs/a%0aINFO%20ready%20evil%0d%1b[31m HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /x%0a%E2%80%A8y?q=%0aevil HTTP/1.1\r\nHost: localhost\r\nX-Evil: a\x85b\xe2\x80\xa8c\r\n\r\n",
    b"GET /api/worker/poll?worker=a%0ab HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /api/submit?wait=0&queue=%0aevil HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    b"\n\x1b[2J\x00evil\n\n",
    b"EVIL\x0b / HTTP/1.1\r\nHost: localhost\r\n\r\n",
)
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) [a-z_]+( .*)?")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


@pytest.mark.parametrize("kind", ["text", "json"])
def test_the_log_is_a_line_an_event_and_no_caller_can_start_one(kind, process):
    server = process("--log-format", kind, "--access-log", "--log-level", "debug", "--grpc-port", "off")
    for data in EVIL:
        raw(server.url, data, idle=0.1)
    client, worker = Client(server), WorkerOverHttp(server)
    client.put(b"1")
    worker.fail(worker.poll(), "a\nERROR evil\u2028\x1b[31m", retry=False)
    assert call(server.url, "GET", "/api/jobs").status == 200
    assert server.stop() == 0
    lines = server.log().split("\n")
    assert lines.pop() == ""
    for line in lines:
        assert not CONTROL.search(line), line
        if kind == "text":
            assert LINE.fullmatch(line), line
        else:
            event = json.loads(line)
            assert {"time", "level", "message"} <= set(event)
    assert sum("status=" in line and "request" in line for line in lines) >= 5
    assert "ready" in lines[0] and "stopped" in lines[-1]


def test_the_access_log_tells_peer_method_route_status_and_time(process):
    server = process("--access-log", "--grpc-port", "off")
    call(server.url, "GET", "/api/jobs/some-job", headers={"Authorization": "Bearer secret", "Cookie": "c=secret"})
    line = server.wait_log(r"request .*")[0]
    assert re.fullmatch(
        r"request peer=127\.0\.0\.1 method=GET path=/api/jobs/(some-job|\{job_id\}) status=404 seconds=\d+\.\d+", line)
    assert "secret" not in server.log()


def test_without_an_access_log_requests_are_not_logged(process):
    server = process("--grpc-port", "off")
    call(server.url, "GET", "/nothing")
    assert server.stop() == 0
    assert [line.split()[2] for line in server.log().splitlines()] == ["ready", "stopping", "stopped"]


def test_a_log_level_hides_what_is_below_it(tmp_path):
    logged = subprocess.run(
        [sys.executable, "-c",
         "import jobqueue, logging; jobqueue.set_up_logging('json', 'warning');"
         "jobqueue.log.info('hidden'); jobqueue.log.warning('a\\nb \\u2028 %s', 'c\\rd')\n"
         "try: 1 / 0\nexcept ZeroDivisionError: jobqueue.log.exception('failed')"],
        cwd=Path(jobqueue.__file__).parent, capture_output=True, text=True, timeout=30,
    )
    first, second = map(json.loads, logged.stderr.splitlines())
    assert (first["level"], first["message"]) == ("warning", "a\nb \u2028 c\rd")
    assert "ZeroDivisionError" in second["traceback"]


# -- systemd


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_systemd_is_told_of_readiness_of_life_and_of_the_stop(process, tmp_path, abstract):
    name = f"@jobqueue-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
    if abstract and not sys.platform.startswith("linux"):
        pytest.skip("abstract sockets are Linux's")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("\0" + name[1:] if abstract else name)
        heard.settimeout(10)
        env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "400000"}
        server = process("--grpc-port", "off", env=env)
        assert heard.recv(100) == b"READY=1"
        assert call(server.url, "GET", "/health").status == 200  # it is true
        assert [heard.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        server.terminate()
        said = heard.recv(100)
        while said == b"WATCHDOG=1":
            said = heard.recv(100)
        assert said == b"STOPPING=1"
        assert server.wait(20) == 0


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_without_a_watchdog_none_is_fed_and_a_socket_that_is_gone_harms_nobody(process, tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(path))
        heard.settimeout(10)
        server = process("--grpc-port", "off", env={"NOTIFY_SOCKET": str(path)})
        assert heard.recv(100) == b"READY=1"
    path.unlink()
    with connect(server.url):
        assert call(server.url, "GET", "/health").status == 200
    assert server.stop() == 0
    assert "Traceback" not in server.log()


def test_what_an_operator_does_to_many_jobs_is_one_line_in_the_log(server, caplog):
    caplog.set_level(logging.INFO, "jobqueue")
    Client(server).put()
    for method, path in (
        ("POST", "/api/admin/pause?queue=mail"),
        ("POST", "/api/admin/resume?queue=mail"),
        ("POST", "/api/admin/requeue?status=failed"),
        ("POST", "/api/admin/pause"),
        ("POST", "/api/admin/resume"),
        ("DELETE", "/api/admin/clear"),
    ):
        assert call(server.url, method, path).status == 200, path
    assert [record.getMessage() for record in caplog.records] == [
        "paused queue=mail peer=127.0.0.1",
        "resumed queue=mail peer=127.0.0.1",
        "requeued jobs=0 status=failed peer=127.0.0.1",
        "paused queue=(all) peer=127.0.0.1",
        "resumed queue=(all) peer=127.0.0.1",
        "cleared jobs=1 peer=127.0.0.1",
    ]
