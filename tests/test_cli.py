"""The command line, each command as a process of its own against a real server: what it prints and how it ends."""

from __future__ import annotations

import contextlib
import errno
import http.server
import io
import json
import os
import pty
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jobqueue
from support import ROOT, ServerProcess, call, start_server, wait_until
from wires import Client, Refused, WorkerOverGrpc, WorkerOverHttp, later

OK, NO, USAGE, DATA, UNREACHABLE, NOT_YET = 0, 1, 2, 3, 69, 75
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    """One for all tests here that do not stop it; each test has its own queues."""
    return start_server(tmp_path_factory.mktemp("cli"), "--fsync", "never", "--grpc-port", "off")


@pytest.fixture
def client(server: ServerProcess) -> Client:
    return Client(server)


@pytest.fixture
def queue(request: pytest.FixtureRequest) -> str:
    """A queue of this test alone."""
    return f"q{abs(hash(request.node.nodeid)):x}"[:40]


def environment(url: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JOBQUEUE_")}
    return {**kept, "JOBQUEUE_URL": url, **more}


def spawn(url: str, *arguments: str, given: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a process, to its end."""
    command = [sys.executable, str(ROOT / "jobqueue.py"), *arguments]
    return subprocess.run(command, input=given, capture_output=True, env=environment(url, **env), timeout=60)


def by_shell(url: str, arguments: str) -> subprocess.CompletedProcess[bytes]:
    """The same with what a shell has to say about standard input and output."""
    return subprocess.run(["sh", "-c", f'"{sys.executable}" "{ROOT / "jobqueue.py"}" {arguments}'],
                          env=environment(url), capture_output=True, timeout=60)


@pytest.fixture
def cli(capsysbinary, monkeypatch) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """The same in this process, which spares most of the time: starting Python is the larger part of a command."""

    def run(url: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        capsysbinary.readouterr()
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("JOBQUEUE_")]:
                patch.delenv(name)
            patch.setenv("JOBQUEUE_URL", url)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
            try:
                code = jobqueue.main(list(arguments))
            except SystemExit as end:
                code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsysbinary.readouterr())

    return run


def said(done: subprocess.CompletedProcess[bytes], code: int = OK) -> str:
    """What it printed, given that it ended with this code; an error is one line on stderr and no traceback."""
    errors = done.stderr.decode()
    assert done.returncode == code, (done, errors)
    assert "Traceback" not in errors
    if code in (OK, NOT_YET) and not errors:
        return done.stdout.decode(errors="replace")
    assert errors.count("\n") == 1 and errors.endswith("\n"), errors
    assert errors.startswith("jobqueue"), errors
    return done.stdout.decode()


class Working:
    """`jobqueue.py work` in a process of its own, which is ended with the test."""

    def __init__(self, url: str, *arguments: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobqueue.py"), "work", *arguments],
            env=environment(url, **env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self._lines.append(line.decode(errors="replace"))

    def log(self) -> str:
        return "".join(self._lines)

    def wait_log(self, text: str) -> None:
        wait_until(lambda: text in self.log(), 15, f"{text!r} in the worker's log")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 15) -> int:
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code


@pytest.fixture
def work() -> Iterator[Callable[..., Working]]:
    """work(url, *arguments): a worker that runs until the test ends."""
    started: list[Working] = []

    def start(url: str, *arguments: str, **env: str) -> Working:
        started.append(Working(url, *arguments, **env))
        return started[-1]

    yield start
    for worker in started:
        if worker.process.poll() is None:
            worker.process.kill()
        worker.wait()


def past_the_burst() -> None:
    """Until a signal that comes now is no longer taken for the same wish as one that was heard before."""
    heard = time.monotonic()
    wait_until(lambda: time.monotonic() > heard + 0.6, what="the end of a burst of signals")


@pytest.fixture
def still(tmp_path, clock) -> Iterator[jobqueue.Server]:
    """A server whose time stands still until a test moves it: however slow the machine, no lease and no delay ends."""
    with jobqueue.Server(data_dir=tmp_path / "still", port=0, grpc_port=None, clock=clock) as running:
        yield running
        running.stop(drain=0)


def serve_one(server: ServerProcess, queue: str, result: bytes) -> Any:
    """Complete the next job of the queue, in the background."""

    def take() -> Any:
        worker = WorkerOverHttp(server)
        job = worker.poll(queue=queue, wait=20)
        worker.complete(job, result)
        return job

    return later(take)


# -- help and bad input


@pytest.mark.parametrize("name", jobqueue.COMMANDS)
def test_help_of_a_command_has_an_example_of_it(name, capsys):
    with pytest.raises(SystemExit) as end:
        jobqueue.main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == OK
    assert f"example: jobqueue.py {name}" in " ".join(text.split())


def test_help_names_every_command_and_version_says_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        jobqueue.main(["--help"])
    assert end.value.code == OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert set(jobqueue.COMMANDS) <= {words[0] for words in lines if words}
    with pytest.raises(SystemExit):
        jobqueue.main(["--version"])
    assert capsys.readouterr().out == f"jobqueue {jobqueue.__version__}\n"


BAD = {
    "unknown command": (["srve"], "srve"),
    "unknown flag": (["--prot", "1"], "--prot"),
    "port that is no number": (["--port", "http"], "http"),
    "port out of range": (["serve", "--port", "70000"], "70000"),
    "lease too short": (["--lease", "0"], "lease"),
    "idle connections that are closed at once": (
        ["--idle-timeout", "0"], "--idle-timeout (JOBQUEUE_IDLE_TIMEOUT) must be 1 to"),
    "fsync unknown": (["--fsync", "sometimes"], "always, interval, never"),
    "switch that is neither": (["--insecure", "perhaps"], "perhaps"),
    "log format": (["--log-format", "xml"], "text, json"),
    "wide host without tokens": (["--host", "0.0.0.0"], "--tokens"),
    "token file that is not there": (["--tokens", "/nowhere/tokens"], "/nowhere/tokens"),
    "certificate that is not there": (["--tls-cert", "/nowhere/cert"], "--tls-cert"),
    "key without certificate": (["--tls-key", "/nowhere/key"], "--tls-cert"),
    "work without a command": (["work"], "COMMAND"),
    "work with both": (["work", "--forward", "http://x/", "--", "cat"], "--forward"),
    "work with concurrency 0": (["work", "--concurrency", "0", "--", "cat"], "concurrency"),
    "work with a lease that is too long": (["work", "--lease", "99999", "--", "cat"], "99999"),
    "forward to no URL": (["work", "--forward", "localhost:8000"], "localhost:8000"),
    "forward to a port that is none": (["work", "--forward", "http://localhost:80a/"], "80a"),
    "forward to a port out of range": (["work", "--forward", "http://localhost:80800/"], "0-65535"),
    "submit without a payload": (["submit"], "PAYLOAD"),
    "submit with both": (["submit", "1", "--file", "x"], "--file"),
    "submit a file with a key": (["submit", "--file", "x", "--key", "k"], "--key"),
    "submit a file and wait": (["submit", "--file", "x", "--wait", "0"], "--wait"),
    "submit a file that is not there": (["submit", "--file", "/nowhere/jobs"], "/nowhere/jobs"),
    "submit with a bad priority": (["submit", "1", "--priority", "12"], "0 to 9"),
    "submit to a bad queue": (["submit", "1", "--queue", "a b"], "a b"),
    "submit with a bad delay": (["submit", "1", "--delay", "soon"], "soon"),
    "submit with a CA that is not there": (["submit", "1", "--url", "https://x", "--ca", "/nowhere/ca"], "/nowhere/ca"),
    "jobs in no state": (["jobs", "--status", "done"], "done"),
    "jobs with limit 0": (["jobs", "--limit", "0"], "limit"),
    "requeue without anything": (["requeue"], "JOB_ID"),
    "requeue one of a queue": (["requeue", "x", "--queue", "q"], "--queue"),
    "requeue with both": (["requeue", "x", "--status", "failed"], "JOB_ID"),
    "cancel without an id": (["cancel"], "JOB_ID"),
    "check without a folder": (["check"], "DATA_DIR"),
    "token without a scope": (["token"], "--scope"),
    "token of no scope": (["token", "--scope", "root"], "client, worker, admin"),
    "token with an empty scope": (["token", "--scope", ""], "client, worker, admin"),
    "URL of another kind": (["stats", "--url", "ftp://localhost"], "ftp://localhost"),
    "URL without a scheme": (["stats", "--url", "localhost:3000"], "localhost:3000"),
    "URL with a port that is none": (["stats", "--url", "http://localhost:http"], "http"),
    "URL to work for with a port that is none": (["work", "--url", "http://localhost:80a", "--", "cat"], "80a"),
    "empty file of tokens": (["--tokens", ""], "--tokens is empty; leave it out to run without"),
    "empty folder": (["serve", "--data-dir="], "--data-dir is empty"),
    "empty host": (["--host", ""], "--host is empty"),
    "empty switch": (["--insecure", ""], "--insecure is empty"),
    "empty queue to work for": (["work", "--queue", "", "--", "cat"], "--queue is empty"),
    "empty token": (["stats", "--token", ""], "--token is empty"),
    "empty key": (["submit", "1", "--key", ""], "--key is empty"),
    "empty file of jobs": (["submit", "--file", ""], "--file is empty"),
    "empty id to show": (["jobs", ""], "JOB_ID is empty"),
    "empty id to cancel": (["cancel", ""], "JOB_ID is empty"),
    "empty id to requeue": (["requeue", "", "--status", "failed"], "JOB_ID is empty"),
    "empty folder to check": (["check", ""], "DATA_DIR is empty"),
    "setting out of range": (["--port", "70000"], "--port (JOBQUEUE_PORT) must be 0 to 65535"),
    "setting of no choice": (["--fsync", "no"], "--fsync (JOBQUEUE_FSYNC) must be one of always"),
    "abbreviated flag": (["jobs", "--stat", "failed"], "--stat"),
    "work with a flag that does nothing": (["work", "--json", "--", "cat"], "--json"),
    "work with a mistyped command": (["work", "--", "convrt"], "cannot run convrt: not found"),
    "key that fits no header": (["submit", "1", "--key", "日"], "--key must be one line of Latin-1 characters"),
    "type of two lines": (["submit", "1", "--content-type", "a\nb"], "--content-type must be one line"),
    "token that fits no header": (["stats", "--token", "a\nb"], "--token (JOBQUEUE_TOKEN) must be one line"),
    "key without a certificate to call with": (["stats", "--key-file", "k.pem"], "--key-file needs --cert"),
    "certificate to call with that is not there": (
        ["stats", "--url", "https://x", "--cert", "c.pem"], "--cert c.pem: No such file"),
    "work under a name that is no text": (["work", "--worker", "w\udcff", "--", "cat"], "--worker must be"),
    "work that forwards to a URL with a blank": (["work", "--forward", "http://x/a b"], "percent-encoded, got 'http"),
    "URL with a letter beyond ASCII": (["stats", "--url", "http://x/ä"], "percent-encoded, got 'http://x/ä'"),
    "work for a queue that cannot be": (["work", "--queue", "a b", "--", "cat"], "--queue must be"),
    "token name with a line end": (["token", "--scope", "worker", "--name", "a\nadmin b"], "name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_what_is_wrong_and_exit_2(case, capsys, tmp_path, monkeypatch):
    arguments, names = BAD[case]
    monkeypatch.chdir(tmp_path)  # where `serve` would make its data folder
    monkeypatch.delenv("JOBQUEUE_URL", raising=False)
    try:
        code = jobqueue.main(arguments)
    except SystemExit as end:
        code = end.code
    out, errors = capsys.readouterr()
    assert (code, out) == (USAGE, ""), errors
    assert errors.count("\n") == 1 and errors.endswith("\n") and errors.startswith("jobqueue"), errors
    assert names in errors
    assert "Traceback" not in errors


def test_bad_input_to_a_process_is_one_line_and_exit_2():
    assert said(spawn(NOBODY, "submit", "1", "--priority", "12"), USAGE) == ""
    assert said(spawn(NOBODY, JOBQUEUE_LEASE="long"), USAGE) == ""  # a setting of serve, from the environment


def test_an_error_names_the_variable_that_was_set():
    done = spawn(NOBODY, PORT="http")
    said(done, USAGE)
    assert b"--port (PORT) must be a whole number" in done.stderr


def test_a_closed_standard_input_is_exit_2(server):
    for arguments in ("submit -", "submit --file -"):
        done = by_shell(server.url, f"{arguments} <&-")
        said(done, USAGE)
        assert b"standard input is closed" in done.stderr


def test_an_argument_that_is_no_text_is_told_by_the_server(server):
    done = spawn(server.url, "cancel", "\udcff")
    said(done, NO)
    assert b"there is no" in done.stderr, done.stderr


@pytest.mark.parametrize("command, name", [
    ("submit 1", "no name"), ("work", "a,no name"), ("jobs", "\udcff"), ("pause", "a" * 65), ("resume", ""),
    ("requeue --status failed", "no name"),
], ids=ascii)
def test_what_is_no_name_of_a_queue_is_exit_2(command, name):
    done = spawn(NOBODY, *command.split(), "--queue", name, *(["--", "cat"] if command == "work" else []))
    said(done, USAGE)
    assert b"must be 1 to 64 of" in done.stderr


def test_commands_leave_nothing_open(server, queue):
    """As Python's development mode tells."""
    watched = [sys.executable, "-X", "dev", "-W", "error", str(ROOT / "jobqueue.py")]
    for arguments in (["submit", "1", "--queue", queue, "--wait", "0"], ["jobs"], ["stats"], ["requeue", "none"]):
        done = subprocess.run([*watched, *arguments], env=environment(server.url), capture_output=True, timeout=60)
        assert b"Warning" not in done.stderr and b"Traceback" not in done.stderr, done.stderr
    command = [*watched, "work", "--queue", queue, "--", "cat"]
    worker = subprocess.Popen(command, env=environment(server.url), stderr=subprocess.PIPE)
    completed = f"/api/jobs?queue={queue}&status=completed"
    wait_until(lambda: call(server.url, "GET", completed).json()["jobs"], what="its job")
    worker.terminate()
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == OK
    assert b"Warning" not in errors and b"Traceback" not in errors, errors


def test_what_cannot_be_printed_is_exit_1(server, client, queue):
    client.put(b"1", queue=queue)
    for command in ("token --scope client", "stats", "jobs", "jobs --json", "--help", "submit --help"):
        for target, why in ((">&-", b"is closed"), (">/dev/full", b"No space left")):
            done = by_shell(server.url, f"{command} {target}")
            assert done.returncode == NO and why in done.stderr, (command, target, done.stderr)


def test_a_worker_that_cannot_go_on_closes_its_connections(server, client, queue):
    def cannot(job):
        raise jobqueue.Refused(USAGE, "cannot run")

    client.put(b"1", queue=queue)
    connections = [jobqueue.Client(server.url) for _ in range(2)]
    with pytest.raises(jobqueue.Refused):
        jobqueue.Worker(*connections, cannot, {"queue": queue}).work()
    assert [each._connection.sock for each in connections if each._connection] in ([], [None], [None, None])


def test_help_needs_no_docstrings():
    for arguments in (["--help"], ["work", "--help"]):
        command = [sys.executable, "-OO", str(ROOT / "jobqueue.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "work" in done.stdout


def test_usage_has_the_name_of_the_installed_command(tmp_path):
    """What pip makes of [project.scripts]."""
    script = tmp_path / "jobqueue"
    script.write_text("import sys\nfrom jobqueue import main\nsys.exit(main())\n")
    environ = environment(NOBODY, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, str(script), "jobs", "--help"], env=environ, capture_output=True, text=True)
    assert done.stdout.startswith("usage: jobqueue jobs ") and "example: jobqueue jobs" in done.stdout


def test_a_server_that_cannot_be_reached_is_exit_69():
    done = spawn(NOBODY, "stats")
    said(done, UNREACHABLE)
    assert NOBODY in done.stderr.decode()


@pytest.mark.parametrize(
    "arguments",
    [["submit", "1"], ["jobs"], ["requeue", "x"], ["cancel", "x"], ["pause"], ["resume"], ["jobs", "x"]],
    ids=" ".join,
)
def test_every_command_that_talks_to_a_server_ends_with_69_without_one(arguments, capsys):
    assert jobqueue.main([*arguments, "--url", NOBODY]) == UNREACHABLE
    assert capsys.readouterr().err.count("\n") == 1


def test_a_job_that_is_not_there_is_exit_1(server, client, cli):
    for arguments in (["jobs", "none"], ["cancel", "none"], ["requeue", "none"], ["cancel", "a/b?c"]):
        done = cli(server.url, *arguments)
        assert said(done, NO) == ""


# -- submit


RESULTS = {
    "text": (b"f\xc3\xbcr dich", b"f\xc3\xbcr dich\n"),
    "text with a line end": (b"two\nlines\n", b"two\nlines\n"),
    "JSON": (b'{"a": 1.0, "a": 12345678901234567890}', b'{"a": 1.0, "a": 12345678901234567890}\n'),
    "bytes": (bytes(range(256)), bytes(range(256))),
    "nothing": (b"", b"{}\n"),
}


def test_submit_waits_and_prints_the_result_as_the_worker_sent_it(server, queue, cli):
    for result, printed in RESULTS.values():
        taken = serve_one(server, queue, result)
        done = cli(server.url, "submit", '{"x": 1.0}', "--queue", queue)
        said(done)
        assert done.stdout == printed
        assert taken.result(10).payload == '{"x": 1.0}'


def test_submit_reads_a_payload_of_any_bytes_from_stdin(server, queue, seed, cli):
    payload = random.Random(seed).randbytes(300_000)
    taken = serve_one(server, queue, b"1")
    assert said(cli(server.url, "submit", "-", "--queue", queue, given=payload)) == "1\n"
    assert taken.result(10).data == payload


def test_submit_with_json_prints_the_whole_answer(server, queue, cli):
    serve_one(server, queue, b"[1]")
    answer = json.loads(said(cli(server.url, "submit", "hello", "--json", "--queue", queue)))
    assert set(answer) == {"job_id", "payload", "created_at", "completed_at"} and answer["payload"] == [1]


def test_submit_without_waiting_prints_the_id_and_its_options_arrive(server, client, queue, cli):
    flags = ["--wait", "0", "--priority", "7", "--ttl", "500", "--lease", "33", "--attempts", "9", "--key", "k1",
             "--content-type", "text/csv"]
    job_id = said(cli(server.url, "submit", "a,b", "--queue", queue, *flags)).strip()
    job = client.view(job_id)
    assert (job["queue"], job["priority"], job["attempts"], job["payload"]) == (queue, 7, 9, "a,b")
    assert job["headers"]["Content-Type"] == "text/csv" and "expires_at" in job
    assert WorkerOverHttp(server).poll(queue=queue).lease_seconds == 33
    again = said(cli(server.url, "submit", "a,b", "--queue", queue, *flags)).strip()
    assert again == job_id  # the key attached it
    done = cli(server.url, "submit", "other", "--queue", queue, *flags)
    said(done, NO)
    delayed = said(cli(server.url, "submit", "1", "--queue", queue, "--wait", "0", "--delay", "60")).strip()
    assert client.status(delayed) == "delayed"


def test_a_wait_that_is_over_prints_the_id_and_is_exit_75(server, client, queue, cli):
    job_id = said(cli(server.url, "submit", "1", "--queue", queue, "--wait", "0.05"), NOT_YET).strip()
    assert client.status(job_id) == "pending"


def test_a_job_that_ends_without_a_result_is_exit_1_with_the_reason(server, client, queue, cli):
    submitting = later(spawn, server.url, "submit", "1", "--queue", queue)
    worker = WorkerOverHttp(server)
    worker.fail(worker.poll(queue=queue, wait=20), "no such colour", retry=False)
    done = submitting.result(20)
    said(done, NO)
    assert b"no such colour" in done.stderr
    done = cli(server.url, "submit", "1", "--queue", queue, "--ttl", "0.01")
    said(done, NO)
    submitting = later(spawn, server.url, "submit", "1", "--queue", queue)
    job = wait_until(lambda: client.call("GET", "/api/jobs", queue=queue, status="pending").json()["jobs"])[0]
    client.cancel(job["job_id"])
    done = submitting.result(20)
    said(done, NO)
    assert b"cancelled" in done.stderr


def test_a_server_that_is_too_busy_is_exit_75_and_a_payload_too_large_exit_1(process, work, cli):
    small = process("--max-jobs", "1", "--max-payload", "100", "--grpc-port", "off", "--attempts", "5")
    job_id = said(cli(small.url, "submit", "1", "--wait", "0")).strip()
    said(cli(small.url, "submit", "1", "--wait", "0"), NOT_YET)
    said(cli(small.url, "submit", "--file", "-", given=b"1\n2\n"), NOT_YET)
    said(cli(small.url, "submit", "x" * 101), NO)
    # A result that is too large will be so next time too: the job has failed for good.
    work(small.url, "--", "sh", "-c", "head -c 101 /dev/zero")
    client = Client(small)
    client.wait_status(job_id, "failed")
    assert "100" in client.view(job_id)["error"]


@pytest.mark.parametrize("wire", ["plain", "tls"])
def test_a_refusal_is_heard_though_the_server_reads_no_further(wire, tmp_path, certs, cli):
    """It drops 64 MiB of what it has refused, and hangs up: a worker that hears nothing sends its result for ever."""
    tls = {"tls_cert": certs.server_cert, "tls_key": certs.server_key} if wire == "tls" else {}
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, fsync="never", **tls) as server:
        done = cli(server.url, "submit", "-", "--ca", str(certs.ca), given=bytes(100_000_000))
        said(done, NO)
        assert b"at most 4128768" in done.stderr


def test_a_file_is_submitted_line_by_line_and_the_ids_are_printed_in_order(server, client, queue, tmp_path, cli):
    path = tmp_path / "many.ndjson"
    path.write_bytes(b'{"n": 1.0}\n\nplain text\n"last"')
    ids = said(cli(server.url, "submit", "--file", str(path), "--queue", queue, "--priority", "3")).split()
    views = [client.view(job_id) for job_id in ids]
    assert [view["payload"] for view in views] == [{"n": 1.0}, "plain text", "last"]
    assert {(view["queue"], view["priority"]) for view in views} == {(queue, 3)}
    ids = said(cli(server.url, "submit", "--file", "-", "--queue", queue, given=b"1\r\n2\r\n")).split()
    assert [client.view(job_id)["payload"] for job_id in ids] == [1, 2]


def test_a_line_of_white_space_is_a_payload_as_it_is_to_the_server(server, client, queue, cli):
    ids = said(cli(server.url, "submit", "--file", "-", "--queue", queue, given=b"  \n\r\n\n\t\n1\n")).split()
    assert [client.view(job_id)["payload"] for job_id in ids] == ["  ", "\t", 1]


def test_a_large_file_shows_its_progress_on_a_terminal_and_is_whole(server, client, queue, tmp_path):
    path = tmp_path / "many.ndjson"
    path.write_text("".join(f"{number}\n" for number in range(10_001)))
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "jobqueue.py"), "submit", "--file", str(path), "--queue", queue]
    with contextlib.closing(os.fdopen(ours, "rb", buffering=0)) as terminal:
        done = subprocess.run(command, env=environment(server.url), stdout=subprocess.PIPE, stderr=theirs, timeout=60)
        os.close(theirs)
        shown = terminal.read(65536).decode()
    assert done.returncode == OK
    assert len(set(done.stdout.split())) == 10_001
    assert "5000 jobs submitted" in shown and "10001 jobs submitted (100 %)" in shown
    assert client.stats()["queues"][queue]["pending"] == 10_001


