"""Fixtures for all tests: `server` runs in this process, with a clock to move; `process` starts real ones."""

from __future__ import annotations

import contextlib
import os
import py_compile
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# gRPC's C core complains about every subprocess that a test starts unless it is told before it loads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

import jobqueue  # noqa: E402
from support import LONG, FakeClock, ServerProcess, close_channels, end_servers, start_server, started  # noqa: E402

# Disk and sockets make times uneven, which says nothing about the code. A failure prints what reproduces it.
hypothesis.settings.register_profile(
    "jobqueue",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("jobqueue")

HOUR = 3600


def pytest_configure(config: pytest.Config) -> None:
    # As many files as may be open, as for a server from the command line: with fewer, one in a program warns.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Once for all who import the module, also where PYTHONDONTWRITEBYTECODE keeps them from doing it themselves.
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(OSError):  # a folder that is not ours
            py_compile.compile(jobqueue.__file__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("long"):
            continue
        if not LONG:
            item.add_marker(pytest.mark.skip(reason="a heavy figure: make test-long"))
        elif not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(HOUR))


@pytest.fixture(autouse=True)
def _leave_nothing_running() -> Iterator[None]:
    """Every process that a test started ends with it; those of a wider fixture, started before, stay."""
    before = started()
    yield
    close_channels()
    end_servers(keep=before)


@pytest.fixture(autouse=True)
def _leave_signals_as_they_were() -> Iterator[None]:
    """A `serve` in this process whose start fails has set its handlers: Ctrl-C and SIGTERM are for the tests again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if any(signal.getsignal(number) is not handler for number, handler in before.items()):
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    """A command in this process has its log go to the standard error of its test, and no further."""
    handlers, level, propagate = jobqueue.log.handlers[:], jobqueue.log.level, jobqueue.log.propagate
    yield
    jobqueue.log.handlers[:], jobqueue.log.propagate = handlers, propagate
    jobqueue.log.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _leave_nothing_running_at_all() -> Iterator[None]:
    yield
    end_servers()


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., ServerProcess]:
    """process(*flags, env=..., python=..., wrapper=...): a server process; again: a restart on its data."""

    def start(*flags: str, **options: Any) -> ServerProcess:
        return start_server(tmp_path, *flags, **options)

    return start


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def server(tmp_path: Path, clock: FakeClock) -> Iterator[jobqueue.Server]:
    """A server in this process, over both wires, with `server.clock` to move."""
    with jobqueue.Server(data_dir=tmp_path / "data", port=0, grpc_port=0, clock=clock) as running:
        running.clock = clock
        try:
            yield running
        finally:
            # Without a drain: its seconds would be this clock's, which stands still.
            running.stop(drain=0)


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Certificates of a CA made for this run; see certs.py."""
    make_certs = pytest.importorskip("certs", reason="trustme is not installed").make_certs
    return make_certs(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def seed() -> int:
    """A seed for random.Random, printed when the test fails; JOBQUEUE_SEED=N runs it again."""
    number = int(os.environ.get("JOBQUEUE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"JOBQUEUE_SEED={number}")
    return number
