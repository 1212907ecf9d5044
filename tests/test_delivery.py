"""Delivery: leases, fencing, retries, order, waiting, and every race in every order, over both wires."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import jobqueue
from support import ROOT, FakeClock, call, connect, freeze, wait_until
from wires import WORKERS, Client, Got, Refused, at_once, check_problem, later, ok, refused

MONTH = 30 * 86_400
NOWHERE = "00000000-0000-4000-8000-000000000000"
BIT = 0.01  # seconds past a moment, or before it
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see a process stand still by")


@pytest.fixture
def client(server):
    return Client(server)


@pytest.fixture(params=WORKERS)
def worker(request, server):
    return WORKERS[request.param](server)


@pytest.fixture
def lapse(client, clock):
    """lapse(job): let its lease run out, and wait until the server has seen it."""

    def run_out(job: Got, becomes: str = "pending") -> None:
        clock.advance(job.lease_seconds + BIT)
        client.wait_status(job.id, becomes)

    return run_out


def outcome(call, *arguments, **named):
    """What a call came to: "done", "duplicate" or the code of the refusal."""
    try:
        said = call(*arguments, **named)
    except Refused as no:
        return no.code
    return "duplicate" if said is True or getattr(said, "duplicate", False) else "done"


# == 1. At least once; one visible result


def test_a_job_is_handed_to_one_worker_at_a_time(client, worker):
    client.put()
    assert worker.poll() is not None
    assert worker.poll() is None


def test_many_pollers_share_the_jobs_and_none_is_handed_out_twice(server, client):
    jobs = {client.put(str(number).encode()) for number in range(60)}

    def take_all(worker):
        taken = []
        while (job := worker.poll()) is not None:
            taken.append(job.id)
        return taken

    workers = [kind(server) for kind in WORKERS.values() for _ in range(4)]
    taken = at_once(*[lambda worker=worker: take_all(worker) for worker in workers])
    assert sorted(itertools.chain(*taken)) == sorted(jobs)


def test_a_job_that_nobody_ends_is_handed_out_until_its_attempts_are_used_up(client, worker, lapse):
    job_id = client.put(attempts=4, lease=10)
    for attempt in range(1, 5):
        job = worker.poll()
        assert (job.id, job.attempt) == (job_id, attempt)
        lapse(job, "pending" if attempt < 4 else "failed")
    assert worker.poll() is None
    view = client.view(job_id)
    assert view["error"]
    assert (view["attempts"], view["deliveries"]) == (4, 4)


def test_each_delivery_has_a_token_of_its_own(client, worker, lapse):
    client.put(lease=10)
    tokens = set()
    for _ in range(3):
        job = worker.poll()
        tokens.add(job.token)
        lapse(job, "pending" if job.attempt < 3 else "failed")
    assert len(tokens) == 3
    assert all(tokens)


# == 2. Lease


def test_a_lease_is_300_seconds_by_default(client, worker, clock):
    job_id = client.put()
    job = worker.poll()
    assert job.lease_seconds == 300
    clock.advance(300 - BIT)
    assert worker.poll() is None
    assert client.status(job_id) == "processing"
    clock.advance(2 * BIT)
    assert worker.poll(wait=300).id == job_id


@pytest.mark.parametrize("of_poll, of_job, granted", [
    (None, None, 300), (None, 20, 20), (30, None, 30), (30, 20, 30), (43_200, 1, 43_200), (1, 43_200, 1),
    (None, 1.5, 1.5),
])
def test_the_lease_is_the_polls_else_the_jobs_else_the_servers(client, worker, clock, of_poll, of_job, granted):
    job_id = client.put(lease=of_job)
    job = worker.poll(**({"lease": of_poll} if of_poll else {}))
    assert job.lease_seconds == granted
    clock.advance(granted - BIT)
    assert worker.poll() is None
    clock.advance(2 * BIT)
    assert worker.poll(wait=300).id == job_id


def test_the_servers_lease_is_a_setting(tmp_path, clock):
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, lease=7, clock=clock) as server:
        Client(server).put()
        assert WORKERS["http"](server).poll().lease_seconds == 7
        server.stop(drain=0)


@pytest.mark.parametrize("lease", [0.5, 43_201, -1])
def test_a_lease_out_of_range_is_refused_and_takes_no_job(client, worker, lease):
    job_id = client.put()
    with refused("invalid_parameter") as no:
        worker.poll(lease=lease)
    assert "lease" in no.value.detail and "43200" in no.value.detail
    job = worker.poll()
    with refused("invalid_parameter"):
        worker.extend(job, lease)
    assert (job.id, job.attempt) == (job_id, 1)


def test_a_lapsed_job_is_back_in_its_old_place_and_has_one_attempt_less(client, worker, lapse):
    first, second = client.put(lease=10), client.put()
    job = worker.poll()
    lapse(job)
    again = worker.poll()
    assert (again.id, again.attempt) == (first, 2)
    assert client.view(first)["deliveries"] == 2
    assert worker.poll().id == second


def test_the_client_learns_that_the_last_lease_ran_out(client, worker, lapse):
    held = client.hold(attempts=1, lease=10)
    job = worker.poll()
    lapse(job, "failed")
    problem = check_problem(held.result(10))
    assert (problem["status"], problem["code"], problem["job_id"]) == (502, "job_failed", job.id)
    assert "lease" in problem["detail"]


def test_the_view_shows_the_worker_and_the_lease(client, worker):
    job_id = client.put()
    assert "lease_expires_at" not in client.view(job_id)
    worker.poll(worker="ann", lease=60)
    view = client.view(job_id)
    assert (view["status"], view["worker"], view["deliveries"]) == ("processing", "ann", 1)
    assert view["started_at"] == "2023-11-14T22:13:20.000000Z"


# == 3. Fencing


def test_the_same_token_again_is_a_duplicate_and_changes_nothing(client, worker, clock):
    client.put()
    job = worker.poll()
    assert worker.complete(job, b'"first"').duplicate is False
    for late in (b'"first"', b'"second"'):
        clock.advance(1)
        assert worker.complete(job, late).duplicate is True
    assert client.result(job.id) == b'"first"'
    finished = client.view(job.id)["finished_at"]
    assert finished == "2023-11-14T22:13:20.000000Z"


def test_a_failure_or_a_release_told_twice_is_a_duplicate(client, worker):
    client.put(attempts=5)
    job = worker.poll()
    first = worker.fail(job, "no", delay=0)
    assert (first.status, first.duplicate) == ("pending", False)
    assert worker.fail(job, "no", delay=0).duplicate is True
    job = worker.poll()
    assert job.attempt == 2, "the repetition is not counted"
    assert worker.release(job) is False
    assert worker.release(job) is True
    assert worker.poll().attempt == 2


def test_a_final_failure_told_twice_is_a_duplicate(client, worker):
    client.put()
    job = worker.poll()
    assert worker.fail(job, "no", retry=False).status == "failed"
    again = worker.fail(job, "no", retry=False)
    assert (again.status, again.duplicate) == ("failed", True)


def test_a_worker_that_failed_or_released_a_job_cannot_complete_it(client, worker):
    for verb in ("fail", "release"):
        client.put()
        job = worker.poll()
        getattr(worker, verb)(job)
        with refused("lease_lost", "job_not_leased"):
            worker.complete(job, b'"late"')
        client.cancel(job.id)


@pytest.mark.parametrize("verb", ["complete", "fail", "release", "extend"])
class TestFencing:
    def test_a_late_worker_is_accepted_while_nobody_else_has_the_job(self, client, worker, lapse, verb):
        client.put()
        job = worker.poll(lease=10)
        lapse(job)
        assert outcome(getattr(worker, verb), job) == "done"

    def test_a_worker_that_lost_its_lease_to_another_is_refused(self, client, worker, lapse, verb):
        client.put()
        old = worker.poll(lease=10)
        lapse(old)
        new = worker.poll()
        with refused("lease_lost") as no:
            getattr(worker, verb)(old)
        assert old.id in no.value.detail
        assert client.status(new.id) == "processing"
        assert outcome(worker.complete, new) == "done"

    def test_a_lost_lease_stays_lost_when_the_other_loses_it_too(self, client, worker, lapse, verb):
        client.put()
        old = worker.poll(lease=10)
        lapse(old)
        new = worker.poll(lease=10)
        lapse(new)
        with refused("lease_lost"):
            getattr(worker, verb)(old)
        assert outcome(getattr(worker, verb), new) == "done"

    def test_a_final_job_is_finished_for_everybody_else(self, client, worker, lapse, verb):
        client.put()
        old = worker.poll(lease=10)
        lapse(old)
        worker.complete(worker.poll(), b'"new"')
        for token in (None, "", "made-up"):
            with refused("job_finished") as no:
                getattr(worker, verb)(old, token=token)
            assert old.id in no.value.detail
        assert client.result(old.id) == b'"new"'

    def test_an_unknown_job_is_not_found(self, worker, verb):
        for token in ("", "made-up"):
            with refused("job_not_found"):
                getattr(worker, verb)(NOWHERE, token=token)

    def test_a_made_up_token_is_refused(self, client, worker, verb):
        client.put()
        job = worker.poll()
        with refused("lease_lost"):
            getattr(worker, verb)(job, token="made-up")
        assert client.status(job.id) == "processing"

    def test_a_job_that_was_never_handed_out_is_not_leased(self, client, worker, verb):
        for job_id in (client.put(), client.put(delay=60)):
            with refused("job_not_leased"):
                getattr(worker, verb)(job_id)
            assert client.status(job_id) in ("pending", "delayed")

    def test_a_token_is_no_key_to_a_job_that_was_never_handed_out(self, client, worker, verb):
        other = client.put()
        job = worker.poll()
        job_id = client.put()
        assert job.id == other
        with refused("job_not_leased", "lease_lost"):
            getattr(worker, verb)(job_id, token=job.token)
        assert client.status(job_id) == "pending"

    def test_without_a_token_it_is_accepted_while_the_job_is_processing(self, client, worker, verb):
        client.put()
        assert outcome(getattr(worker, verb), worker.poll().id) == "done"

    def test_without_a_token_it_is_accepted_after_the_lease_ran_out(self, client, worker, lapse, verb):
        client.put()
        job = worker.poll(lease=10)
        lapse(job)
        assert outcome(getattr(worker, verb), job.id) == "done"

    def test_without_a_token_it_is_refused_when_the_job_was_failed_or_released(self, client, worker, verb):
        for ended in ("fail", "release"):
            client.put()
            job = worker.poll()
            getattr(worker, ended)(job)
            with refused("job_not_leased"):
                getattr(worker, verb)(job.id)
            client.cancel(job.id)


# == 4. Never handed to a worker that is gone


def poller(server, **options):
    """A long poll on a socket of its own."""
    connection = connect(server.url)
    given = "&".join(f"{name}={value}" for name, value in {"wait": 300, **options}.items())
    connection.sendall(f"GET /api/worker/poll?{given} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection


def grpc_poller(server, **options):
    """A long poll over gRPC that can be cancelled."""
    worker = WORKERS["grpc"](server)
    return worker.stub.RequestJob.future(worker._request(**{"wait": 300, **options}))


def leave(waiting):
    if hasattr(waiting, "cancel"):
        waiting.cancel()
    else:
        waiting.close()


@pytest.mark.parametrize("kind", [poller, grpc_poller], ids=["http", "grpc"])
def test_a_poller_that_hung_up_leaves_the_line_at_once(server, client, kind):
    gone = kind(server)
    client.wait_workers(1)
    leave(gone)
    wait_until(lambda: client.stats()["waiting_workers"] == 0, timeout=2)
    job_id = client.put()
    job = WORKERS["http"](server).poll()
    assert (job.id, job.attempt) == (job_id, 1)
    assert client.view(job_id)["deliveries"] == 1


def test_the_end_of_a_pollers_stream_means_that_it_is_gone(server, client):
    with poller(server) as gone:
        client.wait_workers(1)
        gone.shutdown(socket.SHUT_WR)
        wait_until(lambda: client.stats()["waiting_workers"] == 0, timeout=2)


def test_a_poller_over_grpc_whose_deadline_is_over_leaves_the_line(server, client):
    worker = WORKERS["grpc"](server)
    import grpc

    with pytest.raises(grpc.RpcError) as late:
        worker.stub.RequestJob(worker._request(wait=300), timeout=0.2)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: client.stats()["waiting_workers"] == 0, timeout=2)


def test_a_job_that_comes_while_a_poller_hangs_up_goes_to_the_next(server, client):
    """The submit follows the hang-up at once, before anybody can have noticed it."""
    worker = WORKERS["http"](server)
    for turn in range(30):
        gone = poller(server)
        client.wait_workers(1)
        gone.close()
        job_id = client.put()
        job = wait_until(worker.poll, timeout=3, what=f"the job of turn {turn}")
        assert (job.id, job.attempt) == (job_id, 1)
        worker.complete(job)


def test_a_job_that_comes_while_a_poller_over_grpc_cancels_is_not_lost(server, client, clock):
    """Where the reply was on its way already, the lease brings the job back."""
    import grpc

    worker = WORKERS["http"](server)
    for _ in range(20):
        gone = grpc_poller(server)
        client.wait_workers(1)
        job_id, _ = at_once(client.put, gone.cancel)
        try:
            assert gone.result(5).id == job_id
        except (grpc.FutureCancelledError, grpc.RpcError):
            client.wait_workers(0)
            if (job := worker.poll()) is None:
                clock.advance(300 + BIT)
                job = worker.poll(wait=300)
            assert job.id == job_id
        worker.complete(job_id)


@needs_proc
@pytest.mark.parametrize("wire", ["plain", "TLS", "TLS with a farewell"])
def test_a_poller_that_hung_up_unseen_gets_no_job(process, request, wire):
    """A server that stood still is told to hand jobs out, and behind that finds the end of the connections of all who
    wait for them.

    They are so many that it answers before it comes to the hang-ups; of fewer, it answers once it has seen all that
    came at the same time.
    """
    flags, context, count = [], None, jobqueue.HTTPServer.TURN + 2
    if wire != "plain":
        certs = request.getfixturevalue("certs")
        flags, context = ["--tls-cert", str(certs.server_cert), "--tls-key", str(certs.server_key)], certs.context()
    server = process("--grpc-port", "off", *flags)
    ask = functools.partial(call, server.url, context=context)

    def connected():
        """A connection that has had an answer, so that nothing is left to be read."""
        connection = connect(server.url)
        if context:
            connection = context.wrap_socket(connection, server_hostname="localhost")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while b"ok" not in received:
            received += connection.recv(4096)
        return connection

    assert ask("POST", "/api/admin/pause").status == 200
    assert ask("POST", "/api/jobs", b"1\n" * count, {"Content-Type": "application/x-ndjson"}).status == 202
    with contextlib.ExitStack() as stack:
        admin, *pollers = [stack.enter_context(connected()) for _ in range(count + 1)]
        for gone in pollers:
            gone.sendall(b"GET /api/worker/poll?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: ask("GET", "/api/admin/stats").json()["waiting_workers"] == count, what="the pollers")
        freeze(server.pid)
        admin.sendall(b"POST /api/admin/resume HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for gone in pollers:
            if wire == "TLS with a farewell":  # what it says last is still to be read when it has left
                gone.setblocking(False)
                with pytest.raises(ssl.SSLWantReadError):
                    gone.unwrap()
            gone.close()
        os.kill(server.pid, signal.SIGCONT)
        assert admin.recv(4096).startswith(b"HTTP/1.1 200 ")
    jobs = ask("GET", "/api/jobs?limit=1000").json()["jobs"]
    assert [(job["status"], job["deliveries"]) for job in jobs] == [("pending", 0)] * count


def big_payload():
    """As base64 more than the kernel takes off a server's hands (4 MiB by default)."""
    return b"\xff" * 4_100_000


