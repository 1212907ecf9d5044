"""The examples do real work: gzip and sha256sum of this repository's files, for ten clients at once."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import jobqueue
from support import ROOT, FakeClock, start_server, wait_until
from wires import WORKERS, Client, at_once, later

PATTERNS = ("*.py", "*.md", "*.toml", "LICENSE", "Makefile", "proto/*", "worker_pb2_gen/*.py", "tests/*.py")
FILES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern)) if path.is_file()][:30]
BASH, GRPC = "worker.sh", "worker_grpc.py"
CLIENTS = 10


@pytest.fixture
def server(request, tmp_path):
    """With a clock that runs, as the workers are processes, or with the one that a test brings."""
    clock = getattr(request, "param", jobqueue.Clock)()
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=0, clock=clock) as server:
        yield server
        server.stop(drain=0)


@pytest.fixture
def run(server):
    """run(example, *arguments): an example as a process, which works for the server."""
    running = []

    def start(example, *arguments, **environment):
        if example == GRPC:
            pytest.importorskip("grpc", reason="grpcio is not installed")
            command = [sys.executable, str(ROOT / "examples" / GRPC), "--target", f"127.0.0.1:{server.grpc_port}"]
        else:
            if not (shutil.which("bash") and shutil.which("curl")):
                pytest.skip("needs bash and curl")
            command = [str(ROOT / "examples" / example)]
        env = {**os.environ, "JOBQUEUE_URL": server.url, **environment}
        process = subprocess.Popen([*command, *arguments], env=env, stderr=subprocess.PIPE, start_new_session=True)
        running.append(process)
        return process

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the command that it runs, too
        process.wait(10)
        process.stderr.close()


def result_of(answer):
    """The result's bytes, as a client reads them from the answer to its submit."""
    assert answer.status == 200, answer
    said = answer.json()
    if said.get("payload_encoding") == "base64":
        return base64.b64decode(said["payload"], validate=True)
    assert isinstance(said["payload"], str)
    return said["payload"].encode()


def options(example, **given):
    """The options of both workers have different names."""
    names = {"queue": "-q", "folder": "-d", "lease": "-l", "type": "-t"} if example == BASH else {}
    return [part for name, value in given.items() for part in (names.get(name, f"--{name}"), str(value))]


@pytest.mark.parametrize("example", [BASH, GRPC])
def test_ten_clients_at_once_get_the_gzip_of_their_own_files(server, run, example):
    run(example, *options(example, queue="zip"), "gzip", "-cn")
    run(example, *options(example, queue="zip"), "gzip", "-cn")

    def ask(number):
        client = Client(server)
        for path in FILES[number::CLIENTS]:
            data = path.read_bytes()
            result = result_of(client.submit(data, {"Content-Type": "text/plain"}, queue="zip"))
            assert result == subprocess.run(["gzip", "-cn"], input=data, capture_output=True, check=True).stdout
            assert gzip.decompress(result) == data
        return "all right"

    assert at_once(*[lambda number=number: ask(number) for number in range(CLIENTS)]) == ["all right"] * CLIENTS


@pytest.mark.parametrize("example", [BASH, GRPC])
def test_ten_clients_at_once_get_the_checksum_of_the_files_they_name(server, run, tmp_path, example):
    folder = tmp_path / "files"
    for path in FILES:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    run(example, *options(example, queue="sums", folder=folder), "sha256sum")

    def ask(number):
        client = Client(server)
        for path in FILES[number::CLIENTS]:
            name = str(path.relative_to(ROOT))
            result = result_of(client.submit(name, queue="sums"))
            assert result.decode() == f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  -\n"
        return "all right"

    assert at_once(*[lambda number=number: ask(number) for number in range(CLIENTS)]) == ["all right"] * CLIENTS


PAYLOADS = {
    "text": b"plain text", "quotes": b'say "hello" \\ \\" \\n \\u0041 / \\/', "lines": b"one\n\ttwo\r\n\n",
    "controls": bytes(range(1, 32)) + b"\x7f", "NUL": b"a\0b", "umlauts": "Grüße \U0001f600 \u2028".encode(),
    "bytes": bytes(range(256)), "empty": b"", "percent": b"%s %d %% \\c $HOME `id` $(id)", "dashes": b"-n -e",
    "a large one": b"x y\n" * 250_000,
}
JSON = [b'{"a": 1.0, "a": [12345678901234567890 ]}', b"[1,\n 2]", b"null",
        b'{"job_id": "x","payload":1,"payload_encoding":"base64","headers":{"a":"b"},"lease_token":"y"}',
        b'[{"x":2,"headers":{"lease_token":"z"}},"payload",{"payload":[]}]']


