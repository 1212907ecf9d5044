"""The two ways in which calls over gRPC are made: without a thread for each, and with one where grpcio is unknown."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import types
from pathlib import Path

import pytest

import jobqueue
from support import freeze, wait_until
from wires import WORKERS, Client, Refused, at_once, later

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
NOWHERE = "00000000-0000-4000-8000-000000000000"
MANY = 300  # more than there are threads


@pytest.fixture
def start(tmp_path, clock):
    """start(direct, **settings): a server whose calls over gRPC have no thread each, or have one."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def starts(direct, **settings):
            with patch.context() as hidden:
                if not direct:
                    hidden.setattr(jobqueue, "_inside_of_grpc", lambda: None)
                server = jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=0, clock=clock, **settings)
                stack.enter_context(server)
            server.clock = clock
            stack.callback(server.stop, drain=0)
            assert server._grpc._calls.direct == direct
            return server

        yield starts


@pytest.fixture(params=[True, False], ids=["no thread a call", "a thread a call"])
def direct(request):
    return request.param


@pytest.fixture
def server(start, direct):
    return start(direct)


@pytest.fixture
def client(server):
    return Client(server)


@pytest.fixture
def worker(server):
    return WORKERS["grpc"](server)


def poll_of(server, **options):
    """A long poll that can be cancelled."""
    worker = WORKERS["grpc"](server)
    return worker.stub.RequestJob.future(worker._request(**{"wait": 300, **options}))


def refusal_of(call, *arguments, **options):
    with pytest.raises(Refused) as no:
        call(*arguments, **options)
    return no.value.status, no.value.code


# == Both ways


def test_every_method_does_its_work(client, worker):
    ids = [client.put(f"[{number}]", queue="all") for number in range(9)]
    first = worker.poll(queue="all", lease=30)
    assert (first.id, first.payload, first.lease_seconds, first.attempt) == (ids[0], "[0]", 30, 1)
    assert worker.extend(first, lease=60).lease_seconds == 60
    done = worker.complete(first, b"1", next=True, queue="all")
    assert (done.duplicate, done.next.id) == (False, ids[1])
    assert worker.complete(first, b"1").duplicate
    assert worker.release(done.next) is False
    batch = worker.poll_many(3, queue="all")
    assert [job.id for job in batch] == ids[1:4]
    assert worker.complete_many(*[(job, b"2") for job in batch], (NOWHERE, b"3")) == [
        *((job.id, 200, "", False) for job in batch), (NOWHERE, 404, "job_not_found", False),
    ]
    assert worker.fail(worker.poll(queue="all"), "broken", retry=False).status == "failed"
    assert [client.status(job_id) for job_id in ids] == ["completed"] * 4 + ["failed"] + ["pending"] * 4


def test_what_is_wrong_is_told_with_status_code_and_detail(client, worker):
    assert worker.poll() is None
    assert refusal_of(worker.complete, NOWHERE) == ("NOT_FOUND", "job_not_found")
    assert refusal_of(worker.extend, NOWHERE) == ("NOT_FOUND", "job_not_found")
    client.put()
    job = worker.poll()
    assert refusal_of(worker.complete, job, token="0" * 16) == ("FAILED_PRECONDITION", "lease_lost")
    assert refusal_of(worker.poll, queue="no queue's name!") == ("INVALID_ARGUMENT", "invalid_parameter")
    with pytest.raises(Refused) as no:
        worker.fail("x" * 40_000)
    assert (no.value.status, len(no.value.detail)) == ("NOT_FOUND", 503)  # clients take 8 KiB


