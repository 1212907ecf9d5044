"""A client, and the same worker over HTTP and over gRPC: what the tests of behaviour speak with.

Both workers have the same methods and give the same values back, so that one test proves both wires.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from support import Answer, call, grpc_stub, wait_until

# code -> HTTP status, gRPC status: what was promised, not what the code says. Some come up over one wire alone.
CODES: dict[str, tuple[int, str]] = {
    "bad_http": (400, "INVALID_ARGUMENT"),
    "invalid_parameter": (400, "INVALID_ARGUMENT"),
    "invalid_request": (400, "INVALID_ARGUMENT"),
    "unauthorized": (401, "UNAUTHENTICATED"),
    "forbidden": (403, "PERMISSION_DENIED"),
    "host_refused": (403, "PERMISSION_DENIED"),
    "cross_site": (403, "PERMISSION_DENIED"),
    "not_found": (404, "UNIMPLEMENTED"),
    "job_not_found": (404, "NOT_FOUND"),
    "no_jobs": (404, "NOT_FOUND"),
    "method_not_allowed": (405, "UNIMPLEMENTED"),
    "request_timeout": (408, "DEADLINE_EXCEEDED"),
    "lease_lost": (409, "FAILED_PRECONDITION"),
    "job_finished": (409, "FAILED_PRECONDITION"),
    "job_not_leased": (409, "FAILED_PRECONDITION"),
    "job_not_finished": (409, "FAILED_PRECONDITION"),
    "job_cancelled": (410, "CANCELLED"),
    "job_cleared": (410, "CANCELLED"),
    "payload_too_large": (413, "RESOURCE_EXHAUSTED"),
    "uri_too_long": (414, "INVALID_ARGUMENT"),
    "unsupported_media_type": (415, "INVALID_ARGUMENT"),
    "expectation_failed": (417, "INVALID_ARGUMENT"),
    "key_reused": (422, "FAILED_PRECONDITION"),
    "headers_too_large": (431, "INVALID_ARGUMENT"),
    "internal": (500, "INTERNAL"),
    "not_implemented": (501, "UNIMPLEMENTED"),
    "job_failed": (502, "ABORTED"),
    "draining": (503, "UNAVAILABLE"),
    "queue_full": (503, "UNAVAILABLE"),
    "too_many_clients": (503, "UNAVAILABLE"),
    "outcome_unknown": (503, "UNAVAILABLE"),
    "job_expired": (504, "DEADLINE_EXCEEDED"),
    "http_version": (505, "UNIMPLEMENTED"),
    "disk_full": (507, "RESOURCE_EXHAUSTED"),
}


class Refused(Exception):
    """The server said no. `status` is the HTTP status or the name of the gRPC status; `code` may be missing."""

    def __init__(self, status: int | str, code: str | None, detail: str, answer: Any = None) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail, self.answer = status, code, detail, answer


@contextlib.contextmanager
def refused(*codes: str) -> Iterator[pytest.ExceptionInfo[Refused]]:
    """What is called inside is refused with one of these codes, in the shape of its wire."""
    with pytest.raises(Refused) as caught:
        yield caught
    said = caught.value
    wire = 1 if isinstance(said.status, str) else 0
    assert said.status in [CODES[code][wire] for code in codes], said
    # gRPC has the status and the text; where it says the code too, that is the same one.
    assert said.code in codes or (wire == 1 and said.code is None), said
    assert said.detail, said


# -- in the background


def later(function: Callable[..., Any], *arguments: Any, **named: Any) -> concurrent.futures.Future[Any]:
    """Call it in a thread of its own."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Call all of them at the same moment; what each returned or raised."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait(10)
        try:
            return function()
        except Exception as error:
            return error

    return [future.result(30) for future in [later(run, function) for function in functions]]


