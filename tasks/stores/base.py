"""A store holds artifacts, named by their content, and small named documents.

An adapter knows bytes and keys only; names, digests and whole-or-nothing files are settled here, once for all adapters.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.request import url2pathname

from pydantic import ValidationError

from tasks.contracts.errors import StoreError
from tasks.contracts.records import ArtifactRef
from tasks.contracts.settings import S3Settings
from tasks.stores.workspace import resuming

Keys: TypeAlias = list[str]  # inside Store, `list` is a method
Texts: TypeAlias = list[str | None]
DOCUMENTS_AT_ONCE = 16  # small ones: what takes time is the way to the server
GRACE = timedelta(days=7)  # what was stored or renewed within it is not collected; a run may take half of it

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=@+-]*"  # no part starts with a dot: `..` is out, and so are half-written files
_KEY = re.compile(rf"{_PART}(/{_PART})*")
_PREFIX = re.compile(rf"({_PART}/)*({_PART})?")
_SCHEME = re.compile(r"[^/]+:/")  # also of a URL that lacks a slash; a folder named so is written ./name:
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class Entry(NamedTuple):
    """What a list tells of an artifact or a document."""

    key: str
    size_bytes: int
    modified: datetime  # by the clock of the store, with its zone


Entries: TypeAlias = list[Entry]


class Content(NamedTuple):
    """What a file holds, by its digests. The parts are those in which the adapter sends it, none if it goes whole."""

    sha256: str
    size_bytes: int
    parts: tuple[str, ...] = ()


class Versioned(NamedTuple):
    """A document, and the version to hand to `write_if`. Equal texts may have equal versions."""

    text: str
    version: str


class Store(ABC):
    """Safe for many processes at once. Every method raises StoreError when storage misbehaves."""

    def put(self, path: Path, *, kind: str) -> ArtifactRef:
        """Keep the bytes of `path` as `objects/<kind>/<sha256><suffix>`. Bytes that are there are not sent again."""
        try:
            content = self._content(path)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read: {error.strerror}.", remedy="Name a file that can be read."
            ) from error
        key = _checked(f"objects/{kind}/{content.sha256}{path.suffix}")
        ref = ArtifactRef(key=key, sha256=content.sha256, size_bytes=content.size_bytes)
        if not self.renew(ref):
            self._upload(path, key, content)
        return ref

    def fetch(self, ref: ArtifactRef, into: Path) -> Path:
        """Copy an artifact to the folder `into`, made if missing. A file under the final name has the right sha256.

        Where a fetch into the same folder was broken off, it goes on from there.
        """
        key = _checked(ref.key)
        target = into / Path(key).name
        try:
            into.mkdir(parents=True, exist_ok=True)
            with resuming(target) as partial:
                for _ in range(2):  # damage on the way, or in what was left behind, is mended by starting over
                    found = self._download(key, partial)
                    if found == ref.sha256:
                        break
                    os.truncate(partial, 0)
                else:
                    raise StoreError(
                        f"{key} in {self} is damaged: its sha256 is {found}, expected {ref.sha256}.",
                        remedy="Delete it; the next run makes it again.",
                    )
        except OSError as error:
            raise StoreError(
                f"{key} cannot be copied to {into}: {error.strerror}.", remedy="Check the room and the rights there."
            ) from error
        return target

    def holds(self, ref: ArtifactRef) -> bool:
        """True if the artifact is there in its full size. The digest is checked by `fetch`."""
        entry = self.entry(ref.key)
        return entry is not None and entry.size_bytes == ref.size_bytes

    def renew(self, ref: ArtifactRef) -> bool:
        """Like `holds`; what is there counts as newly stored, so that nobody collects it from under a run."""
        entry = self.entry(ref.key)
        if entry is None or entry.size_bytes != ref.size_bytes:
            return False
        return datetime.now(UTC) - entry.modified < GRACE / 2 or self._renew(ref.key)

    def entry(self, key: str) -> Entry | None:
        """Size and age; None if there is nothing under this key."""
        return self._entry(_checked(key))

    def write_text(self, key: str, text: str) -> None:
        """Put a small document under a name of its own; readers see the old one or the new one, never a mixture."""
        self._write(_checked(key), text.encode())

    def read_text(self, key: str) -> str | None:
        """The document, or None if there is none."""
        found = self.read_versioned(key)
        return None if found is None else found.text

    def read_texts(self, keys: Sequence[str]) -> Texts:
        """The documents in the order of their keys, read side by side."""
        with ThreadPoolExecutor(DOCUMENTS_AT_ONCE) as pool:
            return [*pool.map(self.read_text, keys)]

    def read_versioned(self, key: str) -> Versioned | None:
        """The document and its version, or None if there is none."""
        found = self._read(_checked(key))
        try:
            return None if found is None else Versioned(found[0].decode(), found[1])
        except UnicodeDecodeError as error:
            raise StoreError(f"{key} in {self} is not UTF-8 text.", remedy="Delete it or restore it.") from error

    def write_if(self, key: str, text: str, expected: str | None) -> str | None:
        """Write the document only if its version is still `expected`, or, with None, if there is none yet.

        Of several who try at once, one succeeds. A key that is written this way is written in no other.

        Returns:
            The new version; None if another was first, and nothing is written.

        Raises:
            TransientStoreError: the document may or may not be written; `read_versioned` tells.
        """
        return self._write_if(_checked(key), text.encode(), expected)

    def delete(self, key: str) -> None:
        """Remove an artifact or a document; one that is not there is no error."""
        self._delete(_checked(key))

    def remove_leftovers(self, *, older_than: timedelta = timedelta(days=1)) -> int:
        """Remove what killed processes left half-done, and say how many. Longer than any upload or write may take."""
        return self._remove_leftovers(datetime.now(UTC) - older_than)

    def list(self, prefix: str) -> Keys:
        """All keys that start with `prefix`, sorted. `steps/` is what lies in a folder; an empty prefix is all."""
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Entries:
        """What `list` gives, with sizes and ages."""
        if not _PREFIX.fullmatch(prefix):
            raise StoreError(f"{prefix!r} is not the start of a key.", remedy="Use parts such as steps/.")
        return sorted(entry for entry in self._entries(prefix) if _KEY.fullmatch(entry.key))  # or half-written

    @abstractmethod
    def __str__(self) -> str:
        """Where the store is, for messages."""

    @abstractmethod
    def compare_and_set(self) -> str:
        """What `write_if` rests on here, for people."""

    def _content(self, path: Path) -> Content:
        return Content(sha256_of(path), path.stat().st_size)

    @abstractmethod
    def _upload(self, path: Path, key: str, content: Content) -> None: ...

    @abstractmethod
    def _download(self, key: str, path: Path) -> str:
        """Make the file complete and say its sha256. What it holds already may be taken for the object's beginning."""

    @abstractmethod
    def _entry(self, key: str) -> Entry | None: ...

    @abstractmethod
    def _renew(self, key: str) -> bool:
        """Set the time of an object to now; False if it is gone."""

    @abstractmethod
    def _write(self, key: str, content: bytes) -> None: ...

    @abstractmethod
    def _read(self, key: str) -> tuple[bytes, str] | None:
        """Content and version."""

    @abstractmethod
    def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None: ...

    @abstractmethod
    def _delete(self, key: str) -> None: ...

    @abstractmethod
    def _entries(self, prefix: str) -> Entries: ...

    @abstractmethod
    def _remove_leftovers(self, before: datetime) -> int: ...


