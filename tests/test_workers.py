"""What workers rely on, over both wires: polls, batches, completing with the next job in the same round trip."""

from __future__ import annotations

import base64
import dataclasses
import json

import pytest

import jobqueue
from support import wait_until
from wires import WORKERS, Client, Refused, at_once, check_problem, later, members, ok, refused

BIT = 0.01
NOWHERE = "00000000-0000-4000-8000-000000000000"
MIB = 1 << 20
MAX_PAYLOAD = 4_128_768


@pytest.fixture
def client(server):
    return Client(server)


@pytest.fixture(params=WORKERS)
def worker(request, server):
    return WORKERS[request.param](server)


@pytest.fixture
def http(server):
    return WORKERS["http"](server)


@pytest.fixture
def grpc(server):
    return WORKERS["grpc"](server)


# == One job


def test_a_job_says_all_that_a_worker_needs_to_know(client, worker, clock):
    job_id = client.put(b'{"n": 1.0}', {"Content-Type": "application/json"}, queue="q", priority=4, ttl=60)
    clock.advance(5)
    job = worker.poll(queue="q", lease=20)
    assert (job.id, job.payload, job.data) == (job_id, '{"n": 1.0}', None)
    assert job.headers["Content-Type"] == "application/json"
    assert (job.queue, job.priority, job.attempt, job.lease_seconds) == ("q", 4, 1, 20)
    assert job.created_at == "2023-11-14T22:13:20.000000Z"
    assert job.expires_at == "2023-11-14T22:14:20.000000Z"
    assert job.token


def test_both_wires_say_the_same_of_a_job(client, http, grpc):
    client.put(b'{"n": 1.0}', {"X-Trace-Id": "ä".encode().decode("latin-1")}, ttl=60, priority=2)
    first = http.poll(lease=30)
    http.release(first)
    second = grpc.poll(lease=30)
    assert first.token != second.token
    assert dataclasses.replace(first, token="") == dataclasses.replace(second, token="")


@pytest.mark.parametrize("name, value, names", [
    ("queue", "a b", "A-Z"), ("wait", "-1", "300"), ("wait", "301", "300"), ("wait", "soon", "300"),
    ("lease", "0", "43200"), ("lease", "43201", "43200"), ("max", "0", "max"), ("max", "-1", "max"),
    ("max", "x", "max"), ("max", "1.5", "max"), ("lease_seconds", "5", "lease"), ("worker", "a\nb", "worker"),
])
def test_a_malformed_poll_is_refused_and_takes_no_job(client, http, name, value, names):
    job_id = client.put()
    problem = check_problem(client.call("GET", "/api/worker/poll", **{name: value}))
    assert problem["code"] == "invalid_parameter"
    assert name in problem["detail"] and names in problem["detail"]
    assert client.status(job_id) == "pending"


@pytest.mark.parametrize("verb, name, value", [
    ("complete", "next", "maybe"), ("complete", "nxt", "true"), ("complete", "wait", "-1"), ("fail", "retry", "maybe"),
    ("fail", "delay", "-1"), ("fail", "delay", "2592001"), ("fail", "lease", "5"), ("release", "delay", "5"),
    ("extend", "lease", "0"), ("extend", "lease", "x"), ("extend", "wait", "5"),
])
def test_a_malformed_parameter_of_a_verb_changes_nothing(client, http, verb, name, value):
    client.put()
    job = http.poll()
    answer = client.call("POST", f"/api/worker/{verb}/{job.id}", b"", lease_token=job.token, **{name: value})
    problem = check_problem(answer)
    assert problem["code"] == "invalid_parameter"
    assert name in problem["detail"]
    assert client.status(job.id) == "processing"
    assert http.complete(job).duplicate is False


def test_numbers_that_are_none_are_refused_over_grpc(client, grpc):
    client.put()
    for value in (float("nan"), float("inf"), -1.0, 301.0):
        with refused("invalid_parameter"):
            grpc.poll(wait=value)
    for value in (float("nan"), float("inf"), -1.0, 0.5):
        with refused("invalid_parameter"):
            grpc.poll(lease=value)
    job = grpc.poll()
    with refused("invalid_parameter"):
        grpc.fail(job, delay=float("nan"))
    with refused("invalid_parameter"):
        grpc.extend(job, float("inf"))
    with refused("invalid_parameter"):
        grpc.poll_many(-1)
    assert grpc.complete(job).duplicate is False


