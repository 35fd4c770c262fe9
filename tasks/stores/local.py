"""A folder as a store: the default on one machine, and the double in tests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tasks.contracts.errors import StoreError
from tasks.contracts.records import ArtifactRef
from tasks.stores.base import Content, Entries, Entry, Store, sha256_of
from tasks.stores.workspace import replacing

_REMEDIES = {
    errno.ENOSPC: "Free some space, or set REQUANT_STORE to another disk.",
    errno.EDQUOT: "Free some space, or set REQUANT_STORE to another disk.",
    errno.EFBIG: "Raise the limit of file sizes, or set REQUANT_STORE to another disk.",
    errno.EACCES: "Make the folder writable for this user, or set REQUANT_STORE to another.",
    errno.EPERM: "Make the folder writable for this user, or set REQUANT_STORE to another.",
    errno.EROFS: "The disk is mounted read-only; set REQUANT_STORE to another.",
    errno.EEXIST: "A file stands where a folder is needed; set REQUANT_STORE to a folder.",
    errno.ENOTDIR: "A file stands where a folder is needed; set REQUANT_STORE to a folder.",
}


class LocalStore(Store):
    """Keys are paths below `root`, which is made with the first write."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def local_path(self, ref: ArtifactRef) -> Path:
        """The artifact where it lies, for reading in place. It must not be changed; its digest is not checked."""
        if not self.holds(ref):
            raise self._missing(ref.key)
        return self._root / ref.key

    def _upload(self, path: Path, key: str, content: Content) -> None:  # noqa: ARG002 a folder keeps it in the name alone
        with self._errors("cannot be stored", key), replacing(self._made(key)) as partial:
            shutil.copyfile(path, partial)

    def _download(self, key: str, path: Path) -> str:
        try:
            shutil.copyfile(self._root / key, path)
        except FileNotFoundError:
            raise self._missing(key) from None
        return sha256_of(path)

    def _entry(self, key: str) -> Entry | None:
        with self._errors("cannot be looked up", key):
            try:
                found = (self._root / key).stat()
            except FileNotFoundError:
                return None
        return Entry(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def _renew(self, key: str) -> bool:
        with self._errors("cannot be renewed", key):
            try:
                os.utime(self._root / key)
            except FileNotFoundError:
                return False
        return True

    def _write(self, key: str, content: bytes) -> None:
        with self._errors("cannot be written", key), replacing(self._made(key)) as partial:
            partial.write_bytes(content)

    def _read(self, key: str) -> tuple[bytes, str] | None:
        with self._errors("cannot be read", key):
            try:
                content = (self._root / key).read_bytes()
            except FileNotFoundError:
                return None
        return content, _version(content)

    def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None:
        name = f".{Path(key).name}.lock"
        with self._errors("cannot be written", key), self._made(key).with_name(name).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when closed, also by a kill
            found = self._read(key)
            if (found and found[1]) != expected:
                return None
            self._write(key, content)
        return _version(content)

    def _delete(self, key: str) -> None:
        with self._errors("cannot be deleted", key):
            (self._root / key).unlink(missing_ok=True)

    def _entries(self, prefix: str) -> Entries:
        start = self._root / prefix.rpartition("/")[0]  # folders beside the prefix are not walked
        with self._errors("cannot be listed", prefix):
            keys = [
                (Path(folder) / name).relative_to(self._root).as_posix()
                for folder, _, names in os.walk(start, onerror=_unless_missing)
                for name in names
            ]
        entries = (self._entry(key) for key in keys if key.startswith(prefix))
        return [entry for entry in entries if entry is not None]  # None if deleted meanwhile

    def _remove_leftovers(self, before: datetime) -> int:
        removed = 0
        with self._errors("cannot be cleaned up", "."):
            for partial in self._root.rglob(".*.partial"):
                with suppress(FileNotFoundError):  # finished meanwhile
                    if partial.stat().st_mtime < before.timestamp():
                        partial.unlink()
                        removed += 1
        return removed

    def compare_and_set(self) -> str:
        return "lock files"

    def _made(self, key: str) -> Path:
        target = self._root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _missing(self, key: str) -> StoreError:
        return StoreError(f"{key} is not in {self}.", remedy="Run again: the step that makes it will redo it.")

    @contextmanager
    def _errors(self, problem: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "Check the folder, or set REQUANT_STORE to another.")
            raise StoreError(f"{key} {problem} in {self}: {error.strerror}.", remedy=remedy) from error


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # nothing stored yet, or removed while we look
        raise error


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
