"""A queue in a program: jobqueue.Server, submit and its Future, jobs() and what may be done with one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import http.client
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import weakref

import pytest

import jobqueue
from support import ROOT, FakeClock, call, wait_until
from wires import WORKERS, Client, later, ok

HTTP = WORKERS["http"]


@pytest.fixture
def start(tmp_path):
    """start(name, **settings): a running server without gRPC, on a data folder of that name."""
    with contextlib.ExitStack() as stack:

        def begin(name="data", **settings):
            settings = {"grpc_port": None, "clock": FakeClock(), **settings}
            server = jobqueue.Server(data_dir=tmp_path / name, port=0, **settings)
            stack.enter_context(server)
            stack.callback(server.stop, drain=0)
            return server

        yield begin


@pytest.fixture
def serve():
    """serve(server, work, *queues): a thread that does work(job) with each job until the server stops."""

    def begin(server, work, *queues, **options):
        def run():
            for job in server.jobs(*queues, **options):
                work(job)

        return later(run)

    return begin


# == The example


def test_the_example_of_the_contract_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jobqueue.Server(data_dir="data", port=0, grpc_port=None) as server:
        worker = later(lambda: HTTP(server).complete(HTTP(server).poll(wait=20), b'{"y": 2}'))
        result = server.submit(b'{"x": 1}').result(timeout=30)
        worker.result(10)
    assert result == b'{"y": 2}'
    assert (tmp_path / "data").is_dir()


# == The server


def test_port_0_takes_a_free_port_and_says_which(start):
    first, second = start("a", grpc_port=0), start("b", grpc_port=0)
    ports = {first.port, second.port, first.grpc_port, second.grpc_port}
    assert len(ports) == 4
    assert 0 not in ports
    assert first.url == f"http://127.0.0.1:{first.port}"
    assert Client(first).call("GET", "/health").json()["status"] == "ok"


def test_without_a_grpc_port_there_is_no_grpc(start):
    assert start(grpc_port=None).grpc_port is None


def test_several_servers_in_one_process_know_nothing_of_each_other(start):
    servers = [start(name, grpc_port=0) for name in ("a", "b", "c")]
    futures = [server.submit(b"%d" % number) for number, server in enumerate(servers)]
    for number, server in enumerate(servers):
        for kind in WORKERS.values():
            worker = kind(server)
            job = worker.poll()
            if worker.wire == "http":
                assert job.payload == str(number)
                worker.release(job)
            else:
                worker.complete(job, b'"%d"' % (number * 10))
    assert [future.result(10) for future in futures] == [b'"0"', b'"10"', b'"20"']
    servers[0].stop(drain=0)
    assert Client(servers[1]).call("GET", "/health").status == 200


def test_a_server_keeps_its_jobs_for_the_next_one_on_its_folder(start):
    first = start()
    job_id = Client(first).put(b"kept")
    first.stop(drain=0)
    assert Client(start()).view(job_id)["payload"] == "kept"


def test_a_data_folder_that_is_in_use_is_refused_and_named(start, tmp_path):
    first = start()
    with pytest.raises(Exception, match="data") as no:
        start()
    assert str(tmp_path / "data") in str(no.value)
    assert Client(first).call("GET", "/health").status == 200


def test_a_port_that_is_taken_is_refused_and_named(start, tmp_path):
    first = start("a")
    taken = jobqueue.Server(data_dir=tmp_path / "b", port=first.port, grpc_port=None)
    with pytest.raises(OSError, match=str(first.port)):
        taken.start()
    # The folder is free again, and nothing of the failed start is left.
    assert Client(start("b")).call("GET", "/health").status == 200


@pytest.mark.parametrize("settings, names", [
    ({"lease": 0}, "lease"), ({"lease": "long"}, "43200"), ({"attempts": 101}, "100"), ({"fsync": "x"}, "always"),
    ({"portt": 1}, "portt"), ({"port": -1}, "port"), ({"port": 70_000}, "65535"), ({"max_payload": -1}, "max_payload"),
    ({"host": "0.0.0.0"}, "insecure"),
    ({"idle_timeout": 0}, "idle_timeout must be 1 to "), ({"idle_timeout": 0.9}, "idle_timeout must be 1 to "),
    ({"attempts": 2.7}, "whole number"), ({"attempts": "2.0"}, "whole number"), ({"attempts": float("inf")}, "100"),
    ({"attempts": float("nan")}, "100"), ({"lease": float("inf")}, "43200"), ({"lease": float("nan")}, "43200"),
    ({"data_dir": None}, "data_dir must be text, got None"), ({"data_dir": b"data"}, "data_dir must be text"),
    ({"host": None, "insecure": True}, "host must be text, got None"), ({"tokens": 5}, "tokens must be text, got 5"),
    ({"allow_host": 5}, "allow_host must be names, got 5"), ({"allow_host": [5]}, "allow_host must be names"),
    ({"grpc_port": "none"}, "grpc_port must be .*, got none; 'off' runs without"),
], ids=str)
def test_a_setting_that_is_unknown_or_malformed_is_named_and_what_would_do(tmp_path, settings, names):
    with pytest.raises(ValueError, match=names):
        jobqueue.Server(**{"data_dir": tmp_path / "data", "port": 0, "grpc_port": None, **settings}).start()
    assert not (tmp_path / "data" / "journal.jsonl").exists()


@pytest.mark.parametrize("given, attempts", [(2.0, 2), (True, 1), (3, 3), ("4", 4)])
def test_a_setting_may_be_given_as_any_number_that_is_whole(given, attempts):
    settings = jobqueue.Settings(attempts=given)
    assert (settings.attempts, type(settings.attempts)) == (attempts, int)


def test_starting_and_stopping_leaves_no_thread_and_no_file_open(tmp_path):
    def cycle(number):
        with jobqueue.Server(data_dir=tmp_path / str(number), port=0, grpc_port=0, clock=FakeClock()) as server:
            future = server.submit(b"1")
            HTTP(server).complete(HTTP(server).poll(), b"2")
            assert future.result(10) == b"2"
            server.stop(drain=0)

    def ours():
        return {thread for thread in threading.enumerate() if "jobqueue" in thread.name}

    def files():
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{fd}")}

    cycle(0)
    threads = ours()
    for number in range(1, 4):
        cycle(number)
    wait_until(lambda: not ours() - threads, what="the threads to end")
    assert not [name for name in files() if str(tmp_path) in name]


def test_a_grpc_side_that_does_not_start_leaves_no_thread(tmp_path, start):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    before = {thread for thread in threading.enumerate() if "jobqueue" in thread.name}
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="gRPC"):
        start(grpc_port=taken.getsockname()[1])
    wait_until(lambda: not {thread for thread in threading.enumerate() if "jobqueue" in thread.name} - before)


def test_a_server_is_for_one_run_and_says_so(tmp_path, start):
    server = start()
    for _ in ("running", "stopped"):
        with pytest.raises(RuntimeError, match="once"):
            server.start()
        server.stop(drain=0)
    unborn = jobqueue.Server(data_dir=tmp_path / "never", port=0, grpc_port=None)
    for use in (lambda: unborn.port, lambda: unborn.submit(b"1"), lambda: unborn.cancel("x"), lambda: unborn.job("x")):
        with pytest.raises(RuntimeError, match="start"):
            use()


@pytest.mark.parametrize("payload, options", [
    ({"x": 1}, {}), (None, {}), (1, {}), (b"1", {"headers": {"N": 1}}), (b"1", {"headers": {"N": ["a"]}}),
    (b"1", {"headers": {1: "a"}}), (b"1", {"headers": ["N", "a"]}),
    (b"1", {"key": ""}), (b"1", {"key": "k" * 256}),
], ids=str)
def test_what_a_job_cannot_hold_is_refused_at_its_submit(start, payload, options):
    server = start()
    with pytest.raises((TypeError, jobqueue.JobQueueError)):
        server.submit(payload, **options)
    assert Client(server).stats()["total"] == 0


def test_a_payload_that_the_program_changes_later_is_as_it_was(start):
    server = start()
    data = bytearray(b'{"a":1}')
    server.submit(data)
    server.submit(memoryview(data))
    data[:] = b"CHANGED"
    assert [next(server.jobs()).payload for _ in range(2)] == [b'{"a":1}'] * 2


def test_stop_may_be_called_twice_and_before_the_start(tmp_path, start):
    jobqueue.Server(data_dir=tmp_path / "never", port=0, grpc_port=None).stop()
    server = start()
    server.stop(drain=0)
    server.stop(drain=0)


def test_signals_are_left_alone(start):
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGCHLD)
    before = [signal.getsignal(kind) for kind in kinds]
    server = start(grpc_port=0)
    assert [signal.getsignal(kind) for kind in kinds] == before
    server.stop(drain=0)
    assert [signal.getsignal(kind) for kind in kinds] == before


def test_it_runs_in_any_thread(tmp_path):
    def run():
        with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=0, clock=FakeClock()) as server:
            future = server.submit(b"1")
            HTTP(server).complete(HTTP(server).poll(), b"2")
            return future.result(10)

    assert later(run).result(10) == b"2"


PROGRAM = """
import jobqueue, sys, threading
with jobqueue.Server(data_dir=sys.argv[1], port=0, grpc_port=0) as server:
    def work():
        for job in server.jobs("default"):
            if job.payload == b"bad":
                job.fail("no", retry=False)
            else:
                job.complete(job.payload[::-1])
    worker = threading.Thread(target=work)
    worker.start()
    result = server.submit(b"abc").result(timeout=30)
    try:
        server.submit(b"bad").result(timeout=30)
    except jobqueue.JobQueueError as error:
        code = error.code
