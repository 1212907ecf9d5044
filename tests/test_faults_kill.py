"""kill -9: under load, in rounds, and at every system call that changes the disk.

It takes only what was not yet written, so it proves nothing about syncing: test_faults_power.py does that.
"""

import collections
import contextlib
import random
import shutil

import pytest

from checker import Cut, History, Load, Wire, check, clear, new_payload, payload_bytes, server_jobs
from rigs import COMPACT, FIGURES, LATE_WRITE, LONG, QuickStarts, build_shim, grow, needs, our_files, traced
from support import DidNotStart, call, wait_until

ROUNDS = 500 if LONG else 20
KEEP = ("--keep-jobs", "1000000")  # where one history goes over all rounds, none of it may be forgotten
ROUNDS_A_FOLDER = 20  # then all is drained and checked, and a new folder begun
LOADS = 5 if LONG else 1  # different loads for the kills at every system call

pytestmark = FIGURES


def killed_rounds(starts, load, rng, rounds, *flags, most=400, before_kill=lambda server: None):
    """Start, load, kill -9 at a random moment, so many times, always on the same folder.

    However seldom it syncs: what was written survives the process.
    """
    for _ in range(rounds):
        server = starts.start(*flags, "--fsync", rng.choice(("always", "always", "interval", "never")))
        load.start(server.port, server.grpc_port)
        enough = len(load.history.calls) + rng.randint(30, most)
        wait_until(lambda enough=enough: len(load.history.calls) >= enough, what="the load to run")
        before_kill(server)
        server.kill()
        load.stop()


def test_under_load_every_job_gets_one_result_of_its_own(process, seed):
    server = process("--grpc-port", "off")
    history = History()
    load = Load(history, seed)
    load.start(server.port)
    wait_until(lambda: len(history.calls) >= 1500, 30, "the load to run")
    load.stop()
    load.drain(server.port)
    assert check(history, server.port)["completed"] > 300


def test_kill_9_under_load_loses_nothing_acknowledged(tmp_path, seed):
    rng = random.Random(seed)
    for folder in range(ROUNDS // ROUNDS_A_FOLDER):
        flags = rng.choice(([], ["--compact-bytes", "100000"])) if LONG else ["--compact-bytes", "100000"]
        work = tmp_path / str(folder)
        work.mkdir()
        with QuickStarts(work) as starts:
            load = Load(History(), f"{seed}-{folder}")
            killed_rounds(starts, load, rng, ROUNDS_A_FOLDER, *flags)
            server = starts.start(*flags)
            load.drain(server.port)
            assert check(load.history, server.port)["completed"] > 100
        shutil.rmtree(work)


def test_a_clean_stop_under_load_loses_nothing_acknowledged(tmp_path, seed):
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), seed)
        for _ in range(3):
            server = starts.start("--drain", "0.5")
            load.start(server.port)
            enough = len(load.history.calls) + 200
            wait_until(lambda enough=enough: len(load.history.calls) >= enough, what="the load to run")
            assert server.stop() == 0, server.log()
            load.stop()
        server = starts.start()
        assert "unclean" not in server.log(), server.log()
        load.drain(server.port)
        assert check(load.history, server.port)["completed"] > 50


def test_an_acknowledged_clear_holds_after_kill_9(tmp_path, seed):
    rng = random.Random(seed)
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), seed)
        killed_rounds(starts, load, rng, 3, before_kill=lambda server: clear(load.history, server.port))
        server = starts.start()
        load.drain(server.port)
        check(load.history, server.port)


