"""What the README says is so: its commands print what it shows, its tables are the code's, its links lead somewhere.

Blocks marked `console` are run in order, as they stand, against one fresh server: a line that begins with "$ " is a
command (a backslash at its end or an open quote carries it on), what follows is what it prints. A command that ends
with "&" runs in the background; what it prints stands at the end of its block. Line breaks in what is printed do not
count, since long lines are wrapped. Ids, lease tokens and times differ from run to run: each id of the README stands
for the one that came in its place.

    python tests/test_readme.py        # run the blocks and write what they print into the README
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jobqueue  # noqa: E402
from support import ROOT, DidNotStart, ServerProcess, call, grpc_stub, start_server, wait_until  # noqa: E402

README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
WIDTH = 116


# -- reading the README


class Block(NamedTuple):
    """A fenced block: where its first line stands, what is written behind the fence, its lines."""

    line: int
    info: str
    heading: str
    text: str


def fenced_blocks(markdown: str) -> Iterator[Block]:
    heading, info, start, inside = "", "", 0, []
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.startswith("```"):
            if start:
                yield Block(start, info, heading, "\n".join(inside))
                start = 0
            else:
                info, start, inside = line[3:].strip(), number + 1, []
        elif start:
            inside.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def blocks_of(info: str) -> list[Block]:
    return [block for block in fenced_blocks(README.read_text()) if block.info == info]


class Step(NamedTuple):
    command: str
    printed: str


def steps_of(block: Block) -> list[Step]:
    steps: list[Step] = []
    command, printed, carries_on = "", [], False
    for line in block.text.split("\n"):
        if carries_on or line.startswith("$ "):
            if not carries_on and command:
                steps.append(Step(command, "\n".join(printed)))
                command, printed = "", []
            command += f"\n{line}" if carries_on else line[2:]
            carries_on = line.endswith("\\") or command.count("'") % 2 == 1
        else:
            printed.append(line)
    assert command, f"README.md, line {block.line}: a console block begins with '$ '"
    return [*steps, Step(command, "\n".join(printed))]


def tables(markdown: str, heading: str) -> list[list[list[str]]]:
    """The tables of a section, each a list of rows (the header left out), each row a list of cells."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", markdown, re.MULTILINE | re.DOTALL)
    assert section, f"README.md has no section {heading!r}"
    found: list[list[list[str]]] = []
    inside = False
    for line in section[1].splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not inside:
            found.append([])
            inside = True
        elif not set(line) <= set("|-: "):
            found[-1].append(cells)
    return found


def table(heading: str) -> list[list[str]]:
    return tables(README.read_text(), heading)[0]


def code(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


# -- the console blocks

ID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b")
LEASE_TOKEN = re.compile(r"\b[0-9a-f]{16}\b")  # one in some 2,000 has no letter
VARIES = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"), "<time>"),
    (re.compile(r"curl/[\d.]+"), "curl/<version>"),
    # The watermark of an idle moment is a record too.
    (re.compile(r"\d+ records, \d+ bytes"), "<number> records, <number> bytes"),
    (re.compile(r"\b(worker|client|admin) [\w-]{43}"), r"\1 <token>"),
)


def comparable(printed: str) -> str:
    for pattern, standing in VARIES:
        printed = pattern.sub(standing, printed)
    return "".join(line.rstrip() for line in printed.splitlines())