def test_a_file_is_submitted_whole_when_the_reader_of_the_ids_goes_away(server, client, queue, tmp_path):
    path = tmp_path / "many.ndjson"
    path.write_text("".join(f"{number}\n" for number in range(10_001)))
    command = [sys.executable, str(ROOT / "jobqueue.py"), "submit", "--file", str(path), "--queue", queue]
    with subprocess.Popen(
        command, env=environment(server.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert (process.returncode, errors) == (
        NO, "jobqueue: standard output was closed; all 10001 jobs were submitted\n")
    assert client.stats()["queues"][queue]["pending"] == 10_001


@pytest.mark.parametrize("target, why", [(">&-", "is closed"), (">/dev/full", "failed: No space left on device")])
def test_a_submit_that_cannot_print_says_what_was_submitted(server, client, queue, tmp_path, target, why):
    (tmp_path / "two").write_text("1\n2\n")
    done = by_shell(server.url, f"submit --file {tmp_path / 'two'} --queue {queue} {target}")
    assert said(done, NO) == ""
    assert done.stderr.decode() == f"jobqueue: standard output {why}; all 2 jobs were submitted\n"
    assert client.stats()["queues"][queue]["pending"] == 2
    done = by_shell(server.url, f"submit 3 --wait 0 --queue {queue} {target}")
    assert said(done, NO) == ""
    assert f"standard output {why}; job " in done.stderr.decode()
    job_id = done.stderr.decode().split("; job ")[1].split()[0]
    assert client.view(job_id)["payload"] == 3


# -- looking and steering


def test_jobs_lists_newest_first_and_shows_one(server, client, queue, cli):
    ids = [client.put(b'{"n": %d}' % number, queue=queue) for number in range(3)]
    rows = said(cli(server.url, "jobs", "--queue", queue)).splitlines()
    assert [row.split()[:3] for row in rows] == [[job_id, "pending", queue] for job_id in reversed(ids)]
    rows = said(cli(server.url, "jobs", "--queue", queue, "--limit", "2", "--json")).splitlines()
    assert [json.loads(row)["job_id"] for row in rows] == ids[:0:-1]
    client.cancel(ids[1])
    assert said(cli(server.url, "jobs", "--queue", queue, "--status", "cancelled")).split()[0] == ids[1]
    assert said(cli(server.url, "jobs", "--queue", queue, "--status", "failed")) == ""
    lines = dict(line.split(None, 1) for line in said(cli(server.url, "jobs", ids[0])).splitlines())
    assert (lines["job_id"], lines["status"], lines["queue"]) == (ids[0], "pending", queue)
    assert json.loads(said(cli(server.url, "jobs", ids[0], "--json"))) == client.view(ids[0])


STRANGE = {
    "numbers and repeated members": (b'{"x":1,"x":2,"z":1.10,"y":1e400}', '{"x":1,"x":2,"z":1.10,"y":1e400}'),
    "lone surrogate in a string": (b'"\\ud800 x"', "\\ud800 x"),
    "lone surrogate in an object": (b'{"a":"\\ud800"}', '{"a":"\\ud800"}'),
    "nested deeply": (b"[" * 50_000 + b"]" * 50_000, "[" * 50_000 + "]" * 50_000),
    "what commands a terminal": (b"\x1b[2J\r\n\xc2\x9bm", "\\u001b[2J\\r\\n\\u009bm"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_job_is_shown_as_it_is_raw_for_scripts_and_in_plain_lines_for_people(server, client, queue, cli, case):
    data, shown = STRANGE[case]
    job_id = client.put(data, queue=queue)
    client.call("GET", "/api/worker/poll", queue=queue)
    client.call("POST", f"/api/worker/complete/{job_id}", data)
    answer = client.call("GET", f"/api/jobs/{job_id}").body
    assert cli(server.url, "jobs", job_id, "--json").stdout == answer + b"\n"
    lines = dict(line.split(None, 1) for line in said(cli(server.url, "jobs", job_id)).split("\n") if line)
    assert (lines["payload"], lines["result"]) == (shown, shown)


def test_a_job_is_shown_on_a_terminal_of_ascii_alone(server, client, queue):
    job_id = client.put("für".encode(), queue=queue)
    assert "f\\xfcr" in said(spawn(server.url, "jobs", job_id, PYTHONIOENCODING="ascii"))


def test_what_a_worker_says_cannot_command_the_terminal_of_who_reads_it(server, client, queue, cli):
    submitting = later(spawn, server.url, "submit", "1", "--queue", queue)
    worker = WorkerOverHttp(server)
    job = worker.poll(queue=queue, wait=20)
    worker.fail(job, "no\n\x1b]0;such", retry=False)
    done = submitting.result(20)
    said(done, NO)
    assert b"no\\n\\u001b]0;such" in done.stderr and b"\x1b" not in done.stderr
    assert "no\\n\\u001b]0;such" in said(cli(server.url, "jobs", job.id))


def test_jobs_in_json_are_none_where_there_is_none_and_running_means_processing(server, client, queue, cli):
    assert said(cli(server.url, "jobs", "--queue", queue, "--json")) == ""
    job_id = client.put(queue=queue)
    assert said(cli(server.url, "jobs", "--queue", queue, "--status", "running")) == ""
    WorkerOverHttp(server).poll(queue=queue)
    assert said(cli(server.url, "jobs", "--queue", queue, "--status", "running")).split()[0] == job_id


def test_stats_tells_what_is_paused_and_keeps_its_columns(process, cli):
    server = process("--grpc-port", "off")
    client, long = Client(server), "q" * 64
    for name in ("short", long):
        client.put(queue=name)
    said(cli(server.url, "pause", "--queue", long))
    head, *rows, waiting = said(cli(server.url, "stats")).splitlines()
    assert [row.split("  ")[0].rstrip() for row in rows] == ["(all)", f"{long} (paused)", "short"]
    ends = [row.index(" 1 ") for row in rows[1:]]
    assert ends == [head.index("pending") + len("pending") - 2] * 2
    assert waiting.startswith("waiting: ")
    said(cli(server.url, "pause"))
    assert said(cli(server.url, "stats")).splitlines()[-2:] == [waiting, "paused: all"]


def test_stats_shows_each_queue_and_the_sum(server, client, queue):
    client.put(queue=queue)
    client.put(queue=queue, delay=60)
    rows = [line.split() for line in said(spawn(server.url, "stats")).splitlines()]
    assert rows[0] == ["queue", "pending", "running", "delayed", "completed", "failed", "expired", "cancelled"]
    assert [queue[:40], "1", "0", "1", "0", "0", "0", "0"] in rows
    assert json.loads(said(spawn(server.url, "stats", "--json")))["queues"][queue]["delayed"] == 1


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["for people", "json"])
def test_a_requeue_that_stops_midway_is_exit_1_and_says_what_was_done(flags, tmp_path, monkeypatch, cli):
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, fsync="never", reserve=0) as server:
        for number in range(3):
            server.submit(b"%d" % number, attempts=1)
            next(server.jobs()).fail("no")
        monkeypatch.setattr(jobqueue.LocalEngine, "SWEEP", 2)
        real, written = jobqueue._write_all, []

        def write(fd: int, data: bytes) -> None:
            written.append(data)
            if len(written) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd, data)

        with monkeypatch.context() as patch:
            patch.setattr(jobqueue, "_write_all", write)
            done = cli(server.url, "requeue", "--status", "failed", *flags)
    said(done, NO)
    assert b"2 jobs requeued, then: the disk did not take it" in done.stderr
    assert (json.loads(done.stdout)["requeued"] == 2) if flags else (done.stdout == b"")


def test_cancel_and_requeue_one_job_and_all_that_failed(server, client, queue, cli):
    first, second = client.put(queue=queue), client.put(queue=queue)
    said(cli(server.url, "cancel", first))
    assert client.status(first) == "cancelled"
    done = cli(server.url, "cancel", first)
    said(done, NO)  # it has come to its end
    said(cli(server.url, "requeue", first))
    assert client.status(first) == "pending"
    worker = WorkerOverHttp(server)
    for _ in range(2):
        worker.fail(worker.poll(queue=queue), "no", retry=False)
    assert said(cli(server.url, "requeue", "--status", "failed", "--queue", queue)) == "2 jobs requeued\n"
    assert [client.status(job_id) for job_id in (first, second)] == ["pending", "pending"]
    answer = json.loads(said(cli(server.url, "requeue", "--status", "failed", "--queue", queue, "--json")))
    assert answer["requeued"] == 0


def test_pause_stops_the_handing_out_and_resume_starts_it_again(server, client, queue, cli):
    client.put(queue=queue)
    assert said(cli(server.url, "pause", "--queue", queue)) == f"paused: {queue}\n"
    worker = WorkerOverHttp(server)
    assert worker.poll(queue=queue) is None
    assert json.loads(said(cli(server.url, "resume", "--queue", queue, "--json")))["paused"] == []
    assert worker.poll(queue=queue) is not None


def test_output_into_a_pipe_that_closes_early_is_no_error(server, client, queue):
    for number in range(50):
        client.put(b"%d" % number, queue=queue)
    command = f'"{sys.executable}" "{ROOT / "jobqueue.py"}" jobs --queue {queue} | head -n 1'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], env=environment(server.url),
                          capture_output=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 1)


