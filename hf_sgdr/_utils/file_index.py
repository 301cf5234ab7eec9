"""What is known of files without reading them again, beside the stores: `hashes-<machine>.sqlite` in the cache folder.

A word is trusted only while path, size and time of modification are those of then. On disk rather than in memory, so
that a million files cost no more of it than a few, and a second run reads none of them.
"""

import contextlib
import functools
import os
import platform
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers.utils import logging

from hf_sgdr._utils.files import FileIdentity, cache_folder

logger = logging.get_logger(__name__)

_TABLE = """create table if not exists files
    (path blob, size integer, modified integer, kind text, value blob, primary key (path, kind)) without rowid"""
_FIND = "select path, size, modified, value from files where kind = ? and path in"
_AT_ONCE = 500  # of the 999 that every SQLite takes


class FileIndex:
    """One value of each kind for each file.

    Args:
        path (`Path`): of the database. One that cannot be opened or written is replaced by one in memory, which begins
            empty.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = self._open(path)

    def get(self, kind: str, files: Sequence[FileIdentity | None]) -> list[bytes | None]:
        """The value of each file, None where none is known."""
        found: dict[bytes, tuple[int, int, bytes]] = {}
        wanted = [_bytes(file[0]) for file in files if file is not None]
        with self._lock, contextlib.suppress(sqlite3.Error):  # somebody may take the disk away
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                rows = self._connection.execute(f"{_FIND} ({','.join('?' * len(some))})", (kind, *some))
                found.update((path, (size, modified, value)) for path, size, modified, value in rows)
        rows_of = [found.get(_bytes(file[0])) if file else None for file in files]
        pairs = zip(rows_of, files, strict=True)
        return [row[2] if row and file and row[:2] == file[1:] else None for row, file in pairs]

    def put(self, kind: str, values: Iterable[tuple[FileIdentity, bytes]]) -> None:
        """Note values; where the disk does not take them, they are not noted."""
        rows = [(_bytes(path), size, modified, kind, value) for (path, size, modified), value in values]
        if not rows:
            return
        with self._lock, contextlib.suppress(sqlite3.Error), self._connection:
            self._connection.executemany("insert or replace into files values (?, ?, ?, ?, ?)", rows)

    def clear(self) -> None:
        """Forget everything, so that all files are read again."""
        with self._lock, contextlib.suppress(sqlite3.Error), self._connection:
            self._connection.execute("delete from files")

    def _open(self, path: Path) -> sqlite3.Connection:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()  # as the user's umask has it; SQLite would let nobody else write, also in a shared folder
            return _connected(path)
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError):  # damaged: nothing in it counts
                logger.warning(f"{path} is damaged ({error}): beginning it anew.")
                with contextlib.suppress(OSError, sqlite3.Error):
                    path.unlink()
                    return _connected(path)
        except OSError:
            pass
        with contextlib.suppress(sqlite3.Error):  # one that may only be read
            return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        return _connected(":memory:")


def file_index() -> FileIndex:
    """That of this machine and the present cache folder."""
    return _index_at(cache_folder() / f"hashes-{platform.node()}.sqlite", os.getpid())


@functools.lru_cache(maxsize=4)
def _index_at(path: Path, process: int) -> FileIndex:
    """By process: a connection is of no use after a fork."""
    return FileIndex(path)


def _connected(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
    connection.execute(_TABLE)
    connection.commit()
    return connection


def _bytes(path: str) -> bytes:
    return os.fsencode(path)  # a name may be no text