def test_a_token_is_asked_for(start, direct, tmp_path):
    (tmp_path / "tokens").write_text("worker secret\n")
    (tmp_path / "tokens").chmod(0o600)
    worker = WORKERS["grpc"](start(direct, tokens=str(tmp_path / "tokens")))
    assert refusal_of(worker.poll) == ("UNAUTHENTICATED", "unauthorized")
    with pytest.raises(grpc.RpcError) as none:
        worker.stub.RequestJob(worker._request(), metadata=[("authorization", "Bearer secret")], timeout=20)
    assert none.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as two:
        worker.stub.RequestJob(worker._request(), metadata=[("authorization", "Bearer secret")] * 2, timeout=20)
    assert two.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_message_that_is_none_is_refused_and_others_are_served(server, client, worker, direct):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        with pytest.raises(grpc.RpcError) as garbage:
            channel.unary_unary("/worker.WorkerService/RequestJob")(b"\xff" * 9, timeout=20)
        assert garbage.value.code() == grpc.StatusCode.INTERNAL
        with pytest.raises(grpc.RpcError) as nothing:
            channel.stream_unary("/worker.WorkerService/RequestJob")(iter(()), timeout=20)
        # Where there is a thread for each call, grpcio tells that itself.
        told = grpc.StatusCode.INVALID_ARGUMENT if direct else grpc.StatusCode.UNIMPLEMENTED
        assert nothing.value.code() == told
    job_id = client.put()
    assert worker.poll().id == job_id


def test_a_mistake_in_the_server_is_told_as_such_and_others_are_served(server, client, worker, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    client.put()
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "release", broken)
        assert refusal_of(worker.release, NOWHERE) == ("INTERNAL", "internal")
    with monkeypatch.context() as patch:  # while the answer is made, for which the job was leased
        patch.setattr(jobqueue.WorkerServicer, "_job", broken)
        assert refusal_of(worker.poll) == ("INTERNAL", "internal")
    client.put(job := "2")
    assert worker.poll().payload == job


def test_a_long_poll_gets_the_job_that_comes_and_one_that_left_does_not(server, client, worker, clock):
    gone, here = poll_of(server), poll_of(server)
    client.wait_workers(2)
    gone.cancel()
    client.wait_workers(1)
    job_id = client.put()
    assert here.result(20).id == job_id
    late = later(worker.poll, wait=7)
    client.wait_workers(1)
    clock.advance(8)
    assert late.result(20) is None


def test_a_stop_ends_the_polls_that_wait(server, client):
    polls = [poll_of(server) for _ in range(3)]
    client.wait_workers(3)
    server.stop(drain=0)
    for each in polls:
        with pytest.raises(grpc.RpcError) as end:
            each.result(20)
        assert (end.value.code(), end.value.details()) == (grpc.StatusCode.NOT_FOUND, "no jobs available")


def test_a_job_whose_call_is_cancelled_by_the_end_of_the_server_is_no_mistake(server, client):
    """Its answer had not left yet: grpcio tells of it when the queue is closed, and the lease runs out, then."""
    messages = pytest.importorskip("worker_pb2_gen.worker_pb2")
    told = []
    context = types.SimpleNamespace(add_callback=lambda call: not told.append(call), peer=lambda: "ipv4:127.0.0.1:4711",
                                    _state=types.SimpleNamespace(client="cancelled"))
    job_id = client.put()
    future, shape = jobqueue.WorkerServicer(server.service, messages, 1).RequestJob(messages.JobRequest(), context)
    assert shape(future.result(5)).id == job_id
    server.stop(drain=0)
    for tell in told:
        tell()


def test_calls_are_counted(server, client, worker):
    client.put()
    worker.complete(worker.poll(), b"1")
    refusal_of(worker.complete, NOWHERE)
    counted = {key: sum(histogram.counts) for key, histogram in server._grpc.requests.items()}
    assert counted == {("RequestJob", "OK"): 1, ("CompleteJob", "OK"): 1, ("CompleteJob", "NOT_FOUND"): 1}


@pytest.fixture
def full(start, direct):
    """A server, all of whose long polls over gRPC are taken by callers for another queue."""
    settings = {"max_connections": 20} if direct else {"grpc_threads": 4}
    server, most = start(direct, **settings), 20 if direct else 3
    polls = [poll_of(server, queue="other") for _ in range(most)]
    Client(server).wait_workers(most)
    yield server
    for each in polls:
        each.cancel()