# -- check and token


@pytest.fixture
def journal(process) -> Path:
    """A journal of a server that has stopped: one job completed, one pending."""
    server = process("--grpc-port", "off")
    client, worker = Client(server), WorkerOverHttp(server)
    client.put(b'"one"')
    worker.complete(worker.poll(), b"1")
    client.put(b'"two"')
    # A journal in use may be checked: it is only read.
    assert "good" in said(spawn(NOBODY, "check", str(server.data_dir)))
    assert server.stop() == OK
    return server.data_dir / "journal.jsonl"


def test_check_says_what_a_journal_holds(journal, capsys):
    before = journal.read_bytes()
    assert jobqueue.main(["check", str(journal.parent)]) == OK
    text = capsys.readouterr().out
    assert "closed cleanly" in text and "1 pending" in text and "1 completed" in text
    assert jobqueue.main(["check", str(journal), "--json"]) == OK
    answer = json.loads(capsys.readouterr().out)
    assert (answer["jobs"]["pending"], answer["jobs"]["completed"]) == (1, 1)
    assert (answer["clean_stop"], answer["torn_bytes"], answer["bytes"]) == (True, 0, len(before))
    assert jobqueue.main(["check", "--dump", str(journal.parent)]) == OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == answer["records"]
    assert [record["op"] for record in records].count("submit") == 2
    assert journal.read_bytes() == before