def open_store(url: str) -> Store:
    """The store at a folder's path, a file:// URL or s3://bucket/prefix. Nothing is sent to a server yet.

    Raises:
        StoreError: if the URL is of another kind, or a setting of S3 is wrong.
    """
    from tasks.stores.local import LocalStore  # an adapter knows this module, so it is loaded late

    if url and not _SCHEME.match(url):
        return LocalStore(Path(url).expanduser().absolute())
    scheme, _, rest = url.partition("://")
    if scheme == "file" and rest.startswith("/"):
        return LocalStore(Path(url2pathname(rest)))
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if scheme == "s3" and BUCKET.fullmatch(bucket) and _PREFIX.fullmatch(prefix):
        from tasks.stores.s3 import S3Store  # boto3 takes a third of a second to load

        return S3Store(bucket, prefix, _s3_settings())
    raise StoreError(
        f"No store can be opened at {shown(url)!r}.",
        remedy="Set REQUANT_STORE to a folder, a path or file:// with an absolute path, or to s3://bucket/prefix.",
    )


def shown(url: str) -> str:
    """For messages: what stands before an @ may be a secret."""
    return f"{url.partition(':')[0]}:..." if "@" in url else url


def _s3_settings() -> S3Settings:
    try:
        return S3Settings()
    except ValidationError as error:
        problems = "; ".join(
            f"{'REQUANT_S3_' + str(found['loc'][0]).upper() if found['loc'] else 'REQUANT_S3_*'}: {found['msg']}"
            for found in error.errors(include_input=False, include_url=False)
        )
        raise StoreError(f"The settings of S3 are wrong: {problems}.", remedy="Correct or unset them.") from None


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise StoreError(
            f"{key!r} is not a key.",
            remedy="A key is parts joined by /; a part has letters, digits and _.=@+-, and no dot in front.",
        )
    return key
