"""Who gets in: addresses, tokens and scopes on both wires, TLS and client certificates, Host and cross-site rules."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jobqueue
from support import ROOT, ServerProcess, call, connect, grpc_stub, raw, start_server, wait_until
from wires import WORKERS, Client, WorkerOverHttp, check_problem, later

TOKENS = {"client": "c-token", "worker": "w-token", "admin": "a-token", "client,worker": "cw-token"}


def bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_file(path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[jobqueue.Server]:
    """A server in this process, which is stopped without a drain."""
    server = jobqueue.Server(data_dir=folder / "data", **{"port": 0, "grpc_port": None, "fsync": "never", **settings})
    server.start()
    try:
        yield server
    finally:
        server.stop(drain=0)


# -- addresses


def test_without_a_host_only_this_machine_is_served(process):
    server = process("--grpc-port", "off")
    assert server.url == f"http://127.0.0.1:{server.port}"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), 5)  # another address of this machine


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "queue.example.com"])
def test_a_wider_host_without_tokens_is_refused(host, tmp_path):
    with pytest.raises(ValueError, match="--tokens") as refused:
        jobqueue.Server(host=host, data_dir=tmp_path / "data", port=0, grpc_port=None)
    assert host in str(refused.value) and "--insecure" in str(refused.value)
    assert not (tmp_path / "data").exists()


def needs_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_a_host_of_this_machine_alone_needs_no_tokens(host, tmp_path):
    if host == "::1":  # the one that a machine may lack; whatever else is refused is the server's doing
        needs_ipv6()
    with running(tmp_path, host=host) as server:
        assert call(server.url, "GET", "/health").status == 200


def test_a_client_reaches_an_address_with_colons_also_without_a_port(tmp_path, monkeypatch):
    needs_ipv6()
    with running(tmp_path, host="::1") as server:
        monkeypatch.setattr(http.client.HTTPConnection, "default_port", server.port)
        with contextlib.closing(jobqueue.Client("http://[::1]")) as client:
            assert client.call("GET", "/health", timeout=10)[0] == 200


def test_a_wider_host_starts_with_tokens_or_when_told_that_it_is_insecure(tmp_path):
    with running(tmp_path / "open", host="0.0.0.0", insecure=True) as server:
        assert call(f"http://127.0.0.2:{server.port}", "GET", "/api/admin/stats").status == 200
    tokens = token_file(tmp_path / "tokens", "admin secret\n")
    with running(tmp_path / "closed", host="0.0.0.0", tokens=tokens) as server:
        url = f"http://127.0.0.2:{server.port}"
        assert call(url, "GET", "/api/admin/stats").status == 401
        assert call(url, "GET", "/api/admin/stats", headers=bearer("secret")).status == 200


# -- the token file


def test_a_token_file_has_comments_blank_lines_names_and_several_scopes(tmp_path):
    path = token_file(tmp_path / "tokens", (
        "# who may\n\n  client   one   # the web shop\nworker,client two gpu host 1\n\tadmin\tthree\n#admin four\n"))
    access = jobqueue.Access(path)
    granted = {"one": {"client"}, "two": {"client", "worker"}, "three": set(jobqueue.SCOPES), "four": None}
    for token, scopes in granted.items():
        for scope in jobqueue.SCOPES:
            if scopes is not None and scope in scopes:
                access.check(f"Bearer {token}", scope)
                continue
            with pytest.raises(jobqueue.JobQueueError) as refused:
                access.check(f"Bearer {token}", scope)
            assert refused.value.code == ("unauthorized" if scopes is None else "forbidden")
        access.check(f"Bearer {token}", None)


@pytest.mark.parametrize("given", ["one", "two", "three", "four", "on", "onee", "", None], ids=repr)
def test_every_token_of_the_file_is_compared_in_constant_time_whichever_it_is(given, tmp_path, monkeypatch):
    """So the time of an answer tells neither how much of a token was right nor where in the file it stands."""
    known = ["one", "two", "three", "four"]
    access = jobqueue.Access(token_file(tmp_path / "tokens", "".join(f"admin {token}\n" for token in known)))
    compared, real = [], jobqueue.hmac.compare_digest

    def counted(*pair: bytes) -> bool:
        compared.append(pair)
        return real(*pair)

    monkeypatch.setattr(jobqueue.hmac, "compare_digest", counted)
    with contextlib.nullcontext() if given in known else pytest.raises(jobqueue.JobQueueError):
        access.check(None if given is None else f"Bearer {given}", "client")
    assert len(compared) == len(set(compared)) == len(known)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o602, 0o610])
def test_a_token_file_that_others_may_read_is_refused(mode, tmp_path):
    path = token_file(tmp_path / "tokens", "admin secret\n", mode)
    with pytest.raises(ValueError, match="chmod 600") as refused:
        jobqueue.Access(path)
    assert path in str(refused.value) and "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "# admin secret\n", "admin\n", "root secret\n", "admin secret\nclient,rot other\n", "secret admin\n",
     ",admin secret\n", "client , worker secret\n", b"admin \xff\n", "admin secret ops\nclient secret bob\n"],
    ids=repr,
)
def test_a_token_file_without_a_token_or_with_a_bad_line_is_refused_and_the_secret_not_told(text, tmp_path):
    path = token_file(tmp_path / "tokens", text)
    with pytest.raises(ValueError, match=str(path)) as refused:
        jobqueue.Access(path)
    assert "secret" not in str(refused.value)


def test_a_comment_begins_behind_a_space_and_not_within_a_token(tmp_path):
    access = jobqueue.Access(token_file(tmp_path / "tokens", "# of the house\nclient se#cret # bob\n"))
    access.check("Bearer se#cret", "client")
    with pytest.raises(jobqueue.JobQueueError):
        access.check("Bearer se", "client")


def test_a_server_with_a_bad_token_file_does_not_start_and_says_why_in_one_line(tmp_path):
    path = token_file(tmp_path / "tokens", "admin secret\n", 0o644)
    command = [sys.executable, str(ROOT / "jobqueue.py"), "--tokens", path, "--port", "0", "--grpc-port", "off"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "chmod 600" in done.stderr
    assert not (tmp_path / "data").exists()


# -- tokens: each route and each scope


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jobqueue.Server]:
    """A server with tokens, over both wires."""
    folder = tmp_path_factory.mktemp("closed")
    path = token_file(folder / "tokens", "".join(f"{scope} {token}\n" for scope, token in TOKENS.items()))
    with running(folder, tokens=path, grpc_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jobqueue.Server]:
    """A server without tokens."""
    with running(tmp_path_factory.mktemp("unlocked"), allow_host="queue.example.com,B.example") as server:
        yield server


def try_route(server: Any, route: Any, headers: dict[str, str]) -> Any:
    path = route.path.replace("{job_id}", "no-such-job")
    if route.handler == "submit":
        path += "?wait=0"
    body = b"1" if route.method == "POST" else b""
    if route.handler == "submit_many":
        headers = {**headers, "Content-Type": "application/x-ndjson"}
    if route.handler == "complete_many":
        body, headers = b'{"results": []}', {**headers, "Content-Type": "application/json"}
    return call(server.url, route.method, path, body, headers)


def name(route: Any) -> str:
    return f"{route.method} {route.path}"


@pytest.mark.parametrize("route", jobqueue.ROUTES, ids=name)
def test_a_route_is_for_its_scope_alone(route, closed):
    refused = {}
    for scopes, token in {"": None, "nobody": "wrong", **TOKENS}.items():
        answer = try_route(closed, route, bearer(token))
        if answer.status in (401, 403):
            refused[scopes] = check_problem(answer)["code"]
            assert ("www-authenticate" in answer.headers) == (answer.status == 401)
        else:
            assert answer.status < 500, answer
    expected = {}
    if route.scope:
        expected = {"": "unauthorized", "nobody": "unauthorized"}
        expected |= {scopes: "forbidden" for scopes in TOKENS if not {route.scope, "admin"} & set(scopes.split(","))}
    assert refused == expected


def test_the_scopes_are_those_that_were_promised():
    scopes = {name(route): route.scope for route in jobqueue.ROUTES}
    openly = {"GET /health", "GET /ready", "GET /openapi.json", "GET /"}
    assert {route for route, scope in scopes.items() if scope is None} == openly
    for route, scope in scopes.items():
        path = route.split()[1]
        if path.startswith(("/api/admin", "/metrics")):
            assert scope == "admin", route
        elif path.startswith("/api/worker"):
            assert scope == "worker", route
        elif route not in openly:
            assert scope == "client", route


@pytest.mark.parametrize(
    "value",
    ["c-token", "Basic c-token", "Bearer", "Bearer ", "Bearer c-toke", "Bearer c-token2", "Bearer c-token,a-token",
     "Bearer C-TOKEN", "Bearer \xff\xfe", "Bearer \xfc", "Bearer c-token x"],
    ids=repr,
)
def test_what_is_no_token_is_401(value, closed):
    said = raw(closed.url, f"GET /api/jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: "
               f"{value}\r\n\r\n".encode("latin-1"))
    assert said.startswith(b"HTTP/1.1 401 "), said


def test_the_scheme_is_read_without_case_and_a_token_in_the_query_is_none(closed):
    assert call(closed.url, "GET", "/api/jobs", headers={"Authorization": "bearer  c-token"}).status == 200
    assert call(closed.url, "GET", "/api/jobs?token=c-token").status in (400, 401)
    assert call(closed.url, "GET", "/api/jobs?access_token=c-token").status in (400, 401)
    head = call(closed.url, "HEAD", "/api/jobs")
    assert (head.status, head.body) == (401, b"")


def test_a_refused_submit_is_not_stored(closed):
    before = call(closed.url, "GET", "/api/admin/stats", headers=bearer("a-token")).json()["total"]
    for token in (None, "wrong", "w-token"):
        assert call(closed.url, "POST", "/api/submit?wait=0", b"x" * 100_000, bearer(token)).status in (401, 403)
    assert call(closed.url, "GET", "/api/admin/stats", headers=bearer("a-token")).json()["total"] == before


GRPC_METHODS = ["RequestJob", "CompleteJob", "RequestJobs", "CompleteJobs", "FailJob", "ReleaseJob", "ExtendLease"]


@pytest.mark.parametrize("method", GRPC_METHODS)
def test_a_grpc_method_is_for_workers_alone(method, closed):
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    from worker_pb2_gen import worker_pb2

    service = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
    assert set(GRPC_METHODS) == {each.name for each in service.methods}
    request = getattr(worker_pb2, service.methods_by_name[method].input_type.name)()
    stub, seen = grpc_stub(closed), {}
    for scopes, token in {"": None, "nobody": "wrong", **TOKENS}.items():
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            getattr(stub, method)(request, metadata=metadata, timeout=10)
            seen[scopes] = "in"
        except grpc.RpcError as error:
            seen[scopes] = error.code().name if error.code().name in ("UNAUTHENTICATED", "PERMISSION_DENIED") else "in"
    assert seen == {"": "UNAUTHENTICATED", "nobody": "UNAUTHENTICATED", "client": "PERMISSION_DENIED", "worker": "in",
                    "admin": "in", "client,worker": "in"}


def test_grpc_health_and_reflection_are_open(closed):
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    health = pytest.importorskip("grpc_health.v1.health_pb2", reason="grpcio-health-checking is not installed")
    reflection = pytest.importorskip(
        "grpc_reflection.v1alpha.reflection_pb2", reason="grpcio-reflection is not installed")
    from grpc_health.v1.health_pb2_grpc import HealthStub
    from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

    with grpc.insecure_channel(f"127.0.0.1:{closed.grpc_port}") as channel:
        assert HealthStub(channel).Check(health.HealthCheckRequest(), timeout=10).status == 1
        request = reflection.ServerReflectionRequest(list_services="")
        answer = next(ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10))
        names = {service.name for service in answer.list_services_response.service}
        assert "worker.WorkerService" in names


# -- Host, and web pages of other sites


def ask(server: Any, path: str, *headers: str, method: str = "GET") -> int:
    """The status of a request with these header lines and no other."""
    lines = [f"{method} {path} HTTP/1.1", *headers, "Connection: close", "", ""]
    said = raw(server.url, "\r\n".join(lines).encode("latin-1"))
    return int(said.split(None, 2)[1])


HOSTS = {
    "127.0.0.1": 200, "127.0.0.1:3000": 200, "[::1]:3000": 200, "[::1]": 200, "192.0.2.7:80": 200, "localhost": 200,
    "LOCALHOST:99": 200, "queue.example.com": 200, "Queue.Example.com:8080": 200, "b.example": 200,
    "evil.example": 403, "queue.example.com.evil.example": 403, "localhost.evil.example": 403, "evil-localhost": 403,
    "127.0.0.1.evil.example": 403, "127.0.0.1.": 403,
}


@pytest.mark.parametrize("host", HOSTS)
def test_without_tokens_the_host_is_an_address_localhost_or_one_that_is_allowed(host, unlocked):
    for path in ("/api/worker/poll?max=1", "/health", "/"):
        assert ask(unlocked, path, f"Host: {host}") == HOSTS[host]
    if HOSTS[host] == 403:
        answer = call(unlocked.url, "GET", "/api/jobs", headers={"Host": host})
        assert check_problem(answer)["code"] == "host_refused"
        assert "--allow-host" in answer.json()["detail"]


def test_with_tokens_any_host_will_do(closed):
    assert ask(closed, "/api/jobs", "Host: evil.example", "Authorization: Bearer c-token") == 200


SITES = {
    (): True,
    ("Sec-Fetch-Site: same-origin",): True,
    ("Sec-Fetch-Site: none",): True,  # typed into the address line
    ("Sec-Fetch-Site: same-site",): False,  # another port of this machine
    ("Sec-Fetch-Site: cross-site",): False,
    ("Sec-Fetch-Site: nonsense",): False,
    ("Origin: http://localhost:3000",): True,
    ("Origin: http://localhost:4000",): False,
    ("Origin: https://localhost:3000",): True,  # behind a proxy that speaks TLS
    ("Origin: https://localhost:4000",): False,
    ("Origin: http://evil.example",): False,
    ("Origin: null",): False,
    ("Origin: http://localhost:3000", "Sec-Fetch-Site: cross-site"): False,
    ("Origin: http://evil.example", "Sec-Fetch-Site: same-origin"): False,
}


@pytest.mark.parametrize("site", SITES, ids=" + ".join)
def test_a_page_of_another_site_may_call_nothing(site, unlocked):
    for route in jobqueue.ROUTES:
        path = route.path.replace("{job_id}", "no-such-job") + ("?wait=0" if route.handler == "submit" else "")
        if route.handler == "clear" and SITES[site]:
            continue
        status = ask(unlocked, path, "Host: localhost:3000", "Content-Length: 0", *site, method=route.method)
        if SITES[site] or route.scope is None:  # what is open holds no data
            assert status not in (403, 500), name(route)
        else:
            assert status == 403, name(route)


def test_a_refused_page_changes_nothing(unlocked):
    client = Client(unlocked)
    job_id = client.put(queue="sites")
    evil = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    for method, path in (("GET", "/api/worker/poll?queue=sites"), ("DELETE", f"/api/jobs/{job_id}"),
                         ("POST", "/api/submit?queue=sites&wait=0"), ("DELETE", "/api/admin/clear")):
        assert check_problem(call(unlocked.url, method, path, b"", evil))["code"] == "cross_site"
    assert client.status(job_id) == "pending"
    assert client.stats()["queues"]["sites"]["pending"] == 1
    # No answer says that another site may read it; a preflight is no exception.
    for method, path in (("OPTIONS", "/api/submit"), ("GET", "/health")):
        answer = call(unlocked.url, method, path, headers={**evil, "Access-Control-Request-Method": "POST"})
        assert not [each for each in answer.headers if each.startswith("access-control-")]


# -- TLS


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory: pytest.TempPathFactory, certs: Any) -> ServerProcess:
    return start_server(tmp_path_factory.mktemp("tls"), "--tls-cert", str(certs.server_cert), "--tls-key",
                        str(certs.server_key), "--fsync", "never")


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory, certs: Any) -> ServerProcess:
    """It asks callers for a certificate."""
    return start_server(tmp_path_factory.mktemp("mutual"), "--tls-cert", str(certs.server_cert), "--tls-key",
                        str(certs.server_key), "--tls-client-ca", str(certs.ca), "--fsync", "never")


def poll_over(server: Any, certs: Any, who: str | None) -> str:
    """What a gRPC poll with this certificate comes to."""
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    from worker_pb2_gen import worker_pb2

    try:
        grpc_stub(server, certs.grpc_credentials(who)).RequestJob(worker_pb2.JobRequest(queues=["none"]), timeout=20)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def test_both_wires_are_served_over_tls(over_tls, certs):
    assert over_tls.url.startswith("https://")
    assert call(over_tls.url, "GET", "/health", context=certs.context()).json() == {"status": "ok"}
    assert poll_over(over_tls, certs, None) == "NOT_FOUND"


def test_a_caller_that_does_not_know_the_ca_is_not_deceived(over_tls):
    with pytest.raises(ssl.SSLCertVerificationError):
        call(over_tls.url, "GET", "/health", context=ssl.create_default_context())


def test_plain_http_on_a_tls_port_ends_and_harms_nobody(over_tls, certs):
    plain = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    told = raw(over_tls.url.replace("https", "http"), plain)
    assert told.startswith(b"HTTP/1.1 400 ") and b"this port speaks TLS" in told
    for data in (b"\x16\x03\x01\x00\x05hello", b"\0" * 5000):
        assert b"200 OK" not in raw(over_tls.url.replace("https", "http"), data)
    assert call(over_tls.url, "GET", "/health", context=certs.context()).status == 200


@pytest.mark.parametrize("who, in_", [("client", True), (None, False), ("stranger", False)])
def test_with_a_client_ca_only_its_certificates_get_in_on_both_wires(who, in_, mutual, certs):
    def over_http() -> bool:
        try:
            return call(mutual.url, "GET", "/health", context=certs.context(who)).status == 200
        except OSError:  # an alert, or a reset, as the caller was writing already
            return False

    assert over_http() is in_
    assert poll_over(mutual, certs, who) == ("NOT_FOUND" if in_ else "UNAVAILABLE")


def test_silent_callers_do_not_block_the_handshake_of_another(over_tls, certs):
    with contextlib.ExitStack() as stack:
        for port in (over_tls.port, over_tls.grpc_port):
            for _ in range(20):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
        half = [stack.enter_context(connect(over_tls.url)) for _ in range(5)]
        for each in half:
            each.sendall(b"\x16\x03\x01")  # the beginning of a handshake
        assert call(over_tls.url, "GET", "/health", context=certs.context(), timeout=10).status == 200
        assert poll_over(over_tls, certs, None) == "NOT_FOUND"


def test_a_certificate_that_the_socket_takes_bit_by_bit_is_sent_to_its_end(tmp_path):
    """With a thousand names it is larger than what such a socket takes: the handshake waits for it again and again."""
    trustme = pytest.importorskip("trustme")
    authority, path = trustme.CA(), tmp_path / "large.pem"
    names = [f"{number:04}.a-long-name-of-a-tenant.example.test" for number in range(1000)]
    authority.issue_cert("localhost", *names).private_key_and_cert_chain_pem.write_to_path(str(path))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with running(tmp_path, tls_cert=path, header_timeout=5) as server, socket.socket() as caller:
        server._http.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.settimeout(20)
        caller.connect(("127.0.0.1", server.port))
        with context.wrap_socket(caller, server_hostname="localhost") as over_tls:
            over_tls.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert over_tls.recv(12) == b"HTTP/1.1 200"


def test_a_crowd_that_resets_its_connections_at_once_harms_nobody(process, certs):
    """Also with the first bytes of a handshake in the server's buffer before the connection is accepted."""
    over_tls = process("--tls-cert", str(certs.server_cert), "--tls-key", str(certs.server_key), "--grpc-port", "off")
    for data in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"):
        for _ in range(200):
            with connect(over_tls.url) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if data:
                    connection.sendall(data)
        assert call(over_tls.url, "GET", "/health", context=certs.context(), timeout=10).status == 200
    assert "Traceback" not in over_tls.log()


