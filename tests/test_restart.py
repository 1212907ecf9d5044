"""What a restart brings back, after kill -9 and after a clean stop; and how SIGTERM and SIGINT drain."""

from __future__ import annotations

import signal
import socket
import time
from datetime import datetime

import pytest

import jobqueue
from support import FakeClock, call, start_server, wait_until
from wires import WORKERS, Client, Refused, check_problem, later, ok, refused

HTTP = WORKERS["http"]
BIT = 0.01


# == Everything comes back


def populate(server):
    """A job in every state; what the next server must know of each."""
    client, worker = Client(server), HTTP(server)
    facts = {"views": {}, "pending": [client.put(b"%d" % number, queue="pending") for number in range(5)]}
    facts["urgent"] = client.put(b'{"urgent": 1.0}', {"X-Trace-Id": "t"}, queue="pending", priority=9, ttl=10_000)
    client.put(b'"in progress"', queue="running", lease=2000)
    facts["running"] = worker.poll(queue="running", worker="ann")
    client.put(b'"done"', queue="done")
    facts["done"] = worker.poll(queue="done")
    worker.complete(facts["done"], b"\x89PNG\xff", content_type="image/png")
    failed = client.put(queue="failed")
    worker.fail(worker.poll(queue="failed"), "the worker's words", retry=False)
    cancelled = client.put(queue="cancelled")
    client.cancel(cancelled)
    client.put(b'"tried twice"', queue="tried")
    for _ in range(2):
        worker.fail(worker.poll(queue="tried"), "not yet", delay=0)
    released = client.put(queue="released")
    worker.release(worker.poll(queue="released"))
    facts["delayed"] = client.put(queue="delayed", delay=3000)
    facts["retried"] = client.put(queue="retried")
    worker.fail(worker.poll(queue="retried"), "later", delay=3000)
    facts["paused"] = client.put(queue="paused")
    client.admin("pause", queue="paused")
    facts["key"] = client.put(b"work", {"Idempotency-Key": "k"}, queue="keyed")
    ids = [job["job_id"] for job in ok(client.call("GET", "/api/jobs", limit=1000))["jobs"]]
    facts["order"] = ids
    facts["views"] = {job_id: client.view(job_id) for job_id in ids}
    facts["stats"] = client.stats()
    assert {failed, cancelled, released} <= set(ids)
    return facts


def check(server, facts):
    client, worker = Client(server), HTTP(server)
    ids = [job["job_id"] for job in ok(client.call("GET", "/api/jobs", limit=1000))["jobs"]]
    assert ids == facts["order"]
    for job_id, before in facts["views"].items():
        now = client.view(job_id)
        for moment in ("lease_expires_at", "available_at", "expires_at"):  # these start anew or run on
            assert (moment in now) == (moment in before)
            now.pop(moment, None)
            before.pop(moment, None)
        assert now == before
    counts = ("total", "pending", "running", "completed", "delayed", "failed", "expired", "cancelled")
    assert [client.stats()[name] for name in counts] == [facts["stats"][name] for name in counts]

    # In progress: the worker does not notice.
    running = facts["running"]
    assert worker.poll(queue="running") is None
    assert worker.extend(running, 1000).status == "processing"
    look = later(client.view, running.id, wait=60)
    assert worker.complete(running, b'"after the restart"').duplicate is False
    assert worker.complete(running, b'"again"').duplicate is True
    assert look.result(10)["result"] == "after the restart"

    # Finished: result, type, token.
    answer = client.call("GET", f"/api/jobs/{facts['done'].id}/result")
    assert (answer.body, answer.headers["content-type"]) == (b"\x89PNG\xff", "image/png")
    assert worker.complete(facts["done"], b"x").duplicate is True

    # In line: order, priority, headers, attempts.
    jobs = worker.poll_many(10, queue="pending")
    assert [job.id for job in jobs] == [facts["urgent"], *facts["pending"]]
    assert [(job.priority, job.attempt) for job in jobs] == [(9, 1)] + [(0, 1)] * 5
    assert jobs[0].headers["X-Trace-Id"] == "t"
    assert jobs[0].payload == '{"urgent": 1.0}'
    tried = worker.poll(queue="tried")
    assert tried.attempt == 3
    assert worker.fail(tried, "the last straw", delay=0).status == "failed"
    assert worker.poll(queue="released").attempt == 1

    # Delayed, paused.
    assert worker.poll_many(5, queue="delayed,retried,paused") == []
    assert client.stats()["queues"]["paused"]["paused"] is True
    client.admin("resume", queue="paused")
    assert worker.poll(queue="paused").id == facts["paused"]

    # Keys.
    again = client.submit(b"work", {"Idempotency-Key": "k"}, queue="keyed", wait=0)
    assert (again.json()["job_id"], again.headers["idempotent-replayed"]) == (facts["key"], "true")
    reused = client.submit(b"other work", {"Idempotency-Key": "k"}, queue="keyed", wait=0)
    assert check_problem(reused)["code"] == "key_reused"