def test_kill_9_loses_nothing_of_workers_over_grpc(tmp_path, seed):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), seed)
        killed_rounds(starts, load, random.Random(seed), ROUNDS // 4, "--grpc-port", "0", *KEEP)
        server = starts.start(*KEEP)
        load.drain(server.port)
        assert check(load.history, server.port)["completed"] > 50


def test_no_job_outlives_its_ttl_by_kill_9(tmp_path, seed):
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), seed, client_acts={**Load.CLIENT_ACTS, "ttl": 8})
        killed_rounds(starts, load, random.Random(seed), ROUNDS // 4, *KEEP)
        server = starts.start(*KEEP)
        load.drain(server.port)
        check(load.history, server.port)
        states = collections.Counter(job["status"] for job in server_jobs(server.port).values())
        assert states["expired"] > 5, states


def test_kill_9_brings_nothing_back_that_was_forgotten_and_takes_nothing_unfinished(tmp_path, seed):
    flags = ("--keep-jobs", "20", "--compact-bytes", "50000")
    acts = {name: weight for name, weight in Load.CLIENT_ACTS.items() if "key" not in name}
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), seed, client_acts=acts)
        killed_rounds(starts, load, random.Random(seed), ROUNDS // 4, *flags)
        server = starts.start(*flags)
        check(load.history, server.port, drained=False, kept=20)
        load.drain(server.port)
        assert check(load.history, server.port, kept=20)["completed"] > 50


def test_an_acknowledged_pause_and_an_acknowledged_resume_hold_after_kill_9(tmp_path, seed):
    def order(what):
        assert call(server.url, "POST", f"/api/admin/{what}?queue=default").status == 200

    with QuickStarts(tmp_path) as starts:
        load, rng = Load(History(), seed), random.Random(seed)
        for _ in range(3):
            killed_rounds(starts, load, rng, 1)
            server = starts.start()
            load.start(server.port)
            order("pause")
            server.kill()
            load.stop()

            server = starts.start()
            wire = Wire(server.port)
            load.submit(wire, "&wait=0", new_payload(load.rng, seed))
            assert load.poll(wire, "wait=0.05") == []
            order("resume")
            server.kill()

            server = starts.start()
            wire = Wire(server.port)
            jobs = load.poll(wire, "max=1000&wait=0")
            assert jobs
            load.complete_batch(wire, jobs)
            server.kill()
        server = starts.start()
        load.drain(server.port)
        check(load.history, server.port)


@needs("gcc")
def test_the_rig_notices_a_write_that_stays_in_memory(tmp_path, seed):
    """The negative control: a server whose last write is lost with it must be caught."""
    rng = random.Random(seed)
    shim = build_shim(tmp_path, "late_write", LATE_WRITE)
    with QuickStarts(tmp_path, env={"LD_PRELOAD": str(shim)}) as starts:
        load = Load(History(), seed)
        with pytest.raises(AssertionError, match="promises broken|damaged at byte"):
            for _ in range(20):
                killed_rounds(starts, load, rng, 1, most=60)
                server = starts.start()
                check(load.history, server.port, drained=False)
                server.kill()


def test_a_worker_that_holds_a_job_does_not_notice_a_restart(process):
    server = process("--grpc-port", "off")
    ids = [
        call(server.url, "POST", "/api/submit?wait=0", b"%d" % number).json()["job_id"] for number in range(3)
    ]
    jobs = call(server.url, "GET", "/api/worker/poll?max=3&lease=60").json()["jobs"]
    assert [job["job_id"] for job in jobs] == ids
    server.kill()
    server = process("--grpc-port", "off")
    assert call(server.url, "GET", "/api/worker/poll").status == 204, (
        "a leased job was handed to another worker"
    )
    for job in jobs:
        path = f"{job['job_id']}?lease_token={job['lease_token']}"
        extended = call(server.url, "POST", f"/api/worker/extend/{path}&lease=90")
        assert extended.status == 200, extended
        assert extended.json()["lease_seconds"] == pytest.approx(90, abs=5)
        done = call(server.url, "POST", f"/api/worker/complete/{path}", b"done")
        assert (done.status, done.json().get("duplicate")) == (200, None)
        again = call(server.url, "POST", f"/api/worker/complete/{path}", b"again")
        assert (again.status, again.json().get("duplicate")) == (200, True)
        assert call(server.url, "GET", f"/api/jobs/{job['job_id']}").json()["result"] == "done"


def test_a_completion_is_the_same_completion_after_a_restart(process):
    server = process("--grpc-port", "off")
    call(server.url, "POST", "/api/submit?wait=0", b"x")
    job = call(server.url, "GET", "/api/worker/poll?lease=60").json()
    path = f"/api/worker/complete/{job['job_id']}?lease_token={job['lease_token']}"
    assert call(server.url, "POST", path, b"first").status == 200
    server.kill()
    server = process("--grpc-port", "off")
    again = call(server.url, "POST", path, b"second")
    assert (again.status, again.json().get("duplicate")) == (200, True)
    other = call(server.url, "POST", path + "x", b"third")
    assert (other.status, other.json()["code"]) == (409, "job_finished")
    assert call(server.url, "GET", f"/api/jobs/{job['job_id']}").json()["result"] == "first"


def test_after_kill_9_jobs_come_back_in_their_place_with_their_attempts(tmp_path, seed):
    rng = random.Random(seed)
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        priorities = [rng.randrange(3) for _ in range(30)]
        sent = [
            (
                -priority,
                number,
                call(server.url, "POST", f"/api/submit?wait=0&priority={priority}", b"%d" % number).json()[
                    "job_id"
                ],
            )
            for number, priority in enumerate(priorities)
        ]
        order = [job_id for _, _, job_id in sorted(sent)]
        failed, released, leased = call(server.url, "GET", "/api/worker/poll?max=3&lease=2").json()["jobs"]
        verb(server, "fail", failed, "&delay=0")
        verb(server, "release", released)
        server.kill()
        server = starts.start()
        wait_until(
            lambda: call(server.url, "GET", "/api/admin/stats").json()["pending"] == 30,
            what="the lease to end",
        )
        jobs = call(server.url, "GET", "/api/worker/poll?max=30").json()["jobs"]
        assert [job["job_id"] for job in jobs] == order
        attempts = {job["job_id"]: job["attempt"] for job in jobs}
        assert attempts.pop(failed["job_id"]) == 2, "a failed attempt counts"
        assert attempts.pop(leased["job_id"]) == 2, "a lease that ran out counts"
        assert set(attempts.values()) == {1}, "a release does not count"


def verb(server, name, job, query="", body=b""):
    """complete, fail or release a job with its token; it must work."""
    path = f"/api/worker/{name}/{job['job_id']}?lease_token={job['lease_token']}{query}"
    answer = call(server.url, "POST", path, body)
    assert answer.status == 200, answer
    return answer.json()


def test_a_key_names_the_same_job_after_kill_9(tmp_path):
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        key = {"Idempotency-Key": "order-7"}
        first = call(server.url, "POST", "/api/submit?wait=0", b"x", key)
        server.kill()
        server = starts.start()
        again = call(server.url, "POST", "/api/submit?wait=0", b"x", key)
        assert again.json()["job_id"] == first.json()["job_id"]
        assert again.headers["idempotent-replayed"] == "true"
        other = call(server.url, "POST", "/api/submit?wait=0", b"y", key)
        assert (other.status, other.json()["code"]) == (422, "key_reused")


def test_a_batch_of_which_a_part_was_written_is_not_there_at_all(tmp_path):
    """A crash may leave a part of what was written; of a batch it must not become a part of its jobs."""
    journal, payloads = tmp_path / "data" / "journal.jsonl", [f"payload {number}" for number in range(4)]
    with QuickStarts(tmp_path) as starts:
        server = starts.start()
        before = journal.stat().st_size
        headers = {"Content-Type": "application/x-ndjson"}
        answer = call(server.url, "POST", "/api/jobs", "\n".join(payloads), headers)
        assert answer.status == 202, answer
        server.kill()
        whole = journal.read_bytes()
        places = {whole.find(f"payload {number}".encode()) for number in range(1, 4)}  # within the later jobs
        places |= {whole.find(b"\n", place) + 1 for place in places}  # after them
        places |= {before, before + 1, whole.find(b"\n", before), whole.find(b"\n", before) + 1}
        for place in sorted(places):
            shutil.rmtree(tmp_path / "data")
            journal.parent.mkdir()
            journal.write_bytes(whole[:place])
            server = starts.start()
            jobs = [payload_bytes(job).decode() for job in server_jobs(server.port).values()]
            assert jobs in ([], payloads[::-1]), f"cut at {place - before} of {len(whole) - before}"
            server.kill()


# == At every system call ====================================================================================
# The tracer kills at the K-th call of one kind that touches one of our files, K = 1, 2, ... until the server
# gets through. The call itself is not carried out, so every point between two calls is tried.


def script(load, port):
    """A little of everything, one call after the other; raise Cut where the server is killed meanwhile."""
    wire, rng = Wire(port), random.Random(load.seed)
    for act in ("async", "async", "batch", "key_async", "cancel", "delayed"):
        load.act(f"client_{act}", wire, rng)
    for act in ("one", "repeat", "fail", "release", "batch", "fail_for_good", "chain"):
        load.act(f"worker_{act}", wire, rng, lease=15)
    load.act("client_batch", wire, rng)
    wire.close()


def still_good(starts, history, data, *flags):
    """A server must start on what a kill left behind, know all that was acknowledged, and work."""
    server = starts.start(*flags, data_dir=data)
    check(history, server.port, drained=False)
    job_id = call(server.url, "POST", "/api/submit?wait=0&queue=probe", b"probe").json()["job_id"]
    job = call(server.url, "GET", "/api/worker/poll?queue=probe").json()
    assert job["job_id"] == job_id
    verb(server, "complete", job)
    server.kill()


def every_point(attempt, counts):
    """attempt(call, K) for K = 1, 2, ... until it returns true (survived); return the number of kills."""
    kills = 0
    for name in counts:
        for number in range(1, 200):
            if attempt(name, number):
                break
            kills += 1
    return kills


def leave_a_mess(starts, load, data):
    """What the worst crash leaves: a journal with a torn tail, and a compaction that was cut short."""
    server = starts.start()
    script(load, server.port)
    server.kill()
    lines = (data / "journal.jsonl").read_bytes()
    with open(data / "journal.jsonl", "ab") as journal:
        journal.write(lines.splitlines(keepends=True)[-1][:-20])
    (data / "journal.jsonl.new").write_bytes(lines[: len(lines) // 2])


@needs("strace")
@pytest.mark.parametrize("load_number", range(LOADS))
@pytest.mark.parametrize(
    "begin", [lambda starts, load, data: data.mkdir(), leave_a_mess], ids=["empty", "mess"]
)
def test_a_kill_at_any_system_call_of_start_and_repair_loses_nothing(tmp_path, seed, begin, load_number):
    data, left = tmp_path / "data", tmp_path / "left"
    with QuickStarts(tmp_path) as starts:
        load = Load(History(), f"{seed}-{load_number}")
        begin(starts, load, data)
        data.rename(left)

        def start(*inject):
            """Start on what was left behind; return the trace, or None where the server was killed."""
            shutil.rmtree(data, ignore_errors=True)
            shutil.copytree(left, data)
            server = starts.start(stopped=True)
            with traced(server, *inject, paths=our_files(data)) as trace:
                server.go()
                try:
                    server.wait_ready()
                    server.kill()
                    return trace
                except DidNotStart as error:
                    assert error.code == -9, error
                    return None

        def attempt(name, number):
            survived = start(f"{name}:signal=KILL:when={number}")
            if not survived:
                still_good(starts, load.history, data)
            return survived

        counts = start().counts()
        assert "openat" in counts and {"fsync", "fdatasync"} & set(counts), counts
        still_good(starts, load.history, data)
        kills = every_point(attempt, counts)
        print(f"{kills} kills at {counts}")
        assert kills >= 5


@needs("strace")
@pytest.mark.parametrize("load_number", range(LOADS))
def test_a_kill_at_any_system_call_of_a_commit_loses_nothing(tmp_path, seed, load_number):
    data = tmp_path / "data"
    with QuickStarts(tmp_path) as starts:

        def run(*inject):
            shutil.rmtree(data, ignore_errors=True)
            server = starts.start()
            load = Load(History(), f"{seed}-{load_number}")
            with traced(server, *inject, paths=our_files(data)) as trace:
                try:
                    script(load, server.port)
                    server.kill()
                    return trace
                except Cut:
                    assert server.wait() == -9
            still_good(starts, load.history, data)
            return None

        counts = run().counts()
        assert "write" in counts and {"fsync", "fdatasync"} & set(counts), counts
        kills = every_point(lambda name, number: run(f"{name}:signal=KILL:when={number}"), counts)
        print(f"{kills} kills at {counts}")
        assert kills >= 10


@needs("strace")
@pytest.mark.parametrize("load_number", range(LOADS))
def test_a_kill_at_any_system_call_of_a_compaction_loses_nothing(tmp_path, seed, load_number):
    data = tmp_path / "data"
    watched = [str(data), str(data / "journal.jsonl.new")]  # not the commits, which have their own test
    with QuickStarts(tmp_path) as starts:

        def run(*inject):
            shutil.rmtree(data, ignore_errors=True)
            server = starts.start(*COMPACT)
            load = Load(History(), f"{seed}-{load_number}")
            with traced(server, *inject, paths=watched) as trace:
                with contextlib.suppress(Cut):
                    grow(load, server.port, data)
                    load.act("client_batch", Wire(server.port), random.Random(1))
                    server.kill()
                    return trace
                assert server.wait() == -9
            still_good(starts, load.history, data, *COMPACT)
            return None

        counts = run().counts()
        assert {"openat", "write"} <= set(counts) and any(name.startswith("rename") for name in counts), (
            counts
        )
        kills = every_point(lambda name, number: run(f"{name}:signal=KILL:when={number}"), counts)
        print(f"{kills} kills at {counts}")
        assert kills >= 5