def deaf(server, request, body=b""):
    """Who asks and reads nothing, so that a large answer cannot be written."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    head = f"{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def deaf_poller(server, **options):
    given = "&".join(f"{name}={value}" for name, value in {"wait": 300, **options}.items())
    return deaf(server, f"GET /api/worker/poll?{given}")


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_a_reply_that_could_not_be_written_gives_the_job_back_uncounted(server, client, reset):
    gone = deaf_poller(server)
    client.wait_workers(1)
    job_id = client.put(big_payload())
    client.wait_status(job_id, "processing")
    if reset:
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()
    client.wait_status(job_id, "pending", timeout=3)
    job = WORKERS["http"](server).poll()
    assert (job.id, job.attempt) == (job_id, 1)


def test_a_batch_that_could_not_be_written_is_given_back_whole_and_in_order(server, client):
    ids = [client.put(big_payload()) for _ in range(3)]
    gone = deaf_poller(server, max=10)
    for job_id in ids:
        client.wait_status(job_id, "processing")
    gone.close()
    for job_id in ids:
        client.wait_status(job_id, "pending", timeout=3)
    jobs = WORKERS["http"](server).poll_many(10)
    assert [(job.id, job.attempt) for job in jobs] == [(job_id, 1) for job_id in ids]


@pytest.mark.parametrize("comes", ["before", "later"])
def test_a_next_job_that_could_not_be_written_is_given_back_uncounted_and_the_first_is_completed(server, client, comes):
    first, ids = client.put(), []
    job = WORKERS["http"](server).poll()

    def put():
        ids.append(client.put(big_payload()))

    if comes == "before":
        put()
    path = f"POST /api/worker/complete/{first}?lease_token={job.token}&next=true&wait=300"
    with deaf(server, path, body=b"done") as gone:
        if comes == "later":
            client.wait_workers(1)
            put()
        client.wait_status(ids[0], "processing")
        gone.close()
    client.wait_status(ids[0], "pending", timeout=3)
    assert client.result(first) == b"done"
    job = WORKERS["http"](server).poll()
    assert (job.id, job.attempt) == (ids[0], 1)
    assert client.view(job.id)["deliveries"] == 1


GRPC_WORKER = """
import sys
import grpc
from worker_pb2_gen.worker_pb2 import JobRequest
from worker_pb2_gen.worker_pb2_grpc import WorkerServiceStub
options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]  # a small window
WorkerServiceStub(grpc.insecure_channel(sys.argv[1], options)).RequestJob(JobRequest(wait_seconds=60))
"""


@needs_proc
def test_a_reply_over_grpc_that_could_not_be_written_gives_the_job_back_uncounted(server, client):
    """The worker stands still when the job comes, and is killed then: it never had it. No lease ends, as the server's
    clock stands still, too. The worker's window is smaller than the job; of what waits for the socket, grpcio says that
    it was sent (such a job comes back with its lease)."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    command = [sys.executable, "-c", GRPC_WORKER, f"127.0.0.1:{server.grpc_port}"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL) as gone:
        try:
            client.wait_workers(1)
            freeze(gone.pid)
            job_id = client.put(b"x" * server.settings.max_payload)
            client.wait_status(job_id, "processing")
        finally:
            gone.kill()
    client.wait_status(job_id, "pending", timeout=5)
    job = WORKERS["http"](server).poll()
    assert (job.id, job.attempt) == (job_id, 1)
    assert client.view(job_id)["deliveries"] == 1


