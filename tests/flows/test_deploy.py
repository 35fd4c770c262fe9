"""`requant deploy` on a real server: it holds what the fleet file says, and what others put there."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from docker.types import DeviceRequest  # type: ignore[import-untyped]

from tasks.contracts.errors import SpecError
from tests.flows.production import BLOCK, wait_for

if TYPE_CHECKING:
    from tests.flows.conftest import Place
    from tests.flows.production import Production

POOLS = Path(__file__).resolve().parents[2] / "infra/pools"
ALWAYS = {"requantize/by-hand", "build/gpu", "train/gpu", "receive/announcements", "watch/watch"}
KINDS = ("nightly", "on-retrain", "by-hand")
NIGHT: dict[str, Any] = {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}


def named(plain: dict[str, Any], name: str) -> dict[str, Any]:
    return {**plain, "name": name}


def of(model: str) -> set[str]:
    return {f"requantize/{kind}-{model}" for kind in KINDS}


def ours(found: dict[str, Any]) -> set[str]:
    return {name for name in found if name.startswith("requant:")}


def test_deploying_again_changes_nothing(fleet: Production, plain: dict[str, Any]) -> None:
    """Neither ids nor times of change, nor runs that are scheduled."""
    models = (plain, named(plain, "other"))
    fleet.deploy(*models, **NIGHT, alarms={"block": BLOCK})
    kinds = ("deployments", "automations", "v2/concurrency_limits", "work_pools")
    before = {kind: {name: (one["id"], one["updated"]) for name, one in fleet.all(kind).items()} for kind in kinds[:2]}
    assert fleet.deploy(*models, **NIGHT, alarms={"block": BLOCK}) == ["2 models, 11 deployments: no changes"]
    after = {kind: {name: (one["id"], one["updated"]) for name, one in fleet.all(kind).items()} for kind in kinds[:2]}
    assert after == before


def test_the_server_holds_what_the_file_says_and_no_more(fleet: Production, plain: dict[str, Any]) -> None:
    """A model that went, another time, other alarms: nothing of before is left, and what others made is."""
    mine = fleet.post("/automations/", {
        "name": "mine", "trigger": {"type": "event", "expect": ["never"], "posture": "Reactive", "threshold": 1},
        "actions": [{"type": "do-nothing"}],
    })  # fmt: skip
    fleet.post("/v2/concurrency_limits/", {"name": "mine", "limit": 3})
    flow = fleet.post("/flows/", {"name": "theirs"})
    fleet.post("/deployments/", {"name": "nightly-gone", "flow_id": flow["id"], "tags": ["requant"]})

    fleet.deploy(plain, named(plain, "gone"), **NIGHT, alarms={"block": BLOCK})
    assert ALWAYS | of("plain") | of("gone") <= fleet.all("deployments").keys()
    assert "requant: crashed" in fleet.all("automations")

    said = fleet.deploy(plain, cron="30 3 * * 1-5", timezone="Asia/Tokyo", gpus=2)
    assert "removed deployment requantize/nightly-gone" in said
    deployments = fleet.all("deployments")
    assert deployments.keys() - {"theirs/nightly-gone"} == ALWAYS | of("plain")
    (schedule,) = deployments["requantize/nightly-plain"]["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("30 3 * * 1-5", "Asia/Tokyo")
    assert deployments["requantize/on-retrain-plain"]["schedules"] == []
    limits = fleet.all("v2/concurrency_limits")
    assert {name: limits[name]["limit"] for name in ours(limits)} == {"requant:plain:onnxruntime": 1, "requant:gpu": 2}
    held = {name: (one["global_concurrency_limit"] or {}).get("name") for name, one in deployments.items()}
    assert {held[name] for name in of("plain")} == {"requant:plain:onnxruntime"}
    assert held["build/gpu"] == held["train/gpu"] == "requant:gpu"
    assert ours(fleet.all("automations")) == {
        "requant: dead run is crashed", "requant: run announcements", "requant: run on-retrain-plain",
    }  # fmt: skip
    assert fleet.all("automations")["mine"]["id"] == mine["id"]
    assert limits["mine"]["limit"] == 3
    assert "theirs/nightly-gone" in deployments

    fleet.deploy(plain)
    assert fleet.all("deployments")["requantize/nightly-plain"]["schedules"] == []


def test_what_an_operator_has_paused_stays_paused(fleet: Production, plain: dict[str, Any]) -> None:
    """A night, and an alarm: deploying is not a way to switch them on again by accident."""
    fleet.deploy(plain, **NIGHT)
    nightly = fleet.all("deployments")["requantize/nightly-plain"]
    schedule_url = f"/deployments/{nightly['id']}/schedules/{nightly['schedules'][0]['id']}"
    fleet.ask("PATCH", schedule_url, {"active": False})
    trigger = fleet.all("automations")["requant: run on-retrain-plain"]
    fleet.ask("PATCH", f"/automations/{trigger['id']}", {"enabled": False})

    fleet.deploy(plain, cron="0 4 * * *")
    (schedule,) = fleet.all("deployments")["requantize/nightly-plain"]["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 4 * * *", False)
    assert not fleet.all("automations")["requant: run on-retrain-plain"]["enabled"]
    fleet.ask("PATCH", f"/automations/{trigger['id']}", {"enabled": True})
    fleet.deploy(plain)


def test_what_is_set_for_a_pool_stays_set(fleet: Production, plain: dict[str, Any]) -> None:
    """A variable's value, which the UI writes into the template; what else differs there is put right."""
    fleet.deploy(plain)
    template = fleet.get("/work_pools/cpu")["base_job_template"]
    changed = deepcopy(template)
    changed["variables"]["properties"]["env"]["default"] = {"OMP_NUM_THREADS": "1"}
    fleet.ask("PATCH", "/work_pools/cpu", {"base_job_template": changed})
    assert "no changes" in fleet.deploy(plain)[-1]
    spoilt = deepcopy(changed)
    del spoilt["job_configuration"]["env"]
    fleet.ask("PATCH", "/work_pools/cpu", {"base_job_template": spoilt})
    assert "changed work pool cpu" in fleet.deploy(plain)
    assert fleet.get("/work_pools/cpu")["base_job_template"] == changed
    fleet.ask("PATCH", "/work_pools/cpu", {"base_job_template": template})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"crons": "0 2 * * *"}, "crons is not a key (known: models, cron,"),
        ({"cron": "at night"}, "'at night' is no cron"),
        ({"timezone": "Europe/Atlantis"}, "'Europe/Atlantis' is not a time zone"),
        ({"workers": "kubernetes"}, "kubernetes workers need an image"),
        ({"workers": "docker", "image": "requant"}, "work pool cpu is of type process"),
        ({"alarms": {"block": "slack"}}, "alarms.block"),
        ({"alarms": {"late_minutes": float("inf")}}, "alarms.late_minutes: input should be less than or equal to"),
        ({"alarms": {"block": "no-such-type/ops"}}, "cannot become a block of type no-such-type"),
        ({"models": [{"spec": "absent.yaml"}]}, "absent.yaml: No such file"),
        ({"models": [{"spec": "plain.yaml"}, {"spec": "plain.yaml"}]}, "is the second spec of plain"),
        ({"models": [{"spec": "plain.yaml", "corn": ""}]}, "models.0.corn is not a key (known: spec, cron)"),
    ],
)
def test_a_fleet_file_that_does_not_fit_changes_nothing(
    fleet: Production, plain: dict[str, Any], values: dict[str, Any], said: str
) -> None:
    """It is refused with the key, what was found and what to do."""
    fleet.deploy(plain)
    before = {name: one["updated"] for name, one in fleet.all("deployments").items()}
    with pytest.raises(SpecError) as refused:
        fleet.deploy(plain, **values)
    assert said in str(refused.value)
    assert refused.value.remedy
    assert {name: one["updated"] for name, one in fleet.all("deployments").items()} == before