# == Many jobs at once


def test_a_batch_holds_up_to_so_many_jobs_in_order(client, worker):
    ids = [client.put(queue="a" if number % 2 else "b") for number in range(6)]
    urgent = client.put(queue="b", priority=9)
    jobs = worker.poll_many(4, queue="b,a")
    assert [job.id for job in jobs] == [urgent, ids[0], ids[2], ids[4]]
    assert len({job.token for job in jobs}) == 4
    assert [job.id for job in worker.poll_many(100, queue="b,a")] == [ids[1], ids[3], ids[5]]
    assert worker.poll_many(100, queue="b,a") == []


def test_a_batch_of_one_is_still_a_list(client, worker):
    job_id = client.put()
    assert [job.id for job in worker.poll_many(1)] == [job_id]
    assert worker.poll_many(1) == []


def test_a_batch_over_http_without_jobs_is_an_empty_list_not_a_204(client):
    answer = client.call("GET", "/api/worker/poll", max=5)
    assert (answer.status, answer.json()) == (200, {"jobs": []})


def test_without_a_queue_a_batch_comes_from_default_alone(client, worker):
    client.put(queue="other")
    job_id = client.put()
    assert [job.id for job in worker.poll_many(10)] == [job_id]


def test_a_batch_does_not_wait_until_it_is_full(client, worker):
    polling = later(worker.poll_many, 10, wait=300)
    client.wait_workers(1)
    job_id = client.put()
    assert job_id in [job.id for job in polling.result(10)]


def test_each_job_of_a_batch_is_leased_on_its_own(client, worker, clock):
    for _ in range(3):
        client.put()
    jobs = worker.poll_many(3, lease=10)
    assert [job.lease_seconds for job in jobs] == [10] * 3
    worker.extend(jobs[0], 100)
    worker.complete(jobs[1])
    clock.advance(10 + BIT)
    client.wait_status(jobs[2].id, "pending")
    assert [client.status(job.id) for job in jobs[:2]] == ["processing", "completed"]


def test_payloads_in_a_batch_are_as_they_were_sent(client, worker):
    sent = [b'{"a": 1.0, "a": 2}', b"12345678901234567890", b"NaN", b"\xff\x00", b'"\\ud800"', b"", b"[[[1.0]]]"]
    for payload in sent:
        client.put(payload)
    jobs = worker.poll_many(10)
    for job, payload in zip(jobs, sent, strict=True):
        if payload == b"\xff\x00":
            assert job.data == payload
        elif payload == b"NaN":
            assert job.payload == ('"NaN"' if worker.wire == "http" else "NaN")
        else:
            assert job.payload.encode() == (payload or b'""')


# == A batch over gRPC fits a client's default message


def test_a_batch_over_grpc_ends_before_4_mib(client, grpc):
    ids = [client.put(json.dumps("x" * 1_500_000)) for _ in range(5)]
    got = []
    for expected in (2, 2, 1):
        message = grpc._call("RequestJobs", grpc._request(max=10))
        assert message.ByteSize() <= 4 * MIB
        assert len(message.jobs) == expected
        got += [(job.id, job.attempt) for job in message.jobs]
        waiting = ids[len(got):]
        assert [client.status(job_id) for job_id in waiting] == ["pending"] * len(waiting)
    assert got == [(job_id, 1) for job_id in ids]
    assert [client.view(job_id)["deliveries"] for job_id in ids] == [1] * 5


def test_many_small_jobs_over_grpc_fit_too(client, grpc):
    """What counts is the message: headers and all."""
    lines = b"\n".join(b'"' + b"y" * 4000 + b'"' for _ in range(1200))
    headers = {"Content-Type": "application/x-ndjson", "X-Long": "h" * 1000}
    ids = ok(client.call("POST", "/api/jobs", lines, headers), 202)["job_ids"]
    got = []
    while jobs := grpc.poll_many(1000):
        got += [job.id for job in jobs]
        grpc.complete_many(*[(job, b"1") for job in jobs])
    assert got == ids