def test_a_worker_that_hangs_up_while_it_waits_for_its_next_job_has_completed_the_first(server, client):
    first = client.put()
    job = WORKERS["http"](server).poll()
    with connect(server.url) as gone:
        path = f"/api/worker/complete/{first}?lease_token={job.token}&next=true&wait=300"
        gone.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\ndone".encode())
        client.wait_workers(1)
    wait_until(lambda: client.stats()["waiting_workers"] == 0, timeout=2)
    assert client.result(first) == b"done"
    second = client.put()
    job = WORKERS["http"](server).poll()
    assert (job.id, job.attempt) == (second, 1)


# == 5. fail, release, extend


def test_a_failed_attempt_is_tried_again_after_a_growing_delay(client, worker, clock):
    job_id = client.put(attempts=12)
    for attempt in range(1, 12):
        job = worker.poll(wait=300)
        assert (job.id, job.attempt) == (job_id, attempt)
        usual = min(300, 2 ** (attempt - 1))
        said = worker.fail(job, "not yet")
        assert (said.status, said.duplicate) == ("delayed", False)
        assert 0.8 * usual - BIT <= said.retry_in <= 1.2 * usual + BIT
        assert client.status(job_id) == "delayed"
        clock.advance(0.8 * usual - 2 * BIT)
        assert worker.poll() is None
        clock.advance(0.4 * usual + 4 * BIT)
    assert worker.fail(worker.poll(wait=300)).status == "failed"


def test_retries_are_spread(client, worker):
    said = set()
    for _ in range(20):
        client.put()
        said.add(worker.fail(worker.poll()).retry_in)
    assert len(said) > 10


def test_a_delay_of_the_workers_choosing(client, worker, clock):
    job_id = client.put()
    said = worker.fail(worker.poll(), "busy", delay=3600)
    assert (said.status, said.retry_in) == ("delayed", 3600)
    clock.advance(3600 - BIT)
    assert worker.poll() is None
    clock.advance(2 * BIT)
    assert worker.poll(wait=300).id == job_id


def test_a_delay_of_zero_is_back_in_line_at_once(client, worker):
    client.put()
    said = worker.fail(worker.poll(), delay=0)
    assert (said.status, said.retry_in) == ("pending", 0)
    assert worker.poll().attempt == 2


def test_three_attempts_are_the_default_and_the_last_error_is_kept(client, worker):
    held = client.hold()
    for attempt in (1, 2, 3):
        job = worker.poll()
        assert job.attempt == attempt
        said = worker.fail(job, f"broken {attempt}", delay=0)
    assert said.status == "failed"
    problem = check_problem(held.result(10))
    assert (problem["status"], problem["code"], problem["job_id"]) == (502, "job_failed", job.id)
    assert "broken 3" in problem["detail"]
    view = client.view(job.id)
    assert (view["status"], view["error"], view["attempts"]) == ("failed", "broken 3", 3)
    assert view["finished_at"]
    assert worker.poll() is None


def test_without_retry_a_job_is_failed_at_once(client, worker):
    held = client.hold()
    said = worker.fail(worker.poll(), "hopeless: ä\n\"quoted\"", retry=False)
    assert (said.status, said.retry_in) == ("failed", 0)
    assert 'hopeless: ä\n"quoted"' in held.result(10).json()["detail"]


def test_retry_true_is_the_default_said_aloud(client, worker):
    client.put()
    assert worker.fail(worker.poll(), retry=True).status == "delayed"


def test_attempts_may_be_one(client, worker):
    client.put(attempts=1)
    assert worker.fail(worker.poll(), retry=True).status == "failed"


def test_a_failure_and_a_lost_lease_are_counted_alike(client, worker, lapse):
    client.put(attempts=3, lease=10)
    lapse(worker.poll())
    worker.fail(worker.poll(), delay=0)
    job = worker.poll()
    assert job.attempt == 3
    lapse(job, "failed")


