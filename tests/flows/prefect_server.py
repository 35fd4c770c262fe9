"""A Prefect server with a process worker, each a process that can be killed: what an installation consists of."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient

from flows.machine import read_env

PREFECT = str(Path(sys.executable).with_name("prefect"))
POOL = "cpu"
LOCKED_S = 60  # SQLite answers 503 while it is busy
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass
class Installation:
    """A server, its worker, and one deployment of the flow; `home` holds its database and logs."""

    home: Path
    port: int
    environment: Mapping[str, str]
    deployment: UUID | None = None
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def database(self) -> Path:
        return self.home / "prefect.db"

    def start_server(self) -> None:
        self._start("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        wait_for(lambda: self.call("GET", "/health"), "the server to answer")

    def start_worker(self, name: str = "worker", *options: str) -> None:
        self._start(name, "worker", "start", "--pool", POOL, "--type", "process", "--name", name, *options)
        wait_for(lambda: self.call("GET", f"/work_pools/{POOL}")["status"] == "READY", "the worker to be there")

    def stop(self, name: str, sent: signal.Signals = signal.SIGTERM) -> None:
        """A server or a worker; as SIGKILL, nothing of it is told to anyone."""
        process = self.processes.pop(name)
        if sent is signal.SIGTERM:
            end(process)
        else:
            process.send_signal(sent)
            process.wait()

    def deploy(self) -> None:
        with SyncPrefectClient(self.url) as client:
            flow = client.create_flow_from_name("requantize")
            self.deployment = client.create_deployment(
                flow, "test", work_pool_name=POOL, entrypoint="flows.requantize.requantize", tags=["requant"]
            )

    def run(self, spec: Mapping[str, Any], folder: Path, environment: Mapping[str, str]) -> str:
        """The id of a new run, which a worker takes up in `folder`."""
        body = {
            "parameters": {"spec": dict(spec)},
            "job_variables": {"env": dict(environment), "working_dir": str(folder)},
            "state": {"type": "SCHEDULED"},
        }
        return str(self.call("POST", f"/deployments/{self.deployment}/create_flow_run", body)["id"])

    def retry(self, run: str) -> None:
        """As the button in the UI does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.call("POST", f"/flow_runs/{run}/set_state", {"state": state, "force": True})

    def cancel(self, run: str) -> None:
        self.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def read(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/flow_runs/{run}")
        return found

    def wait(self, run: str, *states: str) -> dict[str, Any]:
        """The run, once it is in one of these states, by default in any that is final."""

        def arrived() -> bool:
            return self.read(run)["state_type"] in (states or FINAL)

        wait_for(arrived, f"run {run} to be {' or '.join(states) or 'final'}")
        return self.read(run)

    def wait_until_reported(self, run: str) -> dict[str, Any]:
        """A killed run, once its worker has done with it: it reports it twice, and the second would undo a retry."""
        started, last = f"submitting flow run '{run}'", "prefect.flow_runs.worker - Check whether the flow run exceeded"
        log = self.home / "worker.log"
        wait_for(lambda: last in log.read_text().rpartition(started)[2], f"the worker's last word on {run}")
        return self.wait(run, "CRASHED")

    def log(self, run: str) -> list[str]:
        """What the run has logged, in order."""
        chosen = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return [line["message"] for line in self.call("POST", "/logs/filter", chosen)]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        deadline = time.monotonic() + LOCKED_S
        while True:
            answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def _start(self, name: str, *command: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [PREFECT, *command], cwd=self.home, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip


def end(process: subprocess.Popen[Any], *, patience_s: float = 30) -> None:
    """By SIGTERM; by force, with all that it has started, if that is not enough: a worker waits for its runs."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()


@contextmanager
def installation(home: Path, **environment: str) -> Iterator[Installation]:
    """A server with a worker and the deployment, for the length of the block. The database is SQLite by default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = Installation(home, port, {
        **os.environ, **read_env("server.env"), **read_env("worker.env"),  # as `make up` has them
        "PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_CLI_COLORS": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", **environment,
    })  # fmt: skip
    try:
        place.start_server()
        place.start_worker()
        place.deploy()
        yield place
    finally:
        for name in list(place.processes):
            place.stop(name, signal.SIGKILL if name.startswith("worker") else signal.SIGTERM)


def processes_of(run: str) -> list[int]:
    """Processes that work for a flow run, its helpers included: all have its id in their environment."""
    found, mark = [], f"PREFECT__FLOW_RUN_ID={run}".encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # has ended, or is not ours
    return found


def wait_for(happened: Callable[[], object], what: str, *, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if happened():
                return
        except httpx.HTTPError:
            pass  # not listening yet, or not there yet
        time.sleep(0.2)
    raise TimeoutError(f"waited in vain for {what}")
