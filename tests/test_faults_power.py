"""Power cuts: what was acknowledged before the cut is there after it.

The data folder lies on a small ext4 of its own, which an ioctl takes down as a power cut would: what is not
on the disk is gone, the file system's own journal included. What stays is what was synced.
"""

import contextlib
import random
import re
import threading
import time

import pytest

from checker import Cut, History, Load, Wire, check, clear
from rigs import (
    COMPACT,
    FIGURES,
    LATE_SYNC,
    LONG,
    NO_SYNC,
    SLOW_FSYNC,
    Disk,
    QuickStarts,
    build_shim,
    grow,
    needs,
    needs_root,
)
from support import DidNotStart, wait_until

CUTS = 500 if LONG else 50
COMPACTION_CUTS = 100 if LONG else 10
CONTROL_CUTS = 10  # nearly every one loses something
CUTS_A_HISTORY = 3  # then all is cleared, which must hold over the next cut as well

pytestmark = [*FIGURES, needs("mkfs.ext4", "mount", "nsenter"), needs_root()]

# Workers that come late or crash would only make the checks wait; test_faults_kill.py has them.
WORKER_ACTS = {"one": 4, "chain": 3, "batch": 4, "repeat": 1, "fail_for_good": 0.3, "release": 0.3}


class Rig:
    """A server on a disk whose power is cut, and what its clients were told up to then."""

    def __init__(self, starts, tmp_path, seed, *flags):
        self.starts, self.flags = starts, flags
        self.mount_point = tmp_path / "mount"
        self.data = self.mount_point / "data"
        self.disk = Disk(starts, tmp_path / "disk", self.mount_point)
        self.load = Load(History(), seed, worker_acts=WORKER_ACTS)
        self.server = None

    def start(self, **options):
        """Start a server on what the disk holds."""
        self.server = self.starts.start(*self.flags, data_dir=self.data, **options)
        return self.server

    def cut_power(self, *growing):
        """Cut the power now, and bring back the disk as it is then. Answers read later do not count.

        Threads that look at the disk are waited for, since a disk that somebody looks at cannot be unmounted.
        """
        moment = self.disk.cut_power()
        self.server.kill()
        self.load.stop()
        for thread in growing:
            thread.join()
        self.load.history.cut(moment)
        self.load.unsure.clear()  # their leases may be gone, as may their jobs
        self.disk.unmount()
        self.disk.mount()

    def cut_power_under_load(self, rng):
        """Cut the power after so many calls."""
        self.load.start(self.server.port)
        enough = len(self.load.history.calls) + rng.randint(10, 150)
        wait_until(lambda: len(self.load.history.calls) >= enough, what="the load to run")
        self.cut_power()

    def cut_power_of(self, growing):
        """Cut the power while that thread writes, and hold the next server to what was acknowledged; then clear all."""
        self.cut_power(growing)
        self.start()
        self.check()
        self.load.history.calls = [clear(self.load.history, self.server.port)]
        self.server.kill()

    def check(self):
        """Hold the server to what was acknowledged; return how many jobs that were."""
        return check(self.load.history, self.server.port, drained=False, leases_survive=False)["accepted"]


@pytest.mark.parametrize("recent", [None, 4096], ids=["usual", "often full"])
def test_a_power_cut_loses_nothing_acknowledged(tmp_path, seed, recent):
    rng, checked, restored = random.Random(seed), 0, 0
    with QuickStarts(tmp_path, private_mounts=True, recent=recent) as starts:
        rig = Rig(starts, tmp_path, seed, "--compact-bytes", "100000")
        rig.start()
        for number in range(CUTS if recent is None else CUTS // 2):
            rig.cut_power_under_load(rng)
            if rng.random() < 0.2:  # once more, while it repairs what the first one left
                rig.start(ready=False)
                time.sleep(rng.uniform(0, 0.1))
                rig.cut_power()
            rig.start()
            restored += int(re.search(r"unclean_stop .* recent=(\d+)", rig.server.log())[1])
            checked += rig.check()
            if number % CUTS_A_HISTORY == CUTS_A_HISTORY - 1:
                rig.load.history.calls = [clear(rig.load.history, rig.server.port)]
    print(f"{number + 1} cuts, {checked} times an acknowledged job was looked for")
    print(f"{restored} records were in the recent file alone")
    assert checked > number and restored > number


def test_a_power_cut_in_a_compaction_loses_nothing_acknowledged(tmp_path, seed):
    rng = random.Random(seed)
    with QuickStarts(tmp_path, private_mounts=True) as starts:
        rig = Rig(starts, tmp_path, seed, *COMPACT)
        seen = starts.path(rig.data)
        for _ in range(COMPACTION_CUTS):
            rig.start()
            rig.load.act("client_batch", Wire(rig.server.port), rng)
            before = (seen / "journal.jsonl").stat().st_ino
            growing = threading.Thread(target=_grow_until_cut, args=(rig, seen))
            growing.start()
            while growing.is_alive() and not (seen / "journal.jsonl.new").exists():
                if (seen / "journal.jsonl").stat().st_ino != before:
                    break
            time.sleep(rng.choice((0, rng.uniform(0, 0.003))))
            rig.cut_power_of(growing)


@needs("gcc")
def test_a_power_cut_behind_a_compaction_finds_the_new_journal_whole(tmp_path, seed):
    """Once its name is on the disk, nothing of the old one is left; so its content has to be there before."""
    rng = random.Random(seed)
    shim = build_shim(tmp_path, "syncs", SLOW_FSYNC)  # time to cut in, before answers sync the new file once more
    with QuickStarts(tmp_path, env={"LD_PRELOAD": str(shim)}, private_mounts=True) as starts:
        rig = Rig(starts, tmp_path, seed, *COMPACT)
        for _ in range(COMPACTION_CUTS // 3):
            rig.start()
            seen = starts.path(rig.data)
            rig.load.act("client_batch", Wire(rig.server.port), rng)
            before = (seen / "journal.jsonl").stat().st_ino
            growing = threading.Thread(target=_grow_until_cut, args=(rig, seen))
            growing.start()
            wait_until(lambda file=seen / "journal.jsonl", old=before: file.stat().st_ino != old, what="a compaction")
            time.sleep(rng.uniform(0.02, 0.1))
            rig.cut_power_of(growing)


def _grow_until_cut(rig, data):
    with contextlib.suppress(Cut, OSError):
        grow(rig.load, rig.server.port, data)


@needs("gcc")
@pytest.mark.parametrize("syncs", [NO_SYNC, LATE_SYNC], ids=["without syncs", "with syncs a moment late"])
def test_a_server_without_its_syncs_is_caught(tmp_path, seed, syncs):
    """The negative control: acknowledged jobs must be found lost, or the tests above prove nothing."""
    rng, lost, refused = random.Random(seed), 0, 0
    shim = build_shim(tmp_path, "syncs", syncs)
    with QuickStarts(tmp_path, env={"LD_PRELOAD": str(shim)}, private_mounts=True) as starts:
        rig = Rig(starts, tmp_path, seed)
        for _ in range(CONTROL_CUTS):
            rig.start()
            starts.run(
                "sync", "-f", rig.mount_point
            )  # the folder and the file are there; what comes now is not
            rig.cut_power_under_load(rng)
            try:
                rig.start()
                rig.check()
            except DidNotStart:
                refused += 1
            except AssertionError as broken:
                lost += " is lost" in str(broken)
            finally:
                rig.server.kill()
            starts.run("rm", "-rf", rig.data)
            rig.load.history.calls = []
    print(f"{CONTROL_CUTS} cuts: {lost} lost what was acknowledged, {refused} were not started on")
    assert lost