worker.join(10)
sys.exit(0 if (result, code, worker.is_alive()) == (b"cba", "job_failed", False) else 1)
"""


def test_nothing_is_printed_and_the_program_ends(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", PROGRAM, str(tmp_path / "data")]
    began = time.monotonic()
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert (said.returncode, said.stdout, said.stderr) == (0, b"", b"")
    assert time.monotonic() - began < 20


WITHOUT_A_STOP = """
import jobqueue, sys
server = jobqueue.Server(data_dir=sys.argv[1], port=0, grpc_port=0).start()
print(server.port, server.grpc_port, flush=True)
sys.stdin.readline()
sys.exit(3)
"""


def test_a_program_that_ends_without_a_stop_does_not_wait_for_the_long_polls_over_grpc(tmp_path):
    worker_of = WORKERS["grpc"]
    command = [sys.executable, "-c", WITHOUT_A_STOP, str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        try:
            port, grpc_port = map(int, program.stdout.readline().split())
            server = types.SimpleNamespace(url=f"http://127.0.0.1:{port}", grpc_port=grpc_port)
            later(worker_of(server).poll, wait=300)
            Client(server).wait_workers(1)
            program.stdin.close()
            assert program.wait(10) == 3
        finally:
            program.kill()


# == submit


def test_the_result_is_the_workers_bytes(start):
    server = start()
    worker = HTTP(server)
    pairs = [(b'{"x": 1.0}', b'{"y": 1.0, "y": 2}'), ("text ä", b"\xff\x00"), (b"", b"12345678901234567890"),
             (b"\xfe", "ü\u2028".encode())]
    for payload, result in pairs:
        future = server.submit(payload)
        job = worker.poll()
        sent = payload.encode() if isinstance(payload, str) else payload
        assert job.data == sent if sent == b"\xfe" else job.payload in (sent.decode(), f'"{sent.decode()}"')
        worker.complete(job, result)
        assert future.result(10) == result


def test_an_empty_result_is_an_empty_object(start):
    server = start()
    future = server.submit(b"1")
    HTTP(server).complete(HTTP(server).poll(), b"")
    assert future.result(10) == b"{}"


def test_a_submit_takes_the_options_of_the_http_route(start):
    server = start()
    client, worker = Client(server), HTTP(server)
    server.submit(b"low", queue="q")
    server.submit(b"high", queue="q", priority=9, lease=20, attempts=7, ttl=600, headers={"X-Trace-Id": "t"})
    job = worker.poll(queue="q")
    assert (job.payload, job.priority, job.lease_seconds, job.headers) == ('"high"', 9, 20, {"X-Trace-Id": "t"})
    assert client.view(job.id)["attempts"] == 7
    assert job.expires_at is not None
    server.submit(b"later", queue="d", delay=60)
    assert worker.poll(queue="d") is None
    server.clock.advance(61)
    assert worker.poll(queue="d", wait=300) is not None


def test_a_key_attaches_a_submit_to_its_job(start):
    server = start()
    first, second = server.submit(b"work", key="k"), server.submit(b"work", key="k")
    over_http = later(Client(server).submit, b"work", {"Idempotency-Key": "k"})
    wait_until(lambda: Client(server).stats()["waiting_clients"] >= 1)
    HTTP(server).complete(HTTP(server).poll(), b'"done"')
    assert first.result(10) == second.result(10) == b'"done"'
    assert over_http.result(10).json()["payload"] == "done"
    assert Client(server).stats()["total"] == 1
    with pytest.raises(jobqueue.JobQueueError) as no:
        server.submit(b"other", key="k").result(10)
    assert no.value.code == "key_reused"


@pytest.mark.parametrize("options", [{"priority": 10}, {"queue": "a b"}, {"delay": -1}, {"ttl": "x"}, {"attempts": 0},
                                     {"lease": 0.5}, {"prioritty": 1}], ids=str)
def test_an_option_that_is_unknown_or_malformed_is_named(start, options):
    server = start()
    (name,) = options
    with pytest.raises((ValueError, jobqueue.JobQueueError), match=name):
        server.submit(b"1", **options).result(10)
    assert Client(server).stats()["total"] == 0


def test_the_headers_of_a_submit_are_kept_as_those_over_http_are(start):
    server = start()
    headers = {
        "content-type": "text/plain", "X-trace-ID": " a, b\t", "x-umlaut": "ä", "X-Empty": "", "x-twice": "1",
        "X-Twice": "2", "Authorization": "Bearer secret", "cookie": "secret", "Proxy-Authorization": "secret",
        "Connection": "X-Hop", "x-hop": "1", "TE": "trailers", "Upgrade": "x", "Transfer-Encoding": "chunked",
        "Keep-Alive": "1", "Expect": "100-continue",
    }  # fmt: skip
    server.submit(b"1", headers=headers)
    job = next(server.jobs())
    assert job.headers == {
        "Content-Type": "text/plain", "X-Trace-Id": "a, b", "X-Umlaut": "ä", "X-Empty": "", "X-Twice": "1, 2",
    }  # fmt: skip
    del headers["Transfer-Encoding"], headers["Upgrade"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/api/submit?wait=0", skip_host=True, skip_accept_encoding=True)
        for name, value in ({"Host": "localhost", "Content-Length": "1"} | headers).items():
            connection.putheader(name, value.encode())
        connection.endheaders(b"1")
        assert connection.getresponse().status == 202
    over_http = next(server.jobs()).headers
    assert {name: over_http[name] for name in over_http if name not in ("Host", "Content-Length")} == job.headers


def test_headers_whose_names_are_of_a_kind_of_str_are_taken(start):
    class Name(str):  # as multidict.istr, of the headers of aiohttp
        __slots__ = ()

    server = start()
    server.submit(b"1", headers={Name("X-Trace-Id"): Name("a")})
    assert next(server.jobs()).headers == {"X-Trace-Id": "a"}


@pytest.mark.parametrize("headers", [
    {"": "a"}, {"A B": "a"}, {"A:": "a"}, {"A\r\nB": "a"}, {"Ä": "a"}, {"A\n": "a"}, {"A": "a\r\nB: b"}, {"A": "a\nb"},
    {"A": "a\n"}, {"A": "a\r"}, {"A": "\0"}, {"A": "\x1b[2J"}, {"A": "\x7f"}, {"A": "\ud800"},
    {"A": "x" * 32766}, {str(number): "x" * 1000 for number in range(33)}, {"Host": "a", "host": "b"},
], ids=lambda headers: ascii(headers)[:30])  # fmt: skip
def test_headers_that_could_not_come_over_http_are_refused(start, headers):
    server = start()
    with pytest.raises(ValueError):
        server.submit(b"1", headers=headers)
    assert Client(server).stats()["total"] == 0
    server.submit(b"1", headers={"A": "x" * 32763})  # with ": " and the line's end: as many as over HTTP
    assert len(next(server.jobs()).headers["A"]) == 32763


def test_a_payload_too_large_is_refused(start):
    server = start(max_payload=10)
    with pytest.raises(jobqueue.JobQueueError) as no:
        server.submit(b"x" * 11).result(10)
    assert no.value.code == "payload_too_large"
    assert Client(server).stats()["total"] == 0


def test_a_result_that_takes_too_long_is_a_timeout_and_the_job_goes_on(start):
    server = start()
    future = server.submit(b"1")
    with pytest.raises(TimeoutError):
        future.result(timeout=0.05)
    HTTP(server).complete(HTTP(server).poll(), b'"late"')
    assert future.result(10) == b'"late"'


def test_the_end_without_a_result_is_an_error_with_its_code(start):
    server = start()
    client, worker = Client(server), HTTP(server)
    failed, cancelled = server.submit(b"1", queue="f"), server.submit(b"1", queue="c")
    expired = server.submit(b"1", ttl=5)
    worker.fail(worker.poll(queue="f"), "the worker's words", retry=False)
    server.clock.advance(6)
    client.cancel(client.call("GET", "/api/jobs", queue="c").json()["jobs"][0]["job_id"])
    cleared = server.submit(b"1")
    for future, code in ((failed, "job_failed"), (expired, "job_expired"), (cancelled, "job_cancelled")):
        with pytest.raises(jobqueue.JobQueueError) as no:
            future.result(10)
        assert no.value.code == code
        assert no.value.job_id
    ok(client.call("DELETE", "/api/admin/clear"))
    with pytest.raises(jobqueue.JobQueueError) as no:
        cleared.result(10)
    assert no.value.code == "job_cleared"
    with pytest.raises(jobqueue.JobQueueError, match="the worker's words"):
        failed.result(10)


def test_a_stop_tells_those_who_wait_and_the_job_goes_on_after_a_restart(start):
    server = start()
    future = server.submit(b"1", key="k")
    server.stop(drain=0)
    with pytest.raises(jobqueue.JobQueueError) as no:
        future.result(10)
    assert no.value.code == "draining"
    again = start()
    future = again.submit(b"1", key="k")
    job = HTTP(again).poll()
    assert job.id == no.value.job_id
    HTTP(again).complete(job, b'"done"')
    assert future.result(10) == b'"done"'


def test_a_submit_to_a_stopped_server_is_refused(start):
    server = start()
    server.stop(drain=0)
    with pytest.raises(jobqueue.JobQueueError):
        server.submit(b"1").result(10)


def test_a_result_is_on_disk_when_its_future_has_it(start, tmp_path):
    server = start()
    future = server.submit(b'"the payload 7f3a"')
    HTTP(server).complete(HTTP(server).poll(), b'"the result 9c1d"')
    future.result(10)
    journal = (tmp_path / "data" / "journal.jsonl").read_bytes()
    assert b"the payload 7f3a" in journal and b"the result 9c1d" in journal


def test_futures_are_those_of_the_standard_library(start, serve):
    server = start()
    working = serve(server, lambda job: job.complete(job.payload * 2))
    futures = {server.submit(b"%d" % number): number for number in range(10)}
    done, waiting = concurrent.futures.wait(futures, timeout=10)
    assert (len(done), waiting) == (10, set())
    assert all(future.result() == b"%d" % number * 2 for future, number in futures.items())
    called = threading.Event()
    server.submit(b"1").add_done_callback(lambda _future: called.set())
    assert called.wait(10)

    async def ask():
        return await asyncio.gather(*[asyncio.wrap_future(server.submit(b"%d" % number)) for number in range(5)])

    assert asyncio.run(ask()) == [b"%d" % number * 2 for number in range(5)]
    server.stop(drain=0)
    working.result(10)


def test_a_callback_may_submit_again(start, serve):
    server = start()
    serve(server, lambda job: job.complete(job.payload))
    results = []

    def again(future):
        results.append(future.result())
        if len(results) < 5:
            server.submit(b"%d" % len(results)).add_done_callback(again)

    server.submit(b"0").add_done_callback(again)
    wait_until(lambda: len(results) == 5)
    assert results == [b"%d" % number for number in range(5)]


def test_cancelling_a_future_does_not_cancel_its_job(start):
    server = start()
    future = server.submit(b"1")
    future.cancel()
    job = HTTP(server).poll()
    HTTP(server).complete(job, b'"done"')
    assert Client(server).result(job.id) == b'"done"'


# == jobs()


def test_a_worker_in_the_program_completes_jobs_of_every_client(start, serve):
    server = start("data", grpc_port=0)

    def work(job):
        assert job.queue == "queue"
        job.complete(b'{"of": ' + job.payload + b"}")

    working = serve(server, work, "queue")
    assert server.submit(b"1.0", queue="queue").result(10) == b'{"of": 1.0}'
    assert Client(server).submit(b"2", queue="queue").json()["payload"] == {"of": 2}
    server.stop(drain=0)
    assert working.result(10) is None, "the loop ends with the server"


def test_a_job_in_the_program_says_what_it_is(start):
    server = start()
    job_id = Client(server).put(b"\xff\x00", {"Content-Type": "image/png"}, queue="b")
    job = next(server.jobs("a", "b"))
    assert (job.id, job.queue, job.payload, job.attempt) == (job_id, "b", b"\xff\x00", 1)
    assert job.headers["Content-Type"] == "image/png"
    job.complete("text")
    assert Client(server).result(job_id) == b"text"


def test_without_a_queue_the_jobs_are_those_of_default(start):
    server = start()
    Client(server).put(queue="other")
    job_id = Client(server).put()
    job = next(server.jobs())
    assert job.id == job_id
    job.complete()
    assert Client(server).result(job_id) == b"{}"


def test_a_failed_job_is_tried_again_and_then_its_submitter_is_told(start):
    server = start()
    future = server.submit(b"1", attempts=2)
    jobs = server.jobs()
    next(jobs).fail("first", delay=0)
    job = next(jobs)
    assert job.attempt == 2
    job.fail("second")
    with pytest.raises(jobqueue.JobQueueError, match="second"):
        future.result(10)


def test_a_job_may_be_failed_for_good(start):
    server = start()
    future = server.submit(b"1")
    next(server.jobs()).fail("hopeless", retry=False)
    with pytest.raises(jobqueue.JobQueueError, match="hopeless"):
        future.result(10)


def test_an_error_that_names_a_file_whose_name_is_no_text_is_taken(start):
    server = start()
    future = server.submit(b"1")
    next(server.jobs()).fail(f"cannot open {os.fsdecode(bytes([0xFF]))}", retry=False)
    with pytest.raises(jobqueue.JobQueueError, match=re.escape(r"cannot open \udcff")):
        future.result(10)
    assert Client(server).view(future.job_id)["error"] == r"cannot open \udcff"


def test_a_released_job_comes_back_uncounted(start):
    server = start()
    server.submit(b"1")
    jobs = server.jobs()
    first = next(jobs)
    first.release()
    second = next(jobs)
    assert (second.id, second.attempt) == (first.id, 1)


def test_a_lease_can_be_extended_and_says_whether_the_job_is_still_wanted(start):
    server = start()
    server.submit(b"1")
    job = next(server.jobs(lease=10))
    server.clock.advance(9)
    assert job.extend(20)
    server.clock.advance(19)
    assert Client(server).status(job.id) == "processing"
    Client(server).cancel(job.id)
    assert not job.extend(20)
    with pytest.raises(jobqueue.JobQueueError) as no:
        job.complete(b"1")
    assert no.value.code == "job_finished"


WRONG = {
    "extend(-5)": lambda job: job.extend(-5),
    "extend(nan)": lambda job: job.extend(float("nan")),
    "extend(inf)": lambda job: job.extend(float("inf")),
    "extend(0.5)": lambda job: job.extend(0.5),
    "extend(word)": lambda job: job.extend("long"),
    "fail, delay=-5": lambda job: job.fail("x", delay=-5),
    "fail, delay=nan": lambda job: job.fail("x", delay=float("nan")),
    "fail, delay of a year": lambda job: job.fail("x", delay=365 * 86_400),
    "fail(bytes)": lambda job: job.fail(b"x"),
    "fail(None)": lambda job: job.fail(None),
}


@pytest.mark.parametrize("call", WRONG)
def test_what_cannot_be_done_to_a_job_is_refused_at_the_call_and_the_job_is_as_before(start, call):
    server = start()
    server.submit(b"1")
    job = next(server.jobs(lease=10))
    before = server.job(job.id)
    with pytest.raises((TypeError, ValueError)):
        WRONG[call](job)
    assert server.job(job.id) == before
    job.complete(b"1")
    assert server.job(job.id)["status"] == "completed"


@pytest.mark.parametrize("queues, options", [
    (("default",), {"lease": -3}), (("default",), {"lease": float("nan")}), (("default",), {"lease": 0}),
    (("bad name!",), {}), (("default", ""), {}), (("q" * 65,), {}), (("default",), {"worker": "a\nb"}),
], ids=str)
def test_jobs_that_cannot_be_asked_for_are_refused_at_the_call_and_none_is_taken(start, queues, options):
    server = start()
    future = server.submit(b"1")
    with pytest.raises((TypeError, ValueError)):
        server.jobs(*queues, **options)
    assert server.job(future.job_id)["status"] == "pending"


def test_a_lease_that_was_lost_is_an_error_with_its_code(start):
    server = start()
    server.submit(b"1")
    jobs = server.jobs(lease=10)
    old = next(jobs)
    server.clock.advance(11)
    new = next(jobs)
    assert (new.id, new.attempt) == (old.id, 2)
    for verb in (old.complete, lambda: old.fail("x"), old.release, lambda: old.extend(5)):
        with pytest.raises(jobqueue.JobQueueError) as no:
            verb()
        assert no.value.code == "lease_lost"
    new.complete(b"1")


def test_a_completion_returns_when_it_is_on_disk(start, tmp_path):
    server = start()
    server.submit(b"1")
    next(server.jobs()).complete(b'"result 51f2"')
    assert b"result 51f2" in (tmp_path / "data" / "journal.jsonl").read_bytes()


def test_many_workers_in_the_program_share_the_jobs(start, serve):
    server = start(clock=jobqueue.Clock())
    done = []

    def work(job):
        done.append(job.id)
        job.complete(job.payload)

    working = [serve(server, work) for _ in range(4)]
    futures = [server.submit(b"%d" % number) for number in range(100)]
    assert [future.result(10) for future in futures] == [b"%d" % number for number in range(100)]
    assert len(done) == len(set(done)) == 100
    server.stop(drain=5)
    for future in working:
        future.result(10)


def test_a_loop_that_is_left_leaves_no_waiting_worker_behind(start):
    server = start()
    server.submit(b"1")
    for job in server.jobs():
        job.complete(b"1")
        break
    assert Client(server).stats()["waiting_workers"] == 0
    future = server.submit(b"2")
    HTTP(server).complete(HTTP(server).poll(), b"2")
    assert future.result(10) == b"2"


def test_a_program_and_its_server_stop_while_a_loop_waits(start, serve):
    server = start()
    working = [serve(server, lambda job: None) for _ in range(3)]
    wait_until(lambda: Client(server).stats()["waiting_workers"] == 3)
    server.stop(drain=0)
    for future in working:
        assert future.result(10) is None


# == Callbacks


def test_a_callback_that_hangs_holds_up_nobody_else(start):
    """It runs in no thread that serves, syncs or holds a lock; even what waits for a sync may be called there."""
    server, gate = start(), threading.Event()
    seen = []

    def callback(future):
        server.cancel(other.job_id)
        seen.append(future.result())
        gate.wait(20)

    other = server.submit(b"2", queue="other")
    first = server.submit(b"1")
    first.add_done_callback(callback)
    worker = HTTP(server)
    worker.complete(worker.poll(), b"done")
    wait_until(lambda: seen)
    try:
        assert seen == [b"done"]
        second = server.submit(b"3")
        worker.complete(worker.poll(), b"too")
        assert second.result(5) == b"too"
        assert ok(Client(server).call("GET", "/health")) == {"status": "ok"}
    finally:
        gate.set()
    with pytest.raises(jobqueue.JobQueueError, match="cancelled"):
        other.result(5)


# == What goes wrong around it

INTERRUPTED = """
import _thread, random, sys, threading, time, jobqueue
folder, seed = sys.argv[1:]
rng, inside, done, taken = random.Random(seed), threading.Event(), threading.Event(), []
def interrupt():  # one at a time, and only there where the program is ready for it
    for _ in range(200):
        inside.wait()
        time.sleep(rng.uniform(0.0005, 0.003))
        inside.clear()
        _thread.interrupt_main()
    inside.wait()
    done.set()
