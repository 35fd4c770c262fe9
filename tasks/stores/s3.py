"""A bucket as a store, on any server that speaks S3: AWS, Ceph, Swift, MinIO and others."""

from __future__ import annotations

import hashlib
import logging
import random
import re
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import boto3
import botocore.exceptions as boto
from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth
from botocore.config import Config
from s3transfer.utils import ReadFileChunk
from urllib3.exceptions import HTTPError

from tasks.contracts.errors import StoreError, TransientStoreError
from tasks.contracts.settings import S3Settings
from tasks.stores.base import DOCUMENTS_AT_ONCE, Content, Entries, Entry, Store, sha256_of

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 32 * 2**20  # of an upload; fixed, so that any process can go on with the parts of another
RANGE_BYTES = 8 * 2**20  # of a download; unlike parts, which are read while they are sent, ranges are held in memory
WRITE_BYTES = 2**18  # for a whole range at once, Linux seeks pages that lie together, which takes twice the time
MAX_PARTS = 10_000

_LOCKS, _PROBES = ".locks/", ".probes/"  # no part of a key starts with a dot, so these are never listed
_FORMS = {"quoted": '"{}"', "bare": "{}"}  # of an ETag in If-Match: as HTTP has it, and as Ceph 16 alone takes it
_CONFLICT_ATTEMPTS = 5
_LOCK_WAIT_S = 60.0
_MD5 = re.compile(r"[0-9a-f]{32}")
_BROKEN_BODY = (boto.BotoCoreError, HTTPError)

logging.getLogger("botocore").setLevel(logging.INFO)  # its debug lines hold signatures and session tokens


class _Fault(NamedTuple):
    found: str
    remedy: str
    can_pass: bool = False


_CREDENTIALS = "Check the keys, profile or role that boto3 finds (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)."
_REGION = "Set REQUANT_S3_REGION to the bucket's region."
_NETWORK = "Check that the server runs, and REQUANT_S3_ENDPOINT, name resolution, proxies and firewalls."
_LATER = "Try again later; if it stays, ask who runs the server."
_RIGHTS = "Grant this account to list the bucket and to get, put and delete below the prefix, or use another account."

_NO_CREDENTIALS = _Fault("boto3 finds no usable credentials, and the server expects some", _CREDENTIALS)
_UNKNOWN_KEY = _Fault("the server does not know this access key", _CREDENTIALS)
_WRONG_SECRET = _Fault("the signature is not the one that the server expects: the secret key is wrong", _CREDENTIALS)
_EXPIRED = _Fault("the session token is expired or not valid", "Log in again, or renew the role's session.")
_DENIED = _Fault("the account lacks the right to do this", _RIGHTS)
_SKEWED = _Fault("this machine's clock and the server's differ by more than the server allows", "Set the clock (NTP).")
_NO_BUCKET = _Fault(
    "the bucket does not exist on this server",
    "Create it, or name another where this one is named (REQUANT_STORE, data or weights), or another endpoint.",
)
_WRONG_REGION = _Fault("the bucket is in another region than the one asked", _REGION)
_BUSY = _Fault("the server is overloaded or has failed inside", _LATER, can_pass=True)
_DAMAGED = _Fault("the bytes that arrived are not those that were sent", _NETWORK, can_pass=True)
_GONE = _Fault("there is no such object", "Run again: the step that makes it will redo it.")
_ARCHIVED = _Fault("the object is in an archive class", "Restore it, and keep lifecycle rules away from the prefix.")
_CONFLICT = _Fault("another process is changing it at the same time", "Try again.", can_pass=True)
_FULL = _Fault("the account has used up its quota", "Free some space there, or have the quota raised.")
_UNSUPPORTED = _Fault(
    "the server cannot do this", "Check REQUANT_S3_ENCRYPTION and whether the endpoint is an S3 server."
)
_KMS = _Fault("the encryption key cannot be used", "Check REQUANT_S3_KMS_KEY and the rights on that key.")

