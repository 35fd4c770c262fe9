"""Whatever is killed, the next attempt goes on from what was finished: real processes, a real server, real signals."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows.alarms import alarms
from tasks.contracts.fleet import AlarmsSpec
from tasks.stores.base import open_store
from tests.flows.prefect_server import FINAL, Installation, processes_of, wait_for
from tests.flows.test_requantize import STEPS, TAKEN, trained

if TYPE_CHECKING:
    from tests.flows.conftest import Place
    from tests.tasks.stores.s3_server import S3Server

EPOCHS = 100  # of which a fast machine trains five to ten in a second
QAT = {
    "method": "qat", "search": False, "qat": {"epochs": EPOCHS, "patience": EPOCHS, "mirror": False}
}  # fmt: skip

# The flow again and again, each time in a process that is killed as soon as it has written something that lasts.
# They are forked from one that has loaded everything, as loading takes longer than the rest.
ATTEMPTS = """
import json, os, signal, sys
from pathlib import Path
import flows.requantize, tasks.check_data, tasks.check_parity, tasks.compare_draws, tasks.publish_report
import tasks.release_engine, tasks.score_champion
from tasks.contracts.spec import read_spec, spec_from
from tasks.stores.local import LocalStore

spec = spec_from(read_spec(Path(sys.argv[1])), origin="test")

def dying(write):
    def once(self, key, content, *rest):
        before = self._read(key)
        written = write(self, key, content, *rest)
        is_new = before is None or before[0] != content  # a quiet night writes its note again, as it was
        if is_new and "/runs/" not in key:  # a run's own documents, which each attempt writes
            os.kill(os.getpid(), signal.SIGKILL)
        return written
    return once

for attempt in range(30):
    child = os.fork()
    if not child:
        log = os.open(f"attempt-{attempt:02}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        LocalStore._write, LocalStore._write_if = dying(LocalStore._write), dying(LocalStore._write_if)
        state = flows.requantize.requantize(spec, return_state=True)
        Path("ended").write_text(f"{state.name}: {state.message}")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


def test_a_run_killed_after_every_single_step_repeats_none(
    place: Place, plain: dict[str, Any], prefect_server: str
) -> None:
    """Each attempt takes what was finished, adds one step or document, and is killed; in the end nothing is to do."""
    environment = {**os.environ, **place.environment, "PREFECT_API_URL": prefect_server}
    ended = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, "plain.yaml"], cwd=place.path, env=environment, text=True,
        capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert (place.path / "ended").exists(), ended.stdout + ended.stderr
    assert (place.path / "ended").read_text().startswith("Unchanged: nothing changed since run")
    logs = [path.read_text() for path in sorted(place.path.glob("attempt-*.log"))]
    taken = [log.count(TAKEN) for log in logs]
    # One more each time; then the release, the champion, and the note of what decided are written.
    assert taken == [*range(len(STEPS) + 1), len(STEPS), len(STEPS), 0]
    assert not any(": done in" in log for log in logs)  # it is said after the record is written
    assert len(place.stored("steps")) == len(STEPS)
    assert {"models/plain/releases/1", "models/plain/champion"} <= place.stored("models").keys()
    assert "models/plain/releases/2" not in place.stored("models")


def test_a_killed_run_goes_on_from_its_epoch_through_a_locked_database_and_a_restart(
    installed: Installation, after_first: Place, plain: dict[str, Any]
) -> None:
    """Its worker says that it crashed; retried, it repeats no epoch and no step, whatever happens to the server."""
    spec = {**plain, "quant": QAT}
    run = installed.run(spec, after_first.path, after_first.environment)
    wait_for(lambda: any(trained(after_first)), "an epoch")
    for pid in processes_of(run):
        os.kill(pid, signal.SIGKILL)
    crashed = installed.wait_until_reported(run)
    assert "-9" in crashed["state"]["message"]
    (epochs,) = trained(after_first)
    before = after_first.stored("steps")

    installed.retry(run)
    wait_for(lambda: len(trained(after_first)[0]) > len(epochs), "another epoch")
    with sqlite3.connect(installed.database, timeout=60) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(5)
        connection.rollback()
    connection.close()
    installed.stop("server")
    time.sleep(2)
    installed.start_server()
    ended = installed.wait(run)

    assert (ended["state_type"], ended["run_count"]) == ("COMPLETED", 2)
    record = json.loads(newest_record(after_first).read_text())
    assert [epoch["epoch"] for epoch in record["quantized"]["epochs"]] == list(range(1, EPOCHS + 1))
    assert record["quantized"]["epochs"][: len(epochs)] == epochs
    assert before.items() <= after_first.stored("steps").items()  # none was written again


def newest_record(place: Place) -> Path:
    return max((place.store / "models").rglob("record.json"), key=lambda path: path.stat().st_mtime_ns)