def test_a_large_payload_and_a_large_result_pass_whole_over_tls_and_a_held_submit_is_answered(over_tls, certs, seed):
    rng = random.Random(seed)
    payload, result = rng.randbytes(4_000_000), rng.randbytes(4_000_000)
    held = later(call, over_tls.url, "POST", "/api/submit?queue=large", payload, context=certs.context())
    polled = call(over_tls.url, "GET", "/api/worker/poll?queue=large&wait=20", context=certs.context())
    job = WorkerOverHttp._got(polled.body.decode())
    assert job.data == payload
    path = f"/api/worker/complete/{job.id}?lease_token={job.token}"
    assert call(over_tls.url, "POST", path, result, context=certs.context()).status == 200
    answer = held.result(30)
    assert (answer.status, answer.json()["job_id"]) == (200, job.id)
    whole = call(over_tls.url, "GET", f"/api/jobs/{job.id}/result", context=certs.context())
    assert whole.body == result
    assert jobqueue.base64.b64decode(answer.json()["payload"]) == result


@pytest.mark.parametrize("size", [5_000_000, 20_000_000])
def test_a_refusal_reaches_a_caller_that_is_still_sending_over_tls(size, over_tls, certs):
    """http.client sends all before it reads: a connection that breaks meanwhile hides the answer."""
    answer = call(over_tls.url, "POST", "/api/submit?wait=0", b"x" * size, context=certs.context())
    assert (answer.status, check_problem(answer)["code"]) == (413, "payload_too_large")