class Terminal:
    """A folder with the project in it, a server, and a shell for each command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("jobqueue.py", "worker_pb2_gen", "examples", "proto"):
            (folder / name).symlink_to(ROOT / name)
        self.server = start_server(folder)
        self.ids: dict[str, str] = {}  # as the README has them -> as they are in this run
        programs = folder / "bin"
        programs.mkdir()
        for name in ("python", "python3"):
            (programs / name).symlink_to(sys.executable)
        if grpcurl := find_grpcurl():
            (programs / "grpcurl").symlink_to(grpcurl)
        self._env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "JOBQUEUE_URL": self.server.url}

    def run(self, block: Block) -> list[str]:
        """What each command of the block prints; the last one's is followed by what those in the background print."""
        printed, background = [], []
        for step in steps_of(block):
            command = self._here(step.command)
            if command.endswith("&"):
                background.append(self._start(command[:-1]))
                printed.append("")
            else:
                printed.append(self._there(self._start(command).communicate(timeout=60)[0]))
                self._learn(step.printed, printed[-1])
        printed[-1] = "\n".join([printed[-1], *(self._there(shell.communicate(timeout=60)[0]) for shell in background)])
        return printed

    def expected(self, step: Step) -> str:
        return self._with_ids(step.printed)

    def _start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, env=self._env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def _here(self, command: str) -> str:
        command = self._with_ids(command.partition("  #")[0].rstrip())
        return command.replace(":3000", f":{self.server.port}").replace(":50051", f":{self.server.grpc_port}")

    def _there(self, printed: str) -> str:
        printed = printed.replace(f":{self.server.port}", ":3000").replace(f":{self.server.grpc_port}", ":50051")
        return printed.strip("\n")

    def _with_ids(self, text: str) -> str:
        for pattern in (ID, LEASE_TOKEN):
            text = pattern.sub(lambda match: self.ids.get(match[0], match[0]), text)
        return text

    def _learn(self, expected: str, printed: str) -> None:
        for pattern in (ID, LEASE_TOKEN):
            for theirs, ours in zip(pattern.findall(expected), pattern.findall(printed), strict=False):
                self.ids.setdefault(theirs, ours)


def find_grpcurl() -> str | None:
    beside = Path(sys.executable).parent / "grpcurl"
    return str(beside) if beside.exists() else shutil.which("grpcurl")


def missing_tools(block: Block) -> list[str]:
    """What a block cannot be run without."""
    wanted = [name for name in ("curl", "jq") if re.search(rf"(^|[\s|(]){name}\s", block.text)]
    missing = [name for name in wanted if not shutil.which(name)]
    if "grpcurl" in block.text:
        missing += [] if find_grpcurl() else ["grpcurl"]
        missing += [name for name in ("grpc", "grpc_reflection") if not importlib.util.find_spec(name)]
    return missing


CONSOLE = blocks_of("console") if README.exists() else []


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """All console blocks in order: line -> (what should stand there, what was printed)."""
    terminal = Terminal(tmp_path_factory.mktemp("readme"))
    outcomes: dict[int, Any] = {}
    for block in CONSOLE:
        if missing_tools(block):
            continue
        printed = terminal.run(block)
        outcomes[block.line] = [(step.command, terminal.expected(step), text)
                                for step, text in zip(steps_of(block), printed, strict=True)]
    terminal.server.kill()
    return outcomes