with jobqueue.Server(data_dir=folder, port=0, grpc_port=None, drain=0, fsync="never") as server:
    threading.Thread(target=interrupt, daemon=True).start()
    while not done.is_set():
        try:
            inside.set()
            while not done.is_set():
                taken.append(server.submit(b"1").job_id)
                job = next(server.jobs(lease=600))
                job.extend(700)
                job.complete(b"2")
        except (KeyboardInterrupt, StopIteration):
            pass
    total = server.engine.stats()["total"]
with jobqueue.Server(data_dir=folder, port=0, grpc_port=None, drain=0) as server:
    assert {server.job(job_id)["status"] for job_id in taken} <= {"completed", "pending", "processing"}
    assert server.engine.stats()["total"] == total >= len(taken) > 20, (total, len(taken))
"""


def test_ctrl_c_amid_a_call_leaves_it_done_or_not_done_and_the_journal_whole(tmp_path, seed):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "data"), str(seed)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


STOPPED_AGAIN = """
import signal, socket, sys, threading, time, jobqueue
server = jobqueue.Server(data_dir=sys.argv[1], port=0, grpc_port=0).start()
server.submit(b"1")
# Who takes no answers keeps the stop waiting for a while.
deaf = socket.socket()
deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
deaf.connect(("127.0.0.1", server.port))
deaf.sendall(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n" * 400)
# Not before an answer to it is stuck: of one whose answers are still to come, no stop waits for long.
while not [each for each in list(server._http.connections) if each._events & jobqueue._WRITE]:
    time.sleep(0.005)
def calls(thread):
    frame, names = sys._current_frames().get(thread.ident), set()
    while frame:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names
def is_in(step):
    others = [thread for thread in threading.enumerate() if thread.name == "jobqueue-stop"]
    return "stop" in calls(threading.main_thread()) and any(step in calls(thread) for thread in others)
def interrupt(step):
    while not is_in(step):
        time.sleep(0.005)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
for step in ("_close", "join", "join"):  # at any time; where the deaf one is waited for
    threading.Thread(target=interrupt, args=(step,), daemon=True).start()
    try:
        server.stop(drain=0)
    except KeyboardInterrupt:
        pass
    else:
        sys.exit("the stop was not interrupted")
    assert not server.stopped.is_set()
deaf.close()
server.stop(drain=0)
assert server.stopped.is_set()
assert not [thread.name for thread in threading.enumerate() if thread.name == "jobqueue-http"]
with jobqueue.Server(data_dir=sys.argv[1], port=0, grpc_port=None, drain=0) as server:
    assert next(server.jobs()).payload == b"1"
"""


def test_a_stop_that_ctrl_c_ended_late_is_finished_by_another(tmp_path):
    command = [sys.executable, "-c", STOPPED_AGAIN, str(tmp_path / "data")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.decode()) == (0, "")


# What programs do with a server at their ends, in handlers of signals, and in children.
PROGRAMS = {
    "its main thread has ended, and another one goes on": """
server = Server().start()
def work():
    for job in server.jobs():
        job.complete(b"done")
def program():
    threading.main_thread().join()
    print(server.submit(b"1").result(20))
    server.stop(drain=0)
    print(server.stopped.is_set())
threading.Thread(target=work, daemon=True).start()
threading.Thread(target=program).start()
""",
    "it stops the server at its exit": """
server = Server().start()
def stop():
    server.stop(drain=0)
    print(server.stopped.is_set())
atexit.register(stop)
server.submit(b"1")
print('"op":"close"' in open(sys.argv[1] + "/journal.jsonl").read() or b"done")
""",
    "a handler stops the server while another call of it does": """
server = Server(drain=2).start()
signal.signal(signal.SIGTERM, lambda *_: server.stop())
server.submit(b"1")
job = next(server.jobs())
def kill():
    while not server.engine.draining():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(0.1)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
threading.Thread(target=kill, daemon=True).start()
while not server.stopped.is_set():
    time.sleep(0.01)
print(b"done")
print(True)
""",
    "a handler stops the server amid submits": """
for after in (5, 20, 40, 60, 90, 120, 160, 200):
    server = Server(fsync="never").start()
    signal.signal(signal.SIGTERM, lambda *_: server.stop(drain=0))
    def kill(count):
        while server.engine.stats()["total"] < count:
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    threading.Thread(target=kill, args=(after,), daemon=True).start()
    try:
        while True:
            server.submit(b"1")
    except jobqueue.JobQueueError as error:
        assert error.code == "draining", error
print(b"done")
print(server.stopped.is_set())
""",
    "a handler raises what is its own while a loop waits for jobs": """
class TooLong(Exception):
    pass
def ring(*_):
    raise TooLong
signal.signal(signal.SIGALRM, ring)
with Server() as server:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        next(server.jobs())
    except TooLong:
        pass
    future = server.submit(b"1")
    next(server.jobs()).complete(b"done")
    print(future.result(20))
print(server.stopped.is_set())
""",
    "a child that it forked leaves the with block": """
with Server() as server:
    future = server.submit(b"1")
    child = os.fork()
    if not child:
        for use in (lambda: server.submit(b"2"), lambda: next(server.jobs())):
            try:
                use()
                os._exit(1)
            except RuntimeError:
                pass
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    next(server.jobs()).complete(b"done")
    print(future.result(20))
print(server.stopped.is_set())
""",
    "a child that it forked outlives the server": """
server = Server().start()
idle = socket.create_connection(("127.0.0.1", server.port))
idle.sendall(b"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
assert idle.recv(1000)
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
server.stop(drain=0)
idle.settimeout(20)
assert idle.recv(1000) == b""
with Server(port=server.port) as another:
    future = another.submit(b"1")
    next(another.jobs()).complete(b"done")
    print(future.result(20))
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print(server.stopped.is_set())
""",
}
BEGINNING = """
import atexit, functools, os, signal, socket, sys, threading, time, warnings, jobqueue
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork where there are threads
Server = functools.partial(jobqueue.Server, **{"data_dir": sys.argv[1], "port": 0, "grpc_port": None})
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_many_kinds_get_their_results_and_come_to_their_end(tmp_path, program):
    command = [sys.executable, "-c", BEGINNING + PROGRAMS[program], str(tmp_path / "data")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert (done.stdout.decode().split(), done.stderr.decode()) == (["b'done'", "True"], "")
    assert done.returncode == 0
    assert '"op":"close"' in (tmp_path / "data" / "journal.jsonl").read_text().splitlines()[-1]


def test_what_is_submitted_while_the_server_stops_gets_its_end(start, monkeypatch):
    server, made, bound = start(), threading.Event(), jobqueue._result_future

    def slow(answer, tellers):
        made.set()
        assert server.stopped.wait(20)
        return bound(answer, tellers)

    monkeypatch.setattr(jobqueue, "_result_future", slow)
    submitting = later(server.submit, b"1")
    assert made.wait(20)
    server.stop(drain=0)
    with pytest.raises(jobqueue.JobQueueError) as caught:
        submitting.result(20).result(20)
    assert caught.value.code == "draining"


def test_callbacks_that_end_their_thread_leave_others_to_tell_of_results(start, caplog):
    server = start()
    jobs = server.jobs()
    for _ in range(40):  # more than there are threads
        future = server.submit(b"1")
        future.add_done_callback(lambda _: sys.exit())
        next(jobs).complete(b"2")
        assert future.result(20) == b"2"
    wait_until(lambda: caplog.text.count("callback_failed") == 40)


@pytest.fixture
def no_threads(monkeypatch):
    """Names of which no thread can be started, as where the system has no more."""
    names, begin = set(), threading.Thread.start

    def refused(thread):
        if any(name in thread.name for name in names):
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    return names


def test_where_no_thread_is_to_be_had_calls_are_made_and_results_told_all_the_same(start, no_threads):
    server = start()
    no_threads |= {"jobqueue-tell", "jobqueue-stop"}
    future = server.submit(b"1")
    next(server.jobs()).complete(b"2")
    assert future.result(20) == b"2"
    no_threads.add("process_request_thread")
    assert call(server.url, "GET", "/api/admin/stats").status == 503
    no_threads.discard("process_request_thread")
    assert call(server.url, "GET", "/api/admin/stats").status == 200
    server.stop(drain=0)
    assert server.stopped.is_set()


@pytest.mark.parametrize("name", ["jobqueue-http", "jobqueue-timer", "jobqueue-commit", "jobqueue-grpc"])
def test_a_start_without_its_threads_leaves_the_folder_free(tmp_path, no_threads, name):
    if name == "jobqueue-grpc":
        pytest.importorskip("grpc", reason="grpcio is not installed")
    before = {thread for thread in threading.enumerate() if "jobqueue" in thread.name}
    no_threads.add(name)
    settings = {"data_dir": tmp_path / "data", "port": 0, "grpc_port": 0 if name == "jobqueue-grpc" else None}
    with pytest.raises(RuntimeError, match="thread"):
        jobqueue.Server(**settings).start()
    no_threads.clear()
    wait_until(lambda: not {thread for thread in threading.enumerate() if "jobqueue" in thread.name} - before)
    jobqueue.Server(**settings).start().stop(drain=0)


def test_a_program_that_changes_its_directory_keeps_its_journal(tmp_path, monkeypatch):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "theirs")
    theirs = jobqueue.Server(data_dir="data", port=0, grpc_port=None, compact_bytes=20_000, keep_jobs=2).start()
    kept = theirs.submit(b"kept").job_id
    monkeypatch.chdir(tmp_path / "mine")
    mine = jobqueue.Server(data_dir="data", port=0, grpc_port=None, compact_bytes=20_000, keep_jobs=2).start()
    monkeypatch.chdir(tmp_path / "theirs")
    jobs = mine.jobs()
    while not mine.engine.figures()["compactions_total"]:
        mine.submit(b"x" * 1000)
        next(jobs).complete()
    last = mine.submit(b"last").job_id
    for server, folder, job_id in ((mine, "mine", last), (theirs, "theirs", kept)):
        server.stop(drain=0)
        with jobqueue.Server(data_dir=tmp_path / folder / "data", port=0, grpc_port=None) as again:
            assert again.job(job_id)["status"] == "pending"


def test_when_the_disk_fails_everybody_who_waits_in_the_program_or_outside_is_told(start, monkeypatch):
    server = start()
    future, held = server.submit(b"1", queue="nobody"), later(lambda: Client(server).submit(b"2", queue="nobody"))
    worker = later(lambda: list(server.jobs("none")))
    wait_until(lambda: (server.engine.stats()["waiting_clients"], server.engine.stats()["waiting_workers"]) == (2, 1))
    called = threading.Event()
    server.when_failed(called.set)

    def broken(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(jobqueue, "_sync_data", broken)
    with pytest.raises(jobqueue.JobQueueError) as refusal:
        server.cancel(server.submit(b"3", queue="nobody").job_id)
    assert refusal.value.code == "outcome_unknown"
    with pytest.raises(jobqueue.JobQueueError) as refusal:
        future.result(10)
    assert (refusal.value.code, refusal.value.job_id) == ("outcome_unknown", future.job_id)
    answer = held.result(10)
    assert (answer.status, answer.json()["code"]) == (503, "outcome_unknown")
    assert answer.json()["job_id"]
    assert worker.result(10) == []
    assert called.wait(10) and server.failed.is_set()
    assert Client(server).call("GET", "/ready").status == 503


def test_a_full_disk_does_not_end_a_programs_worker(start, serve, monkeypatch):
    server, done = start(), []
    server.submit(b"1")
    write_all, full = jobqueue._write_all, threading.Event()
    refused = threading.Event()

    def write(fd, data):
        if full.is_set():
            refused.set()
            raise OSError(28, "No space left on device")
        write_all(fd, data)

    full.set()
    monkeypatch.setattr(jobqueue, "_write_all", write)
    worker = serve(server, lambda job: (job.complete(b"2"), done.append(job.id)))
    assert refused.wait(10)
    full.clear()
    wait_until(lambda: done)
    server.stop(drain=0)
    worker.result(10)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 and newer; the child only waits
def test_a_child_that_was_forked_does_not_keep_the_data_folder_locked(tmp_path):
    server = jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None).start()
    ready, over = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(over[0], 1)
        os._exit(0)
    try:
        server.stop(drain=0)
        jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None).start().stop(drain=0)
    finally:
        os.write(over[1], b"x")
        os.waitpid(child, 0)
        for fd in (*ready, *over):
            os.close(fd)


def test_a_job_whose_poll_was_let_go_with_its_answer_on_the_way_is_back_in_line(start):
    server = start()
    server.submit(b"1")
    (job,) = server.engine.poll(jobqueue.Claim()).result(10)
    poll = jobqueue.Future()
    assert poll.claim()  # it is being answered, but is not yet
    server._let_go(poll)
    assert server.job(job.id)["status"] == "processing"
    poll.set_result([job])
    assert server.job(job.id)["status"] == "pending"


def test_a_program_is_told_which_tls_file_is_wrong_and_asked_for_no_pass_phrase(tmp_path, certs):
    server = jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, tls_cert="/nowhere/cert")
    with pytest.raises(ValueError, match=r"^--tls-cert /nowhere/cert: No such file"):
        server.start()
    server = jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, tokens="/nowhere/tokens")
    with pytest.raises(ValueError, match=r"^--tokens /nowhere/tokens: No such file"):
        server.start()
    assert not (tmp_path / "data").exists()


