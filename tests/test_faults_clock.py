"""The wall clock jumps by a month, forwards or backwards, while the server runs or while it is down.

A preloaded shim moves the wall clock of the server's process; the monotonic clock is left alone.
"""

import datetime
import struct
import threading
import time

import pytest

from rigs import WALL_CLOCK, QuickStarts, build_shim, needs
from support import call, wait_until

MONTH = 30 * 86400
SHORT = 4  # seconds: a slow machine is to have looked at what is not over yet before it is
SLACK = 5  # seconds that a loaded machine may add; a jump that is noticed changes days

pytestmark = [needs("gcc"), pytest.mark.parametrize("jump", [MONTH, -MONTH], ids=["forwards", "backwards"])]


class WallClock:
    """The wall clock of the servers."""

    def __init__(self, tmp_path):
        self.file = tmp_path / "offset"
        self.set(0)
        self.env = {
            "LD_PRELOAD": str(build_shim(tmp_path, "wall_clock", WALL_CLOCK)),
            "WALL_CLOCK_OFFSET": str(self.file),
        }

    def set(self, seconds):
        """Be so many seconds ahead of the true time, from this moment on."""
        with open(self.file, "r+b" if self.file.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))


@pytest.fixture
def wall_clock(tmp_path):
    return WallClock(tmp_path)


@pytest.fixture
def starts(tmp_path, wall_clock):
    with QuickStarts(tmp_path, env=wall_clock.env) as quick:
        yield quick


def submit(server, query):
    """Submit; return the id."""
    answer = call(server.url, "POST", f"/api/submit?wait=0&{query}", b"x")
    assert answer.status == 202, answer
    return answer.json()["job_id"]


def poll(server, query):
    """Poll; return (the job or None, how many seconds it took)."""
    began = time.monotonic()
    answer = call(server.url, "GET", f"/api/worker/poll?{query}")
    return (answer.json() if answer.status == 200 else None), time.monotonic() - began


def complete(server, job):
    """Hand in a result; return the status."""
    path = f"/api/worker/complete/{job['job_id']}?lease_token={job['lease_token']}"
    return call(server.url, "POST", path, b"done").status


def status(server, job_id):
    """Return a job's status."""
    return call(server.url, "GET", f"/api/jobs/{job_id}").json()["status"]


def test_the_shim_moves_the_wall_clock(starts, wall_clock, jump):
    """The negative control: without it, nothing here would prove anything."""
    server = starts.start()
    wall_clock.set(jump)
    job = call(server.url, "GET", f"/api/jobs/{submit(server, 'delay=0')}").json()
    created = datetime.datetime.fromisoformat(job["created_at"]).timestamp()
    assert created - time.time() == pytest.approx(jump, abs=60)


def test_leases_delays_ttls_and_waits_do_not_notice_a_jump(starts, wall_clock, jump):
    server = starts.start()
    began = time.monotonic()
    for _ in range(2):
        submit(server, "queue=held")
    long, short = (poll(server, f"queue=held&lease={lease}")[0] for lease in (60, SHORT))
    delayed = submit(server, f"queue=delayed&delay={SHORT}")
    lasting, passing = (submit(server, f"queue=ttl-{ttl}&ttl={ttl}") for ttl in (60, SHORT))
    waits = {}

    def wait(name, *request):
        start = time.monotonic()
        answer = call(server.url, *request)
        waits[name] = (answer.status, time.monotonic() - start)

    waiting = [
        threading.Thread(target=wait, args=request)
        for request in (
            ("long poll", "GET", "/api/worker/poll?queue=empty&wait=1"),
            ("client", "POST", "/api/submit?queue=w&wait=1", b"x"),
            ("status", "GET", f"/api/jobs/{lasting}?wait=1"),
        )
    ]
    for thread in waiting:
        thread.start()
    wait_until(
        lambda: call(server.url, "GET", "/api/admin/stats").json()["pending"] >= 3, what="the client's job"
    )
    wall_clock.set(jump)

    # At once: nothing is over that was not.
    assert poll(server, "queue=held")[0] is None, "a lease in force was lost"
    assert poll(server, "queue=delayed")[0] is None, "a delay was cut short"
    assert status(server, lasting) == "pending", "a ttl was cut short"
    assert complete(server, long) == 200

    # In their own time: all is over that should be.
    again, _ = poll(server, "queue=held&wait=10")
    assert again["job_id"] == short["job_id"], "a lease did not end"
    assert SHORT - 0.1 < time.monotonic() - began < SHORT + SLACK
    assert poll(server, "queue=delayed&wait=10")[0]["job_id"] == delayed, "a delay did not end"
    assert time.monotonic() - began < SHORT + SLACK
    wait_until(lambda: status(server, passing) == "expired", SHORT + SLACK, "a ttl to end")
    assert poll(server, "queue=ttl-60")[0]["job_id"] == lasting
    for thread in waiting:
        thread.join(10)
    assert {name: code for name, (code, _) in waits.items()} == {
        "long poll": 204,
        "client": 202,
        "status": 200,
    }
    assert all(0.9 < seconds < 1 + SLACK for _, seconds in waits.values()), waits


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_clock_set_while_the_server_is_down_makes_nobody_wait_longer(starts, wall_clock, jump, end):
    server = starts.start("--drain", "0")
    delayed = submit(server, "queue=delayed&delay=1")
    submit(server, "queue=held")
    held, _ = poll(server, "queue=held&lease=2")
    getattr(server, end)()
    wall_clock.set(jump)
    server = starts.start()
    began = time.monotonic()
    assert poll(server, "queue=held")[0] is None, "a lease in force is re-armed in full"
    job, _ = poll(server, "queue=delayed&wait=10")
    assert job["job_id"] == delayed
    assert time.monotonic() - began < 1 + SLACK, "no longer than its own delay"
    assert complete(server, held) == 200, "its token is good"
