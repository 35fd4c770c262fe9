"""`requant announce`: news of retrained weights, and what takes them in on a worker."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient

from flows.server import prefect_server, read_all
from tasks.contracts.announcement import EVENT, RESOURCE, News, event_id
from tasks.contracts.errors import SpecError
from tasks.contracts.spec import checked

ON_RETRAIN = "on-retrain-"  # deployment; the model's name follows


def announce(model: str, weights: str, data: str | None, given_id: UUID | None) -> Iterator[str]:
    """Send the event. Without an id of its own the content of weights decides it, so that a repetition is no new run.

    Raises:
        SpecError: if the model is not deployed, or weights or data are named by nothing.
        RequantError: if the weights cannot be read, or the server does not answer.
    """
    news = _news(model, weights, data)
    with prefect_server() as client:
        _check_deployed(client, model)
        if given_id is None:
            from tasks.models.origin import weights_digest

            given_id = event_id(model, news, weights_digest(news.weights))
        event = {
            "id": str(given_id),
            "occurred": datetime.now(UTC).isoformat(),
            "event": EVENT,
            "resource": {"prefect.resource.id": f"{RESOURCE}{model}"},
            "payload": news.model_dump(exclude_none=True),
        }
        client.request("POST", "/events", json=[event])
    yield f"announced {model}: event {given_id}, weights {news.weights}{f', data {news.data}' if news.data else ''}"


def _news(model: str, weights: str, data: str | None) -> News:
    """With paths as they are from anywhere: the worker starts in another folder."""
    from tasks.data.open_source import DIGITS

    if Path(weights).is_file():
        weights = str(Path(weights).resolve())
    if data and data != DIGITS and Path(data).exists():
        data = str(Path(data).resolve())
    values = {"weights": weights, "data": data}
    return checked(News, values, origin=f"announcement of {model}", remedy="Say where the new ones are.")


@flow(name="receive", flow_run_name="announcement of {resource}")
def receive(resource: str) -> None:
    """Every announcement comes here too: one about a model that is not deployed would start nothing, unseen.

    Args:
        resource: What the event is about: requant.model. and a name.
    """
    model = resource.removeprefix(RESOURCE)
    with prefect_server() as client:
        _check_deployed(client, model)
    get_run_logger().info("%s%s has it", ON_RETRAIN, model)


def _check_deployed(client: SyncPrefectClient, model: str) -> None:
    body = {"deployments": {"name": {"like_": ON_RETRAIN}}}
    names = [deployment["name"] for deployment in read_all(client, "/deployments/filter", body)]
    models = sorted(name.removeprefix(ON_RETRAIN) for name in names if name.startswith(ON_RETRAIN))
    if model not in models:
        raise SpecError(
            f"No model {model!r} is deployed; deployed are: {', '.join(models) or 'none'}.",
            remedy="Mend the name, or add its spec to the fleet file and run `requant deploy`.",
        )