@pytest.mark.parametrize("example", [BASH, GRPC])
def test_every_payload_reaches_the_command_byte_for_byte(server, run, example):
    run(example, "sh", "-c", "cat; printf '\\377'")  # a byte that makes each result binary
    client = Client(server)
    headers = {"X-Headers": '{"headers":{"a":1},"lease_token":"no"}', "X-Quote": '"\\'}
    for payload in [*PAYLOADS.values(), *JSON]:
        sent = payload if payload else b'""' if example == GRPC else b""
        assert result_of(client.submit(payload, headers)) == sent + b"\xff", payload[:80]


@pytest.mark.parametrize("example", [BASH, GRPC])
def test_a_command_that_fails_fails_its_job_with_its_last_words(server, run, example):
    run(example, "sh", "-c", "echo 'no such \"thing\"' >&2; exit 3")
    answer = Client(server).submit(b"x", attempts=1)
    assert answer.status == 502
    assert 'no such "thing"' in answer.json()["detail"]


@pytest.mark.parametrize("example", [BASH, GRPC])
def test_a_name_outside_of_the_folder_is_refused(server, run, tmp_path, example):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"classified")
    run(example, *options(example, folder=tmp_path / "files"), "cat")
    client = Client(server)
    assert result_of(client.submit(b"a")) == b"inside"
    for name in ("../secret", str(tmp_path / "secret"), "x/../../secret", "..", "/", "a\n../../secret"):
        answer = client.submit(name, attempts=1)
        assert answer.status == 502, name
        assert "classified" not in answer.body.decode()


@pytest.fixture
def gate(tmp_path):
    """A command that tells when it has begun, and goes on when it may."""

    class Gate:
        begun, opened = tmp_path / "begun", tmp_path / "opened"
        command = ("sh", "-c", f"touch {begun}; while [ ! -e {opened} ]; do sleep 0.02; done; echo done")

        def wait(self):
            wait_until(self.begun.exists, what="the command to begin")

        def open(self):
            self.opened.touch()

    return Gate()


@pytest.mark.parametrize("example", [BASH, GRPC])
@pytest.mark.parametrize("server", [FakeClock], ids=["still"], indirect=True)
def test_a_long_job_keeps_its_lease(server, run, gate, example):
    run(example, *options(example, lease=1), *gate.command)
    client = Client(server)
    held = later(client.submit, b"x")
    gate.wait()
    (job,) = client.call("GET", "/api/jobs").json()["jobs"]
    # Past the end of the first lease, the job is still in the same hands. The server's clock goes on once the worker
    # has extended it again, so that the worker has all the time in the world.
    for _ in range(4):
        server.clock.advance(0.3)
        wait_until(
            lambda old=job: client.view(old["job_id"])["lease_expires_at"] > old["lease_expires_at"],
            what="a lease that is extended",
        )
        job = client.view(job["job_id"])
    assert (job["deliveries"], job["status"]) == (1, "processing")
    gate.open()
    assert result_of(held.result(10)) == b"done\n"


@pytest.mark.parametrize("example", [BASH, GRPC])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_stopped_finishes_its_job_and_takes_no_other(server, run, gate, example, kind):
    worker = run(example, *gate.command)
    client = Client(server)
    held = later(client.submit, b"x")
    gate.wait()
    other = client.put(b"y")
    worker.send_signal(kind)
    gate.open()
    assert result_of(held.result(10)) == b"done\n"
    assert worker.wait(10) == 0
    assert client.status(other) == "pending"


@pytest.mark.parametrize("example", [BASH, GRPC])
def test_an_idle_worker_stops_at_once(server, run, example):
    worker = run(example, "cat")
    client = Client(server)
    client.wait_workers(1)
    worker.terminate()
    assert worker.wait(5) == 0
    wait_until(lambda: client.stats()["waiting_workers"] == 0, timeout=3)


REFUSED = {
    "a bad queue": ({"queue": "a b"}, "a b"),
    "a bad lease": ({"lease": 100_000}, "100000"),
}