def test_a_client_that_does_not_read_its_answer_is_read_no_further(start):
    """What it sends on stays in its own memory, and is served once it reads."""
    server = start()
    big = b"x" * 4_000_000
    job_id = server.submit(big, queue="big").job_id
    one = b"POST /api/submit?wait=0&queue=on HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n" + big
    asked = b"GET /api/jobs/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % job_id.encode()
    rest = memoryview(asked * 3 + one * 8)
    with socket.create_connection(("127.0.0.1", server.port), 10) as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        caller.settimeout(1)
        with pytest.raises(TimeoutError):  # it is not taken any more
            while rest:
                rest = rest[caller.send(rest[:65536]) :]
        assert max(len(connection._buffer) for connection in list(server._http.connections)) < 200_000
        caller.settimeout(20)
        sender = later(lambda: (caller.sendall(rest), caller.shutdown(socket.SHUT_WR)))
        received = bytearray()
        while received.count(b"HTTP/1.1 202 ") < 8:
            received += caller.recv(1 << 20)
        sender.result(20)
    assert received.count(b"HTTP/1.1 200 ") == 3
    assert server.engine.stats()["queues"]["on"]["pending"] == 8


def test_a_requeue_that_the_disk_stops_midway_says_what_was_done(start, monkeypatch):
    server = start(reserve=0)
    monkeypatch.setattr(jobqueue.LocalEngine, "SWEEP", 2)
    for number in range(6):
        server.submit(b"%d" % number, attempts=1)
        next(server.jobs()).fail("no")
    write_all, pages = jobqueue._write_all, []

    def write(fd, data):
        pages.append(data)
        if len(pages) > 1:
            raise OSError(28, "No space left on device")
        write_all(fd, data)

    client = Client(server)
    with monkeypatch.context() as patch:
        patch.setattr(jobqueue, "_write_all", write)
        answer = client.call("POST", "/api/admin/requeue")
        assert answer.status == 200
        assert answer.json()["requeued"] == 2 and "No space" in answer.json()["stopped"]
        refusal = client.call("POST", "/api/admin/requeue")
        assert (refusal.status, refusal.json()["code"]) == (507, "disk_full")
    assert (server.engine.stats()["pending"], server.engine.stats()["failed"]) == (2, 4)
    assert client.call("POST", "/api/admin/requeue").json() == {"message": "Jobs requeued", "requeued": 4}


