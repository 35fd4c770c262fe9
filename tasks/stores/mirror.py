"""Data and weights in S3, as files: copied once, by content, into a folder of bounded size that processes share.

<scratch>/mirror/blobs/<digest>        an object as it was listed: named by bucket, key, ETag and size
<scratch>/mirror/trees/<digest>/...    objects under their own names, as hard links to blobs
<scratch>/mirror/trees/<digest>.lock   held shared by every process that uses the tree; its time is the last use
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from uuid import uuid4

from tasks.contracts.errors import StoreError
from tasks.contracts.settings import Settings
from tasks.stores.base import BUCKET, open_store, shown

if TYPE_CHECKING:
    from tasks.stores.s3 import Object, S3Store

SCHEME = "s3://"
DOWNLOADS = 16  # objects at once: many are small, and wait for the server more than for the wire

Progress = Callable[[int, int], None]

_in_use: dict[Path, int] = {}  # descriptors of the locks of trees that this process uses; the system closes them


def is_remote(path: str) -> bool:
    """Whether `path` lies in S3."""
    return path.startswith(SCHEME)


def local_file(url: str) -> Path:
    """The object at s3://bucket/key, as a file of the same name.

    Raises:
        StoreError: if there is none, or it cannot be read, or it is larger than the cache.
    """
    bucket, key = _parts(url)
    folder, _, name = key.rpartition("/")
    tree = _mirrored(f"{SCHEME}{bucket}/{folder}", name, lambda path: path == name, None)
    if not (tree / name).is_file():
        raise StoreError(f"There is no object {url}.", remedy="Mend the address; its last part is the object's name.")
    return tree / name


def local_tree(url: str, wanted: Callable[[str], bool], progress: Progress | None = None) -> Path:
    """The objects under s3://bucket/prefix/ whose path below it is `wanted`, as a folder of files.

    It stays until this process ends, and longer if the cache has room. File times are those of the objects.

    Raises:
        StoreError: if they cannot be listed or read, or are larger than the cache.
    """
    return _mirrored(url, "", wanted, progress)


def listing_digest(url: str, wanted: Callable[[str], bool] = lambda _: True) -> str:
    """SHA-256 that changes with any object below `url` that is `wanted`, or with the one at it. Nothing is fetched.

    Raises:
        StoreError: if they cannot be listed.
    """
    bucket, name = _parts(url)
    prefix = f"{name}/".lstrip("/")
    listed = [
        (item.name, item.etag, item.size_bytes)
        for item in _bucket(bucket).objects(name)
        if item.name == name or (item.name.startswith(prefix) and wanted(item.name.removeprefix(prefix)))
    ]
    return hashlib.sha256(json.dumps([url, listed]).encode()).hexdigest()


def _mirrored(url: str, start: str, wanted: Callable[[str], bool], progress: Progress | None) -> Path:
    """The same, of the paths that begin with `start`."""
    settings = Settings()
    bucket, key = _parts(url)
    store = _bucket(bucket)
    prefix = f"{key}/".lstrip("/")
    home = settings.scratch / "mirror"
    found = {
        path: item
        for item in store.objects(prefix + start)
        if (path := item.name.removeprefix(prefix)) and _stays_inside(path) and wanted(path)
    }
    identity = [(path, _blob_name(bucket, item)) for path, item in found.items()]
    tree = home / "trees" / hashlib.sha256(json.dumps([url, identity]).encode()).hexdigest()
    with _disk_errors(home):
        for folder in (home / "blobs", home / "trees"):
            folder.mkdir(parents=True, exist_ok=True)
        _use(tree)
        if not tree.is_dir():
            room = int(settings.cache_gib * 2**30)
            sizes = {_blob_name(bucket, item): item.size_bytes for item in found.values()}
            needed = sum(sizes.values())
            if needed > room:
                raise StoreError(
                    f"{url} holds {needed / 2**30:.1f} GiB, more than the cache's {settings.cache_gib:g} GiB.",
                    remedy="Raise REQUANT_CACHE_GIB, or name a smaller part.",
                )
            _make_room(home, room, sizes)
            with (home / "lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # blobs that are in no tree yet must not be taken for leftovers
                _fetch_all(store, bucket, list(found.values()), home / "blobs", progress)
                _build(tree, {path: home / "blobs" / name for path, name in identity})
            _make_room(home, room, {})  # those who fetched at once may have exceeded it
    return tree


def _parts(url: str) -> tuple[str, str]:
    """Bucket and key. A key is any text, so that ? and # do not end it as they would end the path of other URLs."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not BUCKET.fullmatch(bucket):
        raise StoreError(
            f"{shown(url)} names no bucket.",
            remedy="Mend the address of data or weights: s3://bucket/key, without keys of an account.",
        )
    return bucket, key.strip("/")


