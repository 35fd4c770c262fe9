"""`requant up` and `requant down`: real servers, databases and workers under a real supervisord."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
import torch

from flows.machine import LONGEST_SOCKET, ROOT, _gpus, _ours, _postgres_binaries
from tasks.contracts.spec import GatesSpec, ModelSpec
from tasks.models.architectures import build_model
from tasks.models.weights import save_weights

datatypes = pytest.importorskip("supervisor.datatypes", reason="supervisord is not installed")
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Machine:
    """A folder in which everything is started, and what it is started with."""

    folder: Path
    port: int

    @property
    def state(self) -> Path:
        return self.folder / "up"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def call(self, *arguments: str, status: int | None = 0, **more: str) -> str:
        """What `requant …` says; it must end with `status`."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "CUDA_"))},
            "REQUANT_STORE": str(self.folder / "store"), "REQUANT_SCRATCH": str(self.folder / "scratch"),
            "REQUANT_UP": str(self.state), "OMP_NUM_THREADS": "1",
            **more,
        }  # fmt: skip
        ended = subprocess.run(
            [BIN / "requant", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=500
        )
        assert status in (None, ended.returncode), ended.stdout + ended.stderr + self.logs()
        return ended.stdout + ended.stderr

    def up(self, *arguments: str, status: int = 0, **more: str) -> str:
        """For the first time; after that the port is known."""
        return self.call("up", "--port", str(self.port), *arguments, status=status, **more)

    def pids(self) -> dict[str, int]:
        """Of all that runs, by name."""
        lines = (line.split() for line in self.call("status", status=None).splitlines())
        return {words[0]: int(words[3].rstrip(",")) for words in lines if words[1] == "RUNNING"}

    def logs(self) -> str:
        return "".join(f"\n{path.name}\n{path.read_text()[-2000:]}" for path in self.state.glob("logs/*.log"))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30).raise_for_status().json()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """With a short path, as sockets need, which PostgreSQL's user can enter where tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="requant-"))
    folder.chmod(0o755)
    machine = Machine(folder, free_port())
    try:
        yield machine
    finally:
        for process in _ours(machine.state):
            process.kill()
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Answers(HTTPServer):
    """Somebody else's server, which answers everything with its status."""

    status = 200


@contextmanager
def answering(port: int) -> Iterator[Answers]:
    class Handler(BaseHTTPRequestHandler):
        server: Answers

        def do_GET(self) -> None:
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with Answers(("127.0.0.1", port), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 400) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
    return found


def spec_in(folder: Path) -> dict[str, Any]:
    """A run of seconds: untrained weights, and no gate."""
    model = ModelSpec(architecture="tasks.models.digits:digits_net", weights=str(folder / "digits.safetensors"))
    torch.manual_seed(0)
    save_weights(build_model(model, 10).eval(), folder / "digits.safetensors")
    return {
        "name": "digits",
        "model": model.model_dump(mode="json", exclude_unset=True),
        "data": {
            "source": "digits", "calibration": 64, "selection": 64, "gate": 128,
            "checks": {"num_calibration": {"low": 32}},
        },
        "quant": {"method": "ptq", "ranges": "minmax", "search": False, "bias_correction": False, "float_budget": 0},
        "evaluation": {"latency_batch_sizes": [1], "latency_rounds": 10},
        "gates": dict.fromkeys(GatesSpec.model_fields),
    }  # fmt: skip


def test_from_nothing_to_a_run_and_back_to_nothing(machine: Machine) -> None:
    """With what database there is: a run by hand ends well, what dies comes back, and nothing stays behind."""
    said = machine.up(REQUANT_ALARM_URL="https://example.org/secret-token", REQUANT_REDO="true")
    assert f"http://127.0.0.1:{machine.port}" in said
    assert ("PostgreSQL" in said) == (_postgres_binaries(None) is not None)
    first = machine.pids()
    assert set(first) >= {"server", "worker-cpu"}
    supervisord = int((machine.state / "supervisord.pid").read_text())
    for pid in (supervisord, *first.values()):
        assert not {"REQUANT_ALARM_URL", "REQUANT_REDO"} & psutil.Process(pid).environ().keys()
    assert "secret-token" not in (machine.state / "supervisord.conf").read_text()

    (deployment,) = machine.post("/deployments/filter", {"deployments": {"name": {"any_": ["by-hand"]}}})
    body = {"parameters": {"spec": spec_in(machine.folder)}, "state": {"type": "SCHEDULED"}}
    run = machine.post(f"/deployments/{deployment['id']}/create_flow_run", body)["id"]

    machine.call("up")  # again, while a run is under way
    assert machine.pids() == first
    with answering(free_port()) as other:
        refused = machine.call("up", "--port", str(other.server_port), status=1)
        assert f"Port {other.server_port} cannot be had" in refused
    assert machine.pids() == first
    assert "absent.yaml: No such file" in machine.call("up", "absent.yaml", status=1)
    assert machine.url in machine.call("up")  # what was refused is not remembered
    ended = wait_for(
        lambda: (found := httpx.get(f"{machine.url}/flow_runs/{run}").json())["state_type"]
        in ("COMPLETED", "FAILED", "CRASHED") and found,
        "the run",
    )  # fmt: skip
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"] + machine.logs()
    assert list(machine.folder.glob("store/models/digits/runs/*/record.json"))

    os.kill(first["worker-cpu"], signal.SIGKILL)
    wait_for(lambda: machine.pids().get("worker-cpu", first["worker-cpu"]) != first["worker-cpu"], "another worker")

    started = _ours(machine.state)
    machine.call("down")
    assert not any(process.is_running() for process in started)
    assert _ours(machine.state) == []
    assert "Nothing runs" in machine.call("status", status=3)