def test_a_large_payload_passes_whole_over_grpc_with_tls(over_tls, certs, seed):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    from worker_pb2_gen import worker_pb2

    payload = random.Random(seed).randbytes(4_000_000)
    answer = call(over_tls.url, "POST", "/api/submit?queue=grpc&wait=0", payload, context=certs.context())
    stub = grpc_stub(over_tls, certs.grpc_credentials())
    job = stub.RequestJob(worker_pb2.JobRequest(queues=["grpc"]), timeout=20)
    assert (job.id, job.payload_bytes) == (answer.json()["job_id"], payload)
    assert stub.CompleteJob(worker_pb2.JobResult(job_id=job.id, payload_bytes=payload), timeout=20).success
    whole = call(over_tls.url, "GET", f"/api/jobs/{job.id}/result", context=certs.context())
    assert whole.body == payload


def test_a_client_that_hangs_up_over_tls_leaves_the_line(over_tls, certs):
    """A long poll that was left must not take a job with it."""
    with certs.context().wrap_socket(connect(over_tls.url), server_hostname="localhost") as poller:
        poller.sendall(b"GET /api/worker/poll?queue=left&wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")

        def waiting() -> int:
            stats = call(over_tls.url, "GET", "/api/admin/stats", context=certs.context())
            return stats.json()["waiting_workers"]

        wait_until(lambda: waiting() == 1)
    wait_until(lambda: waiting() == 0)