def test_a_worker_that_would_wait_gets_the_next_job_in_line_where_all_long_polls_are_taken(full):
    client, worker = Client(full), WORKERS["grpc"](full)
    ids = [client.put() for _ in range(6)]
    job, done = worker.poll(), []
    while len(done) < len(ids) - 1:
        done.append(job.id)
        job = worker.complete(job, b'"done"', next=True, wait=20).next
    assert [*done, job.id] == ids
    assert [client.status(job_id) for job_id in ids] == ["completed"] * 5 + ["processing"]


def test_a_worker_that_may_not_wait_is_told_that_its_result_is_taken_and_gets_no_job(full):
    client, worker = Client(full), WORKERS["grpc"](full)
    client.put()
    done = worker.complete(worker.poll(), b'"done"', next=True, wait=20)
    assert (done.duplicate, done.next) == (False, None)
    with pytest.raises(Refused, match="long polls") as no:
        worker.poll(wait=20)
    assert no.value.status == "UNAVAILABLE"
    later_job = client.put()
    following = worker.poll(wait=20)
    assert (following.id, following.attempt, client.view(later_job)["deliveries"]) == (later_job, 1, 1)


def test_the_place_of_a_poll_that_is_over_is_free_again(full, clock):
    client, worker = Client(full), WORKERS["grpc"](full)
    clock.advance(301)
    client.wait_workers(0)
    waiting = later(worker.poll, wait=20)
    client.wait_workers(1)
    assert client.put() == waiting.result(20).id
    for wrong in ("no queue's name!", "x" * 200):
        refusal_of(worker.poll, queue=wrong, wait=20)
    assert at_once(*[lambda: client.put()] * 3) and len(worker.poll_many(3, wait=20)) == 3


def test_a_log_filter_that_raises_keeps_no_answer_from_its_caller(start, direct):
    server = start(direct, access_log=True, grpc_threads=4)
    client, worker = Client(server), WORKERS["grpc"](server)

    def refuse(record):
        if "grpc=" in record.getMessage():
            raise ValueError("a filter that fails")
        return True

    level = jobqueue.log.level
    jobqueue.log.addFilter(refuse)
    jobqueue.log.setLevel("INFO")
    try:
        assert [worker.poll() for _ in range(8)] == [None] * 8
        job_id = client.put()
        assert worker.poll().id == job_id
    finally:
        jobqueue.log.removeFilter(refuse)
        jobqueue.log.setLevel(level)


def test_a_poll_without_a_job_leaves_nothing_for_the_collector(client, worker):
    gc.collect()
    gc.disable()  # what is freed without it is in no cycle
    try:
        for _ in range(100):
            worker.poll()
        wait_until(lambda: calls_in_memory() <= 2, what="their end")  # the last is in the hands of grpcio's loop
    finally:
        gc.enable()


def calls_in_memory():
    """As grpcio's server holds them."""
    return sum(type(thing).__name__ == "_RPCState" for thing in gc.get_objects())


# == Without a thread for each


