"""A file of JSON lines that survives whatever kills its writer: what was done before need not be done again."""

import errno
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

__all__ = ["Journal", "JournalError", "TornLineWarning"]


class JournalError(ValueError):
    """A journal cannot be used as asked; one line says why."""


class TornLineWarning(UserWarning):
    """The last line of a journal was cut off, most likely because its writer was killed; it is dropped."""


class Journal:
    """Entries, a JSON object on a line each, in a file that one process at a time may hold.

    A second process is refused; on Windows it is not, and must not be started.

    Args:
        path: of the file, which is made if there is none.

    Attributes:
        entries: what the file held when it was opened.

    Raises:
        JournalError: if the file cannot be opened or is in use, or if it is damaged in more than its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise JournalError(f"cannot open the journal {path}: {error.strerror}") from error
        try:
            self._lock()
            self.entries = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry, in a single write and onto the disk: a kill leaves at most this line torn.

        Raises:
            JournalError: if it cannot be written; no part of a line is left then.
        """
        line = json.dumps(entry).encode() + b"\n"
        try:
            if (written := self._file.write(line)) != len(line):
                self._file.truncate(self._file.tell() - written)  # or the next line would be joined to it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(f"cannot write to the journal {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            # Of the two kinds of lock the one that worker processes do not inherit, and that NFS knows.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise JournalError(f"the journal {self.path} is in use by another process") from error
        except OSError as error:
            raise JournalError(f"cannot lock the journal {self.path}: {error.strerror}") from error

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        entries = [self._entry(number, line) for number, line in enumerate(lines, 1)]
        if torn:
            if torn[:1] != b"{":  # then it is not ours to cut
                raise JournalError(
                    f"the last line of {self.path} is not that of a journal; name another file"
                )
            message = f"the last line of {self.path} was cut off: dropped"
            warnings.warn(message, TornLineWarning, stacklevel=4)
            self._file.truncate(self._file.tell() - len(torn))
        return entries

    def _entry(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise JournalError(
                f"line {number} of {self.path} is not that of a journal; name another file, or mend it"
            )
        return entry
