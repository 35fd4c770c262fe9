"""What only a store in S3 promises, on a real server; a proxy in front of it makes the faults."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import botocore.exceptions as boto
import pytest

from tasks.contracts.errors import StoreError, TransientStoreError
from tasks.contracts.records import ArtifactRef
from tasks.stores import s3
from tasks.stores.base import open_store, sha256_of
from tasks.stores.s3 import PART_BYTES, RANGE_BYTES
from tests.tasks.stores.faulty_proxy import (
    Exchange,
    Fault,
    corrupting,
    counting,
    cutting,
    dating,
    failing,
    faulty,
    first,
    losing_the_answer,
    no_conditions,
    pausing,
    resetting,
)
from tests.tasks.stores.s3_server import BUCKET, KMS_KEY, S3Server

PUT = "import sys; from pathlib import Path; from tasks.stores.base import open_store\n" + (
    "open_store(sys.argv[1]).put(Path(sys.argv[2]), kind='engine')"
)
FETCH = "import sys; from pathlib import Path; from tasks.stores.base import open_store\n" + (
    "from tasks.contracts.records import ArtifactRef\n"
    "open_store(sys.argv[1]).fetch(ArtifactRef.model_validate_json(sys.argv[2]), Path(sys.argv[3]))"
)
Break = Callable[[pytest.MonkeyPatch, S3Server], None]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts and a bit."""
    path = tmp_path_factory.mktemp("large") / "engine.onnx"
    path.write_bytes(random.Random(0).randbytes(3 * PART_BYTES + 4321))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def through(s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Fault], None]]:
    """Lets all further requests of this test go through a fault."""
    monkeypatch.setenv("REQUANT_S3_MAX_ATTEMPTS", "3")
    current: list[Fault] = []

    def switched(exchange: Exchange) -> bool:
        return current[0](exchange)

    with faulty(s3_server.url, switched) as endpoint:

        def set_fault(fault: Fault) -> None:
            current[:] = [fault]
            monkeypatch.setenv("REQUANT_S3_ENDPOINT", endpoint)

        yield set_fault


