"""The journal's last records once more: what a sync writes, and what a start finds there after a power cut.

Here a power cut is what remains of the files: what was synced, and of the rest what chance has left. With a real file
system and its power, test_faults_power.py has it.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import random
import threading
from pathlib import Path

import pytest
from local_engine import crash_copy, journal_of, open_engine, records_of, wait_for_compaction

import jobqueue
from engine_contract import Queue
from support import LONG, wait_until

CRASHES = 20_000 if LONG else 400
SECTOR = 512

pytestmark = pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="a sync writes everything here")


class Disk:
    """The disk under a folder: what of its files is there for sure, and what a crash leaves of them.

    Each call of the system that changes something there is counted. Before number `at` the crash comes: what is left
    then is kept, and the run goes on into the void. Call number `fault` fails.
    """

    CALLS = ("open", "write", "pwrite", "ftruncate", "replace", "unlink")

    def __init__(self, monkeypatch, rng):
        self._rng, self._lock, self._folder, self._files = rng, threading.RLock(), None, {}
        for name in self.CALLS:
            monkeypatch.setattr(os, name, functools.partial(self._call, name, getattr(os, name)))
        for name in ("_sync_data", "_sync_file"):
            monkeypatch.setattr(jobqueue, name, self._sync)
        monkeypatch.setattr(jobqueue, "_sync_folder", self._sync_folder)

    def watch(self, folder, kill, at, fault):
        """From now on; `kill`: the crash is a kill -9, which takes nothing away, else a power cut."""
        self._folder, self._kill, self._at, self._fault = str(folder), kill, at, fault
        self._count, self.left = 0, None
        self._names = [self._list()]
        for name in self._names[0].values():
            self._files[name][1] = self._now(name)  # what a crash left is on the disk

    def look_away(self):
        """The run is over; return what is left of it, at its end where no crash came before."""
        with self._lock:
            self.left = self.left or self._remains()
            self._folder = None
            for file, _ in self._files.values():
                os.close(file)
            self._files.clear()
        return self.left

    def _list(self):
        """{name: inode}; each file is held open, to be read after it was renamed or removed."""
        names = {}
        for name in os.listdir(self._folder):
            if name.startswith("journal"):
                file = os.open(f"{self._folder}/{name}", os.O_RDONLY)
                names[name] = inode = os.fstat(file).st_ino
                if inode in self._files:
                    os.close(file)
                else:
                    self._files[inode] = [file, b""]
        return names

    def _now(self, inode):
        file = self._files[inode][0]
        return os.pread(file, os.fstat(file).st_size, 0)

    def _is_ours(self, file):
        path = name_of(file) if isinstance(file, int) else str(file)
        return self._folder is not None and path.startswith(f"{self._folder}/journal")

    def _before(self, call):
        self._count += 1
        if self._count == self._at:
            self.left = self._remains()
        if self._count == self._fault:
            raise OSError(errno.EIO, f"fault at {call}")

    def _call(self, call, real, file, *arguments, **more):
        if not self._is_ours(file) or (call == "open" and not arguments[0] & os.O_CREAT):
            return real(file, *arguments, **more)
        with self._lock:
            self._before(call)
            result = real(file, *arguments, **more)
            if call in ("open", "replace", "unlink"):
                self._names.append(self._list())
            return result

    def _sync(self, fd):
        with self._lock:
            if not self._is_ours(fd):
                return
            inode = os.fstat(fd).st_ino
            content = self._now(inode)
            self._before("sync")
            self._files[inode][1] = content
            self._before("the end of a sync")

    def _sync_folder(self, path):
        with self._lock:
            self._before("folder sync")
            self._names = [self._list()]
            self._before("the end of a folder sync")

    def _remains(self):
        """The files as they are, or as a power cut may leave them: of each, sectors as they were synced, as they are,
        or zeros where it has grown, and as many; and the folder as it was at any moment since it was synced."""
        if self._kill:
            return {name: self._now(inode) for name, inode in self._list().items()}
        odds, left = self._rng.choice((0, 0.3, 0.5, 0.9, 1)), {}
        for name, inode in self._rng.choice((self._rng.choice(self._names), self._names[-1])).items():
            now, safe = self._now(inode), self._files[inode][1]
            low, high = sorted((len(now), len(safe)))
            size = self._rng.choice((len(safe), len(now), self._rng.randint(low, high)))
            pieces = []
            for start in range(0, size, SECTOR):
                end = min(start + SECTOR, size)
                pieces.append((now if self._rng.random() < odds else safe)[start:end].ljust(end - start, b"\0"))
            left[name] = b"".join(pieces)
        return left


def name_of(fd):
    return os.readlink(f"/proc/self/fd/{fd}")


def watched_syncs(monkeypatch):
    """The files that are synced from now on."""
    real, synced = jobqueue._sync_data, []
    monkeypatch.setattr(jobqueue, "_sync_data", lambda fd: (real(fd), synced.append(name_of(fd))))
    return synced


class Story:
    """What was done with the queue of a folder, over its crashes, and what was acknowledged before them."""

    def __init__(self, disk, rng):
        self.disk, self.rng = disk, rng
        self.told, self.known = {}, set()  # id -> its result, if one was told; what may be there

    def holds(self, engine):
        """Is all of it there, and nothing that was not there before?"""
        there = self._jobs(engine)
        assert there.keys() <= self.known, "what was gone came back"
        for job_id, result in self.told.items():
            assert job_id in there, f"{job_id} is lost"
            assert result is None or there[job_id].result == result, f"the result of {job_id} is lost"
        self.known = set(there)

    @staticmethod
    def _jobs(engine):
        return {job.id: job for job in engine.jobs(None, None, 5_000, None)[0]}

    def acknowledged(self, job_id, result=None):
        if self.disk.left is None:
            self.told[job_id] = result

    def go_on(self, queue):
        """Some work, until the crash."""
        try:
            self._work(queue)
        finally:  # what was refused as `outcome_unknown` may be there
            self.known |= self._jobs(queue.engine).keys()

    def _work(self, queue):
        for _ in range(self.rng.randint(1, 25)):
            act = self.rng.random()
            if act < 0.6:
                group = [queue.hold("1" * self.rng.randint(1, 300), 0) for _ in range(self.rng.choice((1, 1, 9)))]
                for future in group:
                    self.acknowledged(future.result(10)[0].id)
            elif act < 0.7:
                for job_id in queue.submit_many(self.rng.randint(1, 12)):
                    self.acknowledged(job_id)
            elif jobs := queue.wait_for(wait=0).result(10):
                result, before = str(self.rng.randint(0, 10 ** self.rng.randint(1, 300))), self.told.pop(jobs[0].id, 0)
                queue.complete(jobs[0], result)
                if before is None:
                    self.told[jobs[0].id] = None
                self.acknowledged(jobs[0].id, result.encode())
            if self.disk.left is not None:
                return


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("faults", [False, True], ids=["crashes", "and calls that fail"])
def test_a_crash_at_any_call_loses_nothing_acknowledged_and_brings_back_nothing_that_was_gone(
    tmp_path, clock, monkeypatch, seed, faults
):
    rng, restored, at_start = random.Random(seed), 0, 0
    disk = Disk(monkeypatch, rng)
    monkeypatch.setattr(jobqueue._Recent, "SIZE", 8 * SECTOR)
    monkeypatch.setattr(jobqueue._Reserve, "_allocate", lambda reserve, fd: None)
    story, left = Story(disk, rng), {}
    for number in range(CRASHES):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in left.items():
            (folder / name).write_bytes(content)
        at = rng.choice((rng.randint(1, 16), rng.randint(1, 60), rng.randint(1, 200)))
        disk.watch(folder, rng.random() < 0.25, at, rng.randint(1, 120) if faults else 0)
        compact = rng.choice((5_000, 1 << 30))
        with contextlib.suppress(*((jobqueue.DiskError, jobqueue.JobQueueError) if faults else ())):
            engine = open_engine(folder, clock, compact_bytes=compact, keep_jobs=1_000_000)
            try:
                story.holds(engine)
                if disk.left is None:
                    story.go_on(Queue(engine, clock, again=None))
                else:
                    at_start += 1
                if rng.random() < 0.2:
                    wait_for_compaction()
            finally:
                engine.close()
        left = disk.look_away()
        restored += len(jobqueue_lacks(left, tmp_path / f"{number}+"))
        if number % 25 == 24:  # anew, or the journal holds thousands of jobs
            story, left = Story(disk, rng), {}
    print(f"{CRASHES} crashes, {at_start} amid a start; {restored} records were in the recent file alone")
    assert restored > CRASHES // 4 and at_start > CRASHES // 20


def jobqueue_lacks(left, folder):
    """The lines that a journal lacks and its recent file has."""
    folder.mkdir()
    for name, content in left.items():
        (folder / name).write_bytes(content)
    if "journal.jsonl" not in left:
        return []
    reader = jobqueue.JournalReader(str(folder / "journal.jsonl"))
    list(reader)
    return reader.lacking


def test_an_answer_waits_for_the_recent_file_and_the_journal_is_synced_when_that_is_full(
    tmp_path, clock, monkeypatch
):
    monkeypatch.setattr(jobqueue._Recent, "SIZE", 2_000)
    engine = open_engine(tmp_path / "data", clock)
    queue, recent, synced = Queue(engine, clock, again=None), 0, watched_syncs(monkeypatch)
    for _ in range(30):
        queue.submit("1" * 150)
        if synced[-1].endswith(".recent"):
            recent += 1
            lines = [line for line in Path(synced[-1]).read_bytes().split(b"\n") if line]
            assert journal_of(engine).read_bytes().splitlines()[-1] in lines
    assert len(synced) == 30 and 15 < recent < 30
    journal = journal_of(engine).read_bytes()
    assert len(journal) > 3 * 2_000
    engine.close()


@pytest.mark.parametrize("fsync", ["interval", "never"])
def test_where_nobody_waits_for_syncs_there_is_no_recent_file(tmp_path, clock, fsync):
    folder = tmp_path / "data"
    engine = open_engine(folder, clock)
    crashed = crash_copy(engine, tmp_path / "crashed")
    assert (crashed / "journal.jsonl.recent").exists()
    engine.close()
    engine = open_engine(crashed, clock, fsync=fsync)
    assert not (crashed / "journal.jsonl.recent").exists()
    engine.close()


def test_a_clean_stop_leaves_the_journal_alone(tmp_path, clock):
    engine = open_engine(tmp_path / "data", clock)
    Queue(engine, clock, again=None).submit()
    engine.close()
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".lock", "journal.jsonl", "reserve"}


def crash_copy_of(folder, target):
    """Of a folder that no engine has open."""
    target.mkdir()
    for path in folder.glob("journal.jsonl*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


def lacking(tmp_path, clock, jobs=6):
    """A folder after a power cut: the journal ends after two of the jobs, the rest is in the recent file alone."""
    engine = open_engine(tmp_path / "data", clock)
    queue = Queue(engine, clock, again=None)
    ids = [queue.submit(number).id for number in range(jobs)]
    folder = crash_copy(engine, tmp_path / "cut")
    engine.close()
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) - jobs + 2]))
    return folder, ids


def test_what_the_journal_lacks_is_taken_from_the_recent_file_and_told_in_one_line(tmp_path, clock, caplog):
    folder, ids = lacking(tmp_path, clock)
    caplog.clear()
    engine = open_engine(folder, clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * 6
    (line,) = [record.getMessage() for record in caplog.records]
    assert "unclean_stop" in line and "recent=4" in line
    engine.close()
    numbers = [record["seq"] for record in records_of((folder / "journal.jsonl").read_bytes())]
    assert numbers == list(range(len(numbers)))


def test_a_crash_while_that_is_done_harms_nothing(tmp_path, clock, monkeypatch):
    folder, ids = lacking(tmp_path, clock)
    monkeypatch.setattr(jobqueue._Recent, "open", lambda recent: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_engine(folder, clock)
    monkeypatch.undo()
    again = tmp_path / "again"
    again.mkdir()
    for path in folder.iterdir():
        (again / path.name).write_bytes(path.read_bytes())
    with open(again / "journal.jsonl", "r+b") as journal:  # of what was being written, this much got there
        journal.truncate(journal.seek(0, 2) - 700)
    engine = open_engine(again, clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * 6
    engine.close()


def test_what_was_torn_in_the_recent_file_does_not_come_back_behind_a_start_that_was_cut_short(
    tmp_path, clock, monkeypatch
):
    """Its numbers are given once more: the first of them to that start."""
    folder, ids = lacking(tmp_path, clock)
    recent = folder / "journal.jsonl.recent"
    lines = [line for line in recent.read_bytes().splitlines(keepends=True) if line.strip()]
    last = records_of(lines[-1])[0]["seq"]
    # Of two records that were being written, a submit and what was done with its job, the second got there.
    late = jobqueue.journal_line(last + 2, last, '{"op":"cancel","id":"a job that is nowhere","finished":0}')
    recent.write_bytes((b"".join(lines) + b"x" * 300 + b"\n" + late).ljust(jobqueue._Recent.SIZE, b"\n"))
    monkeypatch.setattr(jobqueue._Reserve, "fill", lambda reserve: 1 / 0)  # behind the sync of its "open"
    with pytest.raises(ZeroDivisionError):
        open_engine(folder, clock)
    monkeypatch.undo()
    engine = open_engine(crash_copy_of(folder, tmp_path / "again"), clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * 6
    engine.close()


@pytest.mark.parametrize("room", ["none", "the reserve's"])
def test_on_a_full_disk_the_reserve_makes_room_for_what_the_journal_lacks(tmp_path, clock, monkeypatch, room):
    folder, ids = lacking(tmp_path, clock)
    write_all, reserve = jobqueue._write_all, folder / "reserve"

    def full(fd, data):
        grows = os.lseek(fd, 0, os.SEEK_CUR) + len(data) > os.fstat(fd).st_size and name_of(fd).endswith(".jsonl")
        if grows and (room == "none" or reserve.stat().st_size):
            os.write(fd, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(fd, data)

    monkeypatch.setattr(jobqueue, "_write_all", full)
    if room == "none":
        with pytest.raises(jobqueue.DiskError):
            open_engine(folder, clock)
        monkeypatch.undo()
    engine = open_engine(folder, clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * 6
    engine.close()


def test_a_copy_of_the_journal_with_a_later_recent_file_is_whole_up_to_its_own_end(tmp_path, clock, monkeypatch):
    """As `cp -r` makes it while the server runs."""
    monkeypatch.setattr(jobqueue._Recent, "SIZE", 2_000)
    engine = open_engine(tmp_path / "data", clock)
    queue = Queue(engine, clock, again=None)
    first = [queue.submit().id for _ in range(5)]
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "journal.jsonl").write_bytes(journal_of(engine).read_bytes())
    for _ in range(50):
        queue.submit()
    (copy / "journal.jsonl.recent").write_bytes((tmp_path / "data" / "journal.jsonl.recent").read_bytes())
    engine.close()
    engine = open_engine(copy, clock)
    assert [job.id for job in reversed(engine.jobs(None, None, 100, None)[0])] == first
    engine.close()


DAMAGES = {
    "its line end": lambda data: data[:-1] + b"\x0b",
    "a byte within": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "its line end, before zeros": lambda data: data[:-1] + b"\x0b" + bytes(100),
    "its last bytes, which are zeros": lambda data: data[:-100] + bytes(100),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_before_those_of_the_recent_file_is_not_taken_for_the_end_of_a_copy(tmp_path, clock, damage):
    folder, jobs = lacking(tmp_path, clock)
    journal, recent = folder / "journal.jsonl", folder / "journal.jsonl.recent"
    lines, size = recent.read_bytes().splitlines(keepends=True), jobqueue._Recent.SIZE
    whole = journal.read_bytes().splitlines(keepends=True)
    recent.write_bytes(b"".join(lines[lines.index(whole[-1]) + 1 :]).ljust(size, b"\n"))  # from the journal's end on
    engine = open_engine(crash_copy_of(folder, tmp_path / "whole"), clock)
    assert {engine.view(job, 0).result(10).state for job in jobs} == {"pending"}
    engine.close()
    data = DAMAGES[damage](journal.read_bytes())
    journal.write_bytes(data)
    at = sum(map(len, whole[:-1]))
    with pytest.raises(jobqueue.DataError, match=f"{journal} is damaged at byte {at}: .*had been synced"):
        open_engine(folder, clock)
    assert journal.read_bytes() == data


def test_a_recent_file_of_another_history_is_refused(tmp_path, clock):
    """A backup was put over a journal of the same folder that had gone on from an older backup."""
    engine = open_engine(tmp_path / "data", clock)
    queue = Queue(engine, clock, again=None)
    queue.submit()
    older = journal_of(engine).read_bytes()
    mine = [queue.submit().id for _ in range(3)]
    newer = journal_of(engine).read_bytes()
    engine.close()
    for path in (tmp_path / "data").glob("journal.jsonl*"):
        path.unlink()
    (tmp_path / "data" / "journal.jsonl").write_bytes(older)
    engine = open_engine(tmp_path / "data", clock)
    queue = Queue(engine, clock, again=None)
    for _ in range(9):
        queue.submit()
    folder = crash_copy(engine, tmp_path / "crashed")
    engine.close()
    (folder / "journal.jsonl").write_bytes(newer)
    with pytest.raises(jobqueue.DataError, match="recent is not of this journal: record 5 differs"):
        open_engine(folder, clock)
    (folder / "journal.jsonl.recent").unlink()
    engine = open_engine(folder, clock)
    assert [engine.view(job, 0).result(10).state for job in mine] == ["pending"] * 3
    engine.close()


def test_a_compaction_does_not_switch_after_a_sync_that_failed(tmp_path, clock, monkeypatch):
    """A later sync of the old file would say nothing; what was acknowledged may be in the recent file alone."""
    engine = open_engine(tmp_path / "data", clock, compact_bytes=20_000, keep_jobs=0)
    queue, replaced = Queue(engine, clock, again=None), []
    while engine.journal.size < 15_000:
        queue.cancel(queue.submit("1" * 100))

    def failing(fd):
        wait_until(lambda: engine.journal._switch)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(jobqueue, "_sync_data", failing)
    monkeypatch.setattr(os, "replace", lambda *names: replaced.append(names))
    with pytest.raises(jobqueue.JobQueueError) as caught:
        queue.submit("1" * 10_000)
    assert caught.value.code == "outcome_unknown"
    wait_for_compaction()
    assert not replaced
    engine.close()


def test_a_rename_that_was_done_although_it_reports_an_error_is_taken_for_done(tmp_path, clock, monkeypatch):
    """As over NFS, where the answer to the first try may be lost. Else the journal would go on without a name."""
    monkeypatch.setattr(jobqueue._Recent, "SIZE", 2_000)
    engine = open_engine(tmp_path / "data", clock, compact_bytes=10_000, keep_jobs=0)
    queue, replace, renamed = Queue(engine, clock, again=None), os.replace, []

    def lost(source, target):
        replace(source, target)
        renamed.append(target)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "replace", lost)
    ids = [queue.submit().id for _ in range(5)]
    while not renamed:
        queue.cancel(queue.submit("1" * 100))
        wait_for_compaction()
    ids += [queue.submit().id for _ in range(25)]
    folder = crash_copy(engine, tmp_path / "crashed")
    engine.close()
    monkeypatch.undo()
    engine = open_engine(folder, clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * 30
    engine.close()


def test_of_a_recent_file_whose_journal_was_removed_nothing_comes_back(tmp_path, clock, monkeypatch):
    folder, _ = lacking(tmp_path, clock)
    (folder / "journal.jsonl").unlink()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(jobqueue._Recent, "open", lambda recent: 1 / 0)  # it crashes before the file is written over
        open_engine(folder, clock)
    engine = open_engine(folder, clock)
    assert engine.jobs(None, None, 100, None)[0] == []
    engine.close()


def test_what_is_written_while_a_sync_runs_is_in_the_next(tmp_path, clock, monkeypatch):
    sync, synced, queues, told = jobqueue._sync_data, {}, [], []

    def busy(fd):
        content = Path(f"/proc/self/fd/{fd}").read_bytes()
        sync(fd)
        synced[Path(name_of(fd)).name] = content
        if queues and not told:
            told.append(queues[0].hold(None, 0))

    monkeypatch.setattr(jobqueue, "_sync_data", busy)
    engine = open_engine(tmp_path / "data", clock)
    queues.append(Queue(engine, clock, again=None))
    ids = [queues[0].submit().id, *(future.result(10)[0].id for future in told)]
    cut = tmp_path / "cut"
    cut.mkdir()
    for name, content in synced.copy().items():
        (cut / name).write_bytes(content)
    engine.close()
    engine = open_engine(cut, clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * 2
    engine.close()


@pytest.mark.parametrize(
    "damage",
    ["a byte of a record that the journal lacks", "a byte of the first one", "the whole file is gone"],
)
def test_where_a_record_that_was_synced_is_in_neither_file_the_start_is_refused(tmp_path, clock, damage):
    folder, _ = lacking(tmp_path, clock)
    recent, journal = folder / "journal.jsonl.recent", folder / "journal.jsonl"
    lines = recent.read_bytes().splitlines(keepends=True)
    if damage.startswith("a byte"):
        first = damage.endswith("first one")
        records = [number for number, line in enumerate(lines) if len(line) > 1]
        bad = records[0 if first else -3]
        lines[bad] = lines[bad].replace(b'"op"', b'"oq"')
        recent.write_bytes(b"".join(lines))
        if first:  # nothing of what is there is in the journal
            whole = journal.read_bytes().splitlines(keepends=True)
            journal.write_bytes(b"".join(whole[: -2]))
    else:  # the journal itself tells what was synced
        later = [line for line in lines if len(line) > 1][-1]
        journal.write_bytes(journal.read_bytes() + later)
        recent.unlink()
    before = journal.read_bytes()
    where = "recent is damaged at byte [1-9].*" if damage == "a byte of a record that the journal lacks" else ""
    with pytest.raises(jobqueue.DataError, match=f"{where}had been synced"):
        open_engine(folder, clock)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("call", ["open", "write", "pwrite"])
def test_without_room_for_the_recent_file_the_journal_itself_is_synced(tmp_path, clock, monkeypatch, call):
    real = getattr(os, call)

    def refused(file, *arguments):
        if str(name_of(file) if isinstance(file, int) else file).endswith(".recent"):
            if call == "write" and len(arguments[0]) > 1_000:
                return real(file, arguments[0][:1_000])  # the first sign of a full disk is a short write
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, *arguments)

    monkeypatch.setattr(os, call, refused)
    engine = open_engine(tmp_path / "data", clock)
    queue, synced = Queue(engine, clock, again=None), watched_syncs(monkeypatch)
    for _ in range(3):
        queue.submit()
    assert synced == [str(journal_of(engine))] * 3
    assert (tmp_path / "data" / "journal.jsonl.recent").exists() == (call == "pwrite")
    engine.close()


def test_records_from_before_a_compaction_do_not_stand_in_for_damaged_ones_of_it(tmp_path, clock, monkeypatch):
    """They have the same numbers. The crash comes right behind the switch."""
    engine, copies = open_engine(tmp_path / "data", clock, compact_bytes=1_000, keep_jobs=0), []
    queue, replace = Queue(engine, clock, again=None), os.replace

    def replaced(source, target):
        replace(source, target)
        copies.append(crash_copy_of(tmp_path / "data", tmp_path / f"cut-{len(copies)}"))

    monkeypatch.setattr(os, "replace", replaced)
    ids = [queue.submit(number).id for number in range(20)]
    while not copies:
        queue.cancel(queue.submit())
        wait_for_compaction()
    engine.close()
    journal = copies[0] / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    snapshot = [number for number, line in enumerate(lines) if any(job.encode() in line for job in ids)]
    assert len(snapshot) == len(ids)
    for number in snapshot:
        damaged = lines.copy()
        damaged[number] = damaged[number].replace(b'"op"', b'"oq"')
        journal.write_bytes(b"".join(damaged))
        with pytest.raises(jobqueue.DataError, match="had been synced"):
            open_engine(copies[0], clock)


@pytest.mark.parametrize("call", ["unlink", "fsync"])
def test_where_the_recent_file_can_neither_be_written_nor_removed_the_start_is_refused(
    tmp_path, clock, monkeypatch, call
):
    """What was torn there would seem to follow what is written now."""
    folder, ids = lacking(tmp_path, clock)
    write, real, tried = os.write, getattr(os, call), []

    def refused_write(file, data):
        if name_of(file).endswith(".recent"):
            tried.append(data)
            raise OSError(errno.EIO, "Input/output error")
        return write(file, data)

    def refused(file, *arguments):
        name = name_of(file) if isinstance(file, int) else str(file)
        if name.endswith(".recent") or (tried and name == str(folder)):
            raise OSError(errno.EIO, "Input/output error")
        return real(file, *arguments)

    with monkeypatch.context() as patch, pytest.raises(jobqueue.DiskError, match="Input/output error"):
        patch.setattr(os, "write", refused_write)
        patch.setattr(os, call, refused)
        open_engine(folder, clock)
    engine = open_engine(folder, clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * len(ids)
    engine.close()


def test_a_journal_that_an_older_version_may_read_has_no_recent_file_until_it_is_written_anew(tmp_path, clock):
    """The older one would not look there."""
    folder = tmp_path / "data"
    folder.mkdir()
    header = jobqueue.journal_line(0, 1, '{"op":"journal","version":1,"writer":"jobqueue 0.9"}')
    meta = jobqueue.journal_line(1, 1, '{"op":"meta","last_number":0,"all_paused":false,"paused":[]}')
    (folder / "journal.jsonl").write_bytes(header + meta)
    engine = open_engine(folder, clock, compact_bytes=3_000, keep_jobs=1)
    queue, recent = Queue(engine, clock, again=None), folder / "journal.jsonl.recent"
    assert queue.submit() and not recent.exists()
    while records_of(journal_of(engine).read_bytes())[0]["version"] == 1:
        queue.complete(queue.take())
        queue.submit()
        wait_for_compaction()
    wait_until(recent.exists)
    engine.close()


def test_check_counts_what_is_in_the_recent_file_alone(tmp_path, clock, capsys):
    folder, _ = lacking(tmp_path, clock)
    assert jobqueue.main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "6 pending" in said and "4 of them from recent" in said
    assert jobqueue.main(["check", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["recent_records"] == 4


def test_check_says_that_what_was_told_of_a_torn_end_is_kept(tmp_path, clock, capsys):
    folder, _ = lacking(tmp_path, clock)
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + bytes(50))
    assert jobqueue.main(["check", str(folder)]) == 0
    assert "a torn tail of 50 bytes, of which all that anybody was told of is kept" in capsys.readouterr().out


def test_check_of_a_journal_in_use_reads_the_recent_file_first(tmp_path, clock, monkeypatch):
    """Read later, it may be one that is being written over, whose records seem to be missing."""
    monkeypatch.setattr(jobqueue._Recent, "SIZE", 2_000)
    engine = open_engine(tmp_path / "data", clock)
    queue, read, ids = Queue(engine, clock, again=None), jobqueue.JournalReader._recent_lines, []

    def meanwhile(reader):
        lines = read(reader)
        ids.extend(queue.submit().id for _ in range(20))
        return lines

    monkeypatch.setattr(jobqueue.JournalReader, "_recent_lines", meanwhile)
    reader = jobqueue.JournalReader(str(journal_of(engine)))
    assert {record.get("id") for record in reader} > set(ids) and not reader.torn
    engine.close()


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, "jobqueue")


def test_records_behind_a_gap_that_the_recent_file_fills_are_read_on(tmp_path, clock, monkeypatch):
    """They were synced in the journal itself: the recent file was full."""
    monkeypatch.setattr(jobqueue._Recent, "SIZE", 2_000)
    engine = open_engine(tmp_path / "data", clock)
    queue, synced = Queue(engine, clock, again=None), watched_syncs(monkeypatch)
    ids = [queue.submit("1" * 100).id for _ in range(20)]
    while not synced[-1].endswith(".jsonl"):
        ids.append(queue.submit("1" * 100).id)
    folder = crash_copy(engine, tmp_path / "crashed")
    engine.close()
    journal = folder / "journal.jsonl"
    old = next(line for line in (folder / "journal.jsonl.recent").read_bytes().splitlines() if line)
    journal.write_bytes(journal.read_bytes().replace(old, old.replace(b'"op"', b'"oq"')))
    for name, call in (("again", "_write_all"), ("and again", "_sync_file")):  # a crash amid the repair harms nothing
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(jobqueue, call, lambda *_: 1 / 0)
            open_engine(folder, clock)
        folder = crash_copy_of(folder, tmp_path / name)
    engine = open_engine(folder, clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * len(ids)
    engine.close()


def test_a_repair_that_is_done_twice_loses_nothing(tmp_path, clock, monkeypatch):
    folder, ids = lacking(tmp_path, clock)
    real, tries = jobqueue._sync_folder, []

    def fails_once(path):
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.EIO, "Input/output error")
        if len(tries) == 2:
            raise ZeroDivisionError  # and then it crashes
        real(path)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(jobqueue, "_sync_folder", fails_once)
        open_engine(folder, clock)
    engine = open_engine(crash_copy_of(folder, tmp_path / "again"), clock)
    assert [engine.view(job, 0).result(10).state for job in ids] == ["pending"] * 6
    engine.close()


def test_a_recent_file_that_somebody_removes_is_not_what_answers_wait_for(tmp_path, clock, monkeypatch):
    engine = open_engine(tmp_path / "data", clock)
    queue, synced = Queue(engine, clock, again=None), watched_syncs(monkeypatch)
    queue.submit()
    (tmp_path / "data" / "journal.jsonl.recent").unlink()
    queue.submit()
    assert [Path(name).name for name in synced] == ["journal.jsonl.recent", "journal.jsonl"]
    engine.close()


def test_what_is_written_while_somebody_reads_is_not_judged(tmp_path, clock, monkeypatch):
    """As `check` does it beside the server: a line may be half written when it is read."""
    engine = open_engine(tmp_path / "data", clock)
    queue = Queue(engine, clock, again=None)
    ids = [queue.submit().id for _ in range(3)]
    folder = crash_copy(engine, tmp_path / "seen")
    more = [queue.submit().id for _ in range(3)]
    journal, seen = journal_of(engine).read_bytes(), folder / "journal.jsonl"
    whole = len(seen.read_bytes())
    seen.write_bytes(journal[: whole + 50])
    read = jobqueue.JournalReader._read_recent

    def meanwhile(reader, *seen_before):
        yield from read(reader, *seen_before)
        seen.write_bytes(journal)

    monkeypatch.setattr(jobqueue.JournalReader, "_read_recent", meanwhile)
    reader = jobqueue.JournalReader(str(seen))
    found = {record.get("id") for record in reader}
    assert found >= set(ids) and not found & set(more) and reader.torn
    engine.close()


def test_a_recent_file_of_which_nothing_can_be_read_is_none(tmp_path, clock):
    """A first write that was torn; what it held was acknowledged to nobody."""
    engine = open_engine(tmp_path / "data", clock)
    job = Queue(engine, clock, again=None).submit()
    folder = crash_copy(engine, tmp_path / "cut")
    engine.close()
    (folder / "journal.jsonl.recent").write_bytes(b'{"crc":"torn'.ljust(jobqueue._Recent.SIZE, b"\n"))
    engine = open_engine(folder, clock)
    assert engine.view(job.id, 0).result(10).state == "pending"
    engine.close()
