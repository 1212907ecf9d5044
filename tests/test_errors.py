"""One table of errors for both wires: every code, in its shape, over HTTP and, where it exists, over gRPC."""

from __future__ import annotations

import errno
import http.client
import io
import json
import os
import re
import sys

import pytest

import jobqueue
from support import ROOT, Answer, FakeClock, ServerProcess, call, connect, raw, read_answer, wait_until
from wires import CODES, WORKERS, Client, check_problem, later, refused

NOWHERE = "00000000-0000-4000-8000-000000000000"
TOKENS = {scope: f"token-of-the-{scope}-0123456789" for scope in ("client", "worker", "admin")}


class Raw:
    """Bytes that http.client reads an answer from."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)


def say(url: str, request: str | bytes, **how) -> Answer:
    """Send bytes as they are; the first answer, after which the server closed or fell silent."""
    data = raw(url, request.encode("latin-1") if isinstance(request, str) else request, **how)
    assert data, "a silent close"
    response = http.client.HTTPResponse(Raw(data))
    response.begin()
    return read_answer(response)


class World:
    """A server with what a provocation needs."""

    def __init__(self, server, folder, monkeypatch) -> None:
        self.server, self.folder, self.monkeypatch = server, folder, monkeypatch
        self.clock = server.clock
        self.url = server.url
        self.client = Client(server)
        self.http = WORKERS["http"](server)
        self._grpc = None

    @property
    def grpc(self):
        self._grpc = self._grpc or WORKERS["grpc"](self.server)
        return self._grpc

    def submit(self, **options) -> Answer:
        return self.client.submit(b"{}", **{"wait": 0, **options})

    def leased(self, lease=300):
        self.client.put(lease=lease)
        return self.http.poll()

    def lost(self):
        """A lease that another worker has by now."""
        job = self.leased(lease=10)
        self.clock.advance(11)
        self.client.wait_status(job.id, "pending")
        assert self.http.poll(lease=5000).id == job.id
        return job

    def finished(self):
        job = self.leased()
        self.http.complete(job)
        return job

    def complete(self, job_id, token=None, body=b"1"):
        return self.client.call("POST", f"/api/worker/complete/{job_id}", body, lease_token=token)

    def drain(self):
        self.leased()
        stopping = later(self.server.stop, drain=30)
        wait_until(lambda: self.submit().status == 503)
        return stopping

    def break_the_disk(self, error):
        """Writes to files in the data folder fail from now on as on a full disk, or syncs as on a broken one."""
        inside = os.path.realpath(self.folder)
        place, function = (os, "write") if error == errno.ENOSPC else (jobqueue, "_sync_data")
        real = getattr(place, function)

        def fails(fd, *arguments):
            if os.path.realpath(f"/proc/self/fd/{fd}").startswith(inside):
                raise OSError(error, os.strerror(error))
            return real(fd, *arguments)

        self.monkeypatch.setattr(place, function, fails)

    def boom(self, verb):
        def fails(*_arguments, **_named):
            raise RuntimeError("boom: an inner matter")

        self.monkeypatch.setattr(jobqueue.LocalEngine, verb, fails)


@pytest.fixture
def world(request, tmp_path, monkeypatch):
    """A server with the settings of the row."""
    code = request.node.callspec.params.get("code") if hasattr(request.node, "callspec") else None
    settings = dict(SETTINGS.get(code, {}))
    clock = settings.pop("clock", FakeClock())
    if settings.pop("with_tokens", False):
        settings["tokens"] = str(tmp_path / "tokens")
        (tmp_path / "tokens").write_text("".join(f"{scope} {token}\n" for scope, token in TOKENS.items()))
        (tmp_path / "tokens").chmod(0o600)
    server = jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=0, clock=clock, **settings)
    with server:
        server.clock = clock
        yield World(server, tmp_path / "data", monkeypatch)
        monkeypatch.undo()
        server.stop(drain=0)


SETTINGS = {
    "unauthorized": {"with_tokens": True},
    "forbidden": {"with_tokens": True},
    "request_timeout": {"clock": jobqueue.Clock(), "header_timeout": 0.1},
    "payload_too_large": {"max_payload": 100},
    "uri_too_long": {"max_request_line": 200},
    "headers_too_large": {"max_headers": 500},
    "queue_full": {"max_jobs": 2},
    "too_many_clients": {"max_held": 1, "max_connections": 8},  # and as many long polls over gRPC
}

# == How each code is brought about over HTTP. A function that begins with "submit" tries to submit: nothing may be
# stored then.


def http_invalid_parameter(world):
    return world.client.call("GET", "/api/worker/poll", lease="0.5")


def http_invalid_request(world):
    return world.client.call("POST", "/api/worker/complete", b"not JSON", {"Content-Type": "application/json"})


def http_bad_http(world):
    return say(world.url, "GARBAGE\r\n\r\n")


def http_unauthorized(world):
    return world.client.call("GET", "/api/worker/poll", headers={"Authorization": "Bearer wrong"})


def http_forbidden(world):
    return world.client.call("GET", "/api/worker/poll", headers={"Authorization": f"Bearer {TOKENS['client']}"})


def http_host_refused(world):
    return say(world.url, "POST /api/submit?wait=0 HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}")


def http_cross_site(world):
    return world.client.submit(b"{}", {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, wait=0)


def http_not_found(world):
    return world.client.call("GET", "/api/nothing")


def http_job_not_found(world):
    return world.complete(NOWHERE)


def http_method_not_allowed(world):
    return world.client.call("PUT", "/api/submit", b"{}")


def http_request_timeout(world):
    return say(world.url, "POST /api/submit HTTP/1.1\r\nHost: local")


def http_lease_lost(world):
    job = world.lost()
    return world.complete(job.id, job.token)


def http_job_finished(world):
    return world.complete(world.finished().id)


def http_job_not_leased(world):
    return world.complete(world.client.put())


def http_job_not_finished(world):
    return world.client.call("GET", f"/api/jobs/{world.client.put()}/result")


def http_job_cancelled(world):
    held = world.client.hold()
    world.client.cancel(world.http.poll().id)
    return held.result(10)


def http_job_cleared(world):
    held = world.client.hold()
    world.client.call("DELETE", "/api/admin/clear")
    return held.result(10)


def http_payload_too_large(world):
    return world.client.submit(b"x" * 101, wait=0)


def http_uri_too_long(world):
    return world.submit(queue="x" * 300)


def http_unsupported_media_type(world):
    return world.client.call("POST", "/api/jobs", b"1\n", {"Content-Type": "text/plain"})


def http_expectation_failed(world):
    return world.client.submit(b"{}", {"Expect": "a-miracle"}, wait=0)


def http_key_reused(world):
    world.client.put(b"1", {"Idempotency-Key": "k"}, queue="of-the-first")
    return world.client.submit(b"2", {"Idempotency-Key": "k"}, wait=0)


def http_headers_too_large(world):
    return world.client.submit(b"{}", {"X-Long": "x" * 600}, wait=0)


def http_internal(world):
    world.boom("release")
    return world.client.call("POST", f"/api/worker/release/{NOWHERE}")


def http_not_implemented(world):
    return say(world.url, "POST /api/submit?wait=0 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n")


def http_job_failed(world):
    held = world.client.hold()
    world.http.fail(world.http.poll(), "broken", retry=False)
    return held.result(10)


def http_draining(world):
    stopping = world.drain()
    answer = world.submit()
    world.client.call("DELETE", "/api/admin/clear")
    stopping.result(10)
    return answer


def http_queue_full(world):
    world.client.put()
    world.client.put()
    return world.submit()


def http_too_many_clients(world):
    world.client.hold()
    return later(world.client.submit).result(10)


def http_outcome_unknown(world):
    world.break_the_disk(errno.EIO)
    return world.submit()


def http_job_expired(world):
    held = world.client.hold(ttl=5)
    world.clock.advance(6)
    return held.result(10)


def http_http_version(world):
    return say(world.url, "POST /api/submit?wait=0 HTTP/3.0\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")


def http_disk_full(world):
    world.break_the_disk(errno.ENOSPC)
    return world.submit()


# == The same over gRPC


def grpc_invalid_parameter(world):
    world.grpc.poll(lease=0.5)


def grpc_invalid_request(world):
    world.grpc.complete_many(*[(NOWHERE, b"1")] * 10_001)


def grpc_unauthorized(world):
    world.grpc.poll()


def grpc_forbidden(world):
    metadata = (("authorization", f"Bearer {TOKENS['client']}"),)
    method = world.grpc.stub.RequestJob
    world.grpc.stub.RequestJob = lambda message, timeout: method(message, timeout=timeout, metadata=metadata)
    world.grpc.poll()


def grpc_job_not_found(world):
    world.grpc.complete(NOWHERE)


def grpc_no_jobs(world):
    world.grpc._call("RequestJob", world.grpc._request())  # poll() makes None of it


def grpc_lease_lost(world):
    world.grpc.complete(world.lost())


def grpc_job_finished(world):
    world.grpc.complete(world.finished().id)


def grpc_job_not_leased(world):
    world.grpc.complete(world.client.put())


def grpc_payload_too_large(world):
    world.grpc.complete(world.leased(), b"x" * 101)


def grpc_internal(world):
    world.boom("release")
    world.grpc.release(NOWHERE)


def grpc_too_many_clients(world):
    for _ in range(8):
        later(world.grpc.poll, wait=300)
    world.client.wait_workers(8)
    world.grpc.poll(wait=300)


def grpc_outcome_unknown(world):
    job = world.leased()
    assert world.grpc
    world.break_the_disk(errno.EIO)
    world.grpc.complete(job)


def grpc_disk_full(world):
    job = world.leased()
    world.break_the_disk(errno.ENOSPC)
    world.grpc.complete(job)


OVER_HTTP = {name.removeprefix("http_"): call for name, call in list(globals().items()) if name.startswith("http_")}
OVER_GRPC = {name.removeprefix("grpc_"): call for name, call in list(globals().items()) if name.startswith("grpc_")}
NOT_OVER_HTTP = {"no_jobs"}  # which is a 204 there
NOT_OVER_GRPC = {
    # A worker is told by an empty answer that the server drains; it is refused in the last moment alone, in which
    # nothing is open any more.
    "draining",
    # What a client is told who submits, looks or requeues, none of which is done over gRPC.
    "job_not_finished", "job_cancelled", "job_cleared", "job_failed", "job_expired", "key_reused", "queue_full",
    "unsupported_media_type",
    # gRPC has frames, paths, methods and limits of its own, and no browser speaks it.
    "bad_http", "host_refused", "cross_site", "not_found", "method_not_allowed", "request_timeout", "uri_too_long",
    "expectation_failed", "headers_too_large", "not_implemented", "http_version",
}  # fmt: skip

# What refuses the submit itself: nothing may have been stored.
REFUSED_SUBMITS = [
    "host_refused", "cross_site", "method_not_allowed", "request_timeout", "payload_too_large", "uri_too_long",
    "unsupported_media_type", "expectation_failed", "key_reused", "headers_too_large", "not_implemented", "queue_full",
    "too_many_clients", "http_version", "disk_full", "bad_http",
]
CLOSES = ["bad_http", "request_timeout", "not_implemented", "http_version"]
WITH_JOB_ID = ["job_not_found", "lease_lost", "job_finished", "job_not_leased", "job_not_finished", "job_cancelled",
               "job_cleared", "job_failed", "job_expired", "outcome_unknown"]


def test_a_code_has_the_statuses_that_were_promised_and_there_is_no_other_code():
    assert {code: (status, grpc) for code, (status, grpc, _) in jobqueue.ERRORS.items()} == CODES


def test_every_code_is_brought_about_over_each_wire_that_has_it():
    assert set(OVER_HTTP) == set(jobqueue.ERRORS) - NOT_OVER_HTTP
    assert set(OVER_GRPC) == set(jobqueue.ERRORS) - NOT_OVER_GRPC


@pytest.mark.parametrize("code", OVER_HTTP)
def test_over_http_an_error_is_a_problem_with_its_code_and_status(world, code):
    answer = OVER_HTTP[code](world)
    problem = check_problem(answer)
    assert (answer.status, problem["code"]) == (CODES[code][0], code)
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert ("retry-after" in answer.headers) == (code in ("draining", "queue_full", "too_many_clients"))
    if "retry-after" in answer.headers:
        assert int(answer.headers["retry-after"]) >= 1
    if answer.status == 503:  # with a job's id it means: the outcome is unknown
        assert ("job_id" in problem) == (code == "outcome_unknown")
    if code in CLOSES:
        assert answer.headers["connection"] == "close"
    if code in WITH_JOB_ID:
        assert re.fullmatch("[0-9a-f-]{36}", problem["job_id"])
    assert "boom" not in answer.body.decode()


@pytest.mark.parametrize("code", OVER_GRPC)
def test_over_grpc_an_error_has_its_status(world, code):
    with refused(code) as no:
        OVER_GRPC[code](world)
    assert no.value.code == code, "the code is in the trailing metadata"
    assert "Traceback" not in no.value.detail and "boom" not in no.value.detail


# One has its own words where what is asked for differs: a submit and a completion, two sorts of batches, of clients.
OWN_WORDS = {"outcome_unknown", "invalid_parameter", "invalid_request", "too_many_clients"}


@pytest.mark.parametrize("code", [code for code in OVER_GRPC if code in OVER_HTTP and code not in OWN_WORDS])
def test_both_wires_say_the_same_of_an_error(world, code):
    problem = check_problem(OVER_HTTP[code](world))
    with refused(code) as no:
        OVER_GRPC[code](world)

    def bare(text):
        return re.sub(r"[0-9a-f-]{36}", "ID", text)

    if code in ("unauthorized", "disk_full"):
        return  # a wrong token and no token are two things; so are a submit and a completion
    assert bare(no.value.detail) == bare(problem["detail"])


@pytest.mark.parametrize("code", REFUSED_SUBMITS)
def test_what_was_refused_is_not_stored_and_will_never_run(world, code):
    OVER_HTTP[code](world)
    world.monkeypatch.undo()
    # What the provocation needed lies in the queue, and nothing else.
    needed = {"queue_full": 2, "too_many_clients": 1, "key_reused": 1}.get(code, 0)
    assert world.client.stats()["total"] == needed
    if needed == 0:
        assert world.http.poll() is None


# == The codes one by one


@pytest.mark.parametrize("code", ["unauthorized"])
@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic d29ya2Vy", "x", "bearer\tx"])
def test_without_a_valid_token_one_is_told_how_to_come_in(world, code, sent):
    answer = world.client.call("GET", "/api/worker/poll", headers={} if sent is None else {"Authorization": sent})
    assert check_problem(answer)["code"] == "unauthorized"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert not any(token in answer.body.decode() for token in TOKENS.values())


@pytest.mark.parametrize("code", ["forbidden"])
@pytest.mark.parametrize("scope, allowed", [("client", {"client"}), ("worker", {"worker"}),
                                            ("admin", {"client", "worker", "admin"})])
def test_a_token_opens_what_its_scope_covers_on_both_wires(world, code, scope, allowed):
    headers = {"Authorization": f"bearer {TOKENS[scope]}"}
    routes = {
        "client": [("POST", "/api/submit?wait=0"), ("GET", "/api/jobs"), ("DELETE", f"/api/jobs/{NOWHERE}")],
        "worker": [("GET", "/api/worker/poll"), ("POST", f"/api/worker/complete/{NOWHERE}"),
                   ("POST", f"/api/worker/fail/{NOWHERE}")],
        "admin": [("GET", "/api/admin/stats"), ("GET", "/metrics"), ("POST", "/api/admin/pause"),
                  ("DELETE", "/api/admin/clear")],
    }
    for needed, each in routes.items():
        for method, path in each:
            status = call(world.url, method, path, b"", headers).status
            assert (status in (401, 403)) == (needed not in allowed), (method, path, status)
            if needed not in allowed:
                assert status == 403
    message, metadata = world.grpc._result(NOWHERE, b"", None), (("authorization", f"Bearer {TOKENS[scope]}"),)
    with pytest.raises(Exception) as no:
        world.grpc.stub.CompleteJob(message, timeout=10, metadata=metadata)
    assert no.value.code().name == ("NOT_FOUND" if "worker" in allowed else "PERMISSION_DENIED")


@pytest.mark.parametrize("code", ["unauthorized"])
def test_health_and_readiness_are_open(world, code):
    for path in ("/health", "/ready", "/openapi.json", "/"):
        assert call(world.url, "GET", path).status == 200, path


ROUTES = {
    "/": "GET", "/health": "GET", "/ready": "GET", "/metrics": "GET", "/openapi.json": "GET",
    "/api/submit": "POST", "/api/jobs": "GET POST", f"/api/jobs/{NOWHERE}": "GET DELETE",
    f"/api/jobs/{NOWHERE}/result": "GET", "/api/worker/poll": "GET", "/api/worker/complete": "POST",
    f"/api/worker/complete/{NOWHERE}": "POST", f"/api/worker/fail/{NOWHERE}": "POST",
    f"/api/worker/release/{NOWHERE}": "POST", f"/api/worker/extend/{NOWHERE}": "POST", "/api/admin/stats": "GET",
    "/api/admin/clear": "DELETE", "/api/admin/next": "GET", "/api/admin/pause": "POST", "/api/admin/resume": "POST",
    "/api/admin/requeue": "POST", f"/api/admin/requeue/{NOWHERE}": "POST", "/api/admin/workers": "GET",
}


@pytest.mark.parametrize("path", ROUTES)
def test_a_known_path_with_a_wrong_method_says_which_it_takes(world, path):
    allowed = set(ROUTES[path].split())
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - allowed:
        answer = world.client.call(method, path)
        problem = check_problem(answer)
        assert (problem["status"], problem["code"]) == (405, "method_not_allowed")
        assert method in problem["detail"]
        said = set(re.split(r",\s*", answer.headers["allow"]))
        assert allowed <= said <= allowed | {"HEAD", "OPTIONS"}
        assert ("HEAD" in said) == ("GET" in allowed and path != "/api/worker/poll")


@pytest.mark.parametrize("path", [
    "/nothing", "/api", "/api/", "/api/jobs/a/b", "/api/worker", "/API/submit", "//health", "/api/worker/poll/x",
    "/api/jobs//result", "/api/submit/x",
])
def test_an_unknown_path_is_not_found_whatever_the_method(world, path):
    for method in ("GET", "POST", "DELETE"):
        problem = check_problem(call(world.url, method, path))
        assert problem["status"] == 404, (method, path)


def test_an_error_to_a_head_has_no_body(world):
    for path, status in (("/nothing", 404), ("/api/submit", 405), (f"/api/jobs/{NOWHERE}", 404)):
        data = raw(world.url, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert body == b""


def test_after_an_error_that_is_understood_the_connection_goes_on(world):
    stream = raw(world.url, b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
                            b"POST /api/submit?priority=99 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
                            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+)", stream) == [b"404", b"400", b"200"]


# A server with a bug: the error's own text has more than one line, too.
BUGGY = """
import sys, jobqueue
def release(*_):
    raise RuntimeError("boom:\\nan inner matter")
