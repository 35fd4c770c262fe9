from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks.contracts.settings import Settings


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"REQUANT_{name.upper()}", raising=False)


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
