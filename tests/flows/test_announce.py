"""News of retrained weights start one run each; what does not fit is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from safetensors.torch import load_file, save_file

from flows.announce import _news
from tasks.contracts.announcement import News
from tests.flows.production import wait_for

if TYPE_CHECKING:
    from tests.flows.conftest import Place
    from tests.flows.production import Production


@pytest.fixture
def arrivals(fleet: Production, plain: dict[str, Any]) -> Callable[[], list[dict[str, Any]]]:
    """Runs of announcements, newest first, that came after this fixture."""
    fleet.deploy(plain)
    before = {run["id"] for run in fleet.runs("retrain")}
    return lambda: [run for run in fleet.runs("retrain") if run["id"] not in before]


def event(model: str, payload: Any, event_id: UUID | str | None = None) -> list[dict[str, Any]]:
    """What docs/operate.md sends with curl."""
    return [{
        "id": str(event_id or uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "model.retrained",
        "resource": {"prefect.resource.id": f"requant.model.{model}"},
        "payload": payload,
    }]  # fmt: skip


def send(fleet: Production, events: list[dict[str, Any]]) -> None:
    fleet.post("/events", events)


def test_an_announcement_starts_one_run_with_its_weights(
    fleet: Production, arrivals: Callable[[], list[dict[str, Any]]]
) -> None:
    """By the command, again by the command, and the same by HTTP: one run, whose record says why there is one."""
    new = fleet.place.path / "retrained.safetensors"
    weights = load_file(fleet.place.path / "plain.safetensors")
    save_file({name: tensor * 1.001 if "weight" in name else tensor for name, tensor in weights.items()}, new)
    said = fleet.call("announce", "plain", "--weights", "retrained.safetensors")
    assert said.status == 0, said.stderr
    event_id = said.stdout.partition("event ")[2].partition(",")[0]
    assert said.stdout == f"announced plain: event {event_id}, weights {new}\n"
    assert fleet.call("announce", "plain", "--weights", "retrained.safetensors").stdout == said.stdout
    send(fleet, event("plain", {"weights": str(new)}, event_id))

    (first,) = wait_for(arrivals, "the run")
    run = fleet.ended(first["id"])
    assert run["state_type"] == "COMPLETED", fleet.log(run["id"])
    assert run["name"] == f"plain retrain {run['expected_start_time'][:10]}"
    assert {"retrain", "model:plain", "runtime:onnxruntime"} <= set(run["tags"])
    (folder,) = (fleet.place.store / "models/plain/runs").glob(f"*-{run['id'][:8]}")
    record = json.loads((folder / "record.json").read_text())
    assert record["spec"]["model"]["weights"] == str(new)
    assert record["trigger"] == "retrain"
    cause = f"event {event_id}: plain was retrained, weights {new}"
    assert record["cause"] == cause
    assert f"started by: {cause}" in fleet.log(run["id"])
    assert "retrained.safetensors" in (folder / "report.md").read_text()

    other = uuid4()
    send(fleet, event("plain", {"weights": str(new)}, other))  # a later one is a run of its own
    newest = wait_for(lambda: [run for run in arrivals() if run["id"] != first["id"]], "the second run")
    assert [one["parameters"]["announcement"]["id"] for one in newest] == [str(other)]
    assert fleet.ended(newest[0]["id"])["state_type"] == "COMPLETED"
    assert len(arrivals()) == 2


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({}, "announcement: payload.weights is missing"),
        ({"weights": 7, "wieghts": "x"}, "payload.weights: input should be a valid string (found 7)"),
    ],
)
def test_a_payload_that_does_not_fit_is_a_failed_run(
    fleet: Production, arrivals: Callable[[], list[dict[str, Any]]], payload: dict[str, Any], said: str
) -> None:
    """With every mistake in the message of its state; nothing is quantized."""
    before = fleet.place.records()
    send(fleet, event("plain", payload))
    (run,) = wait_for(arrivals, "the run")
    run = fleet.ended(run["id"])
    assert run["state_type"] == "FAILED"
    assert said in run["state"]["message"]
    assert "requant announce MODEL --weights URI" in run["state"]["message"]
    assert fleet.place.records() == before


def test_an_unknown_model_is_a_failed_run_and_refused_by_the_command(fleet: Production, plain: dict[str, Any]) -> None:
    """The message names the models that are deployed."""
    fleet.deploy(plain)
    send(fleet, event("plian", {"weights": "s3://bucket/new.safetensors"}))

    def arrived() -> list[dict[str, Any]]:
        return [run for run in fleet.runs("requant") if run["parameters"].get("resource") == "requant.model.plian"]

    (run,) = wait_for(arrived, "the run")
    run = fleet.ended(run["id"])
    assert run["state_type"] == "FAILED"
    assert "No model 'plian' is deployed; deployed are: plain." in run["state"]["message"]

    refused = fleet.call("announce", "plian", "--weights", "plain.safetensors")
    assert refused.status == 1
    assert "No model 'plian' is deployed; deployed are: plain." in refused.stderr


def test_paths_are_announced_as_they_are_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no path is left as it is; a folder that is called like a source of its own does not hide it."""
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "digits"):
        Path(folder).mkdir()
    Path("new.pth").touch()
    assert _news("m", "new.pth", "./images") == News(weights=f"{tmp_path}/new.pth", data=f"{tmp_path}/images")
    assert _news("m", "DEFAULT", "digits") == News(weights="DEFAULT", data="digits")
    assert _news("m", "s3://bucket/new.pth", "s3://bucket/images").data == "s3://bucket/images"


@pytest.mark.parametrize("options", [("--weights", ""), ("--weights", "plain.safetensors", "--data", "")])
def test_the_command_refuses_to_announce_nothing(place: Place, options: tuple[str, ...]) -> None:
    """An empty variable of a script, say."""
    refused = place.call("announce", "plain", *options)
    assert refused.status == 1
    assert f"announcement of plain: {options[-2][2:]}: string should have at least 1 character" in refused.stderr
    assert "Traceback" not in refused.stderr