def test_check_takes_a_torn_tail_for_what_it_is(journal, capsys):
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1])[:-5])
    assert jobqueue.main(["check", str(journal.parent), "--json"]) == OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["torn_bytes"] > 0 and not answer["clean_stop"]


def test_a_damaged_journal_is_exit_3_with_file_and_offset_for_check_and_serve(journal, capsys):
    data = bytearray(journal.read_bytes())
    where = data.index(b"one")
    data[where] ^= 1
    journal.write_bytes(data)
    assert jobqueue.main(["check", str(journal.parent)]) == DATA
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and str(journal) in errors
    line = data.rindex(b"\n", 0, where) + 1
    assert str(line) in errors, f"the damaged line begins at {line}"
    # The command that it names shows what stands before the damage.
    words = shlex.split(errors.split("look at it with: ")[1])
    assert words[:2] == ["python", "jobqueue.py"]
    assert jobqueue.main(words[2:]) == DATA
    assert capsys.readouterr().out.count("\n") > 0
    done = spawn(NOBODY, "--data-dir", str(journal.parent), "--port", "0", "--grpc-port", "off")
    assert said(done, DATA) == ""
    assert str(journal).encode() in done.stderr and b"%d" % line in done.stderr
    assert journal.read_bytes() == data  # nothing was changed


STRAY = {
    "of a job that is not there": '{"op":"complete","id":"nobody","result":"1","result_kind":"json","finished":1}',
    "of a job that has ended": '{"op":"complete","id":"%s","result":"1","result_kind":"json","finished":1}',
    "that is none": '{"op":"levitate","id":"%s"}',
    "of a job without an id": '{"op":"submit","queue":"default","payload":"1"}',
}


@pytest.mark.parametrize(
    "seq, synced", [('"9"', "0"), ("9.5", "0"), ("null", "0"), ("9", "null"), ("9", "[]"), ("9", "true")]
)
def test_a_line_of_the_right_checksum_that_is_no_record_is_a_torn_end(journal, capsys, seq, synced):
    """As no other says that it had been synced."""
    before = journal.read_bytes()
    last = json.loads(before.splitlines()[-1])["seq"]
    journal.write_bytes(before + jobqueue.journal_line(seq.replace("9", str(last + 1)), synced, '{"op":"open"}'))
    assert jobqueue.main(["check", str(journal)]) == OK
    out, errors = capsys.readouterr()
    assert "torn" in out and errors == ""


def test_a_header_whose_version_is_no_number_is_damage(journal, capsys):
    first, rest = journal.read_bytes().split(b"\n", 1)
    body = json.loads(first)
    header = {"op": "journal", "version": "1", "writer": body["writer"]}
    journal.write_bytes(jobqueue.journal_line(body["seq"], body["synced"], jobqueue.json_text(header)) + rest)
    assert jobqueue.main(["check", str(journal)]) == DATA
    assert "its first line is not a jobqueue header" in capsys.readouterr().err


@pytest.mark.parametrize("stray", STRAY)
def test_check_names_a_record_that_does_not_follow_and_dump_shows_it(journal, stray, capsys):
    """Such a line is whole, and its checksum is right."""
    records = list(jobqueue.JournalReader(str(journal)))
    done = next(record["id"] for record in records if record["op"] == "complete")
    last, body = records[-1]["seq"], STRAY[stray].replace("%s", done)
    with open(journal, "ab") as file:
        file.write(jobqueue.journal_line(last + 1, last + 1, body))
        file.write(jobqueue.journal_line(last + 2, last + 2, '{"op":"close"}'))
    before = journal.read_bytes()
    for flags in ([], ["--json"], ["--dump"]):
        assert jobqueue.main(["check", *flags, str(journal.parent)]) == DATA
        out, errors = capsys.readouterr()
        assert errors.count("\n") == 1 and errors.startswith("jobqueue: ") and f"record {last + 1} " in errors, errors
        shown = [json.loads(line) for line in out.splitlines()]
        assert [record["seq"] for record in shown] == ([*range(1, last + 2)] if flags == ["--dump"] else [])
    assert shown[-1].items() >= json.loads(body).items()
    assert journal.read_bytes() == before


def test_a_journal_that_is_not_there_is_exit_3(tmp_path, capsys):
    assert jobqueue.main(["check", str(tmp_path)]) == DATA
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "journal.jsonl").write_bytes(b"")
    assert jobqueue.main(["check", str(tmp_path)]) in (OK, DATA)  # an empty file: said, not thrown
    capsys.readouterr()
    (tmp_path / "journal.jsonl").write_bytes(b"\x7fELF" * 100)
    assert jobqueue.main(["check", str(tmp_path)]) == DATA
    assert capsys.readouterr().err.count("\n") == 1


