"""The deployments of prefect.yaml on a real server with a real worker."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.flows.conftest import Place

ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@dataclass(frozen=True)
class Server:
    """A running `prefect server start`, and how commands reach it."""

    url: str
    folder: Path  # where commands start
    environment: Mapping[str, str]

    def prefect(self, *arguments: str) -> str:
        """What a command prints; it must end well."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PREFECT, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}").raise_for_status().json()


@pytest.fixture
def server(after_first: Place, tmp_path: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ, **after_first.environment, "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLI_COLORS": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }  # fmt: skip
    server = Server(url, after_first.path, environment)
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_for(lambda: httpx.get(f"{url}/health").is_success, "the server to answer")
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for(happened: Any, what: str) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            if happened():
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    pytest.fail(f"waited in vain for {what}")


def test_a_run_by_hand_goes_through_server_and_worker(
    server: Server, after_first: Place, plain: dict[str, Any]
) -> None:
    """The spec comes as JSON, is checked before a run exists, and names the run; the worker ends it well."""
    shutil.copy(ROOT / "prefect.yaml", after_first.path)
    server.prefect("work-pool", "create", "cpu", "--type", "process")
    server.prefect("--no-prompt", "deploy", "--all")
    deployment = server.get("/deployments/name/requantize/by-hand")
    assert deployment["entrypoint"] == "flows.requantize.requantize"
    assert deployment["schedules"] == []

    wrong = {"parameters": {"spec": {**plain, "quant": {"method": "guess"}}}}
    refused = httpx.post(f"{server.url}/deployments/{deployment['id']}/create_flow_run", json=wrong)
    assert refused.status_code == httpx.codes.CONFLICT
    assert "spec.quant.method" in refused.json()["detail"]

    def runs() -> list[dict[str, Any]]:
        answer = httpx.post(f"{server.url}/flow_runs/filter", json={})
        return list(answer.raise_for_status().json())

    assert runs() == []
    parameter = f"spec={json.dumps(plain)}"
    watched = server.start("deployment", "run", "requantize/by-hand", "--param", parameter, "--watch")
    try:
        wait_for(runs, "the run to be scheduled")
        log = server.prefect("worker", "start", "--pool", "cpu", "--run-once")
        output, _ = watched.communicate(timeout=60)
    finally:
        watched.kill()
        watched.wait()
    (run,) = runs()
    assert watched.returncode == 0, output + log
    assert run["state_name"] == "Unchanged"  # since the run that this place was left by
    assert run["name"].startswith("plain by hand ")
    assert after_first.leftovers() == []