def test_the_command_refuses_what_it_cannot_do(fleet: Production, place: Place) -> None:
    """A folder without a fleet file is no fleet without models; a server that ends with the command is none."""
    absent = fleet.call("deploy", "absent.yaml")
    assert (absent.status, absent.stdout) == (1, "")
    assert "absent.yaml: No such file" in absent.stderr
    (place.path / "fleet.yaml").write_text("models: []")
    nowhere = place.call("deploy")
    assert nowhere.status == 1
    assert "PREFECT_API_URL is not set" in nowhere.stderr


@pytest.mark.parametrize(
    ("block", "url"),
    [
        ("slack-webhook/ops", "https://hooks.slack.example/services/secret-token"),
        ("slack-webhook/ops", "secret-token"),
        ("ms-teams-webhook/ops", "https://example.org/secret-token"),
    ],
)
def test_an_alarm_address_that_reaches_nobody_is_refused(fleet: Production, block: str, url: str) -> None:
    """It is not shown, and no block is made of it."""
    (fleet.place.path / "fleet.yaml").write_text(yaml.safe_dump({"models": [], "alarms": {"block": block}}))
    refused = fleet.call("deploy", REQUANT_ALARM_URL=url)
    assert (refused.status, refused.stdout) == (1, "")
    assert "REQUANT_ALARM_URL is no address that a block of type" in refused.stderr
    assert "secret-token" not in refused.stderr
    assert "ops" not in fleet.all("block_documents")


