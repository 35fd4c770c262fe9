"""A Prefect server with a worker, a fleet and somebody who hears alarms: all real, on loopback, for many tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deploy import deploy
from flows.machine import read_env
from tests.flows.prefect_server import end

if TYPE_CHECKING:
    from tasks.contracts.fleet import WorkerType
    from tests.flows.conftest import Ended, Place

T = TypeVar("T")
PREFECT = str(Path(sys.executable).with_name("prefect"))
BLOCK = "webhook/requant-tests"
SETTINGS = {  # those of `make up`; what is looked at now and then is looked at often
    **read_env("server.env"),
    **read_env("worker.env"),
    "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "3",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
    "PREFECT_CLI_COLORS": "false",
}


@dataclass(frozen=True)
class Production:
    """A server, a worker of its pool cpu, and a place in which one run of the model `plain` has ended well."""

    url: str
    place: Place
    environment: Mapping[str, str]
    heard: list[dict[str, Any]] = field(default_factory=list)  # by the webhook
    webhook: str = ""

    def deploy(self, *models: Mapping[str, Any], workers: WorkerType | None = None, **fleet: Any) -> list[str]:
        """Make the server agree with a fleet of these specs."""
        for model in models:
            (self.place.path / f"{model['name']}.yaml").write_text(yaml.safe_dump(dict(model)))
        values = {"models": [{"spec": f"{model['name']}.yaml"} for model in models], **fleet}
        file = self.place.path / "fleet.yaml"
        file.write_text(yaml.safe_dump(values))
        with temporary_settings({PREFECT_API_URL: self.url}), pytest.MonkeyPatch.context() as patch:
            patch.setenv("REQUANT_ALARM_URL", self.webhook)
            return list(deploy(file, workers))

    def call(self, *arguments: str, **environment: str) -> Ended:
        """`requant …` as an operator types it."""
        return self.place.end(self.place.start(*arguments, **{**self.environment, **environment}))

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def post(self, path: str, body: Any) -> Any:
        return self.ask("POST", path, body)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The API's answer; None if it has nothing to say."""

        def answer() -> httpx.Response | None:
            answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=30)
            return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer  # SQLite is locked

        answered = wait_for(answer, f"{method} {path}").raise_for_status()
        return answered.json() if answered.content else None

    def all(self, kind: str) -> dict[str, Any]:
        """Everything of a kind by its name, or by its flow's and its own."""
        found = self.post(f"/{kind}/filter", {})
        if kind != "deployments":
            return {one["name"]: one for one in found}
        flows = {flow["id"]: flow["name"] for flow in self.post("/flows/filter", {})}
        return {f"{flows[one['flow_id']]}/{one['name']}": one for one in found}

    def start(self, deployment: str, parameters: Mapping[str, Any]) -> str:
        """Id of a new run."""
        found = self.get(f"/deployments/name/{deployment}")
        run = self.post(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})
        return str(run["id"])

    def runs(self, *tags: str) -> list[dict[str, Any]]:
        """Newest first; what is still to come is not among them."""
        body = {"flow_runs": {"tags": {"all_": list(tags)}}, "sort": "START_TIME_DESC"} if tags else {}
        return [run for run in self.post("/flow_runs/filter", body) if run["state_type"] != "SCHEDULED"]

    def ended(self, run_id: str) -> dict[str, Any]:
        """The run, once it has ended."""

        def ended() -> dict[str, Any] | None:
            run: dict[str, Any] = self.get(f"/flow_runs/{run_id}")
            return run if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None

        return wait_for(ended, f"run {run_id} to end")

    def log(self, run_id: str) -> str:
        lines = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200})
        return "\n".join(line["message"] for line in lines)

    def alarm(self, **said: str) -> dict[str, Any]:
        """The alarm that says all this, once it has arrived."""

        def arrived() -> dict[str, Any] | None:
            return next((one for one in self.heard if said.items() <= one.items()), None)

        return wait_for(arrived, f"the alarm {said}; heard: {self.heard}")


def wait_for(happened: Callable[[], T | None], what: str, seconds: float = 300) -> T:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = happened()
        except httpx.TransportError:
            found = None  # not listening yet
        if found is not None and found is not False and found != []:
            return found
        time.sleep(0.2)
    pytest.fail(f"waited in vain for {what}")


@contextmanager
def production(place: Place, folder: Path) -> Iterator[Production]:
    """A running server and worker; their logs are in `folder`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {**place.environment, **SETTINGS, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": url}
    with (
        _process(folder, environment, "server", "start", "--host", "127.0.0.1", "--port", str(port)),
        _ears() as (webhook, heard),
    ):
        wait_for(lambda: httpx.get(f"{url}/health").is_success, "the server to answer")
        running = Production(url, place, environment, heard, webhook)
        running.deploy()  # the worker needs its pool
        with _process(folder, environment, "worker", "start", "--pool", "cpu", "--limit", "3"):
            wait_for(lambda: running.get("/work_pools/cpu")["status"] == "READY", "the worker")
            yield running


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def _process(folder: Path, environment: Mapping[str, str], *arguments: str) -> Iterator[None]:
    with (folder / f"{arguments[0]}.log").open("w") as log:
        process = subprocess.Popen(
            [PREFECT, *arguments], cwd=folder, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            end(process)


@contextmanager
def _ears() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook, and what comes there."""
    heard: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret-token", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