@pytest.mark.parametrize("block", CONSOLE, ids=lambda block: f"{block.heading}, line {block.line}")
def test_the_commands_of_the_readme_print_what_it_says(block: Block, session: dict[int, Any]) -> None:
    before = CONSOLE[: CONSOLE.index(block) + 1]  # what a block prints follows from those before it
    if missing := {tool for earlier in before for tool in missing_tools(earlier)}:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")
    for command, expected, printed in session[block.line]:
        assert comparable(printed) == comparable(expected), f"README.md, after line {block.line}: $ {command}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    """One for the tests that only submit and work, each in a queue of its own."""
    return start_server(tmp_path_factory.mktemp("server"))


# -- the workers: each language's takes jobs of the queue named after it, and answers with the text in capitals

WORKERS = {
    "bash": ("worker.sh", ["bash"]),
    "python": ("worker.py", [sys.executable]),
    "go": ("worker.go", ["go", "run"]),
    "javascript": ("worker.mjs", ["node"]),
}


def named_block(name: str) -> str:
    """The block whose first line names this file."""
    found = [block.text for block in fenced_blocks(README.read_text()) if name in block.text.partition("\n")[0]]
    assert len(found) == 1, f"README.md must have one block that begins with a comment naming {name}"
    return found[0]


@pytest.mark.parametrize("language", WORKERS)
def test_the_worker_in_each_language_works(language: str, server: ServerProcess, tmp_path: Path) -> None:
    name, command = WORKERS[language]
    needed = [command[0], *(["curl", "jq"] if language == "bash" else [])]
    if missing := [tool for tool in needed if not shutil.which(tool)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if language == "javascript" and subprocess.run(["node", "-e", "fetch"], capture_output=True).returncode:
        pytest.skip("this node has no fetch: 18 or newer is needed")
    script = tmp_path / name
    script.write_text(named_block(name).replace("http://localhost:3000", server.url))
    with Running([*command, str(script)], tmp_path, {}):
        for number in range(3):
            answer = call(server.url, "POST", f"/api/submit?queue={language}&wait=60", json={"text": f"job {number}"})
            assert (answer.status, answer.json()["payload"]) == (200, {"text": f"JOB {number}"})
        refused = call(server.url, "POST", f"/api/submit?queue={language}&wait=60&attempts=1", json={"no": "text"})
        assert (refused.status, refused.json()["code"]) == (502, "job_failed"), "what it cannot do, it fails"
        again = call(server.url, "POST", f"/api/submit?queue={language}&wait=60", json={"text": "on"})
        assert again.json()["payload"] == {"text": "ON"}, "and goes on"


def test_the_grpc_worker_works(server: ServerProcess, tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed")
    script = tmp_path / "worker_grpc.py"
    script.write_text(named_block("worker_grpc.py").replace("localhost:50051", f"127.0.0.1:{server.grpc_port}"))
    with Running([sys.executable, str(script)], tmp_path, {"PYTHONPATH": str(ROOT)}):
        answer = call(server.url, "POST", "/api/submit?queue=grpc&wait=60", json={"text": "over gRPC"})
        assert answer.json()["payload"] == {"text": "OVER GRPC"}


def test_any_command_is_a_worker(server: ServerProcess, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobqueue.py"), "work", "--queue", "commands", "--", "tr", "a-z", "A-Z"]
    with Running(command, tmp_path, {"JOBQUEUE_URL": server.url}):
        answer = call(server.url, "POST", "/api/submit?queue=commands&wait=60", b"as it is")
        assert answer.json()["payload"] == "AS IT IS"


class Running:
    """A program that runs until the block is left."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str]) -> None:
        self._log = (folder / "program.log").open("w+")
        self._process = subprocess.Popen(command, cwd=folder, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
                                         stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if error is not None:
            self._log.seek(0)
            error.add_note(f"the program said:\n{self._log.read()}")
        # What it has started (curl in a bash worker) is in its process group, and nothing else is.
        os.killpg(self._process.pid, 9)
        self._process.wait()
        self._log.close()


# -- in a program


def run_program(source: str, folder: Path) -> str:
    script = folder / "program.py"
    script.write_text(source)
    run = subprocess.run([sys.executable, str(script)], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return run.stdout


def test_the_program_with_a_server_inside_runs(tmp_path: Path) -> None:
    assert run_program(named_block("app.py"), tmp_path) == '{"sum":6}\n'


def test_the_embedded_example_runs(tmp_path: Path) -> None:
    printed = run_program((ROOT / "examples" / "embedded.py").read_text(), tmp_path)
    assert "the job was cancelled" in printed
    assert printed.splitlines()[-1] == "stopped"


# -- the reference tables, held against the code in both directions


def shown(value: Any) -> str:
    """A default as the README writes it."""
    if value in (None, ()):
        return "none"
    return "false" if value is False else str(value)


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    written = {code(flag)[0]: (tuple(code(env)), default.replace("`", "").replace(",", ""))
               for flag, env, default, _ in table("Settings")}
    assert written == {setting.flag: (setting.variables, shown(setting.default)) for setting in jobqueue.SETTINGS}


def test_every_route_stands_in_the_readme_with_its_scope_and_parameters() -> None:
    written = {(code(path)[0], method): (scope, set(code(names))) for method, path, scope, names, _ in table("Routes")}
    assert written == {(as_path(route), route.method): (route.scope or "open", set(route.parameters))
                       for route in jobqueue.ROUTES}


def as_path(route: Any) -> str:
    return route.path.replace("{job_id}", "<id>")


def test_every_parameter_stands_in_the_readme() -> None:
    written = [name for cell, _, _ in table("Parameters") for name in code(cell)]
    assert sorted(written) == sorted({name for route in jobqueue.ROUTES for name in route.parameters})


def test_every_error_code_stands_in_the_readme_with_its_statuses() -> None:
    written = {code(name)[0]: (int(status), grpc.strip("`")) for name, status, grpc, _ in table("Errors")}
    assert written == {name: (status, grpc) for name, (status, grpc, _) in jobqueue.ERRORS.items()}


def test_every_metric_stands_in_the_readme_with_its_kind() -> None:
    written = {code(name)[0]: kind for name, kind, _, _ in table("Metrics")}
    assert written == {name: kind for name, (kind, _) in jobqueue.METRICS.items()}


def test_the_labels_of_every_metric_are_those_in_the_readme(server: ServerProcess) -> None:
    call(server.url, "POST", "/api/submit?wait=0", b"x")
    job = call(server.url, "GET", "/api/worker/poll").json()
    call(server.url, "POST", f"/api/worker/complete/{job['job_id']}")
    seen: dict[str, set[str]] = {}
    for line in call(server.url, "GET", "/metrics").body.decode().splitlines():
        if match := re.match(r"(\w+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? ", line):
            seen.setdefault(match[1], set()).update(set(re.findall(r'(\w+)="', match[2] or "")) - {"le"})
    written = {code(name)[0]: set(code(labels)) for name, _, labels, _ in table("Metrics")}
    assert {name: labels for name, labels in written.items() if name in seen} == seen
    assert written.keys() - seen.keys() <= {"jobqueue_grpc_request_duration_seconds"}, "not seen without a gRPC call"


def test_every_command_stands_in_the_readme_with_its_flags() -> None:
    written = {code(name)[0]: set(re.findall(r"--[a-z-]+", flags)) for name, flags, _ in table("Commands")}
    assert written == {name: flags_of(command) for name, command in jobqueue.COMMANDS.items()}


def flags_of(command: Any) -> set[str]:
    """The command's own flags: those of the settings and those that every client command has are left out."""
    if command is jobqueue.COMMANDS["serve"]:
        return set()
    parser = argparse.ArgumentParser()
    command.flags(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    return flags - {"--help", "--url", "--token", "--ca", "--cert", "--key-file", "--json"}


def test_every_exit_code_stands_in_the_readme() -> None:
    written = {int(code(cell)[0]) for cell, _ in table("Exit codes")}
    assert written == {value for name, value in vars(jobqueue).items() if name.startswith("EXIT_")} | {130}


def test_every_grpc_method_stands_in_the_readme_with_its_route() -> None:
    worker_pb2 = pytest.importorskip("worker_pb2_gen.worker_pb2", reason="protobuf is not installed")
    methods = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].methods
    written = {code(name)[0]: (code(request)[0], code(answer)[0]) for name, request, answer, _ in table("gRPC methods")}
    assert written == {method.name: (method.input_type.name, method.output_type.name) for method in methods}
    routes = {f"{route.method} {as_path(route)}" for route in jobqueue.ROUTES}
    for name, _, _, route in table("gRPC methods"):
        assert code(route)[0].partition("?")[0] in routes, name


def test_every_state_stands_in_the_readme() -> None:
    assert [code(cell)[0] for cell, _ in table("The life of a job")] == list(jobqueue.STATES)


# -- the table of who may do what: each cell is tried with every route of its row

ACCESS_ROWS = (None, "client", "worker", "admin", "grpc")
NOBODY, SITE, NETWORK = {}, {"Origin": "http://elsewhere.example", "Sec-Fetch-Site": "cross-site"}, "network"
ACCESS_COLUMNS = ("open", "nobody", "client", "worker", "admin", "site", NETWORK)


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory, server: ServerProcess) -> dict[str, Any]:
    """Column of the access table -> the server to call and the headers to send."""
    folder = tmp_path_factory.mktemp("guarded")
    tokens = folder / "tokens"
    tokens.touch(0o600)
    scopes = ("client", "worker", "admin")
    tokens.write_text("".join(f"{scope} the-{scope}-token\n" for scope in scopes))
    guarded = start_server(folder, "--tokens", str(tokens))
    bearers = {scope: (guarded, {"Authorization": f"Bearer the-{scope}-token"}) for scope in scopes}
    return {"open": (server, NOBODY), "nobody": (guarded, NOBODY), **bearers, "site": (server, SITE)}


def access_cells() -> list[tuple[str | None, str, str]]:
    rows = table("Access")
    assert len(rows) == len(ACCESS_ROWS)
    return [(scope, column, cell) for scope, (_, *cells) in zip(ACCESS_ROWS, rows, strict=True)
            for column, cell in zip(ACCESS_COLUMNS, cells, strict=True)]


@pytest.mark.parametrize("scope, column, cell", access_cells() if README.exists() else [])
def test_each_cell_of_the_access_table_holds(scope: str | None, column: str, cell: str, doors: dict[str, Any]) -> None:
    if column == NETWORK:
        # Another address of this machine is reached as little as one of another machine.
        for port in (doors["open"][0].port, doors["open"][0].grpc_port):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), 5).close()
        assert "with a wider `--host`" in cell
    elif scope == "grpc":
        assert grpc_answers(*doors[column]) == (cell == "yes")
    else:
        for route in jobqueue.ROUTES:
            if route.scope == scope:
                check_door(route, cell, *doors[column])