def test_a_token_is_a_line_for_the_file_and_never_the_same_twice(capsys):
    for arguments in (["--scope", "worker,client", "--name", "gpu host 1"], ["--scope", "admin"]):
        assert jobqueue.main(["token", *arguments]) == OK
        assert jobqueue.main(["token", *arguments]) == OK
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    assert lines[0][::2] == ["worker,client", "gpu host 1"] and lines[2][:1] == ["admin"]
    assert len({words[1] for words in lines}) == 4
    assert all(len(words[1]) >= 32 for words in lines)


def test_a_token_s_name_is_written_as_the_file_is_read_whatever_the_terminal_speaks():
    done = spawn(NOBODY, "token", "--scope", "worker", "--name", "jörg", PYTHONIOENCODING="latin-1")
    assert done.stdout.decode().endswith(" jörg\n")


# -- serve


def test_an_empty_variable_is_as_good_as_none(tmp_path):
    empty = dict.fromkeys(("PORT", "GRPC_PORT", "JOBQUEUE_LEASE", "JOBQUEUE_FSYNC", "JOBQUEUE_INSECURE"), "")
    server = start_server(tmp_path, "--grpc-port", "off", env=empty)
    assert "fsync=always" in server.log()
    assert server.stop() == OK


def test_a_variable_that_sets_nothing_is_warned_of_at_the_start(tmp_path):
    env = {"JOBQUEUE_TOKNS": "/etc/tokens", "JOBQUEUE_URL": "http://x", "JOBQUEUE_KEY_FILE": "k", "JOBQUEUE_LEASE": "9",
           "JOBQUEUE_EMPTY": ""}
    server = start_server(tmp_path, "--grpc-port", "off", env=env)
    warnings = [line for line in server.log().splitlines() if " WARNING " in line]
    assert len(warnings) == 1 and "JOBQUEUE_TOKNS" in warnings[0]


def send_at_once(process: subprocess.Popen, *signals: int) -> None:
    """All of them are there when the process looks next."""
    for number in (signal.SIGSTOP, *signals, signal.SIGCONT):
        process.send_signal(number)


def test_two_signals_at_once_are_one_wish_to_the_server(tmp_path):
    """As from `timeout`, which signals its command and then its command's group."""
    server = start_server(tmp_path, "--grpc-port", "off", "--drain", "600")
    client, worker = Client(server), WorkerOverHttp(server)
    held = client.hold()
    job = worker.poll()
    send_at_once(server.process, signal.SIGTERM, signal.SIGINT)
    line = server.wait_log(r"stopping .*")[0]
    assert line == "stopping drain=600 running=1: a second signal ends the wait"
    past_the_burst()
    worker.complete(job, b"1")
    assert held.result(10).json()["payload"] == 1
    assert server.wait(10) == OK


@pytest.mark.parametrize("before", [0, 1])
def test_signals_without_end_do_not_change_the_exit_code(tmp_path, before):
    """The interpreter's last moments included, in which it gives up the handlers."""
    server = start_server(tmp_path, "--grpc-port", "off", "--drain", "600")
    if before:
        client = Client(server)
        client.hold()
        WorkerOverHttp(server).poll(wait=20)
        server.terminate()
        server.wait_log("stopping ")
        past_the_burst()
    while server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    assert server.wait() == OK


# A server whose disk hangs as long as there is a file `hang`: be it in the thread that would answer over HTTP.
HANGING = """
import os, sys, time, jobqueue
sync = jobqueue._sync_data
def hang(fd):
    while os.path.exists("hang"):
        open("hangs", "w").close()
        time.sleep(0.05)
    sync(fd)
def waits(*arguments):
    future = complete(*arguments)
    open("waits", "w").close()
    return future
complete, jobqueue.LocalEngine.complete = jobqueue.LocalEngine.complete, waits
jobqueue._sync_data = hang
sys.exit(jobqueue.main())
"""


def test_a_third_signal_ends_a_server_whose_workers_over_grpc_wait_for_a_disk_that_hangs(tmp_path):
    flags = ["--data-dir", "data", "--port", "0", "--grpc-port", "0"]
    env = environment(NOBODY, PYTHONPATH=str(ROOT))
    server = ServerProcess([sys.executable, "-c", HANGING, *flags], env, tmp_path)
    server.wait_ready(30)
    worker = WorkerOverGrpc(server)
    Client(server).put()
    job = worker.poll()
    (tmp_path / "hang").touch()
    completing = later(worker.complete, job, b"1")
    wait_until(lambda: all((tmp_path / name).exists() for name in ("waits", "hangs")), what="a sync that hangs")
    server.terminate()
    server.wait_log("stopping ")
    for _ in range(2):
        assert server.process.poll() is None and not completing.done()
        past_the_burst()
        server.terminate()
    assert server.wait(10) == OK
    assert isinstance(completing.exception(10), Refused), "it was not told that the result is on disk"


def test_a_setting_is_taken_from_the_environment_and_a_flag_wins(tmp_path):
    env = environment(NOBODY, PORT="0", GRPC_PORT="off", JOBQUEUE_DATA_DIR="elsewhere", JOBQUEUE_ATTEMPTS="7",
                      JOBQUEUE_LEASE="11")
    flags = ["--lease", "22", "--attempts", "7"]
    command = [sys.executable, str(ROOT / "jobqueue.py"), *flags[:2]]
    with subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stderr.readline()
            assert " INFO ready http=http://127.0.0.1:" in ready and " grpc=off " in ready, ready
            url = ready.split("http=")[1].split()[0]
            job_id = call(url, "POST", "/api/submit?wait=0", b"1").json()["job_id"]
            assert call(url, "GET", f"/api/jobs/{job_id}").json()["attempts"] == 7
            assert call(url, "GET", "/api/worker/poll").json()["lease_seconds"] == 22
            assert (tmp_path / "elsewhere" / "journal.jsonl").exists()
        finally:
            process.kill()


def test_a_port_that_is_taken_is_exit_2_and_a_folder_in_use_exit_3(server, tmp_path):
    flags = ["--data-dir", str(tmp_path / "data"), "--grpc-port", "off"]
    done = spawn(NOBODY, *flags, "--port", str(server.port))
    said(done, USAGE)
    assert str(server.port).encode() in done.stderr
    done = spawn(NOBODY, "--grpc-port", "off", "--port", "0", "--data-dir", str(server.data_dir))
    said(done, DATA)
    assert str(server.data_dir).encode() in done.stderr


def test_a_file_system_without_locks_is_told_as_that_and_not_as_another_jobqueue(tmp_path, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="no fcntl to lock by")

    def without_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    code = jobqueue.main(["--data-dir", str(tmp_path / "data"), "--port", "0", "--grpc-port", "off"])
    out, errors = capsys.readouterr()
    assert (code in (USAGE, DATA), out) == (True, ""), errors
    assert errors.count("\n") == 1 and errors.startswith("jobqueue: ") and "in use" not in errors
    assert os.strerror(errno.ENOLCK) in errors and str(tmp_path / "data") in errors


def test_a_port_for_grpc_that_is_taken_is_exit_2(server, tmp_path):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    done = spawn(NOBODY, "--data-dir", str(tmp_path / "data"), "--port", "0", "--grpc-port", str(server.port))
    said(done, USAGE)


def test_everything_but_grpc_works_without_grpcio(tmp_path, work):
    hidden = tmp_path / "hidden" / "grpc"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('no grpcio here')\n")
    path = {"PYTHONPATH": str(hidden.parent)}
    server = start_server(tmp_path, env=path)
    assert server.grpc_port is None and "pip install" in server.log()
    worker = work(server.url, "--", "tr", "a-z", "A-Z", **path)
    assert said(spawn(server.url, "submit", "hello", **path)) == "HELLO\n"
    assert said(spawn(server.url, "jobs", "--status", "completed", **path)).count("\n") == 1
    worker.terminate()
    assert worker.wait() == OK
    assert server.stop() == OK


# -- work with a command


def test_exit_0_completes_with_stdout_and_any_bytes_pass_unchanged(server, client, queue, work, seed):
    work(server.url, "--queue", queue, "--", "cat")
    rng = random.Random(seed)
    payloads = [bytes(range(256)), rng.randbytes(500_000), b'{"a": 1.0, "a": 12345678901234567890}',
                "für dich\0\r\n".encode(), b"", b"text " * 50_000]
    ids = [client.put(payload, queue=queue) for payload in payloads]
    for job_id, payload in zip(ids, payloads, strict=True):
        client.wait_status(job_id, "completed")
        # An empty submit is the payload "", and an empty result the result {}.
        assert client.result(job_id) == (payload or b"{}")
    for body in (b'"x"', b"hello", b'{"a":NaN}'):  # what its Content-Type says does not make it JSON
        for kind in ("application/json", "Application/JSON", "application/vnd.api+json", "text/plain"):
            job_id = client.put(body, {"Content-Type": kind}, queue=queue)
            client.wait_status(job_id, "completed")
            assert client.result(job_id) == body


def test_a_command_that_reads_nothing_completes_too(server, client, queue, work):
    work(server.url, "--queue", queue, "--", "echo", "done")
    answer = client.submit(b"x" * 1_000_000, queue=queue, wait=20)
    assert answer.json()["payload"] == "done\n"


def test_a_command_that_reads_late_gets_the_whole_of_a_large_payload(server, client, queue, work):
    """More than a pipe holds, and later than the worker has looked for what the command says."""
    work(server.url, "--queue", queue, "--", "sh", "-c", "sleep 2; wc -c")
    answer = client.submit(b"x" * 1_000_000, queue=queue, wait=20)
    assert (answer.status, answer.json().get("payload")) == (200, 1_000_000)


