from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.contracts.errors import StoreError
from tasks.stores.local import LocalStore

NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that any user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root ignores permissions, so it becomes somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def full_disk(size_bytes: int) -> Iterator[None]:
    """Every write past `size_bytes` fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_read_only_folder_is_refused_with_a_remedy(shared: Path) -> None:
    """Neither artifacts nor documents can be written, and nothing is left."""
    root = shared / "store"
    root.mkdir()
    root.chmod(0o555)
    source = shared / "model.onnx"
    source.write_bytes(b"weights")
    store = LocalStore(root)
    with without_privileges():
        with pytest.raises(StoreError, match=r"cannot be stored in .*Permission denied.*Make the folder writable"):
            store.put(source, kind="engine")
        with pytest.raises(StoreError, match=r"runs/a.json cannot be written in .*Permission denied.*REQUANT_STORE"):
            store.write_text("runs/a.json", "{}")
    assert files_below(root) == []


def test_an_unreadable_document_is_not_taken_for_a_missing_one(shared: Path) -> None:
    """None means that there is none, not that it is forbidden."""
    store = LocalStore(shared / "store")
    store.write_text("runs/a.json", "{}")
    (shared / "store/runs").chmod(0o000)
    with without_privileges():
        with pytest.raises(StoreError, match="cannot be read"):
            store.read_text("runs/a.json")
        with pytest.raises(StoreError, match="cannot be listed"):
            store.list("runs/")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A write that breaks off half-way keeps the old document and no half of the new one."""
    store = LocalStore(tmp_path / "store")
    store.write_text("runs/a.json", "old")
    source = tmp_path / "model.onnx"
    source.write_bytes(b"w" * 100_000)
    with full_disk(10_000):
        with pytest.raises(StoreError, match=r"cannot be stored in .*too large"):
            store.put(source, kind="engine")
        with pytest.raises(StoreError, match=r"runs/a.json cannot be written"):
            store.write_text("runs/a.json", "x" * 100_000)
    assert store.read_text("runs/a.json") == "old"
    assert files_below(tmp_path / "store") == [tmp_path / "store/runs/a.json"]


def test_a_full_disk_leaves_no_half_of_a_fetched_file(tmp_path: Path) -> None:
    """The folder that is fetched into stays empty."""
    source = tmp_path / "model.onnx"
    source.write_bytes(b"w" * 100_000)
    store = LocalStore(tmp_path / "store")
    ref = store.put(source, kind="engine")
    with full_disk(10_000), pytest.raises(StoreError, match=r"cannot be copied to .*too large.*Check the room"):
        store.fetch(ref, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A parent that is a file, or that takes no folders, is one clear error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"A file stands where a folder is needed"):
        LocalStore(tmp_path / "file" / "store").write_text("a", "")
    with pytest.raises(StoreError, match=r"a cannot be written in /proc/store: "):
        LocalStore(Path("/proc/store")).write_text("a", "")


def test_damage_in_the_store_is_found_when_fetched(tmp_path: Path) -> None:
    """A flipped bit of the right size passes `holds`, not `fetch`."""
    source = tmp_path / "model.onnx"
    source.write_bytes(b"weights")
    store = LocalStore(tmp_path / "store")
    ref = store.put(source, kind="engine")
    store.local_path(ref).write_bytes(b"weightS")
    assert store.holds(ref)
    with pytest.raises(StoreError, match="is damaged"):
        store.fetch(ref, tmp_path / "out")


def test_bytes_cut_short_are_stored_again(tmp_path: Path) -> None:
    """`put` mends an object that lost its end."""
    source = tmp_path / "model.onnx"
    source.write_bytes(b"weights")
    store = LocalStore(tmp_path / "store")
    stored = store.local_path(store.put(source, kind="engine"))
    stored.write_bytes(b"wei")
    store.put(source, kind="engine")
    assert stored.read_bytes() == b"weights"


def test_local_path_is_the_stored_file_itself(tmp_path: Path) -> None:
    """Reading in place copies nothing; a missing or shortened artifact is an error."""
    source = tmp_path / "model.onnx"
    source.write_bytes(b"weights")
    store = LocalStore(tmp_path / "store")
    ref = store.put(source, kind="engine")
    path = store.local_path(ref)
    assert path == tmp_path / "store" / ref.key
    path.write_bytes(b"wei")
    with pytest.raises(StoreError, match="is not in"):
        store.local_path(ref)


def test_half_written_files_are_not_listed(tmp_path: Path) -> None:
    """What a killed process left behind is no key."""
    store = LocalStore(tmp_path / "store")
    store.write_text("runs/a.json", "{}")
    (tmp_path / "store/runs/.0123.partial").write_text("{")
    assert store.list("") == ["runs/a.json"]


def test_half_written_files_are_removed_when_they_are_old(tmp_path: Path) -> None:
    """What may still be written stays; so does the lock of a document, which another process may hold."""
    store = LocalStore(tmp_path / "store")
    assert store.remove_leftovers() == 0
    store.write_if("release.json", "1", None)
    for name, age_s in ((".old.partial", 2 * 86400), (".new.partial", 0)):
        (tmp_path / "store" / name).write_text("{")
        os.utime(tmp_path / "store" / name, times=(time.time() - age_s,) * 2)
    assert store.remove_leftovers() == 1
    assert {path.name for path in files_below(tmp_path / "store")} == {
        "release.json", ".release.json.lock", ".new.partial"
    }  # fmt: skip


def test_a_document_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are named, not replaced."""
    store = LocalStore(tmp_path / "store")
    store.write_text("runs/a.json", "{}")
    (tmp_path / "store/runs/a.json").write_bytes(b"\xff")
    with pytest.raises(StoreError, match=r"runs/a.json in .* is not UTF-8"):
        store.read_text("runs/a.json")
