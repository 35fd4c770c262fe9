"""What a platform team applies, tried on a real server."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from tasks.contracts.errors import StoreError
from tasks.stores.base import open_store
from tests.tasks.stores.s3_server import S3Server

BUCKET_FILES = Path(__file__).parents[1] / "infra/bucket"


def arn(name: str) -> str:
    return f"arn:aws:iam:::user/{name}"


def test_the_buckets_policy_is_enough_and_not_more(
    s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers do all that a store does, serving reads, and strangers nothing."""
    worker, serving, stranger = (s3_server.new_user() for _ in range(3))
    client, bucket = s3_server.client(), f"policy-{uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    text = (BUCKET_FILES / "policy.json").read_text()
    for name, value in {"BUCKET": bucket, "WORKER_ARN": arn(worker.name), "SERVING_ARN": arn(serving.name)}.items():
        text = text.replace(name, value)
    client.put_bucket_policy(Bucket=bucket, Policy=text)
    url = f"s3://{bucket}/requant"
    (tmp_path / "large.bin").write_bytes(bytes(9 * 2**20))

    def become(environment: dict[str, str]) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    become(worker.environment)
    store = open_store(url)
    ref = store.put(tmp_path / "large.bin", kind="engine")
    store.write_text("steps/one.json", "{}")
    version = store.write_if("champion", "1", None)
    assert store.write_if("champion", "2", version) is not None
    store.delete("steps/one.json")
    assert store.remove_leftovers() == 0
    assert store.list("") == ["champion", ref.key]

    become(serving.environment)
    reader = open_store(url)
    assert reader.read_text("champion") == "2"
    assert reader.fetch(ref, tmp_path / "fetched").stat().st_size == ref.size_bytes
    assert reader.read_text("absent") is None
    for forbidden in (
        lambda: reader.write_text("champion", "3"),
        lambda: reader.delete("champion"),
        lambda: reader.put(tmp_path / "large.bin", kind="other"),
    ):
        with pytest.raises(StoreError, match="lacks the right"):
            forbidden()

    become(stranger.environment)
    with pytest.raises(StoreError, match="lacks the right"):
        open_store(url).read_text("champion")


def test_the_buckets_lifecycle_is_taken(s3_server: S3Server, s3_url: str) -> None:
    """Its only rule aborts uploads that died: nothing expires."""
    rules = json.loads((BUCKET_FILES / "lifecycle.json").read_text())
    bucket = urlsplit(s3_url).netloc
    client = s3_server.client()
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rules)
    (stored,) = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert stored["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    assert "Expiration" not in stored
    client.delete_bucket_lifecycle(Bucket=bucket)
