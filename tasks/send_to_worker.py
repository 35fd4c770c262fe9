"""Step: a part of a run that another machine does, as a deployment on a worker there.

Both sides share the store and nothing else. What the worker found out, or why it could not, is a document at a key that
the sender chose; Prefect's own results would be pickled, and lie on the worker's disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar, cast
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.objects import State as RunState
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling
from pydantic import BaseModel

from tasks.contracts import errors
from tasks.contracts.errors import EngineError, RequantError
from tasks.contracts.settings import Settings
from tasks.step import disk_errors, run_id, run_prefix, step, the_store

R = TypeVar("R", bound=BaseModel)
POLL_S = 2.0
WORKER_S = 120.0  # for which a pool without a worker is waited for: one that is started anew takes less


@step("send to worker")
def send_to_worker(deployment: str, parameters: Mapping[str, BaseModel], model: str, answer_type: type[R]) -> R:
    """What the flow behind `deployment` finds out about `parameters`.

    It is cancelled if it takes too long, or if this run ends first.

    Raises:
        RequantError: what the flow refused, as it was refused there.
        EngineError: if there is no such deployment, no worker, no answer, or not in time.
    """
    store, logger, limit_s = the_store(), get_run_logger(), 60 * Settings().worker_minutes
    key = f"{run_prefix(model, run_id())}/{deployment.replace('/', '-')}.json"
    values = {name: value.model_dump(mode="json") for name, value in parameters.items()}
    with get_client(sync_client=True) as client:
        wait_for_worker(client, deployment, time.monotonic() + WORKER_S)
        started = run_deployment(
            deployment,
            parameters={**values, "answer_key": key},
            timeout=0,
            flow_run_name=f"{model} on {deployment}",  # until it starts, and names itself
            # A second attempt of this run starts a second child; a retry of this step goes on with the first.
            idempotency_key=f"{runtime.flow_run.id}:{runtime.flow_run.run_count}:{deployment}",
        )
        child = cast(FlowRun, started)  # a coroutine only where an event loop runs
        logger.info("sent to %s: %s", deployment, child.name)
        with _cancelled_on_error(client, child.id):
            state = _final_state(client, child, deadline=time.monotonic() + limit_s)
    said = store.read_text(key)
    if said is not None:
        document = json.loads(said)
        if "refusal" in document:
            kind = getattr(errors, document["refusal"])
            raise kind(document["problem"], remedy=document["remedy"])
        if state.is_completed():
            return answer_type.model_validate_json(json.dumps(document["answer"]))
    raise EngineError(
        f"{deployment} ended as {state.name} and gave no answer: {state.message or 'no message'}.",
        remedy=f"Read the log of {child.name}, and see that its worker has the same REQUANT_STORE ({store}).",
    )


def answer(key: str, compute: Callable[[], BaseModel]) -> None:
    """The worker's side: leave what comes of `compute`, or why it is refused, where the sender looks for it."""
    store = the_store()
    try:
        found = compute()
    except RequantError as error:
        refusal = {"refusal": type(error).__name__, "problem": error.problem, "remedy": error.remedy}
        with disk_errors():
            store.write_text(key, json.dumps(refusal, indent=1))
        raise
    with disk_errors():
        store.write_text(key, json.dumps({"answer": json.loads(found.model_dump_json())}, indent=1))


def wait_for_worker(client: SyncPrefectClient, deployment: str, deadline: float) -> None:
    """Until `deadline` by the monotonic clock.

    Raises:
        EngineError: if there is no such deployment, or nobody who would do it.
    """
    try:
        pool_name = client.read_deployment_by_name(deployment).work_pool_name
    except ObjectNotFound as error:
        raise EngineError(
            f"The Prefect server at {client.api_url} has no deployment {deployment}.",
            remedy="`requant deploy` makes build/gpu, train/gpu and those of each model; or mend REQUANT_BUILD_ON and "
            "REQUANT_TRAIN_ON.",
        ) from error
    while pool_name is not None:
        status = client.read_work_pool(pool_name).status
        if status is None or status.value == "READY":
            return
        if time.monotonic() > deadline:
            raise EngineError(
                f"{deployment} needs a worker of work pool {pool_name}, which is {status.value}.",
                remedy=f"Start one: prefect worker start --pool {pool_name}.",
            )
        time.sleep(POLL_S)


def _final_state(client: SyncPrefectClient, child: FlowRun, *, deadline: float) -> RunState:
    while True:
        state = client.read_flow_run(child.id).state
        if state is not None and state.is_final():
            return state
        if time.monotonic() > deadline:
            raise too_late(child, state)
        time.sleep(POLL_S)


def too_late(child: FlowRun, state: RunState | None) -> EngineError:
    """What is said of a child that takes too long."""
    found = state.name if state else "unknown"
    return EngineError(
        f"{child.name} is still {found} after {Settings().worker_minutes:g} minutes and was cancelled.",
        remedy="See what keeps its worker busy, or raise REQUANT_WORKER_MINUTES.",
    )


def cancel(client: SyncPrefectClient, child: UUID) -> None:
    """Ask its worker to stop it."""
    with suppress(PrefectHTTPStatusError):  # it may have ended meanwhile
        client.set_flow_run_state(child, Cancelling(), force=True)


@contextmanager
def _cancelled_on_error(client: SyncPrefectClient, child: UUID) -> Iterator[None]:
    try:
        yield
    except BaseException:
        cancel(client, child)
        raise
