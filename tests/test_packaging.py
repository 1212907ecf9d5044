"""What surrounds the server: the generated code, the Makefile, CI, and what the repository must not say."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib

import pytest

from support import ROOT

worker_pb2 = pytest.importorskip("worker_pb2_gen.worker_pb2", reason="protobuf is not installed")
import original  # noqa: E402 (needs protobuf)

PROTO_TOOLS = ROOT / ".venv-proto" / ".tools"


def tracked_files():
    """Text files of the repository, also those that are new and not yet committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield name, content.decode(errors="replace")


def test_the_generated_code_is_what_the_proto_makes():
    if not PROTO_TOOLS.exists():
        pytest.skip("grpcio-tools 1.51.1 is not at hand: make proto-check")
    check = subprocess.run(["make", "--silent", "proto-check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


# -- clients of the original: what they send is understood, and they understand what is sent to them

ORIGINAL_MESSAGES = {
    "JobRequest": {},
    "Job": {
        "id": "550e8400",
        "payload": '{"x": 1.0}',
        "headers": {"Content-Type": "text/plain", "X-Trace-Id": "ü"},
    },
    "JobResult": {"job_id": "550e8400", "payload": "result"},
    "CompleteResponse": {"success": True},
}


@pytest.mark.parametrize("name", original.MESSAGES)
def test_what_the_originals_clients_send_is_read_whole(name):
    sent = original.message(name)(**ORIGINAL_MESSAGES[name])
    read = getattr(worker_pb2, name).FromString(sent.SerializeToString())
    assert read == getattr(worker_pb2, name)(**ORIGINAL_MESSAGES[name])


@pytest.mark.parametrize("name", original.MESSAGES)
def test_the_originals_clients_read_what_is_sent_to_them(name):
    sent = getattr(worker_pb2, name)(**ORIGINAL_MESSAGES[name])
    if name == "Job":
        sent.attempt = 1
        sent.lease_token = "token"
        sent.payload_bytes = b"\0\xff"
    elif name == "CompleteResponse":
        sent.duplicate = True
        sent.next.id = "another"
    read = original.message(name).FromString(sent.SerializeToString())
    known = {field.name for field in read.DESCRIPTOR.fields}
    assert known == set(ORIGINAL_MESSAGES[name]), "every field that the original has is compared"
    for field, value in ORIGINAL_MESSAGES[name].items():
        got = getattr(read, field)
        assert (dict(got) if isinstance(value, dict) else got) == value


def test_every_field_and_method_of_the_original_stands_where_it_did():
    for name, fields in original.MESSAGES.items():
        ours = getattr(worker_pb2, name).DESCRIPTOR.fields_by_name
        theirs = original.message(name).DESCRIPTOR.fields_by_name
        for field, number, _kind in fields:
            assert (ours[field].number, ours[field].type) == (number, theirs[field].type), f"{name}.{field}"
    service = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
    assert service.full_name == "worker.WorkerService"
    for method, (request, answer) in original.METHODS.items():
        found = service.methods_by_name[method]
        assert (found.input_type.name, found.output_type.name) == (request, answer)


# -- the Makefile and CI


def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(phony) == sorted(targets)
    for command in (["make", "--silent"], ["make", "--silent", "help"]):
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"^  make ([a-z-]+) ", said, re.MULTILINE) == targets


def test_ci_runs_as_a_program():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_http_needs_nothing_that_must_be_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
    assert project["requires-python"] == ">=3.11"


# -- what the repository must not say. The patterns are written so that they do not match themselves.

FORBIDDEN = re.compile(
    r"pypi[.]|pythonhosted[.]|[.]debian[.]org|registry[.]npm"  # the hosts of package registries
    r"|(?<![\w.])/(?:wor[k]/|roo[t]\b|hom[e]/\w|User[s]/\w)"  # places on the machine of whoever wrote it
)


def test_no_file_names_a_package_registry_or_a_place_on_somebodys_machine():
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_files()
        for number, line in enumerate(text.splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []
