"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tasks.contracts.errors import StoreError, TransientStoreError


@contextmanager
def workspace(scratch: Path) -> Iterator[Path]:
    """A new folder under `scratch`, removed with all it holds at the end, also after an error.

    Raises:
        StoreError: if the folder cannot be made.
    """
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="work-", dir=scratch)
    except OSError as error:
        raise StoreError(
            f"No work folder can be made in {scratch}: {error.strerror}.",
            remedy="Set REQUANT_SCRATCH to a writable folder.",
        ) from error
    with folder as path:
        yield Path(path)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`; what is written there takes its place at the end.

    After an error `target` is as it was. The name is its own, as two processes may write the same target at once.
    """
    partial = target.with_name(f".{uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut may leave the new name with no bytes
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def resuming(target: Path) -> Iterator[Path]:
    """Like `replacing`, but a name that is found again: what a stopped process has written is there for the next.

    It is also kept after a TransientStoreError. While one process is at it, others get a name of their own. A power cut
    may leave `target` with no bytes, unlike with `replacing`, so this is for copies that are made anew when needed.
    """
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(held.fileno()), partial.stat())  # not moved into place meanwhile
        except OSError:
            is_ours = False
        if not is_ours:
            with replacing(target) as own:
                yield own
            return
        try:
            yield partial
            partial.replace(target)
        except TransientStoreError:
            raise
        except Exception:
            partial.unlink(missing_ok=True)
            raise