@pytest.mark.parametrize("payload", [
    pytest.param(b'"' + b"x" * (MAX_PAYLOAD - 2) + b'"', id="json"), pytest.param(b"x" * MAX_PAYLOAD, id="text"),
    pytest.param(b"\xff" * MAX_PAYLOAD, id="binary"),
])
def test_the_largest_payload_with_the_largest_headers_fits_a_grpc_client(client, grpc, payload):
    headers = {f"X-Header-{number}": "h" * 1000 for number in range(31)}
    job_id = client.put(payload, headers)
    job = grpc.poll()
    assert job.id == job_id
    assert (job.data or job.payload.encode()) == payload
    grpc.complete(job, payload)
    assert client.result(job_id) == payload


def test_the_many_headers_of_the_largest_job_fit_a_grpc_client(client, grpc):
    """Each entry of a map costs some bytes of its own: many tiny headers are the worst case."""
    headers = {f"A{number:03x}": "" for number in range(3000)}
    answer = client.submit(b'"' + b"x" * (MAX_PAYLOAD - 2) + b'"', headers, wait=0)
    if answer.status == 202:
        assert grpc.poll().id == answer.json()["job_id"]
    else:
        assert check_problem(answer)["code"] in ("payload_too_large", "headers_too_large")


def test_a_large_next_job_over_grpc_is_no_job_lost(client, grpc):
    client.put()
    job = grpc.poll()
    big = client.put(b"x" * MAX_PAYLOAD, {"X-Header": "h" * 20_000})
    assert grpc.complete(job, next=True).next.id == big


def test_a_batch_over_http_has_no_such_end(client, http):
    ids = [client.put(json.dumps("x" * 1_500_000)) for _ in range(5)]
    assert [job.id for job in http.poll_many(10)] == ids


@pytest.mark.parametrize("wire", WORKERS)
def test_a_job_and_a_result_may_be_larger_than_a_batch(tmp_path, clock, wire):
    settings = {"port": 0, "grpc_port": 0, "clock": clock, "max_batch": 10_000, "max_payload": 500_000}
    with jobqueue.Server(data_dir=tmp_path, **settings) as server:
        client, worker = Client(server), WORKERS[wire](server)
        for text in ("x" * 500_000, "ä" * 250_000):
            held = client.hold(text.encode())
            job = worker.poll()
            assert job.payload.strip('"') == text
            worker.complete(job, text[::-1].encode())
            assert held.result(10).json()["payload"] == text[::-1]
        server.stop(drain=0)


@pytest.mark.parametrize(("byte", "written"), [(b"x", 1), (b"\xff", 4 / 3)], ids=["text", "binary"])
@pytest.mark.parametrize("wire", WORKERS)
def test_a_poll_for_many_gives_fewer_where_more_would_not_fit_a_batch(tmp_path, clock, wire, byte, written):
    """One at least, however large; the others stay in line, in order and uncounted."""
    settings = {"port": 0, "grpc_port": 0, "clock": clock, "max_batch": 10_000}
    with jobqueue.Server(data_dir=tmp_path, **settings) as server:
        client, worker = Client(server), WORKERS[wire](server)
        sizes = [4_000] * 6 + [30_000] + [4_000] * 2
        ids, got = [client.put(byte * size) for size in sizes], []
        while jobs := worker.poll_many(100):
            assert len(jobs) == 1 or sum(sizes[len(got) : len(got) + len(jobs)]) * written <= 10_000
            got += [(job.id, job.attempt) for job in jobs]
            waiting = ids[len(got) :]
            assert [client.status(job_id) for job_id in waiting] == ["pending"] * len(waiting)
            if len(jobs) > 1:
                assert len(jobs) < 6, "more than fit"
        assert got == [(job_id, 1) for job_id in ids]
        assert [client.view(job_id)["deliveries"] for job_id in ids] == [1] * len(ids)
        polling = later(worker.poll_many, 100, wait=300)
        client.wait_workers(1)
        job_id = client.put(b"y" * 30_000)
        assert [job.id for job in polling.result(10)] == [job_id]
        server.stop(drain=0)


# == Completing, and the next job in the same round trip