def test_an_attempt_is_counted_once_when_its_worker_fails_it_late(client, worker, lapse):
    job_id = client.put(lease=10)
    job = worker.poll()
    lapse(job)
    assert worker.fail(job, "late", delay=0).status == "pending"
    assert worker.poll().attempt == 2
    assert client.view(job_id)["deliveries"] == 2


def test_a_released_job_is_back_in_its_place_at_once_and_uncounted(client, worker):
    first, second = client.put(), client.put()
    for turn in range(1, 7):
        job = worker.poll()
        assert (job.id, job.attempt) == (first, 1)
        assert client.view(first)["deliveries"] == turn
        worker.release(job)
    worker.complete(worker.poll())
    assert worker.poll().id == second


def test_an_extended_lease_counts_from_now(client, worker, clock):
    job_id = client.put()
    job = worker.poll(lease=10)
    clock.advance(9)
    said = worker.extend(job, 20)
    assert (said.lease_seconds, said.cancelled, said.status) == (20, False, "processing")
    clock.advance(20 - BIT)
    assert worker.poll() is None
    clock.advance(2 * BIT)
    assert worker.poll(wait=300).id == job_id


def test_a_lease_can_be_made_shorter(client, worker, clock):
    job_id = client.put()
    job = worker.poll()
    assert worker.extend(job, 5).lease_seconds == 5
    clock.advance(5 + BIT)
    assert worker.poll(wait=300).id == job_id


def test_an_extension_can_be_repeated(client, worker, clock):
    job = (client.put(), worker.poll(lease=10))[1]
    for _ in range(5):
        clock.advance(8)
        assert worker.extend(job, 10).status == "processing"
    assert worker.complete(job).duplicate is False


def test_a_late_extension_takes_the_lease_up_again(client, worker, lapse, clock):
    client.put()
    job = worker.poll(lease=10)
    lapse(job)
    assert worker.extend(job, 10).status == "processing"
    assert worker.poll() is None
    clock.advance(9)
    assert worker.complete(job).duplicate is False


def test_extend_says_that_the_job_was_cancelled(client, worker):
    client.put()
    job = worker.poll()
    client.cancel(job.id)
    said = worker.extend(job, 60)
    assert (said.cancelled, said.status) == (True, "cancelled")
    assert client.status(job.id) == "cancelled"


# == 6. Order, delay, ttl


def test_higher_priority_goes_first_then_the_older(client, worker):
    wanted = {(priority, turn): client.put(priority=priority) for turn in range(2) for priority in (3, 0, 9, 5)}
    order = sorted(wanted, key=lambda each: (-each[0], each[1]))
    jobs = [worker.poll() for _ in wanted]
    assert [job.id for job in jobs] == [wanted[each] for each in order]
    assert [job.priority for job in jobs] == [9, 9, 5, 5, 3, 3, 0, 0]


def test_no_priority_is_priority_0(client, worker):
    first, second = client.put(), client.put(priority=0)
    assert [worker.poll().id for _ in range(2)] == [first, second]


@pytest.mark.parametrize("back", ["released", "failed", "failed with a delay", "lapsed"])
def test_a_job_that_comes_back_keeps_its_place(client, worker, clock, lapse, back):
    low = client.put()
    first, second, third = (client.put(priority=4, lease=10) for _ in range(3))
    jobs = [worker.poll() for _ in range(2)]
    assert [job.id for job in jobs] == [first, second]
    for job in reversed(jobs):
        if back == "released":
            worker.release(job)
        elif back == "failed":
            worker.fail(job, delay=0)
        elif back == "failed with a delay":
            worker.fail(job, delay=5)
    if back == "lapsed":
        lapse(jobs[0])
    elif back == "failed with a delay":
        clock.advance(5 + BIT)
    for job in jobs:
        client.wait_status(job.id, "pending")
    assert [worker.poll().id for _ in range(4)] == [first, second, third, low]


def test_a_delayed_job_is_handed_out_when_its_delay_is_over_and_not_before(client, worker, clock):
    job_id = client.put(delay=60)
    assert client.status(job_id) == "delayed"
    assert client.stats()["delayed"] == 1
    assert client.call("GET", "/api/admin/next").status == 204
    clock.advance(60 - BIT)
    assert worker.poll() is None
    clock.advance(2 * BIT)
    assert worker.poll(wait=300).id == job_id


def test_a_job_whose_delay_is_over_stands_where_its_age_puts_it(client, worker, clock):
    old = client.put(delay=60)
    young = client.put()
    clock.advance(60 + BIT)
    client.wait_status(old, "pending")
    assert [worker.poll().id for _ in range(2)] == [old, young]


def test_a_delay_of_30_days_is_the_longest(client, worker, clock):
    job_id = client.put(delay=MONTH)
    clock.advance(MONTH - 1)
    assert worker.poll() is None
    clock.advance(1 + BIT)
    assert worker.poll(wait=300).id == job_id
    assert check_problem(client.submit(delay=MONTH + 1))["code"] == "invalid_parameter"


def test_a_held_client_waits_through_the_delay(client, worker, clock):
    held = client.hold(delay=60)
    clock.advance(60 + BIT)
    worker.complete(worker.poll(wait=300))
    assert held.result(10).status == 200


def test_after_its_ttl_a_job_is_expired_and_its_client_told(client, worker, clock):
    held = client.hold(ttl=30)
    job_id = client.call("GET", "/api/admin/next").json()["job_id"]
    clock.advance(30 - BIT)
    assert client.status(job_id) == "pending"
    clock.advance(2 * BIT)
    problem = check_problem(held.result(10))
    assert (problem["status"], problem["code"], problem["job_id"]) == (504, "job_expired", job_id)
    assert client.status(job_id) == "expired"
    assert client.stats()["expired"] == 1
    assert worker.poll() is None


def test_a_job_with_a_ttl_says_when_it_expires(client, worker):
    client.put(ttl=90)
    assert worker.poll().expires_at == "2023-11-14T22:14:50.000000Z"
    client.put()
    assert worker.poll().expires_at is None


def test_a_ttl_is_not_the_end_of_a_job_in_a_workers_hands(client, worker, clock):
    held = client.hold(ttl=30)
    job = worker.poll()
    clock.advance(100)
    assert client.status(job.id) == "processing"
    assert worker.complete(job, b'"in time"').duplicate is False
    assert held.result(10).json()["payload"] == "in time"


@pytest.mark.parametrize("back", ["released", "failed", "failed with a delay", "lapsed"])
def test_a_job_that_comes_back_after_its_ttl_is_expired(client, worker, clock, back):
    held = client.hold(ttl=30, lease=100)
    job = worker.poll()
    clock.advance(31)
    assert client.status(job.id) == "processing"
    if back == "released":
        worker.release(job)
    elif back == "lapsed":
        clock.advance(70)
    else:
        for again in (False, True):
            said = worker.fail(job, "no", delay=0 if back == "failed" else 5)
            assert (said.status, said.retry_in, said.duplicate) == ("expired", 0, again)
    client.wait_status(job.id, "expired")
    assert held.result(10).status == 504
    assert worker.poll() is None
    with refused("job_finished", "lease_lost"):
        worker.complete(job)


def test_a_job_that_lapses_and_then_reaches_its_ttl_is_expired(client, worker, clock, lapse):
    held = client.hold(ttl=30, lease=10)
    job = worker.poll()
    lapse(job)
    clock.advance(20)
    assert held.result(10).status == 504
    with refused("job_finished"):
        worker.complete(job)
    with refused("job_finished"):
        worker.complete(job, token="")


def test_a_late_worker_completes_a_lapsed_job_before_its_ttl(client, worker, clock, lapse):
    held = client.hold(ttl=30, lease=10)
    job = worker.poll()
    lapse(job)
    worker.complete(job, b'"late"')
    clock.advance(30)
    assert held.result(10).json()["payload"] == "late"
    assert client.status(job.id) == "completed"


