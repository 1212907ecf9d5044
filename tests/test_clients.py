"""What clients rely on: options, waiting, 202s, keys, batches, views, listings, results, cancelling, retention."""

from __future__ import annotations

import json
import re
import socket

import pytest

import jobqueue
from support import FakeClock, call, connect, raw, wait_until
from wires import WORKERS, Client, Refused, check_problem, elements, later, members, ok, refused

BIT = 0.01
HOUR, DAY = 3600, 86_400
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def client(server):
    return Client(server)


@pytest.fixture(params=WORKERS)
def worker(request, server):
    return WORKERS[request.param](server)


@pytest.fixture
def http_worker(server):
    return WORKERS["http"](server)


@pytest.fixture
def waiting(client):
    """Wait until so many clients are held."""
    return lambda count: wait_until(lambda: client.stats()["waiting_clients"] == count, what=f"{count} held clients")


# == Options of a submit


@pytest.mark.parametrize("options", [
    {"queue": "a"}, {"queue": "A.b_c-9"}, {"queue": "x" * 64}, {"priority": 0}, {"priority": 9}, {"delay": 0},
    {"delay": 0.5}, {"delay": 30 * DAY}, {"ttl": 1}, {"ttl": 0.5}, {"lease": 1}, {"lease": 43_200}, {"attempts": 1},
    {"attempts": 100}, {"wait": 0}, {"on_disconnect": "cancel"}, {"on_disconnect": "continue"},
], ids=str)
def test_every_option_takes_what_the_contract_says(client, options):
    job_id = ok(client.submit(**{"wait": 0, **options}), 202)["job_id"]
    view = client.view(job_id)
    assert view["queue"] == options.get("queue", "default")
    assert view["priority"] == options.get("priority", 0)
    assert view["attempts"] == options.get("attempts", 3)


BAD = [
    ("queue", "", "queue"), ("queue", "a b", "A-Z"), ("queue", "a/b", "A-Z"), ("queue", "x" * 65, "64"),
    ("queue", "ä", "A-Z"), ("queue", "a,b", "A-Z"), ("queue", "a\n", "A-Z"),
    ("priority", "10", "0 to 9"), ("priority", "-1", "0 to 9"), ("priority", "high", "0 to 9"),
    ("priority", "1.5", "0 to 9"), ("priority", "", "0 to 9"), ("priority", "１", "0 to 9"),
    ("delay", "-1", "0"), ("delay", "2592001", "2592000"), ("delay", "soon", "2592000"), ("delay", "nan", "2592000"),
    ("delay", "inf", "2592000"), ("delay", "1e3x", "2592000"), ("delay", "1_0", "2592000"),
    ("ttl", "-1", "ttl"), ("ttl", "nan", "ttl"), ("ttl", "never", "ttl"), ("ttl", "inf", "ttl"),
    ("lease", "0", "43200"), ("lease", "0.99", "43200"), ("lease", "43201", "43200"), ("lease", "x", "43200"),
    ("attempts", "0", "100"), ("attempts", "101", "100"), ("attempts", "2.5", "100"), ("attempts", "many", "100"),
    ("wait", "-1", "wait"), ("wait", "nan", "wait"), ("wait", "x", "wait"), ("wait", "inf", "wait"),
    ("on_disconnect", "maybe", "cancel"), ("on_disconnect", "", "cancel"),
    ("prioritty", "1", "priority"), ("timeout", "5", "wait"), ("lease_seconds", "5", "lease"), ("", "1", "queue"),
]


@pytest.mark.parametrize("name, value, names", BAD, ids=[f"{name}={value[:12]}" for name, value, _ in BAD])
def test_a_parameter_that_is_unknown_or_malformed_is_named_and_what_would_do(client, name, value, names):
    answer = call(client.url, "POST", "/api/submit?wait=0&" + _encoded(name, value) if name != "wait" else
                  "/api/submit?" + _encoded(name, value), b"{}")
    problem = check_problem(answer)
    assert (problem["status"], problem["code"]) == (400, "invalid_parameter")
    assert name in problem["detail"] and names in problem["detail"], problem["detail"]
    assert client.stats()["total"] == 0, "a refused job is not stored"


def _encoded(name, value):
    from urllib.parse import urlencode

    return urlencode({name: value})


@pytest.mark.parametrize("query", ["priority=1&priority=2", "priority", "%zz=1", "priority=%zz", "=", "queue=%ff"])
def test_a_query_that_cannot_be_read_is_refused(client, query):
    assert check_problem(call(client.url, "POST", f"/api/submit?wait=0&{query}", b"{}"))["status"] == 400
    assert client.stats()["total"] == 0


def test_an_empty_query_is_no_query(client):
    later(call, client.url, "POST", "/api/submit?", b"{}")
    wait_until(lambda: client.stats()["waiting_clients"] == 1)


