"""A store holds artifacts, named by their content, and small named documents.

An adapter knows bytes and keys only; names, digests and whole-or-nothing files are settled here, once for all adapters.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tasks.contracts.errors import StoreError
from tasks.contracts.records import ArtifactRef
from tasks.stores.workspace import replacing

Keys: TypeAlias = list[str]  # inside Store, `list` is a method

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=@+-]*"  # no part starts with a dot: `..` is out, and so are half-written files
_KEY = re.compile(rf"{_PART}(/{_PART})*")
_PREFIX = re.compile(rf"({_PART}/)*({_PART})?")


class Store(ABC):
    """Safe for many processes at once. Every method raises StoreError when storage misbehaves."""

    def put(self, path: Path, *, kind: str) -> ArtifactRef:
        """Keep the bytes of `path` as `objects/<kind>/<sha256><suffix>`. Bytes that are there are not sent again."""
        sha256, size_bytes = _digest(path)
        key = _checked(f"objects/{kind}/{sha256}{path.suffix}")
        ref = ArtifactRef(key=key, sha256=sha256, size_bytes=size_bytes)
        if not self.holds(ref):
            self._upload(path, key)
        return ref

    def fetch(self, ref: ArtifactRef, into: Path) -> Path:
        """Copy an artifact to the folder `into`, made if missing. A file under the final name has the right sha256."""
        key = _checked(ref.key)
        target = into / Path(key).name
        try:
            into.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial:
                self._download(key, partial)
                found, _ = _digest(partial)
                if found != ref.sha256:
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
        return self._size(_checked(ref.key)) == ref.size_bytes

    def write_text(self, key: str, text: str) -> None:
        """Put a small document under a name of its own; readers see the old one or the new one, never a mixture."""
        self._write(_checked(key), text.encode())

    def read_text(self, key: str) -> str | None:
        """The document, or None if there is none."""
        stored = self._read(_checked(key))
        try:
            return None if stored is None else stored.decode()
        except UnicodeDecodeError as error:
            raise StoreError(f"{key} in {self} is not UTF-8 text.", remedy="Delete it or restore it.") from error

    def list(self, prefix: str) -> Keys:
        """All keys that start with `prefix`, sorted. `steps/` is what lies in a folder; an empty prefix is all."""
        if not _PREFIX.fullmatch(prefix):
            raise StoreError(f"{prefix!r} is not the start of a key.", remedy="Use parts such as steps/.")
        return sorted(self._keys(prefix))

    @abstractmethod
    def __str__(self) -> str:
        """Where the store is, for messages."""

    @abstractmethod
    def _upload(self, path: Path, key: str) -> None: ...

    @abstractmethod
    def _download(self, key: str, path: Path) -> None: ...

    @abstractmethod
    def _size(self, key: str) -> int | None: ...

    @abstractmethod
    def _write(self, key: str, content: bytes) -> None: ...

    @abstractmethod
    def _read(self, key: str) -> bytes | None: ...

    @abstractmethod
    def _keys(self, prefix: str) -> Keys: ...


def open_store(url: str) -> Store:
    """The store at a folder's path or file:// URL.

    Raises:
        StoreError: if the URL is of another kind.
    """
    from tasks.stores.local import LocalStore  # an adapter knows this module, so it is loaded late

    parts = urlsplit(url)
    if "://" not in url and url:
        return LocalStore(Path(url).expanduser().absolute())
    if parts.scheme == "file" and not parts.netloc and parts.path:
        return LocalStore(Path(url2pathname(parts.path)))
    raise StoreError(
        f"No store can be opened at {url!r}.",
        remedy="Set REQUANT_STORE to a folder: a path, or file:// with an absolute path.",
    )


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> tuple[str, int]:
    try:
        return sha256_of(path), path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.", remedy="Name a file that can be read.") from error


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise StoreError(
            f"{key!r} is not a key.",
            remedy="A key is parts joined by /; a part has letters, digits and _.=@+-, and no dot in front.",
        )
    return key
