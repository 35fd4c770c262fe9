"""Data and weights in S3, on a real server."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn

from tasks.contracts.errors import DataError, StoreError, TransientStoreError
from tasks.contracts.spec import DataSpec
from tasks.data.manifest import build_manifest
from tasks.data.open_source import open_source
from tasks.data.sources import FileSource
from tasks.data.state import data_state
from tasks.models.origin import weights_digest
from tasks.models.weights import load_weights
from tasks.stores.base import open_store
from tasks.stores.mirror import listing_digest, local_file, local_tree
from tasks.stores.s3 import RANGE_BYTES, S3Store
from tests.disks import mounted
from tests.tasks.stores.faulty_proxy import Exchange, corrupting, counting, faulty
from tests.tasks.stores.s3_server import BUCKET, KMS_KEY, S3Server

Put = Callable[[str, bytes], None]
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc000000301010018dd8db00000"
    "000049454e44ae426082"
)


@pytest.fixture
def put(s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes an object below `s3_url`, as any other program would."""
    monkeypatch.setenv("REQUANT_SCRATCH", str(tmp_path / "scratch"))
    bucket, prefix = urlsplit(s3_url).netloc, urlsplit(s3_url).path.lstrip("/")
    client = s3_server.client()

    def write(name: str, content: bytes) -> None:
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)

    return write


@pytest.fixture
def pets(put: Put, s3_url: str) -> str:
    """A folder of images per class, with other things in it."""
    for name in ("cat/1.png", "cat/2 two.png", "dog/1.png", "dog/ö.png"):
        put(f"pets/{name}", PNG)
    for name in ("readme.txt", "cat/notes.txt", "cat/.hidden.png", "cat/.old/1.png", "../out.png", "dog//1.png"):
        put(f"pets/{name}", b"no image")
    return f"{s3_url}/pets"


def in_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, text=True, capture_output=True)


FETCH = "import sys; from tasks.stores.mirror import local_tree; print(local_tree(sys.argv[1], lambda path: True))"
KILL = """
import os, signal, sys
def kill_at_the_second_image(event, arguments):
    if event == sys.argv[2] and any(str(argument).endswith(".png") for argument in arguments):
        met.append(arguments)
        if len(met) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
met = []
sys.addaudithook(kill_at_the_second_image)
"""


def test_a_folder_of_images_is_a_source(pets: str) -> None:
    """Images of the classes alone, under their own names; nothing leaves the folder."""
    source = open_source(pets)
    assert isinstance(source, FileSource)
    assert source.name == pets
    assert source.class_names == ("cat", "dog")
    assert list(source.names) == ["cat/1.png", "cat/2 two.png", "dog/1.png", "dog/ö.png"]
    assert source.load(1).size == (1, 1)
    assert sorted(path.name for path in source.root.rglob("*.*")) == ["1.png", "1.png", "2 two.png", "ö.png"]


def test_folders_below_a_class_are_its_too(pets: str, put: Put) -> None:
    """In S3 as on a disk."""
    before = data_state(DataSpec(source=pets))
    put("pets/cat/deep/1.png", PNG)
    source = open_source(pets)
    assert list(source.names) == ["cat/1.png", "cat/2 two.png", "cat/deep/1.png", "dog/1.png", "dog/ö.png"]
    assert source.load(2).size == (1, 1)
    assert data_state(DataSpec(source=pets)) != before