@pytest.mark.parametrize("method, path", [
    ("GET", "/api/jobs"), ("GET", "/api/worker/poll"), ("POST", "/api/jobs"), ("DELETE", "/api/admin/clear"),
    ("GET", "/api/admin/stats"), ("POST", "/api/admin/pause"), ("GET", "/api/admin/next"),
])
def test_an_unknown_parameter_is_refused_on_every_route(client, method, path):
    job_id = client.put()
    problem = check_problem(call(client.url, method, f"{path}?nonsense=1", b"1\n" if method == "POST" else b"",
                                 NDJSON if method == "POST" else {}))
    assert problem["code"] == "invalid_parameter"
    assert "nonsense" in problem["detail"]
    assert client.status(job_id) == "pending"


# == Waiting, and not


@pytest.mark.parametrize("headers, options", [
    ({"Prefer": "respond-async"}, {}), ({}, {"wait": 0}), ({"Prefer": "wait=0"}, {}),
    ({"Prefer": "RESPOND-Async"}, {}), ({"Prefer": "foo=bar, respond-async; x=1"}, {}),
    ({"prefer": 'return=minimal,respond-async="" '}, {}),
], ids=str)
def test_who_does_not_wait_gets_a_202_with_the_id_and_where_to_look(client, headers, options):
    answer = later(client.submit, b"1", headers, **options).result(5)
    assert answer.status == 202
    assert answer.json() == {"job_id": answer.json()["job_id"], "status": "pending"}
    assert answer.headers["location"] == f"/api/jobs/{answer.json()['job_id']}"
    assert client.call("GET", answer.headers["location"]).json()["payload"] == 1


def test_the_preference_that_was_applied_is_said(client, clock, waiting):
    assert "respond-async" in client.submit(b"1", {"Prefer": "respond-async"}).headers["preference-applied"]
    assert "preference-applied" not in client.submit(b"1", wait=0).headers
    assert "preference-applied" not in client.submit(b"1", {"Prefer": "return=minimal"}, wait=0).headers
    held = later(client.submit, b"1", {"Prefer": "wait=7"})
    waiting(1)
    clock.advance(7 + BIT)
    assert held.result(10).headers["preference-applied"] == "wait=7"


@pytest.mark.parametrize("headers, options", [
    ({}, {"wait": 5}), ({"Prefer": "wait=5"}, {}), ({"Prefer": "respond-async, wait=5"}, {}),
    ({"Prefer": "wait=5, respond-async"}, {}), ({"Prefer": "x, wait=5; q=1"}, {}), ({"Prefer": "wait=5.0"}, {}),
], ids=str)
def test_within_its_wait_a_client_gets_the_result_else_the_202(client, worker, clock, waiting, headers, options):
    held = later(client.submit, b"1", headers, **options)
    waiting(1)
    clock.advance(5 - BIT)
    worker.complete(worker.poll(), b'"in time"')
    assert (held.result(10).status, held.result(10).json()["payload"]) == (200, "in time")

    held = later(client.submit, b"2", headers, **options)
    waiting(1)
    clock.advance(5 + BIT)
    answer = held.result(10)
    assert (answer.status, answer.json()["status"]) == (202, "pending")
    job = worker.poll()
    assert job.id == answer.json()["job_id"]
    worker.complete(job, b'"late"')
    assert client.call("GET", answer.headers["location"]).json()["result"] == "late", "the job went on"


def test_two_prefer_headers_are_one_list(server, client):
    stream = raw(server.url, b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                             b"Prefer: return=minimal\r\nPrefer: respond-async\r\nContent-Length: 2\r\n\r\n{}")
    assert stream.startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize("prefer", [
    "", "handling=lenient", "wait=soon", "wait", "respond-sync", ";;;,,=", 'x="respond-async"', "x; respond-async",
])
def test_a_preference_that_is_unknown_or_malformed_is_ignored(client, http_worker, prefer):
    """RFC 7240, section 2: a preference never makes a request fail."""
    held = client.hold(b"1", {"Prefer": prefer})
    http_worker.complete(http_worker.poll(), b'"done"')
    assert held.result(10).status == 200


@pytest.mark.parametrize("state", ["pending", "delayed", "processing"])
def test_the_202_says_where_the_job_stands(client, http_worker, clock, waiting, state):
    held = later(client.submit, b"1", wait=5, delay=60 if state == "delayed" else None)
    waiting(1)
    if state == "processing":
        http_worker.poll()
    clock.advance(5 + BIT)
    assert held.result(10).json()["status"] == state