def check_door(route: Any, cell: str, server: ServerProcess, headers: dict[str, str]) -> None:
    path = route.path.replace("{job_id}", "no-such-job") + ("?wait=0" if route.handler == "submit" else "")
    answer = call(server.url, route.method, path, headers=headers)
    name = f"{route.method} {route.path}: {answer}"
    if cell == "cannot read the answer":
        assert not any(header.startswith("access-control-") for header in answer.headers), name
    elif cell == "yes":
        assert answer.status < 500 and answer.status not in (401, 403), name
    else:
        assert answer.status == int(cell), name


def grpc_answers(server: ServerProcess, headers: dict[str, str]) -> bool:
    """Is the health service there for this caller? A browser's page can only speak HTTP/1.1 to it, in vain."""
    if headers is SITE:
        try:
            url = f"http://127.0.0.1:{server.grpc_port}"
            return call(url, "POST", "/grpc.health.v1.Health/Check", headers=headers).status == 200
        except (OSError, http.client.HTTPException):
            return False
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    health = pytest.importorskip("grpc_health.v1.health_pb2", reason="grpcio-health-checking is not installed")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        method = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health.HealthCheckRequest.SerializeToString,
            response_deserializer=health.HealthCheckResponse.FromString,
        )
        metadata = [(name.lower(), value) for name, value in headers.items()]
        return method(health.HealthCheckRequest(), metadata=metadata, timeout=10).status == 1


