"""Disks that are full, and disks that fail: nothing acknowledged is lost, nothing refused ever runs."""

import contextlib
import os
import random
import re
import resource
import signal
import socket
import threading

import pytest

from checker import Cut, History, Load, Wire, check, clear, new_payload
from rigs import (
    COMPACT,
    FIGURES,
    LONG,
    WRITE_IN_PIECES,
    QuickStarts,
    build_shim,
    grow,
    needs,
    needs_root,
    our_files,
    traced,
)
from support import wait_until

CYCLES = 100 if LONG else 10
RESERVE = 1 << 20
PROMPT = {"one": 4, "chain": 3, "batch": 4, "repeat": 2, "fail": 0.5, "fail_for_good": 0.3, "release": 0.6}
STOPPED_BY_THE_DISK = 74

pytestmark = FIGURES


class Client:
    """Calls by the test itself, recorded like those of the load."""

    def __init__(self, load, server):
        self.load, self.rng = load, random.Random(f"{load.seed}-client")
        self.wire = Wire(server.port)

    def submit(self, query="&wait=0"):
        """Submit something new; return the call."""
        return self.load.submit(self.wire, query, new_payload(self.rng, self.load.seed))

    def hold(self, query="&queue=held"):
        """Submit in a thread and wait there for the result; return (thread, the list that gets the call)."""
        calls, client = [], Client(self.load, self.wire)

        def wait():
            with contextlib.suppress(Cut):
                calls.append(client.submit(query))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread, calls

    def poll(self, query, limit=32):
        """Return the jobs of one poll, leased for a minute."""
        call = self.load.poll_call(self.wire, f"max={limit}&{query}", lease=60)
        assert call.status == 200, call
        return list(call.jobs)

    def complete(self, job):
        """Hand in a result; return the call."""
        return self.load.complete(self.wire, job)

    def refused(self):
        """True once a submit is refused for want of space. It does not fit the rest of a file's last page."""
        payload = new_payload(self.rng, self.load.seed, pad=8192)
        call = self.load.submit(self.wire, "&wait=0", payload)
        assert call.status in (202, 507), call
        assert call.status == 202 or call.answer["code"] == "disk_full", call
        return call.status == 507

    def accepted(self):
        """True once submits are accepted again."""
        return not self.refused()


# == Full ====================================================================================================


@contextlib.contextmanager
def full(folder):
    """Another program takes all the space there is, in a moment; at the end it cleans up."""
    filler = folder / "filler"
    with open(filler, "wb") as file:
        end, size = 0, 1 << 24
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), end, size)
                end += size
            except OSError:
                size //= 2
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def small_disk(tmp_path, size):
    """Give (starts, where the servers see the disk, where this process sees it)."""
    mount_point = tmp_path / "mount"
    mount_point.mkdir()
    with QuickStarts(tmp_path, private_mounts=True) as starts:
        starts.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount_point)
        yield starts, mount_point / "data", starts.path(mount_point)