def test_the_serving_thread_does_not_spin_while_another_one_waits_for_the_disk(start, monkeypatch):
    server, at_it, over, turns = start(fsync="always"), threading.Event(), threading.Event(), []
    real, select = jobqueue._sync_data, server._http.selector.select

    def slow(file):
        if threading.current_thread().name == "jobqueue-commit":
            at_it.set()
            assert over.wait(60)
        real(file)

    def counted(patience=None):
        turns.append(patience)
        return select(patience)

    monkeypatch.setattr(jobqueue, "_sync_data", slow)
    monkeypatch.setattr(server._http.selector, "select", counted)
    monkeypatch.setattr(server._http, "_spins", 0)  # busy polling is bounded, and not meant here
    mine = server.engine.pause("another", True)
    assert at_it.wait(60)
    try:
        theirs = later(call, server.url, "POST", "/api/submit?wait=0", b"2")
        wait_until(lambda: server.engine.stats()["pending"] == 1, what="the client's job")
        turns.clear()
        for _ in range(20):
            assert call(server.url, "GET", "/health").status == 200
        assert len(turns) < 500, "a turn for what comes, and none for what does not"
    finally:
        over.set()
    assert theirs.result(60).status == 202
    assert mine.result(60) == ["another"]


SPINS = jobqueue.HTTPServer.SPINS