def test_a_ttl_that_ends_within_the_delay_expires_the_job(client, worker, clock):
    held = client.hold(ttl=30, delay=60)
    clock.advance(30 + BIT)
    assert held.result(10).status == 504
    clock.advance(60)
    assert worker.poll() is None


def test_an_expired_job_is_not_handed_out_to_one_who_waits(client, worker, clock):
    client.admin("pause")
    client.put(ttl=30)
    polling = later(worker.poll, wait=300)
    client.wait_workers(1)
    clock.advance(31)
    client.admin("resume")
    after = client.put(b'"after"')
    assert polling.result(10).id == after


# == 7. Clients that hang up


def submitter(server, **options):
    connection = connect(server.url)
    given = "&".join(f"{name}={value}" for name, value in options.items())
    head = f"POST /api/submit?{given} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
    connection.sendall(head.encode() + b"{}")
    return connection


def hung_up(server, client, **options):
    with submitter(server, **options):
        wait_until(lambda: client.stats()["waiting_clients"] == 1)
    wait_until(lambda: client.stats()["waiting_clients"] == 0, timeout=3)


def test_a_client_that_hangs_up_does_not_cancel_its_job(server, client, worker):
    hung_up(server, client)
    job = worker.poll()
    worker.complete(job, b'"for later"')
    assert client.result(job.id) == b'"for later"'


def test_a_client_that_hangs_up_cancels_its_job_where_it_asked_for_that(server, client, worker):
    hung_up(server, client, on_disconnect="cancel")
    wait_until(lambda: client.stats()["cancelled"] == 1)
    assert worker.poll() is None


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_client_that_sent_on_and_hangs_up_is_missed_all_the_same(server, client, clock, size):
    with submitter(server, on_disconnect="cancel") as connection:
        wait_until(lambda: client.stats()["waiting_clients"] == 1)
        connection.sendall(b"x" * size)
        for _ in range(3):
            clock.advance(1.1)
            assert client.stats()["waiting_clients"] == 1, "it is still there"

    for _ in range(3):  # looked at once a second
        clock.advance(1.1)
        client.stats()
    wait_until(lambda: client.stats()["waiting_clients"] == 0)
    wait_until(lambda: client.stats()["cancelled"] == 1)


def test_a_queue_of_pollers_that_hung_up_is_shown_no_more(server, client):
    poller = connect(server.url)
    poller.sendall(b"GET /api/worker/poll?queue=typo&wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    client.wait_workers(1)
    assert "typo" in client.stats()["queues"]
    poller.close()
    wait_until(lambda: "typo" not in client.stats()["queues"])
    assert client.stats()["waiting_workers"] == 0


def test_the_worker_learns_that_the_client_has_gone(server, client, worker):
    with submitter(server, on_disconnect="cancel"):
        job = worker.poll(wait=300)
    client.wait_status(job.id, "cancelled")
    assert worker.extend(job, 60).cancelled is True
    with refused("job_finished"):
        worker.complete(job)


def test_a_client_that_got_its_202_may_go(server, client, worker, clock):
    waiting = later(client.submit, wait=5, on_disconnect="cancel")
    wait_until(lambda: client.stats()["waiting_clients"] == 1)
    clock.advance(5 + BIT)
    answer = waiting.result(10)
    assert answer.status == 202
    job = worker.poll()
    assert job.id == answer.json()["job_id"]
    assert client.status(job.id) == "processing"


def test_a_client_that_hangs_up_does_not_cancel_what_another_waits_for(server, client, worker):
    key = {"Idempotency-Key": "shared"}
    with connect(server.url) as gone:
        gone.sendall(b"POST /api/submit?on_disconnect=cancel HTTP/1.1\r\nHost: localhost\r\n"
                     b"Idempotency-Key: shared\r\nContent-Length: 2\r\n\r\n{}")
        wait_until(lambda: client.stats()["waiting_clients"] == 1)
        stays = client.hold(b"{}", key)
    wait_until(lambda: client.stats()["waiting_clients"] == 1)
    worker.complete(worker.poll(), b'"done"')
    assert stays.result(10).json()["payload"] == "done"


def test_the_end_of_a_clients_stream_means_that_it_is_gone(server, client):
    with submitter(server, on_disconnect="cancel") as gone:
        wait_until(lambda: client.stats()["waiting_clients"] == 1)
        gone.shutdown(socket.SHUT_WR)
        wait_until(lambda: client.stats()["cancelled"] == 1, timeout=3)


# == 8. Long polls


def wake_submit(client, worker, clock):
    return client.put


def wake_batch(client, worker, clock):
    def submit():
        return ok(client.call("POST", "/api/jobs", b"1\n", {"Content-Type": "application/x-ndjson"}), 202)["job_ids"][0]

    return submit


def wake_delay(client, worker, clock):
    job_id = client.put(delay=100)
    return lambda: clock.advance(100 + BIT) or job_id


def wake_fail(client, worker, clock):
    job_id = client.put()
    job = worker.poll()
    return lambda: worker.fail(job, delay=0) and job_id


def wake_backoff(client, worker, clock):
    job_id = client.put()
    worker.fail(worker.poll())
    return lambda: clock.advance(1.2 + BIT) or job_id


def wake_release(client, worker, clock):
    job_id = client.put()
    job = worker.poll()
    return lambda: worker.release(job) or job_id


def wake_lease(client, worker, clock):
    job_id = client.put()
    worker.poll(lease=50)
    return lambda: clock.advance(50 + BIT) or job_id


def wake_resume_all(client, worker, clock):
    client.admin("pause")
    job_id = client.put()
    return lambda: client.admin("resume") and job_id


def wake_resume_queue(client, worker, clock):
    client.admin("pause", queue="default")
    job_id = client.put()
    return lambda: client.admin("resume", queue="default") and job_id


def wake_requeue(client, worker, clock):
    job_id = client.put()
    worker.fail(worker.poll(), retry=False)
    return lambda: client.admin(f"requeue/{job_id}")["job_id"]


def wake_requeue_all(client, worker, clock):
    job_id = client.put()
    worker.fail(worker.poll(), retry=False)
    return lambda: client.admin("requeue", status="failed") and job_id


def wake_give_back(client, worker, clock):
    gone = deaf_poller(client.server)
    client.wait_workers(1)
    job_id = client.put(big_payload())
    client.wait_status(job_id, "processing")
    return lambda: gone.close() or job_id


SOURCES = [wake_submit, wake_batch, wake_delay, wake_fail, wake_backoff, wake_release, wake_lease, wake_resume_all,
           wake_resume_queue, wake_requeue, wake_requeue_all, wake_give_back]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__.removeprefix("wake_"))
@pytest.mark.parametrize("how", ["poll", "batch", "next"])
def test_a_long_poll_wakes_for_every_source(client, worker, clock, source, how):
    done = None
    if how == "next":
        client.put()
        done = worker.poll()
    trigger = source(client, worker, clock)
    if how == "poll":
        polling = later(lambda: worker.poll(wait=300))
    elif how == "batch":
        polling = later(lambda: worker.poll_many(5, wait=300)[0])
    else:
        polling = later(lambda: worker.complete(done, next=True, wait=300).next)
    client.wait_workers(1)
    assert not polling.done()
    job_id = trigger()
    assert polling.result(5).id == job_id
    assert client.stats()["waiting_workers"] == 0


def test_a_poll_without_wait_is_answered_at_once(worker):
    assert worker.poll() is None
    assert worker.poll(wait=0) is None
    assert worker.poll_many(5) == []


@pytest.mark.parametrize("wait", [0.5, 20, 300])
def test_a_long_poll_ends_empty_when_its_wait_is_over(client, worker, clock, wait):
    polls = [later(worker.poll, wait=wait), later(worker.poll_many, 5, wait=wait)]
    client.wait_workers(2)
    clock.advance(wait - BIT)
    client.wait_workers(2)
    clock.advance(2 * BIT)
    assert [poll.result(10) for poll in polls] == [None, []]
    assert client.stats()["waiting_workers"] == 0