def test_the_next_job_comes_with_the_completion(client, worker):
    ids = [client.put() for _ in range(3)]
    job, done = worker.poll(), []
    while job is not None:
        done.append(job.id)
        job = worker.complete(job, b'"done"', next=True).next
    assert done == ids
    assert [client.status(job_id) for job_id in ids] == ["completed"] * 3


def test_no_next_job_is_said(client, http):
    client.put()
    job = http.poll()
    answer = client.call("POST", f"/api/worker/complete/{job.id}", b"", lease_token=job.token, next="true")
    assert answer.json() == {"message": "Job completed", "job_id": job.id, "next": None}


def test_without_next_no_job_is_taken(client, worker):
    client.put()
    other = client.put()
    assert worker.complete(worker.poll(), next=False).next is None
    assert client.status(other) == "pending"


def test_the_next_job_is_asked_for_as_in_a_poll(client, worker, clock):
    client.put()
    other, default = client.put(queue="b"), client.put()
    job = worker.complete(worker.poll(), next=True, queue="a,b", lease=20, worker="ann").next
    assert (job.id, job.queue, job.lease_seconds, job.attempt) == (other, "b", 20, 1)
    assert client.view(other)["worker"] == "ann"
    polling = later(lambda: worker.complete(job, next=True, queue="a,b", wait=100))
    client.wait_workers(1)
    assert client.status(other) == "completed", "the result is taken before the worker waits"
    clock.advance(100 + BIT)
    assert polling.result(10).next is None
    assert client.status(default) == "pending"


def test_the_client_gets_its_result_while_the_worker_waits_for_the_next_job(client, worker):
    held = client.hold()
    job = worker.poll()
    waiting = later(lambda: worker.complete(job, b'"done"', next=True, wait=300))
    assert held.result(10).json()["payload"] == "done"
    assert not waiting.done()
    job_id = client.put()
    assert waiting.result(10).next.id == job_id


def test_a_repeated_completion_gets_a_next_job_too(client, worker):
    """The answer to the first may have been lost."""
    client.put()
    second = client.put()
    job = worker.poll()
    worker.complete(job)
    again = worker.complete(job, next=True)
    assert (again.duplicate, again.next.id) == (True, second)


def test_a_refused_completion_takes_no_next_job(client, worker, clock):
    client.put()
    old = worker.poll(lease=10)
    clock.advance(10 + BIT)
    client.wait_status(old.id, "pending")
    worker.poll()
    waiting = client.put()
    with refused("lease_lost"):
        worker.complete(old, next=True)
    with refused("job_not_found"):
        worker.complete(NOWHERE, next=True)
    assert client.status(waiting) == "pending"
    assert worker.poll().attempt == 1


@pytest.mark.parametrize("options", [{"wait": 301}, {"lease": 0.5}, {"queue": "a b"}])
def test_a_malformed_wish_for_the_next_job_leaves_the_first_untouched(client, worker, options):
    client.put()
    job = worker.poll()
    with refused("invalid_parameter"):
        worker.complete(job, b'"x"', next=True, **options)
    assert client.status(job.id) == "processing"
    worker.complete(job, b'"y"')
    assert client.result(job.id) == b'"y"'


# == Many results at once


def test_many_results_are_answered_one_by_one_in_their_order(client, worker, clock):
    held = [client.hold(queue=name) for name in ("a", "b")]
    jobs = [worker.poll(queue=name) for name in ("a", "b")]
    client.put()
    finished = worker.poll()
    worker.complete(finished, b'"first"')
    client.put(queue="lost")
    lost = worker.poll(queue="lost", lease=10)
    clock.advance(10 + BIT)
    client.wait_status(lost.id, "pending")
    worker.poll(queue="lost")
    cancelled = client.put(queue="c")
    worker.poll(queue="c")
    client.cancel(cancelled)
    never = client.put(queue="never")
    said = worker.complete_many((jobs[1], b'"b"'), (NOWHERE, b"1"), (lost, b"1"), (jobs[0], b'"a"'), (finished, b"2"),
                                (never, b"1"), (cancelled, b"1"))
    assert said == [
        (jobs[1].id, 200, "", False), (NOWHERE, 404, "job_not_found", False), (lost.id, 409, "lease_lost", False),
        (jobs[0].id, 200, "", False), (finished.id, 200, "", True), (never, 409, "job_not_leased", False),
        (cancelled, 409, "job_finished", False),
    ]
    assert [future.result(10).json()["payload"] for future in held] == ["a", "b"]
    assert client.result(finished.id) == b'"first"'
    assert client.status(never) == "pending"