jobqueue.LocalEngine.release = release
sys.exit(jobqueue.main())
"""


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_bug_of_a_handler_is_one_log_line_with_its_traceback_and_the_server_lives(kind, tmp_path):
    flags = ["--data-dir", "data", "--port", "0", "--grpc-port", "0", "--log-format", kind]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JOBQUEUE_")}
    server = ServerProcess([sys.executable, "-c", BUGGY, *flags], {**inherited, "PYTHONPATH": str(ROOT)}, tmp_path)
    server.wait_ready(30)
    client, workers = Client(server), [WORKERS[wire](server) for wire in WORKERS]
    for worker in workers:
        job_id = client.put()
        job = worker.poll()
        with refused("internal") as no:
            worker.release(job)
        assert "boom" not in no.value.detail
        assert worker.complete(job).duplicate is False
        assert client.status(job_id) == "completed"
    assert server.stop() == 0
    lines = server.log().split("\n")
    assert lines.pop() == ""
    if kind == "text":
        parts = [re.fullmatch(r"[0-9T:.-]+Z ([A-Z]+) (.*)", line) for line in lines]
        assert all(parts), server.log()
        events = [part.groups() for part in parts]
    else:
        events = [(event["level"].upper(), event["message"] + " traceback=" + event.get("traceback", ""))
                  for event in map(json.loads, lines)]
    # `ready`, `stopping`, `stopped`, and between them one for each of the two calls.
    assert [level for level, _ in events] == ["INFO", "ERROR", "ERROR", "INFO", "INFO"], server.log()
    for _, message in events[1:3]:
        assert re.match(r"handler_failed\b.* traceback=Traceback \(most recent call last\):", message), message
        assert message.endswith("boom:\\nan inner matter" if kind == "text" else "boom:\nan inner matter"), message


@pytest.mark.parametrize("state", ["pending", "processing"])
def test_what_has_not_ended_cannot_be_requeued(world, state):
    job_id = world.client.put()
    job = world.http.poll() if state == "processing" else None
    problem = check_problem(world.client.call("POST", f"/api/admin/requeue/{job_id}"))
    assert (problem["status"], problem["code"], problem["job_id"]) == (409, "job_not_finished", job_id)
    assert state in problem["detail"]
    assert world.client.status(job_id) == state
    if job:
        assert world.http.complete(job).duplicate is False, "its worker did not notice"


@pytest.mark.parametrize("code", ["too_many_clients"])
def test_one_client_too_many_leaves_room_for_workers(world, code):
    held = world.client.hold()
    with connect(world.url) as refused_one:
        refused_one.sendall(b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        stream = b""
        while chunk := refused_one.recv(65_536):  # its connection is closed
            stream += chunk
    assert stream.startswith(b"HTTP/1.1 503 ")
    assert b'"too_many_clients"' in stream
    assert world.submit().status == 202, "who does not wait is no held client"
    world.http.complete(world.http.poll(), b'"done"')
    assert held.result(10).status == 200


@pytest.mark.parametrize("code", ["queue_full"])
def test_a_full_queue_takes_jobs_again_when_one_has_ended(world, code):
    world.client.put()
    world.client.put()
    assert world.submit().status == 503
    world.http.complete(world.http.poll())
    assert world.submit().status == 202
    assert world.submit().status == 503


def test_a_queue_that_is_full_by_its_bytes_refuses(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, max_bytes=20_000) as server:
        client, worker = Client(server), WORKERS["http"](server)
        client.put(b"x" * 15_000)
        problem = check_problem(client.submit(b"x" * 15_000, wait=0))
        assert problem["code"] == "queue_full"
        worker.complete(worker.poll())
        client.put(b"x" * 15_000)


def test_what_a_batch_brings_counts_with_its_headers(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, max_bytes=100_000) as server:
        client = Client(server)
        headers = {"Content-Type": "application/x-ndjson", "X-Large": "v" * 1000}
        problem = check_problem(client.call("POST", "/api/jobs", b"1\n" * 1000, headers))
        assert problem["code"] == "queue_full" and "this brings 1000 with 1" in problem["detail"]
        assert client.stats()["bytes"] == 0
        assert client.call("POST", "/api/jobs", b"1\n" * 50, headers).status == 202
        assert 50_000 < client.stats()["bytes"] <= 100_000


def test_what_a_batch_brings_counts_with_what_it_takes_to_keep_it(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, max_bytes=20_000) as server:
        client = Client(server)
        problem = check_problem(client.call("POST", "/api/jobs", b"1\n" * 60, {"Content-Type": "application/x-ndjson"}))
        assert problem["code"] == "queue_full"


def test_a_full_disk_stores_nothing_and_service_resumes_by_itself(world):
    before = world.client.put(b"before")
    held = world.client.hold(b"held")
    world.break_the_disk(errno.ENOSPC)
    for answer in (world.submit(), world.submit(queue="other"),
                   world.client.call("POST", "/api/jobs", b"1\n2\n", {"Content-Type": "application/x-ndjson"})):
        assert check_problem(answer)["code"] == "disk_full"
    world.monkeypatch.undo()
    assert world.client.stats()["total"] == 2
    assert world.submit().status == 202
    job = world.http.poll()
    assert job.id == before
    world.http.complete(job, b'"done"')
    world.http.complete(world.http.poll(), b'"held"')
    assert held.result(10).json()["payload"] == "held"


def test_a_job_goes_on_where_the_disk_is_too_full_to_cancel_it_for_a_client_that_hung_up(world, caplog):
    with connect(world.server.url) as client:
        client.sendall(b"POST /api/submit?on_disconnect=cancel HTTP/1.1\r\nHost: localhost\r\n"
                       b"Content-Length: 2\r\n\r\n{}")
        wait_until(lambda: world.client.stats()["waiting_clients"] == 1)
        world.break_the_disk(errno.ENOSPC)
    wait_until(lambda: world.client.stats()["waiting_clients"] == 0)
    world.monkeypatch.undo()
    job = world.http.poll()
    world.http.complete(job, b'"done"')
    assert world.client.result(job.id) == b'"done"'
    assert not [record for record in caplog.records if record.exc_info], "a traceback"


def test_a_disk_that_failed_a_sync_leaves_nobody_in_the_dark(world):
    held = world.client.hold()
    job = world.http.poll()
    world.break_the_disk(errno.EIO)
    with refused("outcome_unknown") as no:
        world.http.complete(job, b'"done"')
    assert job.id == check_problem(no.value.answer)["job_id"]
    problem = check_problem(held.result(10))
    assert (problem["status"], problem["code"], problem["job_id"]) == (503, "outcome_unknown", job.id)


def test_malformed_json_is_a_text_and_no_error(world):
    for payload in (b"{", b'{"a": }', b"NaN", b"\xff"):
        assert world.client.submit(payload, {"Content-Type": "application/json"}, wait=0).status == 202


def test_an_unknown_method_over_grpc_is_unimplemented(world):
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    with grpc.insecure_channel(f"127.0.0.1:{world.server.grpc_port}") as channel, pytest.raises(grpc.RpcError) as no:
        channel.unary_unary("/worker.WorkerService/Nothing")(b"", timeout=10)
    assert no.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_message_over_grpc_that_is_none_is_refused_and_the_server_lives(world):
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    job_id = world.client.put()
    with grpc.insecure_channel(f"127.0.0.1:{world.server.grpc_port}") as channel:
        for method in ("RequestJob", "CompleteJob"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/worker.WorkerService/{method}")(b"\xff\xff\xff\xff", timeout=10)
    assert world.grpc.poll().id == job_id


def test_an_error_never_names_a_lease_token(world):
    job = world.leased()
    for token in (job.token + "x", "made-up"):
        answer = world.complete(job.id, token)
        assert answer.status == 409
        assert job.token not in answer.body.decode()