# -- JSON that is looked at without being parsed

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},:]|[^\s"\[\]{},:]+', re.DOTALL)


def members(text: str) -> dict[str, str]:
    """The members of a JSON object, each as it stands in the text (so that 1.0 is not 1, nor a key lost)."""
    found: dict[str, str] = {}
    depth, name, start, end, key = 0, None, -1, -1, None
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if depth == 1 and name is None and mark[0] == '"':
            key = json.loads(mark)
        elif depth == 1 and name is None and mark == ":":
            name, start = key, -1
        elif name is not None and depth == 1 and mark in ",}":
            assert name not in found, f"member {name} twice in {text[:200]}"
            found[name] = text[start:end]
            name = None
        elif name is not None and start < 0:
            start = token.start()
        end = token.end()
        depth += (mark in "{[") - (mark in "}]")
    assert depth == 0, text[:200]
    return found


# -- the client


def query(path: str, **parameters: Any) -> str:
    """A path with its query; a trailing underscore of a name goes, None is left out."""
    given = {name.rstrip("_"): value for name, value in parameters.items() if value is not None}
    return f"{path}?{urllib.parse.urlencode(given)}" if given else path


def check_problem(answer: Answer) -> dict[str, Any]:
    """The answer is an error in the one shape that errors have."""
    assert answer.headers.get("content-type") == "application/problem+json", answer
    problem = answer.json()
    assert set(problem) - {"job_id"} == {"title", "status", "detail", "code", "error"}, problem
    assert problem["status"] == answer.status
    assert problem["error"] == problem["detail"]
    assert problem["title"] and problem["detail"]
    assert "Traceback" not in answer.body.decode()
    assert problem["detail"].encode(), "half a surrogate pair is JSON for Python alone"
    return problem


def ok(answer: Answer, status: int = 200) -> Any:
    """The JSON of an answer with this status; anything else is a Refused."""
    if answer.status != status:
        problem = check_problem(answer)
        raise Refused(answer.status, problem["code"], problem["detail"], answer)
    return answer.json() if answer.body else None


class Client:
    """Who submits and looks."""

    def __init__(self, server: Any) -> None:
        self.url = server.url
        self.server = server

    def call(self, method: str, path: str, body: bytes | str = b"", headers: dict[str, str] | None = None,
             **parameters: Any) -> Answer:
        return call(self.url, method, query(path, **parameters), body, headers or {})

    def submit(self, payload: bytes | str = b"{}", headers: dict[str, str] | None = None, **options: Any) -> Answer:
        """POST /api/submit, held until the server answers."""
        return self.call("POST", "/api/submit", payload, headers, **options)

    def put(self, payload: bytes | str = b"{}", headers: dict[str, str] | None = None, **options: Any) -> str:
        """Submit without waiting for the result; the job's id."""
        return ok(self.submit(payload, headers, wait=0, **options), 202)["job_id"]

    def hold(self, payload: bytes | str = b"{}", headers: dict[str, str] | None = None,
             **options: Any) -> concurrent.futures.Future[Answer]:
        """Submit in the background; returns once the server holds the client."""
        before = self.stats()["waiting_clients"]
        future = later(self.submit, payload, headers, **options)
        wait_until(lambda: future.done() or self.stats()["waiting_clients"] > before, what="a held client")
        assert not future.done(), future.result()
        return future

    def view(self, job_id: str, **parameters: Any) -> dict[str, Any]:
        return ok(self.call("GET", f"/api/jobs/{job_id}", **parameters))

    def status(self, job_id: str) -> str:
        return self.view(job_id)["status"]

    def wait_status(self, job_id: str, status: str, timeout: float = 10) -> None:
        """Wait until a job has this status, which something else is about to give it."""

        def has_it() -> bool:
            listed = ok(self.call("GET", "/api/jobs", status=status, limit=1000))["jobs"]
            return job_id in [job["job_id"] for job in listed]

        wait_until(has_it, timeout, f"{job_id} to be {status}")

    def result(self, job_id: str) -> bytes:
        answer = self.call("GET", f"/api/jobs/{job_id}/result")
        assert answer.status == 200, answer
        return answer.body

    def cancel(self, job_id: str) -> dict[str, Any]:
        return ok(self.call("DELETE", f"/api/jobs/{job_id}"))

    def stats(self) -> dict[str, Any]:
        return ok(self.call("GET", "/api/admin/stats"))

    def wait_workers(self, count: int) -> None:
        """Wait until so many long polls wait."""
        wait_until(lambda: self.stats()["waiting_workers"] == count, what=f"{count} waiting workers")

    def admin(self, what: str, **parameters: Any) -> dict[str, Any]:
        return ok(self.call("POST", f"/api/admin/{what}", **parameters))


# -- the worker


@dataclass(frozen=True)
class Got:
    """A job in a worker's hands. `payload` is JSON text or text (over HTTP text is a JSON string)."""

    id: str
    payload: str
    data: bytes | None  # a payload that is not text
    headers: dict[str, str] = field(repr=False)
    queue: str
    priority: int
    attempt: int
    token: str
    lease_seconds: float
    created_at: str
    expires_at: str | None


@dataclass(frozen=True)
class Done:
    duplicate: bool
    next: Got | None


@dataclass(frozen=True)
class Failed:
    status: str
    retry_in: float
    duplicate: bool


@dataclass(frozen=True)
class Extended:
    lease_seconds: float
    cancelled: bool
    status: str


def _id_and_token(job: Got | str, token: str | None) -> tuple[str, str | None]:
    return (job, token) if isinstance(job, str) else (job.id, job.token if token is None else token or None)


class WorkerOverHttp:
    """A worker. `token=""` sends none, as the original's workers do; a bare id has none."""

    wire = "http"

    def __init__(self, server: Any) -> None:
        self.url = server.url

    def poll(self, **options: Any) -> Got | None:
        answer = call(self.url, "GET", query("/api/worker/poll", **options))
        if answer.status == 204:
            assert (answer.body, answer.headers.keys() & {"content-length", "content-type"}) == (b"", set())
            return None
        ok(answer)
        return self._got(answer.body.decode())

    def poll_many(self, max: int, **options: Any) -> list[Got]:
        answer = call(self.url, "GET", query("/api/worker/poll", max=max, **options))
        assert set(ok(answer)) == {"jobs"}
        return [self._got(text) for text in elements(members(answer.body.decode())["jobs"])]

    def complete(self, job: Got | str, result: bytes = b"", token: str | None = None,
                 content_type: str | None = None, next: bool | None = None, **options: Any) -> Done:
        headers = {"Content-Type": content_type} if content_type else {}
        if next is not None:
            options["next"] = str(next).lower()
        answer = self._settle("complete", job, token, result, headers, **options)
        said = ok(answer)
        assert said["message"] == "Job completed"
        follower = members(answer.body.decode()).get("next", "null")
        assert ("next" in said) == bool(next)
        return Done(said.get("duplicate", False), None if follower == "null" else self._got(follower))

    def complete_many(self, *results: tuple[Got | str, bytes]) -> list[tuple[str, int, str, bool]]:
        items = []
        for job, result in results:
            job_id, token = _id_and_token(job, None)
            item = {"job_id": json.dumps(job_id)}
            if token:
                item["lease_token"] = json.dumps(token)
            item |= _as_members(result)
            items.append("{" + ", ".join(f'"{name}": {value}' for name, value in item.items()) + "}")
        body = '{"results": [' + ",".join(items) + "]}"
        said = ok(call(self.url, "POST", "/api/worker/complete", body, {"Content-Type": "application/json"}))
        return [(each["job_id"], each["status"], each.get("code", ""), each.get("duplicate", False))
                for each in said["results"]]

    def fail(self, job: Got | str, error: str = "", token: str | None = None, retry: bool | None = None,
             delay: float | None = None) -> Failed:
        options = {"retry": None if retry is None else str(retry).lower(), "delay": delay}
        said = ok(self._settle("fail", job, token, error.encode(), **options))
        return Failed(said["status"], said.get("retry_in", 0), said.get("duplicate", False))

    def release(self, job: Got | str, token: str | None = None) -> bool:
        said = ok(self._settle("release", job, token))
        assert said["message"] == "Job released"
        return said.get("duplicate", False)

    def extend(self, job: Got | str, lease: float | None = None, token: str | None = None) -> Extended:
        said = ok(self._settle("extend", job, token, lease=lease))
        return Extended(said["lease_seconds"], said["cancelled"], said["status"])

    def _settle(self, verb: str, job: Got | str, token: str | None, body: bytes = b"",
                headers: dict[str, str] | None = None, **options: Any) -> Answer:
        job_id, token = _id_and_token(job, token)
        path = query(f"/api/worker/{verb}/{job_id}", lease_token=token, **options)
        answer = call(self.url, "POST", path, body, headers or {})
        if answer.status == 200:
            assert answer.json()["job_id"] == job_id
        return answer

    @staticmethod
    def _got(text: str) -> Got:
        job, raw = json.loads(text) if len(text) < 100_000 else None, members(text)
        said = {name: json.loads(value) for name, value in raw.items() if name != "payload"}
        assert job is None or set(job) == set(raw)
        data = None
        if said.get("payload_encoding"):
            assert said["payload_encoding"] == "base64"
            data = base64.b64decode(json.loads(raw["payload"]), validate=True)
        return Got(said["job_id"], "" if data is not None else raw["payload"], data, said["headers"], said["queue"],
                   said["priority"], said["attempt"], said["lease_token"], said["lease_seconds"],
                   said["created_at"], said.get("expires_at"))


class WorkerOverGrpc:
    """The same worker over gRPC."""

    wire = "grpc"

    def __init__(self, server: Any) -> None:
        pytest.importorskip("grpc", reason="grpcio is not installed")
        from worker_pb2_gen import worker_pb2

        self.pb = worker_pb2
        self.stub = grpc_stub(server)

    def poll(self, **options: Any) -> Got | None:
        try:
            return self._got(self._call("RequestJob", self._request(**options)))
        except Refused as no:
            if (no.status, no.detail) == ("NOT_FOUND", "no jobs available"):
                return None
            raise

    def poll_many(self, max: int, **options: Any) -> list[Got]:
        return [self._got(job) for job in self._call("RequestJobs", self._request(max=max, **options)).jobs]

    def complete(self, job: Got | str, result: bytes = b"", token: str | None = None,
                 content_type: str | None = None, next: bool | None = None, **options: Any) -> Done:
        message = self._result(job, result, token)
        message.content_type = content_type or ""
        if next is not None:
            message.next = next
        if options:
            message.next_request.CopyFrom(self._request(**options))
        said = self._call("CompleteJob", message)
        assert said.success is True
        return Done(said.duplicate, self._got(said.next) if said.HasField("next") else None)

    def complete_many(self, *results: tuple[Got | str, bytes]) -> list[tuple[str, int, str, bool]]:
        sent = self.pb.JobResults(results=[self._result(job, result, None) for job, result in results])
        said = self._call("CompleteJobs", sent)
        return [(each.job_id, each.status, each.code, each.duplicate) for each in said.results]

    def fail(self, job: Got | str, error: str = "", token: str | None = None, retry: bool | None = None,
             delay: float | None = None) -> Failed:
        job_id, token = _id_and_token(job, token)
        message = self.pb.JobFailure(job_id=job_id, lease_token=token or "", error=error)
        if retry is not None:
            message.retry = retry
        if delay is not None:
            message.delay_seconds = delay
        said = self._call("FailJob", message)
        return Failed(said.status, said.retry_in_seconds, said.duplicate)

    def release(self, job: Got | str, token: str | None = None) -> bool:
        job_id, token = _id_and_token(job, token)
        return self._call("ReleaseJob", self.pb.JobLease(job_id=job_id, lease_token=token or "")).duplicate

    def extend(self, job: Got | str, lease: float | None = None, token: str | None = None) -> Extended:
        job_id, token = _id_and_token(job, token)
        message = self.pb.JobLease(job_id=job_id, lease_token=token or "", lease_seconds=lease or 0)
        said = self._call("ExtendLease", message)
        return Extended(said.lease_seconds, said.cancelled, said.status)

    def _request(self, queue: str | None = None, wait: float = 0, lease: float = 0, worker: str = "",
                 max: int = 0) -> Any:
        return self.pb.JobRequest(queues=queue.split(",") if queue is not None else [], wait_seconds=wait,
                                  lease_seconds=lease, worker=worker, max=max)

    def _result(self, job: Got | str, result: bytes, token: str | None) -> Any:
        job_id, token = _id_and_token(job, token)
        message = self.pb.JobResult(job_id=job_id, lease_token=token or "")
        try:
            message.payload = result.decode()
        except UnicodeDecodeError:
            message.payload_bytes = result
        return message

    def _call(self, method: str, message: Any) -> Any:
        import grpc

        try:
            return getattr(self.stub, method)(message, timeout=30)
        except grpc.RpcError as error:
            code = {item.key: item.value for item in error.trailing_metadata() or ()}.get("code")
            raise Refused(error.code().name, code, error.details(), error) from None

    @staticmethod
    def _got(job: Any) -> Got:
        data = job.payload_bytes or None
        assert data is None or job.payload == ""
        return Got(job.id, job.payload, data, dict(job.headers), job.queue, job.priority, job.attempt,
                   job.lease_token, job.lease_seconds, job.created_at, job.expires_at or None)


WORKERS = {"http": WorkerOverHttp, "grpc": WorkerOverGrpc}


def _as_members(result: bytes) -> dict[str, str]:
    """A result in a batch over HTTP: JSON as it stands, text as a string, the rest as base64."""
    try:
        text = result.decode()
    except UnicodeDecodeError:
        return {"payload": json.dumps(base64.b64encode(result).decode()), "payload_encoding": '"base64"'}
    try:
        json.loads(text, parse_constant=lambda name: int(name))  # NaN is no JSON
    except ValueError:
        text = json.dumps(text)
    return {"payload": text}


def elements(text: str) -> list[str]:
    """The elements of a JSON array, each as it stands in the text."""
    found, depth, start, end = [], 0, -1, -1
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if depth == 1 and mark in ",]":
            if start >= 0:
                found.append(text[start:end])
            start = -1
        elif depth >= 1 and start < 0:
            start = token.start()
        end = token.end()
        depth += (mark in "{[") - (mark in "}]")
    return found
