"""What a machine can do, said for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from flows.doctor import findings
from tasks.engines.hardware import hardware

if TYPE_CHECKING:
    from tests.flows.conftest import Place


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[str, str]]:
    monkeypatch.setenv("REQUANT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("REQUANT_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return {what: (value, so) for what, value, so in findings()}


def test_it_names_processor_libraries_and_places(found: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """The same names that records carry."""
    assert found["CPU"][0] == hardware()
    assert found["torch"][0] == torch.__version__.partition("+")[0]
    assert found["store"] == (str(tmp_path / "store"), "0 documents of runs")
    assert found["compare-and-set"][0] == "lock files"
    assert found["scratch"][0] == str(tmp_path / "scratch")
    assert found["Prefect API"] == ("not set", "each run starts a server of its own")


def test_what_is_missing_comes_with_how_to_get_it(found: dict[str, tuple[str, str]]) -> None:
    """An extra that is not installed is told by its name."""
    assert found["openvino"][0] != "not installed" or found["openvino"][1] == "pip install requant[openvino]"
    assert found["GPU"][0] == "none" or torch.cuda.is_available()


def test_looking_changes_nothing(found: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """No folder is made."""
    assert list(tmp_path.iterdir()) == []


def test_a_store_in_s3_is_asked(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it answers, and what releases can rest on there."""
    monkeypatch.setenv("REQUANT_STORE", s3_url)
    rows = {what: (value, so) for what, value, so in findings()}
    assert rows["store"] == (s3_url, "0 documents of runs")
    assert rows["compare-and-set"][0] == "conditional writes (ETag without quotes)"
    monkeypatch.setenv("REQUANT_STORE", "s3://no-such-bucket")
    rows = {what: (value, so) for what, value, so in findings()}
    assert "the bucket does not exist" in rows["store"][1]
    assert "compare-and-set" not in rows


def test_a_store_that_cannot_be_opened_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor goes on where a run would stop."""
    monkeypatch.setenv("REQUANT_STORE", "ftp://elsewhere")
    rows = {what: (value, so) for what, value, so in findings()}
    assert rows["store"][0] == "ftp://elsewhere"
    assert "REQUANT_STORE" in rows["store"][1]
    assert "Prefect API" in rows


def test_the_command_shows_all_of_it(place: Place) -> None:
    """Nothing is cut off or taken for markup where the output is no terminal."""
    end = place.call("doctor")
    assert end.status == 0
    lines = end.stdout.splitlines()
    assert any(line.startswith("CPU ") and hardware() in line for line in lines)
    assert any(line.startswith("store ") and str(place.store) in line for line in lines)
    assert all("pip install requant[" in line for line in lines if "not installed" in line)