def test_a_killed_supervisord_leaves_nothing_for_long(machine: Machine) -> None:
    """What it left is known again, and ended, by whichever command comes next."""
    machine.up("--database", "sqlite")
    assert (machine.state / "prefect/prefect.db").exists()
    first = machine.pids()
    os.kill(int((machine.state / "supervisord.pid").read_text()), signal.SIGKILL)
    assert all(str(pid) in machine.call("status", status=3) for pid in first.values())
    assert not {process.pid for process in _ours(machine.state)}.isdisjoint(first.values())
    machine.call("down")
    assert _ours(machine.state) == []
    assert "has its runs in sqlite" in machine.call("up", "--database", "postgresql", status=1)


def test_a_taken_port_is_refused_before_anything_starts(machine: Machine) -> None:
    """By whom it is taken is not ours to end."""
    with socket.create_server(("127.0.0.1", machine.port)):
        assert f"Port {machine.port} cannot be had" in machine.up("--database", "sqlite", status=1)
    assert _ours(machine.state) == []
    assert not (machine.state / "supervisord.conf").exists()


def test_a_path_that_no_socket_can_have_is_refused(machine: Machine) -> None:
    """Linux would cut it."""
    said = machine.call("up", "--state", str(machine.folder / ("x" * LONGEST_SOCKET)), status=1)
    assert f"{LONGEST_SOCKET} bytes" in said


def test_each_gpu_has_a_worker_of_its_own(machine: Machine, tmp_path: Path) -> None:
    """As nvidia-smi names them; without a driver that answers, nothing starts."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-1a; echo GPU-2b\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    (machine.state / "logs/supervisord.log").mkdir(parents=True)  # the configuration is all that is wanted
    assert "supervisord does not start" in machine.up("--database", "sqlite", status=1, PATH=path)
    conf = configparser.RawConfigParser(comment_prefixes=(";",))
    conf.read(machine.state / "supervisord.conf")
    workers = {name: conf[name] for name in conf.sections() if name.startswith("program:worker-gpu")}
    assert list(workers) == ["program:worker-gpu-0", "program:worker-gpu-1"]
    for worker, gpu in zip(workers.values(), ("GPU-1a", "GPU-2b"), strict=True):
        assert datatypes.dict_of_key_value_pairs(worker["environment"])["CUDA_VISIBLE_DEVICES"] == gpu
        assert "--pool gpu" in worker["command"]
        assert worker["command"].endswith("--limit 1")
    sent = datatypes.dict_of_key_value_pairs(conf["program:worker-cpu"]["environment"])
    assert json.loads(sent["REQUANT_BUILD_ON"])["tensorrt"] == "build/gpu"
    tool.write_text("#!/bin/sh\necho the driver is gone; exit 9\n")
    assert "the driver is gone" in machine.call("up", status=1, PATH=path)


@pytest.mark.parametrize(
    ("visible", "gpus"), [("", []), ("-1", []), ("0,1", ["0", "1"]), (" 0, GPU-1a ,", ["0", "GPU-1a"]), ("2,-1", ["2"])]
)
def test_gpus_are_those_that_cuda_would_see(visible: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the list to the first number below zero."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpus() == gpus


def test_a_worker_waits_for_its_server(machine: Machine) -> None:
    """The command starts when the server answers with health, and not when it merely listens."""

    with answering(machine.port) as server:
        server.status = 503
        command = [sys.executable, "-m", "flows.after_server", sys.executable, "-c", "print('started')"]
        environment = {**os.environ, "PREFECT_API_URL": machine.url}
        waiting = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.communicate(timeout=5)
            server.status = 200
            assert waiting.communicate(timeout=60)[0] == "started\n"
        finally:
            waiting.kill()