def test_without_either_a_client_waits_as_long_as_it_takes(client, worker, clock, waiting):
    held = client.hold(delay=2 * DAY)
    clock.advance(2 * DAY - 1)
    waiting(1)
    assert not held.done()
    clock.advance(2)
    worker.complete(worker.poll(wait=300), b'"at last"')
    assert held.result(10).json()["payload"] == "at last"


# == Idempotency-Key


def key(text):
    return {"Idempotency-Key": text}


def test_a_key_attaches_to_a_job_that_runs_and_to_one_that_is_done(client, worker):
    answer = client.submit(b"work", key("k"), wait=0)
    assert "idempotent-replayed" not in answer.headers
    again = client.submit(b"work", key("k"), wait=0)
    assert (again.status, again.headers["idempotent-replayed"]) == (202, "true")
    assert again.json()["job_id"] == answer.json()["job_id"]
    assert again.headers["location"] == answer.headers["location"]
    held = client.hold(b"work", key("k"))
    worker.complete(worker.poll(), b'{"n": 1.0}')
    attached = held.result(10)
    assert (attached.status, attached.headers["idempotent-replayed"]) == (200, "true")
    replayed = client.submit(b"work", key("k"))
    assert replayed.body == attached.body
    assert members(replayed.body.decode())["payload"] == '{"n": 1.0}'
    assert client.stats()["total"] == 1


@pytest.mark.parametrize("other", [
    {"payload": b"other work"}, {"payload": b"work "}, {"queue": "other"}, {"payload": b'"work"'},
])
def test_a_key_with_another_payload_or_queue_is_refused(client, other):
    first = client.put(b"work", key("k"))
    answer = client.submit(other.pop("payload", b"work"), key("k"), wait=0, **other)
    problem = check_problem(answer)
    assert (problem["status"], problem["code"]) == (422, "key_reused")
    assert client.stats()["total"] == 1
    assert client.status(first) == "pending"


def test_other_options_and_headers_do_not_make_another_job(client):
    first = client.put(b"work", key("k"), priority=1)
    assert client.put(b"work", {**key("k"), "X-Trace-Id": "2"}, priority=5, ttl=60, queue="default") == first


def test_different_keys_are_different_jobs(client):
    ids = {client.put(b"work", key(text)) for text in ("k", "K", "k ", '"k"', "k-2", "ключ".encode().decode("latin-1"))}
    assert len(ids) in (5, 6), "spaces around a header's value are not a part of it"
    assert client.put(b"work") not in ids


def test_a_key_attaches_to_a_final_failure_too(client, worker, clock):
    held = client.hold(b"work", key("failed"))
    worker.fail(worker.poll(), "broken", retry=False)
    first = held.result(10)
    again = client.submit(b"work", key("failed"))
    assert (again.status, again.headers["idempotent-replayed"]) == (502, "true")
    assert again.json() == first.json()
    cancelled = client.put(b"work", key("cancelled"))
    client.cancel(cancelled)
    assert check_problem(client.submit(b"work", key("cancelled")))["job_id"] == cancelled
    client.put(b"work", key("expired"), ttl=5)
    clock.advance(6)
    assert client.submit(b"work", key("expired")).status == 504


def test_the_binary_payload_is_compared_too(client):
    first = client.put(b"\xff\x00", key("k"))
    assert client.put(b"\xff\x00", key("k")) == first
    assert client.submit(b"\xff\x01", key("k"), wait=0).status == 422


def test_a_key_of_a_cleared_queue_is_free(client):
    first = client.put(b"work", key("k"))
    client.call("DELETE", "/api/admin/clear")
    assert client.put(b"other", key("k")) != first


# == Ends without a result


def test_each_end_without_a_result_has_its_status_and_the_job(client, worker, clock):
    failed = client.hold(queue="failed")
    worker.fail(worker.poll(queue="failed"), "the worker's words", retry=False)
    expired = client.hold(queue="expired", ttl=5)
    clock.advance(6)
    cancelled = client.hold(queue="cancelled")
    client.cancel(client.call("GET", "/api/jobs", queue="cancelled").json()["jobs"][0]["job_id"])
    cleared = client.hold(queue="cleared")
    client.call("DELETE", "/api/admin/clear")
    for future, status, code in ((failed, 502, "job_failed"), (expired, 504, "job_expired"),
                                 (cancelled, 410, "job_cancelled"), (cleared, 410, "job_cleared")):
        problem = check_problem(future.result(10))
        assert (problem["status"], problem["code"]) == (status, code)
        assert problem["job_id"]
    assert "the worker's words" in failed.result().json()["detail"]


# == Many payloads at once


def submit_lines(client, body, headers=NDJSON, **options):
    return client.call("POST", "/api/jobs", body, headers, **options)