# By the code in the server's answer; where the code is not here, by the HTTP status.
_BY_CODE: Mapping[str, _Fault] = {
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": _WRONG_SECRET,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": _SKEWED,
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _NO_BUCKET,
    "NoSuchKey": _GONE,
    "InvalidObjectState": _ARCHIVED,
    "AuthorizationHeaderMalformed": _WRONG_REGION,
    "PermanentRedirect": _WRONG_REGION,
    "TemporaryRedirect": _WRONG_REGION,
    "IllegalLocationConstraintException": _WRONG_REGION,
    "QuotaExceeded": _FULL,
    "NoSuchUpload": _CONFLICT,
    "InvalidPart": _CONFLICT,
    "OperationAborted": _CONFLICT,
    "ConditionalRequestConflict": _CONFLICT,
    "PreconditionFailed": _CONFLICT,
    "BadDigest": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "XAmzContentChecksumMismatch": _DAMAGED,
    "RequestTimeout": _BUSY,
    "KMS.ThrottlingException": _BUSY,
    "NotImplemented": _UNSUPPORTED,
    "MethodNotAllowed": _UNSUPPORTED,
    "KMS.DisabledException": _KMS,
    "KMS.NotFoundException": _KMS,
    "KMS.KMSInvalidStateException": _KMS,
}
_BY_STATUS: Mapping[int, _Fault] = {
    301: _WRONG_REGION,
    307: _WRONG_REGION,
    401: _NO_CREDENTIALS,
    403: _DENIED,
    408: _BUSY,
    429: _BUSY,
    501: _UNSUPPORTED,
}
# The first row that fits: botocore derives some from others.
_BY_TYPE: tuple[tuple[type[Exception], _Fault], ...] = (
    (boto.ProfileNotFound, _NO_CREDENTIALS),
    (boto.NoCredentialsError, _NO_CREDENTIALS),
    (boto.PartialCredentialsError, _NO_CREDENTIALS),
    (boto.CredentialRetrievalError, _NO_CREDENTIALS),
    (boto.SSOError, _EXPIRED),
    (boto.TokenRetrievalError, _EXPIRED),
    (boto.NoRegionError, _Fault("no region is set, and the server expects one", _REGION)),
    (boto.InvalidRegionError, _Fault("the region's name is not valid", _REGION)),
    (boto.ReadTimeoutError, _Fault("the server was silent for longer than REQUANT_S3_READ_TIMEOUT_S", _LATER, True)),
    (boto.ConnectTimeoutError, _Fault("there was no connection within REQUANT_S3_CONNECT_TIMEOUT_S", _NETWORK, True)),
    (boto.ProxyConnectionError, _Fault("the HTTP proxy cannot be reached", _NETWORK, True)),
    (boto.SSLError, _Fault("no trusted TLS connection", "Check the certificate; AWS_CA_BUNDLE names one's own CA.")),
    (boto.EndpointConnectionError, _Fault("the server cannot be reached", _NETWORK, True)),
    (boto.IncompleteReadError, _Fault("the answer ended too early", _NETWORK, True)),
    (boto.HTTPClientError, _Fault("the connection broke off", _NETWORK, True)),
    (boto.ConnectionError, _Fault("the connection broke off", _NETWORK, True)),
    (HTTPError, _Fault("the connection broke off", _NETWORK, True)),
    (boto.ParamValidationError, _Fault("boto3 refuses the request", "Check the bucket's name and REQUANT_S3_*.")),
)
_OTHER = _Fault("the request failed in a way that is not known here", "Look the code up in the server's manual.")


class Object(NamedTuple):
    """What a list says of an object."""

    name: str
    size_bytes: int
    etag: str
    modified: datetime


class _Part(ReadFileChunk):
    """A part of a file, read while it is sent."""

    sha256: str  # known before it is sent

    def digest(self, algorithm: str) -> str:
        """Of all its bytes; it is at its start again afterwards."""
        digest = hashlib.new(algorithm, usedforsecurity=False)
        while chunk := self.read(2**18):
            digest.update(chunk)
        self.seek(0)
        return digest.hexdigest()


