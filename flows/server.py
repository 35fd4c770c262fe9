"""The Prefect server that commands speak to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.orchestration.routes import ServerRoutes
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from tasks.contracts.errors import RequantError, SpecError

_PAGE = 200  # what Prefect gives at most


@contextmanager
def prefect_server() -> Iterator[SyncPrefectClient]:
    """A client of the configured server; one that starts with the command would forget all at its end.

    Raises:
        SpecError: if none is configured.
        RequantError: if it does not answer, or refuses something.
    """
    url = PREFECT_API_URL.value()
    if url is None:
        raise SpecError("PREFECT_API_URL is not set.", remedy="Set it to your server, as http://127.0.0.1:4200/api.")
    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        raise refusal(error) from error
    except (httpx.TransportError, RuntimeError) as error:
        raise RequantError(f"No Prefect server answers at {url}: {error}.", remedy="Mend PREFECT_API_URL.") from error


def refusal(error: PrefectHTTPStatusError) -> RequantError:
    """What the server refused, and what helps."""
    request, response = error.request, error.response
    asks_for_password = response.status_code == httpx.codes.UNAUTHORIZED
    return RequantError(
        f"{request.method} {request.url} was refused ({response.status_code}): {response.text[:500]}",
        remedy="Set PREFECT_API_AUTH_STRING to the server's." if asks_for_password else "The server's log says more.",
    )


def read_all(client: SyncPrefectClient, path: ServerRoutes, body: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every object that a filter of Prefect's API lets through."""
    found: list[dict[str, Any]] = []
    while True:
        page = client.request("POST", path, json={**(body or {}), "limit": _PAGE, "offset": len(found)}).json()
        found += page
        if len(page) < _PAGE:
            return found