def test_one_result_twice_in_a_batch_is_a_duplicate(client, worker):
    client.put()
    job = worker.poll()
    said = worker.complete_many((job, b'"first"'), (job, b'"second"'))
    assert said == [(job.id, 200, "", False), (job.id, 200, "", True)]
    assert client.result(job.id) == b'"first"'


def test_results_without_tokens_are_taken_as_the_originals_are(client, worker):
    ids = [client.put() for _ in range(3)]
    jobs = worker.poll_many(3)
    assert [each[:2] for each in worker.complete_many(*[(job.id, b'"x"') for job in jobs])] == [(i, 200) for i in ids]


RESULTS = [b'{"a": 1.0, "a": 2}', b"12345678901234567890", b'[ 1 ,\t2 ]', b"1e400", b'"\\ud800"', b"plain", b"NaN",
           b"\xff\x00", "ä\u2028".encode(), b'"text"', b"null", b'{"lease_token": "x", "payload": 1}']


def test_results_in_a_batch_arrive_as_they_were_handed_in(client, worker):
    ids = [client.put() for _ in RESULTS]
    jobs = worker.poll_many(len(RESULTS))
    said = worker.complete_many(*zip(jobs, RESULTS, strict=True))
    assert [each[:2] for each in said] == [(job_id, 200) for job_id in ids]
    for job_id, result in zip(ids, RESULTS, strict=True):
        # In JSON a text is a string: that is what a result over HTTP is, where it stands inside of a batch.
        wanted = result if worker.wire == "grpc" or result not in (b"plain", b"NaN", "ä\u2028".encode()) else None
        text = client.call("GET", f"/api/jobs/{job_id}").body.decode()
        if result == b"\xff\x00":
            assert base64.b64decode(json.loads(members(text)["result"])) == result
        elif wanted is None or result in (b"plain", b"NaN", "ä\u2028".encode()):
            assert json.loads(members(text)["result"]) == result.decode()
        else:
            assert members(text)["result"].encode() == result


def batch(client, body, headers=None):
    return client.call("POST", "/api/worker/complete", body, headers or {"Content-Type": "application/json"})


def test_a_batch_reads_json_with_its_members_in_any_order_and_spaces(client, http):
    ids = [client.put(), client.put()]
    jobs = http.poll_many(2)
    body = ('\n{ "results" :\t[ {"payload" : {"results": [1.0 ]} ,"lease_token":"T0", "job_id":"J0"} ,\r\n'
            '{"job_\\u0069d": "J1", "payload":"\\u00e9\\/" , "lease_token": "T1"}] }\n')
    for number, job in enumerate(jobs):
        body = body.replace(f"T{number}", job.token).replace(f"J{number}", job.id)
    answer = batch(client, body)
    assert answer.json() == {"results": [{"job_id": job_id, "status": 200} for job_id in ids]}
    texts = [client.call("GET", f"/api/jobs/{job_id}").body.decode() for job_id in ids]
    assert members(texts[0])["result"] == '{"results": [1.0 ]}'
    assert json.loads(members(texts[1])["result"]) == "é/"


def test_the_answers_to_a_batch_have_the_agreed_shape(client, http):
    client.put()
    job = http.poll()
    http.complete(job)
    body = json.dumps({"results": [{"job_id": job.id, "lease_token": job.token, "payload": 1},
                                   {"job_id": NOWHERE, "payload": 1}]})
    answer = batch(client, body)
    assert answer.status == 200
    assert answer.json() == {"results": [{"job_id": job.id, "status": 200, "duplicate": True},
                                         {"job_id": NOWHERE, "status": 404, "code": "job_not_found"}]}


def test_an_empty_batch_of_results_is_answered_by_one(client, worker):
    assert worker.complete_many() == []


