"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tasks.contracts.errors import StoreError


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
