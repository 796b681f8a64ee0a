"""Rows on disk, in an LMDB file that outlives the process and that processes of one machine may share.

The only file that imports lmdb. It does not know what the bytes mean. A lookup reads the mapped file and waits for no
writer; one thread for each file writes, and syncs, what was put. What goes wrong with the disk is logged once, and the
rows are computed again.

Constant of a file: its path and bound. Changing: `_OPEN`, guarded by `_OPEN_LOCK`; what waits to be written and what is
off, guarded by the file's `_lock`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from remote_ops.errors import SpecError
from server_ref.rowstore import Usage, check_bounds

try:
    import lmdb
except ImportError as error:
    raise ImportError("server_ref.rowdisk needs lmdb: pip install 'remote-ops[cache]'") from error

__all__ = ["DiskRows"]

log = logging.getLogger("server_ref")
MIN_BYTES = 1 << 20
_RECORD = Struct(">QI")  # when it was put, in ns since 1970, and the CRC-32 of what follows, its key and that
_STAMP = Struct(">Q")
_FILES = ("data.mdb", "lock.mdb")
_READERS = 512
_CLOSE_S = 5.0
_SHARES = (3 / 4, 3 / 8, 1 / 8)  # of the bound, that rows may take: the rest is for copies and for gaps
_DAMAGE = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError, lmdb.PanicError)


class DiskRows:
    """Rows in a folder of their own; where room is short, those go first that were put first.

    Args:
        path: the folder; made, with mode 0700, if it is not there. Several objects of a process share what is open.
        max_bytes: most bytes of the file, 1 MiB or more. A file above it is started anew; what is larger than a
            sixteenth of it is not kept. Within one process, the first who opens a folder says.
        ttl_s: seconds after which a row is not given any more; None: no bound.
        clock: seconds since 1970, the same in every process.

    Raises:
        SpecError: a bound makes no sense, or others than this user may write to the folder, and so say what models
            answer.

    A lookup costs about 2 us and 1 us for each key. Where the folder cannot be used, because the disk is full or
    read-only or the file is damaged, a warning says so once and no more is kept. In a process forked while it is open,
    nothing is found or kept.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        max_bytes: int = 1 << 30,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_bounds(max_bytes, ttl_s, at_least=MIN_BYTES)
        self.path = Path(path).expanduser().absolute()
        self.ttl_s = ttl_s
        self._clock = clock
        self._file: _File | None = _opened(self.path, max_bytes)

    def __repr__(self) -> str:
        return f"DiskRows({str(self.path)!r}, ttl_s={self.ttl_s})"

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What was put under each key within the last `ttl_s`, by any process."""
        records = self._file.read(keys) if self._file else [None] * len(keys)
        now_ns = int(self._clock() * 1e9)
        oldest_ns = 0 if self.ttl_s is None else now_ns - int(self.ttl_s * 1e9) + 1
        return [record and _checked(key, record, oldest_ns, now_ns) for key, record in zip(keys, records, strict=True)]

    def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Hand pairs of key and bytes to the writer; they are found from now on, and on disk milliseconds later."""
        if self._file:
            stamp = _STAMP.pack(int(self._clock() * 1e9))
            self._file.submit({key: _record(key, stamp, value) for key, value in entries})

    def usage(self) -> Usage:
        """What the file holds; the evictions are those of this process."""
        return self._file.usage() if self._file else Usage(0, 0, 0)

    def flush(self, timeout_s: float = _CLOSE_S) -> bool:
        """Wait until all that was put is on disk; whether it is."""
        return self._file.flush(timeout_s) if self._file else True

    def close(self) -> None:
        """Write what waits, within 5 s, and let go of the file when no other object of this process uses it."""
        file, self._file = self._file, None
        if file:
            _release(file)


def _record(key: bytes, stamp: bytes, value: bytes) -> bytes:
    return stamp + zlib.crc32(value, zlib.crc32(key, zlib.crc32(stamp))).to_bytes(4, "big") + value


def _checked(key: bytes, record: bytes, oldest_ns: int, now_ns: int) -> bytes | None:
    """The value of a record; None if it is damaged, too old, or from a time that is still to come."""
    if len(record) < _RECORD.size:
        return None
    put_ns, crc = _RECORD.unpack_from(record)
    value = record[_RECORD.size :]
    if not oldest_ns <= put_ns <= now_ns or crc != zlib.crc32(value, zlib.crc32(key, zlib.crc32(record[:8]))):
        return None
    return value