def test_requests_that_are_pipelined_over_tls_are_all_answered(over_tls, certs):
    """The TLS layer may hold several requests that the socket no longer announces."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with certs.context().wrap_socket(connect(over_tls.url), server_hostname="localhost") as caller:
        caller.sendall(request * 49 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = b""
        while data := caller.recv(65536):
            received += data
    assert received.count(b"HTTP/1.1 200 OK") == 50


@pytest.mark.parametrize("setting", ["tls_cert", "tls_key", "tls_client_ca"])
def test_a_tls_file_that_is_none_is_refused_before_anything_is_opened(setting, tmp_path, certs):
    given = {"tls_cert": certs.server_cert, "tls_key": certs.server_key, "tls_client_ca": certs.ca}
    given[setting] = tmp_path / "nonsense"
    given[setting].write_text("nonsense")
    with pytest.raises(ValueError, match=f"^--{setting.replace('_', '-')} {re.escape(str(given[setting]))} holds no "):
        jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=None, **given).start()
    assert not (tmp_path / "data").exists()


def encrypted(key: Path, path: Path) -> Path:
    """The same key behind a pass phrase."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    path.write_bytes(secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                          serialization.BestAvailableEncryption(b"secret")))
    return path


def test_the_command_line_says_by_its_flag_which_tls_file_is_wrong(tmp_path, certs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cert, key, other = str(certs.server_cert), str(certs.server_key), str(certs.client_key)
    locked = str(encrypted(certs.server_key, tmp_path / "locked.key"))
    none = tmp_path / "none.pem"
    none.write_text("nonsense")
    wrong = {
        ("/nowhere/c", key): "{cert} /nowhere/c: No such file or directory",
        (cert, "/nowhere/k"): "{key} /nowhere/k: No such file or directory",
        (str(none), key): f"{{cert}} {none} holds no certificate in PEM",
        (cert, str(none)): f"{{key}} {none} holds no private key in PEM",
        (cert, None): f"{{cert}} {cert} holds no key: give {{key}}",
        (cert, other): f"cannot use {{cert}} {cert} with {{key}} {other}: key values mismatch",
        (cert, locked): f"{{key}} {locked} is encrypted: give a key that has no pass phrase",
    }
    ours, theirs = ("--tls-cert", "--tls-key"), ("--cert", "--key-file")
    for (cert_path, key_path), message in wrong.items():
        for command, flags in ((["serve", "--port", "0", "--grpc-port", "off"], ours),
                               (["stats", "--url", "https://localhost:1"], theirs)):
            more = [flags[1], key_path] if key_path else []
            assert jobqueue.main([*command, flags[0], cert_path, *more]) == 2
            assert capsys.readouterr().err == f"jobqueue: {message.format(cert=flags[0], key=flags[1])}\n"
    for arguments in (["serve", "--tls-cert", cert, "--tls-key", key, "--tls-client-ca"],
                      ["stats", "--url", "https://localhost:1", "--ca"]):
        for path, why in (("/nowhere/ca", ": No such file or directory"), (str(none), " holds no certificate in PEM")):
            assert jobqueue.main([*arguments, path]) == 2
            assert capsys.readouterr().err == f"jobqueue: {arguments[-1]} {path}{why}\n"
    assert jobqueue.main(["--tokens", "/nowhere/tokens"]) == 2
    assert capsys.readouterr().err == "jobqueue: --tokens /nowhere/tokens: No such file or directory\n"
    assert not (tmp_path / "data").exists()


def test_an_empty_file_of_tokens_is_refused_and_does_not_open_the_server(tmp_path):
    with pytest.raises(ValueError, match="tokens is empty"):
        jobqueue.Server(data_dir=tmp_path / "data", tokens="", port=0, grpc_port=None)


@pytest.mark.parametrize("wire", WORKERS)
def test_tokens_are_wanted_over_tls_too(wire, tmp_path, certs):
    path = token_file(tmp_path / "tokens", "worker secret\n")
    tls = {"tls_cert": str(certs.server_cert), "tls_key": str(certs.server_key)}
    with running(tmp_path, tokens=path, grpc_port=0 if wire == "grpc" else None, **tls) as server:
        if wire == "grpc":
            assert poll_over(server, certs, None) == "UNAUTHENTICATED"
            return
        for token, status in ((None, 401), ("secret", 204)):
            answer = call(server.url, "GET", "/api/worker/poll", headers=bearer(token), context=certs.context())
            assert answer.status == status


def test_a_grpc_caller_who_is_turned_away_by_tls_makes_no_line_that_is_not_the_logs(tmp_path, certs):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    server = start_server(
        tmp_path, "--tls-cert", str(certs.server_cert), "--tls-key", str(certs.server_key), "--tls-client-ca",
        str(certs.ca), "--log-format", "json", wrapper=("env", "-u", "GRPC_VERBOSITY"))
    assert poll_over(server, certs, None) == "UNAVAILABLE"
    assert server.stop() == 0
    lines = server.log().splitlines()
    assert lines and all(isinstance(json.loads(line), dict) for line in lines), lines