def test_exit_75_asks_for_a_retry(still, clock, work):
    client = Client(still)
    job_id = client.put(attempts=2)
    work(still.url, "--", "sh", "-c", "echo busy >&2; exit 75")
    client.wait_status(job_id, "delayed")
    job = client.view(job_id)
    assert (job["attempt"], job["error"]) == (2, "busy")
    clock.advance(10)
    client.wait_status(job_id, "failed")  # the attempts are used up


def test_any_other_exit_fails_for_good_with_the_end_of_stderr(server, client, queue, work):
    script = 'if [ "$(cat)" = 9 ]; then kill -9 $$; fi; head -c 20000 /dev/zero | tr "\\0" x >&2; echo end >&2; exit 3'
    work(server.url, "--queue", queue, "--", "sh", "-c", script)
    job_id, killed = client.put(b"1", queue=queue, attempts=5), client.put(b"9", queue=queue, attempts=5)
    client.wait_status(job_id, "failed")
    error = client.view(job_id)["error"]
    assert error.endswith("xend") and 100 < len(error) <= 4096
    client.wait_status(killed, "failed")
    assert client.view(killed)["error"] == "sh ended with -9"


def test_a_command_whose_name_is_no_text_fails_its_job_for_good_too(tmp_path):
    command = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with open(command, "w", opener=lambda path, flags: os.open(path, flags, 0o700)) as script:
        script.write("#!/bin/sh\nexit 1\n")
    verdict = jobqueue.run_command([command], polled(1))
    assert (verdict.verb, verdict.query["retry"]) == ("fail", "false")
    assert verdict.body.endswith(rb"/\udcff ended with 1")


def test_a_command_that_is_not_there_is_exit_2_and_no_job_is_touched(server, client, queue):
    job_id = client.put(queue=queue)
    for command in ("convrt", "/nowhere/command"):
        done = spawn(server.url, "work", "--queue", queue, "--", command)
        said(done, USAGE)
        assert f"cannot run {command}: not found" in done.stderr.decode()
    done = spawn(server.url, "work", "--queue", queue, "--", str(ROOT / "README.md"))
    said(done, USAGE)
    assert b"not executable" in done.stderr
    assert (client.status(job_id), client.view(job_id)["deliveries"]) == ("pending", 0)


def test_a_command_that_can_no_longer_be_run_ends_the_worker_and_its_job_goes_back_in_line(
    server, client, queue, work, room
):
    script = room / "script"
    script.write_text("#!/bin/sh\ncat\n")
    script.chmod(0o755)
    worker = work(server.url, "--queue", queue, "--concurrency", "2", "--", str(script))
    client.wait_status(client.put(queue=queue), "completed")
    script.write_text("#!/nowhere/sh\n")
    job_id = client.put(queue=queue)
    assert worker.wait() == USAGE
    assert worker.log().splitlines()[-1].startswith(f"jobqueue: cannot run {script}: No such file")
    job = client.view(job_id)
    assert (job["status"], job["attempt"]) == ("pending", 1), "it was no failed attempt"


@pytest.mark.skipif(sys.platform != "linux", reason="how much an environment holds differs")
def test_a_job_whose_headers_fit_no_environment_fails_and_the_worker_goes_on(process, work):
    server = process("--max-headers", "400000", "--grpc-port", "off")
    client = Client(server)
    work(server.url, "--", "cat")
    job_id = client.put(b"1", {"X-Large": "x" * 200_000})
    client.wait_status(job_id, "failed")
    assert client.view(job_id)["error"] == "cannot run cat: Argument list too long"
    client.wait_status(client.put(b"2"), "completed")


def test_the_log_says_why_an_attempt_failed_and_whether_there_is_another(server, client, queue, work):
    script = 'echo first >&2; printf "%s" "$(cat)" >&2; printf "\\033[2J%0400d" 1 >&2; exit $JOB_HEADER_X_CODE'
    worker = work(server.url, "--queue", queue, "--", "sh", "-c", script)
    failed = client.put(b"broken: ", {"X-Code": "3"}, queue=queue)
    retried = client.put(b"busy: ", {"X-Code": "75"}, queue=queue)
    worker.wait_log(f"WARNING job_failed job={failed} reason=broken: \\u001b[2J000")
    worker.wait_log(f"WARNING job_retried job={retried} reason=busy: \\u001b[2J000")
    assert "first" not in worker.log() and max(map(len, worker.log().splitlines())) < 450


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see whether a process is gone")
def test_what_a_command_leaves_in_the_background_does_not_hold_its_job_up(server, client, queue, work, room):
    """Ended with its process group, or, where it has left the group, left alone."""
    work(server.url, "--queue", queue, "--", "sh", "-c", 'sleep 1000 & echo $! > new; mv new pid; echo done')
    assert client.submit(b"x", queue=queue, wait=20).json()["payload"] == "done\n"
    pid = int((room / "pid").read_text())
    wait_until(lambda: gone(pid), 10, "the end of what was left running")
    other = queue[:30] + "-other"
    script = 'setsid sleep 30 & echo $! > new; mv new pid2; head -c 200000 /dev/zero; exit 0'
    work(server.url, "--queue", other, "--", "sh", "-c", script)
    job_id = client.put(b"x" * 1_000_000, queue=other)
    client.wait_status(job_id, "completed")
    assert client.result(job_id) == bytes(200_000)
    os.kill(int((room / "pid2").read_text()), signal.SIGKILL)


def test_a_header_with_hyphens_is_not_covered_by_one_that_looks_alike(server, client, queue, work):
    work(server.url, "--queue", queue, "--", "sh", "-c", 'printf %s "$JOB_HEADER_X_A"')
    for headers in ({"X-A": "right", "X_A": "1", "X.A": "2"}, {"X_A": "1", "X.A": "2", "X-A": "right"}):
        job_id = client.put(b"1", headers, queue=queue)
        client.wait_status(job_id, "completed")
        assert client.result(job_id) == b"right"


def test_the_environment_tells_the_job_and_its_headers(server, client, queue, work):
    work(server.url, "--queue", f"other,{queue}", "--worker", "envoy", "--", "env", "-0")
    headers = {"X-Trace-Id": "t 1", "Content-Type": "text/plain", "Authorization": "Bearer secret"}
    job_id = client.put(b"1", headers, queue=queue)
    client.wait_status(job_id, "completed")
    values = dict(item.split("=", 1) for item in client.result(job_id).decode().split("\0") if item)
    assert (values["JOB_ID"], values["JOB_QUEUE"], values["JOB_ATTEMPT"]) == (job_id, queue, "1")
    assert (values["JOB_HEADER_X_TRACE_ID"], values["JOB_HEADER_CONTENT_TYPE"]) == ("t 1", "text/plain")
    assert "JOB_HEADER_AUTHORIZATION" not in values and "PATH" in values
    assert client.view(job_id)["worker"] == "envoy"


WAIT_FOR_GO = "touch started; while [ ! -e go ]; do sleep 0.05; done; echo done"


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """The folder in which the commands run: they touch `started`, and end when there is `go`."""
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_lease_is_extended_while_the_command_runs(still, clock, work, room):
    client = Client(still)
    work(still.url, "--lease", "1", "--", "sh", "-c", WAIT_FOR_GO)
    job_id = client.put()
    client.wait_status(job_id, "processing")
    for _ in range(4):  # thirds of a lease by the worker's clock; by the server's, none can run out meanwhile
        before = client.view(job_id)["lease_expires_at"]
        clock.advance(0.3)
        wait_until(
            lambda before=before: client.view(job_id)["lease_expires_at"] > before, 15, "a lease that is extended"
        )
    (room / "go").touch()
    client.wait_status(job_id, "completed")
    assert (client.view(job_id)["attempt"], client.view(job_id)["deliveries"]) == (1, 1)