@pytest.mark.parametrize("wait", [-1, 301])
def test_a_wait_out_of_range_is_refused(worker, wait):
    with refused("invalid_parameter") as no:
        worker.poll(wait=wait)
    assert "wait" in no.value.detail and "300" in no.value.detail


def test_each_of_many_waiting_workers_gets_one_job(server, client):
    workers = [kind(server) for kind in WORKERS.values() for _ in range(5)]
    polls = [later(worker.poll, wait=300) for worker in workers]
    client.wait_workers(len(polls))
    ids = {client.put() for _ in polls}
    assert {poll.result(10).id for poll in polls} == ids


def test_a_worker_that_waits_for_another_queue_is_left_alone(client, worker):
    elsewhere = later(worker.poll, queue="b,c", wait=300)
    client.wait_workers(1)
    client.put(queue="a")
    assert not elsewhere.done()
    job_id = client.put(queue="c")
    assert elsewhere.result(10).id == job_id


def test_long_polls_end_when_the_server_drains(server, client, worker):
    polls = [later(worker.poll, wait=300), later(worker.poll_many, 5, wait=300)]
    client.wait_workers(2)
    server.stop(drain=30)
    assert [poll.result(10) for poll in polls] == [None, []]


# == 9. Time


@pytest.mark.parametrize("jump", [MONTH, -MONTH], ids=["a month on", "a month back"])
class TestTheWallClockJumps:
    def test_a_lease_does_not_notice(self, client, worker, clock, jump):
        client.put()
        job = worker.poll(lease=100)
        clock.jump(jump)
        clock.advance(100 - BIT)
        assert worker.poll() is None
        assert client.status(job.id) == "processing"
        clock.advance(2 * BIT)
        assert worker.poll(wait=300).id == job.id

    def test_an_extension_does_not_notice(self, client, worker, clock, jump):
        client.put()
        job = worker.poll(lease=100)
        clock.jump(jump)
        assert worker.extend(job, 50).lease_seconds == 50
        clock.advance(50 - BIT)
        assert worker.poll() is None
        clock.advance(2 * BIT)
        assert worker.poll(wait=300).id == job.id

    def test_a_delay_does_not_notice(self, client, worker, clock, jump):
        job_id = client.put(delay=100)
        clock.jump(jump)
        clock.advance(100 - BIT)
        assert worker.poll() is None
        clock.advance(2 * BIT)
        assert worker.poll(wait=300).id == job_id

    def test_a_backoff_does_not_notice(self, client, worker, clock, jump):
        job_id = client.put()
        worker.fail(worker.poll(), delay=100)
        clock.jump(jump)
        clock.advance(100 - BIT)
        assert worker.poll() is None
        clock.advance(2 * BIT)
        assert worker.poll(wait=300).id == job_id

    def test_a_ttl_does_not_notice(self, client, worker, clock, jump):
        job_id = client.put(ttl=100)
        clock.jump(jump)
        clock.advance(100 - BIT)
        assert client.status(job_id) == "pending"
        clock.advance(2 * BIT)
        client.wait_status(job_id, "expired")

    def test_the_waits_do_not_notice(self, client, worker, clock, jump):
        polling, submitting = later(worker.poll, wait=100, queue="idle"), later(client.submit, wait=100)
        client.wait_workers(1)
        wait_until(lambda: client.stats()["waiting_clients"] == 1)
        clock.jump(jump)
        clock.advance(100 - BIT)
        assert not polling.done() and not submitting.done()
        clock.advance(2 * BIT)
        assert polling.result(10) is None
        assert submitting.result(10).status == 202

    def test_the_order_does_not_notice(self, client, worker, clock, jump):
        first = client.put()
        clock.jump(jump)
        second = client.put()
        assert [worker.poll().id for _ in range(2)] == [first, second]

    def test_a_clock_set_while_the_server_was_down_makes_no_job_wait_longer_than_its_delay(self, tmp_path, jump):
        def start(clock):
            return jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock)

        with start(FakeClock()) as before:
            client, worker = Client(before), WORKERS["http"](before)
            delayed, failed, leased = client.put(delay=60), client.put(priority=9), client.put(priority=8)
            worker.fail(worker.poll(), delay=60)
            assert worker.poll(lease=60).id == leased
            before.stop(drain=0)
        clock = FakeClock(monotonic=5, wall=1_700_000_000 + jump)
        with start(clock) as after:
            client, worker = Client(after), WORKERS["http"](after)
            assert client.status(leased) == "processing"
            clock.advance(60 + BIT)
            assert {worker.poll(wait=300).id for _ in range(3)} == {delayed, failed, leased}
            after.stop(drain=0)


# == Races, in every order

ORDERS = [order for order in itertools.permutations(("expire", "old", "poll", "new"))
          if order.index("poll") < order.index("new")]


def expected(order, token):
    """What the rules say of each step: the outcome, and who gave the visible result."""
    holder, winner, says = "old", None, {}
    for step in order:
        if step == "expire":
            holder = "line" if holder == "old" else holder
        elif step == "poll":
            says["poll"] = holder == "line"
            holder = "new" if holder == "line" else holder
        elif step == "new" and not says["poll"]:
            says["new"] = None
        elif winner:
            says[step] = "job_finished"
        elif step == "old" and token is None and holder == "new":
            says["old"] = "lease_lost"
        else:
            says[step], holder, winner = "done", "nobody", step
    return says, winner


@pytest.mark.parametrize("token", [None, ""], ids=["with a token", "without"])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_lapse_and_completions_in_every_order(client, worker, clock, order, token):
    held = client.hold(lease=10)
    old, new = worker.poll(), None
    says, winner = expected(order, token)
    for step in order:
        if step == "expire":
            clock.advance(10 + BIT)
            wait_until(lambda: client.status(old.id) != "processing" or "old" not in says)
        elif step == "poll":
            new = worker.poll(lease=300)
            assert (new is not None) == says["poll"]
        elif step == "old":
            assert outcome(worker.complete, old, b'"old"', token=token) == says["old"]
        elif new is not None:
            assert outcome(worker.complete, new, b'"new"') == says["new"]
    assert held.result(10).json()["payload"] == winner
    assert client.view(old.id)["result"] == winner
    # However long one waits, nothing undoes it.
    clock.advance(600)
    assert worker.poll() is None
    assert client.status(old.id) == "completed"


@pytest.mark.parametrize("verb, after", [("fail", "failed"), ("release", "pending"), ("extend", "processing")])
@pytest.mark.parametrize("order", [order for order in ORDERS if order.index("expire") < order.index("poll")],
                         ids="-".join)
def test_lapse_and_another_verb_of_the_old_worker_in_every_order(client, worker, clock, order, verb, after):
    """A late verb of the old worker never touches what the new one holds or has ended."""
    job_id = client.put(lease=10)
    old, new, ended = worker.poll(), None, None
    named = {"retry": False} if verb == "fail" else {"lease": 500} if verb == "extend" else {}
    for step in order:
        if step == "expire":
            clock.advance(10 + BIT)
            if ended is None:
                client.wait_status(job_id, "pending")
        elif step == "old":
            said = outcome(getattr(worker, verb), old, **named)
            if new is not None:
                assert said == ("job_finished" if ended == "completed" else "lease_lost")
            else:
                assert said == "done"
                ended = after
                client.wait_status(job_id, after)
        elif step == "poll":
            new = worker.poll(lease=300)
            assert (new is not None) == (ended in (None, "pending"))
        elif new is not None:
            assert outcome(worker.complete, new, b'"new"') == "done"
            ended = "completed"
    assert client.status(job_id) == ended