@pytest.mark.parametrize("end", ["kill -9", "SIGTERM"])
def test_a_restart_brings_everything_back(tmp_path, end):
    flags = ("--grpc-port", "off", "--drain", "0")
    first = start_server(tmp_path, *flags)
    facts = populate(first)
    if end == "kill -9":
        first.kill()
    else:
        assert first.stop() == 0
    second = start_server(tmp_path, *flags)
    check(second, facts)
    second.kill()
    # What the second one did is there for a third.
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, clock=FakeClock()) as third:
        assert Client(third).view(facts["running"].id)["result"] == "after the restart"
        third.stop(drain=0)


def test_twenty_restarts_in_a_row_change_nothing(tmp_path):
    facts = None
    for _ in range(20):
        with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=FakeClock()) as server:
            facts = facts or populate(server)
            server.stop(drain=0)
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=FakeClock()) as server:
        check(server, facts)
        server.stop(drain=0)


def test_a_client_whose_202_was_answered_finds_its_job_after_kill_9(tmp_path):
    ids = []
    for _ in range(2):
        server = start_server(tmp_path, "--grpc-port", "off")
        client = Client(server)
        assert all(client.status(job_id) == "pending" for job_id in ids)
        ids += [client.put(b"%d" % number) for number in range(20)]
        server.kill()
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, clock=FakeClock()) as server:
        assert [job.id for job in HTTP(server).poll_many(100)] == ids
        server.stop(drain=0)


def test_a_held_client_comes_back_with_its_key_after_kill_9(tmp_path):
    first = start_server(tmp_path)
    held = later(Client(first).submit, b"work", {"Idempotency-Key": "k"})
    worker = WORKERS["grpc"](first)
    job = worker.poll(wait=20)
    first.kill()
    assert held.exception(10) is not None, "the client saw its connection end"
    second = start_server(tmp_path)
    again = Client(second).hold(b"work", {"Idempotency-Key": "k"})
    WORKERS["grpc"](second).complete(job, b'"done"')
    answer = again.result(10)
    assert (answer.status, answer.json()["payload"], answer.json()["job_id"]) == (200, "done", job.id)
    assert answer.headers["idempotent-replayed"] == "true"
    assert Client(second).stats()["total"] == 1


@pytest.fixture
def start(tmp_path):
    """start(clock): a server on one and the same folder, one after the other."""
    def begin(clock, **settings):
        server = jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, clock=clock, **settings).start()
        running.append(server)
        return server

    running = []
    yield begin
    for server in running:
        server.stop(drain=0)


def test_a_lease_is_armed_again_in_full(start):
    first = start(clock := FakeClock())
    client, worker = Client(first), HTTP(first)
    client.put()
    job = worker.poll(lease=100)
    clock.advance(90)
    first.stop(drain=0)
    second = start(clock := FakeClock(monotonic=3, wall=clock.time() + 500))
    client, worker = Client(second), HTTP(second)
    clock.advance(100 - BIT)
    assert worker.poll() is None
    assert client.status(job.id) == "processing"
    clock.advance(2 * BIT)
    again = worker.poll(wait=300)
    assert (again.id, again.attempt) == (job.id, 2)
    with refused("lease_lost"):
        worker.complete(job)


def test_an_extended_lease_is_armed_again_as_it_was_extended(start):
    first = start(FakeClock())
    client, worker = Client(first), HTTP(first)
    client.put()
    job = worker.poll(lease=10)
    worker.extend(job, 500)
    first.stop(drain=0)
    second = start(clock := FakeClock())
    clock.advance(500 - BIT)
    assert HTTP(second).poll() is None
    assert HTTP(second).complete(job).duplicate is False


def test_a_lease_that_runs_anew_says_when_it_ends(start):
    first = start(FakeClock())
    Client(first).put()
    job = HTTP(first).poll(lease=10)
    first.stop(drain=0)
    clock = FakeClock()
    clock.jump(5)
    client = Client(start(clock))
    moment = datetime.fromisoformat(client.view(job.id)["lease_expires_at"]).timestamp()
    assert moment == pytest.approx(clock.time() + 10)


def test_a_late_worker_is_still_accepted_after_a_restart(start):
    first = start(clock := FakeClock())
    client, worker = Client(first), HTTP(first)
    client.put()
    job = worker.poll(lease=10)
    clock.advance(11)
    client.wait_status(job.id, "pending")
    first.stop(drain=0)
    second = start(FakeClock())
    assert Client(second).status(job.id) == "pending"
    assert HTTP(second).complete(job, b'"late"').duplicate is False