def test_a_payload_a_line_is_a_job_each_in_that_order(client, worker):
    lines = ['{"n": 1.0}', "12345678901234567890", '{"b": 1, "a": 2, "a": 3}', '"text"', "not JSON", "[1, 2]"]
    answer = submit_lines(client, "\n".join(lines) + "\n")
    assert answer.status == 202
    ids = answer.json()["job_ids"]
    assert set(answer.json()) == {"job_ids"}
    jobs = [worker.poll() for _ in lines]
    assert [job.id for job in jobs] == ids
    wanted = [json.dumps(line) if line == "not JSON" and worker.wire == "http" else line for line in lines]
    assert [job.payload for job in jobs] == wanted
    assert worker.poll() is None


@pytest.mark.parametrize("body, count", [("1\n2\n3", 3), ("1\n2\n3\n", 3), ("1\r\n2\r\n", 2), ("1", 1)])
def test_the_last_line_needs_no_end(client, body, count):
    assert len(ok(submit_lines(client, body), 202)["job_ids"]) == count


def test_only_a_line_feed_ends_a_line(client, http_worker):
    lines = ['"a\u2028b"', '"a\u2029b"', '"a\x85b"', '"a\x7fb"']
    assert len(ok(submit_lines(client, "\n".join(lines)), 202)["job_ids"]) == len(lines)
    assert [http_worker.poll().payload for _ in lines] == lines


def test_the_options_of_a_batch_hold_for_all_of_it(client, worker, clock):
    options = {"queue": "q", "priority": 7, "delay": 60, "ttl": 600, "lease": 20, "attempts": 2}
    ids = ok(submit_lines(client, "1\n2\n", **options), 202)["job_ids"]
    for job_id in ids:
        view = client.view(job_id)
        assert (view["queue"], view["priority"], view["status"], view["attempts"]) == ("q", 7, "delayed", 2)
    clock.advance(60 + BIT)
    job = worker.poll(queue="q", wait=300)
    assert (job.id, job.priority, job.lease_seconds) == (ids[0], 7, 20)
    assert job.expires_at == "2023-11-14T22:23:20.000000Z"


def test_the_media_type_of_a_batch_may_have_parameters(client):
    assert submit_lines(client, "1\n", {"Content-Type": "Application/X-NDJSON; charset=utf-8"}).status == 202


