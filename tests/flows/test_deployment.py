"""The deployments of prefect.yaml by Prefect's own command, and a run by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.flows.production import PREFECT

if TYPE_CHECKING:
    from tests.flows.production import Production

ROOT = Path(__file__).resolve().parents[2]


def prefect(fleet: Production, *arguments: str) -> str:
    """What a command prints; it must end well."""
    ended = subprocess.run(
        [PREFECT, *arguments], cwd=fleet.place.path, env={**os.environ, **fleet.environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_a_run_by_hand_goes_through_server_and_worker(fleet: Production, plain: dict[str, Any]) -> None:
    """The spec comes as JSON, is checked before a run exists, and names the run; the worker ends it well."""
    shutil.copy(ROOT / "prefect.yaml", fleet.place.path)
    prefect(fleet, "--no-prompt", "deploy", "--all")
    deployment = fleet.all("deployments")["requantize/by-hand"]
    assert deployment["entrypoint"] == "flows.requantize.requantize"
    assert deployment["schedules"] == []

    before = {run["id"] for run in fleet.runs()}
    wrong = {"parameters": {"spec": {**plain, "quant": {"method": "guess"}}}}
    refused = httpx.post(f"{fleet.url}/deployments/{deployment['id']}/create_flow_run", json=wrong, timeout=30)
    assert refused.status_code == httpx.codes.CONFLICT
    assert "spec.quant.method" in refused.json()["detail"]
    assert {run["id"] for run in fleet.runs()} == before

    prefect(fleet, "deployment", "run", "requantize/by-hand", "--param", f"spec={json.dumps(plain)}", "--watch")
    (run,) = [run for run in fleet.runs("by-hand") if run["id"] not in before]
    assert (run["state_type"], run["name"]) == ("COMPLETED", f"plain by hand {run['expected_start_time'][:10]}")
    assert fleet.place.leftovers() == []


def test_the_form_says_what_every_key_is(fleet: Production, plain: dict[str, Any]) -> None:
    """In the UI each key of the spec has a title or a description, and the model's own values are filled in."""
    fleet.deploy(plain)
    deployment = fleet.all("deployments")["requantize/by-hand-plain"]
    assert deployment["parameters"]["spec"]["model"] == plain["model"]
    schema = deployment["parameter_openapi_schema"]
    sections = {**schema["definitions"], "parameters": schema}
    silent = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, said in section["properties"].items()
        if not said.get("description") and "$ref" not in said  # a section describes itself
    ]
    assert silent == []