BROKEN = [
    "", "x", "{}", "[]", "null", '{"results": {}}', '{"results": null}', '{"results": "x"}', '{"results": [1]}',
    '{"results": [null]}', '{"results": [{}]}', '{"results": [{"payload": 1}]}',
    '{"results": [{"job_id": 1, "payload": 1}]}',
    '{"results": [{"job_id": "ID", "payload": NaN}]}', '{"results": [{"job_id": "ID", "payload": 01}]}',
    '{"results": [{"job_id": "ID", "payload": 1}', '{"results": [{"job_id": "ID", "payload": 1}]} x',
    '{"results": [{"job_id": "ID", "payload": 1},]}', '{"results": [{"job_id": "ID", "payload": }]}',
    '{"results": [{"job_id": "ID", "payload": 1, "lease_token": 5}]}',
    '{"results": [{"job_id": "ID", "payload": "%%%", "payload_encoding": "base64"}]}',
    '{"results": [{"job_id": "ID", "payload": "AA", "payload_encoding": "base64"}]}',
    '{"results": [{"job_id": "ID", "payload": 1, "payload_encoding": "base64"}]}',
    '{"results": [{"job_id": "ID", "payload": "AA==", "payload_encoding": "rot13"}]}',
    '{"results": [{"job_id": "ID", "payload": 1}, {"job_id": null, "payload": 1}]}',
    '{"results": [{"job_id": "ID", 1: 2}]}', '{"results": [{"job_id": "ID", null: 2}]}',
    '{"results": [{"job_id": "ID" "payload": 1}]}', '{"results": [{"job_id": "ID"; "payload": 1}]}',
    '{"results": [{"job_id": "ID", "payload": 1;}]}', '{"results": [{"job_id": "ID", "payload": 1,}]}',
    '{"results": [{"job_id": "ID", "other": 1}]}', '{"results": [{"job_id": "ID"}], "more": 1}',
    '{"more": 1, "results": [{"job_id": "ID"}]}', '{"results": [{"job_id": "ID", "lease_token": "\x01"}]}',
    '{"results": [{"job_id": "ID", "lease_token": "\\x"}]}', '{"results": [{"job_id": "\\ud800"}]}',
    '{"results": [{,"job_id": "ID"}]}',
    # Half a surrogate pair is quoted as it was sent.
    '{"results": [{"\\ud800": 1}]}', '{"results": [{"job_id": "ID", "\\ud800": 1}]}', '{"\\ud800": []}',
    '{"results": [{"job_id": "ID", "\\udfff": 1, "\\udfff": 2}]}',
    '{"results": [{"job_id": "ID", "payload": "\\ud800", "payload_encoding": "base64"}]}',
    '{"results": [{"job_id": "ID", "payload": 1, "payload_encoding": "\\ud800"}]}',
    '{"results": [{"job_id": "ID", "lease_token": ["\\ud800"]}]}',
    '{"results": [{"job_id": "ID", "payload": 1, "payload": 2}]}', '{"results": [{"job_id": "ID", "job_id": "ID"}]}',
    '{"results": [{"payload": 1, "job_id": "ID", "p\\u0061yload": 1}]}',
]


@pytest.mark.parametrize("body", BROKEN)
def test_a_batch_that_cannot_be_read_is_refused_whole(client, http, body):
    client.put()
    job = http.poll()
    problem = check_problem(batch(client, body.replace("ID", job.id)))
    assert problem["status"] == 400
    assert problem["code"] in ("invalid_request", "invalid_parameter")
    assert client.status(job.id) == "processing", "none of it was taken"
    assert http.complete(job).duplicate is False


def test_a_row_with_hundreds_of_members_is_refused_in_a_few_words(client, http):
    client.put()
    job = http.poll()
    row = {"job_id": job.id, "payload": 1} | {f"m{number}": number for number in range(500)}
    answer = batch(client, json.dumps({"results": [row]}))
    assert check_problem(answer)["code"] == "invalid_request"
    assert len(answer.body) < 1000
    assert client.status(job.id) == "processing"


def test_a_batch_takes_10_000_results_and_with_one_more_none_of_them(client, worker):
    client.put()
    job = worker.poll()
    nobodys = [(NOWHERE, b"1")] * 9_999
    with refused("invalid_request") as no:
        worker.complete_many((job, b"1"), (NOWHERE, b"1"), *nobodys)
    assert "10000" in no.value.detail
    assert client.status(job.id) == "processing"
    said = worker.complete_many((job, b"1"), *nobodys)
    assert [status for _, status, *_ in said] == [200] + [404] * 9_999
    assert client.result(job.id) == b"1"


