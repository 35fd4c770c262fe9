"""Step: whole runs of several models on workers, a few at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment

from tasks.contracts.errors import EngineError
from tasks.contracts.records import Record
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.send_to_worker import POLL_S, WORKER_S, cancel, too_late, wait_for_worker
from tasks.step import Progress, step

DEPLOYMENT = "requantize/by-hand-"  # a model's name follows


class Ended(Record):
    """How a model's run came to its end, or why there was none."""

    flow_run: UUID | None
    passed: bool
    message: str


@dataclass(frozen=True)
class _Running:
    spec: RunSpec
    run: FlowRun
    deadline: float  # by the monotonic clock


@step("run models on workers")
def run_models(specs: Sequence[RunSpec], at_once: int) -> dict[str, Ended]:
    """What came of each model's run, by name. One that fails, or cannot be started, does not stop the others.

    Children are cancelled if they take too long, or if this run ends first.
    """
    logger, progress = get_run_logger(), Progress("models done")
    waiting, running, ended = deque(specs), list[_Running](), dict[str, Ended]()
    patience = time.monotonic() + WORKER_S  # for a first worker: shared, so that a fleet does not wait for each model
    with get_client(sync_client=True) as client:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    spec = waiting.popleft()
                    try:
                        running.append(_start(client, spec, patience))
                        logger.info("%s: sent to %s%s", spec.name, DEPLOYMENT, spec.name)
                    except EngineError as error:
                        ended[spec.name] = Ended(flow_run=None, passed=False, message=str(error))
                for one in [*running]:
                    end = _end(client, one)
                    if end is not None:
                        running.remove(one)
                        ended[one.spec.name] = end
                        logger.info("%s: %s", one.spec.name, end.message or "passed")
                        progress(len(ended), len(specs))
                if running:
                    time.sleep(POLL_S)
        except BaseException:
            for one in running:
                with suppress(Exception):  # the others are to be cancelled whatever comes of this one
                    cancel(client, one.run.id)
            raise
    return {spec.name: ended[spec.name] for spec in specs}


def message_of(state: State) -> str:
    """Why a run ended as it did, without Prefect's preamble."""
    return (state.message or state.name or "").removeprefix("Flow run encountered an exception: ")


def _start(client: SyncPrefectClient, spec: RunSpec, patience: float) -> _Running:
    deployment = DEPLOYMENT + spec.name
    wait_for_worker(client, deployment, patience)
    run = run_deployment(
        deployment,
        parameters={"spec": spec.model_dump(mode="json", exclude_unset=True)},
        timeout=0,
        flow_run_name=f"{spec.name} by hand",  # until it starts, and names itself
        idempotency_key=f"{runtime.flow_run.id}:{runtime.flow_run.run_count}:{deployment}",
    )
    return _Running(spec, cast(FlowRun, run), time.monotonic() + 60 * Settings().worker_minutes)


def _end(client: SyncPrefectClient, one: _Running) -> Ended | None:
    state = client.read_flow_run(one.run.id).state
    if state is not None and state.is_final():
        passed = state.is_completed()
        plain = passed and state.name == "Completed"
        return Ended(flow_run=one.run.id, passed=passed, message="" if plain else message_of(state))
    if time.monotonic() < one.deadline:
        return None
    cancel(client, one.run.id)
    return Ended(flow_run=one.run.id, passed=False, message=str(too_late(one.run, state)))