@pytest.mark.parametrize("column", ["open", "nobody", "client", "worker", "admin"])
def test_the_worker_service_over_grpc_lets_in_who_may_poll_over_http(column: str, doors: dict[str, Any]) -> None:
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    from worker_pb2_gen import worker_pb2

    cell = next(cell for scope, name, cell in access_cells() if (scope, name) == ("worker", column))
    expected = {"401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED"}.get(cell)
    server, headers = doors[column]
    metadata = [(name.lower(), value) for name, value in headers.items()]
    for method in worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].methods:
        try:
            request = getattr(worker_pb2, method.input_type.name)()
            getattr(grpc_stub(server), method.name)(request, metadata=metadata, timeout=10)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
        refused = code in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        assert code == expected or not (expected or refused), method.name


def test_a_wider_host_without_tokens_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(DidNotStart) as refused:
        start_server(tmp_path, "--host", "0.0.0.0")
    assert refused.value.code == jobqueue.EXIT_USAGE
    assert "--tokens" in refused.value.log and "--insecure" in refused.value.log


# -- links, versions, deploy files


def anchors(markdown: str) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    inside, found = False, set()
    for line in markdown.splitlines():
        inside ^= line.startswith("```")
        if not inside and (heading := re.match(r"#+ (.*)", line)):
            found.add(re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [README, CHANGELOG], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    markdown = page.read_text()
    prose = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|srcset|href)="([^"]+)"', prose)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(there.read_text()), f"{page.name} links to {target}; there is no such heading"


def test_no_figure_is_left_open() -> None:
    left = [number for number, line in enumerate(README.read_text().splitlines(), 1) if "TODO" in line]
    assert left == [], f"README.md has figures to be measured, in lines {left}"


def test_the_changelog_begins_with_this_version() -> None:
    assert re.search(r"^## \[?([\d.]+)", CHANGELOG.read_text(), re.MULTILINE)[1] == jobqueue.__version__


def metrics_named(text: str) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bjobqueue_\w+", text)}


@pytest.mark.parametrize("name", ["prometheus-alerts.yml", "grafana-dashboard.json"])
def test_alerts_and_dashboard_name_metrics_that_exist(name: str) -> None:
    named = metrics_named((ROOT / "examples" / name).read_text())
    assert named
    assert named <= jobqueue.METRICS.keys()


def test_the_grafana_dashboard_is_whole() -> None:
    dashboard = json.loads((ROOT / "examples" / "grafana-dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(target["expr"] for panel in panels for target in panel["targets"])


def flags_named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text))