def test_a_batch_that_is_not_utf_8_is_refused(client):
    assert check_problem(batch(client, b'{"results": [{"job_id": "\xff", "payload": 1}]}'))["code"] == "invalid_request"


def test_a_result_too_large_is_refused_wherever_it_stands(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=0, clock=clock, max_payload=100) as server:
        client = Client(server)
        for kind in WORKERS.values():
            worker = kind(server)
            client.put()
            job = worker.poll()
            with refused("payload_too_large"):
                worker.complete(job, b"x" * 101)
            try:
                (said,) = worker.complete_many((job, b"x" * 101))
                assert said[1:3] == (413, "payload_too_large")
            except Refused as no:
                assert no.status in (413, "RESOURCE_EXHAUSTED")
            with refused("payload_too_large"):
                worker.fail(job, "x" * 101)
            assert client.status(job.id) == "processing"
            worker.complete(job, b"x" * 100)


def test_the_largest_result_is_taken(client, worker):
    client.put()
    job = worker.poll()
    worker.complete(job, b"x" * MAX_PAYLOAD)
    assert len(client.result(job.id)) == MAX_PAYLOAD
    client.put()
    job = worker.poll()
    with refused("payload_too_large"):
        worker.complete(job, b"x" * (MAX_PAYLOAD + 1))
    assert client.status(job.id) == "processing"


def test_an_error_that_is_no_text_is_taken_and_kept_to_65_536_characters(client, http):
    client.put()
    job = http.poll()
    path = f"/api/worker/fail/{job.id}"
    answer = client.call("POST", path, b"\xff" * 2_000_000, lease_token=job.token, retry="false")
    assert ok(answer)["status"] == "failed"
    assert 1_000 <= len(client.view(job.id)["error"]) <= 65_536


# == Both wires at once


def test_what_one_wire_hands_out_the_other_may_end(client, http, grpc):
    for first, second in ((http, grpc), (grpc, http)):
        client.put()
        job = first.poll()
        assert second.extend(job, 60).status == "processing"
        second.release(job)
        job = second.poll()
        assert first.fail(job, delay=0).status == "pending"
        job = first.poll()
        second.complete(job, b'"done"')
        assert first.complete(job, b'"again"').duplicate is True
        assert client.result(job.id) == b'"done"'


def test_a_completion_over_both_wires_at_once_has_one_winner(client, http, grpc):
    for _ in range(10):
        client.put()
        job = http.poll()
        said = at_once(lambda job=job: http.complete(job, b'"http"'), lambda job=job: grpc.complete(job, b'"grpc"'))
        assert sorted(each.duplicate for each in said) == [False, True]
        assert client.result(job.id) == (b'"grpc"' if said[0].duplicate else b'"http"')


# == Who works


def test_workers_are_known_by_name(client, worker):
    client.put()
    client.put()
    job = worker.poll(queue="default,other", worker="ann")
    worker.complete(job)
    worker.fail(worker.poll(worker="ann"), retry=False)
    waiting = later(worker.poll, worker="bob", queue="idle", wait=300)
    client.wait_workers(1)
    known = {each["worker"]: each for each in ok(client.call("GET", "/api/admin/workers"))["workers"]}
    assert {"ann", "bob"} <= set(known)
    ann, bob = known["ann"], known["bob"]
    assert (ann["completed"], ann["failed"], ann["jobs_running"]) == (1, 1, 0)
    assert ann["last_seen"] == "2023-11-14T22:13:20.000000Z"
    assert bob["queues"] == ["idle"]
    assert bob["waiting"]
    client.put(queue="idle")
    assert waiting.result(10) is not None
    wait_until(lambda: {each["worker"]: each["jobs_running"]
                        for each in client.call("GET", "/api/admin/workers").json()["workers"]}["bob"] == 1)