def test_what_is_there_is_not_sent_again(
    pets: str, put: Put, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what changed is, and only that is measured again."""
    before = build_manifest(open_source(pets), tmp_path / "manifests")
    requests: list[tuple[str, str]] = []
    with faulty(s3_server.url, counting(requests)) as endpoint:
        monkeypatch.setenv("REQUANT_S3_ENDPOINT", endpoint)
        assert open_source(pets).fingerprint() == open_source(pets).fingerprint()
        assert not [path for method, path in requests if method == "GET" and ".png" in path.partition("?")[0]]
        put("pets/dog/1.png", PNG + b"more")
        put("pets/dog/new.png", PNG)
        requests.clear()
        source, told = open_source(pets), list[int]()
    sent = [path.rpartition("/")[2] for method, path in requests if method == "GET" and "?" not in path]
    assert sorted(sent) == ["1.png", "new.png"]
    after = build_manifest(source, tmp_path / "manifests", lambda done, total: told.append(total))
    assert told == [2]
    assert after["bytes"].tolist() == [*before["bytes"][:2], len(PNG) + 4, len(PNG), len(PNG)]


def test_manifests_and_their_files(pets: str, put: Put, s3_url: str, tmp_path: Path) -> None:
    """The list in S3 or here, its files beside it or elsewhere in S3; a listed file that is missing is named."""
    text = b"path,label\ncat/1.png,a\ndog/1.png,b\n"
    put("pets/list.csv", text)
    put("lists/list.csv", text)
    (tmp_path / "list.csv").write_bytes(text)
    for source in (
        open_source(f"{pets}/list.csv"),
        open_source(f"{s3_url}/lists/list.csv", pets),
        open_source(str(tmp_path / "list.csv"), pets),
    ):
        assert list(source.names) == ["cat/1.png", "dog/1.png"]
        assert source.class_names == ("a", "b")
        assert source.load(0).size == (1, 1)
    put("lists/bad.csv", text + b"cat/none.png,a\n")
    with pytest.raises(DataError, match=r"1 of 3 files are not in .*cat/none\.png"):
        open_source(f"{s3_url}/lists/bad.csv", pets)


def test_weights(put: Put, s3_url: str, tmp_path: Path) -> None:
    """Loaded as tensors alone; their digest is that of the bytes."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    put("w.pth", (tmp_path / "w.pth").read_bytes())
    load_weights(other, f"{s3_url}/w.pth", "linear")
    assert torch.equal(other.weight, model.weight)
    assert weights_digest(f"{s3_url}/w.pth") == weights_digest(str(tmp_path / "w.pth"))
    with pytest.raises(StoreError, match=r"There is no object s3://.*/v\.pth") as caught:
        load_weights(other, f"{s3_url}/v.pth", "linear")
    assert caught.value.remedy


def test_what_is_not_there(put: Put, s3_url: str) -> None:
    """A prefix without images, a bucket that does not exist."""
    with pytest.raises(DataError, match=r"s3://.*/none holds no images"):
        open_source(f"{s3_url}/none")
    with pytest.raises(StoreError, match="the bucket does not exist"):
        open_source("s3://no-such-bucket-here/pets")


def test_an_object_that_vanishes_or_changes_after_it_was_listed(
    put: Put, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    """Gone is final, changed may pass."""
    put("small", b"1")
    put("large", bytes(9 * 2**20))
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    large, small = store.objects("")
    put("small", b"2")
    put("large", b"1" * (9 * 2**20))
    for found in (large, small):
        with pytest.raises(TransientStoreError, match="changes while it is read"):
            store.copy(found, tmp_path / "copy")
    for name in ("small", "large"):
        store.delete(name)
    for found in (large, small):
        with pytest.raises(StoreError, match="is not in s3://"):
            store.copy(found, tmp_path / "copy")


@pytest.mark.parametrize("size_bytes", [100, RANGE_BYTES + 100])
def test_damage_on_the_way_is_found(
    put: Put, s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    """By the sha256 in an object's metadata, or by an ETag that is its MD5. Nothing is kept, and next time it works."""
    content = random.Random(0).randbytes(size_bytes)
    put("w.pth", content)
    (tmp_path / "own.pth").write_bytes(content)
    own = open_store(s3_url).put(tmp_path / "own.pth", kind="weights")

    def corrupting_content(exchange: Exchange) -> bool:
        return exchange.command == "GET" and "list-type" not in exchange.path and corrupting(exchange)

    for name, algorithm in (("w.pth", "md5"), (own.key, "sha256")):
        with faulty(s3_server.url, corrupting_content) as endpoint:
            monkeypatch.setenv("REQUANT_S3_ENDPOINT", endpoint)
            with pytest.raises(TransientStoreError, match=rf"{name} .* is damaged: its {algorithm} is") as caught:
                local_file(f"{s3_url}/{name}")
        assert caught.value.remedy
        assert not list((tmp_path / "scratch/mirror/blobs").iterdir())
        monkeypatch.setenv("REQUANT_S3_ENDPOINT", s3_server.url)
        assert local_file(f"{s3_url}/{name}").read_bytes() == content
        shutil.rmtree(tmp_path / "scratch")


def test_objects_whose_etag_is_no_md5_are_read(put: Put, s3_server: S3Server, s3_url: str) -> None:
    """Those in parts, and those under a key of KMS."""
    client, prefix = s3_server.client(), urlsplit(s3_url).path.lstrip("/")
    content = random.Random(0).randbytes(RANGE_BYTES + 100)
    name: dict[str, Any] = {"Bucket": BUCKET, "Key": f"{prefix}/parts"}
    upload = client.create_multipart_upload(**name)["UploadId"]
    etag = client.upload_part(**name, UploadId=upload, PartNumber=1, Body=content)["ETag"]
    client.complete_multipart_upload(
        **name, UploadId=upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]}
    )
    client.put_object(
        Bucket=BUCKET, Key=f"{prefix}/kms", Body=content, ServerSideEncryption="aws:kms", SSEKMSKeyId=KMS_KEY
    )
    for key in ("parts", "kms"):
        assert local_file(f"{s3_url}/{key}").read_bytes() == content


def test_the_cache_keeps_its_bound(put: Put, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used longest ago goes; what a process uses stays; what never fits is refused."""
    for name in ("first", "second", "third"):
        put(f"{name}/cat/1.png", name[0].encode() * 400_000)
    monkeypatch.setenv("REQUANT_CACHE_GIB", str(900_000 / 2**30))
    first, second = (Path(in_process(FETCH, f"{s3_url}/{name}").stdout.strip()) for name in ("first", "second"))
    assert first.is_dir()
    mine = local_tree(f"{s3_url}/third", lambda path: True)
    assert not first.exists()
    assert second.is_dir()
    third_of_another = Path(in_process(FETCH, f"{s3_url}/first").stdout.strip())
    assert (mine / "cat/1.png").stat().st_size == 400_000
    assert not second.exists()
    assert third_of_another == first
    assert first.is_dir()
    assert len(list((tmp_path / "scratch/mirror/blobs").iterdir())) == 2
    monkeypatch.setenv("REQUANT_CACHE_GIB", str(100_000 / 2**30))
    with pytest.raises(StoreError, match="more than the cache's") as caught:
        local_tree(f"{s3_url}/second", lambda path: True)
    assert "REQUANT_CACHE_GIB" in caught.value.remedy


def killed(event: str, url: str) -> None:
    """A process that fetches `url` is killed before it does to a second image what `event` says."""
    run = subprocess.run([sys.executable, "-c", KILL + FETCH, url, event], check=False, text=True, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_a_tree_is_whole_though_its_removal_was_killed(
    put: Put, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it is not taken for the data."""
    for name in ("first", "second"):
        for number in range(3):
            put(f"{name}/cat/{number}.png", f"{name}{number}".encode() * 40_000)
    monkeypatch.setenv("REQUANT_CACHE_GIB", str(1_000_000 / 2**30))
    first = Path(in_process(FETCH, f"{s3_url}/first").stdout.strip())
    killed("os.remove", f"{s3_url}/second")
    assert Path(in_process(FETCH, f"{s3_url}/first").stdout.strip()) == first
    assert sorted(path.name for path in first.rglob("*.png")) == ["0.png", "1.png", "2.png"]


def test_what_killed_processes_left_goes(
    put: Put, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their half-made trees would hold blobs for good."""
    mirror = tmp_path / "scratch/mirror"
    for name in ("first", "second"):
        for number in range(2):
            put(f"{name}/cat/{number}.png", f"{name}{number}".encode() * 40_000)
    monkeypatch.setenv("REQUANT_CACHE_GIB", str(600_000 / 2**30))
    killed("os.link", f"{s3_url}/first")
    (mirror / "blobs/.of-a-killed-download.partial").touch()
    assert len(list(mirror.glob("trees/.*.partial"))) == 1
    in_process(FETCH, f"{s3_url}/second")
    assert not list(mirror.glob("*/.*.partial"))
    assert len(list((mirror / "blobs").iterdir())) == 2


def test_room_is_made_before_it_is_needed(
    put: Put, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that cannot hold the old data and the new takes the new; what is shared by both is not sent again."""
    for number in range(4):
        put(f"pets/cat/{number}.png", f"old{number}".encode() * 50_000)
    with mounted(tmp_path / "scratch", "size=1200k"):
        for bound in (900_000, 10 * 2**30):  # first the cache is full, then the disk
            monkeypatch.setenv("REQUANT_CACHE_GIB", str(bound / 2**30))
            old = Path(in_process(FETCH, f"{s3_url}/pets").stdout.strip())
            kept = (old / "cat/0.png").stat().st_ino
            for number in range(1, 4):
                put(f"pets/cat/{number}.png", f"{bound}{number}".encode() * (200_000 // len(f"{bound}{number}")))
            new = Path(in_process(FETCH, f"{s3_url}/pets").stdout.strip())
            assert not old.exists()
            assert len(list(new.rglob("*.png"))) == 4
            assert (new / "cat/0.png").stat().st_ino == kept


def test_several_processes_at_once(put: Put, s3_url: str, tmp_path: Path) -> None:
    """All get the same whole folder, and nothing half-written stays."""
    for number in range(40):
        put(f"many/cat/{number}.png", PNG)
    with ThreadPoolExecutor(4) as pool:
        trees = {run.stdout for run in pool.map(lambda _: in_process(FETCH, f"{s3_url}/many"), range(4))}
    (tree,) = trees
    assert len(list(Path(tree.strip()).rglob("*.png"))) == 40
    assert not list((tmp_path / "scratch").rglob("*.partial"))


def test_a_full_disk_is_one_clear_error(put: Put, s3_url: str, tmp_path: Path) -> None:
    """Nothing half-written stays, and with room it works."""
    put("large/cat/1.png", bytes(200_000))
    with mounted(tmp_path / "scratch", "size=100k"):
        with pytest.raises(StoreError, match="No space left") as caught:
            local_tree(f"{s3_url}/large", lambda path: True)
        assert "REQUANT_SCRATCH" in caught.value.remedy
        assert not list((tmp_path / "scratch").rglob("*.partial"))


def test_a_full_or_read_only_scratch_is_one_clear_error(
    pets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REQUANT_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="cannot be written") as caught:
        local_file(f"{pets}/readme.txt")
    assert "REQUANT_SCRATCH" in caught.value.remedy


def test_a_listing_tells_of_changes_and_nothing_is_fetched(pets: str, put: Put, s3_url: str, tmp_path: Path) -> None:
    """New content, a new object, and one that is gone; not what is unwanted, and not what lies beside."""
    put("weights.pth", b"1")

    def digests() -> list[str]:
        return [listing_digest(pets, lambda path: path.endswith(".png")), listing_digest(f"{s3_url}/weights.pth")]

    states = [digests()]
    put("pets/readme.txt", b"other")
    put("pets2/cat/1.png", PNG)
    put("weights.pth.bak", b"1")
    assert digests() == states[0]
    put("pets/cat/1.png", PNG + b"\0")
    states.append(digests())
    put("pets/cat/3.png", PNG)
    put("weights.pth", b"2")
    states.append(digests())
    data, weights = (set(column) for column in zip(*states, strict=True))
    assert (len(data), len(weights)) == (3, 2)
    assert not (tmp_path / "scratch").exists()


def test_keys_may_hold_any_character(put: Put, s3_url: str) -> None:
    """Neither # nor ? ends an address, nor does % stand for another character."""
    for name in ("w", "w#2.pth", "w?v=2.pth", "w%202.pth"):
        put(name, b"1")
        put(f"{name}/a/1.png", name.encode())
    for name in ("w#2.pth", "w?v=2.pth", "w%202.pth"):
        url = f"{s3_url}/{name}"
        before = listing_digest(url)
        put(name, b"22")
        assert listing_digest(url) != before
        assert local_file(url).read_bytes() == b"22"
        assert (local_tree(url, lambda path: path == "a/1.png") / "a/1.png").read_bytes() == name.encode()
        assert local_file(f"{url}/a/1.png").read_bytes() == name.encode()


@pytest.mark.parametrize("url", ["s3://AKIA:secret@bucket/w.pth", "s3://AKIA:sec/secret@bucket/w.pth", "s3:///w.pth"])
def test_an_address_without_a_bucket_is_refused(url: str) -> None:
    """It is the address of data or weights that is wrong, and a secret in it is not repeated."""
    readers: list[Callable[[str], object]] = [local_file, listing_digest, lambda url: local_tree(url, lambda _: True)]
    for read in readers:
        with pytest.raises(StoreError, match=r"^s3:.* names no bucket.* data or weights") as caught:
            read(url)
        assert "REQUANT_STORE" not in str(caught.value)
        assert "AKIA" not in str(caught.value)
        assert "sec" not in str(caught.value)