@pytest.mark.parametrize("headers", [{"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}])
def test_a_batch_of_another_type_is_refused(client, headers):
    problem = check_problem(submit_lines(client, "1\n", headers))
    assert (problem["status"], problem["code"]) == (415, "unsupported_media_type")
    assert "application/x-ndjson" in problem["detail"]
    assert client.stats()["total"] == 0


def test_a_batch_is_all_or_nothing(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, max_payload=10, max_jobs=5) as server:
        client = Client(server)
        too_large = submit_lines(client, "1\n2\n" + "x" * 11 + "\n4\n")
        assert check_problem(too_large)["code"] == "payload_too_large"
        assert client.stats()["total"] == 0
        too_many = submit_lines(client, "1\n" * 6)
        assert check_problem(too_many)["code"] == "queue_full"
        assert client.stats()["total"] == 0
        bad_option = submit_lines(client, "1\n2\n", priority=11)
        assert check_problem(bad_option)["code"] == "invalid_parameter"
        assert client.stats()["total"] == 0
        assert len(ok(submit_lines(client, "1\n" * 5), 202)["job_ids"]) == 5


def test_a_batch_may_be_larger_than_a_payload_but_not_than_its_own_limit(tmp_path, clock):
    settings = {"max_payload": 100, "max_batch": 1000}
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, **settings) as server:
        client = Client(server)
        assert len(ok(submit_lines(client, b'"' + b"x" * 90 + b'"\n' + b"1\n" * 400), 202)["job_ids"]) == 401
        problem = check_problem(submit_lines(client, b"1\n" * 501))
        assert (problem["status"], problem["code"]) == (413, "payload_too_large")
        problem = check_problem(submit_lines(client, b"1\n2\n" + b"3" * 101 + b"\n4\n"))
        assert problem["code"] == "payload_too_large" and "payload 3 has 101 bytes" in problem["detail"]
        assert client.stats()["total"] == 401


# == Looking at a job


def test_the_view_of_a_job_tells_its_story(client, worker, clock):
    job_id = client.put(b'{"n": 1.0}', {"X-Trace-Id": "t"}, priority=3, queue="q", attempts=5, ttl=600)
    view = client.view(job_id)
    assert view | {"headers": None} == {
        "job_id": job_id, "queue": "q", "status": "pending", "priority": 3, "attempt": view["attempt"], "attempts": 5,
        "deliveries": 0, "created_at": "2023-11-14T22:13:20.000000Z", "expires_at": "2023-11-14T22:23:20.000000Z",
        "payload": {"n": 1}, "headers": None,
    }
    assert view["headers"]["X-Trace-Id"] == "t"
    clock.advance(1)
    job = worker.poll(queue="q", worker="ann", lease=60)
    view = client.view(job_id)
    assert (view["status"], view["worker"], view["deliveries"]) == ("processing", "ann", 1)
    assert (view["attempt"], view["started_at"]) == (job.attempt, "2023-11-14T22:13:21.000000Z")
    assert view["lease_expires_at"] == "2023-11-14T22:14:21.000000Z"
    assert "result" not in view and "finished_at" not in view and "error" not in view
    clock.advance(1)
    worker.complete(job, b"2.0")
    text = client.call("GET", f"/api/jobs/{job_id}").body.decode()
    view = json.loads(text)
    assert (view["status"], view["finished_at"]) == ("completed", "2023-11-14T22:13:22.000000Z")
    assert members(text)["result"] == "2.0" and members(text)["payload"] == '{"n": 1.0}'
    assert "lease_expires_at" not in view and "error" not in view


def test_the_view_gives_no_lease_token_away(client, http_worker):
    job_id = client.put()
    token = http_worker.poll().token
    for path in (f"/api/jobs/{job_id}", "/api/jobs", "/api/admin/workers"):
        assert token not in client.call("GET", path).body.decode()


def test_a_delayed_job_says_when_it_is_available(client):
    assert client.view(client.put(delay=60))["available_at"] == "2023-11-14T22:14:20.000000Z"


def test_a_binary_payload_and_result_are_base64_in_the_view(client, worker):
    job_id = client.put(b"\xff\x00")
    worker.complete(worker.poll(), b"\xfe\x01")
    view = client.view(job_id)
    assert (view["payload"], view["payload_encoding"]) == ("/wA=", "base64")
    assert (view["result"], view["result_encoding"]) == ("/gE=", "base64")


ENDS = ["complete", "fail", "cancel", "expire", "lapse"]


def end(how, client, worker, clock, job_id):
    job = worker.poll() if how in ("complete", "fail", "lapse") else None
    if how == "complete":
        worker.complete(job, b'"done"')
    elif how == "fail":
        worker.fail(job, "broken", retry=False)
    elif how == "cancel":
        client.cancel(job_id)
    else:
        clock.advance(10 + BIT)


@pytest.mark.parametrize("how", ENDS)
def test_a_long_look_ends_with_the_job(client, worker, clock, how):
    job_id = client.put(attempts=1, lease=10, ttl=10 if how == "expire" else None)
    looks = [later(client.view, job_id, wait=100) for _ in range(3)]
    wait_until(lambda: client.stats()["waiting_clients"] == 3)
    assert not any(look.done() for look in looks)
    end(how, client, worker, clock, job_id)
    status = {"complete": "completed", "fail": "failed", "cancel": "cancelled", "expire": "expired", "lapse": "failed"}
    assert {look.result(10)["status"] for look in looks} == {status[how]}
    assert client.view(job_id, wait=100)["status"] == status[how], "a final job is shown at once"


def test_a_long_look_at_a_job_that_is_cleared_ends(client):
    job_id = client.put()
    look = later(client.call, "GET", f"/api/jobs/{job_id}", wait=100)
    wait_until(lambda: client.stats()["waiting_clients"] == 1)
    client.call("DELETE", "/api/admin/clear")
    assert look.result(10).status in (404, 410)


def test_when_the_wait_is_over_the_job_is_shown_as_it_stands(client, worker, clock, waiting):
    job_id = client.put()
    worker.poll()
    look = later(client.view, job_id, wait=100)
    waiting(1)
    clock.advance(100 + BIT)
    assert look.result(10)["status"] == "processing"


@pytest.mark.parametrize("path", ["/api/jobs/{}", "/api/jobs/{}/result"])
def test_an_unknown_job_cannot_be_looked_at(client, path):
    assert client.call("GET", path.format("%C3%A4")).status == 404
    for job_id in ("00000000-0000-4000-8000-000000000000", "x"):
        assert check_problem(client.call("GET", path.format(job_id)))["code"] == "job_not_found"
        assert check_problem(client.call("GET", path.format(job_id) + "?wait=100"))["code"] == "job_not_found"


# == The result's own bytes


@pytest.mark.parametrize("data, content_type", [
    (b"<script>alert(1)</script>", "text/html; charset=utf-8"), (b"\x89PNG\r\n\x1a\n\xff", "image/png"),
    (b'{"n": 1.0}', "application/json"), (b"%PDF-1.7 \xff", "application/pdf"), (b"a,b\n", "text/csv"),
])
def test_a_result_is_served_as_its_worker_named_it_and_runs_nothing(client, worker, data, content_type):
    client.put()
    job = worker.poll()
    worker.complete(job, data, content_type=content_type)
    for method in ("GET", "HEAD"):
        answer = client.call(method, f"/api/jobs/{job.id}/result")
        assert answer.status == 200
        assert answer.body == (data if method == "GET" else b"")
        assert answer.headers["content-length"] == str(len(data))
        assert answer.headers["content-type"] == content_type
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        assert "allow-scripts" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("content_type", ["text/html\r\nSet-Cookie: a=1", "text/html\nX: y", "a\0b", "ä/ö", "x" * 9000])
def test_a_content_type_cannot_smuggle_a_header(client, server, content_type):
    """Over HTTP such a header cannot be sent; over gRPC it is a string like any other."""
    worker = WORKERS["grpc"](server)
    client.put()
    job = worker.poll()
    try:
        worker.complete(job, b"done", content_type=content_type)
    except Refused as no:
        assert no.status == "INVALID_ARGUMENT", no
        worker.complete(job, b"done")
    answer = client.call("GET", f"/api/jobs/{job.id}/result")
    assert (answer.status, answer.body) == (200, b"done")
    assert not answer.headers.keys() & {"set-cookie", "x"}


def test_a_result_without_a_named_type_is_safe_to_look_at(client, worker):
    for data in (b"{}", b"<b>text</b>", b"\xff"):
        client.put()
        job = worker.poll()
        worker.complete(job, data)
        answer = client.call("GET", f"/api/jobs/{job.id}/result")
        assert answer.body == data
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "html" not in answer.headers.get("content-type", "")


def test_a_result_can_be_waited_for(client, worker, waiting):
    job_id = client.put()
    look = later(client.call, "GET", f"/api/jobs/{job_id}/result", wait=100)
    waiting(1)
    worker.complete(worker.poll(), b"done", content_type="text/plain")
    assert (look.result(10).status, look.result(10).body) == (200, b"done")


def test_there_is_no_result_of_a_job_that_has_none(client, worker, clock):
    def told(job_id):
        problem = check_problem(client.call("GET", f"/api/jobs/{job_id}/result"))
        assert problem["job_id"] == job_id
        return problem["status"], problem["code"], problem["detail"]

    for state, options in (("delayed", {"delay": 60}), ("pending", {})):
        job_id = client.put(**options)
        assert told(job_id) == (409, "job_not_finished", f"job {job_id} is {state}")
    job = worker.poll()
    assert told(job.id) == (409, "job_not_finished", f"job {job.id} is processing")
    worker.fail(job, "broken", retry=False)
    assert told(job.id) == (502, "job_failed", "broken")
    cancelled = client.put()
    client.cancel(cancelled)
    assert told(cancelled)[:2] == (410, "job_cancelled")
    expired = client.put(ttl=1)
    clock.advance(2)
    client.wait_status(expired, "expired")
    assert told(expired)[:2] == (504, "job_expired")


# == Listing


def listed(client, **parameters):
    answer = ok(client.call("GET", "/api/jobs", **parameters))
    assert set(answer) == {"jobs", "next"}
    return [job["job_id"] for job in answer["jobs"]], answer["next"]


def walk(client, between=lambda: None, **parameters):
    """All pages, one after the other."""
    found, after = [], None
    while True:
        page, after = listed(client, after=after, **parameters)
        found += page
        if after is None:
            return found
        between()


def test_a_listing_is_newest_first(client):
    ids = [client.put() for _ in range(5)]
    assert walk(client) == ids[::-1]


def test_a_listing_goes_page_by_page(client):
    ids = [client.put() for _ in range(7)]
    page, after = listed(client, limit=3)
    assert (page, after is not None) == (ids[:3:-1], True)
    assert walk(client, limit=3) == ids[::-1]
    assert walk(client, limit=1) == ids[::-1]


def test_a_cursor_is_stable_while_jobs_come_and_change(client, http_worker):
    ids = [client.put() for _ in range(9)]

    def meanwhile():
        client.put()
        http_worker.complete(http_worker.poll())

    assert walk(client, meanwhile, limit=2) == ids[::-1]


def test_a_listing_can_be_narrowed(client, worker, clock):
    wanted = {}
    for queue in ("a", "b"):
        wanted["delayed", queue] = client.put(queue=queue, delay=500)
        wanted["cancelled", queue] = client.put(queue=queue)
        client.cancel(wanted["cancelled", queue])
        wanted["expired", queue] = client.put(queue=queue, ttl=1)
    clock.advance(2)
    wait_until(lambda: client.stats()["expired"] == 2)
    for queue in ("a", "b"):
        wanted["failed", queue] = client.put(queue=queue)
        worker.fail(worker.poll(queue=queue), retry=False)
        wanted["completed", queue] = client.put(queue=queue)
        worker.complete(worker.poll(queue=queue))
        wanted["processing", queue] = client.put(queue=queue)
        worker.poll(queue=queue)
        wanted["pending", queue] = client.put(queue=queue)
    for (status, queue), job_id in wanted.items():
        assert walk(client, status=status, queue=queue) == [job_id]
        assert set(walk(client, status=status)) == {wanted[status, "a"], wanted[status, "b"]}
    assert len(walk(client, queue="a", limit=2)) == 7
    assert walk(client, queue="nothing-here") == []


def test_a_listed_job_has_neither_payload_nor_headers_nor_result(client, worker):
    client.put(b'"secret payload"')
    worker.complete(worker.poll(), b'"secret result"')
    answer = client.call("GET", "/api/jobs")
    (job,) = answer.json()["jobs"]
    assert not job.keys() & {"payload", "headers", "result", "payload_encoding", "result_encoding"}
    view = client.view(job["job_id"])
    assert job == {name: value for name, value in view.items() if name not in ("payload", "headers", "result")}


@pytest.mark.parametrize("name, value", [
    ("status", "running"), ("status", ""), ("status", "done"), ("queue", "a b"), ("limit", "0"), ("limit", "-1"),
    ("limit", "x"), ("after", "x"), ("after", "-1"),
])
def test_a_listing_names_what_it_cannot_read(client, name, value):
    problem = check_problem(client.call("GET", "/api/jobs", **{name: value}))
    assert problem["code"] == "invalid_parameter"
    assert name in problem["detail"]


def test_an_empty_listing_is_a_list(client):
    answer = client.call("GET", "/api/jobs")
    assert (answer.json(), elements(members(answer.body.decode())["jobs"])) == ({"jobs": [], "next": None}, [])


# == Retention


def finish(client, worker, count=1, **options):
    ids = []
    for _ in range(count):
        ids.append(client.put(**options))
        worker.complete(worker.poll(), b'"done"')
    return ids


def gone(client, job_id):
    return client.call("GET", f"/api/jobs/{job_id}").status == 404


def test_finished_jobs_are_kept_an_hour_and_failed_ones_seven_days(client, http_worker, clock):
    (completed,) = finish(client, http_worker)
    cancelled, failed = client.put(), client.put()
    client.cancel(cancelled)
    http_worker.fail(http_worker.poll(), "broken", retry=False)
    expired = client.put(ttl=1)
    pending = client.put(delay=1000)
    clock.advance(1 + BIT)
    client.wait_status(expired, "expired")
    clock.advance(HOUR - 2)
    for job_id in (completed, cancelled, failed, expired, pending):
        assert not gone(client, job_id)
    clock.advance(3)
    for job_id in (completed, cancelled, expired):
        wait_until(lambda job_id=job_id: gone(client, job_id))
    assert not gone(client, failed) and not gone(client, pending)
    assert client.call("GET", f"/api/jobs/{completed}/result").status == 404
    clock.advance(7 * DAY - HOUR - 10)
    assert client.view(failed)["error"] == "broken"
    clock.advance(20)
    wait_until(lambda: gone(client, failed))
    assert set(walk(client)) == {pending}, "the forgotten ones are not listed"


def test_how_long_finished_jobs_are_kept_is_a_setting(tmp_path, clock):
    settings = {"keep_completed": 10, "keep_failed": 20}
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, **settings) as server:
        client, worker = Client(server), WORKERS["http"](server)
        (completed,) = finish(client, worker)
        failed = client.put()
        worker.fail(worker.poll(), retry=False)
        clock.advance(10 - BIT)
        assert not gone(client, completed)
        clock.advance(2 * BIT)
        wait_until(lambda: gone(client, completed))
        assert not gone(client, failed)
        clock.advance(10)
        wait_until(lambda: gone(client, failed))


def test_only_so_many_finished_jobs_are_kept_the_oldest_go_first(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, keep_jobs=3) as server:
        client, worker = Client(server), WORKERS["http"](server)
        pending = client.put(queue="idle")
        ids = finish(client, worker, 5)
        wait_until(lambda: gone(client, ids[1]))
        assert [gone(client, job_id) for job_id in ids] == [True, True, False, False, False]
        assert not gone(client, pending)


def test_the_oldest_is_what_was_finished_first(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, keep_jobs=2) as server:
        client, worker = Client(server), WORKERS["http"](server)
        client.put()
        early = worker.poll()
        late = finish(client, worker, 2)
        worker.complete(early)
        wait_until(lambda: gone(client, late[0]))
        assert [gone(client, job_id) for job_id in (early.id, late[1])] == [False, False]


def test_only_so_many_bytes_of_finished_jobs_are_kept(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, keep_bytes=50_000) as server:
        client, worker = Client(server), WORKERS["http"](server)
        ids = [client.put(b'"' + b"x" * 20_000 + b'"') for _ in range(4)]
        for _ in ids:
            worker.complete(worker.poll())
        wait_until(lambda: gone(client, ids[1]))
        assert [gone(client, job_id) for job_id in ids] == [True, True, False, False]


def test_a_client_that_waits_gets_its_result_though_nothing_is_kept(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, keep_jobs=0) as server:
        client, worker = Client(server), WORKERS["http"](server)
        held = client.hold()
        job = worker.poll()
        worker.complete(job, b'"done"')
        assert held.result(10).json()["payload"] == "done"
        wait_until(lambda: gone(client, job.id))
        with refused("job_not_found", "job_finished"):
            worker.complete(job)


def test_retention_goes_on_where_it_was_after_a_restart(tmp_path):
    clock = FakeClock()
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock) as server:
        client, worker = Client(server), WORKERS["http"](server)
        (completed,) = finish(client, worker)
    clock = FakeClock(monotonic=7, wall=1_700_000_000 + HOUR - 60)
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock) as server:
        client = Client(server)
        assert not gone(client, completed)
        clock.advance(HOUR + 1)
        wait_until(lambda: gone(client, completed))