@pytest.fixture
def no_threads(monkeypatch):
    """no_threads(): inside, the system refuses to start a thread for calls over gRPC."""

    @contextlib.contextmanager
    def refuse():
        begin = threading.Thread.start

        def start(thread):
            if thread.name.startswith("jobqueue-grpc"):
                raise RuntimeError("can't start new thread")
            begin(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            yield

    return refuse


def test_the_grpcio_that_is_installed_is_known():
    assert jobqueue._Calls._is_known(jobqueue._inside_of_grpc())


@pytest.mark.parametrize("name", jobqueue._Calls.KNOWN)
def test_a_grpcio_that_is_built_otherwise_is_not_taken_for_a_known_one(name):
    inside = jobqueue._inside_of_grpc()
    parts = dict(vars(inside))
    first = name.partition(".")[0]
    parts[first] = lambda *anything: None
    assert not jobqueue._Calls._is_known(types.SimpleNamespace(**parts))
    del parts[first]
    assert not jobqueue._Calls._is_known(types.SimpleNamespace(**parts))
    assert not jobqueue._Calls._is_known(None)


def test_long_polls_and_callers_that_never_send_their_message_take_no_thread(start, no_threads):
    server = start(True, grpc_threads=4)
    client, worker, ended = Client(server), WORKERS["grpc"](server), threading.Event()

    def nothing():
        ended.wait(60)
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel, no_threads():
        try:
            polls = [poll_of(server, queue="crowd") for _ in range(MANY)]
            silent = [channel.stream_unary("/worker.WorkerService/RequestJob").future(nothing()) for _ in range(12)]
            client.wait_workers(MANY)
            for number in range(5):
                job_id = client.put(str(number))
                assert worker.poll().id == job_id
                assert not worker.complete(job_id).duplicate
            ids = {client.put(queue="crowd") for _ in polls}
            assert {poll.result(20).id for poll in polls} == ids
        finally:
            ended.set()
        assert {call.exception(20).code() for call in silent} == {grpc.StatusCode.INVALID_ARGUMENT}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see a process stand still by")
def test_a_burst_is_served_to_the_last_call(process):
    """Of calls that Python has not come to yet, the core refuses some beyond a thousand, unless it is told not to."""
    server = process("--fsync", "never")
    client, worker, count = Client(server), WORKERS["grpc"](server), 4_000
    assert worker.poll() is None
    freeze(server.pid)
    try:
        polls = [worker.stub.RequestJob.future(worker._request(queue="crowd", wait=300)) for _ in range(count)]
    finally:
        os.kill(server.pid, signal.SIGCONT)
    wait_until(lambda: client.stats()["waiting_workers"] + sum(poll.done() for poll in polls) == count, timeout=60)
    assert [poll.exception(0) for poll in polls if poll.done()] == []
    for each in polls:
        each.cancel()


def test_what_ends_a_thread_does_not_end_the_one_that_grpcio_tells_of_calls(start, monkeypatch):
    server = start(True)
    client, worker = Client(server), WORKERS["grpc"](server)

    def leave(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "release", leave)
        with pytest.raises(Refused) as no:
            worker.release(NOWHERE)
        assert no.value.status == "CANCELLED"
    job_id = client.put()
    assert worker.poll().id == job_id


def test_a_job_whose_answer_cannot_be_sent_is_given_back(start, monkeypatch):
    server = start(True)
    client, worker = Client(server), WORKERS["grpc"](server)
    job_id = client.put()

    def unable(*_):
        raise ValueError("no answer can be sent")

    with monkeypatch.context() as patch:
        patch.setattr(jobqueue._inside_of_grpc(), "_status", unable)
        assert refusal_of(worker.poll)[0] == "CANCELLED"
    wait_until(lambda: client.status(job_id) == "pending")
    job = worker.poll()
    assert (job.id, job.attempt) == (job_id, 1)


# == A thread for each


def test_as_many_wait_as_may_and_the_others_are_served_while_the_system_has_no_more_threads(start, no_threads):
    server = start(False, grpc_threads=40)
    client, worker = Client(server), WORKERS["grpc"](server)
    polls = [poll_of(server, queue="other") for _ in range(3)]
    client.wait_workers(3)
    assert worker.poll() is None
    with no_threads():
        assert at_once(*[worker.poll] * 30) == [None] * 30
    polls += [poll_of(server, queue="other") for _ in range(27)]
    client.wait_workers(30)
    with pytest.raises(Refused, match="long polls"):
        worker.poll(queue="other", wait=20)
    assert at_once(*[worker.poll] * 30) == [None] * 30
    for each in polls:
        each.cancel()
    client.wait_workers(0)


def test_a_crew_makes_each_call_also_where_a_thread_is_refused(no_threads):
    crew, made = jobqueue._Crew(4, "jobqueue-grpc"), []
    crew.add()
    with no_threads():
        busy = threading.Event()
        crew.do(lambda: busy.wait(60))
        for number in range(20):
            crew.do(lambda number=number: made.append(number))
        assert made == []
        busy.set()
        wait_until(lambda: made == list(range(20)), what="the calls")
    barrier = threading.Barrier(4)
    for _ in range(4):
        crew.do(lambda: made.append(barrier.wait(20)))
    wait_until(lambda: sorted(made[20:]) == [0, 1, 2, 3], what="four threads")
    crew.end()