class _PartAuth(S3SigV4Auth):
    """Signs a part with the digest that is known, where botocore would read and hash it once more."""

    def payload(self, request: AWSRequest) -> str:
        body: Any = request.body
        return body.sha256 if isinstance(body, _Part) else super().payload(request)


AUTH_TYPE_MAPS[_PartAuth.__name__] = _PartAuth


def _signer(signature_version: str, **_: Any) -> str | None:
    """Ours in place of the usual one; None leaves the others, such as those of S3 Express, as they are."""
    return _PartAuth.__name__ if signature_version in ("v4", "s3v4") else None


class S3Store(Store):
    """Keys are object keys below `prefix` in a bucket that exists. Credentials are those that boto3 finds.

    Memory: some 20 MiB for each of `settings.concurrency` requests at once.
    """

    def __init__(self, bucket: str, prefix: str, settings: S3Settings) -> None:
        self._bucket, self._settings = bucket, settings
        self._root = f"{prefix}/" if prefix else ""
        self._if_match: str | None = None  # how this server takes conditions; not yet known
        self._probing = threading.Lock()
        self._encrypted: dict[str, Any] = {}
        if settings.encryption:
            self._encrypted["ServerSideEncryption"] = settings.encryption
        if settings.kms_key:
            self._encrypted["SSEKMSKeyId"] = settings.kms_key
        try:
            self._client = _client(settings)
        except (boto.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            fault = _fault(error) or _Fault("the endpoint is not a URL", _NETWORK)
            raise StoreError(f"{self} cannot be opened: {fault.found}.", remedy=fault.remedy) from None

    def __str__(self) -> str:
        return f"s3://{self._bucket}/{self._root}".rstrip("/")

    def _content(self, path: Path) -> Content:
        """Nothing can be sent before the file has its name, so meanwhile another core hashes the parts."""
        size_bytes = path.stat().st_size
        if size_bytes <= PART_BYTES:
            return super()._content(path)
        with _threads(1) as pool:
            parts = pool.submit(_part_digests, path, size_bytes)
            return Content(sha256_of(path), size_bytes, parts.result())

    def _upload(self, path: Path, key: str, content: Content) -> None:
        with self._errors("cannot be stored", key):
            if content.parts:
                self._upload_parts(path, key, content)
            else:
                self._put(key, path.read_bytes())

    def _download(self, key: str, path: Path) -> str:
        with self._errors("cannot be fetched", key):
            digest = hashlib.sha256()
            self._receive(key, self._known(key)["ContentLength"], path, digest)
            return digest.hexdigest()

    def _entry(self, key: str) -> Entry | None:
        with self._errors("cannot be looked up", key):
            head = self._head(key)
            return None if head is None else Entry(key, head["ContentLength"], head["LastModified"])

    def _renew(self, key: str) -> bool:
        """By copying the object onto itself inside the server, which S3 does up to 5 GiB."""
        with self._errors("cannot be renewed", key):
            head = self._head(key)
            if head is None:
                return False
            source: Any = {"Bucket": self._bucket, "Key": self._root + key}
            try:
                self._client.copy_object(
                    **source,
                    CopySource=source,
                    MetadataDirective="REPLACE",
                    Metadata=head["Metadata"],
                    **self._encrypted,
                )
            except self._client.exceptions.NoSuchKey:
                return False
            return True

    def _write(self, key: str, content: bytes) -> None:
        with self._errors("cannot be written", key):
            self._put(key, content)

    def _read(self, key: str) -> tuple[bytes, str] | None:
        with self._errors("cannot be read", key):
            for _ in range(2):  # damage on the way is mended by reading again
                try:
                    content, answer = self._get(key)
                except self._client.exceptions.NoSuchKey:
                    return None
                found = hashlib.sha256(content).hexdigest()
                expected = answer["Metadata"].get("sha256", found)  # none if it was written by another program
                if found == expected:
                    return content, _bare(answer["ETag"])
            raise StoreError(
                f"{key} in {self} is damaged: its sha256 is {found}, expected {expected}.",
                remedy="Delete it or restore it.",
            )

    def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None:
        with self._errors("cannot be written", key):
            form = self._condition_form()
            if form == "lock":
                with self._locked(key):
                    head = self._head(key)
                    if (head and _bare(head["ETag"])) != expected:
                        return None
                    return self._put(key, content)
            condition: dict[str, Any] = (
                {"IfNoneMatch": "*"} if expected is None else {"IfMatch": _FORMS[form].format(expected)}
            )
            return self._put_if(key, content, condition)

    def _delete(self, key: str) -> None:
        with self._errors("cannot be deleted", key):
            self._client.delete_object(Bucket=self._bucket, Key=self._root + key)

    def _entries(self, prefix: str) -> Entries:
        with self._errors("cannot be listed", f"{prefix}*"):
            return list(self._listed(prefix))

    def _remove_leftovers(self, before: datetime) -> int:
        removed = 0
        with self._errors("cannot be removed", "what was left over"):
            for upload in list(self._uploads("")):
                if upload["Initiated"] < before:
                    self._abort(upload["Key"], upload["UploadId"])
                    removed += 1
            for folder in (_LOCKS, _PROBES):
                for entry in self._listed(folder):
                    if entry.modified < before:
                        self._delete(entry.key)
                        removed += 1
        return removed

    def compare_and_set(self) -> str:
        with self._errors("cannot be tried out", "compare-and-set"):
            return {
                "quoted": "conditional writes",
                "bare": "conditional writes (ETag without quotes)",
                "lock": "lock objects, as the server has no conditional writes",
            }[self._condition_form()]

    # Objects that are not ours: data and weights

    def objects(self, prefix: str) -> Iterator[Object]:
        """What lies under `prefix` (any text), in the order of its names."""
        with self._errors("cannot be listed", f"{prefix}*"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._root + prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    name = item["Key"].removeprefix(self._root)
                    yield Object(name, item["Size"], _bare(item["ETag"]), item["LastModified"])

    def copy(self, found: Object, path: Path) -> None:
        """Write the bytes of the object as it was listed.

        Raises:
            TransientStoreError: if it has changed since, or is not what the server knows of its digest.
            StoreError: if it is gone, or cannot be read.
        """
        with self._errors("cannot be read", found.name):
            if found.size_bytes <= RANGE_BYTES:
                try:
                    content, answer = self._get(found.name)
                except self._client.exceptions.NoSuchKey:
                    raise self._missing(found.name, "It was there a moment ago: run again.") from None
                path.write_bytes(content)
                digest, expected = self._digest_told(answer)
                digest.update(content)
            else:
                head = self._known(found.name)
                digest, expected = self._digest_told(head)
                self._receive(found.name, head["ContentLength"], path, digest)
                answer = self._head(found.name) or {"ETag": "none"}
        if _bare(answer["ETag"]) != found.etag or path.stat().st_size != found.size_bytes:
            raise TransientStoreError(f"{found.name} in {self} changes while it is read.", remedy="Run again.")
        if expected and digest.hexdigest() != expected:
            raise TransientStoreError(
                f"{found.name} in {self} is damaged: its {digest.name} is {digest.hexdigest()}, expected {expected}.",
                remedy="Run again; if it stays, store the object anew.",
            )

    # Objects

    def _put(self, key: str, content: bytes, *, writer: str = "", **condition: Any) -> str:
        """Its ETag. The server compares the bytes with the SHA-256 that the request is signed with."""
        metadata = {"sha256": hashlib.sha256(content).hexdigest()} | ({"writer": writer} if writer else {})
        answer = self._client.put_object(
            Bucket=self._bucket, Key=self._root + key, Body=content, Metadata=metadata, **self._encrypted, **condition
        )
        return _bare(answer["ETag"])

    def _get(self, key: str, **span: Any) -> tuple[bytes, Any]:
        """Content and answer. boto3 tries again to get an answer, but not when its body breaks off."""
        for attempts_left in reversed(range(self._settings.max_attempts)):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._root + key, **span)
            try:
                return answer["Body"].read(), answer
            except _BROKEN_BODY:
                if not attempts_left:
                    raise
        raise AssertionError("there is at least one attempt")

    def _head(self, key: str) -> Any:
        """What is known of an object; None if there is none."""
        try:
            return self._client.head_object(Bucket=self._bucket, Key=self._root + key)
        except boto.ClientError as error:
            if _status(error) == 404:
                return None
            if _status(error) < 500:  # no answer to HEAD says why it was refused; that to a list does
                self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._root + key, MaxKeys=1)
            raise

    def _known(self, key: str) -> Any:
        head = self._head(key)
        if head is None:
            raise self._missing(key)
        return head

    def _digest_told(self, answer: Any) -> tuple[hashlib._Hash, str]:
        """An empty digest, and what it must become: the sha256 that a store notes, or else an ETag that is the MD5.

        Nothing is expected where the ETag is another: in parts, under a key of KMS, in a directory bucket of AWS.
        """
        if sha256 := answer["Metadata"].get("sha256"):
            return hashlib.sha256(), sha256
        etag = _bare(answer["ETag"])
        is_plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and not self._bucket.endswith("--x-s3")
        return hashlib.md5(usedforsecurity=False), etag if is_plain and _MD5.fullmatch(etag) else ""

    def _listed(self, prefix: str) -> Iterator[Entry]:
        """With names below the store's prefix."""
        return (Entry(found.name, found.size_bytes, found.modified) for found in self.objects(prefix))

    def _receive(self, key: str, size_bytes: int, path: Path, digest: hashlib._Hash) -> None:
        """Make the file complete, and the digest that of its bytes."""
        with path.open("ab+") as file:
            if file.tell() > size_bytes:
                file.truncate(0)
            file.seek(0)
            while chunk := file.read(2**20):
                digest.update(chunk)
            with closing(self._chunks(key, file.tell(), size_bytes)) as chunks, _threads(1) as beside:
                for chunk in chunks:
                    hashed = beside.submit(digest.update, chunk)
                    for first in range(0, len(chunk), WRITE_BYTES):
                        file.write(memoryview(chunk)[first : first + WRITE_BYTES])
                    hashed.result()

    def _chunks(self, key: str, start: int, end: int) -> Generator[bytes, None, None]:
        """The object's bytes from `start` to `end`, in order; the next ones are on their way meanwhile."""

        def chunk(first: int) -> bytes:
            content, _ = self._get(key, Range=f"bytes={first}-{min(first + RANGE_BYTES, end) - 1}")
            return content

        waiting: deque[Future[bytes]] = deque()
        with _threads(self._settings.concurrency) as pool:
            for first in range(start, end, RANGE_BYTES):
                waiting.append(pool.submit(chunk, first))
                if len(waiting) > self._settings.concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    # Multipart uploads

    def _upload_parts(self, path: Path, key: str, content: Content) -> None:
        """Equal keys mean equal bytes, so whoever comes goes on with the upload that is open, even in a race."""
        name = {"Bucket": self._bucket, "Key": self._root + key}
        spans = dict(enumerate(_spans(content.size_bytes), start=1))
        upload_id, etags = self._open_upload(key, {number: size for number, (_, size) in spans.items()})
        if not upload_id:
            arguments: dict[str, Any] = {**name, **self._encrypted}
            answer = self._client.create_multipart_upload(Metadata={"sha256": content.sha256}, **arguments)
            upload_id = answer["UploadId"]
        upload: dict[str, Any] = {**name, "UploadId": upload_id}

        def send(number: int) -> CompletedPartTypeDef:
            if path.stat().st_size != content.size_bytes:  # other changes the server finds by the part's digest
                raise TransientStoreError(f"{path} has changed while it was stored.", remedy="Store it again.")
            with _Part.from_filename(str(path), *spans[number]) as part:
                part.sha256 = content.parts[number - 1]
                etag = etags.get(number)
                if etag is None or etag != part.digest("md5"):
                    body: Any = part
                    etag = self._client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]
                return {"PartNumber": number, "ETag": etag}

        try:
            with _threads(self._settings.concurrency) as pool:
                parts = list(pool.map(send, spans))
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except self._client.exceptions.NoSuchUpload:
            if self._size(key) != content.size_bytes:  # otherwise another process has completed it
                raise
        if (found := self._size(key)) != content.size_bytes:
            raise TransientStoreError(
                f"{key} has arrived in {self} with {found} bytes, expected {content.size_bytes}.",
                remedy="Store it again.",
            )

    def _size(self, key: str) -> int | None:
        entry = self._entry(key)
        return None if entry is None else entry.size_bytes

    def _open_upload(self, key: str, sizes: Mapping[int, int]) -> tuple[str, dict[int, str]]:
        """An unfinished upload in parts of these sizes, and the ETag of each part that is there: its MD5, or no match.

        One with other parts is left alone. It may be alive, and Ceph completes none that has more parts than it names.
        """
        uploads = [upload for upload in self._uploads(key) if upload["Key"] == self._root + key]
        for upload in sorted(uploads, key=lambda upload: upload["Initiated"], reverse=True):
            pages = self._client.get_paginator("list_parts").paginate(
                Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
            parts = [part for page in pages for part in page.get("Parts", ())]
            if all(sizes.get(part["PartNumber"]) == part["Size"] for part in parts):
                return upload["UploadId"], {part["PartNumber"]: _bare(part["ETag"]) for part in parts}
        return "", {}

    def _uploads(self, prefix: str) -> Iterator[Any]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=self._root + prefix
        )
        return (upload for page in pages for upload in page.get("Uploads", ()))

    def _abort(self, object_key: str, upload_id: str) -> None:
        with suppress(self._client.exceptions.NoSuchUpload):  # completed or removed while we look
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=object_key, UploadId=upload_id)

    # Compare and set

    def _condition_form(self) -> str:
        """How this server takes a condition on a write; found out once, by trying."""
        with self._probing:
            if self._if_match is None:
                name = f"{_PROBES}{uuid4().hex}"
                self._if_match = self._probe(name)
                self._client.delete_object(Bucket=self._bucket, Key=self._root + name)
            return self._if_match

    def _probe(self, name: str) -> str:
        """A refusal for any other reason, or an answer that got lost, must not pass for a server without conditions."""

        def accepted(**condition: str) -> str | None:
            try:
                return self._put_if(name, b"", condition)
            except boto.ClientError as error:
                if _status(error) not in (405, 501):
                    raise
                return None

        etag = accepted(IfNoneMatch="*")
        if etag is None or accepted(IfNoneMatch="*") or accepted(IfMatch=_FORMS["quoted"].format("0" * 32)):
            return "lock"
        return next((form for form in _FORMS if accepted(IfMatch=_FORMS[form].format(etag))), "lock")

    def _put_if(self, key: str, content: bytes, condition: dict[str, Any]) -> str | None:
        writer = uuid4().hex
        for attempts_left in reversed(range(_CONFLICT_ATTEMPTS)):
            try:
                return self._put(key, content, writer=writer, **condition)
            except boto.ClientError as error:
                if _status(error) in (404, 412):
                    # boto3 sends again what was lost on the way back, and then meets its own first writing
                    head = self._head(key)
                    return _bare(head["ETag"]) if head and head["Metadata"].get("writer") == writer else None
                if _status(error) != 409 or not attempts_left:
                    raise
            time.sleep(random.uniform(0, 0.2))  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the lock of `key` where the server has no conditional writes.

        Who finds no claim but his own in the list has the lock: of two who come at once, the later one to write his
        claim sees the other's. Of those who wait, the first by name keeps his claim and the others step back. A claim
        says for how long it counts, in case its owner has died: the longest wait, and three times what a request can
        take with all its attempts, so a living owner is through by then. It takes a server whose lists show all that
        was written before, and an owner that is not stopped for minutes in the middle.
        """
        settings = self._settings
        lease_s = _LOCK_WAIT_S + 3 * settings.max_attempts * (settings.connect_timeout_s + settings.read_timeout_s)
        folder = f"{_LOCKS}{key}/"
        claim = f"{folder}{uuid4().hex}-{lease_s:.0f}"
        deadline = time.monotonic() + _LOCK_WAIT_S
        try:
            self._put(claim, b"")
            while others := self._other_claims(folder, claim):
                if time.monotonic() > deadline:
                    raise TransientStoreError(
                        f"{key} in {self} is locked by another process ({others[0]}).",
                        remedy=f"Try again; the lock of a dead process ends by itself after {lease_s:.0f} s.",
                    )
                if steps_back := others[0] < claim:
                    self._delete(claim)
                time.sleep(random.uniform(0.01, 0.1))  # noqa: S311
                if steps_back:
                    self._put(claim, b"")
            yield
        finally:
            self._delete(claim)

    def _other_claims(self, folder: str, mine: str) -> list[str]:
        """Claims that count, by the server's clock."""
        claims = {entry.key: entry.modified for entry in self._listed(folder)}
        now = claims.pop(mine, None)
        if now is None:
            return [mine]  # not shown yet, so what is shown may be old
        ages_s = {name: (now - written).total_seconds() for name, written in claims.items()}
        return sorted(name for name, age_s in ages_s.items() if age_s < float(name.rpartition("-")[2]))

    # Errors

    def _missing(self, key: str, remedy: str = _GONE.remedy) -> StoreError:
        return StoreError(f"{key} is not in {self}.", remedy=remedy)

    @contextmanager
    def _errors(self, problem: str, key: str) -> Iterator[None]:
        """The vendor's error is not chained: its text and fields may hold keys, tokens and signed URLs."""
        try:
            yield
        except (boto.ClientError, boto.BotoCoreError, HTTPError) as error:
            fault = _fault(error) or _OTHER
            kind = TransientStoreError if fault.can_pass else StoreError
            url = urlsplit(self._client.meta.endpoint_url)
            endpoint = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
            raise kind(
                f"{key} {problem} in {self} at {endpoint}: {fault.found} ({_code(error)}).", remedy=fault.remedy
            ) from None