def test_a_fence_stands_after_a_restart(start):
    first = start(clock := FakeClock())
    client, worker = Client(first), HTTP(first)
    client.put()
    old = worker.poll(lease=10)
    clock.advance(11)
    client.wait_status(old.id, "pending")
    new = worker.poll()
    first.stop(drain=0)
    worker = HTTP(start(FakeClock()))
    with refused("lease_lost"):
        worker.complete(old)
    assert worker.complete(new).duplicate is False


def test_delays_and_ttls_go_on_where_they_were(start):
    first = start(clock := FakeClock())
    client = Client(first)
    delayed, mortal = client.put(queue="d", delay=100), client.put(ttl=100)
    clock.advance(60)
    first.stop(drain=0)
    second = start(clock := FakeClock(monotonic=77, wall=clock.time()))
    client, worker = Client(second), HTTP(second)
    clock.advance(40 - BIT)
    assert worker.poll(queue="d") is None
    assert client.status(mortal) == "pending"
    clock.advance(2 * BIT)
    assert worker.poll(queue="d", wait=300).id == delayed
    client.wait_status(mortal, "expired")


def test_what_ended_while_the_server_was_down_has_ended(start):
    first = start(clock := FakeClock())
    client = Client(first)
    delayed, mortal = client.put(queue="d", delay=100), client.put(ttl=100)
    first.stop(drain=0)
    second = start(FakeClock(wall=clock.time() + 1000))
    assert HTTP(second).poll(queue="d", wait=1).id == delayed
    Client(second).wait_status(mortal, "expired")
    assert HTTP(second).poll() is None


def test_a_pause_of_everything_outlives_a_restart(start):
    first = start(FakeClock())
    client = Client(first)
    client.admin("pause")
    job_id = client.put()
    first.stop(drain=0)
    second = start(FakeClock())
    client, worker = Client(second), HTTP(second)
    assert client.stats()["paused"] is True
    assert worker.poll() is None
    client.admin("resume")
    assert worker.poll().id == job_id


def test_what_was_cleared_does_not_come_back(start):
    first = start(FakeClock())
    facts = populate(first)
    assert Client(first).call("DELETE", "/api/admin/clear").status == 200
    after = Client(first).put(b"after")
    first.stop(drain=0)
    second = start(FakeClock())
    client = Client(second)
    assert [job["job_id"] for job in client.call("GET", "/api/jobs").json()["jobs"]] == [after]
    assert client.put(b"another", {"Idempotency-Key": "k"}) not in facts["order"]
    with refused("job_not_found"):
        HTTP(second).complete(facts["running"])


def test_a_batch_comes_back_whole_and_in_order(start):
    first = start(FakeClock())
    lines = "\n".join(str(number) for number in range(500))
    ids = ok(Client(first).call("POST", "/api/jobs", lines, {"Content-Type": "application/x-ndjson"}), 202)["job_ids"]
    first.stop(drain=0)
    jobs = HTTP(start(FakeClock())).poll_many(1000)
    assert [(job.id, job.payload) for job in jobs] == [(job_id, str(n)) for n, job_id in enumerate(ids)]


# == SIGTERM and SIGINT


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_jobs_in_progress_finish(tmp_path, kind):
    server = start_server(tmp_path)
    client, http, grpc = Client(server), HTTP(server), WORKERS["grpc"](server)
    finishing = {}
    for worker in (http, grpc):
        finishing[worker] = client.hold(b"in progress"), worker.poll()
    waiting = [client.hold(b"waits"), client.hold(b"waits", delay=600)]
    looking = later(client.view, finishing[http][1].id, wait=60)
    polls = [later(http.poll, wait=60, queue="idle"), later(grpc.poll, wait=60, queue="idle"),
             later(http.poll_many, 5, wait=60, queue="idle"), later(grpc.poll_many, 5, wait=60, queue="idle")]
    client.wait_workers(4)
    wait_until(lambda: client.stats()["waiting_clients"] == 5)

    server.process.send_signal(getattr(signal, kind))
    assert [poll.result(10) for poll in polls] == [None, None, [], []]
    answer = client.submit(b"too late")
    assert check_problem(answer)["code"] == "draining"
    assert int(answer.headers["retry-after"]) >= 1
    assert http.poll(wait=60) is None and grpc.poll(wait=60) is None
    assert server.process.poll() is None, "it waits for those in progress"

    assert grpc.extend(finishing[grpc][1], 60).status == "processing"
    for worker, (held, job) in finishing.items():
        worker.complete(job, b'"done"')
        assert (held.result(10).status, held.result(10).json()["payload"]) == (200, "done")
    assert looking.result(10)["status"] == "completed"
    for held, status in zip(waiting, ("pending", "delayed"), strict=True):
        answer = held.result(10)
        assert (answer.status, answer.json()["status"]) == (202, status)
        assert answer.headers["location"] == f"/api/jobs/{answer.json()['job_id']}"
    assert server.wait(20) == 0
    assert "Traceback" not in server.log()
    # The 202 was true.
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None) as again:
        for held, status in zip(waiting, ("pending", "delayed"), strict=True):
            assert Client(again).call("GET", held.result().headers["location"]).json()["status"] == status