class _Map(NamedTuple):
    """The file while it is open: records by key, and keys by when they were put."""

    env: lmdb.Environment
    values: lmdb._Database
    order: lmdb._Database


class _File:
    """One file of this process: what reads it, and the thread that writes to it."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 0
        self._max_bytes = max_bytes
        self._lock = threading.Condition()
        self._waiting: dict[bytes, bytes] = {}
        self._writing: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._writer: threading.Thread | None = None
        self._evictions = 0
        self._reads = self._writes = True
        self._stopped = False
        self._map: _Map | None = None
        try:
            self._map = self._opened()
        except (OSError, lmdb.Error) as error:
            self._give_up("cannot be opened", error)

    @property
    def _readable(self) -> _Map | None:
        return self._map if self._reads and self.pid == os.getpid() else None

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The record under each key, those that wait to be written included."""
        if (opened := self._readable) is None:
            return [None] * len(keys)
        # In this order: what is on its way is in one of the two until it is in the file.
        waiting, writing = self._waiting, self._writing
        try:
            with opened.env.begin(db=opened.values) as txn:
                return [waiting.get(key) or writing.get(key) or txn.get(key) for key in keys]
        except lmdb.ReadersFullError:
            return [None] * len(keys)
        except lmdb.Error as error:
            self._give_up("cannot be read", error)
            return [None] * len(keys)

    def submit(self, records: dict[bytes, bytes]) -> None:
        """Queue records for the writer; those that would make the queue too long are dropped."""
        if self._readable is None:
            return
        most = self._max_bytes // 16
        with self._lock:
            if not self._writes or self._stopped:
                return
            for key, record in records.items():
                if len(record) <= most and self._waiting_bytes + len(record) <= 4 * most:
                    self._waiting[key] = record
                    self._waiting_bytes += len(record)
            if self._writer is None:
                self._writer = threading.Thread(target=self._work, name="rows-on-disk", daemon=True)
                self._writer.start()
            self._lock.notify_all()

    def usage(self) -> Usage:
        """What is in the file."""
        with contextlib.suppress(lmdb.Error):
            if (opened := self._readable) is not None:
                with opened.env.begin() as txn:
                    entries = txn.stat(opened.values)["entries"]
                    return Usage(entries, _live_bytes(txn, opened), self._evictions)
        return Usage(0, 0, self._evictions)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be written; whether all of it was."""
        if self._readable is None:
            return False
        with self._lock:
            done = self._lock.wait_for(lambda: not (self._waiting or self._writing) or not self._writes, timeout_s)
            return done and self._writes

    def close(self) -> None:
        """Write what waits, end the thread and let go of the file: it closes when the last lookup has ended."""
        if self.pid == os.getpid():
            self.flush(_CLOSE_S)
            with self._lock:
                self._stopped = True
                self._lock.notify_all()
            if self._writer is not None:
                self._writer.join(_CLOSE_S)
        self._map = None

    def _opened(self) -> _Map:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(self.path)
        data = self.path / _FILES[0]
        if data.exists() and data.stat().st_size > self._max_bytes:
            self._remove()
        try:
            return self._mapped(data)
        except _DAMAGE as error:
            log.warning("rows on disk are damaged and start anew: %s - at %s", error, self.path)
        self._remove()
        return self._mapped(data)

    def _mapped(self, data: Path) -> _Map:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        env = lmdb.open(
            str(self.path), map_size=self._max_bytes // page_bytes * page_bytes, max_dbs=2, max_readers=_READERS,
            mode=0o600, metasync=False, readahead=False,
        )  # fmt: skip
        try:
            if (env.info()["last_pgno"] + 1) * env.stat()["psize"] > data.stat().st_size:
                raise lmdb.CorruptedError("the file is cut off")  # to read on would end the process
            for name in _FILES:
                (self.path / name).chmod(0o600)
            env.reader_check()
            return _Map(env, env.open_db(b"values"), env.open_db(b"order"))
        except BaseException:
            env.close()
            raise

    def _remove(self) -> None:
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def _give_up(self, what: str, error: Exception, *, reads: bool = True) -> None:
        """Serve on without, and say so once; where only writing fails, what is there is still found."""
        with self._lock:
            said, self._writes = not self._writes, False
            self._reads = self._reads and not reads
            self._waiting = {}
            self._waiting_bytes = 0
            self._lock.notify_all()
        if isinstance(error, _DAMAGE):
            with contextlib.suppress(OSError):
                self._remove()  # for whoever opens it next
        if not said:
            log.warning("rows on disk %s, so no more are kept: %s - at %s", what, error, self.path)

    def _work(self) -> None:
        while (records := self._next()) and (opened := self._map):
            try:
                self._write(opened, records)
            except (OSError, lmdb.Error) as error:
                self._give_up("cannot be written", error, reads=False)

    def _next(self) -> dict[bytes, bytes]:
        """Wait for what is to be written; nothing once there is no more to do."""
        with self._lock:
            self._writing = {}
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._waiting or self._stopped or not self._writes)
            self._writing = self._waiting
            self._waiting = {}
            self._waiting_bytes = 0
            return self._writing

    def _write(self, opened: _Map, records: dict[bytes, bytes]) -> None:
        """Write records, in transactions that leave room for the pages that each of them copies."""
        for batch in _batches(records, self._max_bytes // 16):
            for share in _SHARES:
                try:
                    self._commit(opened, batch, int(self._max_bytes * share))
                    break
                except lmdb.MapFullError:  # the room is in pieces too small for a large row, or held by a lookup
                    self._shrink(opened, int(self._max_bytes * share / 2))

    def _commit(self, opened: _Map, batch: Sequence[tuple[bytes, bytes]], most_bytes: int) -> None:
        evicted = 0
        with opened.env.begin(write=True) as txn:
            for key, record in batch:
                if (old := txn.get(key, db=opened.values)) is not None:
                    txn.delete(old[:8] + key, db=opened.order)
                while _live_bytes(txn, opened) + len(record) > most_bytes and _evict(txn, opened):
                    evicted += 1
                txn.put(key, record, db=opened.values)
                txn.put(record[:8] + key, b"", db=opened.order)
        self._evictions += evicted

    def _shrink(self, opened: _Map, most_bytes: int) -> None:
        opened.env.reader_check()
        evicted = 0
        with opened.env.begin(write=True) as txn:
            while _live_bytes(txn, opened) > most_bytes and _evict(txn, opened):
                evicted += 1
        self._evictions += evicted
        with opened.env.begin(write=True) as txn:  # LMDB takes pages again from the second transaction after
            txn.put(_STAMP.pack(0), b"", db=opened.order)
            txn.delete(_STAMP.pack(0), db=opened.order)


def _batches(records: dict[bytes, bytes], most_bytes: int) -> Iterator[list[tuple[bytes, bytes]]]:
    batch: list[tuple[bytes, bytes]] = []
    size = 0
    for key, record in records.items():
        if batch and size + len(record) > most_bytes:
            yield batch
            batch, size = [], 0
        batch.append((key, record))
        size += len(record)
    if batch:
        yield batch


def _evict(txn: lmdb.Transaction[bytes], opened: _Map) -> bool:
    """Give up the record that was put first; whether there was one."""
    with txn.cursor(opened.order) as cursor:
        if not cursor.first():
            return False
        oldest = cursor.key()
        cursor.delete()
    txn.delete(oldest[8:], db=opened.values)
    return True


def _live_bytes(txn: lmdb.Transaction[bytes], opened: _Map) -> int:
    """The bytes of the pages in use."""
    total = 0
    for database in (opened.values, opened.order):
        counts = txn.stat(database)
        total += counts["psize"] * (counts["branch_pages"] + counts["leaf_pages"] + counts["overflow_pages"])
    return total


def _check_owner(folder: Path) -> None:
    """Raise `SpecError` where another user could plant answers."""
    about = folder.stat()
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SpecError(
            f"others may write to this folder (owner {about.st_uid}, mode {stat.S_IMODE(about.st_mode):04o}), and so "
            "say what models answer: expected one of this user alone; name a folder that is not there yet",
            path=str(folder),
        )


# LMDB must not open a file twice in one process.
_OPEN: dict[Path, _File] = {}
_OPEN_LOCK = threading.Lock()


def _opened(path: Path, max_bytes: int) -> _File:
    place = path.resolve()
    with _OPEN_LOCK:
        file = _OPEN.get(place)
        if file is None or file.pid != os.getpid():
            file = _OPEN[place] = _File(place, max_bytes)
        file.users += 1
        return file


def _release(file: _File) -> None:
    with _OPEN_LOCK:
        file.users -= 1
        if file.users == 0:
            if _OPEN.get(file.path) is file:
                del _OPEN[file.path]
            file.close()
