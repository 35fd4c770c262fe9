"""`requant deploy`: a Prefect server is made to agree with a fleet file and prefect.yaml.

What is there and right is left alone, what differs is changed, and what requant made and no longer wants is removed.
Ours are deployments with the tag OURS, and automations and limits whose names start with `requant:`; nothing else is
removed, and a work pool that somebody else made is used as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.blocks.core import Block, UnknownBlockType
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.workers.process import ProcessWorker
from pydantic import SecretStr, ValidationError

from flows.alarms import PREFIX, Notify, alarms, through
from flows.announce import ON_RETRAIN
from flows.server import prefect_server, read_all
from tasks.contracts.announcement import EVENT, RESOURCE
from tasks.contracts.errors import SpecError
from tasks.contracts.fleet import Fleet, WorkerType, read_fleet
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec

ROOT = Path(__file__).resolve().parents[1]
OURS = "requant-fleet"  # tag of the deployments that the fleet file decides on
POOLS = {"cpu": "Runs of requant.", "gpu": "What runs of requant do on GPUs."}  # and what they say of themselves
FOR_EACH_MODEL = ("nightly", "on-retrain", "by-hand")  # of prefect.yaml; by-hand is there without a model too
GPU_LIMIT = f"{PREFIX}gpu"
STARTS = f"{PREFIX} run "  # names of automations that start runs
STEPS = "prefect.deployments.steps"
WRITTEN = ("schedule", "slug", "parameters", "active")  # of a schedule
GRACE_S = 600  # that a run may take from being picked up to its start before its place in a limit is given away


@dataclass(frozen=True)
class Wanted:
    """A deployment as the server should hold it."""

    flow: str
    body: dict[str, Any]  # of Prefect's API
    schedules: tuple[dict[str, Any], ...]
    limit: str | None  # shared by name
    triggers: tuple[dict[str, Any], ...]  # of automations that start runs: name, parameters, and an EventTrigger's

    @property
    def name(self) -> str:
        return f"{self.flow}/{self.body['name']}"


def deploy(file: Path, workers: WorkerType | None) -> Iterator[str]:
    """Make the server agree with the fleet in `file`: a line for each thing that had to be done, and one in the end.

    Raises:
        SpecError: if something in the files does not fit. Nothing was changed then.
        RequantError: if the server does not answer or refuses something. Deploying again goes on from there.
    """
    fleet, specs = read_fleet(file, workers)
    wanted = list(_deployments(fleet, specs, file.resolve().parent))
    templates = {pool: _template(fleet, pool) for pool in POOLS}
    num_done = 0
    with prefect_server() as client:
        notify = _notify(client, fleet)
        for line in _apply(client, fleet, wanted, templates, notify):
            num_done += 1
            yield line
    yield f"{len(specs)} models, {len(wanted)} deployments: {num_done or 'no'} changes"


def _apply(
    client: SyncPrefectClient,
    fleet: Fleet,
    wanted: list[Wanted],
    templates: Mapping[str, dict[str, Any]],
    notify: Notify | None,
) -> Iterator[str]:
    yield from _apply_pools(client, fleet, templates)
    there = _deployments_there(client, wanted)
    # Before limits: with a deployment Prefect deletes its limit, which others may share.
    for name in [name for name, one in there.items() if OURS in one["tags"]]:
        if name not in {one.name for one in wanted}:
            client.delete_deployment(UUID(there.pop(name)["id"]))
            yield f"removed deployment {name}"
    there = _deployments_there(client, wanted)  # which limits they have may have changed
    limits = {one.limit: fleet.gpus if one.limit == GPU_LIMIT else 1 for one in wanted if one.limit}
    yield from _apply_limits(client, limits)
    limit_ids = {name: limit["id"] for name, limit in _limits_there(client).items()}
    deployment_ids: dict[str, UUID] = {}
    for one in wanted:
        found = there.get(one.name)
        if found is None or not _agrees(found, one):
            deployment_ids[one.name] = _write(client, one, found, limit_ids)
            yield f"{'changed' if found else 'made'} deployment {one.name}{_when(one)}"
        else:
            deployment_ids[one.name] = UUID(found["id"])
    for name in limit_ids.keys() - limits.keys():
        client.delete_global_concurrency_limit_by_name(name)
        yield f"removed limit {name}"
    starting = (_starting(trigger, deployment_ids[one.name]) for one in wanted for trigger in one.triggers)
    yield from _apply_automations(client, [*alarms(fleet.alarms, notify), *starting])


def _deployments(fleet: Fleet, specs: Mapping[str, RunSpec], home: Path) -> Iterator[Wanted]:
    """Those of prefect.yaml, and those that each model has of them.

    Raises:
        SpecError: if there is no prefect.yaml, or a cron is none.
    """
    for declared in _declared():
        kind = declared["name"]
        if kind == "watch":
            watched = {"models": list(specs), "idle_days": fleet.alarms.idle_days}
            yield _wanted(fleet, home, declared, parameters=watched)
        elif kind == "by-hand" or kind not in FOR_EACH_MODEL:
            yield _wanted(fleet, home, declared)
        for model, (name, spec) in zip(fleet.models, specs.items(), strict=True):
            if kind in FOR_EACH_MODEL:
                cron = model.cron or fleet.cron
                yield _wanted(
                    fleet,
                    home,
                    {**declared, "name": f"{kind}-{name}"},
                    parameters={"spec": spec.model_dump(mode="json", exclude_unset=True)},
                    tags=(f"model:{name}", f"runtime:{spec.target.runtime}"),
                    schedules=({"cron": cron, "slug": "nightly"},) if kind == "nightly" and cron else (),
                    limit=f"{PREFIX}{name}:{spec.target.runtime}",
                    triggers=(_on_retrain(name),) if kind == "on-retrain" else (),
                )


def _declared() -> list[dict[str, Any]]:
    path = ROOT / "prefect.yaml"
    try:
        declared: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
    except OSError as error:
        raise SpecError(
            f"{path}: {error.strerror}.", remedy="Deploy from a checkout of requant: prefect.yaml is not installed."
        ) from error
    return declared


def _wanted(
    fleet: Fleet,
    home: Path,
    declared: Mapping[str, Any],
    *,
    parameters: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
    schedules: Iterable[Mapping[str, Any]] = (),
    limit: str | None = None,
    triggers: Iterable[dict[str, Any]] = (),
) -> Wanted:
    """What prefect.yaml declares, with what the fleet adds."""
    flow: Flow[..., Any] = load_flow_from_entrypoint(declared["entrypoint"], use_placeholder_flow=False)
    directory = fleet.directory or (str(home) if fleet.workers == "process" else None)
    pool = declared["work_pool"]
    body = {
        "name": declared["name"],
        "description": declared["description"],
        "version": version("requant"),
        "entrypoint": declared["entrypoint"],
        "parameters": {**declared.get("parameters", {}), **(parameters or {})},
        "parameter_openapi_schema": flow.parameters.model_dump(mode="json", exclude_unset=True),
        "enforce_parameter_schema": declared["enforce_parameter_schema"],
        "tags": [*declared["tags"], *tags, OURS],
        "work_pool_name": pool["name"],
        "job_variables": {**pool.get("job_variables", {}), **({"image": fleet.image} if fleet.image else {})},
        "pull_steps": [{f"{STEPS}.set_working_directory": {"directory": directory}}] if directory else [],
        "concurrency_options": {"collision_strategy": "ENQUEUE", "grace_period_seconds": GRACE_S},
    }
    return Wanted(
        flow=flow.name,
        body=body,
        schedules=tuple(_schedule(one, fleet.timezone) for one in (*declared.get("schedules", ()), *schedules)),
        limit=GPU_LIMIT if pool["name"] == "gpu" else limit,
        triggers=(*declared.get("triggers", ()), *triggers),
    )


def _schedule(declared: Mapping[str, Any], timezone: str) -> dict[str, Any]:
    try:
        schedule = CronSchedule(cron=declared["cron"], timezone=timezone)
    except ValidationError:
        raise SpecError(
            f"{declared['cron']!r} is no cron.", remedy="Write it as in 0 2 * * *, nightly at two."
        ) from None
    return {"schedule": schedule.model_dump(mode="json"), "slug": declared["slug"], "parameters": {}, "active": True}


def _on_retrain(model: str) -> dict[str, Any]:
    """The event as it is: what it lacks is for the run to say. Prefect's plain templates fail on its id."""
    announcement = f"{{{{ {{'id': event.id | string, 'model': '{model}', 'payload': event.payload}} | tojson }}}}"
    return {
        "name": f"{STARTS}{ON_RETRAIN}{model}",
        "match": {"prefect.resource.id": f"{RESOURCE}{model}"},
        "expect": [EVENT],
        "parameters": {
            "announcement": {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": announcement}}
        },
    }


def _starting(trigger: Mapping[str, Any], deployment_id: UUID) -> AutomationCore:
    fires = {key: value for key, value in trigger.items() if key not in {"name", "parameters"}}
    return AutomationCore(
        name=trigger["name"],
        description="Starts a run for each such event.",
        trigger=EventTrigger.model_validate(fires),
        actions=[RunDeployment(deployment_id=deployment_id, parameters=trigger["parameters"])],
    )


def _template(fleet: Fleet, pool: str) -> dict[str, Any]:
    """The pool's base job template: Prefect's own for processes."""
    if fleet.workers == "process":
        return ProcessWorker.get_default_base_job_template()
    template: dict[str, Any] = json.loads((ROOT / f"infra/pools/{fleet.workers}-{pool}.json").read_text())
    return template


def _apply_pools(client: SyncPrefectClient, fleet: Fleet, templates: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for name, template in templates.items():
        try:
            found = client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(
                WorkPoolCreate(name=name, type=fleet.workers, description=POOLS[name], base_job_template=template)
            )
            yield f"made work pool {name} ({fleet.workers})"
            continue
        if found.type != fleet.workers:
            raise SpecError(
                f"The work pool {name} is of type {found.type}, and the fleet asks for {fleet.workers}.",
                remedy=f"Stop its workers and `prefect work-pool delete {name}`, or mend `workers`.",
            )
        wanted = _with_defaults(template, found.base_job_template)
        if found.description == POOLS[name] and found.base_job_template != wanted:
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=wanted))
            yield f"changed work pool {name}"