def gone(pid: int) -> bool:
    """Ended, be it that nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see whether a process is gone")
@pytest.mark.parametrize("how", ["cancelled", "cleared away and lost"])
def test_a_job_that_is_cancelled_or_lost_kills_the_command_and_its_children(process, work, room, how):
    server = process("--fsync", "never", "--grpc-port", "off")
    client = Client(server)
    script = 'if [ "$(cat)" = next ]; then exit 0; fi; sleep 1000 & echo $! $$ > new; mv new pids; wait'
    worker = work(server.url, "--lease", "1", "--", "sh", "-c", script)
    job_id = client.put(b"1")
    pids = [int(pid) for pid in wait_until(lambda: (room / "pids").exists() and (room / "pids").read_text()).split()]
    assert len(pids) == 2 and not any(map(gone, pids))
    if how == "cancelled":
        client.cancel(job_id)
    else:
        assert client.call("DELETE", "/api/admin/clear").status == 200
    wait_until(lambda: all(map(gone, pids)), 10, "the end of the command and its child")
    after = client.put(b"next")
    client.wait_status(after, "completed")  # the worker goes on
    worker.wait_log("job_given_up")
    if how == "cancelled":
        assert client.status(job_id) == "cancelled"


def test_sigterm_lets_the_running_one_finish_and_takes_no_other(server, client, queue, work, room):
    first = client.put(queue=queue)
    worker = work(server.url, "--queue", queue, "--", "sh", "-c", WAIT_FOR_GO)
    client.wait_status(first, "processing")
    second = client.put(queue=queue)
    worker.terminate()
    worker.wait_log("stopping")
    assert client.status(first) == "processing"
    (room / "go").touch()
    assert worker.wait() == OK
    assert (client.status(first), client.status(second)) == ("completed", "pending")


def test_two_signals_at_once_are_one_wish_to_a_worker(server, client, queue, work, room):
    job_id = client.put(queue=queue)
    worker = work(server.url, "--queue", queue, "--", "sh", "-c", WAIT_FOR_GO)
    wait_until(lambda: (room / "started").exists())
    send_at_once(worker.process, signal.SIGTERM, signal.SIGINT)
    worker.wait_log("stopping: what runs")
    past_the_burst()
    (room / "go").touch()
    assert worker.wait() == OK
    assert client.status(job_id) == "completed"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_what_runs_and_its_job_goes_back_in_line(server, client, queue, work, room, how):
    job_id = client.put(queue=queue)
    worker = work(server.url, "--queue", queue, "--", "sh", "-c", 'echo $$ > pid.new; mv pid.new pid; exec sleep 60')
    wait_until(lambda: (room / "pid").exists())
    worker.process.send_signal(how)
    worker.wait_log("stopping: what runs")
    past_the_burst()
    worker.process.send_signal(how)
    assert worker.wait(10) == OK
    assert client.status(job_id) == "pending"
    assert client.view(job_id)["attempt"] == 1, "it was no failed attempt"
    wait_until(lambda: not os.path.exists(f"/proc/{int((room / 'pid').read_text())}"), what="the end of the command")


def test_a_worker_whose_server_is_away_can_be_stopped(tmp_path, work, room):
    server = start_server(tmp_path, "--grpc-port", "off")
    Client(server).put()
    worker = work(server.url, "--", "sh", "-c", WAIT_FOR_GO)
    wait_until(lambda: Client(server).stats()["running"] == 1)
    server.kill()
    (room / "go").touch()
    worker.wait_log("not_handed_in")
    worker.terminate()
    worker.wait_log("stopping: what runs")
    past_the_burst()
    worker.terminate()
    assert worker.wait(10) == OK


def test_an_idle_worker_stops_at_once_and_leaves_no_job_behind(server, client, queue, work):
    before = client.stats()["waiting_workers"]
    worker = work(server.url, "--queue", queue, "--concurrency", "3", "--", "cat")
    wait_until(lambda: client.stats()["waiting_workers"] == before + 3)
    worker.terminate()
    assert worker.wait(10) == OK
    wait_until(lambda: client.stats()["waiting_workers"] == before)


def test_an_idle_worker_asks_a_server_that_drains_once_in_a_second(tmp_path, work):
    """Such a server hands nothing out, and lets nobody wait."""
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None) as server:
        client, busy = Client(server), WorkerOverHttp(server)

        def polls() -> int:
            rows = client.call("GET", "/metrics").body.decode().splitlines()
            return sum(int(row.split()[-1]) for row in rows if "_duration_seconds_count" in row and "/poll" in row)

        client.put(queue="busy")
        job = busy.poll(queue="busy")
        work(server.url, "--", "cat")
        client.wait_workers(1)
        stopping = later(server.stop, 60)
        wait_until(server.engine.draining)
        began, before = time.monotonic(), polls()
        wait_until(lambda: polls() >= before + 3, what="three polls of the worker")
        took = time.monotonic() - began
        busy.complete(job)
        stopping.result(20)
    assert took > 1.5


def test_a_worker_that_is_stopped_at_its_start_stops(server, queue, work):
    worker = work(server.url, "--queue", queue, "--concurrency", "20", "--", "cat")
    worker.wait_log("working url=")
    worker.terminate()
    assert worker.wait(10) == OK


def test_concurrency_runs_so_many_at_the_same_time(server, client, queue, work, room):
    script = 'touch "$JOB_ID"; while [ "$(ls | wc -l)" -lt 3 ]; do sleep 0.05; done'
    ids = [client.put(queue=queue) for _ in range(3)]
    work(server.url, "--queue", queue, "--concurrency", "3", "--", "sh", "-c", script)
    for job_id in ids:
        client.wait_status(job_id, "completed")


def test_the_worker_survives_a_restart_of_the_server_and_hands_its_result_in(process, work, room):
    server = process("--grpc-port", "off")
    job_id = Client(server).put(b"1")
    worker = work(server.url, "--lease", "1", "--", "sh", "-c", WAIT_FOR_GO)
    wait_until(lambda: (room / "started").exists())
    server.kill()
    (room / "go").touch()
    worker.wait_log("not_handed_in")
    again = process("--grpc-port", "off", "--port", str(server.port), "--lease", "1")
    client = Client(again)
    client.wait_status(job_id, "completed")
    job = client.view(job_id)
    # The lease may have run out before the worker asked again, which counts as an attempt: nobody else had the job.
    assert (job["deliveries"], job["result"]) == (1, "done\n")
    # An idle one comes back by itself, too.
    client.wait_workers(1)
    again.kill()
    third = process("--grpc-port", "off", "--port", str(server.port))
    after = Client(third).put(b"2")
    Client(third).wait_status(after, "completed")
    worker.terminate()
    assert worker.wait() == OK


def test_a_result_is_handed_in_without_a_complaint_though_the_server_has_closed_the_idle_connection(
    tmp_path, clock, work, room
):
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, clock=clock, lease=40_000) as server:
        client = Client(server)
        job_id = client.put(b"1")
        worker = work(server.url, "--", "sh", "-c", WAIT_FOR_GO)
        wait_until(lambda: (room / "started").exists(), 15)
        clock.advance(server.settings.idle_timeout + 1)
        # None is open but the one that asks.
        wait_until(lambda: "\njobqueue_connections 1\n" in client.call("GET", "/metrics").body.decode())
        (room / "go").touch()
        client.wait_status(job_id, "completed")
        worker.wait_log("job_completed")
        worker.terminate()
        assert worker.wait() == OK
        assert "WARNING" not in worker.log() and "not_handed_in" not in worker.log(), worker.log()
        assert client.view(job_id)["deliveries"] == 1
        server.stop(drain=0)


# -- work with --forward


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the payload names, or the payload itself."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802 (the name that http.server wants)
        self.do_POST()

    do_DELETE = do_GET  # noqa: N815

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.seen.append((self.path, dict(self.headers.items()), body))
        if body == b"hang":
            self.server.let_go.wait(60)
        body = self.server.answer or body
        status = int(body.split()[1]) if body.startswith(b"status ") else 200
        self.send_response(status)
        self.send_header("Content-Type", self.server.kind)
        if status == 503:
            self.send_header("Retry-After", self.server.retry_after)
        answer = b"" if status == 204 else body
        if status != 204:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as running:
        running.seen, running.answer, running.let_go, running.retry_after = [], None, threading.Event(), "77"
        running.url, running.kind = f"http://127.0.0.1:{running.server_address[1]}", "application/x-test"
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.let_go.set()
        running.shutdown()


def test_forward_maps_statuses_to_completed_retried_and_failed(still, work, service):
    client = Client(still)
    ends = {200: "completed", 201: "completed", 204: "completed", 429: "delayed", 502: "delayed", 503: "delayed",
            504: "delayed", 301: "failed", 400: "failed", 404: "failed", 500: "failed"}
    work(still.url, "--concurrency", "2", "--forward", service.url)
    ids = {status: client.put(b"status %d" % status) for status in ends}
    for status, end in ends.items():
        client.wait_status(ids[status], end)
        job = client.view(ids[status])
        if end == "completed":
            assert client.result(ids[status]) == (b"{}" if status == 204 else b"status %d" % status)
        else:
            assert f"answered {status}" in job["error"] and job["attempts"] == 3
    answer = client.call("GET", f"/api/jobs/{ids[201]}/result")
    assert answer.headers["content-type"] == "application/x-test"
    # Retry-After is when it is tried again.
    begin, again = (client.view(ids[503])[name] for name in ("created_at", "available_at"))
    seconds = jobqueue.datetime.fromisoformat(again) - jobqueue.datetime.fromisoformat(begin)
    assert 76 <= seconds.total_seconds() <= 77 + 30


@pytest.mark.parametrize("kind", ["text/plain;\r\n charset=utf-8", "text/plain\x01"], ids=ascii)
def test_forward_hands_in_a_result_whose_content_type_is_malformed(server, client, queue, work, service, kind):
    service.kind = kind
    work(server.url, "--queue", queue, "--forward", service.url)
    job_id = client.put(b"whole", queue=queue)
    client.wait_status(job_id, "completed")
    answer = client.call("GET", f"/api/jobs/{job_id}/result")
    assert (answer.body, answer.headers["content-type"]) == (b"whole", "application/octet-stream")


def test_forward_takes_a_retry_after_that_is_no_number_of_seconds_for_none(still, work, service):
    client = Client(still)
    worker = work(still.url, "--forward", service.url)
    # The superscripts are digits to Python, and no number; a date would be one of RFC 9110's two ways.
    for text in ("\u00b2", "1\u00b2", "\u00bd", "-1", "1e3", "soon", "", "Fri, 31 Dec 1999 23:59:59 GMT"):
        service.retry_after = text
        job_id = client.put(b"status 503")
        client.wait_status(job_id, "delayed")
        assert client.view(job_id)["error"] == f"{service.url} answered 503: status 503", text
    assert "Traceback" not in worker.log(), worker.log()


def test_forward_takes_a_retry_after_of_any_length_for_what_a_delay_may_be_at_most(still, work, service):
    """Python reads no number of more than 4300 digits, for fear of the time that it takes."""
    client = Client(still)
    worker = work(still.url, "--forward", service.url)
    for digits in (20, 5_000):
        service.retry_after = "9" * digits
        job_id = client.put(b"status 503")
        client.wait_status(job_id, "delayed")
        job = client.view(job_id)
        begin, again = (jobqueue.datetime.fromisoformat(job[name]) for name in ("created_at", "available_at"))
        assert (again - begin).days == 30, job["error"]
    assert "Traceback" not in worker.log(), worker.log()


def test_forward_hands_the_payload_and_its_headers_on_unchanged(server, client, queue, work, service, seed):
    payload = random.Random(seed).randbytes(200_000)
    work(server.url, "--queue", queue, "--forward", f"{service.url}/hook/?a=1")
    job_id = client.put(payload, {"Content-Type": "image/png", "X-Trace-Id": "t1"}, queue=queue)
    client.wait_status(job_id, "completed")
    assert client.result(job_id) == payload
    path, headers, body = service.seen[0]
    assert (path, body) == ("/hook/?a=1", payload)
    assert (headers["Content-Type"], headers["X-Trace-Id"]) == ("image/png", "t1")
    assert (headers["Job-Id"], headers["Job-Queue"], headers["Job-Attempt"]) == (job_id, queue, "1")


def polled(payload: int) -> jobqueue.PolledJob:
    """A job as a worker gets it."""
    fields = {"job_id": "j", "payload": payload, "headers": {}, "queue": "q", "attempt": 1, "lease_token": "t"}
    return jobqueue.PolledJob(json.dumps({**fields, "lease_seconds": 9}).encode())


@pytest.mark.parametrize("end, target", [
    ("", "/"), ("/", "/"), ("?a=1", "/?a=1"), ("/?a=1", "/?a=1"), ("/p", "/p"), ("/p/", "/p/"), ("/p?a=1", "/p?a=1"),
])
def test_forward_asks_for_the_path_and_the_query_of_its_url(service, end, target):
    assert jobqueue.forward(service.url + end, polled(7)).verb == "complete"
    assert [(path, body) for path, _, body in service.seen] == [(target, b"7")]


def test_forward_sends_no_job_that_was_lost_while_it_connected_to_the_service(monkeypatch):
    connecting, go_on, connect = threading.Event(), threading.Event(), socket.create_connection

    def slow(*arguments: Any, **named: Any) -> socket.socket:
        connecting.set()
        assert go_on.wait(20)
        return connect(*arguments, **named)

    job = polled(7)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        monkeypatch.setattr(socket, "create_connection", slow)
        forwarding = later(jobqueue.forward, f"http://127.0.0.1:{listening.getsockname()[1]}/", job)
        assert connecting.wait(10)
        job.lose("stopped")
        go_on.set()
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(10)
            assert connection.recv(4096) == b""
            assert forwarding.result(10).verb == "fail"


def test_forward_asks_for_the_whole_result_as_it_is_whatever_the_submitter_asked_for(
    server, client, queue, work, service
):
    work(server.url, "--queue", queue, "--forward", service.url)
    asked = {"Accept-Encoding": "gzip", "Range": "bytes=0-1", "If-None-Match": '"x"', "X-User": "日".encode()}
    job_id = client.put(b"x", asked, queue=queue)
    client.wait_status(job_id, "completed")
    headers = {name.lower(): value for name, value in service.seen[0][1].items()}
    assert headers["accept-encoding"] == "identity"
    assert not headers.keys() & {"range", "if-none-match"}
    assert headers["x-user"].encode("latin-1").decode() == "日"


def test_forward_to_nobody_is_a_retry(still, work):
    client = Client(still)
    work(still.url, "--forward", NOBODY)
    client.wait_status(client.put(), "delayed")


def test_forward_lets_go_of_a_service_that_does_not_answer_when_the_job_is_cancelled(
    server, client, queue, work, service
):
    work(server.url, "--queue", queue, "--lease", "1", "--forward", service.url)
    job_id = client.put(b"hang", queue=queue)
    wait_until(lambda: service.seen)
    client.cancel(job_id)
    after = client.put(b"next", queue=queue)
    client.wait_status(after, "completed")


NOT_OURS = {
    "{}": 200, "[]": 200, "null": 200, "<html>\n<p>no": 200, "status 502 <html>\n<p>no": 502, "status 404 {}": 404,
    "status 503": 503, "status 301 moved": 301,
}


@pytest.mark.parametrize("answer", NOT_OURS)
def test_what_is_no_jobqueue_server_is_told_in_one_line_and_exit_69(service, cli, answer):
    """Somebody else's port, or a proxy whose server is away."""
    service.answer = answer.encode()
    for command in (["stats"], ["jobs"], ["jobs", "x"], ["submit", "1"], ["submit", "--file", "-"], ["cancel", "x"],
                    ["pause"], ["requeue", "x"]):
        done = cli(service.url, *command, given=b"1\n")
        said(done, UNREACHABLE)
        told = f"jobqueue: {service.url} answered {NOT_OURS[answer]}, and not as a jobqueue server does"
        assert done.stderr.decode().startswith(told)