@pytest.fixture
def short_wait(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for what does not come. Large parts may take longer. `s3_url` comes first: it unsets all."""
    monkeypatch.setenv("REQUANT_S3_READ_TIMEOUT_S", "3")


def prefix_of(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/")


def opened_uploads(server: S3Server, url: str) -> list[str]:
    answer = server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix_of(url))
    return [upload["UploadId"] for upload in answer.get("Uploads", [])]


# Transfers


def test_the_digest_is_recorded_with_every_upload(s3_url: str, s3_server: S3Server, small: Path, large: Path) -> None:
    """As metadata of the object, for any tool to check, however it was sent."""
    store, prefix = open_store(s3_url), prefix_of(s3_url)
    store.write_text("runs/a.json", "{}")
    expected = {store.put(path, kind="engine").key: sha256_of(path) for path in (small, large)}
    for key, sha256 in {**expected, "runs/a.json": hashlib.sha256(b"{}").hexdigest()}.items():
        assert s3_server.client().head_object(Bucket=BUCKET, Key=f"{prefix}/{key}")["Metadata"]["sha256"] == sha256


def test_a_large_file_goes_in_parts_and_comes_in_ranges(
    through: Callable[[Fault], None], s3_url: str, large: Path, tmp_path: Path
) -> None:
    """Neither is ever one request."""
    requests: list[tuple[str, str]] = []
    through(counting(requests))
    store = open_store(s3_url)
    ref = store.put(large, kind="engine")
    assert sum("partNumber=" in path for _, path in requests) == 4
    assert store.fetch(ref, tmp_path).read_bytes() == large.read_bytes()
    ranges = sum(method == "GET" and ref.key in path and "?" not in path for method, path in requests)
    assert ranges == 3 * PART_BYTES // RANGE_BYTES + 1


def test_a_killed_upload_goes_on_where_it_was(
    through: Callable[[Fault], None], s3_url: str, s3_server: S3Server, large: Path, tmp_path: Path
) -> None:
    """Another process finishes the same multipart upload and sends only the parts that are missing."""
    enough, stuck, lock = threading.Event(), threading.Event(), threading.Lock()
    sent: list[str] = []
    stored: list[str] = []

    def stop_after_two(exchange: Exchange) -> bool:
        if "partNumber=" not in exchange.path:
            return False
        with lock:
            sent.append(exchange.path)
            late = len(sent) > 2
        if late:
            stuck.wait()
            return True
        answer = exchange.fetch()  # from here on the server has the part
        with lock:
            stored.append(exchange.path)
            if len(stored) == 2:
                enough.set()
        exchange.deliver(*answer)
        return True

    through(stop_after_two)
    process = subprocess.Popen([sys.executable, "-c", PUT, s3_url, str(large)])
    try:
        assert enough.wait(300)
    finally:
        process.kill()
        process.wait()
        stuck.set()
    (upload_id,) = opened_uploads(s3_server, s3_url)
    assert open_store(s3_url).list("") == []
    requests: list[tuple[str, str]] = []
    through(counting(requests))
    store = open_store(s3_url)
    ref = store.put(large, kind="engine")
    parts = [path for _, path in requests if "partNumber=" in path]
    assert len(parts) == 2
    assert all(upload_id.replace("~", "%7E") in path or upload_id in path for path in parts)
    assert opened_uploads(s3_server, s3_url) == []
    assert store.fetch(ref, tmp_path).read_bytes() == large.read_bytes()


@pytest.mark.parametrize(
    ("parts", "left"), [({1: bytes(PART_BYTES)}, 0), ({2: b"short"}, 1), ({9: bytes(PART_BYTES)}, 1)],
    ids=["other bytes", "other size", "other number"],
)  # fmt: skip
def test_parts_that_do_not_match_are_sent_again(
    s3_url: str, s3_server: S3Server, large: Path, tmp_path: Path, parts: dict[int, bytes], left: int
) -> None:
    """An open upload is not trusted: other bytes are replaced, and an upload in parts of other sizes is left alone."""
    client, name = s3_server.client(), f"{prefix_of(s3_url)}/objects/engine/{sha256_of(large)}.onnx"
    upload_id = client.create_multipart_upload(Bucket=BUCKET, Key=name)["UploadId"]
    for number, content in parts.items():
        client.upload_part(Bucket=BUCKET, Key=name, UploadId=upload_id, PartNumber=number, Body=content)
    store = open_store(s3_url)
    assert store.fetch(store.put(large, kind="engine"), tmp_path).read_bytes() == large.read_bytes()
    assert len(opened_uploads(s3_server, s3_url)) == left


@pytest.mark.parametrize("damage", ["on the way", "file changed", "file cut"])
def test_a_part_is_refused_if_it_is_not_what_was_hashed(
    through: Callable[[Fault], None], s3_url: str, large: Path, tmp_path: Path, damage: str
) -> None:
    """The server compares each part with its digest, and we the size, so nothing is stored; the next try mends it."""
    good = large.read_bytes()
    path = tmp_path / large.name
    path.write_bytes(good)

    def change(exchange: Exchange) -> bool:
        if damage == "on the way" and "partNumber=2" in exchange.path:
            exchange.body = bytes([exchange.body[0] ^ 1]) + exchange.body[1:]
        if damage.startswith("file") and exchange.path.endswith("?uploads"):
            path.write_bytes(good[:PART_BYTES] if damage == "file cut" else good[:-1] + bytes([good[-1] ^ 1]))
        return False

    through(change)
    store = open_store(s3_url)
    with pytest.raises(TransientStoreError, match=rf"XAmzContentSHA256Mismatch|{path} has changed while it was stored"):
        store.put(path, kind="engine")
    assert store.list("") == []
    through(lambda _: False)
    path.write_bytes(good)
    store = open_store(s3_url)
    assert store.fetch(store.put(path, kind="engine"), tmp_path / "out").read_bytes() == good


def test_two_processes_may_upload_the_same_large_file(s3_url: str, large: Path, tmp_path: Path) -> None:
    """Whichever completes the upload, both succeed."""
    processes = [
        subprocess.Popen([sys.executable, "-c", PUT, s3_url, str(large)], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    store = open_store(s3_url)
    assert store.fetch(store.put(large, kind="engine"), tmp_path).read_bytes() == large.read_bytes()


def test_dead_uploads_are_removed_when_they_are_old(
    s3_url: str, s3_server: S3Server, large: Path, through: Callable[[Fault], None]
) -> None:
    """Nothing is charged for them for ever; what may still be running stays."""
    through(lambda exchange: "partNumber=3" in exchange.path and failing(403, "AccessDenied")(exchange))
    with pytest.raises(StoreError, match="lacks the right"):
        open_store(s3_url).put(large, kind="engine")
    through(lambda _: False)
    store = open_store(s3_url)
    assert len(opened_uploads(s3_server, s3_url)) == 1
    assert store.remove_leftovers() == 0
    assert store.remove_leftovers(older_than=timedelta(seconds=-5)) == 1
    assert opened_uploads(s3_server, s3_url) == []


def test_a_killed_download_goes_on_where_it_was(
    through: Callable[[Fault], None], s3_url: str, large: Path, tmp_path: Path
) -> None:
    """Only what is missing is asked for, and until then nothing has the final name."""
    ref = open_store(s3_url).put(large, kind="engine")
    out = tmp_path / "out"
    partial = out / f".{Path(ref.key).name}.partial"
    through(lambda exchange: f"bytes={2 * RANGE_BYTES}-" in exchange.headers.get("Range", "") and pausing(30)(exchange))
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, s3_url, ref.model_dump_json(), str(out)],
        env={**os.environ, "REQUANT_S3_CONCURRENCY": "1"},
    )
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size >= RANGE_BYTES) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.iterdir()) == [partial]
    there = partial.stat().st_size
    ranges: list[str] = []

    def note(exchange: Exchange) -> bool:
        ranges.extend(filter(None, [exchange.headers.get("Range")]))
        return False

    through(note)
    assert open_store(s3_url).fetch(ref, out).read_bytes() == large.read_bytes()
    assert list(out.iterdir()) == [out / Path(ref.key).name]
    assert min(int(text.removeprefix("bytes=").split("-")[0]) for text in ranges) == there


@pytest.mark.parametrize("left", [b"other bytes", bytes(4 * PART_BYTES)], ids=["too short", "too long"])
def test_a_partial_file_of_something_else_is_not_believed(
    s3_url: str, large: Path, tmp_path: Path, left: bytes
) -> None:
    """The digest is that of the whole file; what does not fit is fetched from the start."""
    ref = open_store(s3_url).put(large, kind="engine")
    (tmp_path / f".{Path(ref.key).name}.partial").write_bytes(left)
    assert open_store(s3_url).fetch(ref, tmp_path).read_bytes() == large.read_bytes()


def test_a_download_that_fails_in_passing_is_kept(
    through: Callable[[Fault], None], s3_url: str, large: Path, tmp_path: Path
) -> None:
    """The retry of a step goes on from there; after a final error nothing is kept."""
    ref = open_store(s3_url).put(large, kind="engine")
    last = f"bytes={3 * PART_BYTES}-"
    for status, code, kept in ((503, "SlowDown", 1), (403, "AccessDenied", 0)):
        through(lambda exchange, status=status, code=code: last in exchange.headers.get("Range", "")  # type: ignore[misc]
                and failing(status, code)(exchange))  # fmt: skip
        with pytest.raises(StoreError):
            open_store(s3_url).fetch(ref, tmp_path / "out")
        assert len(list((tmp_path / "out").iterdir())) == kept


def test_damage_on_the_way_is_mended_once(
    through: Callable[[Fault], None], s3_url: str, small: Path, tmp_path: Path
) -> None:
    """A second damage in a row is an error, and no file is left."""
    store = open_store(s3_url)
    ref = store.put(small, kind="engine")
    store.write_text("runs/a.json", "{}")
    through(first(1, corrupting, method="GET"))
    assert open_store(s3_url).fetch(ref, tmp_path / "out").read_bytes() == small.read_bytes()
    through(first(1, corrupting, method="GET"))
    assert open_store(s3_url).read_text("runs/a.json") == "{}"
    through(lambda exchange: exchange.command == "GET" and corrupting(exchange))
    with pytest.raises(StoreError, match=r"is damaged: its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        open_store(s3_url).fetch(ref, tmp_path / "again")
    assert list((tmp_path / "again").iterdir()) == []
    with pytest.raises(StoreError, match=r"runs/a.json in .* is damaged"):
        open_store(s3_url).read_text("runs/a.json")


def test_objects_are_encrypted_as_the_settings_say(
    s3_url: str, s3_server: S3Server, small: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one put and in parts; reading needs no setting."""
    monkeypatch.setenv("REQUANT_S3_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("REQUANT_S3_KMS_KEY", KMS_KEY)
    refs = [open_store(s3_url).put(path, kind="engine") for path in (small, large)]
    monkeypatch.delenv("REQUANT_S3_ENCRYPTION")
    monkeypatch.delenv("REQUANT_S3_KMS_KEY")
    for ref, path in zip(refs, (small, large), strict=True):
        name = f"{prefix_of(s3_url)}/{ref.key}"
        head = s3_server.client().head_object(Bucket=BUCKET, Key=name)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", KMS_KEY)
        assert open_store(s3_url).fetch(ref, tmp_path / "out").read_bytes() == path.read_bytes()


def test_it_works_over_tls(
    s3_url: str, s3_server: S3Server, small: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There boto3 would by itself add checksums in a form that this server refuses."""
    monkeypatch.setenv("REQUANT_S3_ENDPOINT", s3_server.tls_url)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(s3_server.certificate))
    store = open_store(s3_url)
    for path in (small, large):
        assert store.fetch(store.put(path, kind="engine"), tmp_path / "out").read_bytes() == path.read_bytes()
    version = store.write_if("release.json", "1", None)
    assert store.read_versioned("release.json") == ("1", version)


# Faults that pass

PASSING: dict[str, Fault] = {
    "500": failing(500, "InternalError"),
    "503": failing(503, "SlowDown"),
    "503 without a body": failing(503, ""),
    "reset": resetting,
    "answer lost": losing_the_answer,
    "truncated": cutting,
    "silence": pausing(5),
}


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_faults_that_pass_are_not_seen(
    through: Callable[[Fault], None], s3_url: str, small: Path, tmp_path: Path, fault: Fault
) -> None:
    """One is outlasted, sending as well as fetching."""
    through(first(1, fault, method="PUT"))
    ref = open_store(s3_url).put(small, kind="engine")
    through(first(1, fault, method="GET"))
    assert open_store(s3_url).fetch(ref, tmp_path).read_bytes() == small.read_bytes()


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_faults_that_stay_may_be_tried_again_later(
    through: Callable[[Fault], None], s3_url: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """They are what a step is retried for. The message says where, what and what to do."""
    open_store(s3_url).write_text("runs/a.json", "{}" * 100)
    monkeypatch.setenv("REQUANT_S3_MAX_ATTEMPTS", "2")
    through(fault)
    with pytest.raises(TransientStoreError, match=r"^runs/a.json cannot be read in s3://.* at http://127") as caught:
        open_store(s3_url).read_text("runs/a.json")
    assert caught.value.remedy


def test_a_write_whose_answer_is_lost_has_won(through: Callable[[Fault], None], s3_url: str) -> None:
    """What boto3 sends again meets its own first writing, and that is no loss."""
    through(lambda _: False)
    store = open_store(s3_url)
    store.compare_and_set()
    through(first(1, losing_the_answer, method="PUT"))
    version = store.write_if("release.json", "1", None)
    assert store.read_versioned("release.json") == ("1", version)
    through(first(1, losing_the_answer, method="PUT"))
    assert store.write_if("release.json", "2", version) is not None


def test_a_fault_while_probing_decides_nothing(
    through: Callable[[Fault], None], s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is down, or whose answer got lost, is not taken for one without conditional writes."""
    store = open_store(s3_url)
    monkeypatch.setenv("REQUANT_S3_MAX_ATTEMPTS", "1")
    through(failing(503, "SlowDown"))
    faulty_store = open_store(s3_url)
    with pytest.raises(TransientStoreError):
        faulty_store.compare_and_set()
    monkeypatch.setenv("REQUANT_S3_MAX_ATTEMPTS", "3")
    faulty_store = open_store(s3_url)
    through(first(1, losing_the_answer, method="PUT"))
    assert faulty_store.compare_and_set() == store.compare_and_set() == "conditional writes (ETag without quotes)"


def test_the_lock_of_a_dead_process_ends(s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claim says for how many seconds it counts; until then the key is locked, and that can pass."""
    client, locks = s3_server.client(), f"{prefix_of(s3_url)}/.locks/release.json"
    client.put_object(Bucket=BUCKET, Key=f"{locks}/0-3600", Body=b"")
    with faulty(s3_server.url, no_conditions) as endpoint:
        monkeypatch.setenv("REQUANT_S3_ENDPOINT", endpoint)
        monkeypatch.setattr(s3, "_LOCK_WAIT_S", 0.2)
        with pytest.raises(TransientStoreError, match=r"release.json in .* is locked by another process"):
            open_store(s3_url).write_if("release.json", "1", None)
        client.delete_object(Bucket=BUCKET, Key=f"{locks}/0-3600")
        client.put_object(Bucket=BUCKET, Key=f"{locks}/0-2", Body=b"")
        monkeypatch.setattr(s3, "_LOCK_WAIT_S", 30.0)
        assert open_store(s3_url).write_if("release.json", "1", None) is not None
        assert open_store(s3_url).remove_leftovers(older_than=timedelta(seconds=-5)) == 1


# Faults that stay


def unknown_key(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")


def wrong_secret(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    patch.setenv("AWS_SECRET_ACCESS_KEY", "SECRETWRONG")


def no_credentials(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    patch.delenv("AWS_ACCESS_KEY_ID")
    patch.delenv("AWS_SECRET_ACCESS_KEY")


def half_of_the_credentials(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    patch.delenv("AWS_SECRET_ACCESS_KEY")


def unknown_profile(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    patch.setenv("AWS_PROFILE", "nobody")


def other_account(patch: pytest.MonkeyPatch, server: S3Server) -> None:
    for name, value in server.new_user().environment.items():
        patch.setenv(name, value)


def no_region(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    patch.delenv("REQUANT_S3_ENDPOINT")
    patch.setenv("REQUANT_S3_REGION", "not a region")


def virtual_addressing(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    patch.setenv("REQUANT_S3_ENDPOINT", "http://s3.invalid")
    patch.setenv("REQUANT_S3_ADDRESSING", "virtual")


def closed_port(patch: pytest.MonkeyPatch, _: S3Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        patch.setenv("REQUANT_S3_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")


def unknown_certificate(patch: pytest.MonkeyPatch, server: S3Server) -> None:
    patch.setenv("REQUANT_S3_ENDPOINT", server.tls_url)


def tls_to_a_plain_server(patch: pytest.MonkeyPatch, server: S3Server) -> None:
    patch.setenv("REQUANT_S3_ENDPOINT", server.url.replace("http:", "https:"))


STAYING: list[tuple[Break, type[StoreError], str]] = [
    (unknown_key, StoreError, r"does not know this access key \(InvalidAccessKeyId, HTTP 403\).*AWS_ACCESS_KEY_ID"),
    (wrong_secret, StoreError, r"the secret key is wrong \(SignatureDoesNotMatch, HTTP 403\).*Check the keys"),
    (no_credentials, StoreError, r"no usable credentials, and the server expects some.*Check the keys"),
    (half_of_the_credentials, StoreError, r"no usable credentials, and the server expects some.*Check the keys"),
    (unknown_profile, StoreError, r"no usable credentials, and the server expects some.*AWS_PROFILE"),
    (other_account, StoreError, r"lacks the right to do this \(AccessDenied, HTTP 403\).*Grant this account"),
    (no_region, StoreError, r"region's name is not valid.*REQUANT_S3_REGION"),
    (virtual_addressing, TransientStoreError, r"the server cannot be reached.*name resolution"),
    (closed_port, TransientStoreError, r"the server cannot be reached.*REQUANT_S3_ENDPOINT"),
    (unknown_certificate, StoreError, r"no trusted TLS connection.*AWS_CA_BUNDLE"),
    (tls_to_a_plain_server, StoreError, r"no trusted TLS connection.*AWS_CA_BUNDLE"),
]


@pytest.mark.parametrize(("broken", "kind", "message"), STAYING, ids=[broken.__name__ for broken, _, _ in STAYING])
def test_a_wrong_set_up_is_one_clear_error(
    s3_url: str, s3_server: S3Server, small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    broken: Break, kind: type[StoreError], message: str,
) -> None:  # fmt: skip
    """It names the place and the remedy, is final unless it can pass, and nobody's secrets are in it or in the log."""
    monkeypatch.setenv("REQUANT_S3_MAX_ATTEMPTS", "2")
    broken(monkeypatch, s3_server)
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreError, match=message) as caught:
        open_store(s3_url).put(small, kind="engine")
    assert type(caught.value) is kind
    assert s3_url in str(caught.value)
    secrets = [s3_server.user.access_key, s3_server.user.secret_key, "AKIANOBODY", "SECRETWRONG"]
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert not [secret for secret in secrets if secret in told]


def test_a_missing_bucket_is_named(s3_url: str) -> None:
    """It is not made: a misspelt name would become a second store."""
    with pytest.raises(StoreError, match=r"in s3://no-such-bucket/x at .*the bucket does not exist.*NoSuchBucket"):
        open_store("s3://no-such-bucket/x").write_text("runs/a.json", "{}")
    with pytest.raises(StoreError, match="the bucket does not exist"):
        open_store("s3://no-such-bucket/x").read_text("runs/a.json")
    with pytest.raises(StoreError, match="the bucket does not exist"):
        open_store("s3://no-such-bucket/x").list("")


def test_a_bucket_that_may_only_be_read_is_not_written(
    s3_url: str, s3_server: S3Server, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching works, storing is refused with the right that is missing."""
    owner = open_store(s3_url)
    ref = owner.put(small, kind="engine")
    everyone = {"Effect": "Allow", "Principal": "*", "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]}
    statement = {**everyone, "Action": ["s3:GetObject", "s3:ListBucket"]}
    client = s3_server.client()
    client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    try:
        other_account(monkeypatch, s3_server)
        store = open_store(s3_url)
        assert store.fetch(ref, tmp_path / "out").read_bytes() == small.read_bytes()
        with pytest.raises(StoreError, match=r"runs/a.json cannot be written .*lacks the right.*Grant this account"):
            store.write_text("runs/a.json", "{}")
        with pytest.raises(StoreError, match="cannot be deleted"):
            store.delete(ref.key)
        with pytest.raises(StoreError, match="lacks the right"):
            store.compare_and_set()
    finally:
        client.delete_bucket_policy(Bucket=BUCKET)
    assert owner.holds(ref)


def test_a_wrong_clock_is_told(through: Callable[[Fault], None], s3_url: str) -> None:
    """By the server's own check: the requests are dated years back on the way."""
    through(dating("20200101T000000Z"))
    with pytest.raises(StoreError, match=r"clock and the server's differ.*RequestTimeTooSkewed.*Set the clock"):
        open_store(s3_url).read_text("runs/a.json")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "ExpiredToken", "the session token is expired"),
        (400, "AuthorizationHeaderMalformed", "in another region.*REQUANT_S3_REGION"),
        (400, "IllegalLocationConstraintException", "in another region.*REQUANT_S3_REGION"),
        (403, "QuotaExceeded", "used up its quota"),
        (501, "NotImplemented", "the server cannot do this"),
        (418, "Teapot", r"not known here \(Teapot, HTTP 418\)"),
    ],
)
def test_answers_of_other_servers_are_told_too(
    through: Callable[[Fault], None], s3_url: str, small: Path, status: int, code: str, message: str
) -> None:
    """This server does not give them, so the proxy answers as AWS documents it. All are final."""
    through(failing(status, code))
    with pytest.raises(StoreError, match=message) as caught:
        open_store(s3_url).put(small, kind="engine")  # begins with HEAD, whose answer has no code
    assert type(caught.value) is StoreError


def test_every_trouble_of_a_connection_has_a_row() -> None:
    """A new kind in botocore must be told apart here."""

    def below(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    kinds = below(boto.HTTPClientError) | below(boto.ConnectionError) | below(boto.SSOError)
    covered = tuple(kind for kind, _ in s3._BY_TYPE)
    assert {kind for kind in kinds if not issubclass(kind, covered)} == set()


def test_endpoints_with_secrets_are_shown_without(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3's own variable may hold a user and a password; ours refuses them."""
    monkeypatch.delenv("REQUANT_S3_ENDPOINT")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hunter2@127.0.0.1:9")
    monkeypatch.setenv("REQUANT_S3_MAX_ATTEMPTS", "1")
    with pytest.raises(TransientStoreError, match=r"at http://127\.0\.0\.1:9: ") as caught:
        open_store(s3_url).list("")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("REQUANT_S3_ENDPOINT", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(StoreError, match=r"settings of S3 are wrong: REQUANT_S3_ENDPOINT") as caught_setting:
        open_store(s3_url)
    assert "hunter2" not in "".join(traceback.format_exception(caught_setting.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [("CONCURRENCY", "0"), ("MAX_ATTEMPTS", "many"), ("ENDPOINT", "localhost:9000"), ("ADDRESSING", "host"),
     ("READ_TIMEOUT_S", "-1"), ("KMS_KEY", "key-without-encryption")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """The variable is named."""
    monkeypatch.setenv(f"REQUANT_S3_{name}", value)
    with pytest.raises(StoreError, match=rf"The settings of S3 are wrong: .*REQUANT_S3_{name}"):
        open_store("s3://bucket/prefix")


def test_an_artifact_of_any_other_program_is_verified_by_its_reference(
    s3_url: str, s3_server: S3Server, tmp_path: Path
) -> None:
    """Metadata may be missing; a document without it is read as it is."""
    prefix = prefix_of(s3_url)
    for key in ("objects/engine/x.onnx", "runs/a.json", "folder/"):
        s3_server.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=b"{}")
    store = open_store(s3_url)
    ref = ArtifactRef(key="objects/engine/x.onnx", sha256=hashlib.sha256(b"{}").hexdigest(), size_bytes=2)
    assert store.fetch(ref, tmp_path).read_bytes() == b"{}"
    assert store.read_text("runs/a.json") == "{}"
    assert store.list("") == ["objects/engine/x.onnx", "runs/a.json"]