def _bucket(name: str) -> S3Store:
    return open_store(f"{SCHEME}{name}")  # type: ignore[return-value]


def _stays_inside(path: str) -> bool:
    """Keys are any text; what no folder can hold, or what leads out of one, is passed over."""
    parts = path.split("/")
    return not {"", ".", ".."} & set(parts) and "\0" not in path and not PurePosixPath(path).is_absolute()


def _blob_name(bucket: str, item: Object) -> str:
    return hashlib.sha256(json.dumps([bucket, item.name, item.etag, item.size_bytes]).encode()).hexdigest()


def _fetch_all(store: S3Store, bucket: str, items: Sequence[Object], blobs: Path, progress: Progress | None) -> None:
    def fetch(item: Object) -> None:
        final = blobs / _blob_name(bucket, item)
        if final.exists():
            return
        partial = blobs / f".{uuid4().hex}.partial"
        try:
            store.copy(item, partial)
            os.utime(partial, (item.modified.timestamp(),) * 2)
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)

    pool = ThreadPoolExecutor(DOWNLOADS)
    try:
        for done, _ in enumerate(pool.map(fetch, items), start=1):
            if progress is not None:
                progress(done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)


def _build(tree: Path, blobs: dict[str, Path]) -> None:
    """The tree appears whole; two processes may build the same one."""
    unfinished = _nameless(tree)
    try:
        unfinished.mkdir()
        for path, blob in blobs.items():
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).hardlink_to(blob)
        unfinished.replace(tree)
    except OSError:
        if not tree.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _nameless(tree: Path) -> Path:
    """For a tree that is not whole."""
    return tree.with_name(f".{uuid4().hex}.partial")


def _use(tree: Path) -> None:
    """Keep the tree from being removed while this process lives."""
    lock = tree.with_suffix(".lock")
    while tree not in _in_use:
        held = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
        fcntl.flock(held, fcntl.LOCK_SH)
        if lock.exists() and os.path.samestat(lock.stat(), os.fstat(held)):
            _in_use[tree] = held
        else:
            os.close(held)  # removed with its tree just now
    os.utime(lock)


def _make_room(home: Path, room: int, coming: Mapping[str, int]) -> None:
    """Remove the trees that were not used for longest, and what only they held, until blobs fit into `room` bytes.

    `coming` are sizes of blobs that must fit too, also on the disk. Those that are there stay.
    """
    blobs = home / "blobs"
    with (home / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another process fetches, and makes room at its end
        for partial in home.glob("*/.*.partial"):  # left by killed processes: those that live hold the lock
            shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink()
        locks = sorted((home / "trees").glob("*.lock"), key=lambda lock: lock.stat().st_mtime)
        missing = sum(size for name, size in coming.items() if not (blobs / name).exists())
        while locks and (_size(blobs) + missing > room or shutil.disk_usage(blobs).free < missing):
            _remove(locks.pop(0))
            for blob in blobs.iterdir():
                if blob.name not in coming and blob.stat().st_nlink == 1:  # in no tree, or of a killed process
                    blob.unlink()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _remove(lock: Path) -> None:
    """A tree and its lock, unless a process uses it. It loses its name first: what has one is taken for whole."""
    tree = lock.with_suffix("")
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        nameless = _nameless(tree)
        if tree.is_dir():
            tree.rename(nameless)
        lock.unlink(missing_ok=True)
        shutil.rmtree(nameless, ignore_errors=True)


@contextmanager
def _disk_errors(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{error.filename or home} cannot be written: {error.strerror or error}.",
            remedy="Free space there, or set REQUANT_SCRATCH to a writable folder on a larger disk.",
        ) from error