def _with_defaults(template: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The template with the defaults of the one that is there: what was set for the pool in the UI."""
    wanted, there = deepcopy(dict(template)), found.get("variables", {}).get("properties", {})
    for name, variable in wanted["variables"]["properties"].items():
        if "default" in there.get(name, {}):
            variable["default"] = there[name]["default"]
    return wanted


def _deployments_there(client: SyncPrefectClient, wanted: list[Wanted]) -> dict[str, dict[str, Any]]:
    """By name: ours, and those that have a name of ours."""
    flows = {flow["id"]: flow["name"] for flow in read_all(client, "/flows/filter")}
    names = sorted({one.body["name"] for one in wanted})
    filters: list[dict[str, Any]] = [{"tags": {"all_": [OURS]}}, {"name": {"any_": names}}]
    found = (one for chosen in filters for one in read_all(client, "/deployments/filter", {"deployments": chosen}))
    return {f"{flows[one['flow_id']]}/{one['name']}": one for one in found}


def _agrees(found: Mapping[str, Any], one: Wanted) -> bool:
    """Whether it is in the server as it should be. What an operator has paused stays paused."""
    limit = found["global_concurrency_limit"]
    schedules = [{**schedule, "active": True} for schedule in found["schedules"]]
    return (
        all(found[key] == value for key, value in one.body.items())
        and (limit["name"] if limit else None) == one.limit
        and [{key: schedule[key] for key in WRITTEN} for schedule in schedules] == list(one.schedules)
    )


def _write(
    client: SyncPrefectClient, one: Wanted, found: Mapping[str, Any] | None, limit_ids: Mapping[str, str]
) -> UUID:
    """By the API itself: Prefect's client has no word for a limit that deployments share."""
    limit_id = limit_ids[one.limit] if one.limit else None
    paused = {schedule["slug"] for schedule in found["schedules"] if not schedule["active"]} if found else set()
    schedules = [{**schedule, "active": schedule["slug"] not in paused} for schedule in one.schedules]
    body = {**one.body, "global_concurrency_limit_id": limit_id, "schedules": schedules}
    if found is None:
        flow_id = client.create_flow_from_name(one.flow)
        made = client.request("POST", "/deployments/", json={**body, "flow_id": str(flow_id)})
        return UUID(made.json()["id"])
    del body["name"]
    slugs = {schedule["slug"] for schedule in one.schedules}
    for schedule in found["schedules"]:
        if schedule["slug"] not in slugs:  # an update leaves them
            client.delete_deployment_schedule(UUID(found["id"]), UUID(schedule["id"]))
    client.request("PATCH", "/deployments/{id}", path_params={"id": found["id"]}, json=body)
    return UUID(found["id"])


def _when(one: Wanted) -> str:
    times = (schedule["schedule"] for schedule in one.schedules)
    return "".join(f" ({schedule['cron']} {schedule['timezone']})" for schedule in times)


def _limits_there(client: SyncPrefectClient) -> dict[str, dict[str, Any]]:
    found = read_all(client, "/v2/concurrency_limits/filter")
    return {limit["name"]: limit for limit in found if limit["name"].startswith(PREFIX)}


def _apply_limits(client: SyncPrefectClient, limits: Mapping[str, int]) -> Iterator[str]:
    there = _limits_there(client)
    for name, limit in limits.items():
        if name not in there or there[name]["limit"] != limit:
            client.upsert_global_concurrency_limit_by_name(name, limit)
            yield f"{'changed' if name in there else 'made'} limit {name} ({limit} at once)"


def _apply_automations(client: SyncPrefectClient, wanted: list[AutomationCore]) -> Iterator[str]:
    found = [one for one in read_all(client, "/automations/filter") if one["name"].startswith(PREFIX)]
    there = {one["name"]: one for one in reversed(found)}
    names = {one.name for one in wanted}
    for one in found:
        if one["name"] not in names or there[one["name"]] is not one:
            client.delete_automation(UUID(one["id"]))
            yield f"removed automation {one['name']}"
    for automation in wanted:
        if automation.name not in there:
            client.create_automation(automation)
            yield f"made automation {automation.name}"
            continue
        old = AutomationCore.model_validate(there[automation.name])
        if automation != old.model_copy(update={"enabled": automation.enabled}):  # one that was switched off stays so
            # Prefect's client sends only what was set; the server wants triggers in full, and no owner.
            values = automation.model_dump(exclude={"owner_resource"})
            whole = AutomationCore.model_validate({**values, "enabled": old.enabled})
            client.update_automation(UUID(there[automation.name]["id"]), whole)
            yield f"changed automation {automation.name}"


def _notify(client: SyncPrefectClient, fleet: Fleet) -> Notify | None:
    """How alarms are told; the address of the block is written there if the environment has one.

    Raises:
        SpecError: if there is no such block, or it can tell nobody anything.
    """
    if fleet.alarms.block is None:
        return None
    block_type, _, name = fleet.alarms.block.partition("/")
    url = Settings().alarm_url
    if url is not None:
        _block(block_type, url).save(name, overwrite=True)
    try:
        document = client.read_block_document_by_name(name, block_type, include_secrets=False)
    except ObjectNotFound:
        raise SpecError(
            f"Prefect has no block {fleet.alarms.block}.",
            remedy="Make it in the UI, or set REQUANT_ALARM_URL to its address and deploy again.",
        ) from None
    capabilities = document.block_schema.capabilities if document.block_schema else []
    if block_type != "webhook" and "notify" not in capabilities:
        raise SpecError(
            f"The block {fleet.alarms.block} cannot notify anybody.",
            remedy="Take a notification block such as slack-webhook, or webhook.",
        )
    return through(block_type, document.id)


def _block(block_type: str, url: SecretStr) -> Block:
    """The block with that address. Most of Prefect's take any, and tell nobody if Apprise cannot read it.

    Raises:
        SpecError: if an address does not make such a block, or this one is of another kind. It is not shown.
    """
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # an address that it cannot read it would show
    try:
        block = Block.get_block_class_from_key(block_type)(url=url)
    except (UnknownBlockType, ValidationError):
        raise SpecError(
            f"REQUANT_ALARM_URL cannot become a block of type {block_type}.",
            remedy="Make that block in the UI; those made of an address are slack-webhook, webhook and their like.",
        ) from None
    except ValueError:  # Microsoft Teams, of an address that is not its own
        block = None
    if block is None or len(getattr(block, "_apprise_client", [block])) == 0:
        raise SpecError(
            f"REQUANT_ALARM_URL is no address that a block of type {block_type} can send to.",
            remedy="Set it to the whole address that the service gives, or take webhook/NAME, which sends JSON.",
        )
    return block