def test_a_drain_ends_with_its_seconds_and_the_lease_stays_good(tmp_path):
    server = start_server(tmp_path, "--drain", "0.3", "--grpc-port", "off")
    client, worker = Client(server), HTTP(server)
    held = client.hold()
    job = worker.poll()
    assert server.stop() == 0
    answer = held.result(10)
    assert (answer.status, answer.json()) == (202, {"job_id": job.id, "status": "processing"})
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, clock=FakeClock()) as again:
        assert HTTP(again).complete(job, b'"done"').duplicate is False
        assert Client(again).view(job.id)["result"] == "done"


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_drain_and_leaves_nobody_without_an_answer(tmp_path, kind):
    server = start_server(tmp_path, "--drain", "600", "--grpc-port", "off")
    client, worker = Client(server), HTTP(server)
    held = client.hold()
    job = worker.poll()
    server.process.send_signal(getattr(signal, kind))
    wait_until(lambda: client.submit(wait=0).status == 503)
    assert server.process.poll() is None
    heard = time.monotonic()
    wait_until(lambda: time.monotonic() > heard + 0.6)  # two signals in half a second are one wish
    server.process.send_signal(getattr(signal, kind))
    assert server.wait(10) == 0
    answer = held.result(10)
    assert (answer.status, answer.json()["job_id"]) == (202, job.id)


def test_an_idle_server_stops_at_once(tmp_path):
    server = start_server(tmp_path, "--drain", "600")
    client = Client(server)
    client.put()
    with socket.create_connection(("127.0.0.1", server.port)):  # an idle connection does not hold it up
        WORKERS["grpc"](server).poll(queue="idle")
        server.terminate()
        assert server.wait(5) == 0
    with pytest.raises(OSError):
        call(server.url, "GET", "/health")


def test_a_server_that_was_killed_leaves_its_folder_free(tmp_path):
    first = start_server(tmp_path, "--grpc-port", "off")
    with pytest.raises(AssertionError) as no:
        start_server(tmp_path, "--grpc-port", "off")
    assert no.value.code == 3
    assert str(tmp_path / "data") in no.value.log
    assert "Traceback" not in no.value.log
    first.kill()
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None) as second:
        assert Client(second).stats()["total"] == 0


def test_workers_and_clients_live_through_restarts_under_load(tmp_path):
    """Clients that repeat their submit with a key, and workers that repeat what failed, notice nothing."""
    results = {}
    server = start_server(tmp_path, "--grpc-port", "off")
    port = server.port

    class Address:
        url = f"http://127.0.0.1:{port}"

    def persist(action):
        def one_try():
            try:
                return [action()]
            except (OSError, Refused, AssertionError) as error:
                if isinstance(error, Refused) and error.code in ("lease_lost", "job_finished"):
                    return [None]
                return None
            except Exception as error:  # an answer that was cut short
                if type(error).__module__ != "http.client":
                    raise
                return None

        return wait_until(one_try, timeout=30)[0]

    def ask(number):
        def submit():
            answer = Client(Address).submit(b"%d" % number, {"Idempotency-Key": f"k{number}"})
            assert answer.status == 200, answer
            return answer.json()["payload"]

        results[number] = persist(submit)

    def work():
        worker = HTTP(Address)
        while len(results) < 40:
            job = persist(lambda: worker.poll(wait=0.2, lease=2))
            if job is not None:
                persist(lambda job=job: worker.complete(job, b'"result of %s"' % job.payload.encode()))

    asking, working = [later(ask, number) for number in range(40)], [later(work) for _ in range(2)]
    for turn in range(3):
        wait_until(lambda turn=turn: len(results) >= 10 * (turn + 1), timeout=30)
        server.kill()
        server = start_server(tmp_path, "--grpc-port", "off", "--port", str(port))
    for future in asking + working:
        future.result(30)
    assert results == {number: f"result of {number}" for number in range(40)}
    assert Client(server).stats()["total"] == 40


def test_a_queue_that_was_resumed_leaves_no_trace(start, clock):
    first = start(clock)
    for queue in ("one", "two"):
        Client(first).admin("pause", queue=queue)
    Client(first).admin("resume", queue="one")
    Client(first).admin("resume", queue="three")
    first.stop(drain=0)
    assert list(Client(start(clock)).stats()["queues"]) == ["two"]
