"""What every store promises. A new adapter adds itself to the fixture and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks.contracts.errors import StoreError
from tasks.contracts.records import ArtifactRef
from tasks.stores import base
from tasks.stores.base import Store, open_store, sha256_of
from tests.tasks.stores.faulty_proxy import faulty, no_conditions

ABSENT = ArtifactRef(key="objects/engine/none.onnx", sha256="0" * 64, size_bytes=3)


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    url: str = request.getfixturevalue("s3_url")
    return url


@pytest.fixture(params=["local", "s3", "s3 without conditional writes"])
def releases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for documents that are compared and set."""
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    url: str = request.getfixturevalue("s3_url")
    if request.param == "s3":
        yield url
        return
    upstream = request.getfixturevalue("s3_server").url
    with faulty(upstream, no_conditions) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUANT_S3_ENDPOINT", endpoint)
        yield url


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def a_file(folder: Path, content: bytes = b"weights", name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_what_is_put_comes_back_byte_for_byte(store: Store, tmp_path: Path) -> None:
    """`fetch` gives the bytes of `put`, in a folder that it makes."""
    content = bytes(range(256)) * 4097
    ref = store.put(a_file(tmp_path, content), kind="engine")
    fetched = store.fetch(ref, tmp_path / "a" / "b")
    assert fetched.read_bytes() == content
    assert fetched.parent == tmp_path / "a" / "b"
    assert ref.size_bytes == len(content)


def test_the_key_says_the_content(store: Store, tmp_path: Path) -> None:
    """The key is made of kind, digest and suffix, so equal bytes have one key whatever their name."""
    first = store.put(a_file(tmp_path, name="one.onnx"), kind="engine")
    second = store.put(a_file(tmp_path, name="two.onnx"), kind="engine")
    assert first == second
    assert first.key == f"objects/engine/{sha256_of(tmp_path / 'one.onnx')}.onnx"
    assert store.list("") == [first.key]


def test_an_empty_file_is_an_artifact(store: Store, tmp_path: Path) -> None:
    """No bytes are content too."""
    ref = store.put(a_file(tmp_path, b""), kind="log")
    assert ref.size_bytes == 0
    assert store.holds(ref)
    assert store.fetch(ref, tmp_path / "out").read_bytes() == b""


def test_holds_says_what_is_there(store: Store, tmp_path: Path) -> None:
    """Presence means the full size under that key."""
    ref = store.put(a_file(tmp_path), kind="engine")
    assert store.holds(ref)
    assert not store.holds(ref.model_copy(update={"size_bytes": ref.size_bytes + 1}))
    assert not store.holds(ABSENT)


def test_a_wrong_digest_leaves_nothing(store: Store, tmp_path: Path) -> None:
    """Bytes other than the named ones are refused and not left under the final name, nor under another."""
    ref = store.put(a_file(tmp_path), kind="engine").model_copy(update={"sha256": "0" * 64})
    with pytest.raises(StoreError, match=r"is damaged: its sha256 is [0-9a-f]{64}, expected 0{64}.*makes it again"):
        store.fetch(ref, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_artifact_is_named(store: Store, tmp_path: Path) -> None:
    """The error says which key is not there and what brings it back."""
    with pytest.raises(StoreError, match=r"objects/engine/none.onnx is not in .*Run again"):
        store.fetch(ABSENT, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_source_is_named(store: Store, tmp_path: Path) -> None:
    """A path that holds no file cannot be put."""
    with pytest.raises(StoreError, match=r"gone.onnx cannot be read: No such file"):
        store.put(tmp_path / "gone.onnx", kind="engine")
    assert store.list("") == []


def test_documents_are_read_as_written_and_replaced(store: Store) -> None:
    """A document is None until written; the last writer wins."""
    assert store.read_text("runs/a.json") is None
    store.write_text("runs/a.json", "ä €\r\n")
    assert store.read_text("runs/a.json") == "ä €\r\n"
    store.write_text("runs/a.json", "")
    assert store.read_text("runs/a.json") == ""


def test_list_gives_sorted_keys_by_prefix(store: Store) -> None:
    """A prefix is the start of a key, whether or not it ends at a folder."""
    for key in ("steps/b/2.json", "steps/a/1.json", "steps/ab/3.json", "runs/1.json"):
        store.write_text(key, "{}")
    assert store.list("steps/a") == ["steps/a/1.json", "steps/ab/3.json"]
    assert store.list("steps/a/") == ["steps/a/1.json"]
    assert store.list("steps/a/1.json") == ["steps/a/1.json"]
    assert store.list("") == ["runs/1.json", "steps/a/1.json", "steps/ab/3.json", "steps/b/2.json"]
    assert store.list("nothing/") == []


def test_entries_tell_size_and_age(store: Store, tmp_path: Path) -> None:
    """The same keys as in a list, each with its bytes and when it was written; one alone can be asked too."""
    ref = store.put(a_file(tmp_path), kind="engine")
    store.write_text("runs/a.json", "{}")
    entries = store.entries("")
    assert [(entry.key, entry.size_bytes) for entry in entries] == [(ref.key, 7), ("runs/a.json", 2)]
    assert all(abs(datetime.now(UTC) - entry.modified) < timedelta(minutes=1) for entry in entries)
    assert store.entry(ref.key) is not None
    assert store.entry("runs/b.json") is None


def test_what_is_renewed_is_young_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is there in full size; the bytes stay, and what is young is left alone."""
    ref = store.put(a_file(tmp_path), kind="engine")
    stored = store.entry(ref.key)
    time.sleep(1.1)  # lists of S3 tell whole seconds
    assert store.renew(ref)
    assert store.entry(ref.key) == stored
    monkeypatch.setattr(base, "GRACE", timedelta(0))
    assert store.renew(ref)
    renewed = store.entry(ref.key)
    assert stored is not None
    assert renewed is not None
    assert renewed.modified > stored.modified
    assert store.fetch(ref, tmp_path / "out").read_bytes() == b"weights"
    assert not store.renew(ref.model_copy(update={"size_bytes": 6}))
    assert not store.renew(ABSENT)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../b", "a/..", "a//b", "a/", "a\\b", ".hidden", "a/.b", "a\nb", "a\n", "ä"]
)
def test_keys_that_could_leave_the_store_are_refused(store: Store, tmp_path: Path, key: str) -> None:
    """No operation takes a key that is absolute, climbs, hides or is not portable."""
    ref = ArtifactRef(key=key, sha256="0" * 64, size_bytes=1)
    for refused in (
        lambda: store.write_text(key, ""),
        lambda: store.read_text(key),
        lambda: store.write_if(key, "", None),
        lambda: store.delete(key),
        lambda: store.holds(ref),
        lambda: store.renew(ref),
        lambda: store.fetch(ref, tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match="is not a key"):
            refused()
    assert store.list("") == []


def test_kinds_and_prefixes_are_checked_too(store: Store, tmp_path: Path) -> None:
    """A kind or a suffix becomes part of a key, a prefix the start of one."""
    with pytest.raises(StoreError, match="is not a key"):
        store.put(a_file(tmp_path), kind="../up")
    with pytest.raises(StoreError, match="is not a key"):
        store.put(a_file(tmp_path, name="model.on nx"), kind="engine")
    for prefix in ("/", "../", "a/../b", "a\\"):
        with pytest.raises(StoreError, match="is not the start of a key"):
            store.list(prefix)


def test_a_document_is_written_only_over_the_version_that_was_read(releases: str) -> None:
    """None stands for a document that is not there yet; who comes second writes nothing."""
    store = open_store(releases)
    assert store.read_versioned("release.json") is None
    first = store.write_if("release.json", "1", None)
    assert first is not None
    assert store.write_if("release.json", "2", None) is None
    assert store.read_versioned("release.json") == ("1", first)
    second = store.write_if("release.json", "2", first)
    assert store.read_versioned("release.json") == ("2", second)
    assert store.write_if("release.json", "3", first) is None
    assert store.read_text("release.json") == "2"
    store.delete("release.json")
    assert store.write_if("release.json", "3", second) is None
    assert store.list("") == []


def test_what_is_deleted_is_gone(store: Store, tmp_path: Path) -> None:
    """Deleting twice is no error, and what is beside it stays."""
    ref = store.put(a_file(tmp_path), kind="engine")
    store.write_text("runs/a.json", "{}")
    for _ in range(2):
        store.delete(ref.key)
        assert not store.holds(ref)
    assert store.list("") == ["runs/a.json"]
    store.put(a_file(tmp_path), kind="engine")
    assert store.holds(ref)


def test_nothing_is_left_over_where_all_went_well(store: Store, tmp_path: Path) -> None:
    """Removing leftovers removes nothing that is in use, at whatever age."""
    ref = store.put(a_file(tmp_path), kind="engine")
    store.write_if("release.json", "1", None)
    assert store.remove_leftovers(older_than=timedelta(0)) == 0
    assert store.list("") == [ref.key, "release.json"]


def test_it_says_what_compare_and_set_rests_on(releases: str) -> None:
    """In words, for whoever sets it up."""
    said = open_store(releases).compare_and_set()
    assert said == "lock files" or said.startswith(("conditional writes", "lock objects"))


WRITER = """
import sys
from pathlib import Path
from tasks.stores.base import open_store
url, folder, letter = sys.argv[1:]
store = open_store(url)
for turn in range(10):
    source = Path(folder) / f"{letter}.bin"
    source.write_bytes(turn.to_bytes(2, "big") * 200_000)  # both writers put the same bytes in each turn
    ref = store.put(source, kind="engine")
    store.write_text("runs/latest.json", letter * 100_000)
    text = store.read_text("runs/latest.json")
    assert text in ("a" * 100_000, "b" * 100_000), "a mixture was read"
    store.fetch(ref, Path(folder) / f"out-{letter}")
"""


def test_two_processes_may_use_one_store_at_once(url: str, tmp_path: Path) -> None:
    """Two writers of the same keys disturb neither each other nor their readers."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, str(tmp_path), letter], stderr=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert len(open_store(url).list("objects/")) == 10


COUNTER = """
import sys
from tasks.stores.base import open_store
store = open_store(sys.argv[1])
for _ in range(3):
    while True:
        found = store.read_versioned("count.txt")
        text, version = found or ("", None)
        if store.write_if("count.txt", text + sys.argv[2], version) is not None:
            break
"""


def test_no_write_is_lost_in_a_race(releases: str) -> None:
    """Three processes that add to one document: each addition is there once."""
    writers = [
        subprocess.Popen([sys.executable, "-c", COUNTER, releases, letter], stderr=subprocess.PIPE, text=True)
        for letter in "abc"
    ]
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 3, errors
    assert sorted(open_store(releases).read_text("count.txt") or "") == sorted("abc" * 3)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/x", "file://host/x", "file://", "", "s3://", "s3:///prefix", "s3://b", "s3://bucket/../x",
        "s3://bucket/a//b", "s3://bucket/a?versionId=1", "s3://bucket/a#b", "s3://bucket:80/a",
        "s3:/bucket/a", "file:/tmp/a", "s3://[bucket/a",
    ],
)  # fmt: skip
def test_other_urls_are_refused_with_what_is_supported(url: str) -> None:
    """The error names the URL and what a store may be."""
    with pytest.raises(StoreError, match=r"No store can be opened at .*Set REQUANT_STORE to a folder") as caught:
        open_store(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://AKIA:secret@bucket/prefix", "s3://AKIA:sec/secret@bucket/prefix", "s3:/AKIA:secret@bucket/prefix"]
)
def test_secrets_in_a_url_are_not_repeated(url: str) -> None:
    """What stands before an @ is left out of the message, also if a slash in it ends the host."""
    with pytest.raises(StoreError, match=r"s3:\.\.\.") as caught:
        open_store(url)
    assert "AKIA" not in str(caught.value)
    assert "sec" not in str(caught.value)


def test_a_path_and_a_file_url_open_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path counts from the working directory at opening time; a URL may be percent-encoded."""
    monkeypatch.chdir(tmp_path)
    relative = open_store("my store")
    monkeypatch.chdir("/")
    relative.write_text("a", "here")
    assert open_store(str(tmp_path / "my store")).read_text("a") == "here"
    assert open_store((tmp_path / "my store").as_uri()).read_text("a") == "here"
    assert open_store("./s3:/store").list("") == []  # a folder, though its name looks like a URL