@pytest.mark.parametrize("example", [BASH, GRPC])
@pytest.mark.parametrize("case", REFUSED)
def test_a_worker_that_is_refused_says_why_in_one_line_and_ends(server, run, example, case):
    given, names = REFUSED[case]
    worker = run(example, *options(example, **given), "cat")
    assert worker.wait(20) == 1
    errors = worker.stderr.read().decode()
    assert errors.startswith("the server refuses this worker: ") and errors.count("\n") == 1, errors
    assert names in errors


@pytest.fixture
def closed(tmp_path):
    """A server that wants a token of its workers."""
    tokens = tmp_path / "tokens"
    tokens.write_text("worker secret\nclient weak\n")
    tokens.chmod(0o600)
    with jobqueue.Server(data_dir=tmp_path / "closed", port=0, grpc_port=0, tokens=str(tokens)) as server:
        yield server
        server.stop(drain=0)


def test_a_worker_without_a_token_that_will_do_says_so_and_ends(closed, run):
    for token, why in (("", "401 send 'Authorization: Bearer TOKEN'"), ("weak", "403 this needs a token of scope")):
        worker = run(BASH, "cat", JOBQUEUE_URL=closed.url, JOBQUEUE_TOKEN=token)
        assert worker.wait(20) == 1
        assert worker.stderr.read().decode().startswith(f"the server refuses this worker: {why}")
    worker = run(GRPC, "--target", f"127.0.0.1:{closed.grpc_port}", "cat")
    assert worker.wait(20) == 1
    assert worker.stderr.read().decode().startswith("the server refuses this worker: send 'Authorization: ")


def test_the_bash_worker_of_the_readme_ends_with_the_servers_words_where_it_is_refused(closed, tmp_path):
    if not all(map(shutil.which, ("bash", "curl", "jq"))):
        pytest.skip("needs bash, curl and jq")
    (block,) = re.findall(r"```bash\n(# worker\.sh: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "worker.sh"
    script.write_text(block.replace("http://localhost:3000", closed.url))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("send 'Authorization: Bearer TOKEN'") and done.stderr.count("\n") == 1


def test_the_bash_worker_is_told_how_it_is_used(run):
    worker = run(BASH)
    assert worker.wait(10) == 2
    assert b"usage:" in worker.stderr.read()


# == The client


def ask(url, *arguments, **how):
    return subprocess.run([sys.executable, str(ROOT / "examples" / "client.py"), "--url", url, *arguments],
                          capture_output=True, timeout=60, **how)


def test_the_client_writes_the_bytes_of_the_result(server):
    worker = WORKERS["http"](server)
    pairs = ((b'{"x": 1.0}', b'{"y": 1.0, "y": 2}'), (b"text", b"\x89PNG\r\n\xff"), (b"\xff\n", b"plain\n"))
    for payload, result in pairs:
        asking = later(ask, server.url, "-", input=payload)
        job = worker.poll(wait=20)
        worker.complete(job, result)
        said = asking.result(30)
        assert (said.returncode, said.stdout, said.stderr) == (0, result, b"")


def test_the_client_says_why_there_is_no_result(server):
    worker = WORKERS["http"](server)
    asking = later(ask, server.url, "x")
    worker.fail(worker.poll(wait=20), "the worker's words", retry=False)
    said = asking.result(30)
    assert (said.returncode, said.stdout) == (1, b"")
    assert b"the worker's words" in said.stderr


def test_the_client_and_the_workers_survive_a_restart_of_the_server(tmp_path, gate):
    """The server is killed while the job runs, and comes back on the same port."""
    if not (shutil.which("bash") and shutil.which("curl")):
        pytest.skip("needs bash and curl")
    first = start_server(tmp_path, "--grpc-port", "off")
    worker = subprocess.Popen([str(ROOT / "examples" / BASH), *gate.command], stderr=subprocess.DEVNULL,
                              env={**os.environ, "JOBQUEUE_URL": first.url}, start_new_session=True)
    try:
        asking = later(ask, first.url, "x")
        gate.wait()
        first.kill()
        gate.open()
        second = start_server(tmp_path, "--grpc-port", "off", "--port", str(first.port))
        said = asking.result(40)
        assert (said.returncode, said.stdout) == (0, b"done\n")
        assert Client(second).stats()["total"] == 1
    finally:
        worker.terminate()
        worker.wait(10)
