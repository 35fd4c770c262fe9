from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks.contracts.settings import S3Settings, Settings


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Settings, S3Settings):
        for name in kind.model_fields:
            monkeypatch.delenv(f"{kind.model_config['env_prefix']}{name.upper()}", raising=False)


def test_no_environment_is_needed() -> None:
    """By default everything lies in one folder of the working directory."""
    settings = Settings()
    assert settings.store == ".requant/store"
    assert settings.scratch == Path(".requant/scratch")
    assert settings.device == "auto"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting is a REQUANT_ variable."""
    monkeypatch.setenv("REQUANT_STORE", "file:///mnt/store")
    monkeypatch.setenv("REQUANT_SCRATCH", "/mnt/scratch")
    monkeypatch.setenv("REQUANT_DEVICE", "cpu")
    assert Settings() == Settings(store="file:///mnt/store", scratch=Path("/mnt/scratch"), device="cpu")


def test_a_device_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting and the choices are named."""
    monkeypatch.setenv("REQUANT_DEVICE", "tpu")
    with pytest.raises(ValidationError, match=r"(?s)device.*'auto', 'cpu' or 'cuda'"):
        Settings()


def test_settings_do_not_change_under_a_run() -> None:
    """They are read once."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings().device = "cpu"  # type: ignore[misc]


def test_s3_needs_no_setting_where_boto3_finds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Server, region and credentials are left to it; what is set goes over that."""
    settings = S3Settings()
    assert (settings.endpoint, settings.region, settings.encryption, settings.kms_key) == (None, None, None, None)
    monkeypatch.setenv("REQUANT_S3_ENDPOINT", "https://s3.example.org")
    monkeypatch.setenv("REQUANT_S3_READ_TIMEOUT_S", "2.5")
    assert S3Settings() == S3Settings(endpoint="https://s3.example.org", read_timeout_s=2.5)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://host", "https://user:secret@host", "https://host/path"])
def test_an_endpoint_is_a_plain_url(endpoint: str) -> None:
    """A user and a password would end up in logs, and a path is not what S3 signs."""
    with pytest.raises(ValidationError, match="endpoint"):
        S3Settings(endpoint=endpoint)
