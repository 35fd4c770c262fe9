"""Several models at once, of which one passes, one is rejected and one fails: here, and by a real worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    WorkPoolFilter,
    WorkPoolFilterName,
)

from flows.fleet import requantize_many
from tasks import run_models
from tasks.contracts.errors import RequantError, SpecError
from tasks.contracts.spec import RunSpec, spec_from
from tests.flows.prefect_server import end

if TYPE_CHECKING:
    from tests.flows.conftest import Place

PREFECT = str(Path(sys.executable).with_name("prefect"))
POOL = "fleet"
NAMES = ("lost", "plain", "strict")


@pytest.fixture
def specs(plain: dict[str, Any]) -> tuple[RunSpec, ...]:
    """The first one has no weights, the last one a gate that nothing passes."""
    lost = {**plain, "name": "lost", "model": {**plain["model"], "weights": "nowhere.safetensors"}}
    strict = {**plain, "name": "strict", "gates": {**plain["gates"], "min_compression": 50.0}}
    return tuple(spec_from(values, origin="test") for values in (lost, plain, strict))


@pytest.fixture
def inside(after_first: Place, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Place:
    """This process is where the fleet is."""
    monkeypatch.chdir(after_first.path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, value in after_first.environment.items():
        monkeypatch.setenv(name, value)
    return after_first


@pytest.fixture
def client(inside: Place) -> Iterator[SyncPrefectClient]:
    """Each model deployed to a pool of processes."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        flow = client.create_flow_from_name("requantize")
        for name in NAMES:
            client.create_deployment(
                flow, name=f"by-hand-{name}", entrypoint="flows.requantize.requantize", path=str(inside.path),
                work_pool_name=POOL,
            )  # fmt: skip
        yield client
        client.delete_work_pool(POOL)


@pytest.fixture
def worker(client: SyncPrefectClient, inside: Place, prefect_server: str, tmp_path: Path) -> Iterator[None]:
    environment = {
        **os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": os.pathsep.join([str(inside.path), *sys.path]),
    }  # fmt: skip
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(
            [PREFECT, "worker", "start", "--pool", POOL], env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            end(process)


def failure(specs: tuple[RunSpec, ...], **options: Any) -> str:
    """What the flow says in the end."""
    state: Any = requantize_many(specs, return_state=True, **options)
    error = state.result(raise_on_failure=False)
    assert isinstance(error, RequantError), error
    return error.problem


def told() -> dict[str, dict[str, str]]:
    """The newest summary on the server, by model."""
    named = ArtifactFilter(key=ArtifactFilterKey(any_=["fleet"]))
    with get_client(sync_client=True) as client:
        newest = max(client.read_artifacts(artifact_filter=named), key=lambda artifact: str(artifact.created))
    return {row["model"]: row for row in json.loads(str(newest.data))}


def check(problem: str) -> None:
    """Whoever ran them, the same is said."""
    assert problem.startswith("2 of 3 models failed: lost (ModelError: ")
    assert "; strict (rejected: compression)" in problem
    table = told()
    assert tuple(table) == NAMES
    assert "nowhere.safetensors" in table["lost"]["outcome"]
    assert table["lost"]["INT8 %"] == "\N{EN DASH}"
    assert table["plain"]["outcome"].startswith(("passed", "released", "nothing changed since"))  # as it was before
    assert table["strict"]["outcome"] == "rejected: compression"
    assert float(table["strict"]["INT8 %"]) > 50


def test_without_a_worker_they_run_here_in_turn(inside: Place, specs: tuple[RunSpec, ...]) -> None:
    """The first one fails, and the others are done all the same."""
    check(failure(specs, on_workers=False))


def test_a_worker_does_each(client: SyncPrefectClient, worker: None, specs: tuple[RunSpec, ...]) -> None:
    """As runs of their deployments, which have the fleet's run as their parent."""
    check(failure(specs, at_once=2))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))  # the server is shared with other tests
    children = [run for run in client.read_flow_runs(work_pool_filter=pool) if run.parent_task_run_id]
    assert sorted(run.name.split(" ")[0] for run in children) == [*NAMES]


def test_what_cannot_be_sent_is_a_failure_of_that_model(
    client: SyncPrefectClient, specs: tuple[RunSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not deployed, and a pool without a worker, which is not waited for once for each model."""
    monkeypatch.setattr(run_models, "WORKER_S", 0.0)
    absent = specs[0].model_copy(update={"name": "absent"})
    problem = failure((absent, specs[1]))
    assert "2 of 2 models failed: absent (The Prefect server at " in problem
    assert "has no deployment requantize/by-hand-absent" in told()["absent"]["outcome"]
    assert "needs a worker of work pool fleet" in told()["plain"]["outcome"]


def test_two_specs_of_one_name_are_refused(specs: tuple[RunSpec, ...], prefect_server: str) -> None:
    """They would be one model's releases."""
    with pytest.raises(SpecError, match="one name"):
        requantize_many((specs[0], specs[0]))