@pytest.mark.parametrize(
    ("processors", "waits", "at_once", "passing", "asked"),
    [
        (2, True, 1, 0.0, SPINS),
        (1, True, 1, 0.0, 0),
        (2, False, 1, 0.0, 0),
        (2, True, 2, 0.0, 0),
        (2, True, 1, 0.001, 0),
    ],
    ids=["brisk", "one processor", "nobody waits", "two things at once", "long after the last"],
)
def test_before_it_sleeps_the_serving_thread_asks_a_few_times_where_that_may_pay(
    start, monkeypatch, processors, waits, at_once, passing, asked
):
    class Passing(FakeClock):
        def monotonic(self):
            with self._lock:
                self._now += passing
            return super().monotonic()

    monkeypatch.setattr(jobqueue, "_processors", lambda: processors)
    server, turns = start(clock=Passing() if passing else FakeClock()), []  # else whatever happens happens at once
    select = server._http.selector.select
    if waits:
        held = later(call, server.url, "GET", "/api/worker/poll?wait=200")
        wait_until(lambda: server.engine.stats()["waiting_workers"] == 1)

    def watched(patience=None):
        events = select(patience)
        turns.append("something" if events else "nothing yet" if patience == 0 else "slept")
        return events * at_once

    monkeypatch.setattr(server._http.selector, "select", watched)
    for _ in range(2):
        assert call(server.url, "GET", "/health").status == 200
    wait_until(lambda: turns[-1:] == ["slept"], what="the server to sleep")
    polls = [len(list(run)) for turn, run in itertools.groupby(turns) if turn == "nothing yet"]
    assert max(polls, default=0) == asked
    server.stop(drain=0)
    if waits:
        assert held.result(10).status == 204