def test_the_systemd_unit_starts_the_server_as_it_wants_to_be_started() -> None:
    unit = (ROOT / "examples" / "jobqueue.service").read_text()
    line = re.search(r"^ExecStart=(.*(?:\\\n.*)*)", unit, re.MULTILINE)[1]
    assert flags_named(line) <= {setting.flag for setting in jobqueue.SETTINGS}
    assert re.search(r"^Type=notify$", unit, re.MULTILINE)
    drain = next(setting.default for setting in jobqueue.SETTINGS if setting.name == "drain")
    assert int(re.search(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)[1]) > drain, "or the drain is cut short"
    prevented = set(map(int, re.search(r"^RestartPreventExitStatus=(.*)", unit, re.MULTILINE)[1].split()))
    assert prevented == {jobqueue.EXIT_USAGE, jobqueue.EXIT_DATA}, "what a restart does not mend"


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "jobqueue.service"
    text = (ROOT / "examples" / "jobqueue.service").read_text()
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert "jobqueue.service" not in run.stdout + run.stderr, run.stdout + run.stderr


def test_readiness_is_told_to_systemd(tmp_path: Path, process: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(10)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        server: ServerProcess = process("--grpc-port", "off", env=env)
        assert told.recv(100) == b"READY=1"
        assert told.recv(100) == b"WATCHDOG=1"
        server.terminate()
        assert wait_until(lambda: told.recv(100) == b"STOPPING=1")
        assert server.wait() == 0


def test_the_dockerfile_copies_what_is_there_and_starts_the_server() -> None:
    dockerfile = (ROOT / "examples" / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    command = json.loads(re.search(r"^ENTRYPOINT (\[.*?\])$", dockerfile, re.MULTILINE)[1])
    assert flags_named(" ".join(command)) <= {setting.flag for setting in jobqueue.SETTINGS}
    assert re.search(r"^USER [1-9]", dockerfile, re.MULTILINE), "not as root"


def test_the_dockerfiles_health_check_tells_a_ready_server_from_none(process: Any) -> None:
    dockerfile = (ROOT / "examples" / "Dockerfile").read_text()
    health_check = re.search(r"^HEALTHCHECK .*?CMD (\[.*?\])$", dockerfile, re.MULTILINE | re.DOTALL)
    _, option, source = json.loads(health_check[1])
    server = process("--grpc-port", "off")
    check = [sys.executable, option, source.replace(":3000", f":{server.port}")]
    assert subprocess.run(check, capture_output=True).returncode == 0
    server.stop()
    assert subprocess.run(check, capture_output=True).returncode == 1


# -- writing what is printed into the README


def wrapped(printed: str) -> str:
    """Long lines in pieces, none of which begins or ends with a space: comparable() joins them again."""
    pieces = []
    for line in printed.splitlines():
        while len(line) > WIDTH:
            places = [at for at in range(WIDTH, WIDTH // 2, -1) if " " not in line[at - 1 : at + 1]]
            cut = next((at for at in places if line[at - 1] == ","), places[0])
            pieces.append(line[:cut])
            line = line[cut:]
        pieces.append(line)
    return "\n".join(pieces)


def write() -> None:
    """Run the blocks; where one prints something else than stands there, put that in. What holds stays as it is."""
    markdown = README.read_text()
    changed: dict[str, str] = {}  # ids: as they stood in blocks that are written anew -> as they stand there now
    kept: dict[str, str] = {}  # as they are in this run -> as they stand in blocks that hold
    with tempfile.TemporaryDirectory() as folder:
        terminal = Terminal(Path(folder))
        for block in blocks_of("console"):
            known = set(terminal.ids)
            pairs = list(zip(steps_of(block), terminal.run(block), strict=True))
            learnt = {theirs: ours for theirs, ours in terminal.ids.items() if theirs not in known}
            if all(comparable(terminal.expected(step)) == comparable(printed) for step, printed in pairs):
                kept.update({ours: theirs for theirs, ours in learnt.items()})
                continue
            changed.update(learnt)
            lines = [part for step, printed in pairs for part in (f"$ {step.command}", wrapped(printed))]
            text = "\n".join(filter(None, lines))
            for ours, theirs in kept.items():
                text = text.replace(ours, theirs)
            markdown = markdown.replace(f"```console\n{block.text}\n```", f"```console\n{text}\n```")
            print(f"README.md, line {block.line}: written")
        terminal.server.kill()
    for theirs, ours in changed.items():
        markdown = markdown.replace(theirs, ours)
    README.write_text(markdown)


if __name__ == "__main__":
    write()