def test_a_lapse_a_poll_and_a_completion_at_the_same_moment_agree(client, worker, clock):
    for _ in range(15):
        held = client.hold(lease=5)  # less than a request may take to arrive, which goes by the same clock
        old = worker.poll()
        _, new, said = at_once(lambda: clock.advance(5 + BIT), worker.poll,
                               lambda old=old: worker.complete(old, b'"old"'))
        if isinstance(said, Refused):
            assert said.code in ("lease_lost", None)
            assert new.id == old.id
            worker.complete(new, b'"new"')
        else:
            assert new is None
        assert held.result(10).json()["payload"] == ("new" if new else "old")


def test_two_completions_at_the_same_moment_have_one_winner(client, worker):
    for _ in range(15):
        held = client.hold()
        job = worker.poll()
        said = at_once(lambda job=job: worker.complete(job, b'"one"'), lambda job=job: worker.complete(job, b'"two"'))
        assert sorted(each.duplicate for each in said) == [False, True]
        winner = "one" if not said[0].duplicate else "two"
        assert held.result(10).json()["payload"] == winner
        assert client.view(job.id)["result"] == winner


# -- cancel against complete


@pytest.mark.parametrize("state", ["pending", "delayed", "processing"])
def test_a_cancelled_job_is_final_and_its_client_is_told(client, worker, clock, state):
    held = client.hold(delay=60 if state == "delayed" else None)
    job_id = client.call("GET", "/api/jobs").json()["jobs"][0]["job_id"]
    if state == "processing":
        worker.poll()
    assert client.status(job_id) == state
    assert client.cancel(job_id) == {"message": "Job cancelled", "job_id": job_id}
    problem = check_problem(held.result(10))
    assert (problem["status"], problem["code"], problem["job_id"]) == (410, "job_cancelled", job_id)
    clock.advance(1000)
    assert worker.poll() is None
    assert client.status(job_id) == "cancelled"


@pytest.mark.parametrize("verb", ["complete", "fail", "release"])
@pytest.mark.parametrize("token", [None, ""], ids=["with a token", "without"])
def test_after_a_cancel_every_verb_is_too_late(client, worker, verb, token):
    client.put()
    job = worker.poll()
    client.cancel(job.id)
    with refused("job_finished"):
        getattr(worker, verb)(job, token=token)
    assert client.status(job.id) == "cancelled"


@pytest.mark.parametrize("end", ["completed", "failed", "expired", "cancelled"])
def test_a_final_job_cannot_be_cancelled(client, worker, clock, end):
    job_id = client.put(ttl=10)
    if end == "completed":
        worker.complete(worker.poll())
    elif end == "failed":
        worker.fail(worker.poll(), retry=False)
    elif end == "expired":
        clock.advance(11)
        client.wait_status(job_id, "expired")
    else:
        client.cancel(job_id)
    problem = check_problem(client.call("DELETE", f"/api/jobs/{job_id}"))
    assert (problem["status"], problem["code"], problem["job_id"]) == (409, "job_finished", job_id)
    assert client.status(job_id) == end


def test_an_unknown_job_cannot_be_cancelled(client):
    assert check_problem(client.call("DELETE", f"/api/jobs/{NOWHERE}"))["code"] == "job_not_found"


def test_a_cancel_and_a_completion_at_the_same_moment_agree(client, worker):
    for _ in range(20):
        held = client.hold()
        job = worker.poll()
        completed, cancelled = at_once(lambda job=job: worker.complete(job, b'"done"'),
                                       lambda job=job: client.cancel(job.id))
        won = not isinstance(completed, Exception)
        assert won == isinstance(cancelled, Refused), (completed, cancelled)
        assert held.result(10).status == (200 if won else 410)
        assert client.status(job.id) == ("completed" if won else "cancelled")
        assert (completed if not won else cancelled).code in ("job_finished", None)


def test_a_cancel_and_a_lapse_at_the_same_moment_leave_it_cancelled(client, worker, clock):
    for _ in range(10):
        client.put(lease=5)
        job = worker.poll()
        at_once(lambda: clock.advance(5 + BIT), lambda job=job: client.cancel(job.id))
        assert client.status(job.id) == "cancelled"
        assert worker.poll() is None


def test_a_cancelled_job_that_is_requeued_is_no_longer_its_first_workers(client, worker):
    client.put()
    old = worker.poll()
    client.cancel(old.id)
    client.admin(f"requeue/{old.id}")
    with refused("lease_lost", "job_not_leased"):
        worker.complete(old, b'"old"')
    new = worker.poll()
    assert new.id == old.id
    worker.complete(new, b'"new"')
    assert client.result(new.id) == b'"new"'


# -- an idempotent submit against completion and retention

KEY = {"Idempotency-Key": "the key"}


def test_a_repeated_submit_before_during_and_after_the_work_is_one_job(client, worker):
    first = client.hold(b"work", KEY)
    second = client.hold(b"work", KEY)
    job = worker.poll()
    third = client.hold(b"work", KEY)
    assert worker.poll() is None
    worker.complete(job, b'"done"')
    fourth = client.submit(b"work", KEY)
    answers = [first.result(10), second.result(10), third.result(10), fourth]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    assert ["idempotent-replayed" in answer.headers for answer in answers] == [False, True, True, True]
    assert worker.poll() is None


def test_a_repeated_submit_and_a_completion_at_the_same_moment_are_one_job(client, worker):
    for turn in range(15):
        key = {"Idempotency-Key": f"key-{turn}"}
        held = client.hold(b"work", key)
        job = worker.poll()
        again, _ = at_once(lambda key=key: client.submit(b"work", key), lambda job=job: worker.complete(job, b'"done"'))
        assert again.status == 200
        assert again.body == held.result(10).body
        assert again.headers["idempotent-replayed"] == "true"
    assert client.stats()["total"] == 15


def test_many_first_submits_with_one_key_are_one_job(client, worker):
    answers = [later(client.submit, b"work", KEY) for _ in range(8)]
    wait_until(lambda: client.stats()["waiting_clients"] == 8)
    assert client.stats()["total"] == 1
    worker.complete(worker.poll(), b'"done"')
    replayed = [future.result(10).headers.get("idempotent-replayed") for future in answers]
    assert sorted(replayed, key=str) == [None] + ["true"] * 7


def test_a_key_lives_as_long_as_its_job_is_kept(client, worker, clock):
    first = client.put(b"work", KEY)
    worker.complete(worker.poll())
    clock.advance(3600 - 1)
    assert client.submit(b"work", KEY).json()["job_id"] == first
    clock.advance(2)
    wait_until(lambda: client.call("GET", f"/api/jobs/{first}").status == 404)
    answer = client.submit(b"other work", KEY, wait=0)
    assert (answer.status, "idempotent-replayed" in answer.headers) == (202, False)
    assert answer.json()["job_id"] != first


def test_a_key_and_the_end_of_its_retention_at_the_same_moment_agree(client, worker, clock):
    for turn in range(10):
        key = {"Idempotency-Key": f"key-{turn}"}
        first = client.put(b"work", key)
        worker.complete(worker.poll(), b'"done"')
        answer, _ = at_once(lambda key=key: client.submit(b"work", key, wait=0), lambda: clock.advance(3600 + 1))
        if answer.status == 408:  # it was still arriving when the hour passed
            answer = client.submit(b"work", key, wait=0)
        same = answer.json()["job_id"] == first
        assert same == (answer.headers.get("idempotent-replayed") == "true")
        if not same:
            assert worker.poll().id == answer.json()["job_id"]
            worker.complete(answer.json()["job_id"])


# -- drain against everything


@pytest.fixture
def drain(server, client):
    """drain(): begin to stop; what it gives back is done when the server has stopped."""

    def begin():
        stopping = later(server.stop, drain=30)
        wait_until(lambda: client.submit(b"too late", wait=0).status == 503, what="submits to be refused")
        return stopping

    return begin


