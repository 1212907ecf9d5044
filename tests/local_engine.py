"""LocalEngine for tests: opened on a folder, crashed, opened again; and its journal, read without its code."""

from __future__ import annotations

import json
import re
import shutil
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from engine_contract import Queue
from jobqueue import LocalEngine, Settings
from support import FakeClock, wait_until


def open_engine(folder: Path, clock: Any, **settings: Any) -> LocalEngine:
    return LocalEngine(Settings(data_dir=str(folder), **settings), clock)


def crash_copy(engine: LocalEngine, folder: Path) -> Path:
    """What a kill -9 would leave now."""
    folder.mkdir(parents=True)
    for path in Path(engine.journal.folder).iterdir():
        try:
            shutil.copyfile(path, folder / path.name)
        except FileNotFoundError:  # a compaction has just come to its end
            assert path.suffix == ".new"
    return folder


def restart(engine: LocalEngine, clock: Any, how: str, away: float = 0.0, **settings: Any) -> LocalEngine:
    """After a crash the new engine finds what the old one had written by then, and no more."""
    folder = Path(engine.journal.folder)
    if how == "crash":
        folder = crash_copy(engine, folder.with_name(folder.name + "+"))
    engine.close()
    if away:
        clock.jump(away)
    return open_engine(folder, clock, **settings)


@contextmanager
def local_queues(root: Path, clock: FakeClock, **defaults: Any) -> Iterator[Any]:
    """make_queue(**settings) -> Queue on a LocalEngine of its own; all are closed in the end."""
    made: list[Queue] = []

    def make(**given: Any) -> Queue:
        settings = defaults | given
        engine = open_engine(root / f"queue-{len(made)}", clock, **settings)
        queue = Queue(engine, clock, again=lambda *how: restart(queue.engine, clock, *how, **settings))
        made.append(queue)
        return queue

    try:
        yield make
    finally:
        for queue in made:
            queue.engine.close()


def journal_of(engine: LocalEngine) -> Path:
    return Path(engine.journal.path)


def compacting() -> bool:
    return any(thread.name == "jobqueue-compact" for thread in threading.enumerate())


def wait_for_compaction() -> None:
    wait_until(lambda: not compacting(), 60, "the end of the compaction")


# -- the format, told once more and independently


class Line(NamedTuple):
    seq: int
    synced: int
    op: str


_LINE = re.compile(rb'\{"crc":"([0-9a-f]{8})",("seq":(-?\d+),"synced":(-?\d+),"op":"([a-z_]+)".*\}\n)', re.DOTALL)


@lru_cache(maxsize=100_000)
def read_line(line: bytes) -> Line | None:
    """What a line says, or None where not every byte of it is as it was written."""
    found = _LINE.fullmatch(line)
    if found is None or zlib.crc32(found[2]) != int(found[1], 16):
        return None
    return Line(int(found[3]), int(found[4]), found[5].decode())


def lines_of(data: bytes) -> list[bytes]:
    """Lines with their ends; bytes.splitlines would also split at other characters."""
    return re.findall(rb"[^\n]*\n|[^\n]+\Z", data)


def records_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def judge(data: bytes) -> tuple[str, int]:
    """Whether it is whole, torn or damaged, and the offset where the good part ends.

    The first line is never torn. A bad line (not as it was written, or out of order) is damage where any good line
    says that its record had been synced, or the whole file ends before such a record; else it begins the torn tail.
    """
    lines = [(line, read_line(line)) for line in lines_of(data)]
    if not lines or lines[0][1] is None or lines[0][1].op != "journal":
        return "damaged", 0
    synced = max(read.synced for _, read in lines if read)
    seq, offset = lines[0][1].seq - 1, 0
    for line, read in lines:
        if read is None or read.seq != seq + 1:
            break
        seq, offset = read.seq, offset + len(line)
    if synced > seq:
        return "damaged", offset
    return ("whole" if offset == len(data) else "torn"), offset