def test_a_night_comes_by_itself(fleet: Production, plain: dict[str, Any]) -> None:
    """The schedule starts a run, named and tagged as nightly; without the cron no more are planned."""
    fleet.deploy(plain, cron="* * * * *")
    (run,) = wait_for(lambda: fleet.runs("nightly", "model:plain")[:1], "the night")
    fleet.deploy(plain)
    run = fleet.ended(run["id"])
    assert run["state_type"] == "COMPLETED", fleet.log(run["id"])
    assert run["name"] == f"plain nightly {run['expected_start_time'][:10]}"
    assert {"requant", "nightly", "model:plain", "runtime:onnxruntime"} <= set(run["tags"])
    planned = fleet.post("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
    assert [one for one in planned if one["deployment_id"] == run["deployment_id"]] == []


def test_a_model_runs_once_at_a_time(fleet: Production, plain: dict[str, Any]) -> None:
    """Whatever starts them: its deployments share one limit, and the second run waits without holding a worker."""
    fleet.deploy(plain)
    ids = [fleet.start(f"requantize/{kind}-plain", {}) for kind in ("by-hand", "nightly")]
    states: set[str] = set()

    def both_ended() -> bool:
        runs = [fleet.get(f"/flow_runs/{run_id}") for run_id in ids]
        states.update(run["state_name"] for run in runs)
        assert sum(run["state_type"] in {"PENDING", "RUNNING"} for run in runs) < 2
        return all(run["state_type"] == "COMPLETED" for run in runs)

    wait_for(both_ended, "both runs")
    assert "AwaitingConcurrencySlot" in states


@pytest.mark.parametrize("path", sorted(POOLS.glob("*.json")), ids=lambda path: path.stem)
def test_job_templates_say_every_variable_that_they_use(fleet: Production, path: Path) -> None:
    """What a template names is declared, what is declared has a use, and a server takes it."""
    template = json.loads(path.read_text())
    declared = template["variables"]["properties"].keys()
    used = {text.partition("}}")[0].strip() for text in json.dumps(template["job_configuration"]).split("{{")[1:]}
    assert used == declared
    pool = {"name": path.stem, "type": path.stem.partition("-")[0], "base_job_template": template}
    assert fleet.post("/work_pools/", pool)["base_job_template"] == template
    fleet.ask("DELETE", f"/work_pools/{path.stem}")


def test_docker_takes_the_gpus_that_the_template_asks_for() -> None:
    """By Docker's own client, to which Prefect hands them; no daemon is asked."""
    template = json.loads((POOLS / "docker-gpu.json").read_text())
    (request,) = template["job_configuration"]["container_create_kwargs"]["device_requests"]
    count = template["variables"]["properties"]["gpu_count"]["default"]
    assert DeviceRequest(**{**request, "count": count})["Capabilities"] == [["gpu"]]
