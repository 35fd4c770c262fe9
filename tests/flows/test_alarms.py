"""Somebody hears of what goes wrong, through a block of Prefect's that sends to a real address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.flows.production import BLOCK
from tests.flows.test_announce import event, send

if TYPE_CHECKING:
    from tests.flows.production import Production

SOON = {"block": BLOCK, "late_minutes": 0.17, "pending_minutes": 0.17}  # 10 s, the least that Prefect can do


def test_a_failed_gate_is_heard_with_its_numbers(fleet: Production, plain: dict[str, Any]) -> None:
    """They are in the message of the run's state, and so in lists, in the alarm, and on the run's page."""
    said = fleet.deploy(plain, alarms=SOON)
    assert fleet.webhook not in "\n".join(said)
    assert fleet.webhook not in str(fleet.post("/automations/filter", {}))
    strict = {**plain, "gates": {**plain["gates"], "min_compression": 100}}
    run = fleet.ended(fleet.start("requantize/by-hand-plain", {"spec": strict}))
    assert run["state_type"] == "FAILED"
    assert "1 of 5 gates failed: compression" in run["state"]["message"]
    assert "at least 100 x" in run["state"]["message"]
    heard = fleet.alarm(alarm="failed", about=run["name"])
    assert heard["message"] == run["state"]["message"]
    assert heard["url"].endswith(run["id"])


def test_a_run_that_does_not_start_is_heard_of(fleet: Production, plain: dict[str, Any]) -> None:
    """Late where no worker is; stuck where one took it and went; crashed when its process is gone."""
    fleet.deploy(plain, alarms=SOON)
    train = fleet.get("/deployments/name/train/gpu")
    fleet.ask("PATCH", f"/deployments/{train['id']}", {"enforce_parameter_schema": False})  # it will not be run
    run_id = fleet.start("train/gpu", {"spec": plain, "data": {}, "model": {}, "choice": {}, "answer_key": "x"})
    name = fleet.get(f"/flow_runs/{run_id}")["name"]
    fleet.alarm(alarm="late", about=name)
    fleet.post(f"/flow_runs/{run_id}/set_state", {"state": {"type": "PENDING"}, "force": True})
    fleet.alarm(alarm="stuck", about=name)
    gone = {"type": "CRASHED", "message": "killed by signal 9"}
    fleet.post(f"/flow_runs/{run_id}/set_state", {"state": gone, "force": True})
    assert fleet.alarm(alarm="crashed", about=name)["message"] == "killed by signal 9"


def test_a_trigger_that_starts_nothing_is_heard_of(fleet: Production, plain: dict[str, Any]) -> None:
    """Here somebody has deleted the deployment; deploying again mends it."""
    fleet.deploy(plain, alarms=SOON)
    gone = fleet.all("deployments")["requantize/on-retrain-plain"]
    fleet.ask("DELETE", f"/deployments/{gone['id']}")
    send(fleet, event("plain", {"weights": "plain.safetensors"}))
    heard = fleet.alarm(alarm="trigger failed", about="requant: run on-retrain-plain")
    assert "'run-deployment' action: 404" in heard["message"]
    fleet.deploy(plain, alarms=SOON)
    limits = {
        one["global_concurrency_limit"]["name"] for name, one in fleet.all("deployments").items() if "plain" in name
    }
    assert limits == {"requant:plain:onnxruntime"}  # Prefect had deleted it with the deployment


def test_a_model_without_a_good_run_is_heard_of(fleet: Production, plain: dict[str, Any]) -> None:
    """The daily watch names it; one with a good run of late is not named."""
    fleet.deploy(plain, {**plain, "name": "forgotten"}, alarms=SOON)
    run = fleet.ended(fleet.start("watch/watch", {}))
    assert run["state_type"] == "FAILED"
    heard = fleet.alarm(alarm="failed", about="watch over releases")
    assert "No good run for 7 days: forgotten (last: never)." in heard["message"]