def has_reserve(folder):
    """True once the space for completions is set aside (again)."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "data" / "reserve").stat().st_blocks * 512 >= RESERVE
    return False


@needs("mount", "nsenter")
@needs_root()
def test_a_full_disk_refuses_submits_takes_completions_and_is_used_again_by_itself(tmp_path, seed):
    with small_disk(tmp_path, "8m") as (starts, data, folder):
        flags = ("--reserve", str(RESERVE), "--compact-bytes", "100000")
        server = starts.start(*flags, data_dir=data)
        load, refusals = Load(History(), seed, clients=2, workers=2, worker_acts=PROMPT), 0
        for _ in range(CYCLES):
            wait_until(lambda: has_reserve(folder), what="the reserve to be there")
            one_cycle(load, server, folder)
            load.drain(server.port)
            refusals += sum(call.status == 507 for call in load.history.of("submit"))
            check(load.history, server.port)
            load.history.calls = [clear(load.history, server.port)]
        print(f"{CYCLES} times full, {refusals} submits refused")
        server.kill()
        server = starts.start(*flags, data_dir=data)
        check(load.history, server.port)


def one_cycle(load, server, folder):
    """Fill the disk while a client waits and a worker works, load it, and free it.

    The load begins when it is full: a program that is still writing could take the reserve as well.
    """
    client = Client(load, server)
    held, answer = client.hold()
    wait_until(lambda: client.wire.request("GET", "/api/admin/stats")[1]["waiting_clients"], what="a client to be held")
    ids = {client.submit("&wait=0&queue=held").answer["job_id"] for _ in range(20)}
    for _ in range(50):
        client.submit()
    jobs = client.poll("queue=held&wait=5", limit=2)
    assert jobs
    with full(folder):
        wait_until(client.refused, what="a submit to be refused")
        compacted = server.log().count("compacted ")

        def still_full():
            """Where jobs come to their end, a compaction may find room, and give some back."""
            refused = all(client.refused() for _ in range(3))
            return refused or server.log().count("compacted ") > compacted

        load.start(server.port)
        assert still_full(), "space came back from nowhere"
        while more := client.poll("queue=held"):
            jobs += more
        assert ids <= {job["job_id"] for job in jobs}, "polls go on where the disk is full"
        for job in jobs:
            assert client.complete(job).status == 200, "completions go on where the disk is full"
        held.join(10)
        assert answer[0].status == 200, "a held client gets its result where the disk is full"
        assert still_full(), "space came back from nowhere"
    wait_until(client.accepted, what="service to resume by itself")
    load.stop()


@needs("mount", "nsenter")
@needs_root()
def test_a_restart_on_a_full_disk_loses_nothing(tmp_path, seed):
    with small_disk(tmp_path, "8m") as (starts, data, folder):
        flags = ("--reserve", str(RESERVE))
        server = starts.start(*flags, data_dir=data)
        load = Load(History(), seed)
        client = Client(load, server)
        for _ in range(100):
            client.submit()
        with full(folder):
            wait_until(client.refused, what="a submit to be refused")
            server.kill()
            server = starts.start(*flags, data_dir=data)
            check(load.history, server.port, drained=False)
            client = Client(load, server)
            for job in client.poll(""):
                assert client.complete(job).status == 200, "completions go on where the disk is full"
            wait_until(client.refused, what="a submit to be refused")
        wait_until(client.accepted, what="service to resume by itself")
        load.drain(server.port)
        check(load.history, server.port)


@needs("mount", "nsenter")
@needs_root()
def test_a_disk_that_the_journal_itself_filled_is_freed_by_a_compaction(tmp_path, seed):
    with small_disk(tmp_path, "6m") as (starts, data, _):
        server = starts.start("--reserve", str(RESERVE), "--keep-jobs", "5", data_dir=data)  # compacts from 64 MiB on
        load = Load(History(), seed)
        client = Client(load, server)
        payload = b"x" * 100_000
        for number in range(150):  # 30 MB in all
            call = load.submit(client.wire, "&wait=0", b"%d %b" % (number, payload))
            if call.status == 507:
                wait_until(client.accepted, what="the compaction to make room")
            for job in client.poll(""):
                assert client.complete(job).status == 200
        assert "compacted " in server.log()
        server.kill()
        server = starts.start("--reserve", str(RESERVE), data_dir=data)
        assert Wire(server.port).request("GET", "/health")[0] == 200


@needs("mount", "nsenter")
@needs_root()
def test_a_server_that_was_killed_on_a_full_disk_starts_where_most_of_the_disk_is_its_own_jobs(tmp_path, seed):
    with small_disk(tmp_path, "8m") as (starts, data, folder):
        server = starts.start("--reserve", str(RESERVE), data_dir=data)
        load = Load(History(), seed)
        client = Client(load, server)
        while load.submit(client.wire, "&wait=0", new_payload(client.rng, seed, pad=100_000)).status == 202:
            pass
        assert (folder / "data" / "journal.jsonl").stat().st_size > 5_000_000
        for _ in range(2):
            server.kill()
            server = starts.start("--reserve", str(RESERVE), data_dir=data)
            check(load.history, server.port, drained=False)


@needs("mount", "nsenter")
@needs_root()
def test_leases_leave_room_for_the_results_of_what_is_in_progress(tmp_path, seed):
    with small_disk(tmp_path, "6m") as (starts, data, folder):
        server = starts.start("--reserve", str(RESERVE), data_dir=data)
        load = Load(History(), seed)
        client = Client(load, server)
        lines = b"".join(b'"%s-%d"\n' % (str(seed).encode(), number) for number in range(10_000))
        status, _ = client.wire.request("POST", "/api/jobs", lines, {"Content-Type": "application/x-ndjson"})[:2]
        assert status == 202
        with full(folder):
            jobs, status = [], 200
            while status == 200:
                status, answer = client.wire.request("GET", "/api/worker/poll?max=500&lease=600")[:2]
                jobs += answer["jobs"] if status == 200 else []
            assert status == 507 and len(jobs) > 500
            for job in jobs:
                path = f"/api/worker/complete/{job['job_id']}?lease_token={job['lease_token']}"
                status = client.wire.request("POST", path, b"1")[0]
                assert status == 200, "what is in progress can be completed"


@needs("mount", "nsenter")
@needs_root()
def test_clients_that_try_again_do_not_take_the_room_that_a_compaction_needs(tmp_path, seed):
    with small_disk(tmp_path, "8m") as (starts, data, folder):
        server = starts.start("--reserve", str(RESERVE), data_dir=data)
        load = Load(History(), seed)
        client = Client(load, server)
        for number in range(30):
            load.submit(client.wire, "&wait=0", b"%d %b" % (number, b"x" * 100_000))
        clear(load.history, server.port)
        lines = b"".join(b'"%d %b"\n' % (number, b"y" * 1000) for number in range(600))
        status, _ = client.wire.request("POST", "/api/jobs", lines, {"Content-Type": "application/x-ndjson"})
        assert status == 202
        stop = threading.Event()

        def try_again():
            wire = Wire(server.port)
            while not stop.is_set():
                wire.request("POST", "/api/submit?wait=0&queue=again", b"z" * 20_000)

        clients = [threading.Thread(target=try_again) for _ in range(3)]
        with full(folder):
            for thread in clients:
                thread.start()
            try:
                wait_until(lambda: "compacted " in server.log(), what="the compaction to find its room")
            finally:
                stop.set()
                for thread in clients:
                    thread.join()
            assert (folder / "data" / "journal.jsonl").stat().st_size < 3_000_000
            assert "compaction_failed" not in server.log()
        assert Wire(server.port).request("GET", "/api/admin/stats")[1]["queues"]["default"]["pending"] == 600


# == Short and failed writes =================================================================================

# Where no write at all can succeed, a reserve does not help.
MAY_BE_REFUSED = {("complete", 507), ("poll", 507)}
# And clients that waited for a result would wait until the disk is mended.
NOT_HELD = {"async": 5, "batch": 2, "cancel": 1, "key_async": 2}


def limit_file_size(server, size):
    """From now on no file of the server may grow beyond `size` (None: no limit). Gives real short writes."""
    limit = resource.RLIM_INFINITY if size is None else size
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def goes_on_and_lost_nothing(starts, server, load):
    """With the fault gone, service resumes by itself; and all is there, also after a restart."""
    wait_until(Client(load, server).accepted, what="service to resume by itself")
    load.drain(server.port)
    check(load.history, server.port, may=MAY_BE_REFUSED)
    server.kill()
    server = starts.start()
    assert not list((starts.tmp_path / "data").glob("*.torn-*")), "what was refused was not cut off at once"
    check(load.history, server.port, may=MAY_BE_REFUSED)


def refusals(load):
    """How many submits were refused."""
    return sum(call.status == 507 for call in load.history.of("submit"))


@pytest.mark.parametrize("room", [0, 1, 150, 4096])
def test_a_short_write_is_cut_back_and_not_acknowledged(tmp_path, seed, room):
    journal = tmp_path / "data" / "journal.jsonl"
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed, clients=2, workers=2, client_acts=NOT_HELD)
        client = Client(load, server)
        client.submit()
        limit_file_size(server, journal.stat().st_size + room)
        wait_until(client.refused, what="a submit to be refused")
        assert journal.read_bytes().endswith(b"\n"), "the half that was written is cut off"
        load.start(server.port)
        wait_until(lambda: refusals(load) >= 20, what="submits to be refused")
        limit_file_size(server, None)
        seen = len(load.history.calls)
        wait_until(lambda: len(load.history.calls) > seen + 100, what="the load to go on")
        load.stop()
        goes_on_and_lost_nothing(starts, server, load)


@needs("strace")
@pytest.mark.parametrize(
    "fault",
    [
        "error=ENOSPC",
        "error=EIO",
        "error=EFBIG",
        "error=EROFS",
        "error=EDQUOT",
        "retval=0",
        "error=ENOSPC:when=2+3",
        "error=ENOSPC:when=3+4",
    ],
)
def test_a_failed_write_is_not_acknowledged_and_service_resumes(tmp_path, seed, fault):
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed, clients=2, workers=2, client_acts=NOT_HELD)
        journal = tmp_path / "data" / "journal.jsonl"
        Client(load, server).submit()
        with traced(server, f"write,writev,pwrite64:{fault}", paths=[journal]):
            load.start(server.port)
            wait_until(lambda: refusals(load) >= 5, what="submits to be refused")
            load.stop()
        goes_on_and_lost_nothing(starts, server, load)


# == A slow disk =============================================================================================

SLOW = 0.4  # seconds that each sync takes


@needs("strace")
def test_an_acknowledgement_waits_for_a_slow_disk_and_a_hand_over_does_not(tmp_path, seed):
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed)
        client = Client(load, server)
        kept = [client.submit().answer["job_id"] for _ in range(6)]
        delay = f"fdatasync,fsync:delay_exit={SLOW * 1e6:.0f}"
        with traced(server, delay, paths=our_files(tmp_path / "data")):
            submit = client.submit("&wait=0&queue=new")
            jobs = [job for _ in range(4) for job in client.poll("", limit=1) + client.poll("queue=none")]
            complete, fail = client.complete(jobs[0]), load.verb(client.wire, "fail", jobs[1])
            cancel = load.cancel(client.wire, kept[4])
            cleared = clear(load.history, server.port)
        for call in (submit, complete, fail, cancel, cleared):
            assert call.ok, call
            assert call.ended - call.started >= SLOW, f"acknowledged before it was synced: {call}"
        # A busy machine may take as long over one of them. Did they wait for the disk, not one would be quicker.
        for polls in ([poll for poll in load.history.of("poll") if bool(poll.jobs) == some] for some in (True, False)):
            took = [poll.ended - poll.started for poll in polls]
            assert len(took) == 4 and min(took) < SLOW, f"hand-overs waited for the disk: {took}"
        check(load.history, server.port)


def synced_all_it_wrote(trace):
    """True where the last thing that the starting thread did to a file, and that has come to its end, is a sync and no
    write.

    The committing thread is another one: it writes on its own when nothing has happened for a while.
    """
    pid = re.search(r"^\[pid +(\d+)\] openat\(", trace, re.M)[1]
    calls = re.findall(rf"^(?:\[pid +{pid}\] )?(?:<\.\.\. )?(write|fsync|fdatasync)\b.*\) += \d+\b", trace, re.M)
    return bool(calls) and calls[-1] != "write"


@needs("strace")
def test_a_start_after_a_crash_syncs_what_it_found_and_only_then_listens(tmp_path, seed):
    """Who is let in earlier may be told of a job, or of a result, that the disk has not got."""
    data = tmp_path / "data"
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed)
        client = Client(load, server)
        for _ in range(10):
            client.submit()
        server.kill()
        port, tries = server.port, []
        server = starts.start("--port", str(port), stopped=True)
        delay = f"fdatasync,fsync:delay_enter={SLOW * 1e6:.0f}"  # the trace tells of a sync when that is over
        with traced(server, delay, paths=[data / "journal.jsonl"]) as trace:

            def let_in():
                """Try to connect; the trace is read afterwards, and so tells no more than was so by then."""
                try:
                    socket.create_connection(("127.0.0.1", port), 10).close()
                except ConnectionRefusedError:
                    tries.append(trace.text())
                    return False
                return True

            assert not let_in()
            server.go()
            wait_until(let_in, 30, "the server to listen")
            so_far = trace.text()
            assert synced_all_it_wrote(so_far), f"it listened before it had synced:\n{so_far}"
            server.wait_ready()
        # Between the syncs, and while they took their time, somebody did try.
        assert len({text.count("(DELAYED)") for text in tries}) > 1, "no sync was waited for"
        check(load.history, server.port, drained=False)


# == A disk that fails for good ==============================================================================


def stopped_by_the_disk(server):
    """The server must end, with its own exit code and one line that says why and what to do."""
    assert server.wait() == STOPPED_BY_THE_DISK, server.log()
    last_words = [line for line in server.log().splitlines() if re.search(r"\b(ERROR|CRITICAL)\b", line)]
    assert len(last_words) == 1, server.log()
    assert "Traceback" not in server.log(), server.log()
    assert "start" in last_words[0].lower(), f"the line should say what to do: {last_words[0]}"


def all_there(starts, load):
    """The next start has every acknowledged job, and all of them can be finished."""
    server = starts.start()
    load.drain(server.port)
    check(load.history, server.port, may=MAY_BE_REFUSED)


def outcome_unknown(call):
    """The answer to one who waited for the disk when it failed."""
    assert call.status == 503, call
    assert call.answer["code"] == "outcome_unknown", call
    return call.answer["job_id"]


@needs("strace")
def test_a_failed_sync_stops_the_server_and_tells_those_who_wait(tmp_path, seed):
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed)
        client = Client(load, server)
        held = [client.hold("") for _ in range(2)]
        jobs = []
        while len(jobs) < len(held):
            jobs += client.poll("wait=5")
        with traced(server, "fdatasync,fsync:error=EIO", paths=our_files(tmp_path / "data")):
            outcome_unknown(client.submit())
            server.wait()
        for thread, _ in held:
            thread.join(10)
        told = {outcome_unknown(calls[0]) for _, calls in held}
        assert told == {job["job_id"] for job in jobs}
        stopped_by_the_disk(server)
        server = starts.start()
        for job in jobs:
            assert Client(load, server).complete(job).status == 200, "a worker does not notice"
        load.drain(server.port)
        check(load.history, server.port)


@needs("strace")
def test_a_disk_that_fails_while_the_server_drains_ends_the_wait(tmp_path, seed):
    with QuickStarts(tmp_path) as starts:
        server = starts.start("--drain", "600")
        load = Load(History(), seed)
        client = Client(load, server)
        for _ in range(2):
            client.submit()
        first, _ = client.poll("")
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: "stopping" in server.log(), what="the drain")
        with traced(server, "fdatasync,fsync:error=EIO", paths=our_files(tmp_path / "data")):
            with contextlib.suppress(Cut):
                outcome_unknown(client.complete(first))
            stopped_by_the_disk(server)


@needs("strace")
def test_a_completion_whose_sync_failed_is_not_acknowledged(tmp_path, seed):
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed)
        client = Client(load, server)
        client.submit()
        (job,) = client.poll("wait=5")
        with traced(server, "fdatasync,fsync:error=EIO", paths=our_files(tmp_path / "data")):
            assert outcome_unknown(client.complete(job)) == job["job_id"]
            stopped_by_the_disk(server)
        all_there(starts, load)


@needs("strace")
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_a_failed_sync_under_load_loses_nothing_acknowledged(tmp_path, seed, number):
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed)
        with traced(server, f"fdatasync,fsync:error=EIO:when={number}", paths=our_files(tmp_path / "data")):
            load.start(server.port)
            stopped_by_the_disk(server)
        load.stop()
        all_there(starts, load)


@needs("strace")
def test_a_failed_cut_after_a_short_write_stops_the_server(tmp_path, seed):
    journal = tmp_path / "data" / "journal.jsonl"
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed)
        client = Client(load, server)
        for _ in range(3):
            client.submit()
        limit_file_size(server, journal.stat().st_size + 50)
        with traced(
            server,
            "ftruncate,truncate:error=EIO",
            paths=our_files(tmp_path / "data"),
            calls=("ftruncate", "truncate"),
        ):
            with contextlib.suppress(Cut):
                assert client.submit().status in (503, 507)
            stopped_by_the_disk(server)
        all_there(starts, load)


@pytest.mark.parametrize("end, room", [("stopped", 0), ("stopped", 20), ("killed", -1_000)])
def test_a_start_on_a_full_disk_without_a_reserve_ends_with_one_line_and_loses_nothing(tmp_path, seed, end, room):
    flags, journal = ("--reserve", "0"), tmp_path / "data" / "journal.jsonl"
    with QuickStarts(tmp_path) as starts:
        server = starts.start(*flags)
        load = Load(History(), seed)
        client = Client(load, server)
        for _ in range(10):
            client.submit()
        server.stop() if end == "stopped" else server.kill()
        server = starts.start(*flags, stopped=True)
        limit_file_size(server, journal.stat().st_size + room)
        server.go()
        assert server.wait() == STOPPED_BY_THE_DISK, server.log()
        *events, last_words = server.log().splitlines()
        assert all(re.match(r"\S+Z (WARNING|ERROR) \w+ ", event) for event in events), server.log()
        assert last_words.startswith(f"jobqueue: {journal}") and "start again" in last_words, server.log()
        all_there(starts, load)


@needs("strace")
@pytest.mark.parametrize(
    "fault", ["fdatasync,fsync:error=EIO", "write:error=ENOSPC", "write:error=EIO", "ftruncate:error=EIO"]
)
def test_a_disk_that_fails_during_the_start_is_reported_and_loses_nothing(tmp_path, seed, fault):
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        load = Load(History(), seed)
        client = Client(load, server)
        for _ in range(10):
            client.submit()
        server.kill()
        server = starts.start(stopped=True)
        with traced(server, fault, paths=our_files(tmp_path / "data")):
            server.go()
            assert server.wait() == STOPPED_BY_THE_DISK, "what could not be written must not be served"
        assert "Traceback" not in server.log(), server.log()
        last_words = server.log().splitlines()[-1]
        assert str(tmp_path / "data" / "journal.jsonl") in last_words, last_words
        assert "start again" in last_words, "the line should say what to do"
        all_there(starts, load)


# The fault, and the path that it meets in the data folder ("" is the folder itself).
COMPACTION_FAULTS = [
    ("openat:error=ENOSPC", "journal.jsonl.new"),
    ("openat:error=EMFILE", "journal.jsonl.new"),
    ("write:error=ENOSPC", "journal.jsonl.new"),
    ("write:error=ENOSPC:when=2", "journal.jsonl.new"),
    ("write:retval=0", "journal.jsonl.new"),
    ("write:error=EIO", "journal.jsonl.new"),
    ("fdatasync,fsync:error=EIO", "journal.jsonl.new"),
    ("?rename,renameat,renameat2:error=EIO", "journal.jsonl.new"),
    ("fdatasync,fsync:error=EIO", ""),
]


def fail_a_compaction(starts, load, data, fault, name):
    """Write until a compaction meets the fault, and a little on; return the server, maybe ended."""
    server = starts.start(*COMPACT, "--keep-jobs", "1000000")  # what is drained in the end is not to be forgotten
    wire, rng = Wire(server.port), random.Random(load.seed)
    load.act("client_async", wire, rng)
    with traced(server, fault, paths=[data / name]) as trace, contextlib.suppress(Cut):
        # A compaction in which nothing is appended meanwhile has but one write.
        for number in range(500):
            if number % 20 == 19:
                load.act("client_async", wire, rng)
            load.act("worker_fail_at_length", wire, rng, lease=3)
            if "(INJECTED)" in trace.text():
                break
        for _ in range(10):
            load.act("worker_fail_at_length", wire, rng, lease=3)
            load.act("client_async", wire, rng)
        assert "(INJECTED)" in trace.text(), "never compacted"
    return server


@needs("strace")
@pytest.mark.parametrize(("fault", "name"), COMPACTION_FAULTS)
def test_a_compaction_that_fails_loses_nothing(tmp_path, seed, fault, name):
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), seed)
        server = fail_a_compaction(starts, load, tmp_path / "data", fault, name)
        try:
            check(load.history, server.port, drained=False)
            server.kill()
        except Cut:
            stopped_by_the_disk(server)
        all_there(starts, load)


@needs("strace")
@pytest.mark.long
def test_a_compaction_that_failed_is_tried_again(tmp_path, seed):
    data = tmp_path / "data"
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), seed)
        server = fail_a_compaction(starts, load, data, "write:error=ENOSPC", "journal.jsonl.new")
        grow(load, server.port, data)
        load.drain(server.port)
        check(load.history, server.port)


@needs("gcc")
def test_a_write_that_the_system_takes_in_pieces_is_whole_on_the_disk(tmp_path, seed):
    shim = build_shim(tmp_path, "pieces", WRITE_IN_PIECES)
    rng = random.Random(seed)
    with QuickStarts(tmp_path, env={"LD_PRELOAD": str(shim)}) as starts:
        load = Load(History(), seed)
        for _ in range(5):
            server = starts.start(*COMPACT)
            load.start(server.port)
            enough = len(load.history.calls) + rng.randint(30, 200)
            wait_until(lambda enough=enough: len(load.history.calls) >= enough, what="the load to run")
            server.kill()
            load.stop()
        all_there(starts, load)