@pytest.mark.parametrize(
    ("limit", "usable"),
    [
        (None, 2),
        ("max 100000", 2),
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("150000 100000", 1),
        ("200000 100000", 2),
        ("6400000 100000", 2),
        ("nonsense", 2),
    ],
)
@pytest.mark.parametrize("group", ["/", "/system.slice/jobqueue.service"])
def test_of_a_share_of_the_processors_what_is_whole_is_counted(tmp_path, monkeypatch, limit, usable, group):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    (tmp_path / "cgroup").write_text(f"4:memory:/other\n1:cpu:/\n0::{group}\n")
    folder = tmp_path / group.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    if limit:
        (folder / "cpu.max").write_text(f"{limit}\n")
    assert jobqueue._processors(str(tmp_path / "cgroup"), str(tmp_path)) == usable


def test_after_a_sync_that_hung_the_serving_thread_leaves_the_next_to_another_for_a_minute(start, monkeypatch):
    clock, took, real, by = FakeClock(), [0.0], jobqueue._sync_data, []

    def slow(file):
        by.append(threading.current_thread().name == "jobqueue-commit")
        clock.advance(took[0])
        real(file)

    server = start(clock=clock)
    monkeypatch.setattr(jobqueue, "_sync_data", slow)

    def left_to_another(seconds):
        """Who synced for a client, by a sync that took so long?"""
        wait_until(lambda: clock.sleepers() == 2)  # the other one, which a clock that moves wakes, looks on no more
        took[0] = seconds
        by.clear()
        assert call(server.url, "POST", "/api/submit?wait=0", b"1").status == 202
        return by[0]

    assert not left_to_another(0.0)
    assert not left_to_another(0.006)  # slow, but it did not hang: the next is left to another, those after are not
    assert left_to_another(0.0)
    assert not left_to_another(0.2)
    assert left_to_another(0.0)
    clock.advance(59)
    assert left_to_another(0.0)
    clock.advance(2)
    assert left_to_another(0.0)  # by which it is found to be quick again
    assert not left_to_another(0.0)


