"""The fuzzer of fuzz_http.py against a server process; JOBQUEUE_SEED=N runs the same messages again."""

import os
import random
import subprocess

import pytest

from fuzz_http import CANARY, message_of, outline, run, send
from http_cases import CASES, KEEPS
from support import start_server

ROUNDS = 8  # of which each loses it in one of ten cases, on a server that may lose it
COUNT = int(os.environ.get("JOBQUEUE_FUZZ") or 50_000)


def fuzz(tmp_path, count, seed):
    server = start_server(tmp_path, "--fsync", "never", "--grpc-port", "off")
    report = run(server.url, count, seed)
    print(report)
    answers = sum(report.statuses.values())
    assert report.sent >= count
    # Were all refused, the fuzzer would not reach what it is for; were none, it would hardly be fuzzing.
    good = sum(number for status, number in report.statuses.items() if status < 300)
    assert 0.1 < good / answers < 0.9
    assert server.process.poll() is None
    assert "Traceback" not in server.log()
    assert server.stop() == 0


@pytest.mark.timeout(300)
def test_no_mutated_request_hangs_crashes_or_confuses_the_server(tmp_path, seed):
    fuzz(tmp_path, COUNT, seed)


@pytest.mark.long
def test_none_of_a_million_mutated_requests_hangs_crashes_or_confuses_the_server(tmp_path, seed):
    fuzz(tmp_path, 1_000_000, seed)


def test_a_sigterm_amid_a_crowd_is_heard(tmp_path, seed):
    """The kernel may give it to a thread that is just starting another, and Python's main thread sleeps on."""
    for number in range(ROUNDS):
        server = start_server(tmp_path, "--fsync", "never", "--grpc-port", "off", "--drain", "0")
        address = ("127.0.0.1", server.port)
        crowd = []
        for one in range(random.Random(seed + number).randrange(150, 250)):
            message = message_of(seed, one)
            crowd.append(send(address, one, message, outline(message))[0])
        server.terminate()
        try:
            assert server.process.wait(30) == 0  # it would run for ever
        except subprocess.TimeoutExpired:
            pytest.fail(f"SIGTERM was lost in round {number}")
        finally:
            for connection in crowd:
                connection.close()


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES])
def test_the_fuzzers_outline_of_the_grammar_agrees_with_the_conformance_cases(case):
    """It may be more lenient than the server on what does not move a border, never on what does."""
    outlined = outline(case.sent + CANARY)
    assert not any(b"smuggled" in request.target for request in outlined.requests)
    if case.connection == KEEPS:
        assert outlined.clean
        assert len(outlined.requests) == len(case.answers) + 1
    elif outlined.clean:
        assert len(outlined.requests) <= len(case.answers) + 1