def _spans(size_bytes: int) -> list[tuple[int, int]]:
    """First byte and size of each part."""
    part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))
    return [(first, min(part_bytes, size_bytes - first)) for first in range(0, size_bytes, part_bytes)]


def _part_digests(path: Path, size_bytes: int) -> tuple[str, ...]:
    digests = []
    for span in _spans(size_bytes):
        with _Part.from_filename(str(path), *span) as part:
            digests.append(part.digest("sha256"))
    return tuple(digests)


def _client(settings: S3Settings) -> S3Client:
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint,
        region_name=settings.region,
        config=Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            retries={"mode": settings.retry_mode, "total_max_attempts": settings.max_attempts},
            max_pool_connections=max(settings.concurrency, DOCUMENTS_AT_ONCE) + 1,
            s3={"addressing_style": settings.addressing},
            # Ceph and Swift refuse the checksums that boto3 adds over HTTPS; every body is signed with its SHA-256
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    client.meta.events.register("choose-signer.s3.UploadPart", _signer)  # type: ignore[arg-type]  # it may answer
    return client


def _fault(error: Exception) -> _Fault | None:
    if isinstance(error, boto.ClientError):
        status = _status(error)
        fault = _BY_CODE.get(error.response.get("Error", {}).get("Code", "")) or _BY_STATUS.get(status)
        return fault or (_BUSY if status >= 500 else None)
    return next((fault for kind, fault in _BY_TYPE if isinstance(error, kind)), None)


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    if isinstance(error, boto.ClientError):
        return f"{error.response.get('Error', {}).get('Code', 'no code')}, HTTP {_status(error)}"
    return type(error).__name__


def _bare(etag: str) -> str:
    return etag.strip('"')


@contextmanager
def _threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """After an error what has not begun is dropped."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