# == Connections


def test_many_submits_on_one_connection_are_answered_in_their_order(server, client):
    one = b"POST /api/submit?wait=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n"
    with connect(server.url) as connection:
        connection.sendall(b"".join(one + str(number).encode() for number in range(5)))
        stream = b""
        while stream.count(b'"job_id"') < 5:
            stream += connection.recv(65_536)
    ids = re.findall(rb'"job_id": ?"([^"]+)"', stream)
    assert [client.view(job_id.decode())["payload"] for job_id in ids] == list(range(5))


def test_a_held_submit_and_the_requests_behind_it_are_answered_in_order(server, client, http_worker):
    with connect(server.url) as connection:
        connection.sendall(b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"
                           b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        job = http_worker.poll(wait=300)
        http_worker.complete(job, b'"first"')
        stream = b""
        while chunk := connection.recv(65_536):
            stream += chunk
    first, second = re.findall(rb"HTTP/1.1 200 OK.*?\r\n\r\n(\{.*?\})", stream, re.DOTALL)
    assert b'"first"' in first and b'"ok"' in second


@pytest.mark.parametrize("end, code", [("ttl", "job_expired"), ("cancel", "job_cancelled"), ("clear", "job_cleared")])
def test_a_job_that_ends_otherwise_after_a_failed_attempt_tells_what_the_worker_said(client, worker, server, end, code):
    waiting = client.hold(**({"ttl": 5} if end == "ttl" else {}))
    job = worker.poll()
    worker.fail(job, "THE-ERROR", delay=30)
    if end == "ttl":
        server.clock.advance(6)
    elif end == "cancel":
        client.cancel(job.id)
    else:
        client.call("DELETE", "/api/admin/clear")
    problem = check_problem(waiting.result(10))
    assert (problem["code"], problem["job_id"]) == (code, job.id)
    assert "THE-ERROR" in problem["detail"] and "took" not in problem["detail"]


SUBMITTED = b"POST /api/submit?wait=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"


@pytest.mark.parametrize("before", [b"", SUBMITTED])
@pytest.mark.parametrize("lines", [1, 2])
def test_empty_lines_at_the_end_are_no_request_that_was_cut_short(server, before, lines):
    with connect(server.url) as connection:
        connection.sendall(before + b"\r\n" * lines)
        connection.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.count(b"HTTP/1.1 ") == said.count(b"HTTP/1.1 202 ") == bool(before)


def test_two_keys_are_none(client, server):
    request = b"POST /api/submit?wait=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
    answer = raw(server.url, request + b"Idempotency-Key: D\r\n" * 2 + b"\r\n1")
    assert answer.startswith(b"HTTP/1.1 400 ") and b"idempotency-key is given twice" in answer
    assert client.stats()["total"] == 0


def test_a_batch_of_jobs_takes_no_idempotency_key(client):
    answer = client.call("POST", "/api/jobs", b"1\n", {"Content-Type": "application/x-ndjson", "Idempotency-Key": "k"})
    assert answer.status == 400 and "Idempotency-Key" in check_problem(answer)["detail"]
    assert client.stats()["total"] == 0


def test_a_comma_within_quotes_does_not_end_a_preference(client):
    waiting = later(lambda: client.call("POST", "/api/submit", b"1", {"Prefer": 'foo="a, wait=0, respond-async"'}))
    job = WORKERS["http"](client.server).poll(wait=10)
    WORKERS["http"](client.server).complete(job, b"2")
    assert waiting.result(10).status == 200