def test_a_run_whose_worker_died_too_is_found_by_its_heartbeat(
    installed: Installation, after_first: Place, plain: dict[str, Any]
) -> None:
    """Nobody is left to say that it crashed but the fleet's automation; then another worker goes on with it."""
    (silence,) = alarms(AlarmsSpec(dead_after_s=90), notify=None)
    with SyncPrefectClient(installed.url) as client:
        automation = client.create_automation(silence)
    try:
        run = run_with_a_heartbeat(installed, after_first, plain)
        installed.stop("worker", signal.SIGKILL)
        for pid in processes_of(run):
            os.kill(pid, signal.SIGKILL)
        assert installed.read(run)["state_type"] == "RUNNING"
        assert installed.wait(run, "CRASHED")["state"]["message"] == "No heartbeat for 90 s: the process is gone."
    finally:
        installed.call("DELETE", f"/automations/{automation}")
    installed.start_worker()
    installed.retry(run)
    assert installed.wait(run)["state_type"] == "COMPLETED"


def run_with_a_heartbeat(installed: Installation, place: Place, plain: dict[str, Any]) -> str:
    """A run that is training, and that the server has heard of by a heartbeat: it writes those in batches."""
    for attempt in range(5):
        lasting = {"epochs": 2 * EPOCHS, "patience": 2 * EPOCHS + attempt, "mirror": False}
        run = installed.run({**plain, "quant": {**QAT, "qat": lasting}}, place.path, place.environment)
        wait_for(partial(was_heard_or_has_ended, installed, run), "a heartbeat")
        if installed.read(run)["state_type"] == "RUNNING":
            return run
    raise TimeoutError("five runs ended before their first heartbeat was heard")


def was_heard_or_has_ended(installed: Installation, run: str) -> bool:
    return heartbeats(installed, run) > 0 or installed.read(run)["state_type"] in FINAL


def heartbeats(installed: Installation, run: str) -> int:
    chosen = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run}"]}}
    return int(installed.call("POST", "/events/filter", {"filter": chosen})["total"])


def test_a_store_that_is_away_for_a_while_is_waited_for(
    place: Place, mobile: dict[str, Any], s3_server: S3Server, s3_url: str
) -> None:
    """The gateway is killed in the middle of a run, and comes back; no step that was finished is repeated."""
    remote = replace(place, store_url=s3_url)
    store = open_store(s3_url)

    def outage() -> None:
        wait_for(lambda: store.list("steps/score_float/"), "the middle of the run")
        s3_server.kill_gateway()
        time.sleep(15)
        s3_server.start_gateway()
        over.wait()  # it dies with the thread that started it

    over, trouble = threading.Event(), threading.Thread(target=outage)
    trouble.start()
    try:
        run = remote.run(mobile)
    finally:
        over.set()
        trouble.join()
        s3_server.kill_gateway()
        s3_server.start_gateway()  # for the tests that follow
    assert run.state.is_completed(), run.log[-3:]
    done = [line.partition(":")[0] for line in run.log if ": done in" in line]
    assert done == list(dict.fromkeys(done))


HELPERS = {
    "processes that measure images": (
        "import time; from tasks.data.parallel import in_processes\nlist(in_processes(time.sleep, [60, 60]))"
    ),
    "the probe of memory": (
        "import sys; from pathlib import Path; from tasks.scoring.memory import peak_memory_mib\n"
        "peak_memory_mib(Path(sys.argv[1]), threads=1, batch_size=1)"
    ),
}


def save_endless(path: Path) -> None:
    """A model that counts for hours."""
    value = onnx.helper.make_tensor_value_info
    flag, number = onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["go"], ["go_on"]),
            onnx.helper.make_node("Add", ["sum", "sum"], ["double"]),
        ],
        "body",
        [value("turn", onnx.TensorProto.INT64, []), value("go", flag, []), value("sum", number, None)],
        [value("go_on", flag, []), value("double", number, None)],
    )
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Loop", ["turns", "", "input"], ["output"], body=body)],
        "endless",
        [value("input", number, ["N", 4])],
        [value("output", number, ["N", 4])],
        [onnx.helper.make_tensor("turns", onnx.TensorProto.INT64, [], [2**40])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def children(pid: int) -> list[int]:
    """All that it has started, and what they have."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listed.read_text().split():
            found += [int(child), *children(int(child))]
    return found


@pytest.mark.parametrize("helper", HELPERS)
def test_helpers_do_not_outlive_a_killed_run(helper: str, tmp_path: Path) -> None:
    """Neither of them would hear of it by itself for minutes."""
    save_endless(tmp_path / "endless.onnx")
    parent = subprocess.Popen([sys.executable, "-c", HELPERS[helper], str(tmp_path / "endless.onnx")])
    try:
        wait_for(lambda: len(children(parent.pid)) >= (2 if "images" in helper else 1), "helpers to start")
        time.sleep(8)  # they have imported what they need, and are at work
        started = children(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in started), "helpers to end", limit_s=10)