def test_a_draining_server_takes_no_submits_and_hands_nothing_out(client, worker, drain, clock):
    client.put()
    running = worker.poll()
    client.put(b"waits")
    stopping = drain()
    for answer in (client.submit(), client.submit(wait=0),
                   client.call("POST", "/api/jobs", b"1\n", {"Content-Type": "application/x-ndjson"})):
        assert check_problem(answer)["code"] == "draining"
        assert int(answer.headers["retry-after"]) > 0
    assert worker.poll() is None
    polls = later(worker.poll, wait=300), later(worker.poll_many, 5, wait=300)
    client.wait_workers(2)
    clock.advance(1)  # it does not wait longer either
    assert [poll.result(10) for poll in polls] == [None, []]
    assert not stopping.done()
    worker.complete(running)
    stopping.result(10)


def test_what_is_completed_in_a_drain_reaches_its_client_and_the_others_get_a_202(client, worker, drain):
    done, waits = client.hold(b"first"), client.hold(b"second")
    delayed = client.hold(b"third", delay=60)
    job = worker.poll()
    stopping = drain()
    said = worker.complete(job, b'"done"', next=True, wait=300)
    assert (said.duplicate, said.next) == (False, None)
    assert (done.result(10).status, done.result(10).json()["payload"]) == (200, "done")
    for future, status in ((waits, "pending"), (delayed, "delayed")):
        answer = future.result(10)
        assert answer.status == 202
        assert answer.json()["status"] == status
        assert answer.headers["location"] == f"/api/jobs/{answer.json()['job_id']}"
    stopping.result(10)


@pytest.mark.parametrize("verb, status", [("fail", 202), ("fail for good", 502), ("release", 202), ("cancel", 410),
                                          ("lapse", 202), ("clear", 410), ("batch", 200)])
def test_a_drain_ends_when_nothing_is_in_progress_however_it_came_to_that(client, worker, clock, drain, verb, status):
    held = client.hold(lease=10)
    job = worker.poll()
    stopping = drain()
    assert worker.extend(job, 10).status == "processing"
    if verb == "fail":
        worker.fail(job, "no", delay=0)
    elif verb == "fail for good":
        worker.fail(job, "no", retry=False)
    elif verb == "release":
        worker.release(job)
    elif verb == "cancel":
        client.cancel(job.id)
    elif verb == "lapse":
        clock.advance(10 + BIT)
    elif verb == "batch":
        assert worker.complete_many((job, b"1"))[0][:2] == (job.id, 200)
    else:
        assert client.call("DELETE", "/api/admin/clear").status == 200
    answer = held.result(10)
    assert answer.status == status
    assert answer.json()["job_id"] == job.id
    stopping.result(10)


def test_a_long_look_at_a_job_ends_with_the_drain(client, worker, drain):
    client.put()
    job = worker.poll()
    other = client.put()
    looking = [later(client.view, job_id, wait=300) for job_id in (job.id, other)]
    wait_until(lambda: client.stats()["waiting_clients"] == 2)
    stopping = drain()
    worker.complete(job, b'"done"')
    first, second = (future.result(10) for future in looking)
    assert (first["status"], first["result"]) == ("completed", "done")
    assert second["status"] == "pending"
    stopping.result(10)


def test_a_stop_without_a_drain_leaves_the_job_to_its_worker(tmp_path):
    def start():
        return jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=0, clock=FakeClock())

    with start() as server:
        client, worker = Client(server), WORKERS["http"](server)
        held = client.hold()
        job = worker.poll()
        server.stop(drain=0)
        answer = held.result(10)
        assert (answer.status, answer.json()["status"]) == (202, "processing")
        assert re.fullmatch(f"/api/jobs/{job.id}", answer.headers["location"])
    with start() as server:
        assert WORKERS["grpc"](server).complete(job, b'"done"').duplicate is False
        assert Client(server).view(job.id)["result"] == "done"


# == Queues


def test_a_poll_takes_from_its_queues_in_their_order(client, worker):
    second = client.put(queue="b", priority=9)
    first = client.put(queue="a")
    third = client.put(queue="c.d-e_F")
    jobs = [worker.poll(queue="a,b,c.d-e_F") for _ in range(3)]
    assert [(job.id, job.queue) for job in jobs] == [(first, "a"), (second, "b"), (third, "c.d-e_F")]


def test_without_a_queue_a_poll_takes_from_default_alone(client, worker):
    client.put(queue="other")
    assert worker.poll() is None
    job_id = client.put()
    assert worker.poll().id == job_id
    assert worker.poll(queue="default") is None
    assert worker.poll(queue="other") is not None


@pytest.mark.parametrize("queue", ["a b", "a/b", "x" * 65, "a,", ",", "ä", "a,,b"])
def test_a_queues_name_is_checked(client, worker, queue):
    with refused("invalid_parameter") as no:
        worker.poll(queue=queue)
    assert "queue" in no.value.detail


def test_the_longest_name_of_a_queue_works(client, worker):
    name = "x" * 64
    job_id = client.put(queue=name)
    assert worker.poll(queue=name).id == job_id


def test_a_paused_queue_takes_jobs_and_hands_none_out(client, worker):
    client.admin("pause", queue="a")
    paused, other = client.put(queue="a"), client.put(queue="b")
    assert worker.poll(queue="a,b").id == other
    assert worker.poll(queue="a,b") is None
    client.admin("resume", queue="a")
    assert worker.poll(queue="a").id == paused


def test_what_is_in_a_workers_hands_can_be_ended_in_a_paused_queue(client, worker):
    held = client.hold()
    job = worker.poll()
    client.admin("pause")
    assert worker.extend(job, 60).status == "processing"
    worker.complete(job, b'"done"')
    assert held.result(10).status == 200


def test_a_requeued_job_has_all_its_attempts_again(client, worker):
    job_id = client.put(attempts=2)
    for _ in range(2):
        worker.fail(worker.poll(), "no", delay=0)
    assert client.status(job_id) == "failed"
    assert client.admin(f"requeue/{job_id}") == {"message": "Job requeued", "job_id": job_id}
    job = worker.poll()
    assert (job.id, job.attempt) == (job_id, 1)
    worker.complete(job, b'"done"')
    view = client.view(job_id)
    assert (view["status"], view["result"], view.get("error")) == ("completed", "done", None)


def test_a_view_and_the_stats_agree_in_every_state(client, worker, clock):
    def check(state, count):
        stats = client.stats()
        name = "running" if state == "processing" else state
        assert stats[name] == count, (state, stats)
        assert stats["total"] == sum(stats[each] for each in
                                     ("pending", "running", "completed", "delayed", "failed", "expired", "cancelled"))
        listed = client.call("GET", "/api/jobs", status=state).json()["jobs"]
        assert len(listed) == count
        assert all(client.status(job["job_id"]) == state for job in listed)

    client.put(delay=500)
    check("delayed", 1)
    client.put(ttl=10)
    check("pending", 1)
    clock.advance(11)
    wait_until(lambda: client.stats()["expired"] == 1)
    check("expired", 1)
    client.cancel(client.put())
    check("cancelled", 1)
    client.put()
    worker.fail(worker.poll(), retry=False)
    check("failed", 1)
    client.put()
    worker.complete(worker.poll())
    check("completed", 1)
    client.put()
    worker.poll()
    check("processing", 1)


def test_the_json_of_a_job_in_the_hands_of_a_worker_has_the_agreed_members(server, client):
    client.put(b"{}", ttl=60)
    answer = call(server.url, "GET", "/api/worker/poll")
    assert set(answer.json()) == {"job_id", "payload", "headers", "queue", "priority", "attempt", "lease_token",
                                  "lease_seconds", "created_at", "expires_at"}
    client.put(b"{}")
    assert "expires_at" not in json.loads(call(server.url, "GET", "/api/worker/poll").body)