def test_a_result_over_grpc_is_text_or_bytes_and_not_both(server):
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    client, worker = Client(server), WORKERS["grpc"](server)
    client.put()
    job = worker.poll()
    with pytest.raises(grpc.RpcError) as error:
        worker.stub.CompleteJob(worker.pb.JobResult(job_id=job.id, payload="a", payload_bytes=b"b"), timeout=10)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.status(job.id) == "processing"


@pytest.mark.parametrize("wire", WORKERS)
def test_results_of_a_batch_are_served_as_their_worker_named_them(server, wire):
    if wire == "grpc":
        pytest.importorskip("grpc", reason="grpcio is not installed")
    client, worker = Client(server), WORKERS[wire](server)
    client.put()
    job = worker.poll()
    if wire == "grpc":
        results = worker.pb.JobResults(results=[worker.pb.JobResult(
            job_id=job.id, lease_token=job.token, payload_bytes=b"\x89PNG\xff", content_type="image/png")])
        assert worker.stub.CompleteJobs(results, timeout=10).results[0].status == 200
    else:
        row = {"job_id": job.id, "lease_token": job.token, "payload": base64.b64encode(b"\x89PNG\xff").decode(),
               "payload_encoding": "base64", "content_type": "image/png"}
        assert ok(client.call("POST", "/api/worker/complete", json.dumps({"results": [row]})))
    answer = client.call("GET", f"/api/jobs/{job.id}/result")
    assert (answer.body, answer.headers["content-type"]) == (b"\x89PNG\xff", "image/png")


@pytest.mark.parametrize("deep", [b"[" * 1200 + b"]" * 1200, b'{"a":' * 50_000 + b"1" + b"}" * 50_000])
def test_a_deeply_nested_result_in_a_batch_is_taken_and_so_are_the_others(server, deep):
    client, worker = Client(server), WORKERS["http"](server)
    ids = [client.put() for _ in range(3)]
    jobs = worker.poll_many(3)
    rows = [b'{"job_id":"%b","lease_token":"%b","payload":%b}' % (job.id.encode(), job.token.encode(), payload)
            for job, payload in zip(jobs, (b"1", deep, b"3"), strict=True)]
    answer = ok(client.call("POST", "/api/worker/complete", b'{"results":[%b]}' % b",".join(rows)))
    assert [row["status"] for row in answer["results"]] == [200] * 3
    assert [client.result(job_id) for job_id in ids] == [b"1", deep, b"3"]
    for bad in (deep[:-1], deep + b"]", b"[" * 1200):
        assert client.call("POST", "/api/worker/complete", b'{"results":[{"payload":%b}]}' % bad).status == 400


def test_an_empty_lease_token_is_none_over_http_as_over_grpc(server):
    client, worker = Client(server), WORKERS["http"](server)
    ids = [client.put() for _ in range(2)]
    worker.poll_many(2)
    assert ok(client.call("POST", f"/api/worker/complete/{ids[0]}?lease_token=", b"1"))
    rows = {"results": [{"job_id": ids[1], "lease_token": "", "payload": 2}]}
    assert ok(client.call("POST", "/api/worker/complete", json.dumps(rows)))["results"][0]["status"] == 200


@pytest.mark.parametrize("text", ["x" * 20_000, "é" * 4_000])
def test_an_error_over_grpc_that_quotes_something_long_is_still_that_error(server, text):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    worker = WORKERS["grpc"](server)
    with refused("job_not_found"):
        worker.fail(text, "e", token="t")
    with refused("invalid_parameter"):
        worker.poll(queue=text)


def test_a_poll_says_which_strings_are_text_and_which_are_json(server):
    client, worker = Client(server), WORKERS["http"](server)
    for payload, kind in ((b"hello", "text"), (b'"hello"', None), (b"{}", None), (b"\xff", None)):
        client.put(payload)
        job = ok(client.call("GET", "/api/worker/poll"))
        assert job.get("payload_kind") == kind
        worker.complete(job["job_id"], b"1")


def test_a_poll_has_at_most_a_hundred_queues(client, worker):
    names = [f"q{number}" for number in range(101)]
    with refused("invalid_parameter") as no:
        worker.poll(queue=",".join(names))
    assert "100" in no.value.detail and "101" in no.value.detail
    job_id = client.put(queue="q99")
    assert worker.poll(queue=",".join([*names[:100], "q7"])).id == job_id  # a name twice is one