def test_a_request_that_waits_behind_another_is_served_though_its_client_sends_nothing_more(start, monkeypatch):
    """The end of the stream comes with the answer to the first, which a sync at the end of a turn gives."""
    server = start()
    commit = jobqueue.LocalEngine.commit
    with socket.create_connection(("127.0.0.1", server.port), 20) as client:

        def commits(engine):
            commit(engine)
            with contextlib.suppress(OSError):  # a second time
                client.shutdown(socket.SHUT_WR)

        monkeypatch.setattr(jobqueue.LocalEngine, "commit", commits)
        client.sendall(
            b"POST /api/submit?wait=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        answers = b""
        while data := client.recv(65536):
            answers += data
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"202", b"200"]


def test_another_engine_can_take_the_place_of_the_local_one(start):
    class Counting(jobqueue.LocalEngine):
        made = []

        def __init__(self, settings, clock, failed):
            super().__init__(settings, clock, failed)
            self.made.append((self, settings, clock))

        def submit(self, *arguments):
            self.submitted = arguments
            return super().submit(*arguments)

    server = start(engine=Counting)
    assert Counting.made == [(server.engine, server.settings, server.clock)]
    assert call(server.url, "POST", "/api/submit?wait=0", b"7").status == 202
    assert server.engine.submitted[1] == b"7"


def test_a_future_that_is_cancelled_waits_no_more_and_its_job_goes_on(start):
    server = start()
    futures = [server.submit(b"1") for _ in range(3)]
    assert server.engine.stats()["waiting_clients"] == 3
    assert futures[0].cancel() and futures[1].cancel()
    assert server.engine.stats()["waiting_clients"] == 1
    assert server.engine.stats()["pending"] == 3


def test_a_compaction_that_breaks_leaves_nothing_behind_and_is_tried_again_later(start, tmp_path, monkeypatch):
    clock, tried = FakeClock(), []
    server = start(clock=clock, compact_bytes=20_000, keep_jobs=2)
    jobs = server.jobs()

    def work(count):
        for _ in range(count):
            server.submit(b"x" * 1000)
            next(jobs).complete()

    def broken(job):
        tried.append(job)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(jobqueue, "job_text", broken)
        work(40)
        wait_until(lambda: tried and server.engine._compacting is None)
        work(40)
        assert len(tried) == 1
    assert not (tmp_path / "data" / "journal.jsonl.new").exists()
    clock.advance(11)
    work(1)
    wait_until(lambda: server.engine.figures()["compactions_total"] == 1)


def test_a_future_does_not_keep_what_was_submitted_and_is_freed_when_it_is_dropped(start):
    server, payload = start(keep_jobs=0), b"x" * 1_000_000
    own = sys.getrefcount(payload)
    gc.disable()
    try:
        future, jobs = server.submit(payload), server.jobs()
        next(jobs).complete(b"1")
        jobs.close()
        assert future.result(10) == b"1"
        wait_until(lambda: sys.getrefcount(payload) == own, what="the payload to be nobody else's")
        known = weakref.ref(future)
        del future
        wait_until(lambda: known() is None, what="the future to be freed")
    finally:
        gc.enable()


def test_a_compaction_that_breaks_in_the_committing_thread_stops_nobody(start, tmp_path, monkeypatch):
    server, tried = start(compact_bytes=20_000, keep_jobs=2), []
    follow, jobs = jobqueue._NewFile.follow, server.jobs()

    def broken(new):
        if threading.current_thread().name == "jobqueue-commit":
            tried.append(new)
            raise MemoryError
        follow(new)

    monkeypatch.setattr(jobqueue._NewFile, "follow", broken)
    for _ in range(40):
        server.submit(b"x" * 1000)
        next(jobs).complete()
    wait_until(lambda: tried and server.engine._compacting is None)
    assert server.engine.figures()["compactions_total"] == 0
    assert not (tmp_path / "data" / "journal.jsonl.new").exists()
    assert server.submit(b"1").job_id and not server.failed.is_set()


def test_a_callback_that_raises_keeps_nobody_else_from_the_answer(caplog):
    future, told = jobqueue.Future(), []
    future.add_done_callback(told.append)
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(told.append)
    assert future.claim()
    future.set_result(1)
    assert told == [future, future] and "callback_failed" in caplog.text


def test_when_the_committing_thread_breaks_whoever_waits_is_told(start, monkeypatch):
    server, sync = start(), jobqueue._sync_data

    def broken(file):
        if threading.current_thread().name == "jobqueue-commit":
            raise MemoryError
        sync(file)

    monkeypatch.setattr(jobqueue, "_sync_data", broken)
    with pytest.raises(jobqueue.JobQueueError) as refusal:
        server.cancel(server.submit(b"1").job_id)
    assert refusal.value.code == "outcome_unknown" and server.failed.is_set()


@pytest.mark.parametrize("path", ["/health", "/api/submit?wait=0"])
def test_a_connection_whose_answer_cannot_be_made_is_closed(start, monkeypatch, caplog, path):
    server = start()

    def broken(*arguments):
        raise ValueError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(jobqueue, "render", broken)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            call(server.url, "POST" if "submit" in path else "GET", path)
    assert "connection_failed" in caplog.text and "a mistake" in caplog.text
    assert call(server.url, "GET", "/health").status == 200