def test_a_worker_that_breaks_ends_with_a_message_and_not_unseen(service, work):
    """What it polls has an id that no URL can have."""
    service.answer = json.dumps({
        "job_id": "ü", "payload": 1, "headers": {}, "queue": "q", "attempt": 1, "lease_token": "t", "lease_seconds": 9,
    }).encode()
    worker = work(service.url, "--concurrency", "2", "--", "cat")
    assert worker.wait() == NO
    assert worker.log().splitlines()[-1].startswith("jobqueue: a worker ended: UnicodeEncodeError")


def test_a_worker_waits_for_a_server_that_a_proxy_says_is_away(service, work):
    service.answer = b"status 502 <html>"
    worker = work(service.url, "--", "cat")
    worker.wait_log("answered 502, and not as a jobqueue server does: trying again")
    worker.terminate()
    assert worker.wait() == OK


class NoQueue(Service):
    """Answers polls with what no jobqueue server says, one thing after the other, the last again and again."""

    SAID = (b"<html>Welcome!</html>", b'{"hello":1}', b"[1]", b"null", b"\xff", b"")

    def do_POST(self) -> None:  # noqa: N802
        self.server.answer = self.SAID[min(len(self.server.seen), len(self.SAID) - 1)]
        super().do_POST()

    do_GET = do_POST  # noqa: N815


def test_a_worker_whose_server_is_none_says_so_and_goes_on_trying_until_it_is_stopped(work, service):
    service.RequestHandlerClass = NoQueue
    worker = work(service.url, "--", "cat")
    for number in range(1, 5):
        wait_until(lambda number=number: worker.log().count("server_away") >= number, 15, f"complaint {number}")
    assert len(service.seen) >= 4
    worker.terminate()
    assert worker.wait() == OK
    assert "Traceback" not in worker.log()
    assert worker.log().count("and not as a jobqueue server does") >= 4


def test_a_worker_that_was_hung_up_on_while_its_job_ran_hands_the_result_in(server, client, queue):
    """A stop that comes as a poll is answered may find no poll any more to hang up on."""
    worker_client, heart = jobqueue.Client(server.url), jobqueue.Client(server.url)

    def run(job):
        worker.stop()
        worker_client.hang_up()
        return jobqueue.Verdict("complete", b"done", {}, {})

    worker = jobqueue.Worker(worker_client, heart, run, {"queue": queue})
    job_id = client.put(queue=queue)
    thread = threading.Thread(target=worker.work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert client.result(job_id) == b"done"


# -- tokens and the command line


def test_a_token_can_be_given_as_an_argument(capsys, monkeypatch):
    """None begins with a dash, as one in 64 that are made by chance does."""
    made = iter(["-one", "-two", "three"])
    monkeypatch.setattr(jobqueue.secrets, "token_urlsafe", lambda size: next(made))
    assert jobqueue.main(["token", "--scope", "client", "--name", "x"]) == OK
    assert capsys.readouterr().out == "client three x\n"


def test_a_command_sends_its_token_and_a_worker_that_is_refused_ends_with_1(process, tmp_path):
    lines = [said(spawn(NOBODY, "token", "--scope", scope, "--name", "x")) for scope in ("client", "worker")]
    path = tmp_path / "tokens"
    path.write_text("".join(lines))
    path.chmod(0o600)
    server = process("--tokens", str(path), "--grpc-port", "off")
    client, worker = (line.split()[1] for line in lines)
    assert said(spawn(server.url, "submit", "1", "--wait", "0", JOBQUEUE_TOKEN=client))
    said(spawn(server.url, "submit", "1", "--wait", "0", "--token", worker), NO)
    done = spawn(server.url, "submit", "1", "--wait", "0")
    said(done, NO)
    assert b"(--token or JOBQUEUE_TOKEN)" in done.stderr
    done = spawn(server.url, "work", "--concurrency", "3", "--", "cat")
    assert done.returncode == NO
    assert b"Traceback" not in done.stderr and b"Authorization" in done.stderr


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_submit_tells_which_job_came_to_nothing_and_with_json_the_servers_answer(server, client, queue, end):
    worker = WorkerOverHttp(server)
    for flags in ([], ["--json"]):
        submitting = later(spawn, server.url, "submit", "1", "--queue", queue, *flags)
        job = worker.poll(queue=queue, wait=20)
        if end == "failed":
            worker.fail(job, "it broke", retry=False)
        else:
            client.cancel(job.id)
        done = submitting.result(20)
        assert done.returncode == NO and f"(job {job.id})" in done.stderr.decode()
        if flags:
            answer = json.loads(done.stdout)
            assert (answer["code"], answer["job_id"]) == (f"job_{end}", job.id)
        else:
            assert done.stdout == b""


def test_a_command_that_cannot_be_given_its_payload_does_not_run_on_without(monkeypatch):
    begun, popen = [], subprocess.Popen

    def no_thread(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: begun.append(popen(*given, **more)) or begun[0])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="thread"):
        patch.setattr(threading.Thread, "start", no_thread)
        jobqueue.run_command(["sleep", "60"], polled(1))
    assert begun[0].wait(20) == -signal.SIGKILL
    for pipe in (begun[0].stdout, begun[0].stderr):
        pipe.close()
